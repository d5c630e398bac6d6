"""Tiny models that generate, their inputs, and comparison with the slow reference."""

import functools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, Qwen3Config

from hierbd3lm.masking_hierbd3lm import CLEAN

from .reference_generation import denoise
from .tiny import make_model

PAD, END, PLAN, EXECUTION, MASK = range(5)  # tiny.TINY_TOKEN_IDS
# Settings of the samplers with which the tiny models reveal one token per step, or several.
SAMPLERS = {
    "first_hitting": {},
    "ancestral": {"num_steps": 3},
    "confidence": {"threshold": 0.35},
    "entropy": {"entropy_bound": 3.0},
}
STAGES = ("full", "plan", "execution")
GIVEN_PLAN = [11, 22, 33, 14, 25]
QUESTION = [7, 8, 9, 10, 11]
RAGGED_QUESTIONS = [[7, 8, 9], [], [10, 11, 12, 13, 14, 15, 16], [17], [18, 19], [20, 21, 22, 23, 24, 25], [26]]


def tiny_backbone(kind, vocab_size=40):
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}
    if kind == "qwen3":
        return Qwen3Config(**sizes, tie_word_embeddings=False)
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        return Gemma3TextConfig(**sizes, sliding_window=5, layer_types=layers, tie_word_embeddings=False)
    return GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=256, tie_word_embeddings=False
    )


@functools.cache
def speaker(
    plan_block_size=4, execution_block_size=6, backbone="qwen3", vocab_size=40, end_bias=4.0, attn="sdpa", **overrides
):
    """A tiny random model in float64 that ends now and then, and would love to say the mask token.

    Every test shares it, so none may change it. The other special tokens are left unsaid, as in all data.
    """
    torch.manual_seed(0)
    fields = {"question_len": 12, "plan_len": 12, "execution_len": 12, "block_size": None}
    fields |= {"plan_block_size": plan_block_size, "execution_block_size": execution_block_size}
    fields |= {"backbone_config": tiny_backbone(backbone, vocab_size), "attn_implementation": attn}
    model = make_model(**(fields | overrides)).double()
    bias = torch.zeros(vocab_size, dtype=torch.float64)
    bias[[PAD, PLAN, EXECUTION]] = -30.0
    bias[MASK], bias[END] = 30.0, end_bias
    model.backbone.lm_head.bias = torch.nn.Parameter(bias)
    return model


def left_pad(rows, pad=PAD):
    width = max(len(row) for row in rows)
    return torch.tensor([[pad] * (width - len(row)) + row for row in rows], dtype=torch.long)


def right_pad(rows, pad=PAD):
    width = max(len(row) for row in rows)
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows], dtype=torch.long)


def tokens_of(row):
    return [token for token in row.tolist() if token != PAD]


def generate_one(model, question, plan=None, **settings):
    plan_ids = None if plan is None else torch.tensor([plan], dtype=torch.long)
    return model.generate(torch.tensor([question], dtype=torch.long), plan_ids=plan_ids, **settings)


def rows_of(output, question_width):
    """What an output says of each row, in python."""
    return [
        {
            "answer": tokens_of(output.sequences[row, question_width:]),
            "plan": tokens_of(output.plan[row]),
            "execution": tokens_of(output.execution[row]),
            "finished": bool(output.finished[row]),
            "num_forward_passes": int(output.num_forward_passes[row]),
            "tokens_per_forward": pytest.approx(float(output.tokens_per_forward[row]), rel=1e-6),
            "reveal_steps": [step for step in output.reveal_steps[row].tolist() if step],
        }
        for row in range(len(output.plan))
    ]


def assert_same_as_reference(model, question, plan=None, **settings):
    """Returns the reference's answer, for claims about what the cases cover."""
    output = generate_one(model, question, plan, **settings)
    expected = denoise(model, question, plan, **settings)
    (row,) = rows_of(output, len(question))
    assert output.sequences[0].tolist() == expected.sequence, settings
    assert row == {
        "answer": expected.sequence[len(question) :],
        "plan": expected.plan,
        "execution": expected.execution,
        "finished": expected.finished,
        "num_forward_passes": expected.num_forward_passes,
        "tokens_per_forward": expected.tokens_per_forward,
        "reveal_steps": expected.reveal_steps,
    }, settings
    return expected


@contextmanager
def recorded_passes(model):
    """What every pass of the model was given: tokens, block and position ids of the clean and the noisy stream."""
    passes, encode = [], model.encode

    def record(tokens, layout, *args):
        num_clean = int((layout.stream_ids[0] == CLEAN).sum())
        columns = {"input_ids": tokens, "block_ids": layout.block_ids, "position_ids": layout.position_ids}
        clean = {name: ids[:, :num_clean].clone() for name, ids in columns.items()}
        passes.append(clean | {f"noisy_{name}": ids[:, num_clean:].clone() for name, ids in columns.items()})
        return encode(tokens, layout, *args)

    with mock.patch.object(model, "encode", record):
        yield passes
