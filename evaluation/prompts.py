"""The prompts of a dataset, encoded, checked for their length, and put in batches."""

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
