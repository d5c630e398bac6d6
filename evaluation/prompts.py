"""Prompts of a dataset: encoding, length checks and batches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..configuration_hierbd3lm import HierBD3LMConfig
from ..data.collator import collate_questions, encode_example, has_special_token, over_long_segments
from ..data.gsm8k.answers import parse_number, reference_answer
from ..data.tokenization import count_unknown

logger = logging.get_logger(__name__)

PromptType = TypeVar("PromptType", bound="Prompt")


@dataclass(frozen=True)
class Prompt:
    """Input of the model for one answer.

    Args:
        index: index of the example in the dataset.
        question_ids, plan_ids: token ids; `plan_ids` is None unless the plan is given.
        too_long: segments with more tokens than the model accepts.
        has_special_token: whether a text spells out a special token of the layout.
    """

    index: int
    question_ids: list[int]
    plan_ids: list[int] | None
    too_long: list[str]
    has_special_token: bool = field(default=False, kw_only=True)

    @property
    def is_answered(self) -> bool:
        """False for a prompt that the model does not accept."""
        return not self.too_long and not self.has_special_token


@dataclass(frozen=True)
class Problem(Prompt):
    """Prompt with the texts that its answer is scored against.

    Args:
        sample: index of the sample among those of the same example.
        question, reference_answer, reference_plan: texts; `reference_plan` is None if there is none.
    """

    sample: int
    question: str
    reference_answer: str
    reference_plan: str | None

    @property
    def key(self) -> tuple[int, int]:
        """Key of the line in `predictions.jsonl`."""
        return self.index, self.sample


def read_problems(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: HierBD3LMConfig,
    plans_are_given: bool,
    num_samples: int = 1,
) -> list[Problem]:
    """Read and encode the problems of a dataset, `num_samples` times each.

    Args:
        dataset: dataset with the columns `question`, `answer` or an `execution` with `#### <answer>`, and, if plans
            are given, `given_plans` (see [`with_given_plans`]).

    Raises:
        ValueError: if the dataset is empty or a column is missing, or if a row has no answer; the message names the
            row.
    """
    solution = "answer" if "answer" in dataset.column_names else "execution"
    needed = ("question", solution, "given_plans") if plans_are_given else ("question", solution)
    missing = [column for column in needed if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`dataset` must have the columns {', '.join(needed)}, but lacks {', '.join(missing)} among "
            f"{', '.join(dataset.column_names)}"
        )
    if len(dataset) == 0:
        raise ValueError("`dataset` must have at least one example, but has none")
    problems, contradictory = [], []
    for index, row in enumerate(dataset):
        plans = row["given_plans"] if plans_are_given else [None]
        try:
            prompts = [encode_prompt(index, row["question"], plan, tokenizer, config) for plan in plans]
            texts = {"question": row["question"], "reference_answer": _reference_answer(row)}
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
        if _contradicts(row.get("execution"), texts["reference_answer"]):
            contradictory.append(index)
        texts["reference_plan"] = row.get("plan") or None
        for sample in range(num_samples):
            prompt = prompts[sample % len(prompts)]  # all samples share one prompt, or each has its own
            problems.append(Problem(**vars(prompt), **texts, sample=sample))
    num_unknown = sum(count_unknown(problem.question_ids, tokenizer) > 0 for problem in problems[::num_samples])
    if num_unknown:
        logger.warning(f"{num_unknown} of {len(dataset)} questions have text that the tokenizer has no token for")
    if contradictory:
        logger.warning(
            f"`answer` differs from the answer of `execution` in {len(contradictory)} of {len(dataset)} rows, the "
            f"first is row {contradictory[0]}: answers are compared with `answer`"
        )
    return problems


def _reference_answer(row: Mapping[str, Any]) -> str:
    """Return the column `answer` where it has a value, else the answer that ends the execution."""
    answer = row.get("answer")
    if answer is None:
        return reference_answer(row.get("execution") or "")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return reference_answer(f"#### {answer}")


def _contradicts(execution: str | None, answer: str) -> bool:
    """Return True if an execution ends with another answer than the given one."""
    try:
        written = reference_answer(execution or "")
    except ValueError:
        return False
    values = parse_number(written), parse_number(answer)
    return written != answer and (None in values or values[0] != values[1])


def encode_prompt(
    index: int, question: str, plan: str | None, tokenizer: PreTrainedTokenizerBase, config: HierBD3LMConfig
) -> Prompt:
    """Encode a prompt; `plan` is None if the model generates it."""
    example = {"question": question, "plan": plan, "execution": ""}
    ids = encode_example(example, tokenizer, chat_template=config.chat_template)
    plan_ids, special = None if plan is None else ids["plan_ids"], has_special_token(ids, config)
    too_long = [] if special else over_long_segments(ids, config)
    return Prompt(index, ids["question_ids"], plan_ids, too_long, has_special_token=special)


def make_batches(prompts: Iterable[PromptType], batch_size: int) -> list[list[PromptType]]:
    """Group the prompts that fit by length, longest first, so that running out of memory shows in the first batch."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, but got {batch_size}")

    def length(prompt: Prompt) -> int:
        return len(prompt.question_ids) + len(prompt.plan_ids or ())

    fitting = sorted((prompt for prompt in prompts if prompt.is_answered), key=length, reverse=True)
    return [fitting[start : start + batch_size] for start in range(0, len(fitting), batch_size)]


def collate_prompts(prompts: Sequence[Prompt], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Build the inputs of `generate`: left-padded questions, attention mask, and right-padded plans if they are given.

    Returns:
        `input_ids`, `attention_mask` of shape `(batch, question_length)`, `plan_ids` of `(batch, plan_length)`.
    """
    batch = collate_questions([prompt.question_ids for prompt in prompts], pad_token_id)
    if prompts[0].plan_ids is not None:
        plans = [torch.tensor(prompt.plan_ids, dtype=torch.long) for prompt in prompts]
        batch["plan_ids"] = pad_sequence(plans, batch_first=True, padding_value=pad_token_id)
    return batch
