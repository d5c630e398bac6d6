"""Whether the execution depends on the plan: `python -m hierbd3lm.evaluation.plan_dependence --model DIR`.

The same problems are executed under plans of several sources. A folder is written: a subfolder per source (see
runner.py), `swaps.jsonl` with a line per changed plan, `analysis.json`, `analysis.md` and `analysis.png`.
"""

import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data import run_folder
from ..data.arguments import check_at_least
from ..data.gsm8k.answers import cut_at_stops, match_strict
from ..data.loading import prepare_dataset
from ..data.steps import split_steps
from ..data.synthetic.checks import FOLLOWED, check_execution
from ..data.synthetic.plan_swaps import ChangedPlan, change_plan, exchange_plans
from ..data.synthetic.problems import SyntheticConfig
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..settings_hierbd3lm import resolve_settings, settings_of
from .checkpoints import CheckpointArguments, load_examples, versions
from .likelihood import measure_likelihood
from .runner import (
    PREDICTIONS_FILE,
    SETTINGS_FILE,
    describe_run,
    load_model,
    predict,
    rate,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.get_logger(__name__)

OWN, ORACLE, OTHER, EMPTY, CHANGED = "own", "oracle", "other", "empty", "changed"
SOURCES = {
    OWN: "the model's own plan",
    ORACLE: "the reference plan",
    OTHER: "another problem's plan",
    EMPTY: "a plan of no steps",
    CHANGED: "the reference plan, one step changed",
}
CHECKED = (OWN, ORACLE, CHANGED)  # another problem's plan names people that this one does not know
MEASURED = (ORACLE, OTHER, EMPTY)  # plans under which the likelihood of the reference execution is measured
SWAP_OUTCOMES = {
    "swap_follows_step": "carries out the changed step",
    "swap_reaches_answer": "gives the changed plan's answer",
    "swap_ignores_change": "gives the original answer",
}
ANALYSIS_FILE, TABLE_FILE, FIGURE_FILE, SWAPS_FILE = "analysis.json", "analysis.md", "analysis.png", "swaps.jsonl"
INK, COLOUR, SWAP_COLOUR = "#22303c", "#2b5f94", "#e9853b"


@dataclass
class AnalysisArguments(CheckpointArguments):
    """What is analysed, and how. Generation settings are the checkpoint's."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the results; `analysis` in `model`."})
    overwrite: bool = field(default=False, metadata={"help": "Throws away the results that `output_dir` holds."})
    num_draws: int = field(default=8, metadata={"help": "Draws of the noise that a likelihood averages over; >= 1."})
    seed: int = field(default=0, metadata={"help": "Of exchanged and changed plans, generation and noise."})

    def __post_init__(self):
        super().__post_init__()
        check_at_least("num_draws", self.num_draws, 1)
        if self.output_dir is None:
            self.output_dir = str(Path(self.model, "analysis"))


def analyse(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    folder: str | os.PathLike,
    max_value: int = SyntheticConfig.max_value,
    batch_size: int = 32,
    num_draws: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Executes every problem under the plans of each source, and measures what the executions owe to them.

    Under every order a given plan is clean context: the `generate` of a flat model continues it, and without the
    hierarchical mask a block of the execution sees the plan's blocks up to its own, as in training.

    Args:
        dataset: has `question`, `plan` and `execution`, which ends with `#### <answer>`.
        folder: keeps the executions of each source; those that are there are not generated again.
        max_value: changed plans have values in [1, max_value], as the synthetic problems do.
        num_draws: see [`~evaluation.likelihood.measure_likelihood`].
        seed: of exchanged and changed plans, generation and noise.

    Returns:
        by source, as `<source>_<name>`:
        - `exact_match`: strict rate of the problem's answer, for `changed` of the answer that the changed plan has;
          `n` are the problems, `num_too_long` those among them that are over-long and not answered.
        - `own`, `oracle` and `changed`: `agreement`, rate of the executions that carry out all steps of their plan,
          no others, and give the last step's value; `step_agreement`, mean share of the steps that are carried out
          (steps beyond the plan count as not); `verdicts`, how often each of `VERDICTS` was given.
        - `oracle`, `other` and `empty`: `execution_nll` of the reference execution in nats per token, and the
          examples, `execution_nll_n`, that it is measured on.

        and the rates of `SWAP_OUTCOMES` among the `swap_n` problems that are right under the reference plan and
        have a changed plan; in all `num_without_change` have none. With `swap_n` 0 these rates are left out.
        A rate comes with its 95 % interval, as `..._interval`. For data without the steps of the synthetic problems
        agreement and changed plans are left out.

    Raises:
        ValueError: for a dataset without plans, or whose plans cannot be exchanged.
    """
    plans = read_reference_plans(dataset)
    has_steps = can_check(dataset)
    if not has_steps:
        logger.warning("The plans are not those of the synthetic problems: they are neither changed nor checked")
    changes = draw_changes(dataset, max_value, seed) if has_steps else []
    given = {ORACLE: plans, OTHER: [plans[other] for other in exchange_plans(plans, seed)], EMPTY: [""] * len(plans)}
    predictions = generate_executions(model, tokenizer, dataset, given, changes, folder, batch_size, seed)
    swaps = judge_swaps(predictions, changes)
    metrics: dict[str, Any] = {}
    for source, lines in predictions.items():
        is_right = [swap["reaches_answer"] for swap in swaps] if source == CHANGED else None
        metrics |= measure_source(source, lines, is_right, has_steps and source in CHECKED)
    if has_steps:
        run_folder.write_lines(Path(folder, SWAPS_FILE), swaps)
        metrics |= measure_swaps(swaps) | {"num_without_change": changes.count(None)}
    for source in MEASURED:
        examples, _ = prepare_dataset(with_plans(dataset, given[source]), tokenizer, model.config)
        if len(examples) == 0:
            raise ValueError(f"`dataset` must have a problem that fits under its {source} plan, but all are over-long")
        settings = {"num_draws": num_draws, "batch_size": batch_size, "seed": seed}
        measures = measure_likelihood(model, examples, **settings, plan_is_given=True)
        names = [name for name in measures if name.startswith("execution_nll")]
        metrics |= {f"{source}_{name}": measures[name] for name in names}
        metrics[f"{source}_execution_nll_n"] = len(examples)
    return metrics


def read_reference_plans(dataset: Dataset) -> list[str]:
    """The plan of each problem.

    Raises:
        ValueError: for a dataset without plans, or a row without one.
    """
    if "plan" not in dataset.column_names:
        raise ValueError(f"`dataset` must have the column plan, but has {', '.join(dataset.column_names)}")
    plans = dataset["plan"][:]
    for row, plan in enumerate(plans):
        if not plan:
            raise ValueError(f"row {row}: `plan` must be a text of one step at least, but got {plan!r}")
    return plans


def can_check(dataset: Dataset) -> bool:
    """Whether every reference execution is seen to carry out its plan: data of the synthetic problems' format."""
    rows = zip(dataset["question"], dataset["plan"], dataset["execution"], strict=True)
    return all(agrees(check_execution(*row), row[2]) for row in rows)


def agrees(verdicts: Sequence[str], execution: str) -> bool:
    """Whether an execution carries out all steps of a plan, no others, and answers with the last one's value.

    Args:
        verdicts: what [`check_execution`] says of it.
    """
    return set(verdicts) == {FOLLOWED} and match_strict(execution, split_steps(execution)[-1].split()[-1])


def draw_changes(dataset: Dataset, max_value: int, seed: int) -> list[ChangedPlan | None]:
    """A changed plan for each problem; see [`change_plan`]."""
    rows = enumerate(zip(dataset["question"], dataset["plan"], strict=True))
    return [change_plan(random.Random(f"{seed} {row}"), *texts, max_value) for row, texts in rows]


def generate_executions(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    given: dict[str, list[str]],
    changes: Sequence[ChangedPlan | None],
    folder: str | os.PathLike,
    batch_size: int,
    seed: int,
) -> dict[str, list[dict[str, Any]]]:
    """The predictions of each source (see [`predict`]); those of `changed` are of the problems that have a change."""
    datasets = {OWN: dataset} | {source: with_given(dataset, plans) for source, plans in given.items()}
    changed = [row for row, change in enumerate(changes) if change is not None]
    if changed:
        datasets[CHANGED] = with_given(dataset.select(changed), [changes[row].plan for row in changed])
    predictions = {}
    for source, problems in tqdm(datasets.items(), desc="Plans", unit="source"):
        stage = {"stage": "full" if source == OWN else "execution", "seed": seed}
        settings = resolve_settings(model.generation_config, stage)
        subfolder = Path(folder, source)
        subfolder.mkdir(parents=True, exist_ok=True)
        predictions[source] = predict(model, tokenizer, problems, settings, subfolder, batch_size)
    return predictions


def with_given(dataset: Dataset, plans: Sequence[str]) -> Dataset:
    """The dataset with the plans to execute, as [`predict`] takes them."""
    return dataset.add_column("given_plans", [[plan] for plan in plans])


def with_plans(dataset: Dataset, plans: Sequence[str]) -> Dataset:
    """The dataset with other plans in place of the reference's."""
    return dataset.remove_columns("plan").add_column("plan", list(plans))


def measure_source(
    source: str, predictions: Sequence[dict[str, Any]], is_right: Sequence[bool] | None, is_checked: bool
) -> dict[str, Any]:
    """What [`analyse`] says of the executions under one source's plans.

    Args:
        is_right: whether each execution has the answer that it should have; the problem's own answer if omitted.
        is_checked: whether the executions are compared with their plans step by step.
    """
    if is_right is None:
        is_right = [prediction["exact_match_strict"] for prediction in predictions]
    metrics = {
        f"{source}_n": len(predictions),
        f"{source}_num_too_long": sum(bool(p["too_long"]) for p in predictions),
    }
    metrics |= rate(f"{source}_exact_match", is_right)
    if is_checked:
        texts = [(p["question"], p["plan"], cut_at_stops(p["execution"])) for p in predictions]
        verdicts = [check_execution(*text) for text in texts]
        shares = [steps.count(FOLLOWED) / len(steps) if steps else 0.0 for steps in verdicts]
        agreement = [agrees(steps, execution) for steps, (_, _, execution) in zip(verdicts, texts, strict=True)]
        metrics |= rate(f"{source}_agreement", agreement)
        metrics |= rate(f"{source}_step_agreement", shares)
        metrics[f"{source}_verdicts"] = dict(Counter(verdict for steps in verdicts for verdict in steps))
    return metrics


def judge_swaps(
    predictions: dict[str, list[dict[str, Any]]], changes: Sequence[ChangedPlan | None]
) -> list[dict[str, Any]]:
    """A line of `swaps.jsonl` for each problem that has a changed plan.

    Returns:
        the fields of [`ChangedPlan`]; `index` of the problem, `question`, `reference_plan`, `reference_answer`; the
        `execution` of the changed plan; whether the answer `is_right_under_reference` plan; the outcomes of
        `SWAP_OUTCOMES`.
    """
    rows = [row for row, change in enumerate(changes) if change is not None]
    swaps = []
    for row, prediction in zip(rows, predictions.get(CHANGED, []), strict=True):
        change, execution = changes[row], cut_at_stops(prediction["execution"])
        verdicts = check_execution(prediction["question"], change.plan, execution)
        copied = ("question", "reference_plan", "reference_answer", "execution")
        swaps.append(
            {"index": row}
            | {name: prediction[name] for name in copied}
            | asdict(change)
            | {
                "is_right_under_reference": predictions[ORACLE][row]["exact_match_strict"],
                "follows_step": verdicts[change.step] == FOLLOWED,
                "reaches_answer": match_strict(execution, str(change.answer)),
                "ignores_change": prediction["exact_match_strict"],
            }
        )
    return swaps


def measure_swaps(swaps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rates of `SWAP_OUTCOMES`; see [`analyse`]. `swap_kinds` has them for each kind of change."""
    counted = [swap for swap in swaps if swap["is_right_under_reference"]]
    kinds = {}
    for kind in sorted({swap["kind"] for swap in counted}):
        of_kind = [swap for swap in counted if swap["kind"] == kind]
        kinds[kind] = {"swap_n": len(of_kind)} | _rate_outcomes(of_kind)
    return {"swap_n": len(counted)} | _rate_outcomes(counted) | {"swap_kinds": kinds}


def _rate_outcomes(swaps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    metrics = {}
    for name in SWAP_OUTCOMES if swaps else ():
        metrics |= rate(name, [swap[name.removeprefix("swap_")] for swap in swaps])
    return metrics


# What people read


def format_tables(metrics: dict[str, Any]) -> str:
    """The metrics as Markdown: what the executions under each source's plans are like, and what a change does."""
    lines = ["| plan | exact match | agreement | steps carried out | execution NLL |", "|---" * 5 + "|"]
    for source, meaning in SOURCES.items():
        if f"{source}_n" in metrics:
            names = ("exact_match", "agreement", "step_agreement")
            cells = [format_rate(metrics, f"{source}_{name}") for name in names]
            nll = metrics.get(f"{source}_execution_nll")
            lines.append(f"| {meaning} | {' | '.join(cells)} | {'' if nll is None else f'{nll:.4f}'} |")
    if "swap_n" in metrics:
        columns = {"all": metrics, **metrics["swap_kinds"]}
        heads = [f"{kind} ({rates['swap_n']})" for kind, rates in columns.items()]
        lines += ["", f"| what was changed (problems): | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for name, meaning in SWAP_OUTCOMES.items():
            cells = [format_rate(rates, name) for rates in columns.values()]
            lines.append(f"| the execution {meaning} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_rate(metrics: dict[str, Any], name: str) -> str:
    """A rate in per cent with its interval; nothing where it was not measured."""
    if name not in metrics:
        return ""
    low, high = metrics[f"{name}_interval"]
    return f"{100 * metrics[name]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def format_page(result: dict[str, Any]) -> str:
    """`analysis.md`."""
    notes = [
        f"{result['own_n']} problems of {result['dataset']}, {result['split']}; seed {result['seed']}; brackets are "
        f"95 % intervals. The NLL is of the reference execution, in nats per token; for all but `ar` it is a bound.",
    ]
    if "swap_n" in result:
        notes.append(
            f"Under the changed plan, exact match is of the answer that this plan has; no change of "
            f"{result['num_without_change']} problems has another answer in the range of values. The second table is "
            f"of the problems that are right under the reference plan."
        )
    figure = f"![Exact match under each plan, and what a changed plan does]({FIGURE_FILE})"
    return "\n\n".join([f"# {result['model']}: does the plan matter?", *notes, format_tables(result), figure]) + "\n"


def draw(metrics: dict[str, Any], path: Path) -> None:
    """Bars of the rates with their intervals, into an image file."""
    figure = figure_class()(figsize=(9, 3.4), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[len(SOURCES), len(SWAP_OUTCOMES)], sharey=True)
    exact_match = {source: f"{source}_exact_match" for source in SOURCES if f"{source}_n" in metrics}
    draw_rates(left, metrics, {f"{source} plan": name for source, name in exact_match.items()}, COLOUR)
    left.set_title("exact match (changed plan: with its own answer)", fontsize=11, color=INK)
    outcomes = {name.removeprefix("swap_").replace("_", "\n"): name for name in SWAP_OUTCOMES if name in metrics}
    draw_rates(right, metrics, outcomes, SWAP_COLOUR)
    right.set_title("under the changed plan", fontsize=11, color=INK)
    figure.savefig(path, dpi=150)


def draw_rates(axes: "Axes", metrics: dict[str, Any], names: dict[str, str], colour: str) -> None:
    """A bar for each named rate with its interval, as a percentage; `names` are by what stands below the bar."""
    values = [100 * metrics[name] for name in names.values()]
    intervals = [[100 * end for end in metrics[f"{name}_interval"]] for name in names.values()]
    # At a rate of 0 or 1 the interval may miss the rate by a rounding, and matplotlib takes no negative lengths.
    below = [max(0.0, value - low) for value, (low, _) in zip(values, intervals, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, intervals, strict=True)]
    labels = [label.replace(" ", "\n") for label in names]
    axes.bar(labels, values, yerr=[below, above], color=colour, ecolor=INK, capsize=3, width=0.65)
    axes.set_ylim(0, 105)
    axes.yaxis.set_major_formatter("{x:.0f} %")
    axes.tick_params(length=0, labelsize=10, labelcolor=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)


def figure_class() -> type:
    """matplotlib's `Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing the analysis needs matplotlib: run `pip install 'hierbd3lm[dev]'`") from error
    return Figure


# The command line


def main() -> None:
    """Parses, analyses, prints."""
    args = HfArgumentParser(AnalysisArguments).parse_args_into_dataclasses(sys.argv[1:])[0]
    result = run(args)
    print(f"{args.model} on {result['dataset']}, {args.split} ({args.output_dir}/{ANALYSIS_FILE})")
    print(format_tables(result))


def run(args: AnalysisArguments) -> dict[str, Any]:
    """Analyses a checkpoint, or goes on with that; returns what `analysis.json` has."""
    figure_class()  # missed now, not after the work
    model, tokenizer = load_model(args.model, args.device)
    data_args, dataset = load_examples(args)
    settings = describe_run(args, data_args, dataset, model) | {
        "num_draws": args.num_draws,
        "seed": args.seed,
        "settings": settings_of(model.generation_config),
    }
    files = [
        *(f"{source}/{PREDICTIONS_FILE}" for source in SOURCES),
        ANALYSIS_FILE,
        TABLE_FILE,
        FIGURE_FILE,
        SWAPS_FILE,
    ]
    folder = Path(args.output_dir)
    run_folder.start_run(folder, settings, SETTINGS_FILE, files, args.overwrite)
    max_value = SyntheticConfig(**data_args.synthetic).max_value
    metrics = analyse(model, tokenizer, dataset, folder, max_value, args.batch_size, args.num_draws, args.seed)
    result = metrics | {"model": args.model, "dataset": data_args.dataset, "split": args.split, **settings}
    result |= {"algorithm": model.config.algorithm, "versions": versions()}
    run_folder.write_json(folder / ANALYSIS_FILE, result)
    run_folder.replace(folder / TABLE_FILE, format_page(result).encode())
    draw(result, folder / FIGURE_FILE)
    return result


if __name__ == "__main__":
    main()
