#!/usr/bin/env bash
# The quickstart on this machine's CPU: sets up .venv, trains SFT → RLVR → OPSD, says where the
# report is. Stopped or killed, it goes on where it was when it is called again.
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
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
exec python -m opsd_jax train \
  --config "${CONFIG:-configs/quickstart.py}" --workdir "$workdir" "$@"
