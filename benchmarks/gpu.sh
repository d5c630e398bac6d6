#!/usr/bin/env bash
# The GPU benchmark, within 10 minutes on one H200: bash benchmarks/gpu.sh [--tiny] [--output FILE]
# TRANSFORMERS_WHEEL names a wheel to install first where the machine's transformers is too old and has no network.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
if [ -n "${TRANSFORMERS_WHEEL:-}" ]; then
    "$PYTHON" -m pip install --quiet --no-deps --target "$packages" "$TRANSFORMERS_WHEEL"
fi
ln -s "$PWD" "$packages/hierbd3lm"
PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}" timeout 600 "$PYTHON" -m hierbd3lm.benchmarks.gpu "$@"
