"""Adapters made with peft, moved, or put on modules that cannot be adapted: loaded as they are, or refused."""

import inspect
import json
import shutil
from pathlib import Path

import peft.auto
import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model

from hierbd3lm.configuration_hierbd3lm import SPECIAL_TOKENS, HierBD3LMConfig
from hierbd3lm.evaluation.checkpoints import load_model
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.trainer import HierBD3LMTrainer
from hierbd3lm.training.arguments import HierBD3LMTrainingArguments
from hierbd3lm.training.lora import (
    add_adapter,
    is_own_checkpoint,
    load_adapter,
    load_checkpoint,
    load_tokenizer,
    token_modules,
)
from hierbd3lm.training.settings import AdapterArguments

from .test_peft import convert, logits_of, make_base
from .tiny import make_batch

LORA = AdapterArguments(use_peft=True, lora_r=2)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def own_base(request, tmp_path):
    return make_own_base(tmp_path / "own", tied=request.param)


@pytest.fixture
def tied_base(tmp_path):
    return make_own_base(tmp_path / "own", tied=True)


def make_own_base(folder, tied, seed=0):
    """A checkpoint of this model with its tokenizer."""
    for part in convert(make_base(folder.with_name("ar"), tie_word_embeddings=tied), seed):
        part.save_pretrained(folder)
    return str(folder)


def by_hand(base, folder, **settings):
    """An adapter as peft makes and saves it, with random weights; returns its model."""
    model = get_peft_model(HierBD3LMForBlockDiffusion.from_pretrained(base), LoraConfig(r=2, **settings))
    randomize(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def randomize(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.5)


# Modules that cannot be adapted


@pytest.mark.parametrize("setting", ["lora_target_modules", "lora_modules_to_save"])
@pytest.mark.parametrize("names", [["lm_head"], ["q_proj", "embed_tokens"], ["backbone.model.embed_tokens"]])
def test_the_embeddings_and_the_head_are_refused(setting, names, own_base):
    model = HierBD3LMForBlockDiffusion.from_pretrained(own_base)
    with pytest.raises(ValueError, match=f"`{setting}` must not name the embeddings or the head, but got"):
        add_adapter(model, own_base, AdapterArguments(use_peft=True, **{setting: names}))
    assert all(parameter.requires_grad for parameter in model.parameters())  # nothing has been added


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_modules": ["lm_head"]}, "`target_modules` of .* must not name the embeddings or the head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "`target_modules` of .* must not name the embeddings or the"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            "tie_word_embeddings is True and they are not",
        ),
    ],
)
def test_an_adapter_on_one_of_two_tied_matrices_is_not_merged(settings, message, tied_base, tmp_path):
    by_hand(tied_base, tmp_path / "adapter", **settings)
    with pytest.raises(ValueError, match=message):
        load_adapter(str(tmp_path / "adapter"), "cpu")


def test_an_adapter_on_an_untied_head_is_merged(tmp_path):
    base = make_own_base(tmp_path / "own", tied=False)
    model = by_hand(base, tmp_path / "adapter", target_modules=["lm_head", "v_proj"])
    loaded, _ = load_adapter(str(tmp_path / "adapter"), "cpu")
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-4, atol=1e-4)


# Adapters made with peft


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_an_adapter_made_with_peft_is_trained_saved_and_loaded(task_type, own_base, tmp_path):
    base = HierBD3LMForBlockDiffusion.from_pretrained(own_base)
    rows = [getattr(base.config, f"{role}_token_id") for role in SPECIAL_TOKENS]
    settings = {"target_modules": "all-linear", "trainable_token_indices": dict.fromkeys(token_modules(base), rows)}
    model = by_hand(own_base, tmp_path / "adapter", task_type=task_type, **settings)
    batch = make_batch([(9, 2, 3)], base.config)
    model(noisy_input_ids=batch["input_ids"], **batch).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    limits = {"max_plan_len": 4, "max_execution_len": 4}
    written = model.eval().generate(input_ids=batch["input_ids"][:, :9], **limits).sequences
    loaded, tokenizer = load_model(str(tmp_path / "adapter"), "cpu")
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(loaded.generate(batch["input_ids"][:, :9], **limits).sequences, written)
    assert tokenizer.get_vocab() == load_tokenizer(own_base).get_vocab()


def test_an_adapter_of_an_autoregressive_base_needs_the_configuration(tmp_path):
    base = make_base(tmp_path / "ar", tie_word_embeddings=True)
    model = convert(base)[0]
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], base_model_name_or_path=base))
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    message = "`model` must be an adapter with the configuration of its model, but .* has no config.json and its base"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(str(tmp_path / "adapter"), load_tokenizer(base), {})
    model.config.save_pretrained(tmp_path / "adapter")
    loaded = load_checkpoint(str(tmp_path / "adapter"), load_tokenizer(base), {})
    assert loaded.config.plan_block_size == model.config.plan_block_size


# Where the base is


def test_the_configuration_of_an_adapter_names_no_code(tied_base, tmp_path):
    model = add_adapter(HierBD3LMForBlockDiffusion.from_pretrained(tied_base), tied_base, LORA)
    model.save_pretrained(tmp_path / "adapter")
    assert "auto_map" not in json.loads((tmp_path / "adapter" / "config.json").read_text())
    assert not list((tmp_path / "adapter").glob("*.py"))
    assert "AutoModel" in model.get_base_model().config.auto_map
    assert is_own_checkpoint(str(tmp_path / "adapter"))


def test_a_relative_base_is_found_from_every_folder(tmp_path, monkeypatch):
    for seed, place in enumerate(("here", "there")):
        (tmp_path / place).mkdir()
        make_own_base(tmp_path / place / "own", tied=True, seed=seed)
    monkeypatch.chdir(tmp_path / "here")
    model = add_adapter(HierBD3LMForBlockDiffusion.from_pretrained("own"), "own", LORA)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits_of(model)
    monkeypatch.chdir(tmp_path / "there")
    loaded = load_checkpoint(str(tmp_path / "adapter"), load_tokenizer("own"), {})
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-4)


def test_a_base_that_has_gone_is_named(tied_base, tmp_path):
    add_adapter(HierBD3LMForBlockDiffusion.from_pretrained(tied_base), tied_base, LORA).save_pretrained(
        tmp_path / "adapter"
    )
    moved = shutil.move(tied_base, tmp_path / "moved")
    with pytest.raises(
        ValueError, match=f"`base_model_name_or_path` in .* but there is no {tied_base}: set it to where"
    ):
        load_adapter(str(tmp_path / "adapter"), "cpu")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(moved)}))
    assert load_adapter(str(tmp_path / "adapter"), "cpu")[0].config.plan_len
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "user/gone"}))
    with pytest.raises(OSError, match="adapter is an adapter of user/gone, which cannot be loaded"):
        load_checkpoint(str(tmp_path / "adapter"), load_tokenizer(str(moved)), {})


def test_an_adapter_of_a_base_on_this_machine_is_not_pushed(tied_base, tmp_path, monkeypatch):
    arguments = HierBD3LMTrainingArguments(str(tmp_path / "out"), use_cpu=True, ema_decay=0.0)
    arguments.push_to_hub = True
    monkeypatch.setattr(HierBD3LMTrainer, "init_hf_repo", lambda *args, **kwargs: None)
    model = add_adapter(HierBD3LMForBlockDiffusion.from_pretrained(tied_base), tied_base, LORA)
    with pytest.raises(ValueError, match=f"`push_to_hub` must be False for an adapter .* but that is {tied_base}"):
        HierBD3LMTrainer(model, arguments)


# What is no checkpoint of this model


def test_an_autoregressive_checkpoint_is_not_evaluated(tmp_path):
    base = make_base(tmp_path / "ar", tie_word_embeddings=True)
    for load in (HierBD3LMForBlockDiffusion.from_pretrained, HierBD3LMConfig.from_pretrained):
        with pytest.raises(
            ValueError, match="must be a checkpoint of this model, but its model_type is 'qwen3': conv"
        ):
            load(base)


def test_a_conversion_needs_all_weights_in_memory(tmp_path):
    base = make_base(tmp_path / "ar", tie_word_embeddings=True)
    in_memory = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = dict.fromkeys(in_memory, "cpu") | {"model.layers.1": "disk"}
    offload = {"device_map": device_map, "offload_folder": str(tmp_path / "offload")}
    with pytest.raises(ValueError, match="`device_map` must keep all weights in memory"):
        HierBD3LMForBlockDiffusion.from_autoregressive(base, load_tokenizer(base), **offload)


def test_peft_loads_an_adapter_of_this_package(tied_base, tmp_path):
    model = add_adapter(HierBD3LMForBlockDiffusion.from_pretrained(tied_base), tied_base, LORA)
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(HierBD3LMForBlockDiffusion.from_pretrained(tied_base), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded), logits_of(model))
    allowed = {"import_allowlist": ["hierbd3lm.modeling_hierbd3lm"]}
    allowed = allowed if "import_allowlist" in inspect.getsource(peft.auto) else {}  # earlier versions ask for nothing
    torch.testing.assert_close(
        logits_of(AutoPeftModel.from_pretrained(str(tmp_path / "adapter"), **allowed)), logits_of(model)
    )
    assert Path(loaded.active_peft_config.base_model_name_or_path) == Path(tied_base)
