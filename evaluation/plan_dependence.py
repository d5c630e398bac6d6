"""Measurement of how much the execution depends on the plan.

The same problems are executed under plans of several sources. The output folder holds a subfolder per source (see
runner.py), `swaps.jsonl` with a line per changed plan, `analysis.json`, `analysis.md` and `analysis.png`.
"""

import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data import run_folder
from ..data.gsm8k.answers import cut_at_stops, match_strict
from ..data.loading import prepare_dataset
from ..data.steps import split_steps
from ..data.synthetic.checks import FOLLOWED, check_execution
from ..data.synthetic.config import SyntheticConfig
from ..data.synthetic.plan_swaps import ChangedPlan, change_plan, exchange_plans
from ..data.synthetic.vocabulary import NAMES
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..settings_hierbd3lm import resolve_settings, settings_of
from .arguments import AnalysisArguments
from .checkpoints import describe_model, describe_run, load_examples, load_model
from .likelihood import measure_likelihood
from .plan_dependence_report import (
    CHANGED,
    EMPTY,
    FIGURE_FILE,
    ORACLE,
    OTHER,
    OWN,
    SOURCES,
    SWAP_OUTCOMES,
    draw,
    figure_class,
    format_page,
)
from .runner import PREDICTIONS_FILE, SETTINGS_FILE, predict
from .scoring import rate

logger = logging.get_logger(__name__)

CHECKED = (OWN, ORACLE, CHANGED)  # another problem's plan names people that do not occur in this one
MEASURED = (ORACLE, OTHER, EMPTY)  # plans under which the likelihood of the reference execution is measured
ANALYSIS_FILE, TABLE_FILE, SWAPS_FILE = "analysis.json", "analysis.md", "swaps.jsonl"


def analyse_checkpoint(args: AnalysisArguments) -> dict[str, Any]:
    """Analyse a checkpoint, or resume the analysis; returns the content of `analysis.json`."""
    figure_class()  # fails before the analysis if matplotlib is missing
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.attn_implementation)
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
    problems = SyntheticConfig(**data_args.synthetic)
    metrics = analyse(model, tokenizer, dataset, folder, problems, args.batch_size, args.num_draws, args.seed)
    result = metrics | {"model": args.model, "dataset": data_args.dataset, "split": args.split, **settings}
    result |= describe_model(model)
    run_folder.write_json(folder / ANALYSIS_FILE, result)
    run_folder.replace(folder / TABLE_FILE, format_page(result).encode())
    draw(result, folder / FIGURE_FILE)
    return result


def analyse(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    folder: str | os.PathLike,
    problems: SyntheticConfig | None = None,
    batch_size: int = 32,
    num_draws: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Execute every problem under the plans of each source, and measure how the executions depend on them.

    Under every order a given plan is clean context: a flat model continues it, and where execution blocks are aligned
    with plan blocks, an execution block sees the plan blocks up to its own, as in training.

    Args:
        dataset: dataset with the columns `question`, `plan` and `execution`, which ends with `#### <answer>`.
        folder: output folder. Executions that it already holds are not generated again.
        problems: maximum value and names in changed plans; the defaults of `SyntheticConfig` if omitted.
        num_draws: see [`~evaluation.likelihood.measure_likelihood`].
        seed: random seed of exchanged and changed plans, generation and noise.

    Returns:
        metrics of each source, as `<source>_<name>`:
        - `exact_match`: strict exact match with the problem's answer, or for `changed` with the answer of the changed
          plan; `n`: number of problems; `num_too_long`: over-long problems among them, which are not answered.
        - for `own`, `oracle` and `changed`: `agreement`, rate of the executions that carry out all steps of their
          plan, no others, and give the value of the last step; `step_agreement`, mean fraction of the steps that are
          carried out (additional steps count as not carried out); `verdicts`, counts of `VERDICTS`.
        - for `oracle`, `other` and `empty`: `execution_nll` of the reference execution in nats per token, and
          `execution_nll_n`, its number of examples.

        and the rates of `SWAP_OUTCOMES` over the `swap_n` problems with a changed plan that are answered correctly
        under the reference plan (none of these rates if `swap_n` is 0); `num_without_change` problems have no changed
        plan. Each rate has a 95 % interval, `..._interval`. Agreement and changed plans are only measured on data with
        the steps of the synthetic problems.

    Raises:
        ValueError: if the dataset has no plans, or its plans cannot be exchanged.
    """
    plans = read_reference_plans(dataset)
    has_steps = can_check(dataset)
    if not has_steps:
        logger.warning(
            "The plans do not have the format of the synthetic problems: they are neither changed nor checked"
        )
    changes = draw_changes(dataset, problems or SyntheticConfig(), seed) if has_steps else []
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
    """Return the reference plan of each problem.

    Raises:
        ValueError: if the dataset or a row has no plan.
    """
    if "plan" not in dataset.column_names:
        raise ValueError(f"`dataset` must have the column plan, but has {', '.join(dataset.column_names)}")
    plans = dataset["plan"][:]
    for row, plan in enumerate(plans):
        if not plan:
            raise ValueError(f"row {row}: `plan` must have at least one step, but got {plan!r}")
    return plans


def can_check(dataset: Dataset) -> bool:
    """Return whether every reference execution agrees with its plan, as in the format of the synthetic problems."""
    rows = zip(dataset["question"], dataset["plan"], dataset["execution"], strict=True)
    return all(agrees(check_execution(*row), row[2]) for row in rows)


def agrees(verdicts: Sequence[str], execution: str) -> bool:
    """Return whether an execution carries out exactly the steps of a plan and answers with the value of the last one.

    Args:
        verdicts: result of [`check_execution`].
    """
    return set(verdicts) == {FOLLOWED} and match_strict(execution, split_steps(execution)[-1].split()[-1])


def draw_changes(dataset: Dataset, problems: SyntheticConfig, seed: int) -> list[ChangedPlan | None]:
    """Draw a changed plan for each problem; see [`change_plan`]."""
    rows = enumerate(zip(dataset["question"], dataset["plan"], strict=True))
    names = NAMES[: problems.num_names]
    return [change_plan(random.Random(f"{seed} {row}"), *texts, problems.max_value, names) for row, texts in rows]


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
    """Generate the predictions of each source (see [`predict`]); `changed` covers the problems with a changed plan."""
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
    """Add the plans to execute to a dataset, in the format of [`predict`]."""
    return dataset.add_column("given_plans", [[plan] for plan in plans])


def with_plans(dataset: Dataset, plans: Sequence[str]) -> Dataset:
    """Replace the plans of a dataset."""
    return dataset.remove_columns("plan").add_column("plan", list(plans))


def measure_source(
    source: str, predictions: Sequence[dict[str, Any]], is_right: Sequence[bool] | None, is_checked: bool
) -> dict[str, Any]:
    """Compute the metrics of the executions under the plans of one source; see [`analyse`].

    Args:
        is_right: whether each execution has the expected answer; defaults to strict exact match.
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
    """Build the lines of `swaps.jsonl`, one for each problem with a changed plan.

    Returns:
        dicts with the fields of [`ChangedPlan`], the problem's `index`, `question`, `reference_plan` and
        `reference_answer`, the `execution` of the changed plan, `is_right_under_reference` (exact match under the
        reference plan), and the outcomes of `SWAP_OUTCOMES`.
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
                "follows_step": follows_change(change, verdicts),
                "reaches_answer": match_strict(execution, str(change.answer)),
                "ignores_change": prediction["exact_match_strict"],
            }
        )
    return swaps


def follows_change(change: ChangedPlan, verdicts: Sequence[str]) -> bool:
    """Return whether an execution carries out the changed steps, and no step where the last one was removed.

    Args:
        verdicts: result of [`check_execution`] for the changed plan.
    """
    num_steps = len(split_steps(change.plan))
    return all(verdicts[step] == FOLLOWED if step < num_steps else len(verdicts) == num_steps for step in change.steps)


def measure_swaps(swaps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compute the rates of `SWAP_OUTCOMES` (see [`analyse`]), also for each kind of change as `swap_kinds`."""
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
