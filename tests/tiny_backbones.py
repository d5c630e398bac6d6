"""Tiny decoders of several architectures under our mask; each has what makes its architecture a case of its own."""

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny import make_batch, make_model

ROWS = [(5, 2, 3), (2, 1, 2), (7, 3, 1)]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
# No ids of special tokens: the defaults of transformers lie outside the tiny vocabulary.
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LAYERS = ["sliding_attention", "full_attention"]


def make_backbone_config(name: str, **overrides) -> PreTrainedConfig:
    """`name` is one of `BACKBONES`; `overrides` are fields of its configuration."""
    return BACKBONES[name](**overrides)


def _qwen3(**overrides) -> Qwen3Config:
    return Qwen3Config(**(SIZES | NO_IDS | overrides))


def _llama(**overrides) -> LlamaConfig:
    return LlamaConfig(**(SIZES | NO_IDS | overrides))


def _gemma3(**overrides) -> Gemma3TextConfig:
    """A sliding window in the first layer, tied embeddings."""
    return Gemma3TextConfig(**(SIZES | NO_IDS | {"layer_types": LAYERS, "sliding_window": 4} | overrides))


def _gemma2(**overrides) -> Gemma2Config:
    """Soft caps on scores and logits, for which its attention is eager unless told otherwise; tied embeddings."""
    return Gemma2Config(**(SIZES | NO_IDS | {"layer_types": LAYERS, "sliding_window": 4} | overrides))


def _gpt2(**overrides) -> GPT2Config:
    """Learned absolute positions, dropout, tied embeddings."""
    sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    return GPT2Config(**(sizes | NO_IDS | overrides))


BACKBONES = {"qwen3": _qwen3, "llama": _llama, "gemma3": _gemma3, "gemma2": _gemma2, "gpt2": _gpt2}


def model_with(backbone, attn_implementation=None, **overrides) -> HierBD3LMForBlockDiffusion:
    """`backbone` is a name or a configuration; attention is the backbone's default if not given."""
    if isinstance(backbone, str):
        backbone = make_backbone_config(backbone)
    return make_model(backbone_config=backbone, attn_implementation=attn_implementation, **overrides)


def noisy_batch(config, rows=ROWS, seed=0):
    """A batch with its noisy copy and where that is masked."""
    batch = make_batch(rows, config, seed)
    generator = torch.Generator().manual_seed(seed)
    masked = (batch["segment_ids"] > 0) & (torch.rand(batch["input_ids"].shape, generator=generator) < 0.5)
    return batch | {"noisy_input_ids": batch["input_ids"].masked_fill(masked, config.mask_token_id)}, masked


def logits_of(model, rows=ROWS):
    batch, _ = noisy_batch(model.config, rows)
    with torch.no_grad():
        return model(**batch).logits[batch["segment_ids"] > 0]


def assert_close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=atol)
