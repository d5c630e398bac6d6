"""Executions under changed plans, of models trained with and without changed plans.

`python -m hierbd3lm.benchmarks.plan_control [--steps N] [--seeds N] [--only NAME ...]`. A run is a sequence of
commands in its own folder: train.py with the recipe `quickstart`, the likelihood, and the analysis of plan dependence.
All runs take the same number of steps, with as many unchanged examples in a step: changed ones come on top of them. An
interrupted measurement resumes after the last finished command, within training from the last checkpoint. Writes
results/plan_control_models.json and .md, with the suffix `--page`, and docs/plan_control.png without one.
"""

import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hierbd3lm.data.arguments import check_at_least
from hierbd3lm.data.synthetic.plan_swaps import UNSEEN_KINDS

from .measure import as_flags, bar, format_table, make_parser, write_results

ROOT = Path(__file__).parents[1]
OUTPUTS, FIGURE = ROOT / "outputs" / "plan_control", ROOT / "docs" / "plan_control.png"
RECIPE = "configs/quickstart.yaml"
BATCH_SIZE = 24  # of the recipe: unchanged examples in a step

WITHOUT = "hier, no changed plans"
MODELS: dict[str, dict[str, Any]] = {  # name -> settings that differ from the recipe
    "hier": {},
    WITHOUT: {"counterfactual_plans": 0, "plan_dropout": 0},
    "bd3lm": {"algorithm": "bd3lm"},
    "ar": {"algorithm": "ar", "noisy_copies": 1},
    "hier, no mask": {"hierarchical_mask": "false"},
    "hier, joint": {"joint": "true"},
}
# column -> (file of the run, key)
COLUMNS = {
    "follows": ("analysis/analysis.json", "swap_follows_step"),
    "ignores": ("analysis/analysis.json", "swap_ignores_change"),
    "changed answer": ("analysis/analysis.json", "swap_reaches_answer"),
    "changed plans": ("analysis/analysis.json", "swap_n"),
    "own plan": ("analysis/analysis.json", "own_exact_match"),
    "reference plan": ("analysis/analysis.json", "oracle_exact_match"),
    "empty plan": ("analysis/analysis.json", "empty_exact_match"),
    "NLL plan": ("likelihood.json", "plan_nll"),
    "NLL execution": ("likelihood.json", "execution_nll"),
}
UNSEEN_COLUMNS = {"follows, unseen kinds": "swap_follows_step", "ignores, unseen kinds": "swap_ignores_change"}
LIMITS = {  # of the model trained with changed plans: column -> (limit, at most)
    "follows": (0.95, False),
    "ignores": (0.02, True),
    "changed answer": (0.9, False),
}
MAX_EXACT_MATCH_LOSS, MAX_NLL_RATIO = 0.005, 1.005


@dataclass(frozen=True)
class Run:
    """One model of one random seed."""

    name: str
    seed: int
    steps: int
    num_problems: int
    counterfactual_plans: float
    plan_dropout: float
    block_size_schedule: str | None = None

    @property
    def rates(self) -> dict[str, float]:
        """Probabilities of a changed and of an empty plan."""
        rates = {"counterfactual_plans": self.counterfactual_plans, "plan_dropout": self.plan_dropout}
        return {name: MODELS[self.name].get(name, rate) for name, rate in rates.items()}

    @property
    def batch_size(self) -> int:
        """Examples in a step, of which `BATCH_SIZE` are expected to be unchanged."""
        return math.ceil(BATCH_SIZE / (1 - sum(self.rates.values())))

    @property
    def folder(self) -> Path:
        name = self.name.replace(", ", "_").replace(" ", "_")
        settings = f"{self.steps}_steps_{self.counterfactual_plans}_{self.plan_dropout}"
        if self.block_size_schedule is not None:
            settings += "_" + re.sub(r"[^0-9.]+", "_", self.block_size_schedule).strip("_")
        return OUTPUTS / settings / f"{name}_{self.seed}"

    def commands(self) -> dict[str, list[str]]:
        """Return the commands in order, each by the last file that it writes."""
        settings: dict[str, Any] = {"output_dir": str(self.folder), "max_steps": self.steps, "seed": self.seed}
        settings |= self.rates | {"resume_from_checkpoint": "last", "per_device_train_batch_size": self.batch_size}
        settings |= {"num_train_examples": self.batch_size * self.steps}
        settings |= {"eval_steps": max(self.steps // 5, 1), "save_steps": min(max(self.steps // 5, 1), 250)}
        if self.block_size_schedule is not None:
            settings["block_size_schedule"] = self.block_size_schedule
        settings |= MODELS[self.name]
        limit = ["--model", str(self.folder), "--limit", str(self.num_problems)]
        commands = {
            "trainer_state.json": [str(ROOT / "train.py"), RECIPE, *as_flags(settings)],
            "likelihood.json": ["-m", "hierbd3lm.cli", "ppl", *limit],
            "analysis/analysis.json": ["-m", "hierbd3lm.cli", "analyze", *limit, "--batch_size", "100"],
        }
        return {file: [sys.executable, *command] for file, command in commands.items()}

    def finish(self, environment: Mapping[str, str]) -> dict[str, Any]:
        """Run the commands whose results are missing, and return the columns of the table."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, command in self.commands().items():
            if not (self.folder / file).is_file():
                with open(self.folder / "log.txt", "a") as log:
                    output = {"stdout": log, "stderr": subprocess.STDOUT}
                    subprocess.run(command, cwd=ROOT, env=environment, check=True, **output)
        return self.read()

    def read(self) -> dict[str, Any]:
        """Return the columns of the table."""
        files = {file: json.loads((self.folder / file).read_text()) for file, _ in COLUMNS.values()}
        row = {column: files[file].get(key) for column, (file, key) in COLUMNS.items()}
        kinds = files["analysis/analysis.json"].get("swap_kinds", {})
        return row | {"kinds": kinds} | unseen_rates(kinds)


def unseen_rates(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the rates over the kinds of changes that no model is trained on."""
    unseen = [kinds[kind] for kind in UNSEEN_KINDS if kind in kinds]
    total = sum(rates["swap_n"] for rates in unseen)
    return {
        column: sum(rates[key] * rates["swap_n"] for rates in unseen) / total
        for column, key in UNSEEN_COLUMNS.items()
        if total
    }


Results = dict[Run, dict[str, Any]]


def measure_bars(results: Results) -> list[dict[str, Any]]:
    """Return the limits of `hier`, and those relative to the model without changed plans if both were trained."""
    means = {name: mean_row([row for run, row in results.items() if run.name == name]) for name in ("hier", WITHOUT)}
    rows = [
        bar(f"hier with changed plans: {column}", means["hier"][column], *limit)
        for column, limit in LIMITS.items()
        if means["hier"].get(column) is not None
    ]
    if all(means.values()):
        lost = means[WITHOUT]["own plan"] - means["hier"]["own plan"]
        ratio = means["hier"]["NLL plan"] / means[WITHOUT]["NLL plan"]
        rows.append(bar("loss of exact match with the own plan", lost, MAX_EXACT_MATCH_LOSS, True))
        rows.append(bar("NLL of the plan / without changed plans", ratio, MAX_NLL_RATIO, True))
    return rows


def mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of each column over the seeds; empty without rows."""
    columns = {column: [row[column] for row in rows if row.get(column) is not None] for column in all_columns()}
    return {column: statistics.mean(values) for column, values in columns.items() if values}


def all_columns() -> list[str]:
    """Return the columns of the table."""
    return [*COLUMNS, *UNSEEN_COLUMNS]


def format_models(results: Results) -> str:
    """Format a Markdown table with a line for each model: means over the seeds."""
    lines = [f"| model | seeds | {' | '.join(all_columns())} |", "|---" * (len(all_columns()) + 2) + "|"]
    for name in dict.fromkeys(run.name for run in results):
        rows = [row for run, row in results.items() if run.name == name]
        means = mean_row(rows)
        cells = [f"{means[column]:.4g}" if column in means else "" for column in all_columns()]
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rates_of_kinds(results: Results) -> dict[str, dict[str, float]]:
    """Return for each model the rate of executions that follow, by kind of change: means over the seeds."""
    rates: dict[str, dict[str, list[float]]] = {}
    for run, row in results.items():
        of_model = rates.setdefault(run.name, {})
        for kind, found in row["kinds"].items():
            of_model.setdefault(kind, []).append(found["swap_follows_step"])
    return {name: {kind: statistics.mean(found) for kind, found in kinds.items()} for name, kinds in rates.items()}


def format_kinds(results: Results) -> str:
    """Format a Markdown table of [`rates_of_kinds`]."""
    rates = rates_of_kinds(results)
    kinds = sorted({kind for of_kind in rates.values() for kind in of_kind})
    lines = [f"| follows | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for name, of_kind in rates.items():
        cells = [f"{of_kind[kind]:.3g}" if kind in of_kind else "" for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_kinds(results: Results, path: Path) -> None:
    """Draw [`rates_of_kinds`] as bars, the kinds in the order of the first model."""
    rates = rates_of_kinds(results)
    first = next(iter(rates.values()))
    kinds = sorted(first, key=lambda kind: first[kind])
    figure = Figure(figsize=(8, 1 + 0.18 * len(rates) * len(kinds)), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(rates)
    for number, (name, of_kind) in enumerate(rates.items()):
        places = [place - number * height for place, kind in enumerate(kinds) if kind in of_kind]
        axes.barh(places, [100 * of_kind[kind] for kind in kinds if kind in of_kind], height, label=name)
    labels = [f"{kind} (not trained on)" if kind in UNSEEN_KINDS else kind for kind in kinds]
    axes.set_yticks([place - (len(rates) - 1) * height / 2 for place in range(len(kinds))], labels)
    axes.set(xlabel="executions that follow the changed plan, %", xlim=(0, 100))
    figure.suptitle("Changed plans, by kind of change (benchmarks/plan_control.py)", fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(rates), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Finish all runs, and write the table."""
    parser = make_parser("plan_control", __doc__)
    parser.add_argument("--steps", type=int, default=4300, help="Optimiser steps of each run.")
    parser.add_argument("--seeds", type=int, default=3, help="Random seeds of each model.")
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=MODELS, metavar="NAME", help="Some models.")
    parser.add_argument("--problems", type=int, default=2000, help="Test problems, each with a changed plan.")
    parser.add_argument("--counterfactual_plans", type=float, default=0.5, help="Probability of a changed plan.")
    parser.add_argument("--plan_dropout", type=float, default=0.02, help="Probability of an empty plan.")
    parser.add_argument("--block_size_schedule", default=None, help="Of training; the recipe's if omitted.")
    parser.add_argument("--page", default="", help="Suffix of the written files.")
    args = parser.parse_args()
    for name in ("steps", "seeds", "problems"):
        check_at_least(name, getattr(args, name), 1)
    if not 0 <= args.counterfactual_plans + args.plan_dropout < 1:
        parser.error(
            f"`counterfactual_plans` + `plan_dropout` must be in [0, 1), but got {args.counterfactual_plans} + "
            f"{args.plan_dropout}"
        )
    shared = args.steps, args.problems, args.counterfactual_plans, args.plan_dropout, args.block_size_schedule
    runs = [Run(name, seed, *shared) for seed in range(args.seeds) for name in args.only]
    results: Results = {}
    for run in runs:
        results[run] = run.finish(os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})
        details = [asdict(run) | row for run, row in results.items()]
        bars = measure_bars(results)
        part = "_".join(filter(None, ("models", args.page)))
        text = f"{format_models(results)}\n\n{format_kinds(results)}\n\n{format_table(bars)}"
        write_results("plan_control", part, bars, {"arguments": vars(args), "runs": details}, text)
    if not args.page:
        draw_kinds(results, FIGURE)


if __name__ == "__main__":
    main()
