"""Comparison of the algorithms with the same backbone, data, tokenizer, optimiser steps and evaluation.

`python -m hierbd3lm.benchmarks.compare [--quick] [--data gsm8k] [--only ar hier]`, or `make compare`. A run is a
sequence of commands in its own folder: train.py, hierbd3lm ppl, eval_gsm8k.py, and for the hierarchy
evaluation/plan_dependence.py. An interrupted comparison resumes after the last finished command. Writes
docs/comparison.md, docs/comparison.png and results/compare.json, with the suffix `_gsm8k` for GSM8K or `--page`.
"""

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

from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
from hierbd3lm.data.arguments import check_at_least

from .measure import RESULTS, as_flags, describe_machine, make_parser
from .sampler import SAMPLER_FILE
from .speed import SPEED_FILE

ROOT = Path(__file__).parents[1]
OUTPUTS = ROOT / "outputs" / "compare"
DOCS = ROOT / "docs"

# name -> settings that differ from the recipe
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ar": {"algorithm": "ar"},
    "mdlm": {"algorithm": "mdlm"},
    "sedd": {"algorithm": "sedd"},
    "bd3lm": {"algorithm": "bd3lm"},
    "hier": {},
}
# Suffix of a name: half of the steps use blocks of one token, the rest the recipe's blocks with two noisy copies.
TOKENS_FIRST = ", tokens first"
ABLATIONS: dict[str, dict[str, Any]] = {  # at the base size only
    "bd3lm, blocks of 1": {"algorithm": "bd3lm", "block_size": 1},
    "hier, no mask": {"hierarchical_mask": False},
    "hier, joint": {"joint": True},
    "hier, joint, no mask": {"joint": True, "hierarchical_mask": False},
    f"bd3lm{TOKENS_FIRST}": {"algorithm": "bd3lm"},
    f"hier{TOKENS_FIRST}": {},
}
ANALYSED = ("hier", "hier, no mask", f"hier{TOKENS_FIRST}")  # runs for which plan_dependence is evaluated
SIZES = {"small": (64, 2), "base": (96, 3)}  # hidden size, heads
# One or two operations, which models of this size begin to solve within 90 minutes of training.
PROBLEMS = {"num_steps": [1, 2], "max_depth": 2, "num_distractors": [0, 0], "max_value": 16}
PROBLEMS |= {"num_names": 8, "num_things": 2}
BATCH_SIZE = 16
NUM_EVALUATIONS = 5  # of the likelihood during training
MAX_SAVE_STEPS = 250  # steps that an interrupted run repeats at most
NUM_ANSWERS = 500  # test problems per run
NUM_SPEED_PROBLEMS = 100  # test problems at batch size 1, for the first seed
# column -> (file of the run, key)
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
SPEED_COLUMNS = {  # tokens per second at batch size 1 relative to `ar`; keys of speed.json
    "x ar, batch 1": "eager_over_baseline",
    "x ar, compiled": "compiled_over_baseline",
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
        """Return the commands in order, each by the last file that it writes."""
        python, folder = sys.executable, str(self.folder)
        limit = ["--limit", str(NUM_ANSWERS)] if self.data == "synthetic" else []
        commands = {
            "trainer_state.json": self.training(),
            "likelihood.json": ["-m", "hierbd3lm.evaluation.ppl", "--model", folder, "--num_draws", "4", *limit],
        }
        if self.algorithm != "ar":
            commands[SAMPLER_FILE] = ["-m", "hierbd3lm.benchmarks.sampler", "--model", folder]
        commands["eval/summary.json"] = [str(ROOT / "eval_gsm8k.py"), "--model", folder, *limit]
        if self.algorithm in ANALYSED and self.data == "synthetic":
            module = "hierbd3lm.evaluation.analyze"
            commands["analysis/analysis.json"] = ["-m", module, "--model", folder, *limit]
        return {file: [python, *command] for file, command in commands.items()}

    def training(self) -> list[str]:
        """Return the command line of train.py, with the settings that differ from the recipe."""
        settings: dict[str, Any] = {"output_dir": str(self.folder), "max_steps": self.steps, "seed": self.seed}
        every = self.steps // NUM_EVALUATIONS
        settings |= {"eval_steps": every, "save_steps": min(every, MAX_SAVE_STEPS)}
        settings |= {"resume_from_checkpoint": "last", "logging_steps": 50, "warmup_steps": self.steps // 20}
        # the same for all: one noisy copy as for `ar`, and no clipping, which a single block for the answer forbids
        settings |= {"noisy_copies": 1, "plan_clip": [0, 1], "execution_clip": [0, 1]}
        if self.data == "synthetic":
            width, heads = SIZES[self.size]
            backbone = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": 4}
            backbone |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 32}
            backbone |= {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
            backbone |= {"initializer_range": 0.1, "tie_word_embeddings": True}
            settings |= {"backbone": json.dumps(backbone), "synthetic": json.dumps(PROBLEMS)}
            settings |= {"block_size_schedule": "null"}
            settings |= {"num_train_examples": BATCH_SIZE * self.steps, "per_device_train_batch_size": BATCH_SIZE}
        settings |= ALGORITHMS.get(self.algorithm) or ABLATIONS.get(self.algorithm, {})
        if self.algorithm.endswith(TOKENS_FIRST):
            recipe = yaml.safe_load(Path(self.recipe).read_text())
            block_size = recipe.get("block_size", HierBD3LMConfig().plan_block_size)
            settings |= {"block_size_schedule": f"{{0: 1, 0.5: {block_size}}}", "noisy_copies": 2}
        return [str(ROOT / "train.py"), self.recipe, *as_flags(settings)]

    def finish(self, environment: dict[str, str]) -> dict[str, Any]:
        """Run the commands whose results are missing, and return all columns of the tables."""
        self.folder.mkdir(parents=True, exist_ok=True)
        commands = self.commands()
        for file, command in commands.items():
            self._make(file, command, environment)
        row = {column: self._read(file).get(entry) for column, (file, entry) in COLUMNS.items()}
        history = self._read("trainer_state.json")["log_history"]
        row["curve"] = [(entry["step"], entry["eval_nll"]) for entry in history if "eval_nll" in entry]
        row[TRAINING_TIME] = self._read("train_results.json")["train_runtime"]
        if SAMPLER_FILE in commands:
            row["sampler"] = self._read(SAMPLER_FILE)["chosen"]
        if "analysis/analysis.json" in commands:
            analysis = self._read("analysis/analysis.json")
            row |= {column: analysis.get(entry) for column, entry in ANALYSIS_COLUMNS.items()}
        return row

    def measure_speed(self) -> dict[str, float]:
        """Measure the columns of speed; the run of `ar` with the same size and seed must exist."""
        baseline = str(replace(self, algorithm="ar").folder)
        settings = {"model": str(self.folder), "baseline": baseline, "limit": NUM_SPEED_PROBLEMS}
        self._make(SPEED_FILE, [sys.executable, "-m", "hierbd3lm.benchmarks.speed", *as_flags(settings)], os.environ)
        return {column: self._read(SPEED_FILE)[entry] for column, entry in SPEED_COLUMNS.items()}

    def _make(self, file: str, command: list[str], environment: Mapping[str, str]) -> None:
        """Run the command that writes the file, unless it exists."""
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
    """Choose the runs: algorithms at two sizes with three seeds, ablations once; quick or on GSM8K one run of each."""
    sizes, default_seeds = (["base"], 1) if quick or data == "gsm8k" else (list(SIZES), 3)
    seeds = default_seeds if seeds is None else seeds
    kinds = [(name, size, seed) for size in sizes for name in ALGORITHMS for seed in range(seeds)]
    kinds += [(name, "base", 0) for name in ABLATIONS]
    return [Run(name, size, seed, steps, data, recipe) for name, size, seed in kinds if not only or name in only]


def add_speeds(results: Results) -> None:
    """Add the columns of speed to the runs of the first seed, without other jobs at the same time."""
    first = [run for run in results if run.seed == 0 and run.algorithm != "ar"]
    measured = [run for run in first if replace(run, algorithm="ar") in results]
    for run in tqdm(measured, desc="Measuring speed", unit="run"):
        results[run] |= run.measure_speed()


def nll_at(seconds: float, curve: list[tuple[int, float]], seconds_per_step: float) -> float:
    """Interpolate the likelihood after a number of seconds of training linearly between evaluations."""
    steps, nll = zip(*curve, strict=True)
    return float(np.interp(seconds, [step * seconds_per_step for step in steps], nll))


def add_equal_time(results: Results) -> None:
    """Add the perplexity on the validation split at the time when the fastest run of the same size finished."""
    for size in {run.size for run in results}:
        of_size = {run: row for run, row in results.items() if run.size == size}
        least = min(row[TRAINING_TIME] for row in of_size.values())
        for run, row in of_size.items():
            row[EQUAL_TIME] = math.exp(nll_at(least, row["curve"], row[TRAINING_TIME] / run.steps))


def format_table(results: Results, columns: list[str]) -> str:
    """Format a Markdown table: a line for each algorithm and size, mean and standard deviation over the seeds."""
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
    """Plot exact match against tokens/s, and the likelihood against steps and seconds of training."""
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
    """Write the page, the figure and the JSON file, with `suffix` in their names."""
    machine = describe_machine()
    first = next(iter(results))
    num_seeds = len({run.seed for run in results})
    table = format_table(results, [*COLUMNS, TRAINING_TIME, EQUAL_TIME, *SPEED_COLUMNS])
    analysed = {run: row for run, row in results.items() if ANALYSIS_COLUMNS.keys() <= row.keys()}
    note = ", ".join(f"{key} {value}" for key, value in (machine | {"threads": threads}).items())
    problems = f"{NUM_ANSWERS} test problems" if first.data == "synthetic" else "the whole test split"
    page = f"""# Comparison of the algorithms

`{command}`: {note}; concurrent runs: {jobs}.

{first.steps:,} optimiser steps on the same examples for every run; {num_seeds} random seed(s), a single one where
there is no +/-; {problems}. PPL is an upper bound for diffusion models and exact for `ar` and blocks of one token,
over the same tokens for all. "{EQUAL_TIME}" compares at equal training time: PPL on the validation split when the
fastest run of the same size finished ("{TRAINING_TIME}" includes the evaluations). "tokens/s" is measured in
evaluation with batch size 32. The last two columns are tokens per second at batch size 1 on {NUM_SPEED_PROBLEMS}
problems relative to `ar`, eager and with `compile_steps`; model and `ar` answer in turns, without other jobs at the
same time. `ar` generates with transformers and its default cache, not compiled. The others use the sampler
`confidence` with the order and the confidence threshold that were best on the validation split
(`python -m hierbd3lm.benchmarks.sampler`; the chosen settings are in the JSON file). "Tokens first" marks runs that
take half of their steps in blocks of one token, and the rest with two noisy copies.

{table}

![Exact match against speed, likelihood against steps and seconds](comparison{suffix}.png)
"""
    if analysed:
        page += f"""
## Dependence of the execution on the plan

Exact match of the execution with the model's own plan, the reference plan, the plan of another problem and an empty
plan; how often it carries out the steps of its own plan; and its reaction to a change of one operation in the
reference plan (`python -m hierbd3lm.evaluation.analyze`).

{format_table(analysed, list(ANALYSIS_COLUMNS))}
"""
    (DOCS / f"comparison{suffix}.md").write_text(page)
    draw(results, DOCS / f"comparison{suffix}.png")
    rows = [asdict(run) | row for run, row in results.items()]
    content = {"command": command, "machine": machine, "jobs": jobs, "threads_of_a_run": threads, "runs": rows}
    (RESULTS / f"compare{suffix}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(page)


def finish_all(runs: list[Run], jobs: int, threads: int) -> Results:
    """Finish all runs, `jobs` of them at a time on `threads` threads each, and return their rows."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with ThreadPoolExecutor(jobs) as pool:
        rows = pool.map(functools.partial(Run.finish, environment=environment), runs)
        return dict(zip(runs, tqdm(rows, desc="Comparing", unit="run", total=len(runs)), strict=True))


def main() -> None:
    """Finish all runs, and write the comparison."""
    cores = os.cpu_count() or 1
    parser = make_parser("compare", __doc__)
    parser.add_argument("--quick", action="store_true", help="Use one size, one random seed and few steps.")
    parser.add_argument("--data", default="synthetic", choices=("synthetic", "gsm8k"), help="Training data.")
    parser.add_argument("--recipe", default=None, help="YAML file for train.py; by default that of the data.")
    parser.add_argument("--steps", type=int, default=None, help="Optimiser steps of each run.")
    parser.add_argument("--seeds", type=int, default=None, help="Random seeds per algorithm and size.")
    parser.add_argument("--jobs", type=int, default=cores, help="Number of concurrent runs, which share the cores.")
    names = [*ALGORITHMS, *ABLATIONS]
    parser.add_argument("--only", nargs="+", default=(), choices=names, metavar="NAME", help=f"Some of {names}.")
    parser.add_argument("--page", default=None, help="Suffix of the written files; by default that of the data.")
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
