"""Independent steps at the same time: `execution_order` chain and plan, at equal sizes and training steps.

`python -m hierbd3lm.benchmarks.parallel_steps [--max_steps N] [--most_steps S] [--num_problems N]` trains both models
on synthetic problems of 1 to S steps, and answers test problems of each width, steps / depth, one at a time: NFE,
tokens per second, exact match, and the likelihood of the executions. An interrupted run resumes. It writes
parallel_steps.json and .md to benchmarks/results, and docs/parallel_steps.png. `--reference_only` trains nothing: it
counts the passes that the reference answers take at one token per block and pass.
"""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from matplotlib.figure import Figure

from hierbd3lm.data.arguments import check_at_least
from hierbd3lm.data.collator import cut_steps
from hierbd3lm.data.gsm8k.problems import load_gsm8k
from hierbd3lm.data.loading import prepare_dataset
from hierbd3lm.data.questions import encode_text
from hierbd3lm.data.run_folder import write_json
from hierbd3lm.data.synthetic.config import SyntheticConfig, min_depth
from hierbd3lm.data.synthetic.problems import generate_dataset
from hierbd3lm.data.synthetic.wording import vocabulary_texts
from hierbd3lm.data.tokenization import train_tokenizer
from hierbd3lm.evaluation.checkpoints import load_model
from hierbd3lm.evaluation.likelihood import measure_likelihood
from hierbd3lm.evaluation.scoring import summarize

from .measure import RESULTS, as_flags, describe_machine, is_trained, make_parser
from .speed import answer_in_turns

ROOT = Path(__file__).parents[1]
OUTPUTS, FIGURE = ROOT / "outputs" / "parallel_steps", ROOT / "docs" / "parallel_steps.png"
ORDERS = ("chain", "plan")
WIDTHS = (1.0, 1.5, 2.5, 4.0)  # steps / depth
SAMPLERS = {
    "one token per block and pass": {"sampler": "first_hitting"},
    "confidence": {"sampler": "confidence", "threshold": 0.9},
}
PROBLEMS = {"num_distractors": [0, 0], "max_value": 30, "num_names": 24, "num_things": 2}
TOKENS_OF_STEP = 12  # of plan and of execution, with its line end
STEP_LEN = 24  # with opener, `<|end|>` and room for long sums
QUESTION_TOKENS = 24  # of a sentence

Result = dict[str, Any]


def shape_of(width: float, most_steps: int) -> tuple[int, int]:
    """Return the largest number of steps with this width, and the depth; the width is exact where possible."""
    shapes = [(steps, round(steps / width)) for steps in range(1, most_steps + 1)]
    shapes = [(steps, depth) for steps, depth in shapes if min_depth(steps) <= depth <= steps]
    nearest = min(abs(steps / depth - width) for steps, depth in shapes)
    return max(shape for shape in shapes if abs(shape[0] / shape[1] - width) <= nearest + 1e-9)


def lengths(most_steps: int) -> dict[str, int]:
    """Return the maximum lengths for problems of so many steps."""
    lengths = {"question_len": QUESTION_TOKENS * (most_steps + 4), "plan_len": TOKENS_OF_STEP * most_steps + 16}
    return {name: math.ceil(length / 8) * 8 for name, length in lengths.items()} | {
        "execution_len": STEP_LEN * (most_steps + 1)
    }


def training_command(order: str, folder: Path, max_steps: int, most_steps: int, seed: int) -> list[str]:
    """Return the command line of a training run: blocks of one token first, then of four, for both orders."""
    settings: dict[str, Any] = {"output_dir": str(folder), "max_steps": max_steps, "seed": seed}
    settings |= {"eval_strategy": "no", "save_steps": max(1, max_steps // 10), "resume_from_checkpoint": "last"}
    settings |= {"num_train_examples": 24 * max_steps, "num_validation_examples": 8, "dataset_num_proc": 1}
    settings |= {"synthetic": json.dumps(PROBLEMS | {"num_steps": [1, most_steps]})} | lengths(most_steps)
    settings |= {"execution_order": order} | ({"step_len": STEP_LEN} if order == "plan" else {})
    return [sys.executable, str(ROOT / "train.py"), "quickstart", *as_flags(settings)]


def train(order: str, folder: Path, *settings: int) -> None:
    """Train a model, unless it is there."""
    if is_trained(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        command = training_command(order, folder, *settings)
        subprocess.run(command, cwd=ROOT, env=os.environ, check=True, stdout=log, stderr=subprocess.STDOUT)


def test_problems(width: float, most_steps: int, num_problems: int) -> Dataset:
    """Draw test problems of one width."""
    steps, depth = shape_of(width, most_steps)
    return generate_dataset("test", num_problems, SyntheticConfig(**PROBLEMS, num_steps=(steps, steps), depth=depth))


def passes_of_reference(row: Mapping[str, Any], tokenizer: Any) -> dict[str, int]:
    """Count the passes of a reference answer at one token per block and pass, plan included, in both orders.

    Every token takes a pass, and so does the `<|end|>` of each part. Steps of the plan's order run at the same time.
    """
    lengths = cut_steps(row, tokenizer)["step_lengths"]
    plan = len(encode_text(row["plan"], tokenizer, add_special_tokens=False)) + 1
    done: list[int] = []  # after which pass of the execution each step is finished
    for length, earlier in zip(lengths, row["depends_on"], strict=False):
        done.append(max((done[other] for other in earlier), default=0) + length + 1)
    return {"chain": plan + sum(lengths) + 1, "plan": plan + max(done, default=0) + lengths[-1] + 1}


def count_reference_passes(most_steps: int, num_problems: int) -> str:
    """Return a table of the passes of reference answers: of synthetic problems by width, and of GSM8K."""
    tokenizer = train_tokenizer(vocabulary_texts(SyntheticConfig(**PROBLEMS, num_steps=(1, most_steps))))
    sets = {}
    for width in WIDTHS:
        steps, depth = shape_of(width, most_steps)
        sets[f"synthetic, {steps} steps, depth {depth}"] = test_problems(width, most_steps, num_problems)
    if os.environ.get("GSM8K_DIR"):
        sets["GSM8K test"] = load_gsm8k("test")
    lines = ["| problems | S/D | passes chain | passes plan | ratio | of the execution alone |", "|" + "---|" * 6]
    for name, problems in sets.items():
        if name.startswith("GSM8K"):
            tokenizer = train_tokenizer([*problems["execution"], *problems["plan"]], vocab_size=2048)
        counts, widths, plans = Counter(), [], 0
        for row in problems:
            counts.update(passes_of_reference(row, tokenizer))
            plans += len(encode_text(row["plan"], tokenizer, add_special_tokens=False)) + 1
            widths.append(len(row["depends_on"]) / depth_of(row["depends_on"]))
        chain, plan, count = counts["chain"], counts["plan"], len(problems)
        lines.append(
            f"| {name} | {sum(widths) / count:.2f} | {chain / count:.1f} | {plan / count:.1f} | {plan / chain:.2f} | "
            f"{(plan - plans) / (chain - plans):.2f} |"
        )
    return "\n".join(lines)


def depth_of(depends_on: Sequence[Sequence[int]]) -> int:
    """Return the number of steps of the longest chain."""
    depths: list[int] = []
    for earlier in depends_on:
        depths.append(1 + max((depths[other] for other in earlier), default=0))
    return max(depths)


def measure(folders: dict[str, Path], most_steps: int, num_problems: int) -> list[Result]:
    """Return a row for each width and sampler, with the columns of both orders."""
    models = {order: load_model(str(folder), "cpu") for order, folder in folders.items()}
    rows = []
    for width in WIDTHS:
        problems = test_problems(width, most_steps, num_problems)
        steps, depth = shape_of(width, most_steps)
        nll = {order: measure_execution(*models[order], problems) for order in ORDERS}
        for sampler, settings in SAMPLERS.items():
            predictions = answer_in_turns({order: (*models[order], settings) for order in ORDERS}, problems)
            row: Result = {"width": steps / depth, "steps": steps, "depth": depth, "sampler": sampler}
            for order in ORDERS:
                summary = summarize(predictions[order])
                row[order] = {
                    "nfe": summary["num_forward_passes_mean"],
                    "tokens_per_second": summary["tokens_per_second"],
                    "exact_match": summary["exact_match_strict"],
                    "plan_match": summary["plan_match"],
                    "finished": summary["finished"],
                    "num_plans_not_followed": summary.get("num_plans_not_followed", 0),
                    **nll[order],
                }
            row["price_per_token"] = (row["plan"]["nats"] - row["chain"]["nats"]) / row["chain"]["num_tokens"]
            rows.append(row)
    return rows


def measure_execution(model: Any, tokenizer: Any, problems: Dataset) -> dict[str, float]:
    """Measure the bound of the executions, given question and plan: in nats, summed over all of them."""
    dataset, _ = prepare_dataset(problems, tokenizer, model.config)
    metrics = measure_likelihood(model, dataset, num_draws=4, plan_is_given=True)
    nats = metrics["execution_nll"] * metrics["execution_num_tokens"]
    return {"nats": nats, "num_tokens": metrics["execution_num_tokens"], "num_measured": len(dataset)}


def format_rows(rows: list[Result]) -> str:
    """Format the results as a Markdown table."""
    lines = [
        "| S/D | S | sampler | NFE chain | NFE plan | ratio | tokens/s | EM chain | EM plan | price, nats/token |"
    ]
    lines += ["|" + "---|" * 10]
    for row in rows:
        chain, plan = row["chain"], row["plan"]
        speed = f"{chain['tokens_per_second']:.0f} -> {plan['tokens_per_second']:.0f}"
        lines.append(
            f"| {row['width']:.2g} | {row['steps']} | {row['sampler']} | {chain['nfe']:.1f} | {plan['nfe']:.1f} | "
            f"{plan['nfe'] / chain['nfe']:.2f} | {speed} | {100 * chain['exact_match']:.1f} % | "
            f"{100 * plan['exact_match']:.1f} % | {row['price_per_token']:+.3f} |"
        )
    return "\n".join(lines)


def draw(rows: list[Result], path: Path) -> None:
    """Draw NFE, tokens per second and exact match of both orders by width, for the first sampler."""
    rows = [row for row in rows if row["sampler"] == next(iter(SAMPLERS))]
    names = {"nfe": "NFE per answer", "tokens_per_second": "tokens per second", "exact_match": "exact match"}
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(names)), names.items(), strict=True):
        for order in ORDERS:
            axes.plot([row["width"] for row in rows], [row[order][name] for row in rows], marker="o", label=order)
        axes.set(xlabel="width: steps / depth", ylabel=label, ylim=(0, None))
        axes.legend(frameon=False)
    figure.suptitle("Execution order chain and plan (benchmarks/parallel_steps.py)", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train what is missing, measure, and write the results."""
    parser = make_parser("parallel_steps", __doc__)
    parser.add_argument("--max_steps", type=int, default=12_000, help="Training steps of each model.")
    parser.add_argument("--most_steps", type=int, default=12, help="Steps of the longest problems, at least 8.")
    parser.add_argument("--num_problems", type=int, default=200, help="Test problems of each width.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed of training.")
    parser.add_argument("--reference_only", action="store_true", help="Count the passes of reference answers alone.")
    args = parser.parse_args(sys.argv[1:])
    for name, low in (("max_steps", 10), ("most_steps", 8), ("num_problems", 1)):
        check_at_least(name, getattr(args, name), low)
    if args.reference_only:
        print(count_reference_passes(args.most_steps, args.num_problems))
        return
    name = f"{args.most_steps}_steps_{args.max_steps}_updates_{args.seed}"
    folders = {order: OUTPUTS / name / order for order in ORDERS}
    for order, folder in folders.items():
        train(order, folder, args.max_steps, args.most_steps, args.seed)
    rows = measure(folders, args.most_steps, args.num_problems)
    settings = {name: value for name, value in vars(args).items() if name != "reference_only"}
    command = f"python -m hierbd3lm.benchmarks.parallel_steps {' '.join(as_flags(settings))}"
    machine = describe_machine()
    write_json(RESULTS / "parallel_steps.json", {"command": command, "machine": machine, "rows": rows})
    note = ", ".join(f"{key} {value}" for key, value in machine.items())
    (RESULTS / "parallel_steps.md").write_text(f"`{command}`: {note}\n\n{format_rows(rows)}\n")
    print(format_rows(rows))
    draw(rows, FIGURE)


if __name__ == "__main__":
    main()
