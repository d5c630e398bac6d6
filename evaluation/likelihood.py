"""How the likelihood of examples is measured: nats per segment, over the tokens that every algorithm counts alike."""

import math
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..configuration_hierbd3lm import HierBD3LMConfig
from ..data.collator import ID_KEYS, HierarchicalDataCollator, counted_tokens
from ..masking_hierbd3lm import EXECUTION, SEGMENT_NAMES
from ..training.objectives import Batch, Objective, make_objective


def with_predicted_tokens(model: Any, inputs: Batch) -> Batch:
    """The batch with `maskable`, which tokens the model predicts, and block and position ids if it lacks them."""
    batch = dict(inputs)
    if "block_ids" not in batch:
        batch["block_ids"], batch["position_ids"] = model.order.layout(batch["segment_ids"])
    batch["maskable"] = model.order.predicted(batch["input_ids"], batch["segment_ids"])
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
    """The likelihood of plan and execution given the question: see [`likelihood_metrics`].

    Args:
        dataset: encoded examples, as [`prepare_dataset`] returns them.
        num_draws, exact: see [`measure_batch`].
        estimator: see `ESTIMATORS`.
        batch_size: examples that are measured together, grouped by length.
        seed: of the noise.
        plan_is_given: measures the execution alone, given question and plan, of which no token is then masked.

    Raises:
        RuntimeError: if not exactly the content and one `<|end|>` of each segment were counted, or of text that goes
            on in other rows exactly its tokens.
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
            batch["maskable"] &= behind_given_plan(model.config, batch)
        totals.append(measure_batch(objective, model, batch, num_draws, generator, exact).sum(dim=0).cpu())
    total = torch.stack(totals).sum(dim=0)
    check_counts(total[-1], dataset, model.config)
    metrics = likelihood_metrics(total[:-1], total[-1])
    measured = f"{SEGMENT_NAMES[EXECUTION]}_" if plan_is_given else ""
    return {name: value for name, value in metrics.items() if name.startswith(measured)}


def behind_given_plan(config: Any, batch: Batch) -> torch.Tensor:
    """Tokens that are written where plan and openers are given: `torch.BoolTensor` of shape `(batch, length)`."""
    return (batch["segment_ids"] == EXECUTION) & (batch["input_ids"] != config.execution_token_id)


def check_counts(num_tokens: torch.Tensor, dataset: Dataset, config: HierBD3LMConfig) -> None:
    """Raises a RuntimeError unless `num_tokens` of shape `(segments,)` are those that every algorithm counts."""
    columns = [name for name in (*ID_KEYS, "continues") if name in dataset.column_names]
    counts = [counted_tokens(example, config) for example in dataset.select_columns(columns)]
    expected = [sum(count[name] for count in counts) for name in SEGMENT_NAMES.values()]
    if num_tokens.tolist() != expected:
        raise RuntimeError(f"the counted tokens must be {expected}, as for every algorithm, but are {num_tokens}")


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
    """Likelihoods of all tokens and of each segment that has any.

    Args:
        nats (`torch.DoubleTensor` of shape `(draws, segments)`): NELBO of every draw, summed over the data.
        num_tokens (`torch.DoubleTensor` of shape `(segments,)`): the tokens that they average over.
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
    """The metrics as a table for people: a line for each segment that has tokens, and one for all."""
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
