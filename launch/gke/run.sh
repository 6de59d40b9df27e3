#!/usr/bin/env bash
# A run on a GKE cluster that has TPUs: builds and pushes the image, starts a JobSet, shows the log of
# the first host, and deletes the JobSet. Its restarts are Kubernetes': docs/pods.md.
#
#   launch/gke/run.sh NAME IMAGE OPTION ... -- ARGUMENT_OF_OPSD_JAX ...
#
#   launch/gke/run.sh opsd8b us-docker.pkg.dev/my-project/opsd/opsd-jax \
#     --accelerator tpu-v5-lite-podslice --topology 8x8 --hosts 16 --chips 4 --claim models -- \
#     train --config configs/qwen3_8b_opsd_v5e64.py --workdir gs://my-bucket/opsd8b \
#     --config.model.path=/mnt/shared/Qwen3-8B
#
# The image is of the committed code.
# With kubectl, on the cluster that it is set to:
#   --accelerator, --topology  of the node pool, as GKE calls them
#   --hosts N, --chips N       hosts of a slice, chips of a host
#   --claim NAME               of a volume that all hosts mount at /mnt/shared (default: none)
# Through XPK, on a cluster that it made, with its storage mounted:
#   --xpk CLUSTER --tpu-type v5litepod-64 [--zone ZONE] [--project ID]
# Both:
#   --slices N      so many as one, over the data centre's network (default: 1)
#   --restarts N    after preemptions and lost hosts (default: 20)
#   --keep          the JobSet, for its logs
#   --dry-run       print the commands and the JobSet, run nothing
#
# Exit codes: 0 done, 1 failed, 2 bad usage, 4 when the JobSet may be left. Node pools, and their costs,
# stay: they are the cluster's.
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' launch/gke/run.sh >&2; exit 2; }
say() { echo "run.sh: $*" >&2; }

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
    *) say "unknown option $1"; usage ;;
  esac
  shift
done
[ $# -gt 0 ] || { say "what to run is missing, after --"; exit 2; }
if [ -n "$xpk" ]; then
  [ -n "$type" ] || { say "--tpu-type is missing, such as v5litepod-64"; exit 2; }
else
  for option in accelerator topology hosts chips; do
    [ -n "${!option}" ] || { say "--$option is missing"; exit 2; }
  done
fi
image=$image:$(git rev-parse --short HEAD)

call() { # a command, or in a dry run its text
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

manifest() {
  local arguments="" argument escaped
  for argument in "$@" --coordinator auto; do
    escaped=${argument//\\/"\\\\"}
    arguments+=", \"${escaped//\"/"\\\""}\""
  done
  local text
  text=$(grep -v '^#' launch/gke/jobset.yaml)
  [ -n "$claim" ] || text=${text%volumeMounts:*} # the rest is of the volume
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

delete() {
  local command=(kubectl delete jobset "$name" --ignore-not-found --wait)
  [ -z "$xpk" ] || command=(xpk workload delete --workload "$name" --cluster "$xpk" "${where[@]}" --force)
  if [ -n "$dry" ]; then call "${command[@]}"; return 0; fi
  for _ in 1 2 3; do
    if "${command[@]}" >&2; then return 0; fi
    sleep "${POLL_SECONDS:-10}"
  done
  say "COULD NOT DELETE the JobSet $name: it may go on using TPUs. See to it: ${command[*]}"
  return 1
}

made=""
# shellcheck disable=SC2329  # a trap calls it
leave() { # however this ends
  local code=$?
  trap - EXIT
  trap '' INT TERM HUP # an impatient second one is not to leave the JobSet behind
  if [ -n "$made" ]; then
    if [ -n "$keep" ] && [ "$code" -lt 128 ]; then
      say "the JobSet $name is kept: kubectl delete jobset $name"
    else
      delete || code=4
    fi
  fi
  exit "$code"
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

ended() { # the JobSet's name and its verdict, Completed or Failed, once there is one; "" without it
  kubectl get jobset "$name" --ignore-not-found --output \
    'jsonpath={.metadata.name} {.status.conditions[?(@.status=="True")].type}' 2>/dev/null ||
    echo "$name" # nobody tells now
}

build=(docker build --file launch/gke/Dockerfile --tag "$image" -)
if [ -n "$dry" ]; then
  printf '%q ' git archive HEAD '|' "${build[@]}" | sed 's/\\|/|/'
  echo
else
  git archive HEAD | "${build[@]}"
fi
call docker push "$image"
made=yes
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
log=(kubectl logs --follow --ignore-errors --tail=-1 --selector "$first")
if [ -n "$dry" ]; then call "${log[@]}"; exit 0; fi
while :; do
  case " $(ended) " in
    *" Completed "*) exit 0 ;;
    *" Failed "*) say "the JobSet $name failed"; exit 1 ;;
    "  ") say "the JobSet $name is gone"; exit 1 ;;
  esac
  # It ends with the pods, and begins again with those of a restart.
  "${log[@]}" || true
  sleep "${POLL_SECONDS:-10}"
done
