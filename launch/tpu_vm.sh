#!/usr/bin/env bash
# A run on Cloud TPU from one command: a TPU by queued resources, the code and its packages on all of
# its hosts, the run with its log here, a new TPU and on from the last checkpoint after a preemption,
# and no TPU left in the end.
#
#   launch/tpu_vm.sh NAME TYPE --zone ZONE [OPTION ...] -- ARGUMENT_OF_OPSD_JAX ...
#
#   launch/tpu_vm.sh opsd8b v5litepod-64 --zone us-west4-a --spot \
#     --setup 'gcloud storage cp --recursive gs://my-bucket/Qwen3-8B .' -- \
#     train --config configs/qwen3_8b_opsd_v5e64.py --workdir gs://my-bucket/opsd8b \
#     --config.model.path=Qwen3-8B
#
#   --project ID        default: gcloud's
#   --spot | --reserved default: on demand
#   --version RUNTIME   of the TPU's software (default: by TYPE)
#   --slices N          so many TPUs as one, over the data centre's network
#   --attempts N        TPUs to ask for, one after another, before it gives up (default: 20)
#   --setup COMMAND     run on every host before, in the code's directory: weights, mounts, logins
#   --keep              leave the TPU, and its costs, when the run has ended well
#   --dry-run           print the commands, run none
#
# The run goes on when a connection to the TPU breaks. What ends without having run for ten minutes,
# three times in a row, is not tried again.
#
# So that a run can go on where it was, its workdir outlives the TPU: it is in a bucket, or on a disk
# that all hosts mount.
# Exit codes: opsd-jax's (0 done, 1 failed, 2 bad usage); 3 when it gave up; 4 when a TPU may be left.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' launch/tpu_vm.sh >&2; exit 2; }
say() { echo "tpu_vm.sh: $*" >&2; }

[ $# -ge 2 ] || usage
name=$1 type=$2
shift 2
zone="" kind=() project=() version="" slices=1 attempts=20 before="" keep="" dry=""
while [ $# -gt 0 ]; do
  case $1 in
    --zone) zone=$2; shift ;;
    --project) project=(--project "$2"); shift ;;
    --spot | --reserved) kind=("$1") ;;
    --version) version=$2; shift ;;
    --slices) slices=$2; shift ;;
    --attempts) attempts=$2; shift ;;
    --setup) before=$2; shift ;;
    --keep) keep=yes ;;
    --dry-run) dry=yes ;;
    --) shift; break ;;
    *) say "unknown option $1"; usage ;;
  esac
  shift
done
[ -n "$zone" ] || { say "--zone is missing, such as --zone us-west4-a"; exit 2; }
[ $# -gt 0 ] || { say "what to run is missing, after --"; exit 2; }
if [ -z "$version" ]; then
  case $type in
    v5litepod-* | v5e-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi
where=(--zone "$zone" "${project[@]}")
nodes=(--node-id "$name")
hosts=("$name")
if [ "$slices" -gt 1 ]; then
  nodes=(--node-count "$slices" --node-prefix "$name")
  hosts=()
  for ((i = 0; i < slices; i++)); do hosts+=("$name-$i"); done
fi

call() { # a command, or in a dry run its text
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

state() { # of the request: ACTIVE, FAILED, ...; NONE if there is none, UNKNOWN if nobody tells
  if ! gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format 'value(state.state)' 2>"$errors"; then
    if grep -qi 'not.found' "$errors"; then echo NONE; else echo UNKNOWN; fi
  fi
}

create() {
  call gcloud compute tpus queued-resources create "$name" "${nodes[@]}" \
    --accelerator-type "$type" --runtime-version "$version" "${where[@]}" "${kind[@]}"
}

delete() { # with its machines; tells where that cannot be seen to have happened
  local command=(gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet)
  if [ -n "$dry" ]; then call "${command[@]}"; return 0; fi
  for _ in 1 2 3; do
    [ "$(state)" != NONE ] || return 0
    "${command[@]}" >&2 || sleep "${POLL_SECONDS:-20}"
  done
  [ "$(state)" != NONE ] || return 0
  say "COULD NOT DELETE $name: it may go on costing. See to it: ${command[*]}"
  return 1
}

# shellcheck disable=SC2329  # a trap calls it
leave() { # however this ends
  local code=$?
  trap - EXIT
  trap '' INT TERM HUP # an impatient second one is not to leave the TPU behind
  if [ -n "$made" ]; then
    if [ "$code" = 0 ] && [ -n "$keep" ]; then
      say "$name is kept and goes on costing. Delete it: gcloud compute tpus queued-resources" \
        "delete $name ${where[*]} --force"
    else
      delete || code=4
    fi
  fi
  rm -rf "$files"
  exit "$code"
}

wait_for_it() { # until the TPU is there; fails where it will not be
  [ -z "$dry" ] || return 0
  local now="" before="" unknown=0
  while :; do
    now=$(state)
    [ "$now" = "$before" ] || say "$name is $now"
    before=$now
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | NONE) return 1 ;;
      UNKNOWN) # it may be there, and cost, and nobody tells
        unknown=$((unknown + 1))
        [ "$unknown" -lt 30 ] || { cat "$errors" >&2; exit 3; }
        ;;
      *) unknown=0 ;;
    esac
    sleep "${POLL_SECONDS:-20}"
  done
}

on_all() { # a command on every host, with its output here
  local host pids=() failed=0
  for host in "${hosts[@]}"; do
    if [ -n "$dry" ]; then
      call gcloud compute tpus tpu-vm ssh "$host" "${where[@]}" --worker all --command "$1"
      continue
    fi
    gcloud compute tpus tpu-vm ssh "$host" "${where[@]}" --worker all --command "$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return "$failed"
}

# The machines' own Python is older than 3.11: then uv brings one.
# shellcheck disable=SC2016  # the hosts expand it
python='python3 -c "import sys; sys.exit(sys.version_info < (3, 11))" || {
  [ -e ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
  ~/.local/bin/uv python install 3.12 && export PYTHON=$(~/.local/bin/uv python find 3.12)
}
cd opsd_jax && . launch/setup.sh && setup tpu,gcs'

install() {
  local host
  for host in "${hosts[@]}"; do
    call gcloud compute tpus tpu-vm scp "$archive" "$host:opsd_jax.tar.gz" \
      "${where[@]}" --worker all || return 1
  done
  on_all "mkdir -p opsd_jax && tar -xzf opsd_jax.tar.gz -C opsd_jax && { $python; }${before:+ && $before}"
}

is_there() { [ -n "$dry" ] || [ "$(state)" = ACTIVE ]; }

set_up() { # fails where the TPU is lost; where it is there and cannot be set up that is the end
  for _ in 1 2; do
    if install; then return 0; fi
    is_there || return 1
  done
  say "$name cannot be set up"
  exit 1
}

runs=0
run() { # the exit code of opsd-jax on the first host, 75 where that host is lost
  local command code silent=0
  printf -v command '%q ' opsd-jax "$@" --coordinator auto
  runs=$((runs + 1))
  # It has a session of its own, and outlives the connection; who comes again finds it.
  printf -v command '%q' "$command; echo \$? > exit.$runs"
  command="{ $python; } && { [ -e pid.$runs ] || {
  for old in pid.*; do [ ! -e \"\$old\" ] || kill -9 -- -\$(cat \"\$old\") 2>/dev/null; done
  setsid bash -c $command > log.$runs 2>&1 < /dev/null & echo \$! > pid.$runs
}; tail --pid \$(cat pid.$runs) -n +1 -F log.$runs; }"
  while :; do
    on_all "$command" || true
    if [ -n "$dry" ]; then
      call gcloud compute tpus tpu-vm ssh "${hosts[0]}" "${where[@]}" --worker 0 \
        --command "cat opsd_jax/exit.$runs"
      return 0
    fi
    code=$(gcloud compute tpus tpu-vm ssh "${hosts[0]}" "${where[@]}" --worker 0 --command \
      "cat opsd_jax/exit.$runs || { kill -0 \$(cat opsd_jax/pid.$runs) && echo running; }" \
      2>/dev/null) || code=""
    case $code in
      running) silent=0 ;;
      "") # the host is lost, or this end of the line is: then the TPU is there, or nobody tells
        case $(state) in ACTIVE | UNKNOWN) ;; *) return 75 ;; esac
        silent=$((silent + 1))
        [ "$silent" -lt 30 ] || return 75
        ;;
      *) return "$code" ;;
    esac
    say "the connection broke; the run goes on"
    sleep "${POLL_SECONDS:-20}"
  done
}

made="" files=$(mktemp -d)
archive=$files/opsd_jax.tar.gz errors=$files/errors
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
if [ -n "$dry" ]; then
  call git archive --format tar.gz --output "$archive" HEAD
else
  now=$(state)
  case $now in
    NONE) ;;
    UNKNOWN) cat "$errors" >&2; exit 2 ;;
    *) say "there is a request $name already ($now); choose another name or delete it"; exit 2 ;;
  esac
  git archive --format tar.gz --output "$archive" HEAD
fi

short=0
for ((attempt = 1; attempt <= attempts; attempt++)); do
  made=yes # from here on there may be one
  if ! create; then
    [ "$attempt" -gt 1 ] || { say "the request was refused"; exit 3; }
  elif wait_for_it && set_up; then
    while :; do
      code=0
      began=$SECONDS
      run "$@" || code=$?
      case $code in
        0) exit 0 ;;
        75 | 134 | 143) ;; # a host was lost, or told to stop: it can go on
        *) say "opsd-jax ended with exit code $code"; exit "$code" ;;
      esac
      is_there || break
      short=$((SECONDS - began < 600 ? short + 1 : 0))
      if [ "$short" = 3 ]; then
        say "exit code $code, three times in a row within ten minutes: that is the end"
        exit "$code"
      fi
      say "exit code $code, and $name is there: it goes on"
      sleep "${POLL_SECONDS:-20}"
    done
  fi
  say "attempt $attempt of $attempts: $name is lost or was not to be had"
  delete || exit 4
  made=""
  sleep "${POLL_SECONDS:-20}"
done
say "gave up after $attempts attempts"
exit 3
