"""Evaluations of the trainer."""

import math

import pytest
import torch

from hierbd3lm.diffusion_hierbd3lm import exact_nelbo
from hierbd3lm.evaluation.likelihood import likelihood_metrics, per_segment

from .tiny import make_config, make_dataset, make_model
from .tiny_trainer import SEGMENTS, counted_tokens, fully_masked_nats, make_trainer, seeded_model, whole_batch


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
    assert "eval_nll_stderr" not in metrics  # blocks of one token have no noise: one pass


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
