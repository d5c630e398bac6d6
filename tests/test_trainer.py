import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers.integrations.liger
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen3Config, Trainer, TrainerCallback

import hierbd3lm.trainer
import hierbd3lm.training.liger
import hierbd3lm.training.objectives
import hierbd3lm.training.progress
from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.data.loading import prepare_dataset
from hierbd3lm.diffusion_hierbd3lm import MaskDraw, draw_mask, exact_nelbo
from hierbd3lm.evaluation.likelihood import likelihood_metrics, per_segment
from hierbd3lm.masking_hierbd3lm import EXECUTION, PLAN
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.trainer import HierBD3LMTrainer
from hierbd3lm.training.arguments import HierBD3LMTrainingArguments
from hierbd3lm.training.checkpoints import EMA_FILE, last_complete_checkpoint
from hierbd3lm.training.ema import EMACallback

from .tiny import make_config, make_dataset, make_model
from .tiny_algorithms import ALL
from .tiny_tokenizer import make_config_for, make_tokenizer

SEGMENTS = {"plan": PLAN, "execution": EXECUTION}
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "lr_scheduler_type": "constant"}


def seeded_model(**overrides):
    torch.manual_seed(0)
    return make_model(**overrides)


def make_trainer(folder, model=None, num_examples=8, callbacks=None, **settings):
    """A trainer on the CPU with random examples, and the same initial weights each time."""
    model = seeded_model() if model is None else model
    dataset = settings.pop("train_dataset", None) or make_dataset(num_examples, model.config)
    eval_dataset = settings.pop("eval_dataset", dataset)
    defaults = {
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "ema_decay": 0.0,
    }
    return HierBD3LMTrainer(
        model,
        HierBD3LMTrainingArguments(output_dir=str(folder), **(defaults | settings)),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=HierarchicalDataCollator(model.config),
        callbacks=callbacks,
    )


def whole_batch(trainer):
    return trainer.data_collator(list(trainer.train_dataset))


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_bit_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def losses_of(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def counted_tokens(dataset):
    """Plan and execution: their content and one <|end|> each."""
    return {segment: sum(len(row[f"{segment}_ids"]) + 1 for row in dataset) for segment in SEGMENTS}


def nelbo_by_hand(model, batch, masked, weights):
    """Compute the NELBO token by token, from the logits of every position."""
    xt = batch["input_ids"].masked_fill(masked, model.config.mask_token_id)
    logits = model(input_ids=batch["input_ids"], noisy_input_ids=xt, segment_ids=batch["segment_ids"]).logits
    total = 0.0
    for row, column in masked.nonzero().tolist():
        scores = logits[row, column].double()
        scores[model.config.mask_token_id] = -math.inf
        nll = scores.logsumexp(0) - scores[batch["input_ids"][row, column]]
        total += weights[row, column] * nll
    return total


def fully_masked_nats(model, batch):
    """The NELBO of blocks of one token."""
    maskable = model.order.predicted(batch["input_ids"], batch["segment_ids"])
    return nelbo_by_hand(model, batch, maskable, maskable.float())


class Recorder(TrainerCallback):
    """Record the trained weights after each step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append(weights_of(model))


@pytest.fixture
def draws(monkeypatch):
    """Record all noise draws, in order, with their clip intervals."""
    record = []

    def recording_draw_mask(block_ids, maskable, clip, *args):
        draw = draw_mask(block_ids, maskable, clip, *args)
        one_copy = MaskDraw(draw.masked[:, 0], draw.weights[:, 0])
        record.append(SimpleNamespace(draw=one_copy, clip=clip, block_ids=block_ids, maskable=maskable, copies=draw))
        return draw

    monkeypatch.setattr(hierbd3lm.training.objectives, "draw_mask", recording_draw_mask)
    return record


def mask_counts(record):
    """Number of masked tokens of each complete block of four."""
    counts = []
    for row in range(len(record.block_ids)):
        for block in record.block_ids[row][record.maskable[row]].unique():
            of_block = record.maskable[row] & (record.block_ids[row] == block)
            if of_block.sum() == 4:
                counts.append(int(record.draw.masked[row][of_block].sum()))
    return counts


# Training loss


@pytest.mark.parametrize("estimator", ["stratified", "bernoulli"])
@pytest.mark.parametrize("filler_weight", [1.0, 0.25])
def test_loss_is_the_weighted_nll_of_the_masked_tokens_per_counted_token(tmp_path, draws, estimator, filler_weight):
    trainer = make_trainer(tmp_path, estimator=estimator, filler_weight=filler_weight)
    batch, dataset = whole_batch(trainer), trainer.train_dataset
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
        draw = draws[0].draw
        is_first_end = (batch["labels"] == 1) & (batch["input_ids"] == 1)
        is_filler = (batch["input_ids"] == trainer.model.config.end_token_id) & ~is_first_end
        assert (is_filler & draw.masked).any()
        weights = torch.where(is_filler, filler_weight * draw.weights, draw.weights)
        nats = nelbo_by_hand(trainer.model, batch, draw.masked, weights)
    assert loss.item() == pytest.approx(nats.item() / sum(counted_tokens(dataset).values()), rel=1e-5)


def test_loss_of_several_noisy_copies_is_the_mean_of_theirs(tmp_path, draws):
    trainer = make_trainer(tmp_path, noisy_copies=3)
    batch = whole_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch).detach()
    copies, num_tokens = draws[0].copies, (batch["labels"] != -100).sum()
    assert copies.masked.shape == (len(batch["input_ids"]), 3, batch["input_ids"].shape[1])
    assert not torch.equal(copies.masked[:, 0], copies.masked[:, 1])
    nats = sum(
        nelbo_by_hand(trainer.model, batch, copies.masked[:, copy], copies.weights[:, copy]) for copy in range(3)
    )
    assert loss.item() == pytest.approx(float(nats / num_tokens), rel=1e-5)
    single = make_trainer(tmp_path, noisy_copies=1)
    single.compute_loss(single.model, batch)
    assert copies.weights.sum() < 2 * draws[1].draw.weights.sum()  # each copy has a third of the weight


@pytest.mark.parametrize("name", ALL)
def test_every_algorithm_learns_and_is_measured_on_the_same_tokens(tmp_path, name):
    settings = {"learning_rate": 3e-3, "max_steps": 12, "per_device_train_batch_size": 8, "ema_decay": 0.0}
    torch.manual_seed(0)
    model = HierBD3LMForBlockDiffusion._from_config(make_config(**ALL[name]))
    trainer = make_trainer(tmp_path, model, train_dataset=make_dataset(8, model.config), **settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_nll"] < 0.95 * before["eval_nll"]
    counts = counted_tokens(trainer.eval_dataset)
    assert {segment: after[f"eval_{segment}_num_tokens"] for segment in SEGMENTS} == counts


def test_filler_weight_does_not_apply_to_the_opener_that_a_flat_model_predicts(tmp_path):
    losses = {}
    for weight in (0.0, 1.0):
        trainer = make_trainer(tmp_path, seeded_model(algorithm="bd3lm", block_size=1), filler_weight=weight)
        losses[weight] = trainer.compute_loss(trainer.model, whole_batch(trainer)).item()
    assert losses[0.0] == losses[1.0]  # blocks of one token have no filler


def test_only_masked_positions_reach_the_head(tmp_path, draws):
    trainer, rows = make_trainer(tmp_path), []
    head = trainer.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[:-1].numel()))
    trainer.compute_loss(trainer.model, whole_batch(trainer))
    trainer.evaluate()
    assert len(rows) == 1 + trainer.args.eval_noise_draws
    assert rows == [int(record.draw.masked.sum()) for record in draws]


def test_gradient_of_accumulated_micro_batches_is_that_of_one_large_batch(tmp_path):
    def step(**sizes):
        model = seeded_model(block_size=1)  # every draw masks all tokens, with weight 1
        trainer = make_trainer(tmp_path, model, max_steps=1, **SGD, **sizes)
        trainer.train()
        return trainer, weights_of(model)

    large, expected = step(per_device_train_batch_size=8)
    model = seeded_model(block_size=1)
    loss = fully_masked_nats(model, whole_batch(large)) / sum(counted_tokens(large.train_dataset).values())
    loss.backward()
    for batch_size, accumulated in ((2, 4), (3, 3)):
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
        trainer, weights = step(**sizes)
        assert losses_of(trainer) == pytest.approx(losses_of(large), rel=1e-5)
        assert losses_of(trainer) == pytest.approx([loss.item()], rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(weights[name], expected[name], rtol=1e-4, atol=1e-5)
            by_hand = parameter.detach() - SGD["learning_rate"] * parameter.grad
            torch.testing.assert_close(weights[name], by_hand, rtol=1e-4, atol=1e-5)


def test_an_update_counts_every_content_and_first_end_token_of_its_micro_batches(tmp_path):
    counts = []

    class Counting(HierBD3LMTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            counts.append(int(num_items_in_batch))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer = make_trainer(tmp_path, num_examples=7, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer.__class__ = Counting
    trainer.args.max_steps = 1
    trainer.train()
    assert counts == [sum(counted_tokens(trainer.train_dataset).values())] * 4


def test_clip_intervals_apply_only_to_the_training_loss(tmp_path, draws):
    model = make_model(plan_clip=[0.3, 0.5], execution_clip=[0.8, 1.0])
    trainer = make_trainer(tmp_path, model, num_examples=24)
    batch = whole_batch(trainer)
    for _ in range(8):
        trainer.compute_loss(model, batch)
    seen = {segment: set() for segment in SEGMENTS}
    for record in draws:
        for segment, number in SEGMENTS.items():
            of_segment = record.maskable & (batch["segment_ids"] == number)
            seen[segment].update(mask_counts(SimpleNamespace(**vars(record) | {"maskable": of_segment})))
    assert seen == {"plan": {2}, "execution": {4}}  # ceil(4 p) masked tokens
    draws.clear()
    trainer.evaluate()
    assert {count for record in draws for count in mask_counts(record)} == {1, 2, 3, 4}


def test_noise_differs_between_steps_micro_batches_and_draws(tmp_path, draws):
    config = make_config()
    alike = Dataset.from_list(list(make_dataset(1, config)) * 4)
    trainer = make_trainer(tmp_path, train_dataset=alike, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    trainer.train()
    trainer.evaluate()
    masks = [tuple(record.draw.masked.flatten().tolist()) for record in draws[:4]]
    assert len(set(masks)) == 4
    assert len({tuple(record.draw.masked.flatten().tolist()) for record in draws[4:]}) == 4


# Evaluation


def exact_nats(model, batch):
    """NELBO of each segment in nats, by enumeration of the masks."""
    maskable = model.order.predicted(batch["input_ids"], batch["segment_ids"])
    nelbo = exact_nelbo(
        lambda masked: model.masked_nll(masked, batch["input_ids"], segment_ids=batch["segment_ids"]),
        batch["block_ids"],
        maskable,
    )
    return {name: nelbo[batch["segment_ids"] == segment].sum().item() for name, segment in SEGMENTS.items()}


@pytest.mark.parametrize("estimator, largest_error", [("stratified", 0.03), ("bernoulli", 0.08)])
def test_evaluation_is_the_exact_nelbo_within_noise(tmp_path, estimator, largest_error):
    sizes = {"block_size": None, "plan_block_size": 2, "execution_block_size": 4}
    model = make_model(plan_clip=[0.9, 1.0], execution_clip=[0.9, 1.0], **sizes)
    trainer = make_trainer(
        tmp_path,
        model,
        num_examples=24,
        eval_noise_draws=64,
        filler_weight=0.0,
        estimator=estimator,
        per_device_eval_batch_size=24,
    )
    metrics = trainer.evaluate()
    counts = counted_tokens(trainer.eval_dataset)
    with torch.no_grad():
        nats = exact_nats(model, whole_batch(trainer))
    expected = {f"{name}_": nats[name] / counts[name] for name in SEGMENTS}
    expected[""] = sum(nats.values()) / sum(counts.values())
    for prefix, nll in expected.items():
        measured, error = metrics[f"eval_{prefix}nll"], metrics[f"eval_{prefix}nll_stderr"]
        assert error < largest_error * nll
        assert abs(measured - nll) < 4 * error
        assert metrics[f"eval_{prefix}bpd"] == pytest.approx(measured / math.log(2))
        assert metrics[f"eval_{prefix}ppl"] == pytest.approx(math.exp(measured))
    assert metrics["eval_loss"] == metrics["eval_nll"]


def test_evaluation_counts_the_tokens_that_it_averages_over(tmp_path):
    trainer = make_trainer(tmp_path, num_examples=7, per_device_eval_batch_size=3)
    metrics, counts = trainer.evaluate(), counted_tokens(trainer.eval_dataset)
    assert metrics["eval_plan_num_tokens"] == counts["plan"]
    assert metrics["eval_execution_num_tokens"] == counts["execution"]
    assert metrics["eval_num_tokens"] == sum(counts.values())


def test_evaluation_depends_only_on_its_seed(tmp_path):
    trainer = make_trainer(tmp_path)
    first = trainer.evaluate()
    torch.manual_seed(1)
    assert trainer.evaluate()["eval_nll"] == first["eval_nll"]
    trainer.args.eval_seed = 1
    assert trainer.evaluate()["eval_nll"] != first["eval_nll"]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_does_not_depend_on_the_batch_size(tmp_path, batch_size):
    model = seeded_model(block_size=1)
    trainer = make_trainer(tmp_path, model, per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate()
    with torch.no_grad():
        nats = fully_masked_nats(model, whole_batch(trainer)).item()
    assert metrics["eval_nll"] == pytest.approx(nats / sum(counted_tokens(trainer.eval_dataset).values()), rel=1e-5)
    assert metrics["eval_nll_stderr"] == pytest.approx(0, abs=1e-6)


def test_filler_weight_does_not_change_evaluations(tmp_path):
    nlls = {make_trainer(tmp_path, filler_weight=weight).evaluate()["eval_nll"] for weight in (0.0, 1.0)}
    assert len(nlls) == 1


def test_several_datasets_are_evaluated_with_persistent_workers(tmp_path):
    config = make_config()
    datasets = {"few": make_dataset(2, config, seed=1), "many": make_dataset(5, config, seed=2)}
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_trainer(tmp_path, eval_dataset=datasets, per_device_eval_batch_size=2, **workers)
    metrics, again = trainer.evaluate(), trainer.evaluate()
    for name, dataset in datasets.items():
        assert metrics[f"eval_{name}_num_tokens"] == sum(counted_tokens(dataset).values())
        assert metrics[f"eval_{name}_nll"] == again[f"eval_{name}_nll"]


def test_evaluation_before_training_has_the_precision_of_training(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, learning_rate=0.0, max_steps=1)
    before = trainer.evaluate()["eval_nll"]
    trainer.train()
    assert trainer.evaluate()["eval_nll"] == before
    assert before != make_trainer(tmp_path).evaluate()["eval_nll"]


def test_evaluation_restores_the_mode_of_the_model(tmp_path):
    trainer = make_trainer(tmp_path)
    for training in (True, False):
        trainer.model.train(training)
        trainer.evaluate()
        assert trainer.model.training is training


def test_likelihood_metrics_of_a_small_table():
    nats = torch.tensor([[1.0, 6.0], [3.0, 8.0]], dtype=torch.float64)
    metrics = likelihood_metrics(nats, torch.tensor([2.0, 4.0], dtype=torch.float64))
    assert metrics["plan_nll"] == pytest.approx((0.5 + 1.5) / 2)
    assert metrics["execution_nll"] == pytest.approx((1.5 + 2.0) / 2)
    assert metrics["nll"] == pytest.approx((7 / 6 + 11 / 6) / 2)
    assert metrics["plan_nll_stderr"] == pytest.approx(0.5)  # standard deviation 1 / sqrt(2), over sqrt(2)
    assert (metrics["plan_num_tokens"], metrics["execution_num_tokens"], metrics["num_tokens"]) == (2, 4, 6)
    assert metrics["bpd"] == pytest.approx(1.5 / math.log(2))
    assert metrics["ppl"] == pytest.approx(math.exp(1.5))


def test_per_segment_confines_non_finite_values_to_their_segment():
    values = torch.tensor([[1.0, 2.0, math.nan, 4.0, math.inf]])
    segments = torch.tensor([[0, 1, 2, 1, -1]])
    plan, execution = per_segment(values, segments)[0].tolist()
    assert plan == 6
    assert math.isnan(execution)


# Average of the weights


def test_average_is_the_recurrence_over_the_weights_of_every_step(tmp_path):
    recorder, model = Recorder(), make_model()
    average = weights_of(model)
    trainer = make_trainer(tmp_path, model, callbacks=[recorder], ema_decay=0.3, max_steps=6)
    trainer.train()
    for n, weights in enumerate(recorder.weights):
        decay = min(0.3, (1 + n) / (10 + n))  # 0.1, 2/11, 3/12, 4/13 -> 0.3, 0.3
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    trained = weights_of(model)
    assert_bit_equal(trained, recorder.weights[-1])

    trainer.save_model(str(tmp_path / "saved"))
    saved = weights_of(HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "saved"))
    for name in average:
        torch.testing.assert_close(saved[name], average[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(saved[name], trained[name], atol=1e-5), name

    of_average = trainer.evaluate()["eval_nll"]
    assert_bit_equal(weights_of(model), trained)
    saved_model = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "saved")
    assert of_average == make_trainer(tmp_path, saved_model).evaluate()["eval_nll"]
    assert of_average != make_trainer(tmp_path, model).evaluate()["eval_nll"]


def test_default_decay_is_reached_by_a_warm_up():
    assert HierBD3LMTrainingArguments(output_dir="x", use_cpu=True).ema_decay == 0.9999
    model = torch.nn.Linear(1, 1, bias=False)
    ema, state = EMACallback(0.9999), SimpleNamespace(global_step=0)
    torch.nn.init.zeros_(model.weight)
    ema.on_train_begin(None, state, None, model=model)
    torch.nn.init.ones_(model.weight)
    remains = 1.0
    for n in range(30):
        ema.on_step_end(None, state, None, model=model)
        remains *= (1 + n) / (10 + n)
    assert ema.average["weight"].item() == pytest.approx(1 - remains, rel=1e-5)


def test_average_of_low_precision_weights_is_kept_in_float32():
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    ema = EMACallback(0.9999)
    ema.restart(model)
    ema.num_updates = 10**6
    torch.nn.init.constant_(model.weight, 2.0)
    ema.on_step_end(None, None, None, model=model)
    assert ema.average["weight"].item() == pytest.approx(1.0001, rel=1e-6)  # 1 in bfloat16


def test_trained_weights_are_restored_when_an_evaluation_fails(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.5)
    trainer.train()
    trained = weights_of(trainer.model)
    with pytest.raises(ValueError, match="question_ids"):
        trainer.evaluate(Dataset.from_list([{"length": 3}]))
    assert_bit_equal(weights_of(trainer.model), trained)


def test_a_new_run_starts_a_new_average(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.5, max_steps=1)
    trainer.train()
    start = weights_of(trainer.model)
    trainer.train()
    end = weights_of(trainer.model)
    for name, average in trainer.ema.average.items():
        torch.testing.assert_close(average, 0.1 * start[name] + 0.9 * end[name])


# Reproducibility and checkpoints

RUN = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 7,  # 12 examples, 3 steps per epoch
    "num_examples": 12,
    "ema_decay": 0.9,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_noise_draws": 1,
    "save_strategy": "steps",
    "save_steps": 1,
}


def make_dropout_model():
    """A model with dropout, so that each forward pass depends on torch's global generator."""
    backbone = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        attention_dropout=0.2,
        pad_token_id=None,
    )
    torch.manual_seed(3)
    return make_model(backbone_config=backbone)


def final_state(trainer):
    state = weights_of(trainer.model) | {f"average.{k}": v for k, v in trainer.ema.average.items()}
    for number, moments in trainer.optimizer.state_dict()["state"].items():
        state |= {f"{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    return state | {"num_updates": torch.tensor(trainer.ema.num_updates)}


@pytest.mark.parametrize("sampling", ["group_by_length", "random"])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, draws, sampling):
    whole = make_trainer(tmp_path, make_dropout_model(), train_sampling_strategy=sampling, **RUN)
    whole.train()
    expected, masks = final_state(whole), [record.draw.masked for record in draws]
    for step in (2, 3, 5):  # within the first epoch, at its end, within the second
        draws.clear()
        torch.manual_seed(step)
        resumed = make_trainer(tmp_path, make_dropout_model(), train_sampling_strategy=sampling, **RUN)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_bit_equal(final_state(resumed), expected)
        assert 0 < len(draws) < len(masks)
        for record, mask in zip(draws, masks[-len(draws) :], strict=True):
            assert torch.equal(record.draw.masked, mask)
        assert losses_of(resumed) == losses_of(whole)
        assert losses_of(resumed, "eval_nll") == losses_of(whole, "eval_nll")


def test_a_resumed_run_with_muon_equals_an_uninterrupted_one(tmp_path):
    settings = RUN | {"muon_learning_rate": 0.02, "lr_scheduler_type": "cosine"}
    whole = make_trainer(tmp_path, make_dropout_model(), **settings)
    whole.train()
    resumed = make_trainer(tmp_path, make_dropout_model(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_bit_equal(weights_of(resumed.model), weights_of(whole.model))
    adam_only = make_trainer(tmp_path / "adam", make_dropout_model(), **(settings | {"muon_learning_rate": None}))
    adam_only.train()
    assert not torch.equal(
        *(next(t for n, t in weights_of(x.model).items() if "proj" in n) for x in (whole, adam_only))
    )


def test_runs_are_bit_equal_only_with_the_same_seed(tmp_path):
    def run(seed):
        trainer = make_trainer(tmp_path, make_dropout_model(), seed=seed, **(RUN | {"save_strategy": "no"}))
        torch.rand(seed)
        trainer.train()
        return final_state(trainer)

    first = run(seed=5)
    assert_bit_equal(first, run(seed=5))
    assert not torch.equal(first["backbone.lm_head.weight"], run(seed=6)["backbone.lm_head.weight"])


def test_a_checkpoint_holds_the_average_as_its_model(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.5, save_strategy="steps", save_steps=2)
    trainer.train()
    model = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "checkpoint-2")
    assert_bit_equal(weights_of(model), trainer.ema.average)


def test_only_the_averaged_model_is_pushed(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.5)
    trainer.train()
    trainer.save_model(_internal_call=True)  # as `push_to_hub` calls it
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / EMA_FILE).exists()


def test_resuming_with_and_without_an_average_cannot_be_mixed(tmp_path):
    for folder, decay in (("with", 0.5), ("without", 0.0)):
        make_trainer(tmp_path / folder, ema_decay=decay, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="`ema_decay` must be > 0"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "with" / "checkpoint-2"))
    with pytest.raises(ValueError, match="`ema_decay` must be 0"):
        make_trainer(tmp_path, ema_decay=0.5).train(resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-2"))


def test_last_complete_checkpoint_skips_incomplete_ones(tmp_path):
    assert last_complete_checkpoint(str(tmp_path)) is None
    assert last_complete_checkpoint(str(tmp_path / "missing")) is None
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=10).train()
    last = tmp_path / "checkpoint-10" / "trainer_state.json"
    assert last_complete_checkpoint(str(tmp_path)) == str(last.parent)
    text = last.read_text()
    for torn in (text[: len(text) // 2], "", "\x00" * 10):
        last.write_text(torn)
        assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-9")
    last.write_bytes(b"\xff\xfe")
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-9")
    last.unlink()
    (tmp_path / "checkpoint-9" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-8")


@pytest.mark.parametrize("metric", [None, "nll", "eval_execution_ppl"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_best_model_is_the_one_with_the_lowest_likelihood_bound(tmp_path, metric, ema_decay):
    trainer = make_trainer(
        tmp_path,
        max_steps=5,
        learning_rate=0.3,
        warmup_steps=2,
        ema_decay=ema_decay,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
    )
    trainer.train()
    name = {None: "eval_loss", "nll": "eval_nll"}.get(metric, metric)
    values = losses_of(trainer, name)
    best = min(range(5), key=values.__getitem__)
    assert best != max(range(5), key=values.__getitem__)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best + 1}")
    assert_bit_equal(weights_of(trainer.model), load_file(tmp_path / f"checkpoint-{best + 1}" / "model.safetensors"))
    assert trainer.evaluate()[name] == values[best]


# Batches and logs


def test_batches_are_grouped_by_length_with_every_example_once_per_epoch(tmp_path):
    tokenizer = make_tokenizer()
    config = make_config_for(tokenizer, question_len=64)
    lengths = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    texts = Dataset.from_list([{"question": "x" * (n + 1), "plan": "a", "execution": "b"} for n in lengths])
    dataset, _ = prepare_dataset(texts, tokenizer, config)
    model = HierBD3LMForBlockDiffusion._from_config(config)

    def epoch(strategy, number):
        trainer = make_trainer(tmp_path, model, train_dataset=dataset, train_sampling_strategy=strategy)
        trainer.state.epoch = float(number)
        return list(trainer.get_train_dataloader())

    def num_padding(batches):
        return sum(int((batch["segment_ids"] == -1).sum()) for batch in batches)

    grouped = epoch("group_by_length", 0)
    assert num_padding(grouped) < 0.4 * num_padding(epoch("random", 0))
    for batches in (grouped, epoch("group_by_length", 1)):
        questions = [int(n) for batch in batches for n in (batch["segment_ids"] == 0).sum(dim=1)]
        assert Counter(questions) == Counter(n + 1 for n in lengths)
    again = epoch("group_by_length", 0)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(grouped, again, strict=True))
    other = epoch("group_by_length", 1)
    assert [b["input_ids"].shape for b in grouped] != [b["input_ids"].shape for b in other]


def test_grouping_without_lengths_is_refused(tmp_path):
    dataset = make_dataset(8, make_config()).remove_columns("length")
    with pytest.raises(ValueError, match="a dataset must have the column `length`"):
        make_trainer(tmp_path, train_dataset=dataset).train()
    make_trainer(tmp_path, train_dataset=dataset, train_sampling_strategy="random").train()


def test_logs_show_the_loss_of_each_segment(tmp_path):
    trainer = make_trainer(
        tmp_path,
        seeded_model(block_size=1),
        per_device_train_batch_size=8,
        logging_steps=2,
        learning_rate=0.0,
    )
    trainer.train()
    counts, metrics = counted_tokens(trainer.train_dataset), trainer.evaluate()
    logs = trainer.state.log_history[0]
    for segment in SEGMENTS:
        assert logs[f"loss_{segment}"] == pytest.approx(metrics[f"eval_{segment}_nll"], rel=1e-5)
    together = sum(logs[f"loss_{segment}"] * counts[segment] for segment in SEGMENTS) / sum(counts.values())
    assert logs["loss"] == pytest.approx(together, rel=1e-5)


def test_throughput_excludes_padding_and_evaluation_time(tmp_path, monkeypatch):
    class Clock(TrainerCallback):
        now = 0.0

        def on_train_begin(self, *args, **kwargs):
            self.now += 1000

        def on_step_end(self, *args, **kwargs):
            self.now += 2

        def on_prediction_step(self, *args, **kwargs):
            self.now += 100

    clock = Clock()
    for module in (hierbd3lm.trainer, hierbd3lm.training.progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "logging_steps": 2, "max_steps": 4}
    trainer = make_trainer(tmp_path, callbacks=[clock], per_device_train_batch_size=8, **settings)
    trainer.train()
    num_tokens = sum(trainer.train_dataset["length"])
    assert losses_of(trainer, "tokens_per_second") == pytest.approx([2 * num_tokens / 4] * 2)


def test_a_non_finite_loss_is_logged(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[7] = math.nan
    trainer.train()
    assert math.isnan(losses_of(trainer)[0])
    assert math.isnan(losses_of(trainer, "loss_execution")[0])
    assert math.isnan(trainer.evaluate()["eval_nll"])


# Settings


def test_the_docstring_names_every_method_of_transformers_that_is_overridden():
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^ +- (.*?):", HierBD3LMTrainer.__doc__, re.MULTILINE)))
    own = {name for name in vars(HierBD3LMTrainer) if callable(getattr(Trainer, name, None)) and name[:2] != "__"}
    assert set(named) == own


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"estimator": "exact"}, "`estimator` must be one of stratified, bernoulli, but got 'exact'"),
        ({"filler_weight": -0.1}, "`filler_weight` must be >= 0, but got -0.1"),
        ({"filler_weight": math.nan}, "`filler_weight` must be >= 0, but got nan"),
        ({"ema_decay": 1.0}, r"`ema_decay` must be in \[0, 1\), but got 1.0"),
        ({"ema_decay": -0.5}, r"`ema_decay` must be in \[0, 1\), but got -0.5"),
        ({"muon_learning_rate": 0.0}, "`muon_learning_rate` must be > 0 or None, but got 0.0"),
        ({"noisy_copies": 0}, "`noisy_copies` must be >= 1, but got 0"),
        ({"eval_noise_draws": 0}, "`eval_noise_draws` must be >= 1, but got 0"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` must be 0 for a NELBO, but got 0.1"),
        ({"dataloader_drop_last": True}, "`dataloader_drop_last` must be False, but got True"),
        ({"bf16_full_eval": True}, "`bf16_full_eval` must be False, but got True"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        HierBD3LMTrainingArguments(output_dir="x", use_cpu=True, **setting)


def test_noisy_copies_of_an_objective_without_noise_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`noisy_copies` must be 1 for an objective without noise, but got 2"):
        make_trainer(tmp_path, make_model(algorithm="ar", block_size=None), noisy_copies=2)


def test_custom_metrics_are_refused(tmp_path):
    arguments = HierBD3LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="`compute_metrics` must be None"):
        HierBD3LMTrainer(make_model(), arguments, compute_metrics=lambda prediction: {})


def test_processes_that_share_a_batch_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(HierBD3LMTrainer, "get_tp_size", lambda trainer: 2)
    with pytest.raises(ValueError, match="2 processes share a batch"):
        make_trainer(tmp_path)


# liger-kernel is mocked, as it requires a GPU. With Triton's interpreter its kernels gave the same loss and gradient.


@pytest.fixture
def liger(monkeypatch):
    """Record the calls of Liger's function."""
    calls = []
    package = ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = lambda model, **kwargs: calls.append((model, kwargs))
    table = ModuleType("liger_kernel.transformers.monkey_patch")
    table.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen3": None}
    for module in (ModuleType("liger_kernel"), package, table):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for module in (hierbd3lm.training.liger, transformers.integrations.liger):
        monkeypatch.setattr(module, "is_liger_kernel_available", lambda: True)
    return calls


def test_liger_kernels_are_applied_to_the_backbone_without_the_fused_loss(tmp_path, liger):
    model = make_model()
    make_trainer(tmp_path, model, use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert liger == [(model.backbone, {"fused_linear_cross_entropy": False, "rope": False})]
    adapted = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
    make_trainer(tmp_path, adapted, use_liger_kernel=True)
    assert liger[1] == (adapted.base_model.model.backbone, {"fused_linear_cross_entropy": False})


def test_unsupported_liger_kernels_are_refused(tmp_path, liger, monkeypatch):
    with pytest.raises(ValueError, match="`liger_kernel_config` must be without fused_linear_cross_entropy"):
        make_trainer(tmp_path, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})
    llama = make_model(backbone_config=make_config().backbone_config.to_dict() | {"model_type": "llama"})
    with pytest.raises(ValueError, match="`use_liger_kernel` must be False for a backbone of type 'llama'"):
        make_trainer(tmp_path, llama, use_liger_kernel=True)
    for module in (hierbd3lm.training.liger, transformers.integrations.liger):
        monkeypatch.setattr(module, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ImportError, match="liger-kernel"):
        make_trainer(tmp_path, use_liger_kernel=True)
    assert not liger


@pytest.mark.parametrize("metric, greater", [("eval_plan_bpd", False), ("ppl", False), ("accuracy", True)])
def test_lower_is_better_for_metrics_of_the_bound(metric, greater):
    settings = {"metric_for_best_model": metric, "use_cpu": True, "output_dir": "x"}
    assert HierBD3LMTrainingArguments(**settings).greater_is_better is greater
    assert HierBD3LMTrainingArguments(**settings, greater_is_better=True).greater_is_better is True


# Several processes

DISTRIBUTED_SCRIPT = """
import json, sys
from pathlib import Path
from datasets import load_from_disk
from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.trainer import HierBD3LMTrainer
from hierbd3lm.training.arguments import HierBD3LMTrainingArguments

folder = Path(sys.argv[1])
model = HierBD3LMForBlockDiffusion.from_pretrained(folder / "model")
arguments = HierBD3LMTrainingArguments(output_dir=str(folder / "run"), **json.loads(sys.argv[2]))
trainer = HierBD3LMTrainer(
    model,
    arguments,
    train_dataset=load_from_disk(folder / "train"),
    eval_dataset=load_from_disk(folder / "eval"),
    data_collator=HierarchicalDataCollator(model.config),
)
assert trainer.accelerator.num_processes == 2 and model.device.type == "cpu"
trainer.train()
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    (folder / "metrics.json").write_text(json.dumps({"eval": metrics, "logs": trainer.state.log_history}))
trainer.accelerator.end_training()
"""


def launch_two_processes(folder, settings):
    """Launch two processes on the CPU with gloo. `accelerate launch --cpu` would start a single process."""
    script = folder / "script.py"
    script.write_text(DISTRIBUTED_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(script), str(folder), json.dumps(settings)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch_size(tmp_path):
    model = seeded_model(block_size=1)
    # the same length for all, so that one and two processes see the examples in the same order
    train = make_dataset(12, model.config).map(lambda row: {"length": 1})
    held_out = make_dataset(7, model.config, seed=1)  # the last batch is not full
    model.save_pretrained(tmp_path / "model")
    train.save_to_disk(tmp_path / "train")
    held_out.save_to_disk(tmp_path / "eval")
    settings = SGD | {"use_cpu": True, "max_steps": 3, "logging_steps": 1, "disable_tqdm": True, "ema_decay": 0.3}
    settings |= {"per_device_eval_batch_size": 2, "save_strategy": "steps", "save_steps": 3}
    launch_two_processes(tmp_path, settings | {"per_device_train_batch_size": 2})
    datasets = {"train_dataset": train, "eval_dataset": held_out}
    alone = make_trainer(tmp_path / "alone", model, per_device_train_batch_size=4, **datasets, **settings)
    alone.train()
    for file in ("model.safetensors", EMA_FILE):
        together = load_file(tmp_path / "run" / "checkpoint-3" / file)
        expected = load_file(tmp_path / "alone" / "checkpoint-3" / file)
        for name, tensor in together.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    results, metrics = json.loads(Path(tmp_path, "metrics.json").read_text()), alone.evaluate()
    assert results["eval"]["eval_num_tokens"] == sum(counted_tokens(held_out).values())
    for name in ("eval_nll", "eval_plan_nll", "eval_execution_nll"):
        assert results["eval"][name] == pytest.approx(metrics[name], rel=1e-4)
    for name in ("loss", "loss_plan", "loss_execution"):
        together = [entry[name] for entry in results["logs"] if name in entry]
        assert together == pytest.approx(losses_of(alone, name), rel=1e-4)
