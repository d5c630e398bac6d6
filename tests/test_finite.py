"""Runs whose losses or weights become NaN or infinite."""

import math

import pytest
import torch
from safetensors.torch import load_file

from hierbd3lm.training.finite import check_weights

from .tiny_trainer import make_trainer, seeded_model

SAVED = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "ema_decay": 0.5, "num_examples": 12}


def break_at(trainer, step, how):
    """Call `how` with the model after the gradient of an update has been computed."""
    training_step = trainer.training_step

    def breaking(model, *args, **kwargs):
        loss = training_step(model, *args, **kwargs)
        if trainer.state.global_step == step - 1:
            how(trainer.model)
        return loss

    trainer.training_step = breaking


def break_gradient(model):
    next(model.parameters()).grad.fill_(math.nan)


def break_head(model):
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.inf)


def saved_weights(folder):
    return {path.parent.name: load_file(path) for path in folder.glob("checkpoint-*/model.safetensors")}


def test_weights_that_become_nan_are_not_saved_and_the_last_good_checkpoint_stays(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6, **SAVED)
    break_at(trainer, 3, break_gradient)
    with pytest.raises(FloatingPointError, match=r"the model is not saved, as \d+ of \d+ weights are NaN or infinite"):
        trainer.train()
    assert trainer.state.global_step == 3
    (saved,) = saved_weights(tmp_path).items()
    assert saved[0] == "checkpoint-2" and all(tensor.isfinite().all() for tensor in saved[1].values())
    resumed = make_trainer(tmp_path, max_steps=6, **SAVED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 6


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6, **(SAVED | {"save_strategy": "no"}))
    break_at(trainer, 2, break_head)
    with pytest.raises(FloatingPointError, match=r"the training loss of step 3 is (nan|inf): lower the learning rate"):
        trainer.train()
    assert trainer.state.global_step == 3


def test_the_loss_of_the_last_step_is_checked_before_the_model_is_saved(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[7] = math.nan
    trainer.train()
    with pytest.raises(FloatingPointError, match="the training loss of step 1 is nan"):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_run_continues_if_asked(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, stop_if_not_finite=False, **SAVED)
    break_at(trainer, 2, break_gradient)
    trainer.train()
    assert trainer.state.global_step == 4 and list(saved_weights(tmp_path)) == ["checkpoint-4"]


def test_frozen_weights_are_not_checked():
    model = seeded_model()
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match=r"such as backbone\.lm_head\.weight"):
        check_weights(model)
    head.requires_grad_(False)
    check_weights(model)
    model.requires_grad_(False)
    check_weights(model)
