#!/usr/bin/env bash
# Lint, types and tests, in .venv with the test extra.
#
#   ./launch/test.sh [--slow] [PYTEST ARGUMENT ...]
#
# --slow: the tests marked slow in place of the others. They need torch and transformers as well,
# and the compiler for TPUs.
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
