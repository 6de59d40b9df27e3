# Sourced by the other scripts: `setup [EXTRA]` makes .venv (or $OPSD_JAX_VENV) beside the code,
# installs the package and the extra in it, and does nothing where that has been done.
# shellcheck shell=bash

setup() {
  local extra=${1:-} venv=${OPSD_JAX_VENV:-.venv} python=${PYTHON:-python3} mark wanted
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "Python 3.11 or newer is needed and '$python' is not one; set PYTHON to one." >&2
    return 2
  fi
  # What was installed, from where and for which Python: a moved or changed checkout installs anew.
  wanted=$({ cat pyproject.toml constraints.txt; pwd; "$python" --version; } | cksum)
  mark=$venv/installed${extra:+-$extra}
  if [ "$(cat "$mark" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing into $venv (a minute or so, once) ..."
    # An installation that was killed may look whole to pip: begin again.
    if [ -e "$venv/installing" ]; then rm -rf "$venv"; fi
    mkdir -p "$venv" && touch "$venv/installing"
    # Some distributions keep ensurepip in a package of its own: then the outer pip does it.
    if "$python" -c 'import ensurepip' 2>/dev/null; then
      "$python" -m venv "$venv" || return 1
    else
      "$python" -m venv --without-pip "$venv" || return 1
    fi
    if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
      set -- "$venv/bin/python" -m pip
    else
      set -- "$python" -m pip --python "$venv/bin/python"
    fi
    "$@" --disable-pip-version-check install --quiet \
      --constraint constraints.txt --editable ".${extra:+[$extra]}" || return 1
    rm "$venv/installing"
    echo "$wanted" > "$mark"
  fi
  PATH=$(cd "$venv" && pwd)/bin:$PATH
}
