"""Nothing needs float64 on a device that does not have it, such as a Mac's."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hierbd3lm import HierarchicalDataCollator, diffusion_hierbd3lm
from hierbd3lm.diffusion_hierbd3lm import draw_mask
from hierbd3lm.evaluation.likelihood import measure_batch, with_predicted_tokens
from hierbd3lm.training.objectives import make_objective

from .tiny import make_model
from .tiny_algorithms import ALL

EXAMPLES = [{"question_ids": [7, 8], "plan_ids": [10, 11, 12], "execution_ids": [15, 16]}]


class NoFloat64(TorchDispatchMode):
    """Raises where a float64 tensor is made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f"{func} made a float64 tensor")
        return result


@pytest.fixture
def without_float64(monkeypatch):
    monkeypatch.setattr(diffusion_hierbd3lm, "WITHOUT_FLOAT64", {"cpu"})
    with NoFloat64():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation(name, temperature, without_float64):
    model = make_model(**ALL[name])
    for sampler in ("first_hitting", "ancestral", "confidence", "entropy") if name != "ar" else ("confidence",):
        output = model.generate(torch.tensor([[7, 8, 9]]), sampler=sampler, temperature=temperature, seed=0)
        assert output.tokens_per_forward.dtype == torch.float32


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("estimator", ["stratified", "bernoulli"])
def test_likelihood(name, estimator, without_float64):
    model = make_model(**ALL[name])
    batch = with_predicted_tokens(model, HierarchicalDataCollator(model.config)(EXAMPLES))
    objective, generator = make_objective(model.config, estimator), torch.Generator().manual_seed(0)
    totals = measure_batch(objective, model, batch, 2, generator)
    assert totals.dtype == torch.float32
    assert totals.isfinite().all()
    if name in ("hier", "bd3lm", "ar"):
        assert measure_batch(objective, model, batch, 2, exact=True).isfinite().all()


def test_a_draw_of_masks_is_uniform_without_float64(without_float64):
    block_ids, maskable = torch.arange(64)[None] // 4, torch.ones(1, 64, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    masked = torch.stack([draw_mask(block_ids, maskable, generator=generator).masked[0] for _ in range(400)])
    assert (masked.view(400, 16, 4).any(dim=2)).all()
    rates = masked.float().view(400, 16, 4).mean(dim=(0, 1))
    assert ((rates - 0.625).abs() < 0.02).all()  # 1 to 4 of 4 tokens with equal probability
