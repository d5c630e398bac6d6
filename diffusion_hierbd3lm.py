"""The mathematics of absorbing-state block diffusion: noise schedules, which tokens are masked, and the NELBO.

With mask probability p(t) rising from 0 to 1, the SUBS parameterisation and a block of x0, the bound on -log p(x0) is

    NELBO = E_t [ p'(t) / p(t) * sum of -log p_model(x0_i | xt) over the masked i ]

(Sahoo et al. 2024, "Simple and Effective Masked Diffusion Language Models", eq. 10; per block: Arriola et al. 2025,
"Block Diffusion", eq. 8). Integrating t out leaves a sum over the number k of masked tokens of a block of m,

    NELBO = sum over k = 1..m of (1 / k) * mean over masks of size k of the masked tokens' sum,

whatever the schedule. The first form is estimated by [`bernoulli_mask`], the second by [`stratified_mask`] and, in
full, by [`exact_nelbo`].
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

ESTIMATORS = ("stratified", "bernoulli")
MAX_EXACT_BLOCK_SIZE = 8
WITHOUT_FLOAT64 = {"mps"}  # types of devices


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device that has no float64, such as a Mac's."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


@dataclass(frozen=True)
class NoiseSchedule:
    """Mask probability `p = move_chance(t)` for t in [0, 1], its derivative `rate(t)` and its inverse `time(p)`."""

    move_chance: Callable[[torch.Tensor], torch.Tensor]
    rate: Callable[[torch.Tensor], torch.Tensor]
    time: Callable[[torch.Tensor], torch.Tensor]


# The schedules of BD3-LM, appendix C.1 ("loglinear" names alpha = 1 - t by its log-linear total noise).
SCHEDULES = {
    "loglinear": NoiseSchedule(lambda t: t, torch.ones_like, lambda p: p),
    "square": NoiseSchedule(lambda t: t**2, lambda t: 2 * t, torch.sqrt),
    "cosine": NoiseSchedule(
        lambda t: 1 - torch.cos(math.pi / 2 * t),
        lambda t: math.pi / 2 * torch.sin(math.pi / 2 * t),
        lambda p: 2 / math.pi * torch.acos(1 - p),
    ),
    "log": NoiseSchedule(
        lambda t: torch.log1p(t) / math.log(2),
        lambda t: 1 / ((1 + t) * math.log(2)),
        lambda p: torch.exp2(p) - 1,
    ),
}


@dataclass(frozen=True)
class MaskDraw:
    """One draw of the forward process.

    Args:
        masked (`torch.BoolTensor` of shape `(batch, length)`, or `(batch, copies, length)` for several noisy copies):
            positions where xt is the mask token.
        weights (`torch.FloatTensor` of the same shape):
            what the negative log-likelihood of a masked token is multiplied by; constant within a block.
    """

    masked: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Blocks:
    """The diffused blocks of a batch, numbered through.

    Args:
        slot (`torch.LongTensor` of shape `(batch, length)`): number of a token's block; undefined where not maskable.
        maskable (`torch.BoolTensor` of shape `(batch, length)`): tokens that the forward process may mask.
        size (`torch.LongTensor` of shape `(num_slots,)`): maskable tokens of each slot; 0 for slots that no block has.
        low, high (`torch.FloatTensor` of shape `(num_slots,)`): clip interval of the slot's mask rate.
    """

    slot: torch.Tensor
    maskable: torch.Tensor
    size: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def draw_mask(
    block_ids: torch.Tensor,
    maskable: torch.Tensor,
    clip: torch.Tensor | None = None,
    noise: str = "loglinear",
    estimator: str = "stratified",
    sampling_eps: float = 1e-3,
    generator: torch.Generator | None = None,
    noisy_copies: int | None = None,
) -> MaskDraw:
    """Draws which tokens are masked, with the weights that make the weighted sum of NLLs an estimate of the NELBO.

    Noise levels are drawn per block, antithetically over all blocks of the batch (Kingma et al. 2021, appendix I.1:
    one uniform offset on an even grid), in permuted order, so that no row or block position is tied to a level.

    Args:
        block_ids (`torch.LongTensor` of shape `(batch, length)`): rank of each token's block in its row.
        maskable (`torch.BoolTensor` of shape `(batch, length)`): tokens to diffuse (no question, opener, padding).
        clip (`torch.FloatTensor` of shape `(batch, length, 2)`, *optional*):
            interval of mask rates of the token's block, [0, 1] if omitted: unclipped, the estimate is unbiased.
        noise, estimator, sampling_eps: see `HierBD3LMConfig` and `ESTIMATORS`.
        generator: source of the random numbers, on the device of `block_ids`.
        noisy_copies: draws of every row, each with its share of the weight; levels are spread over all of them.

    Raises:
        ValueError: for an unknown `noise` or `estimator`.
    """
    if noise not in SCHEDULES:
        raise ValueError(f"`noise` must be one of {', '.join(SCHEDULES)}, but got {noise!r}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"`estimator` must be one of {', '.join(ESTIMATORS)}, but got {estimator!r}")
    if noisy_copies is not None:
        repeated = [
            None if x is None else x.repeat_interleave(noisy_copies, dim=0) for x in (block_ids, maskable, clip)
        ]
        draw = draw_mask(*repeated, noise, estimator, sampling_eps, generator)
        shape = len(block_ids), noisy_copies, -1
        return MaskDraw(draw.masked.view(shape), draw.weights.view(shape) / noisy_copies)
    schedule, blocks = SCHEDULES[noise], number_blocks(block_ids, maskable, clip)
    levels = draw_levels(blocks.size > 0, generator)
    times = schedule.time(blocks.low) + levels * (schedule.time(blocks.high) - schedule.time(blocks.low))
    if estimator == "stratified":
        return stratified_mask(blocks, times, schedule, generator)
    return bernoulli_mask(blocks, times, schedule, sampling_eps, generator)


def number_blocks(block_ids: torch.Tensor, maskable: torch.Tensor, clip: torch.Tensor | None = None) -> Blocks:
    """Numbers the blocks of all rows by `row * blocks per row + block`."""
    batch, length = block_ids.shape
    per_row = length + 1  # no row has more blocks than tokens besides the question
    row = torch.arange(batch, device=block_ids.device)[:, None]
    slot = row * per_row + block_ids.clamp(min=0)
    size = torch.zeros(batch * per_row, dtype=torch.long, device=block_ids.device)
    size.scatter_add_(0, slot.flatten(), maskable.flatten().long())
    low, high = torch.zeros(size.shape, device=slot.device), torch.ones(size.shape, device=slot.device)
    if clip is not None:
        low[slot[maskable]], high[slot[maskable]] = clip[maskable].float().unbind(-1)
    return Blocks(slot, maskable, size, low, high)


def draw_levels(present: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One level in (0, 1] for each present slot: evenly spaced with a common random offset, in random order.

    Args:
        present (`torch.BoolTensor` of shape `(num_slots,)`).

    Returns:
        `torch.FloatTensor` of shape `(num_slots,)`, 1 where not present.
    """
    levels = torch.ones(present.shape, device=present.device)
    count = int(present.sum())
    offset = 1 - torch.rand((), generator=generator, device=present.device)  # in (0, 1]
    grid = (torch.arange(count, device=present.device) + offset) / max(count, 1)
    levels[present] = grid[torch.randperm(count, generator=generator, device=present.device)]
    return levels


def stratified_mask(
    blocks: Blocks, times: torch.Tensor, schedule: NoiseSchedule, generator: torch.Generator | None = None
) -> MaskDraw:
    """Masks exactly k = ceil(p(t) m) of a block's m tokens, chosen uniformly. No block is ever without a mask.

    k is drawn with probability time(k / m) - time((k - 1) / m), so the weight (1 / k) / probability is unbiased; it is
    m / k for the log-linear schedule.
    """
    size = blocks.size.clamp(min=1)
    count = (schedule.move_chance(times) * size).ceil().clamp(min=1).minimum(size)
    probability = schedule.time(count / size) - schedule.time((count - 1) / size)
    chosen = rank_in_block(blocks, generator) < count[blocks.slot]
    return _as_draw(blocks, chosen, 1 / (count * probability))


def bernoulli_mask(
    blocks: Blocks,
    times: torch.Tensor,
    schedule: NoiseSchedule,
    sampling_eps: float,
    generator: torch.Generator | None = None,
) -> MaskDraw:
    """Masks every token with probability p(t) and weighs by p'(t) / p(t).

    That weight has no finite variance near t = 0. Times with p(t) < eps are therefore drawn at p = eps together, with
    the weight that keeps their share of the integral: the bias is of order eps squared.
    """
    eps_time = schedule.time(torch.full_like(times, sampling_eps))
    chance = schedule.move_chance(times)
    weight = torch.where(times < eps_time, 1 / eps_time, schedule.rate(times) / chance)
    chance = chance.clamp(min=sampling_eps)
    coins = torch.rand(blocks.slot.shape, generator=generator, device=times.device)
    return _as_draw(blocks, coins < chance[blocks.slot], weight)


def rank_in_block(blocks: Blocks, generator: torch.Generator | None = None) -> torch.Tensor:
    """A uniformly random order of each block's maskable tokens: `torch.LongTensor` of shape `(batch, length)`."""
    device = blocks.slot.device
    scores = torch.rand(blocks.slot.shape, generator=generator, device=device, dtype=widest_dtype(device))
    return _rank_by(scores, blocks)


def _rank_by(scores: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Rank of each maskable token among those of its block by `scores` in [0, 1); equal ones as they stand."""
    slots = torch.where(blocks.maskable, blocks.slot, blocks.size.numel()).flatten()
    order = scores.flatten().argsort(stable=True)
    order = order[slots[order].argsort(stable=True)]
    before = blocks.size.cumsum(0) - blocks.size  # maskable tokens in the slots before
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return rank.view(blocks.slot.shape) - before[blocks.slot]


def _as_draw(blocks: Blocks, chosen: torch.Tensor, weight_of_slot: torch.Tensor) -> MaskDraw:
    masked = chosen & blocks.maskable
    return MaskDraw(masked, torch.where(masked, weight_of_slot[blocks.slot], 0.0))


def subs_logits(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Zero masking probability (MDLM, section 3.2.3): the model never predicts the mask token.

    Args:
        logits (`torch.FloatTensor` of shape `(..., vocab_size)`): logits at masked positions.
    """
    mask_column = torch.tensor([mask_token_id], device=logits.device)
    return logits.index_fill(-1, mask_column, float("-inf"))


def token_nll(logits: torch.Tensor, x0: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """-log p(x0 | xt) in nats, in float32.

    Args:
        logits (`torch.FloatTensor` of shape `(num_masked, vocab_size)`): at the masked positions only.
        x0 (`torch.LongTensor` of shape `(num_masked,)`): the clean tokens there.
    """
    return F.cross_entropy(subs_logits(logits.float(), mask_token_id), x0, reduction="none")


def score_entropy(logits: torch.Tensor, x0: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Denoising score entropy of masked tokens in nats, in float32.

    SEDD: Lou et al. 2024, "Discrete Diffusion Modeling by Estimating the Ratios of the Data Distribution", theorem 3.4
    on the absorbing graph of section 3.3.

    With total noise sigma(t) and r = 1 / (exp(sigma) - 1), the score of each of the V tokens besides the mask is
    s = r exp(logit) / V, which scales it by sigma as the published model does, and the bound's integrand is
    sigma'(t) * (sum of s - r log s[x0] + r log r - r). Its factor sigma'(t) r = p'(t) / p(t) is the weight of a
    [`MaskDraw`]; what is left depends on no time, so that every estimator of the NELBO is one of this bound as well.

    Args:
        logits (`torch.FloatTensor` of shape `(num_masked, vocab_size)`): at the masked positions only.
        x0 (`torch.LongTensor` of shape `(num_masked,)`): the clean tokens there.
    """
    log_ratio = subs_logits(logits.float(), mask_token_id) - math.log(logits.shape[-1] - 1)  # log(s / r)
    return log_ratio.logsumexp(dim=-1).exp() - log_ratio.gather(-1, x0[:, None])[:, 0] - 1


def next_token_nll(logits: torch.Tensor, x0: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """-log p(x0 | tokens before) in nats, in float32, as any causal model has it; arguments as in [`token_nll`]."""
    return F.cross_entropy(logits.float(), x0, reduction="none")


# What a model is trained on, for each token that it predicts, by `HierBD3LMConfig.token_loss`.
TOKEN_LOSSES = {"nll": token_nll, "score_entropy": score_entropy, "next_token": next_token_nll}


def masked_nll(
    model: Callable[..., Any],
    masked: torch.BoolTensor,
    input_ids: torch.LongTensor,
    mask_token_id: int,
    **layout: torch.Tensor,
) -> torch.FloatTensor:
    """The model's token loss in nats of the clean tokens where `masked`, given everything that the mask lets them see.

    Args:
        model: `HierBD3LMForBlockDiffusion`, or what wraps it.
        masked (`torch.BoolTensor` of shape `(batch, length)` or `(batch, copies, length)`):
            where xt is the mask token, for one or several noisy copies of x0.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): x0.
        layout: `segment_ids`, or `block_ids` and `position_ids`, as for the model's forward.

    Returns:
        `torch.FloatTensor` of shape `(num_masked,)`, in row-major order.
    """
    x0 = (input_ids if masked.ndim == 2 else input_ids[:, None]).expand_as(masked)
    xt = x0.masked_fill(masked, mask_token_id)
    return model(input_ids=input_ids, noisy_input_ids=xt, logits_to_keep=masked, target_ids=x0, **layout).nll


def exact_nelbo(
    nll_of_mask: Callable[[torch.Tensor], torch.Tensor], block_ids: torch.Tensor, maskable: torch.Tensor
) -> torch.Tensor:
    """The NELBO by enumeration of every mask of every block, for blocks of at most 8 tokens.

    Blocks do not see each other's noise, so one pass takes the same pattern in all of them: 2^B - 1 passes.

    Args:
        nll_of_mask: maps `masked` (`torch.BoolTensor` of shape `(batch, length)`) to the NLL of the masked tokens,
            `torch.FloatTensor` of shape `(num_masked,)` in row-major order.
        block_ids, maskable: as for [`draw_mask`].

    Returns:
        `torch.DoubleTensor` of shape `(batch, length)`: each token's share; sums over tokens are NELBOs in nats.

    Raises:
        ValueError: if a block has more than 8 maskable tokens.
    """
    blocks = number_blocks(block_ids, maskable)
    largest = int(blocks.size.max())
    if largest > MAX_EXACT_BLOCK_SIZE:
        raise ValueError(f"`block_ids` must have blocks of at most {MAX_EXACT_BLOCK_SIZE} tokens, got {largest}")
    size = blocks.size[blocks.slot].to(widest_dtype(block_ids.device))
    place = _place_in_block(blocks)
    share = torch.zeros_like(size)
    for pattern in _patterns(largest, block_ids.device):
        # A pattern that reaches past the end of a smaller block is not one of that block's masks.
        fits = size > pattern.nonzero().max()
        masked = maskable & fits & pattern[place.clamp(max=largest - 1)]
        if masked.any():
            count = pattern.sum()
            log_masks = torch.lgamma(size + 1) - torch.lgamma(count + 1.0) - torch.lgamma(size - count + 1)
            weights = torch.exp(-log_masks) / count
            share[masked] += weights[masked] * nll_of_mask(masked).to(share.dtype)
    return share


def _patterns(length: int, device: torch.device) -> Iterator[torch.Tensor]:
    for bits in product((False, True), repeat=length):
        if any(bits):
            yield torch.tensor(bits, device=device)


def _place_in_block(blocks: Blocks) -> torch.Tensor:
    """0, 1, ... for the maskable tokens of each block in the order in which they stand."""
    return _rank_by(torch.zeros(blocks.slot.shape, device=blocks.slot.device), blocks)
