"""Likelihood of a checkpoint on a dataset."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.run_folder import write_json
from ..data.splits import encode_split
from ..order_hierbd3lm import total_order
from .arguments import LikelihoodArguments
from .checkpoints import describe_model, load_examples, load_model
from .likelihood import format_likelihood, measure_likelihood


def measure_checkpoint(args: LikelihoodArguments) -> dict[str, Any]:
    """Measure the likelihood, write it to `args.output`, and return the result.

    With `execution_order="plan"` the result has `total_order_nll` too, where every step sees all before it, and
    `price_of_parallelism`, what the order of the plan adds to it, both in nats per token.
    """
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.attn_implementation)
    data_args, examples = load_examples(args, args.text_column)
    dataset, report = encode_split(examples, replace(data_args, over_long="drop"), tokenizer, model.config)
    if len(dataset) == 0:
        raise ValueError(f"`dataset` must have an example that fits, but all {report['num_dropped']} are over-long")
    settings = {name: getattr(args, name) for name in ("num_draws", "exact", "estimator", "batch_size", "seed")}
    metrics = measure_likelihood(model, dataset, **settings)
    if model.order.follows_plan:
        in_order = measure_likelihood(model, in_total_order(dataset), **settings)
        metrics["total_order_nll"] = in_order["nll"]
        metrics["price_of_parallelism"] = metrics["nll"] - in_order["nll"]
    if "num_bytes" in report:
        metrics["bits_per_byte"] = metrics["bpd"] * metrics["num_tokens"] / report["num_bytes"]
    result = metrics | {
        "model": args.model,
        "dataset": data_args.dataset,
        "dataset_name": data_args.dataset_name,
        "split": getattr(data_args, f"dataset_{args.split}_split", None) or args.split,
        **{name: value for name, value in report.items() if name not in ("num_kept", "num_tokens")},
        **settings,
        "device": str(model.device),
    }
    result |= describe_model(model)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(args.output), result)
    return result


def in_total_order(dataset: Dataset) -> Dataset:
    """Return encoded examples in which each step depends on all before it."""

    def depend_on_all(row: dict[str, Any]) -> dict[str, Any]:
        return {"depends_on": total_order(len(row["depends_on"]))}

    return dataset.map(depend_on_all, load_from_cache_file=False, features=dataset.features, desc="Total order")


def format_result(result: dict[str, Any]) -> str:
    """Format the likelihood as a table, followed by the size of the dataset."""
    table = format_likelihood(result)
    if "price_of_parallelism" in result:
        table += f"\nprice of parallelism: {result['price_of_parallelism']:+.5f} nats per token over the total order"
    if "num_documents" not in result:
        return f"{table}\n{result['num_examples']:,} examples, {result['num_dropped']:,} over-long examples dropped"
    size = f"{result['num_documents']:,} documents of {result['num_bytes']:,} bytes in {result['num_rows']:,} rows"
    return f"{table}\n{size}: {result['bits_per_byte']:.4f} bits per byte"
