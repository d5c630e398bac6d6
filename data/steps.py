"""Steps of plans and executions: rows built from steps, texts split into steps, and the arithmetic of steps."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Features

STEP_SEPARATOR = "\n"


def make_row(
    question: str,
    plan_steps: list[str],
    execution_steps: list[str],
    answer: str,
    depends_on: list[list[int]] | None = None,
) -> dict[str, Any]:
    """Make a row in which the k-th execution step carries out the k-th plan step.

    Args:
        plan_steps, execution_steps: the steps, each of one or several lines.
        depends_on: for each step the earlier steps that it uses, counted from 0; read from the plan if omitted.

    Returns:
        `question`, `plan`, `execution` (ends with `#### <answer>`), `answer`, `plan_steps`, `execution_steps`, and
        `depends_on`, which is None if [`~order_hierbd3lm.parse_plan`] cannot read it, or if a step has several lines.

    Raises:
        ValueError: if the numbers of plan steps and execution steps differ.
    """
    if len(plan_steps) != len(execution_steps):
        raise ValueError(
            f"`plan_steps` must have as many steps as `execution_steps`, {len(execution_steps)}, but got "
            f"{len(plan_steps)}: {plan_steps!r}"
        )
    plan = render_steps(plan_steps)
    if depends_on is None and len(split_steps(plan)) == len(plan_steps):
        from ..order_hierbd3lm import parse_plan  # torch comes with it

        depends_on = parse_plan(plan)
    return {
        "question": question,
        "plan": plan,
        "execution": render_steps(execution_steps, answer),
        "answer": answer,
        "plan_steps": plan_steps,
        "execution_steps": execution_steps,
        "depends_on": depends_on,
    }


def row_features() -> "Features":
    """Return the types of the columns of [`make_row`], also where no row has a value."""
    from datasets import Features, List, Value

    texts, lists = ("question", "plan", "execution", "answer"), ("plan_steps", "execution_steps")
    columns = dict.fromkeys(texts, Value("string")) | dict.fromkeys(lists, List(Value("string")))
    return Features(columns | {"depends_on": List(List(Value("int64")))})


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


def step_spans(segment: str) -> list[tuple[int, int]]:
    """Return start and end of each step of [`split_steps`] in the text of a segment."""
    spans, start = [], 0
    for line in segment.partition("####")[0].split(STEP_SEPARATOR):
        if line.strip():
            first = start + len(line) - len(line.lstrip())
            spans.append((first, first + len(line.strip())))
        start += len(line) + len(STEP_SEPARATOR)
    return spans


# Arithmetic of executions

OPERAND = r"[$€£]?\d[\d,]*(?:\.\d+)?"
# An operation on numbers and its result, such as `5 + 3 = 8` or `48/2 = $24`; no part of a longer expression.
OPERATION = re.compile(
    rf"(?<![\w.,)%/*+-])(?<![-+*/x×÷]\s)(?P<expression>-?{OPERAND}(?:\s*[-+*/x×÷]\s*{OPERAND})+)\s*=\s*[$€£]?(?P<result>-?{OPERAND})"
    r"(?![\d%]|[.,]\d|\s\d+/\d|\s*[-+*/x×÷(]\s*[\d$(])"
)


def first_wrong_step(execution: str) -> int | None:
    """Return the index of the first execution step whose arithmetic is wrong; None if there is none.

    A step is wrong if it has an operation such as `5 + 3 = 8` with another result; a result with decimals may be
    rounded. The last step is also wrong if it ends with another number than the answer after `####`. What has no
    such format is not checked: a step without an operation is never wrong.
    """
    steps = split_steps(execution)
    for index, step in enumerate(steps):
        if not all(_is_right(match["expression"], match["result"]) for match in OPERATION.finditer(step)):
            return index
    answer = re.match(rf"\s*(-?{OPERAND})", execution.partition("####")[2])
    for match in OPERATION.finditer(steps[-1]) if steps and answer else ():
        if match.end() == len(steps[-1]) and _number(match["result"]) != _number(answer[1]):
            return len(steps) - 1
    return None


def _is_right(expression: str, result: str) -> bool:
    value, written = _evaluate(expression), _number(result)
    if value is None:
        return False
    num_decimals = len(result.partition(".")[2])
    return value == written or (num_decimals > 0 and 2 * abs(value - written) * 10**num_decimals <= 1)


def _evaluate(expression: str) -> Fraction | None:
    """Return the value of numbers joined by + - * /, products first; None for a division by zero."""
    terms: list[Fraction] = []
    for symbol, number in re.findall(rf"(^-?|[-+*/x×÷])\s*({OPERAND})", expression):
        value = _number(number)
        if symbol in ("", "+", "-"):
            terms.append(-value if symbol == "-" else value)
        elif symbol in "/÷" and value == 0:
            return None
        else:
            terms[-1] *= 1 / value if symbol in "/÷" else value
    return sum(terms, Fraction(0))


def _number(text: str) -> Fraction:
    return Fraction(re.sub("[,$€£]", "", text))
