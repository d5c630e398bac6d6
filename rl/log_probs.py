"""Log-probabilities of the tokens of given answers, from complementary masks that are the same for every policy."""

from collections.abc import Sequence
from typing import Any

import torch

from ..training.objectives import Batch, Objective
from ..training.seeding import seeded_generator
from .settings import BOUND, UNIFORM


def token_log_probs(
    model: Any, objective: Objective, batch: Batch, seeds: Sequence[int], num_draws: int = 1, weights: str = BOUND
) -> torch.Tensor:
    """Estimate the log-probability of each token that the model predicts.

    Exact where a block has one token. Otherwise each of `num_draws` draws masks a block twice, once a random subset
    of its tokens and once all the others, so that a draw scores each token exactly once.

    Args:
        batch: see [`~training.objectives`].
        seeds: a seed for each row. Masks depend on the row's blocks and seed alone, so that two models, or two
            batches, see the same noise.
        weights: `bound` for an unbiased estimate of minus the NELBO, whose sum over a block bounds the block's
            log-likelihood; `uniform` weighs each scored token by 1, which has less variance and is biased (the
            coupled sampling of DiffuCoder, Gong et al. 2025, section 4.2).

    Returns:
        `torch.FloatTensor` of shape `(batch, length)`, in nats, 0 where the model predicts nothing.
    """
    if not objective.has_noise:
        return -objective.token_nelbo(model, batch)
    masked, scales = complementary_masks(objective.noise_blocks(batch), batch["maskable"], seeds, num_draws)
    if weights == UNIFORM:
        scales = masked.to(scales)
    return _weighted_log_probs(model, objective, batch, masked, scales / num_draws)


def trajectory_log_probs(
    model: Any, objective: Objective, batch: Batch, reveal_steps: torch.LongTensor
) -> torch.Tensor:
    """Return the log-probability of each token at the step that denoised it (TraceRL, Wang et al. 2025,
    arXiv:2509.06949).

    A token is scored with those of its block masked that were denoised with it or later. Where the order of the
    tokens does not depend on the model, the sum over an answer is, up to a constant, the exact log-probability of
    the trajectory.

    Args:
        batch: see [`~training.objectives`].
        reveal_steps: `(batch, length)`; within a block, tokens with the same number were denoised together, and a
            higher number is later.

    Returns:
        `torch.FloatTensor` of shape `(batch, length)`, in nats, 0 where the model predicts nothing.
    """
    masked, scored = trajectory_masks(objective.noise_blocks(batch), batch["maskable"], reveal_steps)
    return _weighted_log_probs(model, objective, batch, masked, scored.float())


def _weighted_log_probs(
    model: Any, objective: Objective, batch: Batch, masked: torch.BoolTensor, weights: torch.FloatTensor
) -> torch.Tensor:
    """Sum the weighted log-probabilities of the masked tokens over all masks."""
    losses = objective.token_losses(model, batch, masked)
    return -weights.masked_scatter(masked, losses * weights[masked]).sum(dim=1)


def trajectory_masks(
    block_ids: torch.LongTensor, maskable: torch.BoolTensor, reveal_steps: torch.LongTensor
) -> tuple[torch.BoolTensor, torch.BoolTensor]:
    """Return the masked tokens before each step of a block, and those of them that the step denoises.

    Returns:
        two tensors of shape `(batch, most steps of a block, length)`; every maskable token is denoised once.
    """
    together = (block_ids[:, :, None] == block_ids[:, None]) & maskable[:, :, None] & maskable[:, None]
    earlier = reveal_steps[:, None] < reveal_steps[:, :, None]  # the second of a pair before the first
    same = together & (reveal_steps[:, None] == reveal_steps[:, :, None])
    is_first = maskable & ~same.tril(diagonal=-1).any(dim=2)  # a step is counted at its first token
    ranks = (together & earlier & is_first[:, None]).sum(dim=2)
    steps = torch.arange(int(ranks.amax()) + 1, device=ranks.device)[:, None]
    return maskable[:, None] & (ranks[:, None] >= steps), maskable[:, None] & (ranks[:, None] == steps)


def complementary_masks(
    block_ids: torch.LongTensor, maskable: torch.BoolTensor, seeds: Sequence[int], num_draws: int
) -> tuple[torch.BoolTensor, torch.FloatTensor]:
    r"""Draw pairs of complementary masks.

    Of a block of B tokens, k are masked first, with k uniform on {0, ..., B}, and the other B - k then. Each size
    j >= 1 has a chance of 2 / (B + 1) to be one of the two, so that the weight (B + 1) / (2 j) makes the weighted loss
    of a pair an unbiased estimate of \sum_j 1/j E[loss of j masked tokens], the NELBO. The sizes of all blocks and
    draws of a row are stratified.

    Returns:
        masks and weights, both of shape `(batch, 2 * num_draws, length)`; weights are 0 where nothing is masked.
    """
    shape = (len(block_ids), 2 * num_draws, block_ids.shape[1])
    masked, weights = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    for row, seed in enumerate(seeds):  # rows are seeded apart; little work beside a forward pass
        columns = maskable[row].nonzero()[:, 0].cpu()
        first, first_weights = _draw_row(block_ids[row].cpu()[columns], seed, num_draws)
        masked[row, :, columns] = torch.cat([first, ~first])
        weights[row, :, columns] = first_weights
    return masked.to(block_ids.device), weights.to(block_ids.device)


def _draw_row(blocks: torch.LongTensor, seed: int, num_draws: int) -> tuple[torch.BoolTensor, torch.FloatTensor]:
    """Return the first masks of a row's maskable tokens, `(num_draws, n)`, and the weights of first and second."""
    generator = seeded_generator("cpu", seed)
    _, place, counts = blocks.unique(return_inverse=True, return_counts=True)
    num_cells = num_draws * len(counts)
    cells = torch.randperm(num_cells, generator=generator) + torch.rand(num_cells, generator=generator)
    sizes = ((cells / max(1, num_cells)).view(num_draws, -1) * (counts + 1)).long().clamp(max=counts)
    keys = place + torch.rand(num_draws, len(blocks), generator=generator, dtype=torch.float64)
    ranks = keys.argsort(dim=1).argsort(dim=1) - (counts.cumsum(0) - counts)[place]
    first = ranks < sizes[:, place]
    num_masked = torch.where(first, sizes[:, place], (counts - sizes)[:, place])
    weights = (counts[place] + 1) / (2 * num_masked)
    return first, torch.cat([weights * first, weights * ~first])
