#!/usr/bin/env bash
# Runs opsd-jax on Cloud TPU: creates the TPU by a queued resource, installs the code on all hosts,
# runs the job and prints its log here, and deletes the TPU. After a preemption it creates a new TPU
# and resumes from the last checkpoint.
#
#   launch/tpu_vm.sh NAME TYPE --zone ZONE [OPTION ...] -- ARGUMENT_OF_OPSD_JAX ...
#
#   launch/tpu_vm.sh opsd8b v5litepod-64 --zone us-west4-a --spot \
#     --setup 'gcloud storage cp --recursive gs://my-bucket/Qwen3-8B .' -- \
#     train --config configs/qwen3_8b_opsd_v5e64.py --workdir gs://my-bucket/opsd8b \
#     --config.model.path=Qwen3-8B
#
#   --project ID        project (default: the current project of gcloud)
#   --spot | --reserved kind of capacity (default: on demand)
#   --version RUNTIME   TPU software version (default: depends on TYPE)
#   --slices N          number of slices, connected by the data center network (default: 1)
#   --attempts N        TPUs to request, one after another, before giving up (default: 20)
#   --setup COMMAND     run COMMAND first, on every host, in the directory of the code: for example
#                       to copy weights, mount disks or log in
#   --keep              keep the TPU, which continues to cost money, if the run succeeds
#   --dry-run           print the commands, and run nothing
#
# If the connection to the TPU breaks, the run continues and the script reconnects. If the run stops
# within ten minutes of its start three times in a row, the script does not start it again.
#
# The workdir must outlive the TPU, or the run cannot resume on a new one. Put it in a bucket or on
# a disk that all hosts mount.
# Exit codes: the exit code of opsd-jax (0 the run is done, 1 it failed, 2 the arguments are wrong);
# 3 the script gave up; 4 the TPU may still exist.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' launch/tpu_vm.sh >&2; exit 2; }
log() { echo "tpu_vm.sh: $*" >&2; }

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
    *) log "unknown option $1"; usage ;;
  esac
  shift
done
[ -n "$zone" ] || { log "--zone is missing; give one, such as --zone us-west4-a"; exit 2; }
[ $# -gt 0 ] || { log "the arguments of opsd-jax are missing; write them after --"; exit 2; }
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

call() { # Runs a command. In a dry run, prints it instead.
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

# Prints the state of the request, such as ACTIVE or FAILED. Prints NONE if there is no request, and
# UNKNOWN if gcloud gives no answer.
state() {
  if ! gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format 'value(state.state)' 2>"$errors"; then
    if grep -qi 'not.found' "$errors"; then echo NONE; else echo UNKNOWN; fi
  fi
}

create() { # Requests the TPU.
  call gcloud compute tpus queued-resources create "$name" "${nodes[@]}" \
    --accelerator-type "$type" --runtime-version "$version" "${where[@]}" "${kind[@]}"
}

delete() { # Deletes the request and its TPU. Fails if they may still exist.
  local command=(gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet)
  if [ -n "$dry" ]; then call "${command[@]}"; return 0; fi
  for _ in 1 2 3; do
    [ "$(state)" != NONE ] || return 0
    "${command[@]}" >&2 || sleep "${POLL_SECONDS:-20}"
  done
  [ "$(state)" != NONE ] || return 0
  log "COULD NOT DELETE $name. It may still cost money. Delete it with: ${command[*]}"
  return 1
}

# shellcheck disable=SC2329  # the trap below calls it
leave() { # Deletes the TPU, however the script ends.
  local code=$?
  trap - EXIT
  trap '' INT TERM HUP # a second Ctrl-C must not stop the deletion
  if [ -n "$created" ]; then
    if [ "$code" = 0 ] && [ -n "$keep" ]; then
      log "$name is kept and continues to cost money. Delete it with: gcloud compute tpus" \
        "queued-resources delete $name ${where[*]} --force"
    else
      delete || code=4
    fi
  fi
  rm -rf "$files"
  exit "$code"
}

wait_until_active() { # Waits for the TPU. Fails if the request has ended without one.
  [ -z "$dry" ] || return 0
  local now="" before="" unknown=0
  while :; do
    now=$(state)
    [ "$now" = "$before" ] || log "$name is $now"
    before=$now
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | NONE) return 1 ;;
      UNKNOWN) # the TPU may exist and cost money, so give up only after many tries
        unknown=$((unknown + 1))
        [ "$unknown" -lt 30 ] || { cat "$errors" >&2; exit 3; }
        ;;
      *) unknown=0 ;;
    esac
    sleep "${POLL_SECONDS:-20}"
  done
}

on_all_hosts() { # Runs a command on every host and prints the output here.
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

# If the Python of the hosts is older than 3.11, uv installs a newer one.
# shellcheck disable=SC2016  # the hosts expand the variables
python='python3 -c "import sys; sys.exit(sys.version_info < (3, 11))" || {
  [ -e ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
  ~/.local/bin/uv python install 3.12 && export PYTHON=$(~/.local/bin/uv python find 3.12)
}
cd opsd_jax && . launch/setup.sh && setup tpu,gcs'

install() { # Copies the code to every host, installs it, and runs --setup.
  local host
  for host in "${hosts[@]}"; do
    call gcloud compute tpus tpu-vm scp "$archive" "$host:opsd_jax.tar.gz" \
      "${where[@]}" --worker all || return 1
  done
  on_all_hosts "mkdir -p opsd_jax && tar -xzf opsd_jax.tar.gz -C opsd_jax && { $python; }${before:+ && $before}"
}

is_active() { [ -n "$dry" ] || [ "$(state)" = ACTIVE ]; }

# Installs, with one retry. Fails if the TPU is lost. Ends the script if the TPU is active and the
# installation fails, because a new TPU would not help.
set_up() {
  for _ in 1 2; do
    if install; then return 0; fi
    is_active || return 1
  done
  log "the installation or --setup failed on $name; its output is above"
  exit 1
}

runs=0
# Runs opsd-jax. Returns its exit code on the first host, or 75 if that host is lost.
run() {
  local command code silent=0
  printf -v command '%q ' opsd-jax "$@" --coordinator auto
  runs=$((runs + 1))
  # The run has its own session, so it outlives the connection. After a reconnection, the same
  # command finds the run by its pid file and only follows the log.
  printf -v command '%q' "$command; echo \$? > exit.$runs"
  command="{ $python; } && { [ -e pid.$runs ] || {
  for old in pid.*; do [ ! -e \"\$old\" ] || kill -9 -- -\$(cat \"\$old\") 2>/dev/null; done
  setsid bash -c $command > log.$runs 2>&1 < /dev/null & echo \$! > pid.$runs
}; tail --pid \$(cat pid.$runs) -n +1 -F log.$runs; }"
  while :; do
    on_all_hosts "$command" || true
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
      "") # either the host is lost, or the network at this end is down
        case $(state) in ACTIVE | UNKNOWN) ;; *) return 75 ;; esac
        silent=$((silent + 1))
        [ "$silent" -lt 30 ] || return 75
        ;;
      *) return "$code" ;;
    esac
    log "the connection broke; the run continues, and the script reconnects"
    sleep "${POLL_SECONDS:-20}"
  done
}

created="" files=$(mktemp -d)
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
    *) log "request $name already exists ($now); choose another name or delete it"; exit 2 ;;
  esac
  git archive --format tar.gz --output "$archive" HEAD
fi

short=0
for ((attempt = 1; attempt <= attempts; attempt++)); do
  created=yes # from here on, the TPU may exist
  if ! create; then
    [ "$attempt" -gt 1 ] || { log "the request for a TPU was refused; gcloud printed the reason above"; exit 3; }
  elif wait_until_active && set_up; then
    while :; do
      code=0
      began=$SECONDS
      run "$@" || code=$?
      case $code in
        0) exit 0 ;;
        75 | 134 | 143) ;; # a host was lost or received SIGTERM: the run can resume
        *) log "opsd-jax ended with exit code $code"; exit "$code" ;;
      esac
      is_active || break
      short=$((SECONDS - began < 600 ? short + 1 : 0))
      if [ "$short" = 3 ]; then
        log "exit code $code within ten minutes, three times in a row; the script stops"
        exit "$code"
      fi
      log "exit code $code, and $name is active; the run resumes"
      sleep "${POLL_SECONDS:-20}"
    done
  fi
  log "attempt $attempt of $attempts: $name was lost or could not be created"
  delete || exit 4
  created=""
  sleep "${POLL_SECONDS:-20}"
done
log "gave up after $attempts attempts; run the same command to try again"
exit 3
