# The other scripts source this file.
#
# `setup [EXTRA]` creates .venv (or $OPSD_JAX_VENV), installs the package and the extra into it, and
# puts it on PATH. It skips what is installed already.
# `is_python PATH MINOR` succeeds if PATH is Python 3.MINOR or newer.
# `newer_python` prints the path of a Python 3.13 or 3.12, if one runs here.
# shellcheck shell=bash

setup() {
  local extra=${1:-} venv=${OPSD_JAX_VENV:-.venv} python=${PYTHON:-python3} constraints mark wanted
  if ! is_python "$python" 11; then
    echo "'$python' is not Python 3.11 or newer. Set PYTHON to the path of one." >&2
    return 2
  fi
  # Python 3.11 and newer ones have different versions of JAX.
  constraints=constraints/python3.11.txt
  if is_python "$python" 12; then constraints=constraints/python3.12.txt; fi
  # The mark records what was installed, from where, and for which Python version. A checkout that
  # was moved or changed is installed again.
  wanted=$({
    cat pyproject.toml "$constraints"
    grep __version__ opsd_jax/__init__.py
    pwd
    "$python" --version
  } | cksum)
  mark=$venv/installed${extra:+-$extra}
  if [ "$(cat "$mark" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing into $venv (only this once, about a minute) ..."
    # pip can take a half-finished installation for a complete one, so start again.
    if [ -e "$venv/installing" ]; then rm -rf "$venv"; fi
    mkdir -p "$venv" && touch "$venv/installing"
    # Some distributions package ensurepip separately. Without it, the outer pip installs.
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
      --constraint "$constraints" --editable ".${extra:+[$extra]}" || return 1
    rm "$venv/installing"
    echo "$wanted" > "$mark"
  fi
  PATH=$(cd "$venv" && pwd)/bin:$PATH
}

is_python() {
  "$1" -c "import sys; sys.exit(sys.version_info < (3, $2))" 2>/dev/null
}

newer_python() {
  local version
  for version in 3.13 3.12; do
    # Without PYENV_VERSION, pyenv's command may exist but fail.
    if PYENV_VERSION=$version "python$version" -c 'import sys; print(sys.executable)' 2>/dev/null; then
      return
    fi
  done
  echo "Neither Python 3.13 nor 3.12 is on PATH." >&2
  return 2
}

# Runs on the CPU unless JAX_PLATFORMS says otherwise. XLA:CPU allocates its temporary arrays again
# at each execution. These settings make glibc keep freed memory, in huge pages: train steps of
# SmolLM2-135M take a sixth less time (benchmarks/README.md).
use_cpu() {
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
  if [ "$JAX_PLATFORMS" = cpu ]; then
    export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368}
  fi
}
