"""How a row is made from the steps of its plan and the steps of its execution, and a text is read as steps."""

from collections.abc import Sequence
from typing import Any

STEP_SEPARATOR = "\n"


def make_row(question: str, plan_steps: list[str], execution_steps: list[str], answer: str) -> dict[str, Any]:
    """A row whose k-th plan step is carried out by its k-th execution step.

    Args:
        plan_steps, execution_steps: one line each, or several that belong together.

    Returns:
        `question`, `plan`, `execution` (ends with `#### <answer>`), `answer`, `plan_steps`, `execution_steps`.

    Raises:
        ValueError: unless there are as many plan steps as execution steps.
    """
    if len(plan_steps) != len(execution_steps):
        raise ValueError(
            f"`plan_steps` must have one step for each of the {len(execution_steps)} execution steps, but got "
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
    """The text of a segment: its steps one below the other and, if it has an answer, `#### <answer>` below them."""
    return STEP_SEPARATOR.join(steps if answer is None else [*steps, f"#### {answer}"])


def split_steps(segment: str) -> list[str]:
    """The lines of [`render_steps`], which a segment's text has before `####`; empty ones are left out."""
    lines = segment.partition("####")[0].split(STEP_SEPARATOR)
    return [line.strip() for line in lines if line.strip()]


def number_steps(steps: Sequence[str]) -> list[str]:
    """The steps as `1. ...`, `2. ...`."""
    return [f"{k}. {step}" for k, step in enumerate(steps, 1)]


def pair_lines(
    plan_lines: Sequence[str], execution_lines: Sequence[str], carried_out_by: Sequence[int]
) -> tuple[list[str], list[str]]:
    """Joins lines to steps, such that every plan line is in the step of the execution line that carries it out.

    Args:
        carried_out_by: for each plan line the index of its execution line; does not fall.

    Returns:
        plan steps and execution steps, the k-th with the k-th; no line is lost. Plan lines of one execution line are
        one step. An execution line that carries out none belongs to the step of the next that does, or to the last.
    """
    ends = sorted(set(carried_out_by))
    plan_steps, execution_steps, start = [], [], 0
    for end in ends:
        stop = len(execution_lines) if end == ends[-1] else end + 1
        lines = [line for line, by in zip(plan_lines, carried_out_by, strict=True) if by == end]
        plan_steps.append(render_steps(lines))
        execution_steps.append(render_steps(execution_lines[start:stop]))
        start = stop
    return plan_steps, execution_steps
