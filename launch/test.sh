#!/usr/bin/env bash
# Lint, types and tests, in .venv with the test extra.
#
#   ./launch/test.sh [--slow] [PYTEST ARGUMENT ...]     --slow: the tests marked slow as well
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
. launch/setup.sh
setup test

which_tests="not slow"
if [ "${1:-}" = --slow ]; then which_tests="slow or not slow"; shift; fi
ruff format --check .
ruff check .
mypy
exec pytest -m "$which_tests" "$@"
