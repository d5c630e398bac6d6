"""The algorithms side by side: the same backbone, data, tokenizer, optimiser steps and evaluation for each.

`python -m hierbd3lm.benchmarks.compare [--quick] [--data gsm8k] [--only ar hier]`, or `make compare`. A run is a few
command lines in a folder of its own: train.py, eval_ppl.py, eval_gsm8k.py, and for the hierarchy
`hierbd3lm analyze`. An interrupted comparison goes on where it stopped. Writes docs/comparison.md,
docs/comparison.png and results/compare.json, with `_gsm8k` in their names for GSM8K, or with the name that `--page`
says.
"""

import argparse
import functools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from hierbd3lm.data.arguments import check_at_least

from .measure import RESULTS, as_flags, describe_machine
from .sampler import SAMPLER_FILE
from .speed import SPEED_FILE

ROOT = Path(__file__).parents[1]
OUTPUTS = ROOT / "outputs" / "compare"
DOCS = ROOT / "docs"

# name -> what distinguishes it from the recipe
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ar": {"algorithm": "ar"},
    "mdlm": {"algorithm": "mdlm"},
    "sedd": {"algorithm": "sedd"},
    "bd3lm": {"algorithm": "bd3lm"},
    "hier": {},
}
# In a name: half of the steps are in blocks of one token, and the recipe's blocks go on from there as in `make demo`,
# with two noisy copies at half the learning rates.
TOKENS_FIRST = ", tokens first"
ABLATIONS: dict[str, dict[str, Any]] = {  # at the base size only
    "bd3lm, blocks of 1": {"algorithm": "bd3lm", "block_size": 1},
    "hier, no mask": {"hierarchical_mask": False},
    "hier, joint": {"joint": True},
    "hier, joint, no mask": {"joint": True, "hierarchical_mask": False},
    f"bd3lm{TOKENS_FIRST}": {"algorithm": "bd3lm"},
    f"hier{TOKENS_FIRST}": {},
}
ANALYSED = ("hier", "hier, no mask", f"hier{TOKENS_FIRST}")  # whether the execution follows the plan
SIZES = {"small": (64, 2), "base": (96, 3)}  # hidden size, heads
# One or two operations: what models of this size begin to solve within the steps that 90 minutes allow.
PROBLEMS = {"num_steps": [1, 2], "max_depth": 2, "num_distractors": [0, 0], "max_value": 16}
PROBLEMS |= {"num_names": 8, "num_things": 2}
BATCH_SIZE = 16
EVALUATIONS = 5  # of the likelihood during training
MOST_STEPS_AGAIN = 250  # that an interrupted run does a second time
NUM_ANSWERS = 500  # of each run
NUM_ONE_BY_ONE = 100  # of each run of the first seed, again, in batches of one
# column -> (file of the run, entry)
COLUMNS = {
    "PPL": ("likelihood.json", "ppl"),
    "PPL plan": ("likelihood.json", "plan_ppl"),
    "PPL execution": ("likelihood.json", "execution_ppl"),
    "exact match": ("eval/summary.json", "exact_match_strict"),
    "flexible": ("eval/summary.json", "exact_match_flexible"),
    "plan match": ("eval/summary.json", "plan_match"),
    "tokens/s": ("eval/summary.json", "tokens_per_second"),
    "NFE": ("eval/summary.json", "num_forward_passes_mean"),
    "tokens/forward": ("eval/summary.json", "tokens_per_forward"),
}
SPEED_COLUMNS = {  # tokens a second one by one, in multiples of those of `ar`; entries of speed.json
    "x ar, batch 1": "eager_over_beside",
    "x ar, compiled": "compiled_over_beside",
}
TRAINING_TIME = "training s"
EQUAL_TIME = "PPL, equal time"
ANALYSIS_COLUMNS = {
    "own plan": "own_exact_match",
    "oracle plan": "oracle_exact_match",
    "another's plan": "other_exact_match",
    "empty plan": "empty_exact_match",
    "agrees with own plan": "own_agreement",
    "follows a changed step": "swap_follows_step",
    "ignores the change": "swap_ignores_change",
}


@dataclass(frozen=True)
class Run:
    """One model of the comparison."""

    algorithm: str
    size: str
    seed: int
    steps: int
    data: str
    recipe: str

    @property
    def folder(self) -> Path:
        name = self.algorithm.replace(", ", "_").replace(" ", "_")
        return OUTPUTS / f"{Path(self.recipe).stem}_{self.steps}_steps" / f"{name}_{self.size}_{self.seed}"

    def commands(self) -> dict[str, list[str]]:
        """What is run, in order, by the file that each command writes at its end."""
        python, folder = sys.executable, str(self.folder)
        limit = ["--limit", str(NUM_ANSWERS)] if self.data == "synthetic" else []
        commands = {
            **{f"{part}data_config.json": self.training(part) for part in self.parts()},
            "likelihood.json": [str(ROOT / "eval_ppl.py"), "--model", folder, "--num_draws", "4", *limit],
        }
        if self.algorithm != "ar":
            commands[SAMPLER_FILE] = ["-m", "hierbd3lm.benchmarks.sampler", "--model", folder]
        commands["eval/summary.json"] = [str(ROOT / "eval_gsm8k.py"), "--model", folder, *limit]
        if self.algorithm in ANALYSED and self.data == "synthetic":
            commands["analysis/analysis.json"] = ["-m", "hierbd3lm", "analyze", "--model", folder, *limit]
        return {file: [python, *command] for file, command in commands.items()}

    def parts(self) -> dict[str, int]:
        """The subfolders of what is trained one after the other, with the steps of each."""
        half = self.steps // 2
        return {"tokens/": half, "": self.steps - half} if self.algorithm.endswith(TOKENS_FIRST) else {"": self.steps}

    def training(self, part: str = "") -> list[str]:
        """The command line of train.py, with the settings beyond the recipe's."""
        steps = self.parts()[part]
        settings: dict[str, Any] = {"output_dir": str(self.folder / part), "max_steps": steps, "seed": self.seed}
        every = self.steps // EVALUATIONS
        settings |= {"eval_steps": every, "save_steps": min(every, MOST_STEPS_AGAIN)}
        settings |= {"resume_from_checkpoint": "last", "logging_steps": 50, "warmup_steps": steps // 20}
        # the same for all: one copy, as `ar` has one, and no clipping, as a block of a whole answer must not have it
        settings |= {"noisy_copies": 1, "plan_clip": [0, 1], "execution_clip": [0, 1]}
        if self.data == "synthetic":
            width, heads = SIZES[self.size]
            backbone = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": 4}
            backbone |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 32}
            backbone |= {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
            backbone |= {"initializer_range": 0.1, "tie_word_embeddings": True}
            settings |= {"backbone": json.dumps(backbone), "synthetic": json.dumps(PROBLEMS)}
            settings |= {"num_train_examples": BATCH_SIZE * self.steps, "per_device_train_batch_size": BATCH_SIZE}
        settings |= ALGORITHMS.get(self.algorithm) or ABLATIONS.get(self.algorithm, {})
        if part:
            settings |= {"block_size": 1}
        elif len(self.parts()) > 1:  # another seed: other examples first
            settings |= {"init_from": str(self.folder / "tokens"), "backbone": "null", "seed": self.seed + 1000}
            recipe = yaml.safe_load(Path(self.recipe).read_text())
            settings |= {name: rate / 2 for name, rate in recipe.items() if name.endswith("learning_rate")}
            settings |= {"noisy_copies": 2}
        return [str(ROOT / "train.py"), self.recipe, *as_flags(settings)]

    def finish(self, environment: dict[str, str]) -> dict[str, Any]:
        """Runs the commands whose results are not there; returns every column of the tables."""
        self.folder.mkdir(parents=True, exist_ok=True)
        commands = self.commands()
        for file, command in commands.items():
            self._make(file, command, environment)
        row = {column: self._read(file).get(entry) for column, (file, entry) in COLUMNS.items()}
        row["curve"], before = [], 0
        for part, steps in self.parts().items():
            history = self._read(f"{part}trainer_state.json")["log_history"]
            row["curve"] += [(before + entry["step"], entry["eval_nll"]) for entry in history if "eval_nll" in entry]
            before += steps
        row[TRAINING_TIME] = sum(self._read(f"{part}train_results.json")["train_runtime"] for part in self.parts())
        if SAMPLER_FILE in commands:
            row["sampler"] = self._read(SAMPLER_FILE)["chosen"]
        if "analysis/analysis.json" in commands:
            analysis = self._read("analysis/analysis.json")
            row |= {column: analysis.get(entry) for column, entry in ANALYSIS_COLUMNS.items()}
        return row

    def measure_speed(self) -> dict[str, float]:
        """The columns of speed; the run of `ar` of the same size and seed must be there."""
        beside = str(replace(self, algorithm="ar").folder)
        settings = {"model": str(self.folder), "beside": beside, "limit": NUM_ONE_BY_ONE}
        self._make(SPEED_FILE, [sys.executable, "-m", "hierbd3lm.benchmarks.speed", *as_flags(settings)], os.environ)
        return {column: self._read(SPEED_FILE)[entry] for column, entry in SPEED_COLUMNS.items()}

    def _make(self, file: str, command: list[str], environment: Mapping[str, str]) -> None:
        """Runs the command that writes the file, unless it is there."""
        if not (self.folder / file).is_file():
            with open(self.folder / "log.txt", "a") as log:
                output = {"stdout": log, "stderr": subprocess.STDOUT}
                subprocess.run(command, cwd=ROOT, env=environment, check=True, **output)

    def _read(self, file: str) -> dict[str, Any]:
        return json.loads((self.folder / file).read_text())


Results = dict[Run, dict[str, Any]]


def choose_runs(
    data: str, recipe: str, steps: int, quick: bool, only: Sequence[str] = (), seeds: int | None = None
) -> list[Run]:
    """Five algorithms at two sizes with three seeds, and one run of each ablation; quick or on GSM8K one of each."""
    one_of_each = quick or data == "gsm8k"
    sizes, usual_seeds = (["base"], 1) if one_of_each else (list(SIZES), 3)
    seeds = usual_seeds if seeds is None else seeds
    kinds = [(name, size, seed) for size in sizes for name in ALGORITHMS for seed in range(seeds)]
    kinds += [(name, "base", 0) for name in ABLATIONS]
    return [Run(name, size, seed, steps, data, recipe) for name, size, seed in kinds if not only or name in only]


def add_speeds(results: Results) -> None:
    """Adds the columns of speed to the first seed's runs, one after the other, with nothing beside them."""
    first = [run for run in results if run.seed == 0 and run.algorithm != "ar"]
    measured = [run for run in first if replace(run, algorithm="ar") in results]
    for run in tqdm(measured, desc="Answering one by one", unit="run"):
        results[run] |= run.measure_speed()


def nll_at(seconds: float, curve: list[tuple[int, float]], seconds_per_step: float) -> float:
    """The likelihood after so many seconds of training, in a straight line between evaluations."""
    steps, nll = zip(*curve, strict=True)
    return float(np.interp(seconds, [step * seconds_per_step for step in steps], nll))


def add_equal_time(results: Results) -> None:
    """Adds the perplexity on the validation split when the fastest run of the same size was through."""
    for size in {run.size for run in results}:
        of_size = {run: row for run, row in results.items() if run.size == size}
        least = min(row[TRAINING_TIME] for row in of_size.values())
        for run, row in of_size.items():
            row[EQUAL_TIME] = math.exp(nll_at(least, row["curve"], row[TRAINING_TIME] / run.steps))


def format_table(results: Results, columns: list[str]) -> str:
    """A Markdown table: a line for each algorithm and size, mean and standard deviation over the seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run, row in results.items():
        groups.setdefault((run.algorithm, run.size), []).append(row)
    lines = [f"| algorithm | size | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for (algorithm, size), rows in groups.items():
        cells = [_mean_and_spread([row[column] for row in rows if row.get(column) is not None]) for column in columns]
        lines.append(f"| {algorithm} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_and_spread(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" +/- {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def draw(results: Results, path: Path) -> None:
    """Exact match against tokens/s, and the likelihood against steps and against seconds of training."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    pareto, by_step, by_second = figure.subplots(1, 3)
    for number, algorithm in enumerate(dict.fromkeys(run.algorithm for run in results)):
        runs = [run for run in results if run.algorithm == algorithm]
        for size, marker, line in (("base", "o", "-"), ("small", "x", ":")):
            of_size = [run for run in runs if run.size == size]
            points = [(results[run]["tokens/s"], results[run]["exact match"]) for run in of_size]
            if points:
                label = algorithm if size == "base" else None
                pareto.scatter(*zip(*points, strict=True), color=f"C{number}", marker=marker, label=label)
            for run in of_size[:1]:
                steps, nll = zip(*results[run]["curve"], strict=True)
                seconds = [step * results[run][TRAINING_TIME] / run.steps for step in steps]
                by_step.plot(steps, nll, line, color=f"C{number}", label=algorithm)
                by_second.plot(seconds, nll, line, color=f"C{number}")
    pareto.set(xlabel="tokens / second", ylabel="exact match (strict)", xscale="log", title="o base, x small")
    pareto.set_xticks(ticks := [200, 500, 1000, 2000, 5000, 10000], map("{:,}".format, ticks))
    pareto.minorticks_off()
    by_step.set(xlabel="optimiser steps", ylabel="validation NLL (nats / token)", yscale="log", title="seed 0")
    by_second.set(xlabel="seconds of training", yscale="log", title="dotted: small")
    pareto.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def write(results: Results, command: str, jobs: int, threads: int, suffix: str = "") -> None:
    """Writes the page, the picture and the JSON, with `suffix` in their names."""
    machine = describe_machine()
    first = next(iter(results))
    num_seeds = len({run.seed for run in results})
    table = format_table(results, [*COLUMNS, TRAINING_TIME, EQUAL_TIME, *SPEED_COLUMNS])
    analysed = {run: row for run, row in results.items() if ANALYSIS_COLUMNS.keys() <= row.keys()}
    note = ", ".join(f"{key} {value}" for key, value in (machine | {"threads": threads}).items())
    problems = f"{NUM_ANSWERS} test problems" if first.data == "synthetic" else "the whole test split"
    page = f"""# The algorithms side by side

`{command}`: {note}; runs side by side: {jobs}.

{first.steps:,} optimiser steps on the same examples for every run; {num_seeds} seed(s), one where there is no +/-;
{problems}. PPL is the bound for the diffusions and exact for `ar` and blocks of one, over the same tokens
for all. "{EQUAL_TIME}" is the other view of the budget: on the validation split, when the fastest run of that size was
through ("{TRAINING_TIME}" holds the evaluations too). "tokens/s" is of evaluation in batches of 32. The last two
columns are tokens a second of {NUM_ONE_BY_ONE} problems one by one in multiples of those of `ar`, which answers in
turns with the model and with nothing else beside them: as it is, and with `compile_steps`. `ar` generates by
transformers with its own cache, uncompiled. The others answer with `confidence`, in the order and with the threshold
that answered best on the validation split (`python -m hierbd3lm.benchmarks.sampler`; the JSON has what was chosen).
"Tokens first" are runs that take half of their steps in blocks of one token, and the rest with two noisy copies at
half the learning rates.

{table}

![Exact match against speed, likelihood against steps and seconds](comparison{suffix}.png)
"""
    if analysed:
        page += f"""
## Does the hierarchy do work?

Exact match of the execution under the model's own plan, the reference, another problem's plan and none; how often it
carries out the steps of its own plan; and what it does where one operation of the reference plan is changed
(`hierbd3lm analyze`).

{format_table(analysed, list(ANALYSIS_COLUMNS))}
"""
    (DOCS / f"comparison{suffix}.md").write_text(page)
    draw(results, DOCS / f"comparison{suffix}.png")
    rows = [asdict(run) | row for run, row in results.items()]
    content = {"command": command, "machine": machine, "jobs": jobs, "threads_of_a_run": threads, "runs": rows}
    (RESULTS / f"compare{suffix}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(page)


def finish_all(runs: list[Run], jobs: int, threads: int) -> Results:
    """Every run's row, `jobs` of them at a time on `threads` threads each."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with ThreadPoolExecutor(jobs) as pool:
        rows = pool.map(functools.partial(Run.finish, environment=environment), runs)
        return dict(zip(runs, tqdm(rows, desc="Comparing", unit="run", total=len(runs)), strict=True))


def main() -> None:
    """Makes every run and writes what they say together."""
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="One size, one seed, few steps.")
    parser.add_argument("--data", default="synthetic", choices=("synthetic", "gsm8k"), help="What is learned.")
    parser.add_argument("--recipe", default=None, help="A YAML file of train.py; that of the data if omitted.")
    parser.add_argument("--steps", type=int, default=None, help="Optimiser steps of each run.")
    parser.add_argument("--seeds", type=int, default=None, help="Runs of each algorithm and size; 3, quick 1.")
    parser.add_argument("--jobs", type=int, default=cores, help="Runs side by side, which share the cores.")
    names = [*ALGORITHMS, *ABLATIONS]
    parser.add_argument("--only", nargs="+", default=(), choices=names, metavar="NAME", help=f"Some of {names}.")
    parser.add_argument("--page", default=None, help="In the names of what is written; that of the data if omitted.")
    args = parser.parse_args()
    for name in ("steps", "seeds", "jobs"):
        check_at_least(name, getattr(args, name), 1)
    steps = args.steps or (500 if args.quick else 1000)
    recipe = args.recipe or str(ROOT / "configs" / f"{'gsm8k_small' if args.data == 'gsm8k' else 'quickstart'}.yaml")
    threads = max(1, cores // args.jobs)
    runs = choose_runs(args.data, recipe, steps, args.quick, args.only, args.seeds)
    results = finish_all(runs, args.jobs, threads)
    add_equal_time(results)
    add_speeds(results)
    page = args.page or ("" if args.data == "synthetic" else args.data)
    command = shlex.join(["python", "-m", "hierbd3lm.benchmarks.compare", *sys.argv[1:]])
    write(results, command, args.jobs, threads, f"_{page}" if page else "")


if __name__ == "__main__":
    main()
