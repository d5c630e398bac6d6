#!/usr/bin/env bash
# The algorithms side by side on GSM8K on one GPU (benchmarks/compare.py), in pieces of MINUTES minutes.
#
# A piece that was not enough ends with status 75, and the next goes on where it stopped. Arguments are those of
# compare.py, the same each time:
#
#   until benchmarks/gpu_compare.sh [--steps N]; do [ $? -eq 75 ] || break; done
#
# The package must be installed (pip install -e .), and GSM8K_DIR must hold train.jsonl and test.jsonl unless the Hub
# can be reached.
set -euo pipefail
cd "$(dirname "$0")/.."

status=0
timeout --kill-after 10 "${MINUTES:-10}m" "${PYTHON:-python}" -m hierbd3lm.benchmarks.compare \
    --data gsm8k --recipe configs/gsm8k_gpu.yaml --steps 5000 --jobs 1 "$@" || status=$?
if ((status == 124 || status == 137)); then
    echo "The piece of ${MINUTES:-10} minutes is over: call again to go on." >&2
    status=75
fi
exit $status
