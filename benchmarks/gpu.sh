#!/usr/bin/env bash
# The GPU benchmark, at most 10 minutes on one H200: bash benchmarks/gpu.sh [--tiny] [--output FILE]
# WHEELS lists wheels to install first, for a machine without network: a recent transformers, liger-kernel.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
if [ -n "${WHEELS:-}" ]; then
    # shellcheck disable=SC2086  # a list
    "$PYTHON" -m pip install --quiet --no-deps --target "$packages" $WHEELS
fi
ln -s "$PWD" "$packages/hierbd3lm"
PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}" timeout 600 "$PYTHON" -m hierbd3lm.benchmarks.gpu "$@"
