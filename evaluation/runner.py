"""How a model is scored on reasoning problems: what it writes is kept line by line, and every rate is read from that.

A run has a folder: `settings.json` (what the run is), `predictions.jsonl` (a line per example and sample, appended
batch by batch) and, in the end, `summary.json`. A run that was interrupted goes on where it stopped.
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
    """What the model is given.

    Args:
        index: its place among the prompts' sources, such as a row of a dataset.
        question_ids, plan_ids: its tokens; the plan is None unless it is given.
        too_long: segments that have more tokens than the model takes; such a prompt is not answered.
    """

    index: int
    question_ids: list[int]
    plan_ids: list[int] | None
    too_long: list[str]


@dataclass(frozen=True)
class Problem(Prompt):
    """One example that is answered once.

    Args:
        sample: number of the answer among those to the same example.
        question, reference_answer, reference_plan: texts; the plan is None where there is none.
    """

    sample: int
    question: str
    reference_answer: str
    reference_plan: str | None

    @property
    def key(self) -> tuple[int, int]:
        """What its line of `predictions.jsonl` is found by."""
        return self.index, self.sample


@dataclass(frozen=True)
class Written:
    """What the model wrote for one prompt: content tokens of both segments; for the others see its output's class."""

    plan_ids: list[int]
    execution_ids: list[int]
    finished: bool
    num_forward_passes: int
    tokens_per_forward: float


def load_model(path: str, device: str) -> tuple[HierBD3LMForBlockDiffusion, PreTrainedTokenizerBase]:
    """A checkpoint, or an adapter merged into its base, on its device, with its tokenizer."""
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
    """Answers every problem of a dataset; those that `folder` has answers of are not answered again.

    Args:
        dataset: has `question` and `execution`, which ends with `#### <answer>`, and may have `plan`.
        settings: with `stage="execution"` the model is given the plans of [`with_given_plans`]. The seed is that of
            the run, from which each batch gets one of its own.
        folder: see [`start_run`].
        batch_size: problems that are answered together, grouped by length.
        num_samples: answers to each problem, with a plan of its own each unless it is given.

    Returns:
        the lines of `predictions.jsonl` (see [`score`]), in the order of the dataset, the samples of a problem
        together.

    Raises:
        ValueError: for a dataset without examples, for several samples at temperature 0, and as in
            [`read_problems`].
    """
    check_samples(num_samples, settings)
    problems = read_problems(dataset, tokenizer, model.config, settings.stage == "execution", num_samples)
    path = Path(folder, PREDICTIONS_FILE)
    # All problems once, then all of them again.
    batches = chain.from_iterable(
        make_batches(problems[sample::num_samples], batch_size) for sample in range(num_samples)
    )
    seeds = random.Random(settings.seed)
    with tqdm(total=len(problems), desc="Evaluating", unit="example") as progress, run_folder.Log(path) as log:
        predictions = {_key(prediction): prediction for prediction in log.records}
        for batch in batches:
            # A batch is answered as a whole or not at all, so that a resumed run draws what an uninterrupted one does.
            batch_settings = resolve_settings(settings, {"seed": seeds.getrandbits(62)})
            if any(problem.key not in predictions for problem in batch):
                answers = answer_batch(model, tokenizer, batch, batch_settings)
                predictions |= {_key(answer): answer for answer in answers}
                log.append(*answers)
            progress.update(len(batch))
        unanswered = [score(problem, "", "") for problem in problems if problem.too_long]
        progress.update(len(unanswered))
    predictions |= {_key(prediction): prediction for prediction in unanswered}
    ordered = [predictions[problem.key] for problem in problems]
    run_folder.write_lines(path, ordered)
    return ordered


def check_samples(num_samples: int, settings: HierBD3LMGenerationConfig) -> None:
    """Raises a ValueError for several samples that would all be the same."""
    if num_samples > 1 and settings.temperature == 0:
        raise ValueError(
            f"`temperature` must be > 0 for num_samples={num_samples}, but got {settings.temperature}: greedy samples "
            f"are all the same"
        )


def with_given_plans(dataset: Dataset, source: str, num_samples: int = 1) -> Dataset:
    """The dataset with the plans that its executions are to be generated from, in a new column `given_plans`.

    Args:
        dataset: has `question`, and `plan` where that is the source.
        source: `reference` for each example's own `plan`, or a JSON lines file with `question` and `plan`, such as
            the `predictions.jsonl` of another run.
        num_samples: a file may have one plan of a question, which all samples share, or so many, one for each.

    Raises:
        ValueError: for an example whose plan is missing or of which the file has another number of plans; the message
            names the row.
    """
    if source == REFERENCE_PLANS:
        if "plan" not in dataset.column_names:
            raise ValueError(f"`dataset` must have the column plan, but has {', '.join(dataset.column_names)}")
        plans = [[plan] if plan else [] for plan in dataset["plan"]]
    else:
        plans_of = read_plans(Path(source))
        plans = [plans_of.get(question, []) for question in dataset["question"]]
    for row, given in enumerate(plans):
        if len(given) not in (1, num_samples):
            accepted = "1" if num_samples == 1 else f"1 or num_samples={num_samples}"
            raise ValueError(
                f"row {row}: `given_plan` must hold {accepted} of its plans, but {source!r} has {len(given)}"
            )
    return dataset.add_column("given_plans", plans)


def read_plans(path: Path) -> dict[str, list[str]]:
    """The plans of each question, in the order of a JSON lines file.

    Raises:
        ValueError: for a line that is no JSON object with the texts `question` and `plan`; the message names it.
    """
    plans: dict[str, list[str]] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                question, plan = _read_plan(line)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} must be JSON with the texts `question` and `plan`, but got {line[:80]!r}"
                ) from error
            plans.setdefault(question, []).append(plan)
    return plans


def _read_plan(line: str) -> tuple[str, str]:
    row = json.loads(line)
    question, plan = row["question"], row["plan"]
    if not isinstance(question, str) or not isinstance(plan, str):
        raise TypeError(f"`question` and `plan` must be texts, but got {question!r} and {plan!r}")
    return question, plan


def read_problems(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: HierBD3LMConfig,
    plans_are_given: bool,
    num_samples: int = 1,
) -> list[Problem]:
    """Reads and encodes the problems of a dataset, each as often as it is to be answered.

    Args:
        dataset: has `question`, `execution` and, if plans are given, `given_plans` of [`with_given_plans`].

    Raises:
        ValueError: for a dataset without examples or without a column that is needed, and for a row without an answer
            or with a special token in its prompt; the message names the row.
    """
    needed = ("question", "execution", "given_plans") if plans_are_given else ("question", "execution")
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
        plans = row["given_plans"] if plans_are_given else [None]
        try:
            prompts = [encode_prompt(index, row["question"], plan, tokenizer, config) for plan in plans]
            texts = {"question": row["question"], "reference_answer": reference_answer(row["execution"])}
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
        texts["reference_plan"] = row.get("plan") or None
        for sample in range(num_samples):
            prompt = prompts[sample % len(prompts)]  # all samples share one prompt, or each has its own
            problems.append(Problem(**vars(prompt), **texts, sample=sample))
    return problems


def encode_prompt(
    index: int, question: str, plan: str | None, tokenizer: PreTrainedTokenizerBase, config: HierBD3LMConfig
) -> Prompt:
    """Encodes what the model is given; `plan` is None where the model writes it.

    Raises:
        ValueError: for a special token in one of the texts.
    """
    ids = encode_example({"question": question, "plan": plan, "execution": ""}, tokenizer)
    check_content(ids, config)
    plan_ids = None if plan is None else ids["plan_ids"]
    return Prompt(index, ids["question_ids"], plan_ids, over_long_segments(ids, config))


def make_batches(prompts: Iterable[PromptType], batch_size: int) -> list[list[PromptType]]:
    """Groups the prompts that fit by their length, longest first: memory runs out at once or never."""
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
    """Generates plan and execution of each problem, and scores them."""
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
        predictions.append(score(problem, *texts, **costs))
    return predictions


def generate_batch(
    model: HierBD3LMForBlockDiffusion, prompts: Sequence[Prompt], settings: HierBD3LMGenerationConfig
) -> list[Written]:
    """What the model writes for each prompt."""
    pad = model.config.pad_token_id
    prompt = {name: ids.to(model.device) for name, ids in collate_prompts(prompts, pad).items()}
    output = model.generate(**prompt, generation_config=settings)
    plans, executions, *others = (  # on the CPU from here on, so that a clock has waited for the device
        getattr(output, name).tolist()
        for name in ("plan", "execution", "finished", "num_forward_passes", "tokens_per_forward")
    )
    plans, executions = ([[token for token in row if token != pad] for row in rows] for rows in (plans, executions))
    return [Written(*row) for row in zip(plans, executions, *others, strict=True)]


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a segment. The backbone's special tokens stay in it: an answer may have to be cut at one of them."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def collate_prompts(prompts: Sequence[Prompt], pad_token_id: int) -> dict[str, torch.Tensor]:
    """What `generate` takes: left-padded questions, their mask and right-padded plans if these are given.

    Returns:
        `input_ids`, `attention_mask` of shape `(batch, question_length)`, `plan_ids` of `(batch, plan_length)`.
    """
    batch = collate_questions([prompt.question_ids for prompt in prompts], pad_token_id)
    if prompts[0].plan_ids is not None:
        plans = [torch.tensor(prompt.plan_ids, dtype=torch.long) for prompt in prompts]
        batch["plan_ids"] = pad_sequence(plans, batch_first=True, padding_value=pad_token_id)
    return batch


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
    """Whether two texts differ in white space at the most."""
    return text.split() == other.split()


# What the lines say together


def summarize(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rates and speed over all predictions.

    Returns:
        - `n` examples with `num_samples` answers each, and of these examples `num_too_long` with an over-long question
          and `num_plan_too_long` with an over-long given plan: neither is answered, both stay in `n`.
        - each of `RATES` as a fraction, and its 95 % interval as `..._interval`. A rate is a mean over examples, of
          the mean over their samples where there are several: the interval then errs on the wide side. All are of
          `n`, but `plan_match`, which is of the `num_reference_plans` examples with a plan to match; it is left out
          where there are none.
        - for several samples, what [`summarize_samples`] says.
        - `num_forward_passes` (total), `num_forward_passes_mean` (of the answers), `num_tokens`, `seconds` (totals),
          `tokens_per_forward`, `tokens_per_second` (ratios of totals); None where nothing was answered.
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
    """How the samples of an example do together.

    Returns:
        - `majority_vote`: rate of the examples whose most frequent value is the reference's. A sample votes with the
          value of its strict answer; of values with equally many votes, that of the first sample wins. Samples
          without such a value have no vote (`num_unparsable_votes`), and an example without votes is wrong
          (`num_without_votes`); `num_tied_votes` examples have no single winner.
        - `pass_at_k` for k = 1 .. samples: rate of the examples that one of k samples answers with the right value,
          estimated without bias.
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
    """The mean of values in [0, 1] under its name, and its 95 % interval as `..._interval`."""
    total = sum(values)
    return {name: total / len(values), f"{name}_interval": list(wilson_interval(total, len(values)))}


def _count_too_long(examples: Sequence[Sequence[dict[str, Any]]], segment: str) -> int:
    return sum(any(segment in sample["too_long"] for sample in samples) for samples in examples)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as a table for people."""
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
    """A problem with what the model wrote, for people."""
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


# The run's folder


def start_run(folder: str | os.PathLike, settings: dict[str, Any], overwrite: bool = False) -> None:
    """Makes the folder of a run that `settings` decide on, or makes sure that it holds this run.

    Raises:
        ValueError: if the folder holds another run.
    """
    run_folder.start_run(Path(folder), settings, SETTINGS_FILE, (PREDICTIONS_FILE, SUMMARY_FILE), overwrite)


def _key(prediction: dict[str, Any]) -> tuple[int, int]:
    return prediction["index"], prediction["sample"]


def checksum_of_weights(model: torch.nn.Module) -> int:
    """Sum of all bytes of the weights: another checkpoint in the same folder is another run."""
    tensors = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in model.state_dict().values()]
    return sum(int(tensor.sum(dtype=torch.int64)) for tensor in tensors)


def describe_run(
    args: CheckpointArguments, data_args: DataArguments, dataset: Dataset, model: HierBD3LMForBlockDiffusion
) -> dict[str, Any]:
    """What decides on a run over a checkpoint's answers, beside the settings that a command has of its own."""
    return {
        "data": asdict(data_args),
        "split": args.split,
        "num_examples": len(dataset),
        "hash_of_data": hash_of_data(dataset),
        "checksum_of_weights": checksum_of_weights(model),
        "batch_size": args.batch_size,
        "device": str(model.device),
    }


def hash_of_data(dataset: Dataset) -> str:
    """Hash of all that a dataset's columns hold: another file in the same place is another run."""
    return run_folder.hash_of(dataset.to_dict())
