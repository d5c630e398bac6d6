"""Prompts of a dataset: encoding, length checks and batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..configuration_hierbd3lm import HierBD3LMConfig
from ..data.collator import check_content, collate_questions, encode_example, over_long_segments
from ..data.gsm8k.answers import reference_answer

PromptType = TypeVar("PromptType", bound="Prompt")


@dataclass(frozen=True)
class Prompt:
    """Input of the model for one answer.

    Args:
        index: index of the example in the dataset.
        question_ids, plan_ids: token ids; `plan_ids` is None unless the plan is given.
        too_long: segments with more tokens than the model accepts; such a prompt is not answered.
    """

    index: int
    question_ids: list[int]
    plan_ids: list[int] | None
    too_long: list[str]


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
        dataset: dataset with the columns `question`, `execution` and, if plans are given, `given_plans` (see
            [`with_given_plans`]).

    Raises:
        ValueError: if the dataset is empty or a column is missing, or if a row has no answer or a special token in its
            prompt; the message names the row.
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
    """Encode a prompt; `plan` is None if the model generates it.

    Raises:
        ValueError: if a text contains a special token.
    """
    ids = encode_example({"question": question, "plan": plan, "execution": ""}, tokenizer)
    check_content(ids, config)
    plan_ids = None if plan is None else ids["plan_ids"]
    return Prompt(index, ids["question_ids"], plan_ids, over_long_segments(ids, config))


def make_batches(prompts: Iterable[PromptType], batch_size: int) -> list[list[PromptType]]:
    """Group the prompts that fit by length, longest first, so that running out of memory shows in the first batch."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, but got {batch_size}")

    def length(prompt: Prompt) -> int:
        return len(prompt.question_ids) + len(prompt.plan_ids or ())

    fitting = sorted((prompt for prompt in prompts if not prompt.too_long), key=length, reverse=True)
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
