"""Answers as texts and counts, and the questions that get none."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..configuration_hierbd3lm import HierBD3LMConfig
from ..data.collator import check_content, check_lengths
from ..data.decoding import decode_text
from ..evaluation.prompts import Prompt
from ..evaluation.runner import Written
from ..generation_hierbd3lm import check_stage, make_schedule, order_of
from ..masking_hierbd3lm import PLAN
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..settings_hierbd3lm import HierBD3LMGenerationConfig


def check_prompt(prompt: Prompt, config: HierBD3LMConfig) -> None:
    """Raise a ValueError for a prompt that the model does not accept."""
    example = {"question_ids": prompt.question_ids, "plan_ids": prompt.plan_ids or [], "execution_ids": []}
    check_content(example, config)
    check_lengths(example, config)


def check_settings(
    model: HierBD3LMForBlockDiffusion, settings: HierBD3LMGenerationConfig, plan_ids: list[int] | None = None
) -> None:
    """Raise a ValueError for settings that `generate` refuses, before there is a question.

    Args:
        plan_ids: the plan, with `stage="execution"`.
    """
    order = order_of(model, settings)
    check_stage(order, settings.stage)
    if plan_ids is not None and PLAN not in order.segments:
        raise ValueError("`plan` must be omitted for a model without a plan, but is given")
    plan = None if plan_ids is None else torch.tensor([plan_ids], dtype=torch.long)
    make_schedule(model.config, order, settings, torch.ones(1, 1), plan)


def read_answer(prompt: Prompt, written: Written, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the texts of an answer and what they cost; special tokens of the backbone are left out."""
    return {
        "plan": decode_text(written.plan_ids, tokenizer),
        "execution": decode_text(written.execution_ids, tokenizer),
        "finished": written.finished,
        "num_forward_passes": written.num_forward_passes,
        "tokens_per_forward": round(written.tokens_per_forward, 3),
        "num_question_tokens": len(prompt.question_ids),
        "num_plan_tokens": len(written.plan_ids),
        "num_execution_tokens": len(written.execution_ids),
    }


def format_answer(answer: dict[str, Any]) -> str:
    """Format an answer for a terminal; a model without a plan has none."""
    plan = [f"--- Plan\n{answer['plan']}"] if answer["plan"] else []
    return "\n".join([*plan, f"--- Execution\n{answer['execution']}"])


def format_costs(answer: dict[str, Any], seconds: float) -> str:
    """Format what an answer cost."""
    unfinished = "" if answer["finished"] else ", cut off at its limit"
    return (
        f"({answer['num_forward_passes']} forward passes, {answer['tokens_per_forward']:.3g} tokens per forward pass, "
        f"{seconds:.2f} s{unfinished})"
    )
