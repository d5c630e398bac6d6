"""LoRA adapters: trained weights, saving, merging and resumption."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PhiConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hierbd3lm import eval_gsm8k, train
from hierbd3lm.configuration_hierbd3lm import SPECIAL_TOKENS
from hierbd3lm.evaluation.runner import evaluate
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.order_hierbd3lm import BlockOrder
from hierbd3lm.trainer import HierBD3LMTrainer
from hierbd3lm.training.arguments import HierBD3LMTrainingArguments
from hierbd3lm.training.checkpoints import EMA_FILE
from hierbd3lm.training.lora import add_adapter, is_adapter, load_adapter, load_checkpoint
from hierbd3lm.training.settings import AdapterArguments, ModelArguments

from .tiny import make_batch, make_model

BACKBONE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BACKBONE |= {"num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3}
NUM_OLD_ROWS = 257  # bytes and padding
EMBEDDINGS, HEAD = "backbone.model.embed_tokens.weight", "backbone.lm_head.weight"
SETTINGS = {
    "dataset": "synthetic",
    "num_train_examples": 16,
    "num_validation_examples": 4,
    "synthetic": {"num_steps": [1, 1], "num_distractors": [0, 0]},
    "question_len": 400,
    "plan_len": 128,
    "execution_len": 128,
    "block_size": 4,
    "use_peft": True,
    "lora_r": 2,
    "lora_alpha": 8,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.05,
    "ema_decay": 0.5,
    "save_steps": 2,
    "eval_noise_draws": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}


def make_base(folder, **fields):
    """An autoregressive checkpoint without the special tokens of the model."""
    alphabet = Tokenizer(BPE(vocab={byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    alphabet.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=alphabet, pad_token="<|pad|>")
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **(BACKBONE | fields))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path):
    return make_base(tmp_path / "ar", tie_word_embeddings=request.param)


@pytest.fixture
def tied_base(tmp_path):
    return make_base(tmp_path / "ar", tie_word_embeddings=True)


@pytest.fixture
def own_base(base, tmp_path):
    """A converted checkpoint: runs from it start from the same embedding rows."""
    for part in convert(base):
        part.save_pretrained(tmp_path / "own")
    return str(tmp_path / "own")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train with the command line, and return the folder of the run."""

    def run(name, init_from, *arguments, **settings):
        settings = SETTINGS | {"output_dir": str(tmp_path / name), "init_from": init_from} | settings
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        monkeypatch.setattr(sys, "argv", ["train.py", str(config), *arguments])
        train.main()
        return str(tmp_path / name)

    return run


def convert(base, seed=0):
    """Convert the base, with its tokenizer. The new embedding rows depend on the seed."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    fields = {name: SETTINGS[name] for name in ("question_len", "plan_len", "execution_len", "block_size")}
    return load_checkpoint(base, tokenizer, fields), tokenizer


def adapted(base, seed=0, **settings):
    """A new adapter with random matrices and rows, so that all of them affect the output."""
    model = add_adapter(convert(base, seed)[0], base, AdapterArguments(use_peft=True, lora_r=2, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return model


def logits_of(model):
    """Logits of a fixed batch, of the noisy and the clean stream."""
    batch = make_batch([(9, 2, 3), (5, 1, 2)], model.config)
    noise = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    xt = batch["input_ids"].masked_fill(noise < 0.5, model.config.mask_token_id)
    with torch.no_grad():
        return model.eval()(noisy_input_ids=xt, **batch).logits


def special_rows(config):
    return sorted(getattr(config, f"{role}_token_id") for role in SPECIAL_TOKENS)


def changed_rows(before, after):
    return (before != after).any(dim=1).nonzero().flatten().tolist()


def final_state(folder):
    return load_file(f"{folder}/adapter_model.safetensors")


# Training


def test_only_the_adapter_and_the_rows_of_the_new_tokens_change(own_base, run):
    before = HierBD3LMForBlockDiffusion.from_pretrained(own_base).state_dict()
    out = run("out", own_base, ema_decay=0.0)
    model, _ = load_adapter(out, "cpu")
    after, new_rows = model.state_dict(), special_rows(model.config)
    assert new_rows == list(range(NUM_OLD_ROWS, len(after[EMBEDDINGS])))  # the rows added to the vocabulary
    assert changed_rows(before[EMBEDDINGS], after[EMBEDDINGS]) == new_rows
    if model.config.tie_word_embeddings:
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    else:
        predicted = [row for row in new_rows if row != model.config.mask_token_id]
        assert changed_rows(before[HEAD], after[HEAD]) == predicted
    linear = {name for name in before if name.endswith("_proj.weight")}
    assert len(linear) == 7 * BACKBONE["num_hidden_layers"]
    for name in before.keys() - {EMBEDDINGS, HEAD}:
        assert torch.equal(before[name], after[name]) is (name not in linear), name


def test_only_chosen_modules_are_adapted_or_trained_in_full(base):
    settings = {"lora_target_modules": ["q_proj", "v_proj"], "lora_modules_to_save": ["model.norm"]}
    model = add_adapter(convert(base)[0], base, AdapterArguments(use_peft=True, **settings))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [name for name in trained if "lora_" in name]
    assert len(matrices) == 2 * 2 * BACKBONE["num_hidden_layers"]
    assert all("q_proj" in name or "v_proj" in name for name in matrices)
    rows = [name for name in trained if "trainable_tokens" in name]
    assert len(rows) == (1 if model.config.tie_word_embeddings else 2)
    assert [name for name in trained if name not in matrices + rows] == [
        "base_model.model.backbone.model.norm.modules_to_save.default.weight"
    ]


def test_an_adapted_matrix_is_the_base_plus_the_scaled_product(tied_base):
    base, model = convert(tied_base)[0], adapted(tied_base, lora_alpha=6)
    name = "backbone.model.layers.1.mlp.up_proj"
    layer = model.base_model.model.get_submodule(name)
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = model.merge_and_unload().get_submodule(name).weight
    torch.testing.assert_close(merged, base.get_submodule(name).weight + 6 / 2 * product)


def test_checkpointed_activations_give_the_same_gradients(tied_base):
    gradients = []
    for checkpointed in (False, True):
        model = adapted(tied_base, lora_dropout=0.0).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        batch = make_batch([(9, 2, 3)], model.config)
        model(noisy_input_ids=batch["input_ids"], **batch).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients)


# Saving


def test_a_saved_adapter_gives_the_logits_of_the_trained_model_on_any_conversion(base, tmp_path):
    model = adapted(base, seed=1)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=0)  # saving does not change the model
    other = convert(base, seed=2)[0]
    assert not torch.allclose(logits_of(other), expected, atol=1e-2)
    loaded = PeftModel.from_pretrained(other, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded), expected, rtol=0, atol=0)
    stored = final_state(tmp_path / "adapter")
    assert max(len(tensor) for name, tensor in stored.items() if "tokens" in name) == len(SPECIAL_TOKENS)
    assert not any("embed_tokens.weight" in name or "lm_head.weight" in name for name in stored)


@pytest.mark.slow
def test_a_merged_adapter_is_a_checkpoint_with_the_same_logits(base, run, tmp_path):
    out = run("out", base)
    unmerged = PeftModel.from_pretrained(convert(base, seed=3)[0], out)
    merged, tokenizer = load_adapter(out, "cpu")
    torch.testing.assert_close(logits_of(merged), logits_of(unmerged), rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    whole = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(whole), logits_of(merged), rtol=0, atol=0)
    assert not is_adapter(tmp_path / "merged") and is_adapter(out)
    assert whole.config.plan_block_size == SETTINGS["block_size"]
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS.values())) == special_rows_in_order(whole.config)


def special_rows_in_order(config):
    return [getattr(config, f"{role}_token_id") for role in SPECIAL_TOKENS]


def test_the_averaged_adapter_is_saved(tied_base, run):
    out = run("out", tied_base)
    average = {
        name.removeprefix("average.").replace(".default", ""): tensor
        for name, tensor in load_file(f"{out}/checkpoint-4/{EMA_FILE}").items()
        if name.startswith("average.")
    }
    saved = final_state(out)
    assert saved.keys() == average.keys()
    assert all(torch.equal(saved[name], average[name]) for name in saved)


# Resuming


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_adapter_of_an_uninterrupted_one(own_base, run, monkeypatch):
    expected = final_state(run("whole", own_base))

    def interrupt(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    step = HierBD3LMTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HierBD3LMTrainer, "training_step", interrupt)
        run("out", own_base)
    out = run("out", own_base, "--resume_from_checkpoint", "last")
    assert json.loads(Path(out, "trainer_state.json").read_text())["global_step"] == 4
    adapter = final_state(out)
    assert adapter.keys() == expected.keys()
    assert all(torch.equal(adapter[name], expected[name]) for name in expected)


def test_an_adapter_is_evaluated_like_its_merged_checkpoint(tied_base, run, tmp_path):
    out = run("out", tied_base)
    text = Path(train.__file__).with_name("docs").joinpath("training.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_adapter" in block)
    exec(code.replace("outputs/gsm8k_qwen3_lora", out).replace("outputs/merged", str(tmp_path / "merged")), {})
    options = ["--dataset", "synthetic", "--limit", "3", "--max_plan_len", "16", "--max_execution_len", "16"]
    answers = []
    for model in (out, str(tmp_path / "merged")):
        arguments = eval_gsm8k.parse_arguments(["--model", model, "--device", "cpu", *options])
        predictions, summary = evaluate(arguments)
        assert summary["n"] == 3
        answers.append([(row["plan"], row["execution"]) for row in predictions])
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_a_new_run_starts_from_an_adapter_in_full_or_with_a_new_adapter(tied_base, run):
    first = run("first", tied_base)
    whole = run("whole", first, use_peft=False, max_steps=1, save_strategy="no")
    start, end = load_adapter(first, "cpu")[0], HierBD3LMForBlockDiffusion.from_pretrained(whole)
    assert start.config.plan_block_size == end.config.plan_block_size == SETTINGS["block_size"]
    assert len(changed_rows(start.state_dict()[EMBEDDINGS], end.state_dict()[EMBEDDINGS])) > NUM_OLD_ROWS / 10
    second = run("second", first, max_steps=1, save_strategy="no", block_size=8)
    both = load_adapter(second, "cpu")[0]
    assert both.config.plan_block_size == 8
    start.config.plan_block_size = start.config.execution_block_size = 8
    start.order = BlockOrder.from_config(start.config)
    on_the_first = PeftModel.from_pretrained(start, second)
    torch.testing.assert_close(logits_of(both), logits_of(on_the_first), rtol=1e-4, atol=1e-5)


# Settings


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"lora_r": 0}, "`lora_r` must be at least 1, but got 0"),
        ({"lora_alpha": 0}, "`lora_alpha` must be at least 1, but got 0"),
        ({"lora_dropout": 1.0}, r"`lora_dropout` must be in \[0, 1\), but got 1.0"),
        ({"lora_modules_to_save": ["embed_tokens"]}, "`lora_modules_to_save` must not name the embeddings"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        add_adapter(make_model(), "somewhere", AdapterArguments(use_peft=True, **setting))


def test_a_head_with_a_bias_is_refused():
    backbone = PhiConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="`use_peft` must be False for a head with a bias"):
        add_adapter(make_model(backbone_config=backbone), "somewhere", AdapterArguments(use_peft=True))


def test_an_adapter_requires_a_base():
    with pytest.raises(ValueError, match="`use_peft` must be False without `init_from`"):
        ModelArguments(use_peft=True)


def test_fsdp_is_refused(tied_base, tmp_path, monkeypatch):
    def create_sharded(trainer):
        create(trainer)
        trainer.is_fsdp_enabled = True

    create = HierBD3LMTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(HierBD3LMTrainer, "create_accelerator_and_postprocess", create_sharded)
    arguments = HierBD3LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, ema_decay=0.0)
    with pytest.raises(ValueError, match="`fsdp` must be off for an adapter"):
        HierBD3LMTrainer(adapted(tied_base), arguments)
    HierBD3LMTrainer(make_model(), arguments)


def test_muon_is_refused(tied_base, tmp_path):
    arguments = HierBD3LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, muon_learning_rate=0.02)
    with pytest.raises(ValueError, match="`muon_learning_rate` must be None for an adapter"):
        HierBD3LMTrainer(adapted(tied_base), arguments)
