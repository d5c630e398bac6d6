"""Variance of the training loss under the clip intervals chosen by the search, at several block sizes.

    python -m hierbd3lm.benchmarks.clip_variance problems

Trains the quickstart recipe briefly at each block size, measures all intervals of one width on held-out problems, and
draws docs/clip_variance.png. The bars compare losses drawn as in training under the chosen intervals and under [0, 1]:
their variance over the noise for a given batch. The details also have the variance over noise and batches.
"""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.data.loading import prepare_dataset
from hierbd3lm.data.splits import load_split
from hierbd3lm.diffusion_hierbd3lm import ESTIMATORS
from hierbd3lm.evaluation.likelihood import SEGMENT_NAMES, per_segment, with_predicted_tokens
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.training.clip_search import ClipSearch, clipped_segments, draw_losses, measure_costs
from hierbd3lm.training.objectives import Batch, Objective, make_objective

from .measure import Measured, as_flags, bar, measure_parts

ROOT = Path(__file__).parents[1]
BLOCK_SIZES = (4, 8, 16)
NUM_STEPS = 600  # training steps
WIDTH = 0.5
NUM_PROBLEMS, BATCH_SIZE, NUM_DRAWS = 160, 8, 12
FIGURE = ROOT / "docs" / "clip_variance.png"


def problems() -> Measured:
    """Measure on the synthetic problems of the quickstart."""
    bars, details = [], {}
    for block_size in BLOCK_SIZES:
        folder = train(block_size)
        for estimator in ESTIMATORS:
            result = measure_variances(folder, estimator)
            details[f"{estimator}, block size {block_size}"] = result
            for name, interval in result["chosen"].items():
                claim = f"{estimator}, block size {block_size}, {name}: variance at {interval} / at [0, 1]"
                limit = 0.6 if block_size == 4 else 1.0
                bars.append(bar(claim, result["of_noise"][name]["ratio"], limit, at_most=True))
    draw_figure(details)
    return bars, details


def train(block_size: int) -> Path:
    """Train the quickstart recipe at a block size, or resume the training."""
    folder = ROOT / "outputs" / "clip_variance" / f"block_{block_size}"
    settings = {
        "output_dir": folder,
        "block_size": block_size,
        "block_size_schedule": "null",
        "per_device_train_batch_size": 16,
        "noisy_copies": 3,
        "max_steps": NUM_STEPS,
        "resume_from_checkpoint": "last",
    }
    settings |= {"num_train_examples": 8 * NUM_STEPS, "save_steps": NUM_STEPS, "eval_strategy": "no"}
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / "quickstart.yaml")]
    subprocess.run(command + as_flags(settings), check=True)
    return folder


@torch.no_grad()
def measure_variances(folder: Path, estimator: str) -> dict[str, Any]:
    """Run the search, and measure the variance of losses drawn under the chosen intervals."""
    model, batches = load(folder)
    objective, segments = make_objective(model.config, estimator), clipped_segments(model.config)
    search, generator, variances = ClipSearch([WIDTH]), torch.Generator().manual_seed(0), []
    for batch in batches:
        token_nelbo = functools.partial(objective.token_nelbo, model, batch, generator)
        blocks = objective.noise_blocks(batch)
        costs = measure_costs(token_nelbo, batch, blocks, list(segments.values()), search.candidates.num_levels)
        variances.append(draw_losses(costs, search.candidates, 1, generator).var(dim=2))
    search.choose(list(segments), torch.stack(variances).mean(dim=0))
    clipped = draw_clipped_losses(objective, model, batches, search.chosen)
    unclipped = draw_clipped_losses(objective, model, batches, {name: [0.0, 1.0] for name in segments})
    return {
        "chosen": search.chosen,
        "of_noise": compare(clipped.var(dim=1).mean(dim=0), unclipped.var(dim=1).mean(dim=0)),
        "of_noise_and_batches": compare(clipped.flatten(0, 1).var(dim=0), unclipped.flatten(0, 1).var(dim=0)),
        "searched": search.variances,
    }


def compare(clipped: torch.Tensor, unclipped: torch.Tensor) -> dict[str, dict[str, float]]:
    """Compare variances of shape `(segments + 1,)`, for each segment and in total."""
    rows = zip((*SEGMENT_NAMES.values(), "total"), clipped.tolist(), unclipped.tolist(), strict=True)
    return {name: {"clipped": a, "unclipped": b, "ratio": a / b} for name, a, b in rows}


def load(folder: Path) -> tuple[HierBD3LMForBlockDiffusion, list[Batch]]:
    """Load a checkpoint and held-out problems, in length-grouped batches as in training."""
    model = HierBD3LMForBlockDiffusion.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, config=model.config)
    dataset = load_split(DataArguments.load(str(folder)), "validation", NUM_PROBLEMS)
    rows = list(prepare_dataset(dataset, tokenizer, model.config)[0].sort("length"))
    collator = HierarchicalDataCollator(model.config)
    groups = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    return model, [with_predicted_tokens(model, collator(group)) for group in groups]


def draw_clipped_losses(
    objective: Objective, model: HierBD3LMForBlockDiffusion, batches: list[Batch], intervals: dict[str, list[float]]
) -> torch.Tensor:
    """Draw losses in nats per token, for each segment and in total: `(batches, draws, segments + 1)`."""
    losses, generator = [], torch.Generator().manual_seed(1)
    of_segment = torch.tensor([[0.0, 1.0], intervals["plan"], intervals["execution"]])
    for batch in batches:
        clip = of_segment[batch["segment_ids"].clamp(min=0)]
        num_tokens = per_segment(batch["labels"] != -100, batch["segment_ids"]).sum(dim=0)
        draws = [objective.token_nelbo(model, batch, generator, clip=clip) for _ in range(NUM_DRAWS)]
        nats = torch.stack([per_segment(draw, batch["segment_ids"]).sum(dim=0) for draw in draws])
        losses.append(torch.cat([nats / num_tokens, nats.sum(dim=1, keepdim=True) / num_tokens.sum()], dim=1))
    return torch.stack(losses)


def draw_figure(details: dict[str, Any]) -> None:
    """Plot the variance of every interval relative to [0, 1], with a panel for each estimator and segment."""
    figure = Figure(figsize=(8.4, 6.4), facecolor="white", layout="constrained")
    panels = figure.subplots(len(ESTIMATORS), len(SEGMENT_NAMES), sharex=True, sharey=True)
    for row, estimator in zip(panels, ESTIMATORS, strict=True):
        for axes, name in zip(row, SEGMENT_NAMES.values(), strict=True):
            for label, result in details.items():
                (*_, unclipped), *rows = result["searched"][name]
                if label.startswith(estimator):
                    relative = [value / unclipped for *_, value in rows]
                    axes.plot([low for low, *_ in rows], relative, marker="o", label=label.partition(", ")[2])
            axes.axhline(1, color="0.6", linewidth=0.8, linestyle="--")
            axes.set(title=f"{name.capitalize()}, {estimator}", yscale="log")
        row[0].set_ylabel("variance relative to [0, 1]")
    for axes in panels[-1]:
        axes.set_xlabel(f"lowest mask rate $\\beta$ of $[\\beta, \\beta + {WIDTH}]$")
    panels[0][-1].legend(frameon=False)
    figure.savefig(FIGURE, dpi=150)


if __name__ == "__main__":
    measure_parts("clip_variance", {"problems": problems}, __doc__)
