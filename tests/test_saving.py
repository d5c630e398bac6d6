"""A saved model is loaded as it was: weights, ties, types and configuration."""

import pytest
import torch

from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny_backbones import BACKBONES, logits_of, model_with


def plain(config):
    """Without what loading writes down: where from, and in which type."""
    fields = config.to_dict()
    return fields | {
        "_name_or_path": None,
        "dtype": None,
        "backbone_config": fields["backbone_config"] | {"dtype": None},
    }


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_loaded_model_is_the_saved_one(backbone, tmp_path):
    model = model_with(backbone)
    model.save_pretrained(tmp_path)
    loaded, info = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert plain(loaded.config) == plain(model.config)
    for (name, saved), (other, parameter) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(saved, parameter)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not loaded.training


@pytest.mark.parametrize("backbone", ["gemma3", "gemma2", "gpt2"])
def test_tied_embeddings_are_one_tensor_after_loading(backbone, tmp_path):
    model = model_with(backbone)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_untied_embeddings_stay_two_tensors(tmp_path):
    model = model_with("qwen3", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path)
    assert not torch.equal(loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight)


@pytest.mark.parametrize("backbone", ["qwen3", "gemma3"])
def test_resized_embeddings_survive_saving(backbone, tmp_path):
    model = model_with(backbone)
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(47)
    assert model.config.vocab_size == model.backbone.config.vocab_size == 47
    model.save_pretrained(tmp_path)
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 47
    assert torch.equal(loaded.get_input_embeddings().weight[:40], old)
    assert loaded.get_output_embeddings().weight.shape[0] == 47
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_missing_weights_are_initialised(tmp_path):
    model = model_with("qwen3")
    name = "backbone.model.layers.1.mlp.up_proj.weight"
    state = {key: value for key, value in model.state_dict().items() if key != name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {name}
    weight = loaded.get_parameter(name)
    initializer_range = model.config.backbone_config.initializer_range
    assert weight.std().item() == pytest.approx(initializer_range, rel=0.1)
    assert torch.equal(
        loaded.get_parameter(name.replace("1.mlp", "0.mlp")), model.get_parameter(name.replace("1.mlp", "0.mlp"))
    )


def test_bfloat16_reaches_every_parameter(tmp_path):
    model = model_with("qwen3")
    model.save_pretrained(tmp_path)
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.backbone.config.dtype == torch.bfloat16
    for implementation in ("sdpa", "eager"):
        loaded.set_attn_implementation(implementation)
        logits = logits_of(loaded)
        assert logits.dtype == torch.bfloat16
        agreement = (logits.argmax(dim=-1) == logits_of(model).argmax(dim=-1)).float().mean()
        assert agreement > 0.8  # of 40 tokens
    loaded.save_pretrained(tmp_path / "half")
    again = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
