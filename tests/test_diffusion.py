import itertools
import math

import pytest
import torch

from hierbd3lm.diffusion_hierbd3lm import (
    ESTIMATORS,
    SCHEDULES,
    draw_mask,
    exact_nelbo,
    number_blocks,
    rank_in_block,
    subs_logits,
    token_nll,
)

from .tiny import layout_from_segments, make_batch, make_model

# Blocks of 4, 4 and 2 tokens in the first row, of 3 in the second; the rest is question or padding.
BLOCK_IDS = torch.tensor([[0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3], [-1, 0, 0, 1, 1, 1, 1, -1, -1, -1, -1]])
MASKABLE = (BLOCK_IDS > 0) & (torch.arange(11) != 3) | (BLOCK_IDS == 1) & (torch.arange(2)[:, None] == 0)


def draws(count, **settings):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield draw_mask(BLOCK_IDS, MASKABLE, generator=generator, **settings)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_goes_from_clean_to_masked_with_its_rate_and_inverse(name):
    schedule, t = SCHEDULES[name], torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    assert schedule.move_chance(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0, 1], abs=1e-6)
    p = schedule.move_chance(t)
    (derivative,) = torch.autograd.grad(p.sum(), t)
    torch.testing.assert_close(schedule.rate(t.detach()), derivative)
    torch.testing.assert_close(schedule.time(p.detach()), t.detach())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_only_maskable_tokens_are_masked_and_weights_are_zero_elsewhere(estimator):
    for draw in draws(50, estimator=estimator):
        assert not (draw.masked & ~MASKABLE).any()
        assert torch.equal(draw.weights > 0, draw.masked)


def test_stratified_draw_never_leaves_a_block_without_a_mask():
    for draw in draws(50, estimator="stratified"):
        for row in range(2):
            for block in BLOCK_IDS[row][MASKABLE[row]].unique():
                assert draw.masked[row][BLOCK_IDS[row] == block].any()


@pytest.mark.slow
@pytest.mark.parametrize("noise", SCHEDULES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_weighted_mask_of_every_token_has_expectation_one(noise, estimator):
    # If every token's NLL were 1, each would have a NELBO of exactly 1: sum over k of (1/k) * (k/m).
    count = 6000
    weights = torch.stack([draw.weights for draw in draws(count, noise=noise, estimator=estimator)])
    error = weights.std(dim=0) / math.sqrt(count)
    deviation = (weights.mean(dim=0) - 1)[MASKABLE] / error[MASKABLE].clamp(min=1e-9)
    assert deviation.abs().max() < 4.5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_noisy_copies_share_the_weight_of_one(estimator):
    count = 3000
    both = [draw.weights for draw in draws(count, estimator=estimator, noisy_copies=2)]
    weights = torch.stack(both).sum(dim=2)  # over the copies
    error = weights.std(dim=0) / math.sqrt(count)
    deviation = (weights.mean(dim=0) - 1)[MASKABLE] / error[MASKABLE].clamp(min=1e-9)
    assert deviation.abs().max() < 4.5
    assert not (both[0][:, 0] == both[0][:, 1]).all()


def brute_force_nelbo(cost_of_mask, size):
    """Sum over masks of a block by their definition: E over t of (1/t) * expected cost, by quadrature over t."""
    nodes = torch.linspace(0, 1, 20001, dtype=torch.float64)[1:] - 0.5 / 20000
    total = 0.0
    for bits in itertools.product([0, 1], repeat=size):
        k = sum(bits)
        if k:
            probability_over_t = (nodes ** (k - 1) * (1 - nodes) ** (size - k)).mean().item()  # with the 1/t inside
            total += probability_over_t * cost_of_mask(bits)
    return total


def test_exact_nelbo_equals_the_integral_over_t():
    table = {bits: float(torch.rand(()) * 5) for bits in itertools.product([0, 1], repeat=4)}
    block_ids = torch.tensor([[0, 1, 1, 1, 1]])

    def nll_of_mask(masked):
        bits = tuple(masked[0, 1:].int().tolist())
        return torch.full((sum(bits),), table[bits] / sum(bits))

    exact = exact_nelbo(nll_of_mask, block_ids, block_ids > 0).sum().item()
    assert exact == pytest.approx(brute_force_nelbo(table.__getitem__, 4), rel=1e-5)


def test_exact_nelbo_refuses_large_blocks():
    block_ids = torch.ones(1, 9, dtype=torch.long)
    with pytest.raises(ValueError, match="at most 8 tokens, got 9"):
        exact_nelbo(lambda masked: masked, block_ids, block_ids > 0)


def model_batch():
    """A model with blocks of 4, and a batch whose rows have different lengths."""
    model = make_model(plan_block_size=4, execution_block_size=3, block_size=None)
    batch = make_batch([(5, 1, 2), (3, 2, 1)], model.config)
    maskable = model.order.predicted(**batch)
    block_ids, position_ids = layout_from_segments(batch["segment_ids"], 4, 3)
    layout = {"block_ids": block_ids, "position_ids": position_ids}

    @torch.no_grad()
    def nll_of_mask(masked):
        return model.masked_nll(masked, batch["input_ids"], **layout)

    return nll_of_mask, block_ids, maskable


def estimates(estimator, count, nll_of_mask, block_ids, maskable, **settings):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        draw = draw_mask(block_ids, maskable, estimator=estimator, generator=generator, **settings)
        yield (draw.weights[draw.masked] * nll_of_mask(draw.masked)).sum().double()


@pytest.mark.slow
def test_both_estimators_converge_to_the_exact_nelbo_and_the_stratified_one_varies_less():
    setting = model_batch()
    exact = exact_nelbo(*setting).sum()
    variance = {}
    for estimator in ESTIMATORS:
        values = torch.stack(list(estimates(estimator, 1500, *setting)))
        variance[estimator] = values.var()
        assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(len(values))
        assert values.std() / math.sqrt(len(values)) < 0.05 * exact  # tight enough to tell
    assert variance["stratified"] < 0.7 * variance["bernoulli"]


def test_block_size_one_has_one_mask_of_weight_one():
    block_ids = torch.tensor([[0, 0, 1, 2, 3, 4]])
    for estimator in ESTIMATORS:
        draw = draw_mask(block_ids, block_ids > 0, clip=None, estimator=estimator)
        if estimator == "stratified":
            assert torch.equal(draw.masked, block_ids > 0)
            torch.testing.assert_close(draw.weights, (block_ids > 0).float())
    share = exact_nelbo(lambda masked: torch.arange(float(masked.sum())), block_ids, block_ids > 0)
    assert share.tolist() == [[0, 0, 0, 1, 2, 3]]


def test_levels_are_evenly_spread_over_the_blocks_and_tied_to_no_place():
    block_ids = torch.arange(1, 9).repeat_interleave(8)[None].repeat(2, 1)  # 16 blocks of 8 tokens
    generator = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(400):
        masked = draw_mask(block_ids, block_ids > 0, generator=generator).masked
        counts.append(masked.view(2, 8, 8).sum(dim=-1).flatten())
    counts = torch.stack(counts)
    # 16 strata over 8 mask counts: every draw has each count exactly twice
    assert all(torch.equal(row.bincount(minlength=9)[1:], torch.full((8,), 2)) for row in counts)
    # over the draws every block has every count equally often: mean 4.5, and no place stands out
    error = counts.float().std() / math.sqrt(len(counts))
    assert (counts.float().mean(dim=0) - 4.5).abs().max() < 4 * error


def test_clip_interval_bounds_the_share_of_masked_tokens_of_its_segment_only():
    block_ids = torch.arange(1, 5).repeat_interleave(10)[None].repeat(4, 1)
    clip = torch.tensor([0.3, 0.6]).expand(4, 40, 2).clone()
    clip[:, 20:] = torch.tensor([0.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack(
        [
            draw_mask(block_ids, block_ids > 0, clip, generator=generator).masked.view(4, 4, 10).sum(dim=-1)
            for _ in range(200)
        ]
    )
    assert set(counts[:, :, :2].unique().tolist()) == {4, 5, 6}
    assert set(counts[:, :, 2:].unique().tolist()) == set(range(1, 11))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_is_unbiased_under_clipping_at_zero_and_one(estimator):
    # The cost of a masked token is a parameter times the number of masks: its exact gradient is enumerable.
    block_ids = torch.tensor([[0, 1, 1, 1, 1]])
    parameter = torch.ones((), dtype=torch.float64, requires_grad=True)

    def nll_of_mask(masked):
        return parameter * masked.sum() * torch.arange(1.0, 5.0)[masked[0, 1:]]

    (exact,) = torch.autograd.grad(exact_nelbo(nll_of_mask, block_ids, block_ids > 0).sum(), parameter)
    clip = torch.tensor([0.0, 1.0]).expand(1, 5, 2)
    values = torch.stack(
        list(estimates(estimator, 4000, nll_of_mask, block_ids, block_ids > 0, clip=clip))
    )  # linear in the parameter, so value = gradient
    assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(len(values))


def test_rank_in_block_is_a_permutation_of_each_block():
    blocks = number_blocks(BLOCK_IDS, MASKABLE)
    rank = rank_in_block(blocks, torch.Generator().manual_seed(3))
    for row in range(2):
        for block in BLOCK_IDS[row][MASKABLE[row]].unique():
            inside = (BLOCK_IDS[row] == block) & MASKABLE[row]
            assert sorted(rank[row][inside].tolist()) == list(range(int(inside.sum())))


def test_same_generator_seed_gives_the_same_draw():
    first, second = (draw_mask(BLOCK_IDS, MASKABLE, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first.masked, second.masked) and torch.equal(first.weights, second.weights)


def test_the_mask_token_is_never_predicted():
    logits = torch.randn(3, 6)
    probabilities = subs_logits(logits, 4).softmax(dim=-1)
    assert (probabilities[:, 4] == 0).all()
    kept = [0, 1, 2, 3, 5]
    expected = -logits[:, kept].log_softmax(dim=-1)[range(3), [0, 2, 4]]
    torch.testing.assert_close(token_nll(logits, torch.tensor([0, 2, 5]), 4), expected)


@pytest.mark.parametrize(
    "setting, message", [({"noise": "linear"}, "`noise` must be"), ({"estimator": "x"}, "`estim")]
)
def test_unknown_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        draw_mask(BLOCK_IDS, MASKABLE, **setting)
