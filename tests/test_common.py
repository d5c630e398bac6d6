"""What transformers' tests ask of every model, over five backbones; the rest is in test_modeling, test_saving."""

import pytest
import torch
from transformers import AutoModel, BitsAndBytesConfig

from hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny_backbones import BACKBONES, ROWS, assert_close, logits_of, model_with, noisy_batch

QUESTIONS = torch.tensor([[0, 0, 7, 8, 9], [11, 5, 6, 7, 30]])


@pytest.fixture(params=BACKBONES)
def model(request):
    return model_with(request.param)


def answers_of(model):
    return model.generate(QUESTIONS, threshold=0.4).sequences


def test_shards_hold_the_model(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert torch.equal(answers_of(loaded), answers_of(model))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map_places_the_model(model, tmp_path, device_map):
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, device_map=device_map).eval()
    assert {parameter.device.type for parameter in loaded.parameters()} <= {"cpu", "cuda"}
    assert torch.equal(answers_of(loaded).cpu(), answers_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_loading_is_that_of_every_weight_and_of_what_is_saved(model, tmp_path, dtype):
    model.save_pretrained(tmp_path / "a")
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "a", dtype=dtype).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype} == {logits_of(loaded).dtype}
    assert answers_of(loaded).shape[0] == len(QUESTIONS)
    loaded.save_pretrained(tmp_path / "b")
    assert HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "b").dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_attention_implementations_agree(backbone):
    model = model_with(backbone, attn_implementation="eager")
    expected, answers = logits_of(model), answers_of(model)
    for implementation in ("sdpa", "flex_attention"):
        if backbone == "gemma2" and implementation == "sdpa":
            continue  # its soft cap of the scores is not in sdpa
        if implementation == "flex_attention" and backbone == "gpt2":
            continue  # transformers refuses it for learned positions
        model.set_attn_implementation(implementation)
        assert_close(logits_of(model), expected, atol=1e-4)
        if implementation == "sdpa":  # on a CPU, torch does not compile FlexAttention for the passes of `generate`
            assert torch.equal(answers_of(model), answers)


def test_a_row_of_a_batch_has_the_logits_and_the_answer_that_it_has_alone(model):
    batch, _ = noisy_batch(model.config)
    with torch.no_grad():
        together = model(**batch).logits
        for row in range(len(ROWS)):
            real = batch["segment_ids"][row] >= 0
            alone = model(**{name: value[row : row + 1, real] for name, value in batch.items()}).logits
            answer = batch["segment_ids"][row, real] > 0
            assert_close(alone[0, answer], together[row, real][answer], atol=1e-4)
    answers = model.generate(QUESTIONS)
    for row, question in enumerate(QUESTIONS):
        alone = model.generate(question[question != 0][None])
        length = alone.sequences.shape[1] - int((question != 0).sum())
        assert torch.equal(alone.sequences[0, -length:], answers.sequences[row, 5 : 5 + length])


def test_two_calls_give_the_same(model):
    assert torch.equal(logits_of(model), logits_of(model)) and torch.equal(answers_of(model), answers_of(model))


@torch.no_grad()
def test_embeddings_grow_and_shrink_with_their_head(model):
    batch, _ = noisy_batch(model.config)
    before = model(**batch).logits
    model.resize_token_embeddings(48)
    assert model.get_output_embeddings().weight.shape[0] == model.config.vocab_size == 48
    assert_close(model(**batch).logits[..., :40], before)
    model.resize_token_embeddings(40)
    assert_close(model(**batch).logits, before)


def test_gradient_checkpointing_is_switched_on_and_off(model):
    batch, masked = noisy_batch(model.config)
    model.train()
    losses = []
    for switch in (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        switch()
        torch.manual_seed(0)
        loss = model(**batch).logits[masked].logsumexp(dim=-1).sum()
        loss.backward()
        losses.append((loss.item(), model.get_input_embeddings().weight.grad.clone()))
        model.zero_grad()
    (loss, gradient), (expected, expected_gradient) = losses
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_close(gradient, expected_gradient, atol=1e-3)


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_loading_in_few_bits_is_that_of_the_library(tmp_path, bits):
    model_with("qwen3").save_pretrained(tmp_path)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="bitsandbytes"):
            AutoModel.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**{bits: True}))
    else:
        loaded = AutoModel.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**{bits: True}))
        assert answers_of(loaded).shape[0] == len(QUESTIONS)
