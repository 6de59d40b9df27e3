#!/usr/bin/env bash
# Runs opsd-jax on a GKE cluster with TPUs: builds and pushes the image, starts a JobSet, prints the
# log of the first host, and deletes the JobSet. Kubernetes restarts the JobSet (see docs/pods.md).
#
#   launch/gke/run.sh NAME IMAGE OPTION ... -- ARGUMENT_OF_OPSD_JAX ...
#
#   launch/gke/run.sh opsd8b us-docker.pkg.dev/my-project/opsd/opsd-jax \
#     --accelerator tpu-v5-lite-podslice --topology 8x8 --hosts 16 --chips 4 --claim models -- \
#     train --config configs/qwen3_8b_opsd_v5e64.py --workdir gs://my-bucket/opsd8b \
#     --config.model.path=/mnt/shared/Qwen3-8B
#
# The image contains the committed code.
# Options for kubectl, which uses the cluster of its current context:
#   --accelerator A   accelerator of the node pool, as GKE names it
#   --topology T      topology of the node pool, as GKE names it
#   --hosts N         hosts in a slice
#   --chips N         chips in a host
#   --claim NAME      claim of a volume that every host mounts at /mnt/shared (default: none)
# Options for XPK, for a cluster that XPK created and whose storage it mounts:
#   --xpk CLUSTER     name of the cluster
#   --tpu-type TYPE   type of the TPU, such as v5litepod-64
#   --zone ZONE       zone of the cluster
#   --project ID      project of the cluster
# Options for both:
#   --slices N        slices, connected by the data center network (default: 1)
#   --restarts N      restarts after preemptions and lost hosts (default: 20)
#   --keep            keep the JobSet, so that its logs can be read
#   --dry-run         print the commands and the JobSet, and run nothing
#
# Exit codes: 0 the run is done; 1 it failed; 2 the arguments are wrong; 4 the JobSet may still
# exist. The script does not delete node pools of the cluster. They continue to cost money.
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' launch/gke/run.sh >&2; exit 2; }
log() { echo "run.sh: $*" >&2; }

[ $# -ge 2 ] || usage
name=$1 image=$2
shift 2
accelerator="" topology="" hosts="" chips="" claim="" xpk="" type="" where=()
slices=1 restarts=20 keep="" dry=""
while [ $# -gt 0 ]; do
  case $1 in
    --accelerator) accelerator=$2; shift ;;
    --topology) topology=$2; shift ;;
    --hosts) hosts=$2; shift ;;
    --chips) chips=$2; shift ;;
    --claim) claim=$2; shift ;;
    --xpk) xpk=$2; shift ;;
    --tpu-type) type=$2; shift ;;
    --zone | --project) where+=("$1" "$2"); shift ;;
    --slices) slices=$2; shift ;;
    --restarts) restarts=$2; shift ;;
    --keep) keep=yes ;;
    --dry-run) dry=yes ;;
    --) shift; break ;;
    *) log "unknown option $1"; usage ;;
  esac
  shift
done
[ $# -gt 0 ] || { log "the arguments of opsd-jax are missing; write them after --"; exit 2; }
# YAML has no form for most control characters, and takes some characters of Unicode (NEL, line and
# paragraph separator) for line breaks.
control=$'[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\xa8\xa9]'
for argument in "$@"; do
  if printf %s "$argument" | LC_ALL=C tr '\n' ' ' | LC_ALL=C grep -qE "$control"; then
    log "the argument $(printf %q "$argument") contains a control character; expected only tabs and line breaks"
    exit 2
  fi
done
if [ -n "$xpk" ]; then
  [ -n "$type" ] || { log "--tpu-type is missing; give one, such as --tpu-type v5litepod-64"; exit 2; }
else
  for option in accelerator topology hosts chips; do
    [ -n "${!option}" ] || { log "--$option is missing; give it, or --xpk CLUSTER"; exit 2; }
  done
fi
image=$image:$(git rev-parse --short HEAD)

call() { # Runs a command. In a dry run, prints it instead.
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

manifest() { # Prints the JobSet that runs opsd-jax with the given arguments.
  local arguments="" argument escaped
  for argument in "$@" --coordinator auto; do
    escaped=${argument//\\/"\\\\"}
    escaped=${escaped//$'\n'/"\\n"} # YAML turns a line break inside quotes into a space
    escaped=${escaped//$'\r'/"\\r"}
    escaped=${escaped//$'\t'/"\\t"}
    arguments+=", \"${escaped//\"/"\\\""}\""
  done
  local text
  text=$(grep -v '^#' launch/gke/jobset.yaml)
  [ -n "$claim" ] || text=${text%volumeMounts:*} # the rest of the file defines the volume
  text=${text//\{name\}/"$name"}
  text=${text//\{restarts\}/"$restarts"}
  text=${text//\{slices\}/"$slices"}
  text=${text//\{hosts\}/"$hosts"}
  text=${text//\{accelerator\}/"$accelerator"}
  text=${text//\{topology\}/"$topology"}
  text=${text//\{image\}/"$image"}
  text=${text//\{chips\}/"$chips"}
  text=${text//\{claim\}/"$claim"}
  echo "${text//\{arguments\}/"[${arguments#, }]"}"
}

delete() { # Deletes the JobSet. Fails if the JobSet may still exist.
  local command=(kubectl delete jobset "$name" --ignore-not-found --wait)
  [ -z "$xpk" ] || command=(xpk workload delete --workload "$name" --cluster "$xpk" "${where[@]}" --force)
  if [ -n "$dry" ]; then call "${command[@]}"; return 0; fi
  for _ in 1 2 3; do
    if "${command[@]}" >&2; then return 0; fi
    sleep "${POLL_SECONDS:-10}"
  done
  log "COULD NOT DELETE the JobSet $name. It may still use TPUs. Delete it with: ${command[*]}"
  return 1
}

created=""
# shellcheck disable=SC2329  # the trap below calls it
leave() { # Deletes the JobSet, however the script ends.
  local code=$?
  trap - EXIT
  trap '' INT TERM HUP # a second Ctrl-C must not stop the deletion
  if [ -n "$created" ]; then
    if [ -n "$keep" ] && [ "$code" -lt 128 ]; then
      log "the JobSet $name is kept. Delete it with: kubectl delete jobset $name"
    else
      delete || code=4
    fi
  fi
  exit "$code"
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Prints the name of the JobSet and, once it has ended, "Completed" or "Failed". Prints nothing if
# the JobSet does not exist.
status() {
  kubectl get jobset "$name" --ignore-not-found --output \
    'jsonpath={.metadata.name} {.status.conditions[?(@.status=="True")].type}' 2>/dev/null ||
    echo "$name" # the cluster does not answer: assume that the JobSet still runs
}

build=(docker build --file launch/gke/Dockerfile --tag "$image" -)
if [ -n "$dry" ]; then
  printf '%q ' git archive HEAD '|' "${build[@]}" | sed 's/\\|/|/'
  echo
else
  git archive HEAD | "${build[@]}"
fi
call docker push "$image"
created=yes # from here on, the JobSet may exist
if [ -n "$xpk" ]; then
  printf -v command '%q ' opsd-jax "$@" --coordinator auto
  call xpk workload create --workload "$name" --cluster "$xpk" "${where[@]}" --tpu-type "$type" \
    --num-slices "$slices" --docker-image "$image" --max-restarts "$restarts" \
    --restart-on-exit-codes 75 --command "$command"
elif [ -n "$dry" ]; then
  echo 'kubectl apply --filename - <<EOF'
  manifest "$@"
  echo EOF
else
  manifest "$@" | kubectl apply --filename -
fi
first="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0"
first+=",batch.kubernetes.io/job-completion-index=0"
follow=(kubectl logs --follow --ignore-errors --tail=-1 --selector "$first")
if [ -n "$dry" ]; then call "${follow[@]}"; exit 0; fi
while :; do
  case " $(status) " in
    *" Completed "*) exit 0 ;;
    *" Failed "*) log "the JobSet $name failed; its log is above"; exit 1 ;;
    "  ") log "the JobSet $name no longer exists"; exit 1 ;;
  esac
  # The log ends with the pods. After a restart, read the log of the new pods.
  "${follow[@]}" || true
  sleep "${POLL_SECONDS:-10}"
done
