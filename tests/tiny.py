"""Tiny random models and batches for the tests; nothing is downloaded."""

from dataclasses import replace

import torch
from datasets import Dataset
from transformers import Qwen3Config

from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
from hierbd3lm.data.collator import example_length
from hierbd3lm.masking_hierbd3lm import EXECUTION, PLAN
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.order_hierbd3lm import BlockOrder, Part

TINY_TOKEN_IDS = {
    "pad_token_id": 0,
    "end_token_id": 1,
    "plan_token_id": 2,
    "execution_token_id": 3,
    "mask_token_id": 4,
}
FIRST_CONTENT_ID = 5


def make_config(**overrides) -> HierBD3LMConfig:
    """A configuration of a two-layer Qwen3 with 40 tokens; `overrides` are fields of HierBD3LMConfig."""
    backbone = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        pad_token_id=None,
    )
    fields = {"question_len": 16, "plan_len": 24, "execution_len": 24, "block_size": 4, "backbone_config": backbone}
    return HierBD3LMConfig(**(TINY_TOKEN_IDS | fields | overrides))


def make_model(**overrides) -> HierBD3LMForBlockDiffusion:
    """A random model in eval mode. Weights are drawn wide, so that a leak moves logits far above rounding."""
    attn_implementation = overrides.pop("attn_implementation", "sdpa")
    model = HierBD3LMForBlockDiffusion._from_config(make_config(**overrides), attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def make_batch(lengths, config, seed=0) -> dict[str, torch.Tensor]:
    """Random examples laid out side by side.

    Args:
        lengths: (question tokens, plan blocks, execution blocks) of each row.

    Returns:
        `input_ids`, `segment_ids` of shape (batch, length): questions left-padded, the rest right-padded.
    """
    generator = torch.Generator().manual_seed(seed)
    widest = max(question for question, _, _ in lengths)
    rows = []
    for question, plan_blocks, execution_blocks in lengths:
        plan, execution = plan_blocks * config.plan_block_size, execution_blocks * config.execution_block_size
        total = question + plan + execution
        ids = torch.randint(FIRST_CONTENT_ID, config.vocab_size, (total,), generator=generator)
        segments = torch.tensor([0] * question + [1] * plan + [2] * execution)
        if plan:
            ids[question] = config.plan_token_id
        if execution:
            ids[question + plan] = config.execution_token_id
        rows.append((widest - question, ids, segments))
    length = max(left + len(ids) for left, ids, _ in rows)
    input_ids = torch.full((len(rows), length), config.pad_token_id)
    segment_ids = torch.full((len(rows), length), -1)
    for row, (left, ids, segments) in enumerate(rows):
        input_ids[row, left : left + len(ids)] = ids
        segment_ids[row, left : left + len(ids)] = segments
    return {"input_ids": input_ids, "segment_ids": segment_ids}


def make_dataset(num_examples, config, seed=0, question=(1, 9), plan=(0, 7), execution=(1, 12)) -> Dataset:
    """Random examples of many lengths, encoded as `prepare_dataset` does.

    Args:
        question, plan, execution: least and most tokens of each segment.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        count = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(FIRST_CONTENT_ID, config.vocab_size, (count,), generator=generator).tolist()

    rows = [
        {"question_ids": tokens(*question), "plan_ids": tokens(*plan), "execution_ids": tokens(*execution)}
        for _ in range(num_examples)
    ]
    return Dataset.from_list([row | {"length": example_length(row, config)} for row in rows])


def layout_from_segments(segment_ids, plan_block_size, execution_block_size, order="hierarchical", plan_len=0):
    """Block and position ids of an order that is given by its block sizes alone; `flat`, `paired` or hierarchical."""
    plan = Part((PLAN,), plan_block_size, plan_len, TINY_TOKEN_IDS["plan_token_id"])
    execution = Part((EXECUTION,), execution_block_size, 1000, TINY_TOKEN_IDS["execution_token_id"], after=(0,))
    parts = {
        "hierarchical": (plan, execution),
        "flat": (replace(plan, segments=(PLAN, EXECUTION)),),
        "paired": (plan, replace(execution, after=())),
    }
    return BlockOrder(parts[order], **TINY_TOKEN_IDS, is_aligned=order == "paired").layout(segment_ids)
