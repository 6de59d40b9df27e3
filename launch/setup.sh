# Sourced by the other scripts: `setup [EXTRA]` makes .venv (or $OPSD_JAX_VENV) beside the code,
# installs the package and the extra in it, and does nothing where that has been done.
# shellcheck shell=bash

setup() {
  local extra=${1:-} venv=${OPSD_JAX_VENV:-.venv} python=${PYTHON:-python3} mark wanted
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "Python 3.11 or newer is needed and '$python' is not one; set PYTHON to one." >&2
    return 2
  fi
  mark=$venv/installed${extra:+-$extra}
  wanted=$(cat pyproject.toml constraints.txt | cksum)
  if [ "$(cat "$mark" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing into $venv (a minute or so, once) ..."
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint constraints.txt --editable ".${extra:+[$extra]}"
    echo "$wanted" > "$mark"
  fi
  PATH=$(cd "$venv" && pwd)/bin:$PATH
}
