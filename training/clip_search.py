"""Search for the interval of mask rates whose training loss varies least (BD3-LM: Arriola et al. 2025, section 5.2).

The variance is over the noise of a given batch; it is averaged over batches. Differences between batches do not
depend on the interval and are left out. The loss of each block is measured once in each of `num_levels` equal bins of
mask rates. From these measurements the training loss under any interval is drawn many times without another forward
pass: as in training, the levels of all blocks of a batch lie on an even grid, in random order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..configuration_hierbd3lm import HierBD3LMConfig
from ..diffusion_hierbd3lm import number_blocks, widest_dtype
from ..masking_hierbd3lm import SEGMENT_NAMES
from ..order_hierbd3lm import BlockOrder
from .objectives import Batch

NUM_REPLICATES = 64  # simulated losses per batch

Interval = tuple[float, float]


@dataclass(frozen=True)
class Candidates:
    """Candidate intervals that start and end at bin edges. The first is [0, 1], for comparison.

    Args:
        widths: widths of the intervals, multiples of 1 / num_levels in (0, 1].
        num_levels: number of bins of mask rates, >= 1.

    Raises:
        ValueError: if a width or `num_levels` is out of its range.
    """

    widths: tuple[float, ...]
    num_levels: int = 20

    def __post_init__(self):
        if self.num_levels < 1:
            raise ValueError(f"`num_levels` must be at least 1, but got {self.num_levels}")
        for width in self.widths:
            bins = width * self.num_levels
            if not 0 < width <= 1 or abs(bins - round(bins)) > 1e-6:
                raise ValueError(
                    f"`widths` must be multiples of 1 / {self.num_levels} in (0, 1], but got {list(self.widths)}"
                )

    @property
    def bins(self) -> list[tuple[int, int]]:
        """First bin and number of bins of each interval."""
        counts = [round(width * self.num_levels) for width in sorted(set(self.widths) - {1.0})]
        return [(0, self.num_levels)] + [
            (first, count) for count in counts for first in range(self.num_levels - count + 1)
        ]

    @property
    def intervals(self) -> list[Interval]:
        return [(first / self.num_levels, (first + count) / self.num_levels) for first, count in self.bins]


def clipped_segments(config: HierBD3LMConfig) -> dict[str, tuple[int, ...]]:
    """Return the groups of segments that share a clip interval, as name -> segment ids.

    A model without a plan has no group for it.
    """
    groups = BlockOrder.from_config(config).noise_groups
    return {"all" if len(group) > 1 else SEGMENT_NAMES[group[0]]: group for group in groups}


@dataclass(frozen=True)
class BlockCosts:
    """Losses of the blocks of a batch in each bin of mask rates.

    Args:
        costs (`torch.DoubleTensor` of shape `(levels, blocks)`): losses in nats, weighted as in training.
        groups (`torch.BoolTensor` of shape `(groups, blocks)`): which blocks belong to which group of segments.
        num_tokens (`torch.LongTensor` of shape `(groups,)`): number of tokens that each group's loss averages over.
    """

    costs: torch.Tensor
    groups: torch.Tensor
    num_tokens: torch.Tensor


def measure_costs(
    token_nelbo: Callable[[torch.Tensor], torch.Tensor],
    batch: Batch,
    noise_blocks: torch.Tensor,
    segments: Sequence[tuple[int, ...]],
    num_levels: int,
) -> BlockCosts:
    """Measure the loss of each block, with one forward pass per bin of mask rates.

    Args:
        token_nelbo: maps clip intervals of shape `(batch, length, 2)` to the contribution of each token to the
            training loss in nats, of shape `(batch, length)`.
        noise_blocks (`torch.LongTensor` of shape `(batch, length)`): see `BlockDiffusion.noise_blocks`.
        segments: segment ids of each group; see [`clipped_segments`].
    """
    maskable, segment_ids = batch["maskable"], batch["segment_ids"]
    blocks = number_blocks(noise_blocks, maskable)
    slots, present = blocks.slot[maskable], blocks.size > 0
    costs = torch.zeros(num_levels, len(blocks.size), dtype=widest_dtype(slots.device), device=slots.device)
    for level in range(num_levels):
        clip = costs.new_tensor([level / num_levels, (level + 1) / num_levels]).expand(*maskable.shape, 2)
        costs[level].scatter_add_(0, slots, token_nelbo(clip)[maskable].to(costs.dtype))
    groups, num_tokens = [], []
    for ids in segments:
        inside = torch.isin(segment_ids, segment_ids.new_tensor(ids))
        member = torch.zeros_like(present)
        member[blocks.slot[inside & maskable]] = True
        groups.append(member[present])
        num_tokens.append((inside & (batch["labels"] != -100)).sum())
    return BlockCosts(costs[:, present], torch.stack(groups), torch.stack(num_tokens))


def draw_losses(
    measured: BlockCosts, candidates: Candidates, noisy_copies: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Simulate training losses of one batch under each candidate interval.

    All intervals use the same random numbers.

    Returns:
        `torch.DoubleTensor` of shape `(intervals, groups, NUM_REPLICATES)`: losses in nats per token.
    """
    costs, device = measured.costs, measured.costs.device
    num_blocks, draws = costs.shape[1], NUM_REPLICATES
    grid = torch.rand(draws, noisy_copies * num_blocks, generator=generator, device=device).argsort(dim=1)
    offset = torch.rand(draws, 1, generator=generator, device=device)
    levels = ((grid + offset) / (noisy_copies * num_blocks)).view(draws, noisy_copies, num_blocks).clamp(max=1 - 1e-7)
    weights = measured.groups.to(costs.dtype) / measured.num_tokens.clamp(min=1)[:, None]  # (groups, blocks)
    losses = []
    for first, count in candidates.bins:
        bins = first + (levels * count).long()
        picked = costs[bins, torch.arange(num_blocks, device=device)].mean(dim=1)  # (draws, blocks)
        losses.append(weights @ picked.T)
    return torch.stack(losses)


class ClipSearch(TrainerCallback, ExportableState):
    """Clip intervals that the last search selected. They are saved and restored with the trainer's state.

    Args:
        widths, num_levels: see [`Candidates`].
    """

    def __init__(self, widths: Sequence[float], num_levels: int = 20):
        self.candidates = Candidates(tuple(widths), num_levels)
        # group of `clipped_segments` -> [[low, high, variance], ...] of the last search, and the selected [low, high]
        self.variances: dict[str, list[list[float]]]
        self.chosen: dict[str, list[float]]
        self.reset()

    def reset(self) -> None:
        """Return to the intervals of the configuration."""
        self.variances, self.chosen = {}, {}

    def choose(self, names: Sequence[str], variance: torch.Tensor) -> dict[str, float]:
        """Select the interval with the lowest variance for each group, and return the values to log.

        Args:
            names: names of the groups.
            variance (`torch.DoubleTensor` of shape `(intervals, groups)`): variance of the loss in nats per token.
        """
        logs, first = {}, 0 if 1.0 in self.candidates.widths else 1  # [0, 1] may be there only for comparison
        for group, name in enumerate(names):
            column = variance[:, group].tolist()
            best = min(range(first, len(column)), key=column.__getitem__)
            low, high = self.candidates.intervals[best]
            self.chosen[name] = [low, high]
            self.variances[name] = [
                [*interval, value] for interval, value in zip(self.candidates.intervals, column, strict=True)
            ]
            prefix = "" if name == "all" else f"{name}_"
            logs |= {f"{prefix}clip_low": low, f"{prefix}clip_high": high, f"{prefix}clip_variance": column[best]}
            logs[f"{prefix}clip_variance_unclipped"] = column[0]
        return logs

    def segment_intervals(self) -> dict[str, list[float]]:
        """Return the selected interval of each segment, `plan` and `execution`, that has one."""
        if "all" in self.chosen:
            return dict.fromkeys(SEGMENT_NAMES.values(), self.chosen["all"])
        return self.chosen

    def state(self) -> dict[str, Any]:
        arguments = {"widths": list(self.candidates.widths), "num_levels": self.candidates.num_levels}
        return {"args": arguments, "attributes": {"variances": self.variances, "chosen": self.chosen}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the intervals of the checkpoint that training resumes from."""
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        for name, value in saved["attributes"].items():
            setattr(self, name, value)
