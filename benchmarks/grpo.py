"""GRPO from a checkpoint: exact match on held-out problems before and after, with both kinds of credit.

`python -m hierbd3lm.benchmarks.grpo CHECKPOINT [--minutes N] [--seeds N ...]`. Every run trains for the same time from
the same checkpoint with the recipe `problems`, in blocks of one token, and is evaluated greedily on the same problems
of the test split. A run has the threads of its process: `--credits segment` and `--credits sequence` may run side by
side, each on a core of its own, and a last call without `--credits` gathers both; with `--finished_only` it trains
nothing. An interrupted measurement resumes after the last finished run. Writes results/grpo_problems.json and .md, and
docs/rl.png.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import t
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hierbd3lm.data.arguments import DataArguments, check_at_least
from hierbd3lm.rl import command
from hierbd3lm.rl.settings import CREDITS, SEGMENT, SEQUENCE

from .measure import as_flags, bar, format_table, is_trained, make_parser, trained_folder, write_results

RECIPE = "problems"
LEAST_GAIN = 0.1
EXACT_MATCH = "exact_match_strict"
SAMPLED = "rewards/exact_match/mean"
SMOOTHED = 10  # logs of a point of the curve
FIGURE = Path(__file__).parents[1] / "docs" / "rl.png"


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
    if is_trained(folder):
        return
    settings = {"init_from": checkpoint, "output_dir": folder, "credit": credit, "seed": seed}
    settings |= {"save_strategy": "no", "disable_tqdm": True}
    command.train(*command.parse_arguments([RECIPE, *as_flags(settings)]), callbacks=[TimeLimit(60 * minutes)])
    DataArguments.load(checkpoint).save(folder)  # so that both answer problems of the checkpoint's level


def evaluate(model: Path, folder: Path, num_problems: int) -> dict[str, Any]:
    """Return the exact match of greedy answers in the model's own blocks."""
    settings = {"model": model, "output_dir": folder, "limit": num_problems, "sampler": "first_hitting"}
    if not (folder / "summary.json").is_file():
        words = [sys.executable, "-m", "hierbd3lm.cli", "eval", *as_flags(settings), "--overwrite"]
        subprocess.run(words, env=os.environ, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    summary = json.loads((folder / "summary.json").read_text())
    return {key: summary[key] for key in (EXACT_MATCH, f"{EXACT_MATCH}_interval")}


def read_history(folder: Path) -> dict[str, Any]:
    """Return the number of steps, and the exact match of the sampled answers: `curve` has it after so many minutes."""
    state = json.loads((folder / "trainer_state.json").read_text())
    lines = [line for line in state["log_history"] if SAMPLED in line]
    minutes = itertools.accumulate(line["step_time"] * state["logging_steps"] / 60 for line in lines)
    sampled = [line[SAMPLED] for line in lines]
    fifth = max(1, len(lines) // 5)
    return {
        "steps": state["global_step"],
        "sampled_first": statistics.mean(sampled[:fifth]),
        "sampled_last": statistics.mean(sampled[-fifth:]),
        "curve": list(zip(minutes, sampled, strict=True)),
    }


def compare_credits(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the mean gain of segment credit over sequence credit, with the 95 % interval of Student over seeds.

    Returns:
        None unless two seeds have both.
    """
    gains = {(row["credit"], row["seed"]): row["gain"] for row in rows}
    seeds = [seed for credit, seed in gains if credit == SEGMENT and (SEQUENCE, seed) in gains]
    if len(seeds) < 2:
        return None
    differences = [gains[SEGMENT, seed] - gains[SEQUENCE, seed] for seed in seeds]
    mean = statistics.mean(differences)
    half = t.ppf(0.975, len(seeds) - 1) * statistics.stdev(differences) / len(seeds) ** 0.5
    return {"mean": mean, "interval": [mean - half, mean + half], "seeds": len(seeds)}


def format_rows(before: dict[str, Any], rows: list[dict[str, Any]], difference: dict[str, Any] | None) -> str:
    """Format the table of the runs."""
    lines = [
        "| credit | seed | steps | exact match of samples, first to last fifth | greedy, after | gain |",
        "|---" * 6 + "|",
        *(
            f"| {row['credit']} | {row['seed']} | {row['steps']:,} | {100 * row['sampled_first']:.1f} to "
            f"{100 * row['sampled_last']:.1f} % | {100 * row[EXACT_MATCH]:.1f} % | {100 * row['gain']:+.1f} points |"
            for row in rows
        ),
    ]
    low, high = before[f"{EXACT_MATCH}_interval"]
    texts = [
        f"Greedy, before: {100 * before[EXACT_MATCH]:.1f} % [{100 * low:.1f}, {100 * high:.1f}].",
        "\n".join(lines),
    ]
    if difference is not None:
        low, high = difference["interval"]
        texts.append(
            f"Segment credit against sequence credit, {difference['seeds']} seeds: {100 * difference['mean']:+.1f} "
            f"points [{100 * low:+.1f}, {100 * high:+.1f}]."
        )
    return "\n\n".join(texts)


def draw(rows: list[dict[str, Any]], before: float, path: Path) -> None:
    """Draw the exact match of the sampled answers over time, and that of greedy answers before and after."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    curves, gains = figure.subplots(1, 2, width_ratios=(3, 2))
    colors = dict(zip(CREDITS, ("tab:blue", "tab:orange"), strict=True))
    for row in rows:
        minutes, sampled = zip(*row["curve"], strict=True)
        smooth = [statistics.mean(sampled[max(0, end - SMOOTHED) : end]) for end in range(1, len(sampled) + 1)]
        curves.plot(minutes, smooth, color=colors[row["credit"]], linewidth=1)
        gains.plot([0, 1], [before, row[EXACT_MATCH]], color=colors[row["credit"]], marker="o", alpha=0.7)
    for credit, color in colors.items():
        curves.plot([], [], color=color, label=f"credit: {credit}")
    curves.set(xlabel="minutes of training", ylabel=f"exact match of samples, mean of {SMOOTHED} logs")
    curves.legend(frameon=False)
    gains.set(
        xticks=[0, 1], xticklabels=["before", "after"], xlim=(-0.3, 1.3), ylabel="greedy exact match, test split"
    )
    figure.suptitle("GRPO from a checkpoint (benchmarks/grpo.py)", fontsize=9)
    figure.savefig(path, dpi=110)


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
    parser.add_argument("--finished_only", action="store_true", help="Train nothing: gather the finished runs.")
    args = parser.parse_args()
    check_at_least("num_problems", args.num_problems, 1)
    checkpoint, rows = Path(args.checkpoint), []
    before = evaluate(checkpoint, args.output_dir / "before", args.num_problems)
    for seed in args.seeds:
        for credit in args.credits:
            folder = args.output_dir / f"{credit}_{seed}"
            if args.finished_only and not is_trained(folder):
                continue
            train(checkpoint, folder, credit, seed, args.minutes)
            after = evaluate(folder, folder / "answers", args.num_problems)
            gain = after[EXACT_MATCH] - before[EXACT_MATCH]
            rows.append({"credit": credit, "seed": seed, "gain": gain} | after | read_history(folder))
    bars = [
        bar(f"gain of exact match, {row['credit']} credit, seed {row['seed']}", row["gain"], LEAST_GAIN, False)
        for row in rows
    ]
    difference = compare_credits(rows)
    if difference is not None:
        claim = "gain with segment credit minus gain with sequence credit, mean of the seeds"
        bars.append(bar(claim, difference["mean"], 0, False) | {"spread": difference["interval"]})
    details = {
        "minutes": args.minutes,
        "n": args.num_problems,
        "before": before,
        "runs": rows,
        "difference": difference,
    }
    text = "\n\n".join([format_rows(before, rows, difference), format_table(bars)])
    write_results("grpo", "problems", bars, details, text)
    draw(rows, before[EXACT_MATCH], FIGURE)


if __name__ == "__main__":
    main()
