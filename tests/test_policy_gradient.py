"""Statistics of the benchmarks of reinforcement learning."""

import pytest
import torch

from hierbd3lm.benchmarks.grpo import compare_credits
from hierbd3lm.benchmarks.policy_gradient import noise_scale


def test_noise_is_the_variance_over_the_squared_norm_of_the_mean():
    draws = [torch.randn(5, generator=torch.Generator().manual_seed(seed)) + 1 for seed in range(6)]

    def by_pairs(draws):
        pairs = [one @ other for place, one in enumerate(draws) for other in draws[:place]]
        variance = torch.stack(draws).var(dim=0).sum()
        return variance, variance / (sum(pairs) / len(pairs))

    result = noise_scale(draws)
    variance, noise = by_pairs(draws)
    assert result["variance"] == pytest.approx(variance.item(), rel=1e-5)
    assert result["noise"] == pytest.approx(noise.item(), rel=1e-5)
    left_out = torch.stack([by_pairs(draws[:place] + draws[place + 1 :])[1] for place in range(6)])
    error = (5 / 6 * (left_out - left_out.mean()).square().sum()).sqrt()
    assert result["standard_error"] == pytest.approx(error.item(), rel=1e-4)


def test_the_noise_of_many_draws_is_that_of_their_distribution():
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([3.0, 0.0, -4.0])  # its squared norm is 25, and the variance of a draw 3 * 2 ** 2
    draws = [mean + 2 * torch.randn(3, generator=generator) for _ in range(2000)]
    assert noise_scale(draws)["noise"] == pytest.approx(12 / 25, rel=0.05)


def test_credits_are_compared_seed_by_seed():
    gains = {("segment", 0): 0.1, ("sequence", 0): 0.08, ("segment", 1): 0.12, ("sequence", 1): 0.06}
    rows = [{"credit": credit, "seed": seed, "gain": gain} for (credit, seed), gain in gains.items()]
    assert compare_credits(rows[:3]) is None
    compared = compare_credits(rows)
    half = 12.706 * (0.0008**0.5) / 2**0.5  # Student's quantile of one degree of freedom
    assert compared["mean"] == pytest.approx(0.04)
    assert compared["interval"] == pytest.approx([0.04 - half, 0.04 + half], rel=1e-3)
