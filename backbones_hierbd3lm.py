"""The backbones that are possible: loading, their tokenizers, and checks that they obey the mask and the positions."""

import copy
import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_gguf_available, logging

from .cache_hierbd3lm import BlockCache
from .configuration_hierbd3lm import SPECIAL_TOKENS
from .generation_hierbd3lm import DOWNLOAD_ARGUMENTS
from .masking_hierbd3lm import CLEAN, NOISY, PADDING, SUPPORTED_LAYER_TYPES, TokenLayout

logger = logging.get_logger(__name__)


def load_autoregressive(path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model, or a multimodal model that has one, after a look at its configuration.

    Raises:
        ValueError: if the checkpoint is of another kind; the message says why.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"`model_or_path` must be a PreTrainedModel or a path, but got {type(path).__name__}")
    path, gguf = find_gguf(path)
    kwargs = gguf | kwargs
    download = {name: kwargs[name] for name in (*DOWNLOAD_ARGUMENTS, "gguf_file") if name in kwargs}
    if "gguf_file" in kwargs:
        kwargs.setdefault("quantization_config", GgufConfig(dequantize=True))
    elif (
        model_type := PreTrainedConfig.get_config_dict(path, **download)[0].get("model_type", "llama")
    ) == "hierbd3lm":
        raise ValueError(f"`model_or_path` must be an autoregressive checkpoint, but {path} is one of this model")
    elif model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"`model_or_path` must be of an architecture of transformers, but {path} is of type {model_type!r}: code "
            "that a checkpoint brings along would not be saved with the converted model"
        )
    config = AutoConfig.from_pretrained(path, **download)
    check_backbone_config(config if config.is_encoder_decoder else config.get_text_config(decoder=True))
    for quantization in (kwargs.get("quantization_config"), getattr(config, "quantization_config", None)):
        check_not_quantized(quantization)
    for auto_class, mapping in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        if type(config) in mapping:
            model, info = auto_class.from_pretrained(path, **kwargs, output_loading_info=True)
            if missing := sorted(info["missing_keys"]):
                raise ValueError(
                    f"`model_or_path` must hold every weight of {type(model).__name__}, but {path} lacks "
                    f"{len(missing)} of them: {', '.join(missing[:4])}"
                )
            if any(weight.is_meta for weight in model.parameters()):
                raise ValueError(
                    "`device_map` must keep all weights in memory, as rows are added, but some are on disk"
                )
            return model
    raise ValueError(f"`model_or_path` must be a causal language model, but {path} is of type {config.model_type!r}")


def hide_local_path(config: PreTrainedConfig) -> None:
    """Keep only the last part of the path that a configuration was loaded from: it is saved with the model."""
    if os.path.exists(config.name_or_path):
        config.name_or_path = os.path.basename(os.path.abspath(config.name_or_path))


def find_gguf(path: str | os.PathLike) -> tuple[str | os.PathLike, dict[str, str]]:
    """Return the folder of a GGUF file, given itself or as the only one in a folder, and `{"gguf_file": name}`.

    Any other path comes back as it is, with an empty dict.

    Raises:
        ValueError: for a folder with several GGUF files and no other checkpoint.
        ImportError: if there is a GGUF file and the package `gguf` is missing.
    """
    if os.path.isfile(path) and str(path).endswith(".gguf"):
        path, names = os.path.dirname(path) or ".", [os.path.basename(path)]
    elif os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        names = sorted(name for name in os.listdir(path) if name.endswith(".gguf"))
    else:
        names = []
    if len(names) > 1:
        raise ValueError(f"`model_or_path` must be one GGUF file, but {path} has {', '.join(names)}")
    if names and not is_gguf_available():
        raise ImportError(f"reading {names[0]} needs the package gguf: run `pip install gguf`")
    return path, {"gguf_file": names[0]} if names else {}


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Prepare a tokenizer in place for this model, and return the number of tokens that were added.

    It gets those of `SPECIAL_TOKENS` that it lacks, left padding, and `<|end|>` as its pad token if it has none or
    pads with its unknown token.

    Raises:
        ValueError: if a new token would take the id of another one. The tokenizer is then unchanged.
    """
    tokens = list(SPECIAL_TOKENS.values())
    if vocabulary_size(tokenizer) > len(tokenizer):
        _add_tokens(copy.deepcopy(tokenizer), tokens)
    num_added = _add_tokens(tokenizer, tokens)
    if tokenizer.pad_token_id in (None, tokenizer.unk_token_id):
        if tokenizer.pad_token_id is not None:
            logger.warning(
                f"The tokenizer pads with {tokenizer.pad_token}, its unknown token, so that unknown words would count "
                f"as padding. It pads with {SPECIAL_TOKENS['end']} from now on."
            )
        tokenizer.pad_token = SPECIAL_TOKENS["end"]
    pad_on_the_left(tokenizer)
    return num_added


def pad_on_the_left(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer pad on the left and return what `generate` reads, also after it is saved and loaded."""
    for name, value in (("padding_side", "left"), ("model_input_names", ["input_ids", "attention_mask"])):
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value  # the attributes that `save_pretrained` writes


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the `..._token_id` fields of [`HierBD3LMConfig`] for a tokenizer; without a pad token, pad is `<|end|>`.

    Raises:
        ValueError: if the tokenizer lacks one of `SPECIAL_TOKENS`.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [text for text in SPECIAL_TOKENS.values() if text not in vocabulary]
    if missing:
        raise ValueError(f"`tokenizer` must have the special tokens {', '.join(missing)}: see `add_special_tokens`")
    ids = {f"{role}_token_id": vocabulary[text] for role, text in SPECIAL_TOKENS.items()}
    pad = tokenizer.pad_token_id
    return ids | {"pad_token_id": ids["end_token_id"] if pad in (None, tokenizer.unk_token_id) else pad}


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of embedding rows that a tokenizer needs; its ids may leave some out."""
    return max(tokenizer.get_vocab().values()) + 1


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> int:
    num_added = tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    vocabulary = tokenizer.get_vocab()
    new_ids = {vocabulary[text]: text for text in tokens}
    for text, token_id in vocabulary.items():
        if text != new_ids.get(token_id, text):
            raise ValueError(
                f"`tokenizer` must leave ids for new tokens, but {new_ids[token_id]} would take the id {token_id} of "
                f"{text!r}, as not all ids below {vocabulary_size(tokenizer)} are in use: add tokens for these first"
            )
    return num_added


def take_text_part(model: PreTrainedModel) -> PreTrainedModel:
    """Return the causal language model inside a multimodal model, with its own weights; any other comes back as it is.

    Raises:
        ValueError: if the text part has no model of its own in transformers.
    """
    if model.config.model_type == "hierbd3lm":
        raise ValueError("`model_or_path` must be an autoregressive model, but got one of this kind")
    config = model.config if model.config.is_encoder_decoder else model.config.get_text_config(decoder=True)
    if config is model.config:
        return model
    decoder, name = model.get_decoder(), type(model).__name__
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"`model_or_path` must have a text part that is a causal language model of its own, but that of {name} is "
            f"a {type(decoder).__name__}"
        )
    check_backbone_config(config)
    config.tie_word_embeddings = has_tied_embeddings(model)  # the outer configuration has decided
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(config)
    if type(decoder) is type(text):
        return decoder
    setattr(text, text.base_model_prefix, decoder)
    text.set_output_embeddings(model.get_output_embeddings())
    text.config = decoder.config
    return text.train(model.training)


def has_tied_embeddings(model: PreTrainedModel) -> bool:
    """Return True if one matrix is both the embeddings of a model and its output head."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def check_tied_as_loaded(tie_word_embeddings: bool | None, backbone: PreTrainedModel) -> None:
    """Refuse to tie or untie the embeddings of a checkpoint."""
    loaded = getattr(backbone.config, "tie_word_embeddings", False)
    if tie_word_embeddings not in (None, loaded):
        raise ValueError(f"`tie_word_embeddings` must be {loaded} as in the checkpoint, but got {tie_word_embeddings}")
    if loaded != has_tied_embeddings(backbone):
        raise ValueError(
            f"`model_or_path` must have embeddings as its configuration says, but tie_word_embeddings is {loaded} and "
            f"they are {'not ' * loaded}tied: a saved model would not be loaded as it was"
        )


def check_backbone_config(backbone: PreTrainedConfig) -> None:
    """Refuse an architecture that cannot take a 4-D mask or positions, or could not be loaded again."""
    name = type(backbone).__name__
    if backbone.model_type not in CONFIG_MAPPING or CONFIG_MAPPING[backbone.model_type] is not type(backbone):
        raise ValueError(
            f"`backbone_config` must be of an architecture of transformers, but {name} of {type(backbone).__module__} "
            "is none: its code would not be saved with the model. If transformers knows the architecture, leave out "
            "`trust_remote_code`"
        )
    if not backbone.is_encoder_decoder and backbone.get_text_config(decoder=True) is not backbone:
        raise ValueError(
            f"`backbone_config` must be of a text model, but {name} is multimodal: its text part is a "
            f"{type(backbone.get_text_config(decoder=True)).__name__}"
        )
    if not hasattr(backbone, "vocab_size"):
        raise ValueError(f"`backbone_config` must be of a language model, but {name} has no vocabulary")
    check_not_quantized(getattr(backbone, "quantization_config", None))
    if backbone.is_encoder_decoder:
        raise ValueError(f"`backbone_config` must be a decoder, but {backbone.model_type} is an encoder-decoder")
    if getattr(backbone, "alibi", False):
        raise ValueError(
            f"`backbone_config` must read position_ids, but {backbone.model_type} has alibi=True: it counts "
            "columns, where a token's clean and noisy copies are far apart"
        )
    unsupported = set(getattr(backbone, "layer_types", None) or ()) - SUPPORTED_LAYER_TYPES
    if unsupported:
        raise ValueError(
            f"`backbone_config` must have layers of {sorted(SUPPORTED_LAYER_TYPES)}, which take any mask, but "
            f"{backbone.model_type} has {sorted(unsupported)}"
        )


def check_positions(config: PreTrainedConfig) -> None:
    """Refuse a model with sequences at which LongRoPE changes its factors: it does so for a whole batch.

    An answer would depend on the rows beside it. Other rotary embeddings that change with the length do so beyond
    `max_position_embeddings`, which no sequence exceeds.
    """
    rope = getattr(config.backbone_config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        limit = parameters.get("original_max_position_embeddings")
        if parameters.get("rope_type") == "longrope" and config.sequence_len > limit:
            raise ValueError(
                f"`question_len + plan_len + execution_len` must be at most original_max_position_embeddings {limit} "
                f"of a backbone with LongRoPE, which has other frequencies beyond it, but got {config.sequence_len}"
            )


def check_not_quantized(quantization_config: Any) -> None:
    """Refuse quantized weights, which can neither be trained nor be saved with the model."""
    if isinstance(quantization_config, Mapping):
        dequantized = quantization_config.get("dequantize", False)
    else:
        dequantized = quantization_config is None or getattr(quantization_config, "dequantize", False)
    if not dequantized:
        raise ValueError(
            f"`quantization_config` must be None or have dequantize=True, but got {quantization_config}: convert the "
            "checkpoint in full precision and save it; the saved model is loaded with `quantization_config`"
        )


def check_backbone_signature(backbone: PreTrainedModel) -> None:
    """Refuse a backbone whose forward takes no positions or masks, with the reason."""
    accepted = inspect.signature(backbone.forward).parameters
    for name, why in (
        ("attention_mask", "without attention there is no mask to give it"),
        ("position_ids", "a token's clean and noisy copies could not share a position"),
        ("past_key_values", "finished blocks could not be cached"),
        ("logits_to_keep", "logits could not be limited to masked positions"),
    ):
        if name not in accepted:
            raise ValueError(
                f"`backbone_config` must be of a model whose forward takes `{name}`, but "
                f"{type(backbone).__name__}'s does not: {why}"
            )


@torch.no_grad()
def check_backbone(model: PreTrainedModel) -> None:
    """Run a few tiny passes: the head, the mask, positions, the likelihood of masked tokens, a step with the cache.

    Raises:
        ValueError: for an architecture that does not compute what the model needs; the message says what.
    """
    name, was_training = type(model.backbone).__name__, model.training
    checks = [_fault_of_head] if model.order.is_autoregressive else [_fault_of_head, _fault_of_mask, _fault_of_cache]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for a few tokens, FlexAttention included
            fault = next((fault for check in checks if (fault := check(model)) is not None), None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the code of an architecture may raise
        raise ValueError(
            f"`backbone_config`: {name} does not run under the mask: {type(error).__name__}: {error}"
        ) from error
    finally:
        model.train(was_training)
    if fault is not None:
        raise ValueError(f"`backbone_config`: {name} {fault}")


def _fault_of_head(model: PreTrainedModel) -> str | None:
    """Compare `project` of the model with the logits of the backbone itself."""
    tokens = torch.arange(min(4, model.config.vocab_size), device=model.device)[None]
    hidden_states = model.backbone.base_model(tokens, use_cache=False).last_hidden_state
    projected, logits = model.project(hidden_states).float(), model.backbone(tokens, use_cache=False).logits.float()
    if not logits.isfinite().all():
        return "has logits that are not finite"
    tolerance = 4 * torch.finfo(model.dtype).eps * max(1.0, float(logits.abs().max()))
    if projected.shape != logits.shape or not torch.allclose(projected, logits, rtol=1e-3, atol=tolerance):
        return (
            "has a head that is not supported: its logits are not those of the output embeddings with `logit_scale`, "
            "`logits_scaling` and `final_logit_softcapping`"
        )
    return None


# A question of three tokens and two blocks of three; its rows have two columns of padding.
PROBE_BLOCKS = [0, 0, 0, 1, 1, 1, 2, 2, 2]
PROBE_LENGTH = len(PROBE_BLOCKS)


def _fault_of_mask(model: PreTrainedModel) -> str | None:
    """Change tokens that a prediction must, or must not, depend on: some architectures bias or shift attention."""
    x0, other = _probe_tokens(model)
    clean = x0.repeat(5, 1)
    noisy = clean.clone()
    clean[1, 6:] = other[6:]
    noisy[2, 8], noisy[3, 6] = other[8], other[6]
    clean, noisy = (nn.functional.pad(tokens, (0, 2)) for tokens in (clean, noisy))
    clean[4] = clean[4].roll(2)  # its columns are nearer to those of the noisy copy
    layout = _probe_layout(model, [0, 0, 0, 0, 2]) + _probe_layout(model, [0] * 5).in_stream(NOISY)
    hidden_states = model.encode(torch.cat([clean, noisy], dim=1), layout)[:, -PROBE_LENGTH - 2 : -2]
    base, hidden_clean, last, first, moved = model.project(hidden_states).float()
    if not torch.cat([base, moved]).isfinite().all():
        return "has logits that are not finite under the mask"
    if not model.nll_in_chunks(hidden_states[0, 3:], x0[3:]).isfinite().all():
        return "has no finite likelihood of masked tokens"
    same, moving = _noise(model, base)
    if _distance(hidden_clean[3:], base[3:]) > same:
        return "does not obey the mask, a noisy block sees its clean tokens"
    sees_before, sees_after = (_distance(*pair) > same for pair in ((first[8], base[8]), (last[6], base[6])))
    if sees_before and not sees_after:
        return "stays causal inside a block, whatever mask it is given"
    if _distance(moved[3:], base[3:]) > moving:
        return "does not obey position_ids, padding moves its positions"
    return None


def _fault_of_cache(model: PreTrainedModel) -> str | None:
    """Compare a denoising step that reads the question from the cache with one pass over both."""
    x0 = _probe_tokens(model)[0][None]
    layout = _probe_layout(model, [0])
    question, block = layout.columns(0, 3), layout.columns(3, 6).in_stream(NOISY)
    whole = model.project(model.encode(x0[:, :6], question + block)[0, 3:]).float()
    num_layers = model.config.backbone_config.num_hidden_layers
    cache = BlockCache(num_layers, num_rows=1, scratch=3, capacity=3, device=model.device)
    model.encode(x0[:, :3], question, cache)
    cache.commit(question.block_ids, question.position_ids, pass_length=3)
    step = model.project(model.encode(x0[:, 3:6], block, cache)[0]).float()
    if _distance(step, whole) > _noise(model, whole)[1]:
        return "does not read finished blocks from the cache: a step with it predicts other tokens than one without"
    return None


def _probe_tokens(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random tokens of shape `(9,)`, and others that differ from them everywhere."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(model.config.vocab_size, (PROBE_LENGTH,), generator=generator).to(model.device)
    return x0, (x0 + 1) % model.config.vocab_size


def _probe_layout(model: PreTrainedModel, paddings: list[int]) -> TokenLayout:
    """Return the clean layout of rows with so many columns of padding on the left, and the others on the right."""
    blocks = torch.full((len(paddings), PROBE_LENGTH + 2), PADDING, device=model.device)
    positions = torch.zeros_like(blocks)
    for row, left in enumerate(paddings):
        blocks[row, left : left + PROBE_LENGTH] = torch.tensor(PROBE_BLOCKS, device=model.device)
        positions[row, left : left + PROBE_LENGTH] = torch.arange(PROBE_LENGTH, device=model.device)
    return TokenLayout(blocks, torch.full_like(blocks, CLEAN), positions)


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).square().mean().sqrt()


def _noise(model: PreTrainedModel, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the greatest distance that rounding explains between equal columns, and between moved ones.

    Moved columns are summed in another order, which matters in bfloat16: 0.03 of the deviation in 28 layers.
    """
    is_precise = torch.finfo(model.dtype).eps < 1e-6
    same, moving = (1e-4, 1e-4) if is_precise else (1e-3, 0.1)
    return same * logits.std(), moving * logits.std()
