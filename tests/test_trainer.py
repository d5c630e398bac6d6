"""Training of the trainer: loss, batches, logs and settings."""

import math
import re
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers.integrations.liger
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, Trainer, TrainerCallback

import hierbd3lm.trainer
import hierbd3lm.training.liger
import hierbd3lm.training.objectives
import hierbd3lm.training.progress
from hierbd3lm.data.loading import prepare_dataset
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.trainer import HierBD3LMTrainer
from hierbd3lm.training.arguments import HierBD3LMTrainingArguments

from .tiny import make_config, make_dataset, make_model
from .tiny_algorithms import ALL
from .tiny_tokenizer import make_config_for, make_tokenizer
from .tiny_trainer import (
    SEGMENTS,
    SGD,
    counted_tokens,
    fully_masked_nats,
    losses_of,
    make_trainer,
    nelbo_by_hand,
    seeded_model,
    weights_of,
    whole_batch,
)


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_compiled_model_has_the_loss_of_the_plain_one(tmp_path):
    """With the graphs and symbolic shapes of torch.compile, but without machine code, which takes minutes to make."""
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    plain, compiled = make_trainer(tmp_path), make_trainer(tmp_path, **settings)
    for trainer in (plain, compiled):
        trainer.train()
    assert losses_of(compiled) == pytest.approx(losses_of(plain), rel=1e-3)
    assert compiled.evaluate()["eval_nll"] == pytest.approx(plain.evaluate()["eval_nll"], rel=1e-3)


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
    trainer = make_trainer(tmp_path, max_steps=1, stop_if_not_finite=False)
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
        ({"muon_learning_rate": 0.1, "optim": "sgd"}, "`optim` must be one of adamw_torch, .*, but got 'sgd'"),
        ({"muon_learning_rate": 0.1, "optim_args": "a=1"}, "`optim_args` must be None with .*, but got 'a=1'"),
        ({"train_sampling_strategy": "grouped"}, "must be one of group_by_length, .*, but got 'grouped'"),
        ({"train_sampling_strategy": "randon"}, "but got 'randon'; did you mean 'random'?"),
        ({"fp16": True}, "`fp16` must be False on a CPU, .*, but got True"),
        ({"clip_search": [0.33]}, r"`clip_search` must be multiples of 1 / 20 .*, but got \[0.33\]"),
        ({"clip_search": [0.5], "clip_search_levels": 0}, "`clip_search_levels` must be at least 1, but got 0"),
        ({"noisy_copies": 0}, "`noisy_copies` must be at least 1, but got 0"),
        ({"eval_noise_draws": 0}, "`eval_noise_draws` must be at least 1, but got 0"),
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


def test_what_has_no_meaning_is_refused_by_name(tmp_path):
    arguments = HierBD3LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"`model_init` must be None, but got .*; give `model`"):
        HierBD3LMTrainer(None, arguments, model_init=make_model)
    with pytest.raises(ValueError, match="`model` must be a model, but got None"):
        HierBD3LMTrainer(None, arguments)
    trainer = make_trainer(tmp_path)
    for call in (trainer.predict, trainer.evaluation_loop, trainer.prediction_step):
        with pytest.raises(NotImplementedError, match=r"`evaluate\(dataset\)` measures the likelihood"):
            call(trainer.eval_dataset)
    empty = trainer.train_dataset.select([])
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=f"`{name}` must have at least one example, but has none"):
            HierBD3LMTrainer(make_model(), arguments, **{name: empty})


def test_an_optimizer_beside_muon_is_refused(tmp_path):
    model = make_model()
    arguments = HierBD3LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, muon_learning_rate=0.02)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for given in ({"optimizers": (sgd, None)}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}):
        with pytest.raises(ValueError, match="`muon_learning_rate` must be None if an optimizer is given"):
            HierBD3LMTrainer(model, arguments, **given)


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
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    llama = make_model(backbone_config=LlamaConfig(num_attention_heads=4, pad_token_id=None, **sizes))
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
