"""How the likelihood of examples is measured: nats per segment, over the tokens that every algorithm counts alike."""

import math
from typing import Any

import torch

from .masking_hierbd3lm import EXECUTION, PLAN, layout_from_segments
from .objectives import Batch, Objective

SEGMENT_NAMES = {PLAN: "plan", EXECUTION: "execution"}


def with_predicted_tokens(model: Any, inputs: Batch) -> Batch:
    """The batch with `maskable`, which tokens the model predicts, and block and position ids if it lacks them."""
    batch = dict(inputs)
    if "block_ids" not in batch:
        grid = model.config.block_grid
        batch["block_ids"], batch["position_ids"] = layout_from_segments(batch["segment_ids"], *grid)
    batch["maskable"] = model.maskable_tokens(batch["input_ids"], batch["segment_ids"])
    return batch


@torch.no_grad()
def measure_batch(
    objective: Objective,
    model: Any,
    batch: Batch,
    num_draws: int,
    generator: torch.Generator | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """What the bound on each example's negative log-likelihood is, unclipped and unweighted.

    Args:
        num_draws: draws of the noise; an objective without noise is computed once.
        exact: enumerates all masks instead, which is one "draw"; see [`exact_nelbo`].

    Returns:
        `torch.DoubleTensor` of shape `(batch, draws + 1, segments)`: nats of each draw in plan and execution, and
        last the counted tokens.
    """
    if exact:
        shares = [objective.exact(model, batch)]
    else:
        draws = num_draws if objective.has_noise else 1
        shares = [objective.shares(model, batch, generator) for _ in range(draws)]
    segment_ids = batch["segment_ids"]
    columns = [*shares, batch["labels"] != -100]
    return torch.stack([per_segment(column, segment_ids) for column in columns], dim=1)


def per_segment(values: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Sums of `values` of shape `(batch, length)` over plan and execution: `(batch, 2)`, float64."""
    # selected, not multiplied: a value that is not finite stays in its segment
    return torch.stack(
        [torch.where(segment_ids == segment, values, 0).double().sum(dim=1) for segment in SEGMENT_NAMES], dim=1
    )


def likelihood_metrics(nats: torch.Tensor, num_tokens: torch.Tensor) -> dict[str, float]:
    """Likelihoods of all tokens and of each segment.

    Args:
        nats (`torch.DoubleTensor` of shape `(draws, segments)`): NELBO of every draw, summed over the data.
        num_tokens (`torch.DoubleTensor` of shape `(segments,)`): the tokens that they average over.
    """
    metrics = {}
    columns = {"": slice(None), **{f"{name}_": slice(i, i + 1) for i, name in enumerate(SEGMENT_NAMES.values())}}
    for prefix, column in columns.items():
        count = num_tokens[column].sum()
        nll_of_draws = nats[:, column].sum(dim=1) / count
        nll = nll_of_draws.mean()
        metrics[f"{prefix}nll"] = nll.item()
        if len(nats) > 1:
            metrics[f"{prefix}nll_stderr"] = (nll_of_draws.std() / math.sqrt(len(nats))).item()
        metrics[f"{prefix}bpd"] = (nll / math.log(2)).item()
        metrics[f"{prefix}ppl"] = nll.exp().item()
        metrics[f"{prefix}num_tokens"] = int(count)
    return metrics
