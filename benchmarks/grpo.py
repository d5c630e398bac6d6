"""GRPO from a checkpoint: exact match on held-out problems before and after, with both kinds of credit.

`python -m hierbd3lm.benchmarks.grpo CHECKPOINT [--minutes N] [--seeds N ...]`. Every run trains for the same time from
the same checkpoint with the recipe `problems`, in blocks of one token, and is evaluated greedily on the same problems
of the test split. A run has the threads of its process: `--credits segment` and `--credits sequence` may run side by
side, each on a core of its own, and a last call without `--credits` gathers both. An interrupted measurement resumes
after the last finished run. Writes results/grpo_problems.json and .md.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hierbd3lm.data.arguments import check_at_least
from hierbd3lm.rl import command
from hierbd3lm.rl.settings import CREDITS

from .measure import as_flags, bar, format_table, make_parser, trained_folder, write_results

RECIPE = "problems"
LEAST_GAIN = 0.1
EXACT_MATCH = "exact_match_strict"


class TimeLimit(TrainerCallback):
    """Ends a training after a number of seconds, at the end of a step."""

    def __init__(self, seconds: float):
        self.seconds, self.start = seconds, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if time.monotonic() - self.start >= self.seconds:
            control.should_training_stop = True


def train(checkpoint: Path, folder: Path, credit: str, seed: int, minutes: float) -> None:
    """Train for some minutes unless the folder holds the finished run."""
    if (folder / "trainer_state.json").is_file():
        return
    settings = {"init_from": checkpoint, "output_dir": folder, "credit": credit, "seed": seed}
    settings |= {"save_strategy": "no", "disable_tqdm": True}
    command.train(*command.parse_arguments([RECIPE, *as_flags(settings)]), callbacks=[TimeLimit(60 * minutes)])


def evaluate(model: Path, folder: Path, num_problems: int) -> dict[str, Any]:
    """Return the exact match of greedy answers in the model's own blocks."""
    settings = {"model": model, "output_dir": folder, "limit": num_problems, "sampler": "first_hitting"}
    if not (folder / "summary.json").is_file():
        words = [sys.executable, "-m", "hierbd3lm.cli", "eval", *as_flags(settings), "--overwrite"]
        subprocess.run(words, env=os.environ, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    summary = json.loads((folder / "summary.json").read_text())
    return {key: summary[key] for key in (EXACT_MATCH, f"{EXACT_MATCH}_interval")}


def read_history(folder: Path) -> dict[str, Any]:
    """Return the number of steps, and mean reward and NFE at the start and the end of a training."""
    state = json.loads((folder / "trainer_state.json").read_text())
    lines = [line for line in state["log_history"] if "reward" in line]
    fifth = max(1, len(lines) // 5)
    return {"steps": state["global_step"]} | {
        f"{name}_{place}": statistics.mean(line[name] for line in part)
        for name in ("reward", "nfe")
        for place, part in (("first", lines[:fifth]), ("last", lines[-fifth:]))
    }


def format_rows(before: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Format the table of the runs."""
    lines = [
        "| credit | seed | steps | mean reward, first to last fifth | exact match after | gain |",
        "|---" * 6 + "|",
        *(
            f"| {row['credit']} | {row['seed']} | {row['steps']:,} | {row['reward_first']:.3f} to "
            f"{row['reward_last']:.3f} | {100 * row[EXACT_MATCH]:.1f} % | {100 * row['gain']:+.1f} points |"
            for row in rows
        ),
    ]
    low, high = before[f"{EXACT_MATCH}_interval"]
    start = f"Before: {100 * before[EXACT_MATCH]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]."
    return "\n\n".join([start, "\n".join(lines)])


def main() -> None:
    """Train and evaluate what is missing, and write the results."""
    parser = make_parser("grpo", __doc__)
    parser.add_argument(
        "checkpoint", type=trained_folder, help="Folder of a checkpoint trained on synthetic problems."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/grpo"), help="Folder of the runs.")
    parser.add_argument("--minutes", type=float, default=30, help="Minutes that each run trains.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Random seeds, one run each.")
    parser.add_argument("--credits", nargs="+", choices=CREDITS, default=list(CREDITS), help="Kinds of credit.")
    parser.add_argument("--num_problems", type=int, default=1000, help="Number of problems of the test split.")
    args = parser.parse_args()
    check_at_least("num_problems", args.num_problems, 1)
    checkpoint, rows = Path(args.checkpoint), []
    before = evaluate(checkpoint, args.output_dir / "before", args.num_problems)
    for seed in args.seeds:
        for credit in args.credits:
            folder = args.output_dir / f"{credit}_{seed}"
            train(checkpoint, folder, credit, seed, args.minutes)
            after = evaluate(folder, folder / "answers", args.num_problems)
            gain = after[EXACT_MATCH] - before[EXACT_MATCH]
            rows.append({"credit": credit, "seed": seed, "gain": gain} | after | read_history(folder))
    bars = [
        bar(f"gain of exact match, {row['credit']} credit, seed {row['seed']}", row["gain"], LEAST_GAIN, False)
        for row in rows
    ]
    details = {"minutes": args.minutes, "n": args.num_problems, "before": before, "runs": rows}
    text = "\n\n".join([format_rows(before, rows), format_table(bars)])
    write_results("grpo", "problems", bars, details, text)


if __name__ == "__main__":
    main()
