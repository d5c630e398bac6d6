"""Likelihood of examples, per segment, over the same tokens for every model."""

import math
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..configuration_hierbd3lm import HierBD3LMConfig
from ..data.collator import ID_KEYS, HierarchicalDataCollator, counted_tokens
from ..diffusion_hierbd3lm import widest_dtype
from ..masking_hierbd3lm import EXECUTION, SEGMENT_NAMES
from ..training.objectives import Batch, Objective, make_objective


def with_predicted_tokens(model: Any, inputs: Batch) -> Batch:
    """Add `maskable`, the tokens that the model predicts, to a batch, and block and position ids if it has none."""
    batch = dict(inputs)
    if "block_ids" not in batch:
        batch["block_ids"], batch["position_ids"] = model.order.layout(batch["segment_ids"], batch["input_ids"])
    batch["maskable"] = model.order.predicted(batch["input_ids"], batch["segment_ids"])
    if "is_given" in batch:
        batch["maskable"] &= ~batch["is_given"]
    return batch


def measure_likelihood(
    model: Any,
    dataset: Dataset,
    num_draws: int = 8,
    exact: bool = False,
    estimator: str = "stratified",
    batch_size: int = 32,
    seed: int = 0,
    plan_is_given: bool = False,
) -> dict[str, float]:
    """Measure the likelihood of plan and execution given the question; see [`likelihood_metrics`].

    Args:
        dataset: encoded examples from [`prepare_dataset`].
        num_draws, exact: see [`measure_batch`].
        estimator: one of `ESTIMATORS`.
        batch_size: batch size. Examples are grouped by length.
        seed: random seed of the noise.
        plan_is_given: measure only the execution, given question and plan. No token of the plan is masked.

    Raises:
        RuntimeError: if the number of counted tokens is not that of [`counted_tokens`]: content and one `<|end|>` per
            segment, or only the content of text that continues in another row.
    """
    objective, collator = make_objective(model.config, estimator), HierarchicalDataCollator(model.config)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    order = sorted(range(len(dataset)), key=dataset["length"][:].__getitem__, reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    totals = []
    for rows in tqdm(batches, desc="Measuring", unit="batch"):
        inputs = {name: ids.to(model.device) for name, ids in collator([dataset[row] for row in rows]).items()}
        batch = with_predicted_tokens(model, inputs)
        if plan_is_given:
            is_opener = batch["input_ids"] == model.config.execution_token_id  # given like the plan
            batch["maskable"] &= (batch["segment_ids"] == EXECUTION) & ~is_opener
        totals.append(measure_batch(objective, model, batch, num_draws, generator, exact).sum(dim=0).cpu())
    total = torch.stack(totals).sum(dim=0)
    check_counts(total[-1], dataset, model.config)
    metrics = likelihood_metrics(total[:-1], total[-1])
    prefix = f"{SEGMENT_NAMES[EXECUTION]}_" if plan_is_given else ""
    return {name: value for name, value in metrics.items() if name.startswith(prefix)}


def check_counts(num_tokens: torch.Tensor, dataset: Dataset, config: HierBD3LMConfig) -> None:
    """Raise a RuntimeError unless `num_tokens`, of shape `(segments,)`, is the number that every model counts."""
    optional = ("continues", "plan_is_given", "step_lengths")
    columns = [name for name in (*ID_KEYS, *optional) if name in dataset.column_names]
    counts = [counted_tokens(example, config) for example in dataset.select_columns(columns)]
    expected = [sum(count[name] for count in counts) for name in SEGMENT_NAMES.values()]
    if num_tokens.tolist() != expected:
        raise RuntimeError(f"the counted tokens must be {expected}, as for every model, but are {num_tokens}")


@torch.no_grad()
def measure_batch(
    objective: Objective,
    model: Any,
    batch: Batch,
    num_draws: int,
    generator: torch.Generator | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """Measure the bound on the negative log-likelihood of each example, unclipped and unweighted.

    Args:
        num_draws: noise draws. An objective without noise is computed once.
        exact: enumerate all masks instead of drawing noise, which counts as one draw; see [`exact_nelbo`].

    Returns:
        `torch.DoubleTensor` of shape `(batch, draws + 1, segments)`: the NELBO of plan and execution in nats for each
        draw, and their numbers of counted tokens as the last entry.
    """
    if exact:
        nelbos = [objective.exact(model, batch)]
    else:
        draws = num_draws if objective.has_noise else 1
        nelbos = [objective.token_nelbo(model, batch, generator) for _ in range(draws)]
    columns = [*nelbos, batch["labels"] != -100]
    return torch.stack([per_segment(column, batch["segment_ids"]) for column in columns], dim=1)


def per_segment(values: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Sum `values` of shape `(batch, length)` over plan and over execution: `(batch, 2)`, float64 if there is any."""
    dtype = widest_dtype(values.device)
    # `where` rather than a product, so that a NaN or infinite value only affects its own segment
    return torch.stack(
        [torch.where(segment_ids == segment, values, 0).to(dtype).sum(dim=1) for segment in SEGMENT_NAMES], dim=1
    )


def likelihood_metrics(nats: torch.Tensor, num_tokens: torch.Tensor) -> dict[str, float]:
    """Compute the metrics of all tokens and of each non-empty segment.

    Args:
        nats (`torch.DoubleTensor` of shape `(draws, segments)`): NELBO of each draw, summed over the data.
        num_tokens (`torch.DoubleTensor` of shape `(segments,)`): numbers of counted tokens.

    Returns:
        `nll` (nats per token), `nll_stderr` (standard error over the draws, if there are several), `bpd` (bits per
        token), `ppl` and `num_tokens` for all tokens, and the same with `plan_` and `execution_` before the name.
    """
    metrics = {}
    columns = {"": slice(None), **{f"{name}_": slice(i, i + 1) for i, name in enumerate(SEGMENT_NAMES.values())}}
    for prefix, column in columns.items():
        count = num_tokens[column].sum()
        if prefix and count == 0:
            continue
        nll_of_draws = nats[:, column].sum(dim=1) / count
        nll = nll_of_draws.mean()
        metrics[f"{prefix}nll"] = nll.item()
        if len(nats) > 1:
            metrics[f"{prefix}nll_stderr"] = (nll_of_draws.std() / math.sqrt(len(nats))).item()
        metrics[f"{prefix}bpd"] = (nll / math.log(2)).item()
        metrics[f"{prefix}ppl"] = nll.exp().item()
        metrics[f"{prefix}num_tokens"] = int(count)
    return metrics


def format_likelihood(metrics: dict[str, float]) -> str:
    """Format the metrics as a table, with a line for each non-empty segment and one for the total."""
    lines = [f"{'':<11}{'tokens':>10}{'nll':>10}{'':<13}{'bpd':>8}{'ppl':>11}"]
    prefixes = {name: f"{name}_" for name in SEGMENT_NAMES.values()} | {"total": ""}
    for name, prefix in prefixes.items():
        if f"{prefix}nll" not in metrics:
            continue
        stderr = metrics.get(f"{prefix}nll_stderr")
        error = "" if stderr is None else f" +/- {stderr:.5f}"
        numbers = f"{metrics[f'{prefix}nll']:>10.5f}{error:<13}{metrics[f'{prefix}bpd']:>8.4f}"
        lines.append(f"{name:<11}{metrics[f'{prefix}num_tokens']:>10,}{numbers}{metrics[f'{prefix}ppl']:>11.4f}")
    return "\n".join(lines)
