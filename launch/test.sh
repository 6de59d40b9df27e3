#!/usr/bin/env bash
# Runs the linter, the type checker and the tests in .venv, with the `test` extra installed.
#
#   ./launch/test.sh [--slow] [PYTEST ARGUMENT ...]
#
# --slow runs the tests marked "slow" instead of the others. They also need torch, transformers and
# the compiler for TPUs, which it installs.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
. launch/setup.sh

which_tests="not slow" extra=test
if [ "${1:-}" = --slow ]; then which_tests="slow" extra=test,parity,tpu; shift; fi
setup "$extra"
ruff format --check .
ruff check .
mypy
exec pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "$which_tests" "$@"
