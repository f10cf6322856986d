#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU VM slice, or goes on with a run that was stopped:
#
#   launch/tpu_vm.sh NAME ZONE /mnt/shared/piccolo_jax --config=configs/base.py --workdir=/mnt/shared/runs/base
#
# /mnt/shared is a file system that every worker has mounted (Filestore, or a bucket by gcsfuse), with
# this repository in the folder given. JAX finds the other workers by itself; so it does on several
# slices that were made as one queued resource, whose NAMEs are then given separated by commas.
set -euo pipefail
if [ $# -lt 4 ]; then
  sed -n '2,8s|^# \{0,1\}||p' "$0"
  exit 2
fi
names=$1 zone=$2 folder=$3
shift 3
command="cd $(printf %q "$folder")"
command+=" && { [ -x ~/piccolo_jax/bin/python ] || python3 -m venv ~/piccolo_jax; }"
command+=" && ~/piccolo_jax/bin/pip install --quiet -r requirements.txt 'jax[tpu]==0.10.2'"
command+=" && exec ~/piccolo_jax/bin/python -m piccolo_jax.train $(printf '%q ' "$@")"
slices=()
for name in ${names//,/ }; do
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command" &
  slices+=($!)
done
code=0
for slice in "${slices[@]}"; do wait "$slice" || code=$?; done
exit "$code"
