"""Every decoder type of transformers as a backbone, tried on a tiny configuration; writes `docs/backbones.md`."""

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hierbd3lm.backbones_hierbd3lm import special_token_ids
from hierbd3lm.configuration_hierbd3lm import SPECIAL_TOKENS, HierBD3LMConfig
from hierbd3lm.data.tokenization import train_tokenizer
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .measure import make_parser

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
WORKS = "works"
LENGTHS = {"question_len": 16, "plan_len": 8, "execution_len": 8, "block_size": 4}
MOST_PARAMETERS = 5_000_000  # more is no tiny model: a part of it has kept its default size
# field, of whatever architecture has it -> value
SIZES = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim"), 32)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "ffn_hidden_size"), 64)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("head_dim", "kv_channels", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 256)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_key_value_heads"), 4)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16)
    | {"encoder_layers": 1, "encoder_attention_heads": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    | {"rotary_dim": 8, "hidden_size_per_layer_input": 8, "type_vocab_size": 1, "sliding_window": 8}
)
ENCODERS = ("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert")
ENCODERS += ("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod")
PADDED = ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod")
OVERRIDES = {
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2, "laurel_rank": 8},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "kimi_linear": {"linear_attn_config": None},
    "rembert": {"output_embedding_size": 32, "input_embedding_size": 32},
    "zaya": {"num_experts_per_tok": 1},
} | {name: {"pad_token_id": 1} for name in PADDED}


def tiny_config(model_type: str, vocab_size: int) -> PreTrainedConfig:
    """Return a configuration of a type with two layers and a hidden size of 32, as far as it has such fields."""
    config_class = CONFIG_MAPPING[model_type]
    names = {item.name for item in fields(config_class)} | {*config_class.attribute_map}
    given = {name: value for name, value in SIZES.items() if name in names}
    given |= {name: vocab_size for name in ("vocab_size", "vocab_size_per_layer_input") if name in names}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given |= {name: None if name in names and _may_be_none(config_class, name) else 1}
    given |= {"is_decoder": True} if model_type in ENCODERS else {}
    return config_class(**(given | OVERRIDES.get(model_type, {})))


def _may_be_none(config_class: type[PreTrainedConfig], name: str) -> bool:
    return "None" in str(config_class.__dataclass_fields__[name].type)


def try_type(model_type: str) -> str:
    """Return `WORKS`, the reason why a type is refused, or `not tried: ...` where there is no tiny model of it."""
    tokenizer = train_tokenizer(["a b c d e f g h"])
    try:
        config = tiny_config(model_type, len(tokenizer))
        text = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
        if text is not config:
            return f"multimodal, its text part is {text.model_type}"
        with torch.device("meta"):
            size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            return f"not tried: no tiny model, {size:,} parameters"
        backbone = AutoModelForCausalLM.from_config(config).eval()
    except Exception as error:  # of the code of any architecture
        return f"not tried: no tiny model, {type(error).__name__}"
    verdicts = {_verdict(lambda: _from_scratch(config, tokenizer)), _verdict(lambda: _converted(backbone, tokenizer))}
    if any(verdict.startswith("does not run") for verdict in verdicts) and not _runs(backbone):
        return "not tried: the tiny model does not run"
    return " / ".join(sorted(verdicts))


def _runs(backbone: PreTrainedModel) -> bool:
    try:
        backbone(torch.arange(4)[None])
    except Exception:  # of the code of any architecture
        return False
    return True


def _verdict(make: Callable[[], HierBD3LMForBlockDiffusion]) -> str:
    try:
        model = make()
    except ValueError as error:
        return shortened(str(error))
    use(model)
    return WORKS


def shortened(error: str) -> str:
    """Return what an error says of the architecture, in few words."""
    for pattern, words in (
        (r"whose forward takes (`\w+`)", r"takes no \1"),
        (r"has \[(.*)\]$", r"layers of \1"),
        (r"is an encoder-decoder", "encoder-decoder"),
        (r"max_position_embeddings -1", "has no positions of its own"),
        (r"has a head that is not supported", "head with layers of its own"),
        (r"`backbone_config`: \w+ (.*)", r"\1"),
    ):
        if match := re.search(pattern, error):
            return match.expand(words).replace("'", "")
    return error


def _from_scratch(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> HierBD3LMForBlockDiffusion:
    fields = special_token_ids(tokenizer) | LENGTHS
    return HierBD3LMForBlockDiffusion(HierBD3LMConfig(backbone_config=config, **fields))


def _converted(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> HierBD3LMForBlockDiffusion:
    widen(backbone)
    return HierBD3LMForBlockDiffusion.from_autoregressive(backbone, tokenizer, **LENGTHS)


@torch.no_grad()
def widen(model: PreTrainedModel) -> None:
    """Draw matrices wide, so that what depends on what shows far above rounding."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.3)


def use(model: HierBD3LMForBlockDiffusion) -> None:
    """Train a step and write an answer."""
    generator = torch.Generator().manual_seed(0)
    first_word = 1 + max(getattr(model.config, f"{role}_token_id") for role in (*SPECIAL_TOKENS, "pad"))
    ids = torch.randint(first_word, model.config.vocab_size, (2, 12), generator=generator)
    segment_ids = torch.tensor([[0] * 4 + [1] * 4 + [2] * 4] * 2)
    model.train()
    model.masked_nll(segment_ids > 0, ids, segment_ids=segment_ids).mean().backward()
    model.eval()
    model.generate(ids[:, :4], attention_mask=torch.ones(2, 4, dtype=torch.long))


def table() -> Iterator[tuple[str, str, str]]:
    """Type, class and verdict of every type of `AutoModelForCausalLM`."""
    for model_type, class_name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        torch.manual_seed(0)
        yield model_type, class_name, try_type(model_type)


def page(rows: list[tuple[str, str, str]]) -> str:
    """Return the text of `docs/backbones.md`."""
    working = [f"`{name}`" for name, _, verdict in rows if verdict == WORKS]
    others = [f"| `{name}` | {verdict.replace('|', ' ')} |" for name, _, verdict in rows if verdict != WORKS]
    return f"""# Backbones

A decoder of `AutoModelForCausalLM` can be the backbone if

- it takes a 4-D mask and `position_ids`, and obeys them,
- keys and values of finished blocks can be cached,
- its logits are those of its output embeddings, with a scale or a soft cap that is known.

Each model is probed when it is converted, and when it is made from scratch: head, mask, positions, likelihood of
masked tokens, a step with the cache. What fails is refused, and the error says why. A loaded checkpoint is not probed
again. Of a multimodal checkpoint, conversion takes the text part if that is a causal language model of its own.
Architectures that bring their own code, and quantized weights, are refused before weights are read.

`python -m hierbd3lm.benchmarks.backbones` (from a clone) tries every type of transformers {transformers.__version__}
on a tiny configuration, from scratch and converted. It probes the model, trains it for a step and has it write an
answer. A type that works may have variants that do not, such as Falcon with ALiBi or LFM2 with its convolutions.

## {len(working)} types work

{_wrapped(working)}

## The others

| type | why |
|---|---|
{chr(10).join(others)}
"""


def _wrapped(words: list[str], width: int = 118) -> str:
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) + 2 > width:
            lines.append("")
        lines[-1] += f"{word}, "
    return "\n".join(line.rstrip() for line in lines).rstrip(",")


def main() -> None:
    """Print the verdicts and write the page."""
    make_parser("backbones", __doc__).parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for row in table():
        rows.append(row)
        print(*row, sep="\t", flush=True)
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
