"""Training examples whose plan is given: a changed plan with its own execution, or no plan.

The question stays. The loss counts for the execution alone, as the question does not ask for such a plan.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, Value

from .gsm8k.counterfactuals import change_solution
from .steps import make_row
from .synthetic.checks import depends_on, given_values, parse_plan, write_execution
from .synthetic.config import SyntheticConfig
from .synthetic.plan_swaps import KINDS, change_plan
from .synthetic.vocabulary import NAMES

Row = dict[str, Any]
Change = Callable[[random.Random, Row], Row | None]  # the new columns, or None if the plan cannot be changed


def give_plans(
    dataset: Dataset, change: Change | None, counterfactual_plans: float, plan_dropout: float, seed: str
) -> tuple[Dataset, dict[str, int]]:
    """Replace the plans of randomly chosen rows; the choice depends on `seed` and the index of a row alone.

    Args:
        dataset: dataset with `question`, `plan`, `execution`, and possibly columns derived from them.
        change: function that changes the plan of a row, and its execution with it.
        counterfactual_plans: probability of a changed plan.
        plan_dropout: probability of an empty plan; the execution stays.

    Returns:
        the rows with the column `plan_is_given`, and counts: `num_changed_plans`, `num_unchangeable_plans` (rows that
        are left as they are, because their plan cannot be changed) and `num_dropped_plans`.
    """
    if not counterfactual_plans and not plan_dropout:
        return dataset, {}

    def give(row: Row, index: int) -> Row:
        rng = random.Random(f"{seed} {index}")
        chance = rng.random()
        if chance < counterfactual_plans:
            changed = change(rng, row)
            return {**(changed or {}), "outcome": "unchangeable" if changed is None else "changed"}
        if chance < counterfactual_plans + plan_dropout:
            return without_plan(row) | {"outcome": "dropped"}
        return {"outcome": "kept"}

    features = dataset.features.copy()
    features["outcome"] = Value("string")
    given = dataset.map(
        give, with_indices=True, features=features, load_from_cache_file=False, desc="Changing plans"
    )  # the cache's key does not include the code of the changes
    outcomes = given["outcome"][:]
    counts = Counter(outcomes)
    is_given = [outcome in ("changed", "dropped") for outcome in outcomes]
    given = given.remove_columns("outcome").add_column("plan_is_given", is_given)
    return given, {f"num_{outcome}_plans": counts[outcome] for outcome in ("changed", "unchangeable", "dropped")}


def without_plan(row: Row) -> Row:
    """Return the columns of a row whose plan is empty."""
    others = {"plan_steps": [], "depends_on": None}
    return {"plan": "", **{name: value for name, value in others.items() if name in row}}


def change_synthetic(config: SyntheticConfig) -> Change:
    """Return the function that changes the plan of a synthetic problem in one of `KINDS`, with any answer."""
    names = NAMES[: config.num_names]

    def change(rng: random.Random, row: Row) -> Row | None:
        texts = row["question"], row["plan"]
        changed = change_plan(rng, *texts, config.max_value, names, KINDS, has_other_answer=False)
        return None if changed is None else carried_out(row["question"], changed.plan)

    return change


def change_gsm8k(solutions: Mapping[str, str]) -> Change:
    """Return the function that changes the plan of a GSM8K problem; see [`change_solution`].

    Args:
        solutions: annotated solution of each question.
    """
    return lambda rng, row: change_solution(rng, row["question"], solutions[row["question"]])


def carried_out(question: str, plan: str) -> Row:
    """Return the columns of a synthetic problem that follow from its plan."""
    steps, given = parse_plan(plan), given_values(question)
    lines = write_execution(steps, given)
    answer = lines[-1].rpartition(" ")[2]
    return make_row(question, [str(step) for step in steps], lines, answer, depends_on(steps)) | {
        "num_steps": len(steps)
    }
