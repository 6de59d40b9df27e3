#!/usr/bin/env bash
# Does what launch/released.sh does on one NVIDIA GPU, such as an H100, in bfloat16: trains
# SmolLM2-135M-Instruct through SFT → RLVR → OPSD. It takes the same arguments. Set MODEL and CONFIG
# for another model and config. It has not run on a GPU yet.
#
#   ./launch/gpu.sh [--short] [WORKDIR] [--config.field=value ...]
set -euo pipefail
if ! nvidia-smi --list-gpus; then
  echo "There is no NVIDIA GPU (nvidia-smi failed). On a CPU, run ./launch/released.sh." >&2
  exit 2
fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda} EXTRA=cuda,released
exec "$(dirname "$0")/released.sh" "$@" --config.model.dtype=bfloat16
