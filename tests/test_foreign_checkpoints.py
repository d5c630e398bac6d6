"""Checkpoints of other kinds are converted where they hold a decoder of transformers, or refused with the reason."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)

from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny import make_config, make_model
from .tiny_autoregressive import NUM_PLAIN, autoregressive, convert, plain_tokenizer
from .tiny_backbones import NO_IDS, SIZES, logits_of

TEXT = SIZES | NO_IDS | {"vocab_size": NUM_PLAIN}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
WITH_TEXT_PART = {
    "gemma3": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=TEXT, vision_config=VISION | {"vision_use_head": False}, mm_tokens_per_image=4)
    ),
    "mistral3": lambda: Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=TEXT | {"model_type": "mistral"},
            vision_config=VISION | {"model_type": "pixtral", "head_dim": 8},
        )
    ),
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=TEXT | {"model_type": "llama"},
            vision_config=VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
        )
    ),
}
LLAMA4_VISION = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
WITHOUT = {
    "qwen3 vl": (
        lambda: Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(
                text_config=TEXT,
                vision_config={
                    "depth": 1,
                    "hidden_size": 16,
                    "num_heads": 2,
                    "intermediate_size": 16,
                    "out_hidden_size": 32,
                    "deepstack_visual_indexes": [0],
                },
            )
        ),
        "that of Qwen3VLForConditionalGeneration is a Qwen3VLTextModel",
    ),
    "llama4": (
        lambda: Llama4ForConditionalGeneration(
            Llama4Config(text_config=TEXT | {"num_local_experts": 2}, vision_config=VISION | LLAMA4_VISION)
        ),
        r"llama4_text has \['chunked_attention'\]",
    ),
    "t5": (
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=NUM_PLAIN, d_model=32, num_layers=1, num_heads=4)),
        "t5 is an encoder-decoder",
    ),
}


@pytest.fixture(params=["loaded", "path"])
def source_of(request, tmp_path):
    """Makes what `from_autoregressive` takes of a model: itself, or the path of its checkpoint."""

    def source(model):
        if request.param == "loaded":
            return model.eval()
        model.save_pretrained(tmp_path / "foreign")
        return str(tmp_path / "foreign")

    return source


@pytest.mark.parametrize("name", WITH_TEXT_PART)
def test_the_text_part_of_a_multimodal_model_is_converted(name, source_of, tmp_path):
    whole = WITH_TEXT_PART[name]().eval()
    tokens = torch.arange(60, 72)[None]
    with torch.no_grad():
        expected = whole(input_ids=tokens).logits
    model = convert(source_of(whole))
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(tokens).logits[..., :NUM_PLAIN], expected)
    assert not any("vision" in parameter for parameter, _ in model.named_parameters())
    model.save_pretrained(tmp_path / "own")
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "own")
    assert torch.equal(logits_of(loaded), logits_of(model))
    if model.config.tie_word_embeddings:
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("name", WITHOUT)
def test_a_model_without_a_decoder_that_can_be_used_is_refused_with_the_reason(name, source_of):
    make, reason = WITHOUT[name]
    tokenizer = plain_tokenizer()
    with pytest.raises(ValueError, match=f"`(model_or_path|backbone_config)` must .*{reason}"):
        convert(source_of(make()), tokenizer)
    assert len(tokenizer) == NUM_PLAIN


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "vit", "qwen3_vl"])
def test_a_backbone_without_a_vocabulary_of_its_own_is_refused_from_scratch_too(model_type):
    with pytest.raises(ValueError, match=f"`backbone_config` must be of a language model, but {model_type} has no"):
        HierBD3LMConfig(backbone_config={"model_type": model_type})


def test_a_checkpoint_of_another_task_is_refused(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`(backbone_config|model_or_path)` must be of a language model"):
        convert(tmp_path)


def test_a_checkpoint_of_this_model_is_no_autoregressive_one(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"`model_or_path` must be an autoregressive checkpoint, but .* is one of this"
    ):
        convert(tmp_path)


@pytest.mark.parametrize("value", [None, SimpleNamespace(), torch.nn.Linear(2, 2)])
def test_what_is_neither_a_model_nor_a_path_is_refused(value):
    with pytest.raises(ValueError, match="`model_or_path` must be a PreTrainedModel or a path, but got "):
        convert(value)


# Code that a checkpoint brings along

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class ForeignConfig(LlamaConfig):
    model_type = "{model_type}"

class ForeignForCausalLM(LlamaForCausalLM):
    config_class = ForeignConfig
"""


@pytest.fixture
def foreign_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])

    def folder(model_type):
        model = autoregressive("llama")
        path = tmp_path / "foreign"
        model.save_pretrained(path)
        auto_map = {"AutoConfig": "code.ForeignConfig", "AutoModelForCausalLM": "code.ForeignForCausalLM"}
        fields = json.loads((path / "config.json").read_text()) | {"model_type": model_type, "auto_map": auto_map}
        (path / "config.json").write_text(json.dumps(fields))
        (path / "code.py").write_text(CODE.format(model_type=model_type))
        return path

    return folder


def test_an_architecture_that_transformers_does_not_know_is_refused_without_running_its_code(foreign_folder):
    folder = foreign_folder("foreign_llama")
    (folder / "code.py").write_text("raise RuntimeError('this code has run')")
    for kwargs in ({}, {"trust_remote_code": True}):
        with pytest.raises(ValueError, match=r"of an architecture of transformers, but .* is of type 'foreign_llama'"):
            convert(folder, **kwargs)


def test_a_loaded_model_of_an_unknown_architecture_is_refused(foreign_folder):
    folder, tokenizer = foreign_folder("foreign_llama"), plain_tokenizer()
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="of an architecture of transformers, but ForeignConfig of transformers_mod"):
        convert(loaded, tokenizer)
    assert len(tokenizer) == NUM_PLAIN
    with pytest.raises(ValueError, match="of an architecture of transformers, but ForeignConfig of transformers_mod"):
        HierBD3LMForBlockDiffusion(make_config(backbone_config=loaded.config, pad_token_id=5))


def test_a_known_architecture_is_converted_with_the_code_of_transformers(foreign_folder):
    folder = foreign_folder("llama")
    assert type(convert(folder).backbone).__module__.startswith("transformers.models.llama")
    with pytest.raises(ValueError, match="leave out `trust_remote_code`"):
        convert(folder, trust_remote_code=True)


# Quantized weights


def test_quantized_weights_are_refused_before_they_are_read(tmp_path):
    autoregressive().config.save_pretrained(tmp_path)  # no weights
    with pytest.raises(ValueError, match="`quantization_config` must be None or have dequantize=True"):
        convert(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"`quantization_config` must be None or have dequantize=True.*in full precision"
    ):
        convert(tmp_path)


def test_a_loaded_model_with_quantized_weights_is_refused():
    model = autoregressive()
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="`quantization_config` must be None or have dequantize=True"):
        convert(model)
