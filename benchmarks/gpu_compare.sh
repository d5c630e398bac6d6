#!/usr/bin/env bash
# Comparison of the algorithms on GSM8K on one GPU (benchmarks/compare.py), at most MINUTES minutes per call.
#
# An unfinished call exits with status 75, and the next call resumes. Arguments are those of compare.py, the same in
# every call:
#
#   until benchmarks/gpu_compare.sh [--steps N]; do [ $? -eq 75 ] || break; done
#
# The package must be installed (pip install -e .). Without access to the Hub, GSM8K_DIR must contain train.jsonl and
# test.jsonl.
set -euo pipefail
cd "$(dirname "$0")/.."

status=0
timeout --kill-after 10 "${MINUTES:-10}m" "${PYTHON:-python}" -m hierbd3lm.benchmarks.compare \
    --data gsm8k --recipe configs/gsm8k_gpu.yaml --steps 5000 --jobs 1 "$@" || status=$?
if ((status == 124 || status == 137)); then
    echo "The limit of ${MINUTES:-10} minutes is reached: run the command again to resume." >&2
    status=75
fi
exit $status
