"""GRPO from an open checkpoint: how long 20 steps take on GSM8K, and whether their KL stays finite.

`python -m hierbd3lm.benchmarks.grpo_checkpoint CHECKPOINT` (a folder or an id of the Hub; GSM8K through `GSM8K_DIR` or
the Hub). The checkpoint is converted to blocks of one token, in which it writes what it did before, and trained with
the recipe `gsm8k` and a reward for short answers: an adapter, four answers of at most 96 tokens to each of two
questions per step. Writes results/grpo_checkpoint_steps.json and .md.
"""

import json
import math
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hierbd3lm.data.arguments import check_at_least
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.rl import command

from .measure import Measured, as_flags, bar, format_table, make_parser, write_results

RECIPE = "gsm8k"
NUM_STEPS = 20
MOST_MINUTES = 10
SETTINGS = {
    # at first all answers are wrong and have no calculation: their lengths alone differ, and move the policy
    "rewards": ["exact_match", "arithmetic", "brevity"],
    "reward_weights": [1.0, 0.1, 0.1],
    "num_plans": 2,
    "executions_per_plan": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "generation_kwargs": json.dumps({"sampler": "first_hitting", "max_plan_len": 32, "max_execution_len": 64}),
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": True,
}


def measure(checkpoint: str, folder: Path, num_steps: int) -> Measured:
    """Convert the checkpoint, train, and read the log."""
    converted, trained = folder / "converted", folder / "trained"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    HierBD3LMForBlockDiffusion.from_autoregressive(checkpoint, tokenizer, block_size=1).save_pretrained(converted)
    tokenizer.save_pretrained(converted)
    settings = {"init_from": converted, "output_dir": trained, "max_steps": num_steps} | SETTINGS
    settings["use_cpu"] = not torch.cuda.is_available()
    start = time.monotonic()
    command.train(*command.parse_arguments([RECIPE, *as_flags(settings)]))
    minutes = (time.monotonic() - start) / 60
    log = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in log if "kl" in line]
    finite = sum(math.isfinite(line["kl"]) for line in lines)
    bars = [
        bar(f"minutes of {num_steps} steps, loading included", minutes, MOST_MINUTES * num_steps / NUM_STEPS, True),
        bar("steps with a finite KL", finite, num_steps, False),
        bar("KL of the last step", lines[-1]["kl"], None, True),
    ]
    names = ("kl", "reward", "nfe", "step_time", "grad_norm", "completions/mean_length")
    return bars, {"steps": [{name: line[name] for name in names} for line in lines]}


def main() -> None:
    """Measure, and write the results."""
    parser = make_parser("grpo_checkpoint", __doc__)
    parser.add_argument("checkpoint", help="Folder or Hub id of an open checkpoint, such as SmolLM2-135M-Instruct.")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="Number of steps.")
    args = parser.parse_args()
    check_at_least("steps", args.steps, 1)
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        bars, details = measure(args.checkpoint, Path(folder), args.steps)
    write_results("grpo_checkpoint", "steps", bars, details, format_table(bars))


if __name__ == "__main__":
    main()
