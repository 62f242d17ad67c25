#!/usr/bin/env bash
# Makes .venv at the root of this checkout: the tested environment, and JAX for the accelerator that
# is there. Does nothing where it is made.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -x .venv/bin/dcmdp ]; then
  exit
fi
python3 -m pip install -q --root-user-action ignore virtualenv  # Colab's Python lacks ensurepip, which venv needs
python3 -m virtualenv -q .venv
.venv/bin/pip install -q --no-deps -r requirements.txt
if compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
  .venv/bin/pip install -q 'jax[tpu]' -c requirements.txt
elif driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null); then
  cuda=12
  if [ "${driver%%.*}" -ge 580 ]; then
    cuda=13
  fi
  .venv/bin/pip install -q "jax[cuda$cuda]" -c requirements.txt
fi
.venv/bin/pip install -q --no-deps .
