"""Plans that executions are generated from in place of the model's own."""

import json
from pathlib import Path

from datasets import Dataset

from .arguments import REFERENCE_PLANS


def with_given_plans(dataset: Dataset, source: str, num_samples: int = 1) -> Dataset:
    """The dataset with the plans that its executions are to be generated from, in a new column `given_plans`.

    Args:
        dataset: has `question`, and `plan` where that is the source.
        source: `reference` for each example's own `plan`, or a JSON lines file with `question` and `plan`, such as
            the `predictions.jsonl` of another run.
        num_samples: a file may have one plan of a question, which all samples share, or so many, one for each.

    Raises:
        ValueError: for an example whose plan is missing or of which the file has another number of plans; the message
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
    """The plans of each question, in the order of a JSON lines file.

    Raises:
        ValueError: for a line that is no JSON object with the texts `question` and `plan`; the message names it.
    """
    plans: dict[str, list[str]] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                question, plan = _read_plan(line)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} must be JSON with the texts `question` and `plan`, but got {line[:80]!r}"
                ) from error
            plans.setdefault(question, []).append(plan)
    return plans


def _read_plan(line: str) -> tuple[str, str]:
    row = json.loads(line)
    question, plan = row["question"], row["plan"]
    if not isinstance(question, str) or not isinstance(plan, str):
        raise TypeError(f"`question` and `plan` must be texts, but got {question!r} and {plan!r}")
    return question, plan
