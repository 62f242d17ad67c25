#!/usr/bin/env bash
# Makes a virtual environment with llama.cpp's server for CPUs (xllamacpp, 0.2 GB), a program of its
# own that this package talks to over HTTP: `bash benchmarks/engines/install_llama_cpp.sh [FOLDER]`
# (default runs/engines/llama_cpp).
set -eu
cd "$(dirname "$0")/../.."
folder=${1:-runs/engines/llama_cpp}
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install -q --no-cache-dir xllamacpp==2026.10.11549 gguf==0.19.0 safetensors==0.8.0
