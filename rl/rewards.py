"""Reward functions with the signature of TRL: `(prompts, completions, **columns) -> list of rewards`.

[`HierBD3LMGRPOTrainer`] adds the columns `generated_plan` and `generated_execution` to those of the dataset.
"""

from collections.abc import Sequence
from typing import Any

from ..data.gsm8k.answers import cut_at_stops, match_strict
from ..data.steps import first_wrong_step, split_steps
from ..data.synthetic.checks import FOLLOWED, check_execution


def exact_match(generated_execution: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """Return 1 where the strict answer of an execution is the target, as an evaluation scores it, else 0."""
    pairs = zip(generated_execution, answer, strict=True)
    return [float(match_strict(cut_at_stops(text), target)) for text, target in pairs]


def plan_format(generated_plan: Sequence[str], **columns: Any) -> list[float]:
    """Return 1 for a plan of at least one step without a repeated step, else 0."""
    steps = [split_steps(plan) for plan in generated_plan]
    return [float(bool(of_plan) and len(set(of_plan)) == len(of_plan)) for of_plan in steps]


def plan_followed(
    prompts: Sequence[str], generated_plan: Sequence[str], generated_execution: Sequence[str], **columns: Any
) -> list[float]:
    """Return the fraction of the steps of plan and execution in which the execution does what the plan says.

    For synthetic problems, see [`~data.synthetic.checks.check_execution`].
    """
    rewards = []
    for row in zip(prompts, generated_plan, generated_execution, strict=True):
        verdicts = check_execution(*row)
        rewards.append(verdicts.count(FOLLOWED) / len(verdicts) if verdicts else 0.0)
    return rewards


def arithmetic(generated_execution: Sequence[str], **columns: Any) -> list[float]:
    """Return 1 where every calculation that an execution writes out is right, else 0."""
    return [float(first_wrong_step(text) is None) for text in generated_execution]


def brevity(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """Return minus the number of tokens of plan and execution, in hundreds; to be used with a small weight."""
    return [-len(ids) / 100 for ids in completion_ids]


REWARDS = {function.__name__: function for function in (exact_match, plan_format, plan_followed, arithmetic, brevity)}
