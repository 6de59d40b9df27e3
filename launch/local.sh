#!/usr/bin/env bash
# Runs the quickstart on this machine's CPU: installs the package into .venv, trains
# SFT → RLVR → OPSD, and prints the path of the report. If it is stopped or killed, run the same
# command again to resume.
#
#   ./launch/local.sh [WORKDIR] [--config.field=value ...]     (default: runs/quickstart)
#   CONFIG=configs/quickstart_arms.py ./launch/local.sh runs/arms
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
. launch/setup.sh
setup ""

workdir=$PWD/runs/quickstart
case ${1:-} in
  --*) ;;
  /*) workdir=$1; shift ;;
  ?*) workdir=$caller/$1; shift ;;
esac
use_cpu
exec python -m opsd_jax train \
  --config "${CONFIG:-configs/quickstart.py}" --workdir "$workdir" "$@"
