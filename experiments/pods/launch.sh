#!/usr/bin/env bash
# Trains on every worker of a TPU VM, from a workstation; the same line again resumes. Not run here (no TPU); see docs/pods.md.
#
#   bash experiments/pods/launch.sh [--dry-run] NAME ZONE EXPERIMENT --workdir FOLDER [--field value ...]
#
# REPOSITORY (default: origin of this checkout) and CACHE (a folder or bucket for compiled programs) may be set in the environment.
set -euo pipefail

run=()
if [[ "${1:-}" == "--dry-run" ]]; then
  run=(echo)
  shift
fi
if (($# < 3)); then
  echo "usage: launch.sh [--dry-run] NAME ZONE EXPERIMENT --workdir FOLDER [--field value ...]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
if [[ ! " $*" =~ " --workdir" ]]; then
  echo "launch.sh: give --workdir, a folder that all workers see, such as one in a mounted bucket (docs/pods.md)" >&2
  exit 2
fi
repository=${REPOSITORY:-$(git -C "$(dirname "$0")" remote get-url origin 2>/dev/null || true)}
if [[ -z "$repository" ]]; then
  echo "launch.sh: this checkout has no origin; set REPOSITORY to an address that the workers can clone" >&2
  exit 2
fi

printf -v arguments '%q ' "$@"
cache=${CACHE:+$(printf %q "$CACHE")}
work="set -e
[ -d dcmdp_jax ] || git clone -q $(printf %q "$repository") dcmdp_jax
cd dcmdp_jax
[ -d .venv ] || { python3 -m venv .venv && .venv/bin/pip install -q --no-deps -r requirements.txt && .venv/bin/pip install -q --no-deps -e . && .venv/bin/pip install -q 'jax[tpu]' -c requirements.txt; }
export JAX_COMPILATION_CACHE_DIR=${cache:-\$HOME/.cache/dcmdp_jax}
exec .venv/bin/dcmdp train $arguments--distributed"
"${run[@]}" gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$work"
