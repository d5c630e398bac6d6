#!/usr/bin/env bash
# GSM8K from scratch with at most 100 million parameters on one GPU: trains configs/gsm8k_gpu.yaml and an
# autoregressive model of the same size on as many examples, and measures their accuracy on the test split.
#
# A call takes at most MINUTES minutes. An unfinished call exits with status 75, and the next call resumes from the last
# checkpoint or after the last answer. Arguments are settings of train.py, the same in every call:
#
#   until benchmarks/gpu_gsm8k.sh [--setting value ...]; do [ $? -eq 75 ] || break; done
#
# The package must be installed (pip install -e .). Without access to the Hub, GSM8K_DIR must contain train.jsonl and
# test.jsonl. Nothing is chosen on the test split: only the final weights are evaluated on it.
set -euo pipefail
cd "$(dirname "$0")/.."

MINUTES=${MINUTES:-10}
OUTPUT=${OUTPUT:-outputs/gpu_gsm8k}
PYTHON=${PYTHON:-python}
read -ra EVALUATION <<<"${EVALUATION:---batch_size 256}" # settings of eval_gsm8k.py
NOT_FINISHED=75
DEADLINE=$((SECONDS + 60 * MINUTES))

# Runs a command until the deadline.
until_deadline() {
    local left=$((DEADLINE - SECONDS)) status=0
    if ((left > 0)); then
        timeout --kill-after 10 "$left" "$@" || status=$?
    else
        status=124
    fi
    if ((status == 124 || status == 137)); then
        echo "The limit of $MINUTES minutes is reached: run the command again to resume." >&2
        exit $NOT_FINISHED
    fi
    return $status
}

# train_and_evaluate NAME [--setting value ...]
train_and_evaluate() {
    local folder=$OUTPUT/$1
    shift
    if [ ! -f "$folder/trainer_state.json" ]; then # the last file that training writes
        until_deadline "$PYTHON" train.py configs/gsm8k_gpu.yaml --output_dir "$folder" \
            --resume_from_checkpoint last "$@"
    fi
    if [ ! -f "$folder/eval/summary.json" ]; then
        until_deadline "$PYTHON" eval_gsm8k.py --model "$folder" --dataset openai/gsm8k --split test \
            "${EVALUATION[@]}"
    fi
}

train_and_evaluate hier "$@"
train_and_evaluate ar "$@" --algorithm ar --noisy_copies 1

"$PYTHON" - "$OUTPUT"/*/eval/summary.json <<'EOF'
import json
import sys

for path in sys.argv[1:]:
    with open(path) as file:
        summary = json.load(file)
    rates = []
    for name in ("strict", "flexible"):
        rate, (low, high) = (summary[f"exact_match_{name}{suffix}"] for suffix in ("", "_interval"))
        rates.append(f"{name} {100 * rate:.2f} % [{100 * low:.2f}, {100 * high:.2f}]")
    print(f"{summary['model']}: {', '.join(rates)}, n = {summary['n']:,}")
EOF
