"""Log-probabilities and gradients of GRPO: the estimators against enumeration, and the noise of both kinds of credit.

`python -m hierbd3lm.benchmarks.policy_gradient CHECKPOINT [--parts estimators credit log_probs]`, with a model that
was trained on synthetic problems. Answers are sampled by the recipe `problems`.

- estimators: log-probabilities of sampled answers, in blocks of 2, 4 and 8 tokens, against the enumeration of all
  masks.
- credit, log_probs: the gradient of many batches with each value of that setting, from the same answers. The trace of
  its covariance over the squared norm of its mean is the number of batches whose mean has as much noise as signal.
  `credit` is measured in blocks of one token, `log_probs` in the checkpoint's own blocks.

Writes results/policy_gradient_{part}.json and .md.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import parameters_to_vector

from hierbd3lm.rl import command
from hierbd3lm.rl.log_probs import token_log_probs, trajectory_log_probs
from hierbd3lm.rl.settings import BOUND, LOG_PROBS, SEGMENT, SEQUENCE, UNIFORM
from hierbd3lm.training.recipes import NULL

from .measure import Measured, as_flags, bar, make_parser, trained_folder, write_results

RECIPE = "problems"
BLOCK_SIZES = (2, 4, 8)
NUM_PAIRS = (1, 4)
LARGEST_BIAS = 0.02
NUM_ANSWERS = 16  # that are scored
NUM_REPEATS = 96  # of an estimate
NUM_BATCHES = 64  # whose gradients are compared


class Rollouts:
    """Batches of sampled answers to the recipe's problems, the same for the same checkpoint and step."""

    def __init__(self, checkpoint: str, folder: Path, **settings: Any):
        settings = {"init_from": checkpoint, "output_dir": folder} | settings
        self.trainer = command.make_trainer(*command.parse_arguments([RECIPE, *as_flags(settings)]))
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1  # which `train` sets

    def sample(self, step: int) -> dict[str, torch.Tensor]:
        """Sample and score the answers of a training step."""
        args, self.trainer.state.global_step = self.trainer.args, step
        num_problems = args.per_device_train_batch_size // args.num_generations
        problems = self.trainer.train_dataset.select(range(step * num_problems, (step + 1) * num_problems))
        repeated = [dict(problem) for problem in problems for _ in range(args.num_generations)]  # TRL writes to each
        return self.trainer._generate_and_score_completions(repeated)

    def gradient(self, step: int) -> torch.Tensor:
        """Return the gradient of the loss of a training step, `(num_parameters,)`."""
        loss = self.trainer.compute_loss(self.trainer.model, self.sample(step))
        return parameters_to_vector(torch.autograd.grad(loss, list(self.trainer.model.parameters())))


def measure_estimators(checkpoint: str, folder: Path) -> Measured:
    """Compare log-probabilities of sampled answers with the enumeration of all masks."""
    bars, details = [], {}
    for block_size in BLOCK_SIZES:
        rollouts = Rollouts(checkpoint, folder, block_size=block_size, per_device_train_batch_size=NUM_ANSWERS)
        for name, row in estimate(rollouts).items():
            limit = LARGEST_BIAS if name.startswith(BOUND) else None
            bars.append(bar(f"blocks of {block_size}, {name}: bias", abs(row["relative_bias"]), limit, True))
            details[f"blocks of {block_size}, {name}"] = row
    return bars, details


@torch.no_grad()
def estimate(rollouts: Rollouts) -> dict[str, dict[str, float]]:
    """Return relative bias and standard deviation of every estimator, for the answers of one batch."""
    trainer, sampled = rollouts.trainer, rollouts.sample(0)
    model, objective, completions = trainer.model.eval(), trainer.objective, sampled["completion_ids"]
    ids = torch.cat([sampled["prompt_ids"], completions], dim=1)
    mask = torch.cat([sampled["prompt_mask"], sampled["completion_mask"]], dim=1).bool()
    given = trainer.lay_out(ids, mask, completions.shape[1])

    def draw(weights: str, num_pairs: int, seed: int) -> torch.Tensor:
        seeds = range(seed * len(ids), (seed + 1) * len(ids))
        return token_log_probs(model, objective, given.batch, seeds, num_pairs, weights)

    estimators: dict[str, Callable[[int], torch.Tensor]] = {
        f"{weights}, {num_pairs} pair{'s' * (num_pairs > 1)}": partial(draw, weights, num_pairs)
        for weights in (BOUND, UNIFORM)
        for num_pairs in NUM_PAIRS
    }
    estimators["trajectory"] = lambda seed: trajectory_log_probs(model, objective, given.batch, given.reveal_steps)
    rows, columns = given.index[0], given.index[2]
    scored = torch.zeros_like(given.batch["maskable"]).index_put((rows, columns), torch.tensor(True))
    exact = -(objective.exact(model, given.batch) * scored).sum(dim=1)
    results = {}
    for name, estimator in estimators.items():
        draws = torch.stack([(estimator(seed).double() * scored).sum(dim=1) for seed in range(NUM_REPEATS)])
        bias = (draws.mean(dim=0) - exact).mean() / exact.mean().abs()
        error = draws.mean(dim=1).std() / NUM_REPEATS**0.5 / exact.mean().abs()
        results[name] = {
            "relative_bias": bias.item(),
            "standard_error": error.item(),
            "standard_deviation": draws.std(dim=0).mean().item(),
            "exact": exact.mean().item(),
        }
    return results


def measure_noise(checkpoint: str, folder: Path, setting: str, values: Sequence[str], **others: Any) -> Measured:
    """Compare the noise of the gradient with each value of a setting, from the same answers."""
    details = {}
    for value in values:
        rollouts = Rollouts(checkpoint, folder, **{setting: value}, **others)
        details[value] = noise_scale([rollouts.gradient(step) for step in range(NUM_BATCHES)])
    first = values[0]
    bars = [
        bar(f"noise of the gradient, {setting}: {value} / {first}", row["noise"] / details[first]["noise"], None, True)
        for value, row in details.items()
        if value != first
    ]
    return bars, details


def noise_scale(draws: list[torch.Tensor]) -> dict[str, float]:
    """Return the variance of a draw, also over the squared norm of the mean, with the standard error of the jackknife.

    The squared norm is estimated from pairs of different draws, which has no bias.
    """
    stacked = torch.stack(draws).double()
    products = stacked @ stacked.T
    whole, squares, count = products.sum(), products.diag().sum(), len(draws)
    # without each draw in turn
    sums, of_squares = whole - 2 * products.sum(dim=0) + products.diag(), squares - products.diag()
    left_out = _ratio(sums, of_squares, count - 1)
    error = ((count - 1) / count * (left_out - left_out.mean()).square().sum()).sqrt()
    return {
        "variance": ((squares - whole / count) / (count - 1)).item(),
        "noise": _ratio(whole, squares, count).item(),
        "standard_error": error.item(),
        "num_batches": count,
    }


def _ratio(whole: torch.Tensor, squares: torch.Tensor, count: int) -> torch.Tensor:
    """Variance over squared norm of the mean, from the sums of all products of draws and of their squares."""
    return (squares - whole / count) / (count - 1) / ((whole - squares) / (count * (count - 1)))


def format_estimators(details: dict[str, dict[str, float]]) -> str:
    """Format bias and deviation of every estimator as a Markdown table."""
    lines = ["| estimator | exact, nats | bias | standard deviation of an answer, nats |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {row['exact']:.3f} | {100 * row['relative_bias']:+.2f} % "
        f"± {196 * row['standard_error']:.2f} | {row['standard_deviation']:.3f} |"
        for name, row in details.items()
    ]
    return "\n".join(lines)


def format_noise(details: dict[str, dict[str, float]]) -> str:
    """Format the noise with each value of a setting as a Markdown table."""
    lines = ["| setting | variance of the gradient | variance / squared norm of the mean |", "|---|---|---|"]
    lines += [
        f"| {value} | {row['variance']:.3g} | {row['noise']:.3g} ± {1.96 * row['standard_error']:.2g} |"
        for value, row in details.items()
    ]
    return "\n".join(lines)


PARTS: dict[str, tuple[Callable[[str, Path], Measured], Callable[[dict[str, Any]], str]]] = {
    "estimators": (measure_estimators, format_estimators),
    "credit": (partial(measure_noise, setting="credit", values=(SEQUENCE, SEGMENT)), format_noise),
    "log_probs": (partial(measure_noise, setting="log_probs", values=LOG_PROBS, block_size=NULL), format_noise),
}


def main() -> None:
    """Measure the parts, and write their results."""
    parser = make_parser("policy_gradient", __doc__)
    parser.add_argument("checkpoint", type=trained_folder, help="Folder of a model trained on synthetic problems.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="What to measure.")
    args = parser.parse_args()
    for name in args.parts:
        measure, format_details = PARTS[name]
        with tempfile.TemporaryDirectory() as folder:
            bars, details = measure(args.checkpoint, Path(folder))
        write_results("policy_gradient", name, bars, details, format_details(details))


if __name__ == "__main__":
    main()
