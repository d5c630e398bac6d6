"""An open checkpoint on GSM8K: fine-tuning with and without plans, token by token and in blocks.

`python -m hierbd3lm.benchmarks.open_checkpoint CHECKPOINT` (a folder or an id of the Hub; GSM8K through `GSM8K_DIR` or
the Hub). Every training sees problems in the same order, `--steps` steps first and half as many for each growth of the
blocks. Then each model answers the whole test split, once. All choices (learning rate, number of steps, threshold)
were made on problems held out from the training split. An interrupted run continues with the command that it was in.
Writes docs/open_checkpoint.md and results/open_checkpoint.json.
"""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest

from hierbd3lm.data.arguments import check_at_least
from hierbd3lm.evaluation.scoring import rate

from .measure import RESULTS, as_flags, describe_machine, make_parser

ROOT = Path(__file__).parents[1]
RECIPE = "gsm8k_smollm2"
FEW_SHOT_TASK = "gsm8k_fewshot"
ONE_BY_ONE = {"block_size": 1, "block_size_schedule": "null"}
IN_FOURS = {"block_size": 4, "block_size_schedule": "{0: 2, 0.2: 4}"}
IN_EIGHTS = {"block_size": 8, "block_size_schedule": "null"}


@dataclass(frozen=True)
class Training:
    """A training run: what it starts from (another run, or the checkpoint if omitted), its length and settings.

    `length` is in units of `--steps`.
    """

    settings: dict[str, Any]
    start: str | None = None
    length: float = 0.5


TRAININGS = {
    "sft": Training(ONE_BY_ONE, length=1),
    "hier_4": Training(IN_FOURS, "sft"),
    "sft_without_plans": Training(ONE_BY_ONE | {"plan_len": 0}, length=1),
    "bd3lm_4": Training(IN_FOURS | {"algorithm": "bd3lm"}, "sft"),
    "in_place_1": Training(ONE_BY_ONE | {"prediction": "in_place", "question_attention": "bidirectional"}, length=1),
    "in_place_4": Training(IN_FOURS, "in_place_1"),
    "hier_8": Training(IN_EIGHTS, "hier_4"),
}


@dataclass(frozen=True)
class Row:
    """A row of the table: the run whose model answers, and the settings of `hierbd3lm eval`."""

    label: str
    training: str
    settings: dict[str, Any] = field(default_factory=dict)


ONE_A_STEP = {"sampler": "first_hitting"}
BY_CONFIDENCE = {"sampler": "confidence", "left_to_right": True, "threshold": 0.9}
ROWS = {
    "sft": Row("AR-SFT with plans (blocks of 1)", "sft"),
    "hier_4": Row("hier, blocks of 4, by confidence", "hier_4", BY_CONFIDENCE),
    "sft_without_plans": Row("AR-SFT without plans", "sft_without_plans"),
    "hier_4_one": Row("hier, blocks of 4, one token per step", "hier_4", ONE_A_STEP),
    "bd3lm_4": Row("bd3lm, blocks of 4, by confidence", "bd3lm_4", BY_CONFIDENCE),
    "in_place_4": Row("hier in place, blocks of 4, by confidence", "in_place_4", BY_CONFIDENCE),
    "hier_4_reference": Row(
        "hier, blocks of 4, reference plan", "hier_4", BY_CONFIDENCE | {"given_plan": "reference"}
    ),
    "hier_4_other": Row(
        "hier, blocks of 4, another problem's plan", "hier_4", BY_CONFIDENCE | {"given_plan": "OTHER"}
    ),
    "hier_4_as_1": Row("hier trained in blocks of 4, run in blocks of 1", "hier_4", {"block_size": 1}),
    "hier_8": Row("hier, blocks of 8, by confidence", "hier_8", BY_CONFIDENCE),
}
FEW_SHOT = {
    "zero_shot": 0,
    "eight_shot": 8,
}  # the checkpoint itself under lm-evaluation-harness: examples in its prompt
# The limits are for answers that do not end.
ANSWERING = {"dtype": "bfloat16", "batch_size": 128, "max_plan_len": 192, "max_execution_len": 256}
COMPARED_WITH = "sft"  # every other row is tested against it, problem by problem
NLLS = {"NLL per token": "nll", "plan": "plan_nll", "execution": "execution_nll"}
COLUMNS = {  # of the table -> keys of summary.json
    "NFE": "num_forward_passes_mean",
    "tokens per forward pass": "tokens_per_forward",
    "finished": "finished",
}


@dataclass
class Run:
    """All commands of the table, in one folder."""

    checkpoint: str
    folder: Path
    steps: int
    limit: int | None

    def train(self, name: str) -> None:
        training, folder = TRAININGS[name], self.folder / name
        start = self.checkpoint if training.start is None else self.folder / training.start
        steps = max(1, round(self.steps * training.length))
        settings = {"init_from": start, "output_dir": folder, "max_steps": steps, "resume_from_checkpoint": "last"}
        settings |= {"warmup_steps": max(1, steps // 20), "save_steps": max(1, steps // 10), "eval_strategy": "no"}
        settings |= {"save_total_limit": 1, "use_cpu": not torch.cuda.is_available()} | training.settings
        self._make(folder / "trainer_state.json", ["train", RECIPE, *as_flags(settings)])
        likelihood = ["--model", folder, "--split", "test", "--num_draws", 1, "--dtype", "bfloat16", *self._limit()]
        self._make(folder / "likelihood.json", ["ppl", *map(str, likelihood)])

    def answer(self, name: str) -> None:
        row = ROWS[name]
        settings = row.settings
        if settings.get("given_plan") == "OTHER":
            settings = settings | {"given_plan": self._exchanged_plans()}
        folder = self.folder / "answers" / name
        settings = {"model": self.folder / row.training, "output_dir": folder} | ANSWERING | settings
        self._make(folder / "summary.json", ["eval", *as_flags(settings), *map(str, self._limit())])

    def answer_few_shot(self, name: str) -> None:
        """Have the checkpoint itself answer under lm-evaluation-harness, and read its results."""
        folder = self.folder / "answers" / name
        settings = {"model": "hf", "model_args": f"pretrained={self.checkpoint},dtype=bfloat16"}
        settings |= {"tasks": FEW_SHOT_TASK, "num_fewshot": FEW_SHOT[name], "batch_size": 8, "output_path": folder}
        flags = [*as_flags(settings), "--log_samples", *map(str, self._limit())]
        if not (folder / "summary.json").is_file():
            self._make(folder / "summary.json", ["lm-eval", *flags])
            write_few_shot_summary(folder)

    def row(self, name: str) -> dict[str, Any]:
        """Return the row's figures, with the exact test of McNemar against `COMPARED_WITH`."""
        folder = self.folder / "answers"
        summary = json.loads((folder / name / "summary.json").read_text())
        row = {"label": label_of(name), "n": summary["n"]}
        for kind in ("strict", "flexible"):
            rate = f"exact_match_{kind}"
            row |= {kind: summary[rate], f"{kind}_interval": summary[f"{rate}_interval"]}
        if name in ROWS:
            row |= {column: summary[key] for column, key in COLUMNS.items()}
        if name != COMPARED_WITH and (folder / COMPARED_WITH / "predictions.jsonl").is_file():
            row |= compare(*(read_matches(folder / other) for other in (name, COMPARED_WITH)))
        return row

    def trained(self) -> dict[str, dict[str, Any]]:
        """Return what each finished training starts from, its steps, and its likelihood of the test split."""
        runs = {}
        for name, training in TRAININGS.items():
            folder = self.folder / name
            if (folder / "trainer_state.json").is_file() and (folder / "likelihood.json").is_file():
                state, likelihood = (
                    json.loads((folder / file).read_text()) for file in ("trainer_state.json", "likelihood.json")
                )
                nll = {key: likelihood[key] for key in NLLS.values() if key in likelihood}
                runs[name] = {"start": training.start, "steps": state["global_step"]} | nll
        return runs

    def _exchanged_plans(self) -> Path:
        """Write the reference plan of each problem's successor as its own."""
        path = self.folder / "exchanged_plans.jsonl"
        if not path.is_file():
            lines = (self.folder / "answers" / "hier_4" / "predictions.jsonl").read_text().splitlines()
            problems = sorted(map(json.loads, lines), key=lambda problem: problem["index"])
            plans = [problem["reference_plan"] for problem in problems]
            pairs = zip(problems, plans[1:] + plans[:1], strict=True)
            rows = [{"question": problem["question"], "plan": plan} for problem, plan in pairs]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def _limit(self) -> list[Any]:
        return [] if self.limit is None else ["--limit", self.limit]

    def _make(self, file: Path, command: list[str]) -> None:
        """Run `hierbd3lm` with the command unless the file that it writes last exists."""
        if file.is_file():
            return
        print(shlex.join(["hierbd3lm", *command]), flush=True)
        with open(self.folder / "log.txt", "a") as log:
            words = [sys.executable, "-m", "hierbd3lm.cli", *command]
            subprocess.run(words, env=os.environ, check=True, stdout=log, stderr=subprocess.STDOUT)


def label_of(name: str) -> str:
    return ROWS[name].label if name in ROWS else f"the checkpoint, {FEW_SHOT[name]} examples in the prompt"


def write_few_shot_summary(folder: Path) -> None:
    """Write predictions.jsonl and summary.json, as of an evaluation, from the samples that the harness has logged.

    The harness logs each problem once for each of its two filters.
    """
    (path,) = folder.rglob(f"samples_{FEW_SHOT_TASK}_*.jsonl")
    matches: dict[int, dict[str, bool]] = {}
    for sample in map(json.loads, path.read_text().splitlines()):
        kind = sample["filter"].partition("-")[0]  # strict-match, flexible-extract
        matches.setdefault(sample["doc_id"], {})[f"exact_match_{kind}"] = bool(sample["exact_match"])
    lines = [{"index": index} | row for index, row in sorted(matches.items())]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary: dict[str, Any] = {"n": len(lines)}
    for name in ("exact_match_strict", "exact_match_flexible"):
        summary |= rate(name, [line[name] for line in lines])
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def read_matches(folder: Path) -> dict[int, bool]:
    """Return for each problem's index whether the strict answer is right."""
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return {line["index"]: line["exact_match_strict"] for line in map(json.loads, lines)}


def compare(matches: dict[int, bool], others: dict[int, bool]) -> dict[str, Any]:
    """Return how many problems only one of two models solves, and the p-value of McNemar's exact test.

    The test is the two-sided binomial test of equal chances over the problems that one of them solves (McNemar 1947).

    Raises:
        ValueError: if the two did not answer the same problems.
    """
    if matches.keys() != others.keys():
        raise ValueError(f"both models must answer the same problems, but got {len(matches)} and {len(others)}")
    only, others_only = (
        sum(mine[index] and not its[index] for index in mine) for mine, its in ((matches, others), (others, matches))
    )
    differing = only + others_only
    return {
        "only_this": only,
        "only_other": others_only,
        "p_value": binomtest(only, differing).pvalue if differing else 1.0,
    }


def format_page(rows: dict[str, dict[str, Any]], runs: dict[str, dict[str, Any]], command: str) -> str:
    """Format the page in docs/."""
    note = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
    lines = [
        "| | exact match, strict (95 % interval) | flexible | finished | NFE | tokens per forward pass | "
        f"solved only by it / only by {ROWS[COMPARED_WITH].label} (p) |",
        "|---" * 7 + "|",
    ]
    for row in rows.values():
        low, high = row["strict_interval"]
        paired = f"{row['only_this']} / {row['only_other']} ({row['p_value']:.2g})" if "p_value" in row else ""
        lines.append(
            f"| {row['label']} | {100 * row['strict']:.2f} % [{100 * low:.2f}, {100 * high:.2f}] | "
            f"{100 * row['flexible']:.2f} % | {cell(row, 'finished', 2)} | {cell(row, 'NFE', 1)} | "
            f"{cell(row, 'tokens per forward pass', 2)} | {paired} |"
        )
    lengths = [
        f"| {name} | {run['start'] or 'the checkpoint'} | {run['steps']:,} | "
        + " | ".join(cell(run, key, 4) for key in NLLS.values())
        + " |"
        for name, run in runs.items()
    ]
    heads = ["| run | starts from | steps | " + " | ".join(NLLS) + " |", "|---" * (3 + len(NLLS)) + "|"]
    table, trained = "\n".join(lines), "\n".join([*heads, *lengths])
    n = next(iter(rows.values()))["n"]
    return f"""# An open checkpoint on GSM8K

`{command}`: {note}.

{n:,} problems of the test split, answered once, greedily, with weights in bfloat16, in at most
{ANSWERING["max_plan_len"]} tokens of plan and {ANSWERING["max_execution_len"]} of execution. The checkpoint itself
answers under lm-evaluation-harness, with the prompt of its task gsm8k. The last column counts the problems that only
one of two models solves, and gives the p-value of McNemar's exact test. A constant answer is right in 2.7 % of the
test problems at best, the best single number of the question in 6.4 %.

{table}

The runs, with the recipe `{RECIPE}` (16 problems per step). NLL in nats per token of the test split's plans and
executions, over the tokens that the model itself writes (without plans: of the execution); exact for blocks of one
token, else an upper bound.

{trained}
"""


def cell(row: dict[str, Any], name: str, digits: int) -> str:
    return f"{row[name]:.{digits}f}" if name in row else ""


def main() -> None:
    """Train and evaluate what is missing, and write the page."""
    parser = make_parser("open_checkpoint", __doc__)
    parser.add_argument("checkpoint", help="Folder or Hub id of an autoregressive checkpoint.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/open_checkpoint"), help="Folder of the runs.")
    parser.add_argument("--steps", type=int, default=120, help="Steps of the first training.")
    parser.add_argument("--limit", type=int, default=None, help="Number of test problems; all if omitted.")
    names = [*ROWS, *FEW_SHOT]
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="ROW", help=f"Some of {names}.")
    args = parser.parse_args()
    for name in ("steps", "limit"):
        check_at_least(name, getattr(args, name), 1)
    run = Run(args.checkpoint, args.output_dir, args.steps, args.limit)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name in args.only:
        if name in FEW_SHOT:
            run.answer_few_shot(name)
            continue
        for training in ancestry(ROWS[name].training):
            run.train(training)
        run.answer(name)
    for name in args.only:
        rows[name] = run.row(name)
    command = shlex.join(["python", "-m", "hierbd3lm.benchmarks.open_checkpoint", *sys.argv[1:]])
    runs = run.trained()
    content = {"command": command, "machine": describe_machine(), "rows": rows, "runs": runs}
    (RESULTS / "open_checkpoint.json").write_text(json.dumps(content, indent=2) + "\n")
    page = format_page(rows, runs, command)
    (ROOT / "docs" / "open_checkpoint.md").write_text(page)
    print(page)


def ancestry(name: str) -> list[str]:
    """Return the trainings that a run needs, itself last."""
    start = TRAININGS[name].start
    return [*([] if start is None else ancestry(start)), name]


if __name__ == "__main__":
    main()
