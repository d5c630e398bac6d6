"""Average of the weights, checkpoints and resumption of the trainer."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Qwen3Config, TrainerCallback

from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.training.arguments import HierBD3LMTrainingArguments
from hierbd3lm.training.checkpoints import EMA_FILE, last_complete_checkpoint
from hierbd3lm.training.ema import EMACallback

from .tiny import make_config, make_model
from .tiny_trainer import assert_bit_equal, losses_of, make_trainer, weights_of


class Recorder(TrainerCallback):
    """Record the trained weights after each step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append(weights_of(model))


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# What a run shares with its checkpoint


@pytest.mark.parametrize(
    "part, files",
    [
        ("the optimizer", ["optimizer.pt"]),
        ("the learning rate schedule", ["scheduler.pt"]),
        ("the random generators", ["rng_state.pth"]),
    ],
)
def test_a_checkpoint_without_a_part_is_not_resumed_from(tmp_path, part, files):
    settings = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, **settings).train()
    for name in files:
        (tmp_path / "checkpoint-1" / name).unlink()
    message = (
        f"must be a complete checkpoint, but .* lacks {part} .*: start a new run from its weights with `init_from`"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_a_checkpoint_of_the_model_alone_is_not_resumed_from(tmp_path, ema_decay):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True, "ema_decay": ema_decay}
    make_trainer(tmp_path, **settings).train()
    with pytest.raises(ValueError, match="lacks the optimizer, the learning rate schedule, the random generators"):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields, difference",
    [
        ({"block_size": 2}, "execution_block_size: 4 stored, 2 now"),
        ({"algorithm": "bd3lm"}, "algorithm: 'hier' stored, 'bd3lm' now"),
        ({"plan_clip": [0.3, 0.8]}, r"plan_clip: \[0.0, 1.0\] stored, \[0.3, 0.8\] now"),
        ({"backbone": {"rms_norm_eps": 0.1}}, "backbone_config.rms_norm_eps: 1e-06 stored, 0.1 now"),
    ],
)
def test_a_checkpoint_of_another_model_is_not_resumed_from(tmp_path, fields, difference):
    settings = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, **settings).train()
    backbone = make_config().backbone_config
    for name, value in fields.pop("backbone", {}).items():
        setattr(backbone, name, value)
    model = make_model(backbone_config=backbone, **fields)
    with pytest.raises(ValueError, match=f"`resume_from_checkpoint` must be of the same model, .*{difference}"):
        make_trainer(tmp_path, model, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed, difference",
    [
        ({"per_device_train_batch_size": 4}, "total_train_batch_size: 4 stored, 8 now"),
        ({"gradient_accumulation_steps": 1}, "total_train_batch_size: 4 stored, 2 now"),
        ({"num_examples": 13}, "num_examples: 12 stored, 13 now"),
        ({"seed": 1}, "seed: 42 stored, 1 now"),
        ({"train_sampling_strategy": "random"}, "strategy: group_by_length stored, random now"),
    ],
)
def test_another_order_of_the_examples_is_refused(tmp_path, changed, difference):
    make_trainer(tmp_path, **RUN).train()
    folder = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=f"the order of the examples must be that of the checkpoint .*{difference}"):
        make_trainer(tmp_path, **(RUN | changed)).train(resume_from_checkpoint=folder)
    make_trainer(tmp_path, **(RUN | changed), ignore_data_skip=True).train(resume_from_checkpoint=folder)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["group_by_length", "random", "sequential"])
@pytest.mark.parametrize("batch_size, accumulated", [(4, 1), (1, 4)])
def test_another_split_of_the_batch_keeps_the_order_of_the_examples(tmp_path, sampling, batch_size, accumulated):
    def run(name, resume_from=None, **changed):
        seen = []
        trainer = make_trainer(tmp_path / name, **(RUN | {"train_sampling_strategy": sampling} | changed))
        compute_loss = trainer.compute_loss

        def recording(model, inputs, **kwargs):
            rows = zip(inputs["input_ids"].tolist(), inputs["segment_ids"].tolist(), strict=True)
            of_rows = [[token for token, segment in zip(*row, strict=True) if segment >= 0] for row in rows]
            seen.append((trainer.state.global_step, sorted(of_rows)))
            return compute_loss(model, inputs, **kwargs)

        trainer.compute_loss = recording
        trainer.train(resume_from_checkpoint=resume_from)
        steps = sorted({step for step, _ in seen})
        return {step: sorted(row for at, rows in seen if at == step for row in rows) for step in steps}

    whole = run("whole")
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-4"), **sizes)
    assert resumed == {step: whole[step] for step in (4, 5, 6)}
