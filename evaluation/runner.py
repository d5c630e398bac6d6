"""Generate and score answers to reasoning problems, and summarize them.

The folder of a run holds `settings.json` (all settings that results depend on), `predictions.jsonl` (a line per
example and sample, appended batch by batch) and, after the last batch, `summary.json`. An interrupted run resumes
from the last complete batch.
"""

import json
import os
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..configuration_hierbd3lm import HierBD3LMConfig
from ..data import run_folder
from ..data.collator import check_content, collate_questions, encode_example, over_long_segments
from ..data.gsm8k.answers import (
    count_votes,
    cut_at_stops,
    is_parsable,
    match_flexible,
    match_numeric,
    match_strict,
    parse_number,
    pass_at_k,
    reference_answer,
    wilson_interval,
)
from ..data.splits import DataArguments
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..settings_hierbd3lm import HierBD3LMGenerationConfig, resolve_settings
from ..training.lora import is_adapter, load_adapter, load_tokenizer
from .checkpoints import CheckpointArguments

SETTINGS_FILE, PREDICTIONS_FILE, SUMMARY_FILE = "settings.json", "predictions.jsonl", "summary.json"
REFERENCE_PLANS = "reference"
RATES = ("exact_match_strict", "exact_match_flexible", "exact_match_numeric", "plan_match", "unparsable", "finished")

PromptType = TypeVar("PromptType", bound="Prompt")


@dataclass(frozen=True)
class Prompt:
    """Encoded input of the model.

    Args:
        index: index of the source of the prompt, such as a row of a dataset.
        question_ids, plan_ids: token ids. The plan is None if the model generates it.
        too_long: names of the segments that exceed the model's maximum length. Such a prompt is not answered.
    """

    index: int
    question_ids: list[int]
    plan_ids: list[int] | None
    too_long: list[str]


@dataclass(frozen=True)
class Problem(Prompt):
    """Prompt with the reference for one answer.

    Args:
        sample: index of the answer among the samples of the same example.
        question, reference_answer, reference_plan: texts. The plan is None if the example has none.
    """

    sample: int
    question: str
    reference_answer: str
    reference_plan: str | None

    @property
    def key(self) -> tuple[int, int]:
        """Key of the problem's line in `predictions.jsonl`."""
        return self.index, self.sample


@dataclass(frozen=True)
class Written:
    """Output of the model for one prompt: content tokens of both segments; see also `HierBD3LMGenerationOutput`."""

    plan_ids: list[int]
    execution_ids: list[int]
    finished: bool
    num_forward_passes: int
    tokens_per_forward: float


def load_model(path: str, device: str) -> tuple[HierBD3LMForBlockDiffusion, PreTrainedTokenizerBase]:
    """Load a checkpoint, or an adapter merged into its base, in evaluation mode, with its tokenizer."""
    if is_adapter(path):
        return load_adapter(path, device)
    return HierBD3LMForBlockDiffusion.from_pretrained(path).to(device).eval(), load_tokenizer(path)


def predict(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    settings: HierBD3LMGenerationConfig,
    folder: str | os.PathLike,
    batch_size: int = 32,
    num_samples: int = 1,
) -> list[dict[str, Any]]:
    """Generate and score answers to all problems of a dataset. Answers that `folder` already holds are kept.

    Args:
        dataset: dataset with the columns `question`, `execution`, which ends with `#### <answer>`, and optionally
            `plan`.
        settings: generation settings. With `stage="execution"`, plans are taken from [`with_given_plans`]. The seed
            of each batch derives from their seed.
        folder: folder of the run; see [`start_run`].
        batch_size: batch size. Problems are grouped by length.
        num_samples: number of answers to each problem, each with its own plan unless plans are given.

    Returns:
        the lines of `predictions.jsonl` (see [`score_answer`]), in the order of the dataset, then of the samples.

    Raises:
        ValueError: for an empty dataset, for several samples at temperature 0, and as in [`read_problems`].
    """
    check_samples(num_samples, settings)
    problems = read_problems(dataset, tokenizer, model.config, settings.stage == "execution", num_samples)
    path = Path(folder, PREDICTIONS_FILE)
    # the first sample of all problems, then the second, ...
    batches = chain.from_iterable(
        make_batches(problems[sample::num_samples], batch_size) for sample in range(num_samples)
    )
    seeds = random.Random(settings.seed)
    with tqdm(total=len(problems), desc="Evaluating", unit="example") as progress, run_folder.Log(path) as log:
        predictions = {_key(prediction): prediction for prediction in log.records}
        for batch in batches:
            # A batch is always generated as a whole, so that a resumed run draws the same random numbers.
            batch_settings = resolve_settings(settings, {"seed": seeds.getrandbits(62)})
            if any(problem.key not in predictions for problem in batch):
                answers = answer_batch(model, tokenizer, batch, batch_settings)
                predictions |= {_key(answer): answer for answer in answers}
                log.append(*answers)
            progress.update(len(batch))
        unanswered = [score_answer(problem, "", "") for problem in problems if problem.too_long]
        progress.update(len(unanswered))
    predictions |= {_key(prediction): prediction for prediction in unanswered}
    ordered = [predictions[problem.key] for problem in problems]
    run_folder.write_lines(path, ordered)
    return ordered


def check_samples(num_samples: int, settings: HierBD3LMGenerationConfig) -> None:
    """Raise a ValueError for several samples at temperature 0."""
    if num_samples > 1 and settings.temperature == 0:
        raise ValueError(
            f"`temperature` must be > 0 for num_samples={num_samples}, but got {settings.temperature}: all greedy "
            f"samples are the same"
        )


def with_given_plans(dataset: Dataset, source: str, num_samples: int = 1) -> Dataset:
    """Add the plans to generate executions from as a column `given_plans`.

    Args:
        dataset: dataset with the column `question`, and `plan` if that is the source.
        source: `reference` for the column `plan`, or a JSON lines file with `question` and `plan`, such as the
            `predictions.jsonl` of another run.
        num_samples: number of samples. A file may have one plan per question, which all samples share, or one for
            each sample.

    Raises:
        ValueError: for an example without a plan, or with a wrong number of plans; the message has the row.
    """
    if source == REFERENCE_PLANS:
        if "plan" not in dataset.column_names:
            raise ValueError(f"`dataset` must have the column plan, but has {', '.join(dataset.column_names)}")
        plans = [[plan] if plan else [] for plan in dataset["plan"]]
    else:
        plans_of: dict[str, list[str]] = {}
        for question, plan in read_texts(Path(source), "question", "plan"):
            plans_of.setdefault(question, []).append(plan)
        plans = [plans_of.get(question, []) for question in dataset["question"]]
    for row, given in enumerate(plans):
        if len(given) not in (1, num_samples):
            accepted = "1" if num_samples == 1 else f"1 or num_samples={num_samples}"
            raise ValueError(
                f"row {row}: `given_plan` must have {accepted} plan(s) per question, but {source!r} has {len(given)}"
            )
    return dataset.add_column("given_plans", plans)


def read_texts(path: Path, *names: str) -> list[tuple[str, ...]]:
    """Read the texts with the given names from each line of a JSON lines file.

    Raises:
        ValueError: for a line that is not a JSON object with these texts; the message has the line number.
    """
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                fields = json.loads(line)
                texts = tuple(fields[name] for name in names)
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError(f"{names} must be texts, but got {texts}")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} must be JSON with `{'` and `'.join(names)}` as text, but got "
                    f"{line[:80]!r}"
                ) from error
            rows.append(texts)
    return rows


def read_problems(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: HierBD3LMConfig,
    plans_are_given: bool,
    num_samples: int = 1,
) -> list[Problem]:
    """Encode the problems of a dataset, `num_samples` times each.

    Args:
        dataset: dataset with the columns `question`, `execution` and, if plans are given, `given_plans` of
            [`with_given_plans`].

    Raises:
        ValueError: for an empty dataset or a missing column, and for a row without an answer or with a special token
            in its prompt; the message has the row.
    """
    needed = ("question", "execution", "given_plans") if plans_are_given else ("question", "execution")
    missing = [column for column in needed if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`dataset` must have the columns {', '.join(needed)}, but got {', '.join(dataset.column_names)} without "
            f"{', '.join(missing)}"
        )
    if len(dataset) == 0:
        raise ValueError("`dataset` must have at least one example, but has none")
    problems = []
    for index, row in enumerate(dataset):
        plans = row["given_plans"] if plans_are_given else [None]
        try:
            prompts = [encode_prompt(index, row["question"], plan, tokenizer, config) for plan in plans]
            texts = {"question": row["question"], "reference_answer": reference_answer(row["execution"])}
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
        texts["reference_plan"] = row.get("plan") or None
        for sample in range(num_samples):
            prompt = prompts[sample % len(prompts)]  # one prompt for all samples, or one for each
            problems.append(Problem(**vars(prompt), **texts, sample=sample))
    return problems


def encode_prompt(
    index: int, question: str, plan: str | None, tokenizer: PreTrainedTokenizerBase, config: HierBD3LMConfig
) -> Prompt:
    """Encode a question and its plan, which is None if the model generates it.

    Raises:
        ValueError: for a special token in one of the texts.
    """
    ids = encode_example({"question": question, "plan": plan, "execution": ""}, tokenizer)
    check_content(ids, config)
    plan_ids = None if plan is None else ids["plan_ids"]
    return Prompt(index, ids["question_ids"], plan_ids, over_long_segments(ids, config))


def make_batches(prompts: Iterable[PromptType], batch_size: int) -> list[list[PromptType]]:
    """Group the prompts that are not too long by length, longest first, so that an OOM occurs in the first batch."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, but got {batch_size}")

    def length(prompt: Prompt) -> int:
        return len(prompt.question_ids) + len(prompt.plan_ids or ())

    fitting = sorted((prompt for prompt in prompts if not prompt.too_long), key=length, reverse=True)
    return [fitting[start : start + batch_size] for start in range(0, len(fitting), batch_size)]


def answer_batch(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    settings: HierBD3LMGenerationConfig,
) -> list[dict[str, Any]]:
    """Generate plan and execution of each problem, and score them."""
    start = time.perf_counter()
    batch = generate_batch(model, problems, settings)
    seconds = (time.perf_counter() - start) / len(problems)
    predictions = []
    for problem, written in zip(problems, batch, strict=True):
        costs = {
            "finished": written.finished,
            "num_forward_passes": written.num_forward_passes,
            "num_tokens": round(written.tokens_per_forward * written.num_forward_passes),
            "num_plan_tokens": len(written.plan_ids),
            "num_execution_tokens": len(written.execution_ids),
            "tokens_per_forward": written.tokens_per_forward,
            "seconds": seconds,
        }
        texts = (decode(ids, tokenizer) for ids in (written.plan_ids, written.execution_ids))
        predictions.append(score_answer(problem, *texts, **costs))
    return predictions


def generate_batch(
    model: HierBD3LMForBlockDiffusion, prompts: Sequence[Prompt], settings: HierBD3LMGenerationConfig
) -> list[Written]:
    """Generate the output of each prompt."""
    pad = model.config.pad_token_id
    prompt = {name: ids.to(model.device) for name, ids in collate_prompts(prompts, pad).items()}
    output = model.generate(**prompt, generation_config=settings)
    plans, executions, *others = (  # copied to the CPU, so that a caller's timer includes the work of the device
        getattr(output, name).tolist()
        for name in ("plan", "execution", "finished", "num_forward_passes", "tokens_per_forward")
    )
    plans, executions = ([[token for token in row if token != pad] for row in rows] for rows in (plans, executions))
    return [Written(*row) for row in zip(plans, executions, *others, strict=True)]


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode a segment. Special tokens of the backbone are kept, as an answer may have to be cut at one of them."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def collate_prompts(prompts: Sequence[Prompt], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Collate prompts for `generate`: left-padded questions, their mask, and right-padded plans if these are given.

    Returns:
        `input_ids`, `attention_mask` of shape `(batch, question_length)`, `plan_ids` of `(batch, plan_length)`.
    """
    batch = collate_questions([prompt.question_ids for prompt in prompts], pad_token_id)
    if prompts[0].plan_ids is not None:
        plans = [torch.tensor(prompt.plan_ids, dtype=torch.long) for prompt in prompts]
        batch["plan_ids"] = pad_sequence(plans, batch_first=True, padding_value=pad_token_id)
    return batch


def score_answer(
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
    """Score an answer, and return its line of `predictions.jsonl`. An empty answer fails every match.

    Args:
        finished, num_forward_passes, tokens_per_forward: see `HierBD3LMGenerationOutput`.
        num_tokens: number of denoised tokens, including the `<|end|>` of each segment.
        num_plan_tokens, num_execution_tokens: number of content tokens of each segment, denoised or given.
        seconds: generation time of the batch divided by its number of examples.
    """
    answer, target = cut_at_stops(execution), problem.reference_answer
    must_match_plan = problem.reference_plan is not None and problem.plan_ids is None
    return {
        "index": problem.index,
        "sample": problem.sample,
        "question": problem.question,
        "plan": plan,
        "execution": execution,
        "reference_answer": target,
        "reference_plan": problem.reference_plan,
        "exact_match_strict": match_strict(answer, target),
        "exact_match_flexible": match_flexible(answer, target),
        "exact_match_numeric": match_numeric(answer, target),
        "unparsable": not is_parsable(answer),
        "plan_match": same_text(plan, problem.reference_plan) if must_match_plan else None,
        "too_long": problem.too_long,
        "finished": finished,
        "num_forward_passes": num_forward_passes,
        "num_tokens": num_tokens,
        "num_plan_tokens": num_plan_tokens,
        "num_execution_tokens": num_execution_tokens,
        "tokens_per_forward": tokens_per_forward,
        "seconds": seconds,
    }


def same_text(text: str, other: str) -> bool:
    """Return True if two texts are equal up to white space."""
    return text.split() == other.split()


# Summary


def summarize(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compute rates and speed over all predictions.

    Returns:
        - `n`, the number of examples, and `num_samples`, the number of answers to each. `num_too_long` examples have a
          question that is too long, `num_plan_too_long` a given plan that is too long. They are not answered, but
          count in `n`.
        - each of `RATES` as a fraction, and its 95 % interval as `..._interval`. A rate is a mean over all `n`
          examples. With several samples, it averages the mean of each example, and the interval is conservative.
          `plan_match` is over the `num_reference_plans` examples with a plan to match, and left out if there are
          none.
        - with several samples, the metrics of [`summarize_samples`].
        - `num_forward_passes` (total), `num_forward_passes_mean` (NFE per answer), `num_tokens`, `seconds` (totals),
          `tokens_per_forward`, `tokens_per_second` (ratios of totals); ratios are None if nothing was answered.
    """
    examples = [list(samples) for _, samples in groupby(predictions, key=itemgetter("index"))]
    summary: dict[str, Any] = {
        "n": len(examples),
        "num_samples": len(examples[0]),
        "num_too_long": _count_too_long(examples, "question"),
        "num_plan_too_long": _count_too_long(examples, "plan"),
    }
    for name in RATES:
        values = [[sample[name] for sample in samples] for samples in examples if samples[0][name] is not None]
        if name == "plan_match":
            summary["num_reference_plans"] = len(values)
        if values:
            summary |= rate(name, [sum(rights) / len(rights) for rights in values])
    if summary["num_samples"] > 1:
        summary |= summarize_samples(examples)
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


def summarize_samples(examples: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Compute majority vote and pass@k over the samples of each example.

    Returns:
        - `majority_vote`: rate of examples in which the most frequent value equals the reference. A sample votes with
          the value of its strict answer; on a tie, the value of the earliest sample wins. Samples without a value do
          not vote (`num_unparsable_votes`), and an example without votes is wrong (`num_without_votes`).
          `num_tied_votes` examples have no single winner.
        - `pass_at_k` for k = 1 .. samples: unbiased estimate of the rate of examples for which at least one of k
          samples has the correct value.
        - the 95 % interval of each, as `..._interval`.
    """
    elections = [count_votes(cut_at_stops(sample["execution"]) for sample in samples) for samples in examples]
    targets = [parse_number(samples[0]["reference_answer"]) for samples in examples]
    num_samples = len(examples[0])
    summary = {
        "num_unparsable_votes": sum(sample["unparsable"] for samples in examples for sample in samples),
        "num_without_votes": sum(not votes for votes in elections),
        "num_tied_votes": sum(len(votes) > 1 and votes[0][1] == votes[1][1] for votes in elections),
    }
    winners = [votes[0][0] if votes else None for votes in elections]
    summary |= rate(
        "majority_vote",
        [winner is not None and winner == target for winner, target in zip(winners, targets, strict=True)],
    )
    num_right = [sum(sample["exact_match_numeric"] for sample in samples) for samples in examples]
    for k in range(1, num_samples + 1):
        summary |= rate(f"pass_at_{k}", [pass_at_k(num_samples, count, k) for count in num_right])
    return summary


def rate(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Compute the mean of values in [0, 1] as `name`, and its 95 % interval as `<name>_interval`."""
    total = sum(values)
    return {name: total / len(values), f"{name}_interval": list(wilson_interval(total, len(values)))}


def _count_too_long(examples: Sequence[Sequence[dict[str, Any]]], segment: str) -> int:
    return sum(any(segment in sample["too_long"] for sample in samples) for samples in examples)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def format_summary(summary: dict[str, Any]) -> str:
    """Format the summary as a table."""
    lines = []
    num_samples = summary["num_samples"]
    powers = [k for k in (2**i for i in range(num_samples.bit_length())) if k <= num_samples]
    samples = ["majority_vote", *(f"pass_at_{k}" for k in sorted({*powers, num_samples}))]
    for name in [*RATES, *samples]:
        if name in summary:
            low, high = summary[f"{name}_interval"]
            value = f"{100 * summary[name]:6.2f} %  [{100 * low:.2f}, {100 * high:.2f}]"
            lines.append((name.replace("_", " "), value))
    counts = {"examples": "n", "samples / example": "num_samples"} if num_samples > 1 else {"examples": "n"}
    counts |= {"too long question": "num_too_long", "too long plan": "num_plan_too_long"}
    lines += [(label, f"{summary[name]:6,}") for label, name in counts.items()]
    speeds = {"forward passes / answer": "num_forward_passes_mean"}
    speeds |= {f"tokens / {unit}": f"tokens_per_{unit}" for unit in ("forward", "second")}
    lines += [(label, f"{summary[name]:9,.2f}") for label, name in speeds.items() if summary[name] is not None]
    return "\n".join(f"{label:<26}{value}" for label, value in lines)


def format_prediction(prediction: dict[str, Any]) -> str:
    """Format a problem with its generated plan and execution."""
    verdict = "right" if prediction["exact_match_numeric"] else "wrong"
    sample = f", sample {prediction['sample']}" if prediction["sample"] else ""
    return "\n".join(
        [
            f"--- Example {prediction['index']}{sample}: {verdict}, the answer is {prediction['reference_answer']}",
            f"Question: {prediction['question']}",
            f"Plan:\n{prediction['plan']}",
            f"Execution:\n{prediction['execution']}\n",
        ]
    )


# Run folder


def start_run(folder: str | os.PathLike, settings: dict[str, Any], overwrite: bool = False) -> None:
    """Create the folder of a run, or check that an existing folder holds a run with the same `settings`.

    Raises:
        ValueError: if the folder holds another run.
    """
    run_folder.start_run(Path(folder), settings, SETTINGS_FILE, (PREDICTIONS_FILE, SUMMARY_FILE), overwrite)


def _key(prediction: dict[str, Any]) -> tuple[int, int]:
    return prediction["index"], prediction["sample"]


def checksum_of_weights(model: torch.nn.Module) -> int:
    """Return the sum of all bytes of the weights, which distinguishes runs of different checkpoints."""
    tensors = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in model.state_dict().values()]
    return sum(int(tensor.sum(dtype=torch.int64)) for tensor in tensors)


def describe_run(
    args: CheckpointArguments, data_args: DataArguments, dataset: Dataset, model: HierBD3LMForBlockDiffusion
) -> dict[str, Any]:
    """Return the settings that identify a run, except those of a single command."""
    return {
        "data": asdict(data_args),
        "split": args.split,
        "num_examples": len(dataset),
        "hash_of_data": run_folder.hash_of(dataset.to_dict()),
        "checksum_of_weights": checksum_of_weights(model),
        "batch_size": args.batch_size,
        "device": str(model.device),
    }
