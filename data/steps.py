"""Steps of plans and executions: rows built from steps, and texts split into steps."""

from collections.abc import Sequence
from typing import Any

STEP_SEPARATOR = "\n"


def make_row(question: str, plan_steps: list[str], execution_steps: list[str], answer: str) -> dict[str, Any]:
    """Make a row in which the k-th execution step carries out the k-th plan step.

    Args:
        plan_steps, execution_steps: the steps, each of one or several lines.

    Returns:
        `question`, `plan`, `execution` (ends with `#### <answer>`), `answer`, `plan_steps`, `execution_steps`.

    Raises:
        ValueError: if the numbers of plan steps and execution steps differ.
    """
    if len(plan_steps) != len(execution_steps):
        raise ValueError(
            f"`plan_steps` must have as many steps as `execution_steps`, {len(execution_steps)}, but got "
            f"{len(plan_steps)}: {plan_steps!r}"
        )
    return {
        "question": question,
        "plan": render_steps(plan_steps),
        "execution": render_steps(execution_steps, answer),
        "answer": answer,
        "plan_steps": plan_steps,
        "execution_steps": execution_steps,
    }


def render_steps(steps: Sequence[str], answer: str | None = None) -> str:
    """Join steps to the text of a segment, one per line, followed by a line `#### <answer>` if there is an answer."""
    return STEP_SEPARATOR.join(steps if answer is None else [*steps, f"#### {answer}"])


def split_steps(segment: str) -> list[str]:
    """Split a segment's text before `####` into its non-empty lines, the inverse of [`render_steps`]."""
    lines = segment.partition("####")[0].split(STEP_SEPARATOR)
    return [line.strip() for line in lines if line.strip()]


def number_steps(steps: Sequence[str]) -> list[str]:
    """Prefix the steps with `1. `, `2. `, ..."""
    return [f"{k}. {step}" for k, step in enumerate(steps, 1)]


def pair_lines(
    plan_lines: Sequence[str], execution_lines: Sequence[str], execution_indices: Sequence[int]
) -> tuple[list[str], list[str]]:
    """Group lines into aligned steps, so that every plan line is in the step of the execution line that executes it.

    Args:
        execution_indices: for each plan line the index of its execution line, in non-decreasing order.

    Returns:
        plan steps and execution steps of equal number; no line is lost. Plan lines with the same execution line form
        one step. An execution line without a plan line joins the step of the next line with one, or the last step.
    """
    ends = sorted(set(execution_indices))
    plan_steps, execution_steps, start = [], [], 0
    for end in ends:
        stop = len(execution_lines) if end == ends[-1] else end + 1
        lines = [line for line, index in zip(plan_lines, execution_indices, strict=True) if index == end]
        plan_steps.append(render_steps(lines))
        execution_steps.append(render_steps(execution_lines[start:stop]))
        start = stop
    return plan_steps, execution_steps
