"""Given plans, which replace those that the model would generate."""

from pathlib import Path

from datasets import Dataset

from ..data.files import read_text_rows
from .arguments import REFERENCE_PLANS


def with_given_plans(dataset: Dataset, source: str, num_samples: int = 1) -> Dataset:
    """Add the plans to execute to a dataset, as a column `given_plans`.

    Args:
        dataset: dataset with the column `question`, and `plan` if `source` is `reference`.
        source: `reference` for the `plan` of each example, or a JSON lines file with `question` and `plan`, such as
            the `predictions.jsonl` of another run.
        num_samples: number of samples per question. A file has one plan per question, shared by all samples, or
            `num_samples` plans, one for each sample.

    Raises:
        ValueError: if the plan of an example is missing, or the file has another number of plans for it; the message
            names the row.
    """
    if source == REFERENCE_PLANS:
        if "plan" not in dataset.column_names:
            raise ValueError(f"`dataset` must have the column plan, but has {', '.join(dataset.column_names)}")
        plans = [[plan] if plan else [] for plan in dataset["plan"]]
    else:
        plans_of = read_plans(Path(source))
        plans = [plans_of.get(question, []) for question in dataset["question"]]
    for row, given in enumerate(plans):
        if len(given) not in (1, num_samples):
            accepted = "1" if num_samples == 1 else f"1 or num_samples={num_samples}"
            raise ValueError(
                f"row {row}: `given_plan` must hold {accepted} of its plans, but {source!r} has {len(given)}"
            )
    return dataset.add_column("given_plans", plans)


def read_plans(path: Path) -> dict[str, list[str]]:
    """Read the plans of each question from a JSON lines file, in the order of the file.

    Raises:
        ValueError: if a line is not a JSON object with the texts `question` and `plan`; the message names the line.
    """
    plans: dict[str, list[str]] = {}
    for row in read_text_rows(path, ("question", "plan")):
        plans.setdefault(row["question"], []).append(row["plan"])
    return plans
