#!/usr/bin/env bash
# The GPU benchmark, within 10 minutes on one H200: bash benchmarks/gpu.sh [--tiny] [--output FILE]
# WHEELS names wheels to install first, such as transformers where the machine's is too old and liger-kernel, which a
# machine without network is to bring along.
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
