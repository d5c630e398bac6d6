"""The algorithms side by side: the same backbone, data, tokenizer, optimiser steps and evaluation for each.

`python -m hierbd3lm.benchmarks.compare [--quick] [--data gsm8k]`, or `make compare`. Every run is three command lines
in a folder of its own: train.py, eval_ppl.py, eval_gsm8k.py. A run whose result is there is not made again, so that an
interrupted comparison goes on. Writes docs/comparison.md, docs/comparison.png and results/compare.json.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm.auto import tqdm

from .measure import RESULTS, describe_machine

ROOT = Path(__file__).parents[1]
OUTPUTS = ROOT / "outputs" / "compare"
DOCS = ROOT / "docs"

# name -> what distinguishes it from the recipe
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ar": {"algorithm": "ar"},
    "mdlm": {"algorithm": "mdlm"},
    "sedd": {"algorithm": "sedd"},
    "bd3lm": {"algorithm": "bd3lm"},
    "bd3lm, blocks of 1": {"algorithm": "bd3lm", "block_size": 1},
    "hier": {},
    "hier, no mask": {"hierarchical_mask": False},
    "hier, joint": {"joint": True},
    "hier, joint, no mask": {"joint": True, "hierarchical_mask": False},
}
SIZES = {"small": (64, 2), "base": (96, 3)}  # hidden size, heads
EVALUATIONS = 5  # of the likelihood during training
PROBLEMS = 200  # that each run answers
# column -> (file of the run, entry)
COLUMNS = {
    "PPL": ("likelihood.json", "ppl"),
    "PPL plan": ("likelihood.json", "plan_ppl"),
    "PPL execution": ("likelihood.json", "execution_ppl"),
    "exact match": ("eval/summary.json", "exact_match_strict"),
    "plan match": ("eval/summary.json", "plan_match"),
    "tokens/s": ("eval/summary.json", "tokens_per_second"),
    "NFE": ("eval/summary.json", "num_forward_passes_mean"),
    "tokens/forward": ("eval/summary.json", "tokens_per_forward"),
    "training s": ("train_results.json", "train_runtime"),
}


@dataclass(frozen=True)
class Run:
    """One model of the comparison."""

    algorithm: str
    size: str
    seed: int
    steps: int
    data: str

    @property
    def folder(self) -> Path:
        name = self.algorithm.replace(", ", "_").replace(" ", "_")
        return OUTPUTS / f"{self.data}_{self.steps}_steps" / f"{name}_{self.size}_{self.seed}"

    def commands(self) -> list[list[str]]:
        """What is run, in order."""
        python, folder = sys.executable, str(self.folder)
        settings = {"output_dir": folder, "max_steps": self.steps, "seed": self.seed, "noisy_copies": 1}
        settings |= {"eval_steps": self.steps // EVALUATIONS, "save_strategy": "no", "logging_steps": 50}
        settings |= {"warmup_steps": self.steps // 20}
        recipe = "gsm8k_small" if self.data == "gsm8k" else "quickstart"
        if self.data == "synthetic":
            width, heads = SIZES[self.size]
            shape = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": 4}
            shape |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 32}
            shape |= {"initializer_range": 0.1, "tie_word_embeddings": True}
            settings |= {"backbone": json.dumps(shape), "num_train_examples": 16 * self.steps}
        settings |= ALGORITHMS[self.algorithm]
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        limit = ["--limit", str(PROBLEMS)]
        return [
            [python, str(ROOT / "train.py"), str(ROOT / "configs" / f"{recipe}.yaml"), *flags],
            [python, str(ROOT / "eval_ppl.py"), "--model", folder, "--num_draws", "4", *limit],
            [python, str(ROOT / "eval_gsm8k.py"), "--model", folder, "--overwrite", *limit],
        ]

    def result(self) -> dict[str, Any]:
        """Every column of the table; made first where it is not there."""
        path = self.folder / "result.json"
        if not path.is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            with open(self.folder / "log.txt", "w") as log:
                for command in self.commands():
                    subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
            row = {column: self._read(file).get(entry) for column, (file, entry) in COLUMNS.items()}
            row["curve"] = [
                (entry["step"], entry["eval_nll"])
                for entry in self._read("trainer_state.json")["log_history"]
                if "eval_nll" in entry
            ]
            path.write_text(json.dumps(row, indent=2) + "\n")
        return json.loads(path.read_text())

    def _read(self, file: str) -> dict[str, Any]:
        return json.loads((self.folder / file).read_text())


def summarize(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float] | None]:
    """Mean and standard deviation of each column over seeds; None where a column has no value."""
    summary = {}
    for column in COLUMNS:
        values = [row[column] for row in rows if row[column] is not None]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        summary[column] = (statistics.mean(values), spread) if values else None
    return summary


def format_table(summaries: dict[tuple[str, str], dict[str, tuple[float, float] | None]], num_seeds: int) -> str:
    """A Markdown table with a line for each algorithm and size."""
    lines = [f"| algorithm | size | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for (algorithm, size), summary in summaries.items():
        cells = []
        for value in summary.values():
            spread = "" if value is None or num_seeds == 1 else f" +/- {value[1]:.2g}"
            cells.append("" if value is None else f"{value[0]:.4g}{spread}")
        lines.append(f"| {algorithm} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[Run, dict[str, Any]], path: Path) -> None:
    """Exact match against tokens/s, and the likelihood against steps and against seconds of training."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    pareto, by_step, by_second = figure.subplots(1, 3)
    for number, algorithm in enumerate(ALGORITHMS):
        runs = [run for run in results if run.algorithm == algorithm]
        color = f"C{number}"
        points = [(results[run]["tokens/s"], results[run]["exact match"]) for run in runs]
        pareto.scatter(*zip(*points, strict=True), color=color, label=algorithm)
        for run in (run for run in runs if run.seed == 0):
            steps, nll = zip(*results[run]["curve"], strict=True)
            seconds = [step * results[run]["training s"] / run.steps for step in steps]
            style = {"color": color, "linestyle": "-" if run.size == "base" else ":"}
            by_step.plot(steps, nll, **style)
            by_second.plot(seconds, nll, **style)
    pareto.set(xlabel="tokens / second", ylabel="exact match (strict)", xscale="log")
    by_step.set(xlabel="optimiser steps", ylabel="validation NLL (nats / token)", yscale="log")
    by_second.set(xlabel="seconds of training", yscale="log")
    pareto.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def write(results: dict[Run, dict[str, Any]], command: str) -> None:
    """Writes the page, the picture and the JSON."""
    machine = describe_machine()
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run, row in results.items():
        groups.setdefault((run.algorithm, run.size), []).append(row)
    num_seeds, steps = len({run.seed for run in results}), next(iter(results)).steps
    table = format_table({key: summarize(rows) for key, rows in groups.items()}, num_seeds)
    note = ", ".join(f"{key} {value}" for key, value in machine.items())
    page = f"""# The algorithms side by side

`{command}`: {note}

{steps} optimiser steps of 16 problems for every run, {num_seeds} seed(s), {PROBLEMS} test problems. PPL is the
bound for the diffusions and exact for `ar` and blocks of one, over the same tokens for all. "training s" is the other
view of the budget: what the same steps took.

{table}

![Exact match against speed, likelihood against steps and seconds](comparison.png)

Dotted: the small size. Tokens a second are of batched evaluation; `ar` generates by transformers with its own cache.
"""
    (DOCS / "comparison.md").write_text(page)
    draw(results, DOCS / "comparison.png")
    rows = [{"run": vars(run), **row} for run, row in results.items()]
    (RESULTS / "compare.json").write_text(
        json.dumps({"command": command, "machine": machine, "runs": rows}, indent=2) + "\n"
    )
    print(table)


def main() -> None:
    """Makes every run and writes what they say together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="One size, one seed, few steps.")
    parser.add_argument("--data", default="synthetic", choices=("synthetic", "gsm8k"), help="What is learned.")
    parser.add_argument("--steps", type=int, default=None, help="Optimiser steps of each run.")
    args = parser.parse_args()
    steps = args.steps or (150 if args.quick else 600)
    sizes, seeds = (["base"], [0]) if args.quick or args.data == "gsm8k" else (list(SIZES), [0, 1, 2])
    runs = [Run(name, size, seed, steps, args.data) for size in sizes for name in ALGORITHMS for seed in seeds]
    results = {run: run.result() for run in tqdm(runs, desc="Comparing", unit="run")}
    write(results, " ".join(["python -m hierbd3lm.benchmarks.compare", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
