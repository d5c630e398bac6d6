"""How a model is scored on reasoning problems: what it writes is kept line by line, and every rate is read from that.

A run has a folder: `settings.json` (what the run is), `predictions.jsonl` (a line per example, appended batch by
batch) and, in the end, `summary.json`. A run that was interrupted goes on where it stopped.
"""

import hashlib
import json
import os
import random
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .configuration_hierbd3lm import HierBD3LMConfig
from .data.answers import (
    is_parsable,
    match_flexible,
    match_numeric,
    match_strict,
    reference_answer,
    wilson_interval,
)
from .data.collator import check_content, collate_questions, encode_example, over_long_segments
from .generation_hierbd3lm import HierBD3LMGenerationConfig, resolve_settings
from .modeling_hierbd3lm import HierBD3LMForBlockDiffusion

SETTINGS_FILE, PREDICTIONS_FILE, SUMMARY_FILE = "settings.json", "predictions.jsonl", "summary.json"
GIVEN_PLANS = ("reference",)
# `until` of tasks/gsm8k/gsm8k.yaml of lm-evaluation-harness: a generated text ends before the first of these
STOPS = re.compile("|".join(map(re.escape, ("Question:", "</s>", "<|im_end|>"))))
RATES = ("exact_match_strict", "exact_match_flexible", "exact_match_numeric", "plan_match", "unparsable", "finished")


@dataclass(frozen=True)
class Problem:
    """One example.

    Args:
        index: its row in the dataset.
        question, reference_answer, reference_plan: texts; the plan is None where there is none.
        question_ids, plan_ids: tokens of the prompt; the plan is None unless it is given.
        too_long: segments of the prompt that have more tokens than the model takes; such a problem is not answered.
    """

    index: int
    question: str
    reference_answer: str
    reference_plan: str | None
    question_ids: list[int]
    plan_ids: list[int] | None
    too_long: list[str]


def predict(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    settings: HierBD3LMGenerationConfig,
    folder: str | os.PathLike,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Answers every problem of a dataset; those that `folder` has answers of are not answered again.

    Args:
        dataset: has `question` and `execution`, which ends with `#### <answer>`, and may have `plan`.
        settings: with `stage="execution"` the model is given the reference plans. The seed is that of the run, from
            which each batch gets one of its own.
        folder: see [`start_run`].
        batch_size: problems that are answered together, grouped by length.

    Returns:
        the lines of `predictions.jsonl` (see [`score`]), in the order of the dataset.

    Raises:
        ValueError: for a dataset without examples, and as in [`read_problems`].
    """
    problems = read_problems(dataset, tokenizer, model.config, plans_are_given=settings.stage == "execution")
    path = Path(folder, PREDICTIONS_FILE)
    predictions = read_predictions(path)
    batches = make_batches(problems, batch_size)
    seeds = random.Random(settings.seed)
    with tqdm(total=len(problems), desc="Evaluating", unit="example") as progress, path.open("ab") as lines:
        for batch in batches:
            # A batch is answered as a whole or not at all, so that a resumed run draws what an uninterrupted one does.
            batch_settings = resolve_settings(settings, {"seed": seeds.getrandbits(62)})
            if any(problem.index not in predictions for problem in batch):
                answers = answer_batch(model, tokenizer, batch, batch_settings)
                predictions |= {answer["index"]: answer for answer in answers}
                lines.write(_to_lines(answers))
                lines.flush()
            progress.update(len(batch))
        unanswered = [score(problem, "", "") for problem in problems if problem.too_long]
        progress.update(len(unanswered))
    predictions |= {prediction["index"]: prediction for prediction in unanswered}
    ordered = [predictions[problem.index] for problem in problems]
    _replace(path, _to_lines(ordered))
    return ordered


def read_problems(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: HierBD3LMConfig, plans_are_given: bool
) -> list[Problem]:
    """Reads and encodes the problems of a dataset.

    Raises:
        ValueError: for a dataset without examples or without a column that is needed, and for a row without an answer,
            without the plan that is to be given, or with a special token in its prompt; the message names the row.
    """
    needed = ("question", "execution", "plan") if plans_are_given else ("question", "execution")
    missing = [column for column in needed if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`dataset` must have the columns {', '.join(needed)}, but lacks {', '.join(missing)} among "
            f"{', '.join(dataset.column_names)}"
        )
    if len(dataset) == 0:
        raise ValueError("`dataset` must have at least one example, but has none")
    problems = []
    for index, row in enumerate(dataset):
        try:
            problems.append(_read_problem(index, row, tokenizer, config, plans_are_given))
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
    return problems


def _read_problem(
    index: int, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, config: HierBD3LMConfig, plan_is_given: bool
) -> Problem:
    plan = row.get("plan") or None
    if plan_is_given and plan is None:
        raise ValueError("`plan` must be a text where the reference plan is given, but the example has none")
    prompt = {"question": row["question"], "plan": plan if plan_is_given else None, "execution": ""}
    ids = encode_example(prompt, tokenizer)
    check_content(ids, config)
    return Problem(
        index=index,
        question=row["question"],
        reference_answer=reference_answer(row["execution"]),
        reference_plan=plan,
        question_ids=ids["question_ids"],
        plan_ids=ids["plan_ids"] if plan_is_given else None,
        too_long=over_long_segments(ids, config),
    )


def make_batches(problems: Iterable[Problem], batch_size: int) -> list[list[Problem]]:
    """Groups the problems that fit by the length of their prompts, longest first: memory runs out at once or never."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, but got {batch_size}")

    def prompt_length(problem: Problem) -> int:
        return len(problem.question_ids) + len(problem.plan_ids or ())

    fitting = sorted((problem for problem in problems if not problem.too_long), key=prompt_length, reverse=True)
    return [fitting[start : start + batch_size] for start in range(0, len(fitting), batch_size)]


def answer_batch(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    settings: HierBD3LMGenerationConfig,
) -> list[dict[str, Any]]:
    """Generates plan and execution of each problem, and scores them."""
    pad, start = model.config.pad_token_id, time.perf_counter()
    prompt = {name: ids.to(model.device) for name, ids in collate_prompts(problems, pad).items()}
    output = model.generate(**prompt, generation_config=settings)
    plans, executions, passes, rates, finished = (  # on the CPU from here on, so the clock has waited for the device
        getattr(output, name).tolist()
        for name in ("plan", "execution", "num_forward_passes", "tokens_per_forward", "finished")
    )
    seconds = (time.perf_counter() - start) / len(problems)
    predictions = []
    for row, problem in enumerate(problems):
        plan_ids, execution_ids = ([token for token in ids[row] if token != pad] for ids in (plans, executions))
        costs = {
            "finished": finished[row],
            "num_forward_passes": passes[row],
            "num_tokens": round(rates[row] * passes[row]),
            "num_plan_tokens": len(plan_ids),
            "num_execution_tokens": len(execution_ids),
            "tokens_per_forward": rates[row],
            "seconds": seconds,
        }
        # Special tokens of the backbone's stay in the texts: the answer may have to be cut at one of them.
        texts = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (plan_ids, execution_ids))
        predictions.append(score(problem, *texts, **costs))
    return predictions


def collate_prompts(problems: list[Problem], pad_token_id: int) -> dict[str, torch.Tensor]:
    """What `generate` takes: left-padded questions, their mask and right-padded plans if these are given.

    Returns:
        `input_ids`, `attention_mask` of shape `(batch, question_length)`, `plan_ids` of `(batch, plan_length)`.
    """
    prompt = collate_questions([problem.question_ids for problem in problems], pad_token_id)
    if problems[0].plan_ids is not None:
        plans = [torch.tensor(problem.plan_ids, dtype=torch.long) for problem in problems]
        prompt["plan_ids"] = pad_sequence(plans, batch_first=True, padding_value=pad_token_id)
    return prompt


def score(
    problem: Problem,
    plan: str,
    execution: str,
    finished: bool = False,
    num_forward_passes: int = 0,
    num_tokens: int = 0,
    num_plan_tokens: int = 0,
    num_execution_tokens: int = 0,
    tokens_per_forward: float | None = None,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """A line of `predictions.jsonl`; without an answer, plan and execution are empty and every match fails.

    Args:
        finished, num_forward_passes, tokens_per_forward: see `HierBD3LMGenerationOutput`.
        num_tokens: denoised tokens, the `<|end|>` of each segment counted.
        num_plan_tokens, num_execution_tokens: content of each segment, denoised or given.
        seconds: the example's share of its batch's time.
    """
    answer, target = cut_at_stops(execution), problem.reference_answer
    has_plan_to_match = problem.reference_plan is not None and problem.plan_ids is None
    return {
        "index": problem.index,
        "question": problem.question,
        "plan": plan,
        "execution": execution,
        "reference_answer": target,
        "reference_plan": problem.reference_plan,
        "exact_match_strict": match_strict(answer, target),
        "exact_match_flexible": match_flexible(answer, target),
        "exact_match_numeric": match_numeric(answer, target),
        "unparsable": not is_parsable(answer),
        "plan_match": same_text(plan, problem.reference_plan) if has_plan_to_match else None,
        "too_long": problem.too_long,
        "finished": finished,
        "num_forward_passes": num_forward_passes,
        "num_tokens": num_tokens,
        "num_plan_tokens": num_plan_tokens,
        "num_execution_tokens": num_execution_tokens,
        "tokens_per_forward": tokens_per_forward,
        "seconds": seconds,
    }


def cut_at_stops(text: str) -> str:
    """The text before the first of `STOPS`."""
    return STOPS.split(text, maxsplit=1)[0]


def same_text(text: str, other: str) -> bool:
    """Whether two texts differ in white space at the most."""
    return text.split() == other.split()


# What the lines say together


def summarize(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rates and speed over all predictions.

    Returns:
        - `n`, and of these `num_too_long` with an over-long question and `num_plan_too_long` with an over-long given
          plan: neither is answered, both stay in `n`.
        - each of `RATES` as a fraction, and its 95 % interval as `..._interval`. All are of `n`, but `plan_match`,
          which is of the `num_reference_plans` examples with a plan to match; it is left out where there are none.
        - `num_forward_passes` (total), `num_forward_passes_mean` (of the answered), `num_tokens`, `seconds` (totals),
          `tokens_per_forward`, `tokens_per_second` (ratios of totals); None where nothing was answered.
    """
    summary: dict[str, Any] = {
        "n": len(predictions),
        "num_too_long": sum("question" in prediction["too_long"] for prediction in predictions),
        "num_plan_too_long": sum("plan" in prediction["too_long"] for prediction in predictions),
    }
    for name in RATES:
        values = [prediction[name] for prediction in predictions if prediction[name] is not None]
        if name == "plan_match":
            summary["num_reference_plans"] = len(values)
        if values:
            summary[name] = sum(values) / len(values)
            summary[f"{name}_interval"] = list(wilson_interval(sum(values), len(values)))
    totals = {
        name: sum(prediction[name] for prediction in predictions)
        for name in ("num_forward_passes", "num_tokens", "seconds")
    }
    num_answered = sum(not prediction["too_long"] for prediction in predictions)
    return (
        summary
        | totals
        | {
            "num_forward_passes_mean": _ratio(totals["num_forward_passes"], num_answered),
            "tokens_per_forward": _ratio(totals["num_tokens"], totals["num_forward_passes"]),
            "tokens_per_second": _ratio(totals["num_tokens"], totals["seconds"]),
        }
    )


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as a table for people."""
    lines = []
    for name in RATES:
        if name in summary:
            low, high = summary[f"{name}_interval"]
            value = f"{100 * summary[name]:6.2f} %  [{100 * low:.2f}, {100 * high:.2f}]"
            lines.append((name.replace("_", " "), value))
    counts = {"examples": "n", "too long question": "num_too_long", "too long plan": "num_plan_too_long"}
    lines += [(label, f"{summary[name]:6,}") for label, name in counts.items()]
    speeds = {"forward passes / example": "num_forward_passes_mean"}
    speeds |= {f"tokens / {unit}": f"tokens_per_{unit}" for unit in ("forward", "second")}
    lines += [(label, f"{summary[name]:9,.2f}") for label, name in speeds.items() if summary[name] is not None]
    return "\n".join(f"{label:<26}{value}" for label, value in lines)


def format_prediction(prediction: dict[str, Any]) -> str:
    """A problem with what the model wrote, for people."""
    verdict = "right" if prediction["exact_match_numeric"] else "wrong"
    return "\n".join(
        [
            f"--- Example {prediction['index']}: {verdict}, the answer is {prediction['reference_answer']}",
            f"Question: {prediction['question']}",
            f"Plan:\n{prediction['plan']}",
            f"Execution:\n{prediction['execution']}\n",
        ]
    )


# The run's folder


def start_run(folder: str | os.PathLike, settings: dict[str, Any], overwrite: bool = False) -> None:
    """Makes the folder of a run, or makes sure that the run which it holds is this one.

    Args:
        settings: all that decides what is predicted, as JSON takes it; kept in `settings.json`.
        overwrite: whether a run that is there is thrown away.

    Raises:
        ValueError: if the folder holds another run.
    """
    folder = Path(folder)
    settings = json.loads(json.dumps(settings))  # as they will be read
    settings_path, predictions_path = folder / SETTINGS_FILE, folder / PREDICTIONS_FILE
    if not overwrite and (settings_path.is_file() or predictions_path.is_file()):
        there = json.loads(settings_path.read_text()) if settings_path.is_file() else {}
        different = [name for name in sorted(there | settings) if there.get(name) != settings.get(name)]
        if different:
            changes = "; ".join(f"{name}: {there.get(name)!r} there, {settings.get(name)!r} now" for name in different)
            raise ValueError(
                f"`output_dir` must be new or hold this run, but got {folder} with another one ({changes}): give "
                f"`--overwrite` to throw that away, or another folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SUMMARY_FILE, PREDICTIONS_FILE):
        (folder / name).unlink(missing_ok=True)
    write_json(settings_path, settings)


def read_predictions(path: Path) -> dict[int, dict[str, Any]]:
    """The predictions of a run by index, the last where there are several; cuts a torn last line off the file."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        _replace(path, whole)
    predictions = map(json.loads, whole.splitlines())
    return {prediction["index"]: prediction for prediction in predictions}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a file that is never half there."""
    _replace(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _to_lines(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    os.replace(new, path)


def checksum_of_weights(model: torch.nn.Module) -> int:
    """Sum of all bytes of the weights: another checkpoint in the same folder is another run."""
    tensors = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in model.state_dict().values()]
    return sum(int(tensor.sum(dtype=torch.int64)) for tensor in tensors)


def hash_of_data(dataset: Dataset) -> str:
    """Hash of all that a dataset's columns hold: another file in the same place is another run."""
    rows = json.dumps(dataset.to_dict(), default=str, sort_keys=True)
    return hashlib.sha256(rows.encode()).hexdigest()[:16]
