#!/usr/bin/env bash
# Runs the linter, the type checker and the tests in .venv, with the `test` extra installed.
#
#   ./launch/test.sh [--newer] [--slow | --pod] [PYTEST ARGUMENT ...]
#
# --slow runs the tests marked "slow" instead of the others. They also need torch, transformers and
# the compiler for TPUs, which it installs. --pod runs the tests marked "pod" instead: each compiles
# a whole run for a TPU pod, for ten minutes or more.
#
# --newer runs the same with the newer versions of JAX and Flax, which need Python 3.12 or 3.13, in
# .venv-newer.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
. launch/setup.sh

if [ "${1:-}" = --newer ]; then
  PYTHON=${PYTHON:-$(newer_python)}
  if ! is_python "$PYTHON" 12; then
    echo "--newer: '$PYTHON' is not Python 3.12 or newer. Set PYTHON to the path of one." >&2
    exit 2
  fi
  export OPSD_JAX_VENV=${OPSD_JAX_VENV:-.venv-newer}
  shift
fi
which_tests="not slow and not pod" extra=test
case ${1:-} in
  --slow) which_tests="slow and not pod" extra=test,parity,tpu; shift ;;
  --pod) which_tests="pod" extra=test,parity,tpu; shift ;;
esac
setup "$extra"
ruff format --check .
ruff check .
mypy

status=0
if [ "$extra" = test ]; then
  # A test marked "alone" has a limit on its time, so it runs before the others, not beside them.
  pytest -m alone "$@" || status=$?
  if [ "$status" -eq 5 ]; then status=0; fi # none was selected
fi
pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
  -m "$which_tests and not alone" "$@" || status=$?
exit "$status"
