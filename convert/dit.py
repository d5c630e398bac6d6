"""Conversion of published checkpoints of BD3-LM and MDLM.

The published network is a DiT: every LayerNorm is scaled and shifted, and every residual branch gated, by linear
functions of a condition (Peebles and Xie 2023, section 3.2). Where it is trained without time conditioning, the
condition is that of sigma = 0 at any time, and scale, shift and gate are constants that fold into the neighbouring
weights: what is left is a [`HierBD3LMDiTForCausalLM`].

A converted model writes text: it has no question and no plan. `<|execution|>` opens a text as the BOS token did in
training, and the EOS token is the end of the execution. `<|plan|>` and `<|execution|>` have probability 0.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..backbones_hierbd3lm import pad_on_the_left
from ..configuration_hierbd3lm import SPECIAL_TOKENS, HierBD3LMConfig
from ..dit_hierbd3lm import HierBD3LMDiTConfig
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..settings_hierbd3lm import HierBD3LMGenerationConfig

Weights = Mapping[str, torch.Tensor]

PREFIX = "backbone."  # of the published names; left out here
OUTER_NAMES = (
    "vocab_embed.embedding",
    *(f"sigma_map.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")),
    "output_layer.norm_final.weight",
    *(f"output_layer.{layer}.{kind}" for layer in ("adaLN_modulation", "linear") for kind in ("weight", "bias")),
)
BLOCK_NAMES = (
    *(f"{layer}.weight" for layer in ("norm1", "attn_qkv", "attn_out", "norm2")),
    *(f"{layer}.{kind}" for layer in ("mlp.0", "mlp.2", "adaLN_modulation") for kind in ("weight", "bias")),
)
# Other tensors of a checkpoint: frequencies, the training mask, and the bounds of the noise at the end of training.
BUFFERS = {"rotary_emb.inv_freq", "block_diff_mask", "sampling_eps_min", "sampling_eps_max"}

TEXT_TOKENS = [SPECIAL_TOKENS[role] for role in ("mask", "plan", "execution")]  # in the order of their ids
NEVER = -1e4  # a logit whose probability is 0 in every floating-point type, and which all of them hold


@dataclass(frozen=True)
class PublishedModel:
    """Weights and settings of a published checkpoint.

    Args:
        weights: by their published names, without `PREFIX`.
        num_heads: attention heads.
        block_size: tokens that are denoised together; `length` for MDLM.
        length: tokens of a text in training.
        buffers: names of stored tensors that the converted model does not need.
    """

    weights: Weights
    num_heads: int
    block_size: int
    length: int
    buffers: list[str]


def read_published(source: str | os.PathLike, **download: Any) -> PublishedModel:
    """Read a checkpoint without running its code.

    Args:
        source: folder or Hub id, with `config.json` and `model.safetensors` or `pytorch_model.bin`.
        download: `revision`, `cache_dir`, `token`, ... for `transformers.utils.cached_file`.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: for a model with time conditioning, a causal one, and for names of weights that are missing or
            unknown.
    """
    config = json.loads(Path(cached_file(source, "config.json", **download)).read_text(encoding="utf-8"))
    for name, why in (("time_conditioning", "the condition is no constant"), ("causal", "there are no blocks")):
        if config.get(name):
            raise ValueError(f"`{name}` of {source} must be False, else {why}, but got {config[name]}")
    missing = [name for name in ("n_heads", "model_length") if name not in config]
    if missing:
        raise ValueError(f"config.json of {source} must hold {', '.join(missing)}, but holds {', '.join(config)}")
    stored = {name.removeprefix(PREFIX): tensor for name, tensor in _read_weights(source, download).items()}
    buffers = sorted(stored.keys() & BUFFERS)
    weights = {name: tensor for name, tensor in stored.items() if name not in BUFFERS}
    _check_names(weights, source)
    length = config["model_length"]
    return PublishedModel(weights, config["n_heads"], config.get("block_size", length), length, buffers)


def convert(published: PublishedModel, tokenizer: PreTrainedTokenizerBase) -> HierBD3LMForBlockDiffusion:
    """Return a model of this package with the same distribution over texts, in evaluation mode.

    Args:
        tokenizer: the checkpoint's, whose last id is that before the mask token's. It gets `<|mask|>`, `<|plan|>` and
            `<|execution|>` in place, and pads on the left with its EOS token.

    Raises:
        ValueError: if the tokenizer is not the checkpoint's, or has no BOS or EOS token.
    """
    num_rows = len(published.weights["vocab_embed.embedding"])  # the mask's is the last
    _extend_tokenizer(tokenizer, num_rows)
    weights = add_openers(fold_modulation(published.weights, published.num_heads), tokenizer.bos_token_id)
    config = HierBD3LMConfig(
        backbone_config=_backbone_config(published, weights),
        question_len=0,
        plan_len=0,
        execution_len=published.length,
        block_size=published.block_size,
        mask_token_id=num_rows - 1,
        plan_token_id=num_rows,
        execution_token_id=num_rows + 1,
        end_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = HierBD3LMForBlockDiffusion(config).eval()
    model.backbone.load_state_dict(weights)
    model.generation_config = HierBD3LMGenerationConfig(sampler="first_hitting", temperature=1.0)
    return model


def convert_checkpoint(
    source: str, output_dir: str, tokenizer: str = "gpt2", revision: str | None = None
) -> tuple[HierBD3LMForBlockDiffusion, PublishedModel]:
    """Convert a checkpoint and save it with its tokenizer.

    Args:
        source, tokenizer: folders or Hub ids.
        revision: of `source` on the Hub.
    """
    published = read_published(source, revision=revision)
    text_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    model = convert(published, text_tokenizer)
    model.save_pretrained(output_dir)
    text_tokenizer.save_pretrained(output_dir)
    return model, published


def constant_condition(weights: Weights) -> torch.Tensor:
    """Return the condition of every modulation at sigma = 0: `torch.DoubleTensor` of shape `(condition_size,)`.

    The embedding of sigma is the cosines and then the sines of its multiples: ones, then zeros.
    """
    first, second = (
        (weights[f"sigma_map.mlp.{layer}.weight"].double(), weights[f"sigma_map.mlp.{layer}.bias"].double())
        for layer in (0, 2)
    )
    embedding = torch.zeros(first[0].shape[1], dtype=torch.float64)
    embedding[: len(embedding) // 2] = 1
    return F.silu(F.linear(F.silu(F.linear(embedding, *first)), *second))


def fold_modulation(weights: Weights, num_heads: int) -> dict[str, torch.Tensor]:
    """Return the weights of a [`HierBD3LMDiTForCausalLM`] that computes what the published ones do at sigma = 0.

    In double precision until the end, where they are rounded to the published dtype.
    """
    condition = constant_condition(weights)
    body = {"embed_in.weight": weights["vocab_embed.embedding"]}
    for number in range(_num_blocks(weights)):
        prefix = f"blocks.{number}."
        block = {name: weights[prefix + name].double() for name in BLOCK_NAMES}
        body |= {
            f"layers.{number}.{name}": tensor for name, tensor in _fold_block(block, condition, num_heads).items()
        }
    shift, scale = _modulation(weights, "output_layer.", condition).chunk(2)
    body["final_layer_norm.weight"] = weights["output_layer.norm_final.weight"].double() * (1 + scale)
    body["final_layer_norm.bias"] = shift
    decoder = {f"gpt_neox.{name}": tensor for name, tensor in body.items()}
    decoder |= {f"lm_head.{kind}": weights[f"output_layer.linear.{kind}"] for kind in ("weight", "bias")}
    dtype = weights["vocab_embed.embedding"].dtype
    return {name: tensor.to(dtype) for name, tensor in decoder.items()}


def add_openers(weights: Weights, bos_token_id: int) -> dict[str, torch.Tensor]:
    """Add two tokens after the mask, which are read as the BOS token is and have probability 0."""
    embedding, head, bias = (weights[name] for name in ("gpt_neox.embed_in.weight", "lm_head.weight", "lm_head.bias"))
    return dict(weights) | {
        "gpt_neox.embed_in.weight": torch.cat([embedding, embedding[[bos_token_id] * 2]]),
        "lm_head.weight": F.pad(head, (0, 0, 0, 2)),
        "lm_head.bias": F.pad(bias, (0, 2), value=NEVER),
    }


def _fold_block(block: Weights, condition: torch.Tensor, num_heads: int) -> dict[str, torch.Tensor]:
    modulation = _modulation(block, "", condition)
    attention_shift, attention_scale, attention_gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6)
    return {
        "input_layernorm.weight": block["norm1.weight"] * (1 + attention_scale),
        "input_layernorm.bias": attention_shift,
        "attention.query_key_value.weight": _by_head(block["attn_qkv.weight"], num_heads),
        "attention.dense.weight": attention_gate[:, None] * block["attn_out.weight"],
        "post_attention_layernorm.weight": block["norm2.weight"] * (1 + mlp_scale),
        "post_attention_layernorm.bias": mlp_shift,
        "mlp.dense_h_to_4h.weight": block["mlp.0.weight"],
        "mlp.dense_h_to_4h.bias": block["mlp.0.bias"],
        "mlp.dense_4h_to_h.weight": mlp_gate[:, None] * block["mlp.2.weight"],
        "mlp.dense_4h_to_h.bias": mlp_gate * block["mlp.2.bias"],
    }


def _modulation(weights: Weights, prefix: str, condition: torch.Tensor) -> torch.Tensor:
    weight, bias = (weights[f"{prefix}adaLN_modulation.{kind}"].double() for kind in ("weight", "bias"))
    return F.linear(condition, weight, bias)


def _by_head(projection: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows: queries, keys and values of all heads become those of the first head, the second, ..."""
    return projection.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)


def _backbone_config(published: PublishedModel, weights: Weights) -> HierBD3LMDiTConfig:
    vocab_size, hidden_size = weights["gpt_neox.embed_in.weight"].shape
    return HierBD3LMDiTConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=_num_blocks(published.weights),
        num_attention_heads=published.num_heads,
        intermediate_size=len(weights["gpt_neox.layers.0.mlp.dense_h_to_4h.bias"]),
        max_position_embeddings=published.length,
    )


def _extend_tokenizer(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    missing = [role for role in ("bos", "eos") if getattr(tokenizer, f"{role}_token_id") is None]
    if missing:
        raise ValueError(f"`tokenizer` must have a BOS and an EOS token, but lacks {' and '.join(missing)}")
    tokenizer.add_special_tokens({"extra_special_tokens": TEXT_TOKENS}, replace_extra_special_tokens=False)
    ids, wanted = tokenizer.convert_tokens_to_ids(TEXT_TOKENS), [num_rows - 1, num_rows, num_rows + 1]
    if ids != wanted:
        raise ValueError(
            f"`tokenizer` must have {num_rows - 1} tokens, so that the ids of {', '.join(TEXT_TOKENS)} are {wanted}, "
            f"but got {ids}"
        )
    tokenizer.pad_token = tokenizer.eos_token
    pad_on_the_left(tokenizer)


def _num_blocks(weights: Weights) -> int:
    return len({match[1] for match in map(re.compile(r"blocks\.(\d+)\.").match, weights) if match})


def _check_names(weights: Weights, source: str | os.PathLike) -> None:
    blocks = (f"blocks.{number}.{name}" for number in range(_num_blocks(weights)) for name in BLOCK_NAMES)
    expected = {*OUTER_NAMES, *blocks}
    missing, unknown = sorted(expected - weights.keys()), sorted(weights.keys() - expected)
    if missing or unknown:
        raise ValueError(
            f"`source` must hold the weights of a DiT with adaptive LayerNorm, but {source} lacks {missing} and has "
            f"{unknown} besides"
        )


def _read_weights(source: str | os.PathLike, download: dict[str, Any]) -> dict[str, torch.Tensor]:
    path = cached_file(source, "model.safetensors", _raise_exceptions_for_missing_entries=False, **download)
    if path is not None:
        return load_file(path)
    return torch.load(cached_file(source, "pytorch_model.bin", **download), map_location="cpu", weights_only=True)
