"""Variance of the gradient per training time, with several noisy copies of each example.

`python -m hierbd3lm.benchmarks.variance`. The gradient of one batch is drawn many times with 1, 2 and 4 noisy copies,
from a briefly trained model. Its variance (the trace of its covariance) times the seconds of a step is the cost of a
given precision of the gradient of these examples; less is better.
"""

import functools
from collections.abc import Callable

import torch

from hierbd3lm.evaluation.likelihood import with_predicted_tokens
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.training.objectives import make_objective

from .measure import Measured, bar, interleaved_medians, measure_parts
from .models import make_model, problem_batches
from .training import block_diffusion_step

COPIES = (1, 2, 4)
WARM_UP_STEPS = 30
DRAWS = 24  # of each gradient


def gradient(
    model: HierBD3LMForBlockDiffusion, batch: dict[str, torch.Tensor], copies: int, seed: int
) -> torch.Tensor:
    """Draw the gradient of the NELBO: `(num_parameters,)`."""
    generator = torch.Generator().manual_seed(seed)
    predicted = with_predicted_tokens(model, batch)
    nelbo = make_objective(model.config).token_nelbo(model, predicted, generator, noisy_copies=copies)
    loss = nelbo.sum() / predicted["maskable"].sum()
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))])


def variance_of_draws(draws: list[torch.Tensor]) -> float:
    """Return an unbiased estimate of the trace of the covariance."""
    return torch.stack(draws).var(dim=0).sum().item()


def measure_copies(repeats: int) -> Measured:
    """Compare variance times seconds with several copies and with one."""
    batches, tokenizer, _ = problem_batches(num_batches=1, batch_size=16)
    model, batch = make_model(max(4096, len(tokenizer))), batches[0]
    warm_up = block_diffusion_step(model, batch)
    for _ in range(WARM_UP_STEPS):
        warm_up()
    model.zero_grad()
    seconds = interleaved_medians(
        {copies: functools.partial(gradient, model, batch, copies, 0) for copies in COPIES}, repeats
    )
    variances = {
        copies: variance_of_draws([gradient(model, batch, copies, seed) for seed in range(DRAWS)]) for copies in COPIES
    }
    cost = {copies: variances[copies] * seconds[copies] for copies in COPIES}
    bars = [
        bar(f"variance of the gradient x seconds, {copies} noisy copies / 1 copy", cost[copies] / cost[1], 1, True)
        for copies in COPIES[1:]
    ]
    return bars, {"seconds": seconds, "variances": variances}


PARTS: dict[str, Callable[[], Measured]] = {"copies": lambda: measure_copies(repeats=5)}


if __name__ == "__main__":
    measure_parts("variance", PARTS, __doc__)
