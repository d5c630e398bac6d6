"""Muon and AdamW combined take the same steps as each alone, and resume from a saved state."""

import copy

import pytest
import torch
from transformers import GPT2Config

from hierbd3lm.training import muon
from hierbd3lm.training.muon import MuonAdamW, StackedMuon, orthogonalize, split_parameters

from .tiny import make_batch, make_model

SETTINGS = {"muon_lr": 0.03, "lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-9, "weight_decay": 0.1}


def take_steps(model, optimizers, count, first=0):
    batch = make_batch([(5, 2, 2), (3, 1, 2)], model.config)
    maskable = model.order.predicted(**batch)
    for number in range(first, first + count):
        masked = maskable & (torch.rand(maskable.shape, generator=torch.Generator().manual_seed(number)) < 0.7)
        model.masked_nll(masked, **batch).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(first, second):
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_steps_equal_those_of_muon_and_adamw():
    model = make_model()
    alone = copy.deepcopy(model)
    together = take_steps(model, [MuonAdamW(*split_parameters(model), **SETTINGS)], 3)
    inner = [parameter for name, parameter in alone.named_parameters() if "proj" in name]
    outer = [parameter for name, parameter in alone.named_parameters() if "proj" not in name]
    muon = StackedMuon(inner, lr=0.03, weight_decay=0.1)
    adamw = torch.optim.AdamW(outer, lr=0.01, betas=(0.9, 0.95), eps=1e-9, weight_decay=0.0)
    assert_same(together, take_steps(alone, [muon, adamw], 3))


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_steps_of_stacked_matrices_equal_those_of_torch(at_once, monkeypatch):
    monkeypatch.setattr(muon, "STACKED_ELEMENTS", at_once)
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 12), (12, 30), (30, 12), (12, 12)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}
    optimizers = StackedMuon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for number in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            skipped = number == 2 and mine.shape == (12, 30)
            mine.grad = None if skipped else torch.randn(mine.shape, generator=generator)
            other.grad = None if skipped else mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for before, mine, other in zip(start, ours, theirs, strict=True):
        assert (mine - other).norm() < 0.02 * (other - before).norm()  # torch rounds to bfloat16


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 20), (2, 20, 5)])
def test_orthogonalizing_applies_its_polynomial_to_the_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    a, b, c = coefficients = (3.4445, -4.775, 2.0315)
    u, s, vh = torch.linalg.svd(matrices.double() / matrices.double().norm(dim=(-2, -1), keepdim=True), False)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag_embed(s) @ vh
    torch.testing.assert_close(orthogonalize(matrices, coefficients, 5, 1e-7).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_head_and_positions_do_not_count_as_matrices(tied):
    sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = make_model(backbone_config=GPT2Config(**sizes, tie_word_embeddings=tied))
    matrices, others = split_parameters(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[parameter].rsplit(".", 2)[1] for parameter in matrices} == {"c_attn", "c_proj", "c_fc"}
    assert len(matrices) + len(others) == len(names)
    assert {"backbone.transformer.wte.weight", "backbone.transformer.wpe.weight"} <= {names[p] for p in others}


def test_frozen_weights_are_left_out():
    model = make_model()
    model.backbone.model.layers[0].requires_grad_(False)
    matrices, others = split_parameters(model)
    assert all(parameter.requires_grad for parameter in matrices + others)
    assert len(matrices) == 7  # of the other layer


def test_one_schedule_sets_both_rates_before_and_after_a_resume():
    model = make_model()
    optimizer = MuonAdamW(*split_parameters(model), **SETTINGS)
    optimizer.load_state_dict(optimizer.state_dict())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.015, 0.005]
    assert optimizer.parts[0].param_groups[0]["lr"] == 0.015
    assert optimizer.parts[1].param_groups[0]["lr"] == 0.005


def test_a_restored_state_gives_the_same_steps():
    model = make_model()
    optimizer = MuonAdamW(*split_parameters(model), **SETTINGS)
    take_steps(model, [optimizer], 2)
    resumed = copy.deepcopy(model)
    other = MuonAdamW(*split_parameters(resumed), **SETTINGS)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(take_steps(model, [optimizer], 2, first=2), take_steps(resumed, [other], 2, first=2))
