"""Parsing, carrying out and comparing the steps of synthetic problems.

A plan step is one operation on quantities and numbers, an execution step is the same operation on values:

    Mia = Tom + 3
    Mia = 5 + 3 = 8
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import zip_longest
from operator import add, mul, sub

from ..steps import split_steps
from .vocabulary import PHRASINGS

OPERATIONS = {"+": add, "-": sub, "*": mul}

COMMUTATIVE = ("+", "*")

NAME, NUMBER = r"[A-Za-z]+", r"-?[0-9]+"
PLAN_STEP = re.compile(rf"({NAME}) = ((?:{NAME}|{NUMBER})(?: [-+*] (?:{NAME}|{NUMBER}))+)")
EXECUTION_STEP = re.compile(rf"({NAME}) = ({NUMBER}(?: [-+*] {NUMBER})+) = ({NUMBER})")
GIVEN = [
    re.compile(phrasing.replace(".", r"\.").format(name=rf"\b({NAME})", number=r"([0-9]+)", things="[a-z]+"))
    for phrasing in PHRASINGS["given"]
]

# Verdicts on the execution step at the same position as a plan step
FOLLOWED = "followed"
VERDICTS = {
    FOLLOWED: "carries out the plan step",
    "missing": "there is no execution step",
    "extra": "there is no plan step",
    "unreadable plan": "the plan step does not have the format",
    "unreadable": "the execution step does not have the format",
    "quantity": "computes another quantity",
    "operation": "applies another operation",
    "undefined": "the plan step names a quantity that is neither given nor computed before",
    "operands": "applies the operation to other values",
    "arithmetic": "applies the operation to the right values, with a wrong result",
}


@dataclass(frozen=True)
class Step:
    """One operation.

    Args:
        name: the computed quantity.
        symbol: a key of `OPERATIONS`, written between all operands.
        operands: names of quantities, and numbers in digits; at least two.
    """

    name: str
    symbol: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} = {f' {self.symbol} '.join(self.operands)}"


def given_values(question: str) -> dict[str, int]:
    """Return the values of the quantities that a question states directly."""
    return {name: int(number) for pattern in GIVEN for name, number in pattern.findall(question)}


def parse_plan_step(line: str) -> Step | None:
    """Parse `Mia = Tom + 3`; return None for a line of another format."""
    match = PLAN_STEP.fullmatch(line)
    return None if match is None else _read_operation(match[1], match[2])


def parse_execution_step(line: str) -> tuple[Step, int] | None:
    """Parse `Mia = 5 + 3 = 8` into operation and result; return None for a line of another format."""
    match = EXECUTION_STEP.fullmatch(line)
    step = None if match is None else _read_operation(match[1], match[2])
    return None if step is None else (step, int(match[3]))


def parse_plan(plan: str) -> list[Step]:
    """Parse the steps of a plan.

    Raises:
        ValueError: for a plan without steps, or with a step of another format.
    """
    steps = [parse_plan_step(line) for line in split_steps(plan)]
    if not steps or None in steps:
        raise ValueError(f"`plan` must have lines such as 'Mia = Tom + 3' with one operation each, but got {plan!r}")
    return steps


def carry_out(steps: Iterable[Step], given: Mapping[str, int]) -> list[int]:
    """Compute the exact value of each step.

    Raises:
        ValueError: for a step that names a quantity that is neither given nor computed before.
    """
    values, results = dict(given), []
    for step in steps:
        operands = operand_values(step, values)
        if operands is None:
            raise ValueError(f"`steps` must name quantities among {', '.join(values)}, but got '{step}'")
        values[step.name] = reduce(OPERATIONS[step.symbol], operands)
        results.append(values[step.name])
    return results


def write_execution(steps: Sequence[Step], given: Mapping[str, int]) -> list[str]:
    """Write the execution step of each plan step; raises as [`carry_out`] does."""
    values, lines = dict(given), []
    for step, result in zip(steps, carry_out(steps, given), strict=True):
        operands = [str(value) for value in operand_values(step, values) or ()]
        lines.append(f"{replace(step, operands=tuple(operands))} = {result}")
        values[step.name] = result
    return lines


def depends_on(steps: Sequence[Step]) -> list[list[int]]:
    """Return for each step the indices of the earlier steps whose results it uses."""
    computed: dict[str, int] = {}
    needed = []
    for index, step in enumerate(steps):
        needed.append(sorted({computed[operand] for operand in step.operands if operand in computed}))
        computed[step.name] = index
    return needed


def operand_values(step: Step, values: Mapping[str, int]) -> list[int] | None:
    """Return the operands as numbers; None if one of them has no value."""
    if any(operand not in values and not re.fullmatch(NUMBER, operand) for operand in step.operands):
        return None
    return [values[operand] if operand in values else int(operand) for operand in step.operands]


def check_execution(question: str, plan: str, execution: str) -> list[str]:
    """Check that each execution step applies the operation of its plan step to the operands named there.

    The value of a quantity is the one stated in the question or written earlier in the execution: a wrong result
    counts against the step that computes it, not against the steps that use it. The operands of a sum or product may
    be in any order.

    Returns:
        a key of `VERDICTS` for each plan step, then for each execution step beyond the plan.
    """
    values, verdicts = given_values(question), []
    for plan_line, execution_line in zip_longest(split_steps(plan), split_steps(execution)):
        written = None if execution_line is None else parse_execution_step(execution_line)
        verdicts.append(_check_step(plan_line, execution_line, values))
        if written is not None:
            step, result = written
            values[step.name] = result
    return verdicts


def _read_operation(name: str, operation: str) -> Step | None:
    first, *rest = operation.split(" ")
    symbols = set(rest[::2])
    return Step(name, symbols.pop(), (first, *rest[1::2])) if len(symbols) == 1 else None


def _check_step(plan_line: str | None, execution_line: str | None, values: Mapping[str, int]) -> str:
    if plan_line is None:
        return "extra"
    step = parse_plan_step(plan_line)
    if step is None:
        return "unreadable plan"
    if execution_line is None:
        return "missing"
    written = parse_execution_step(execution_line)
    return "unreadable" if written is None else _compare(step, *written, values)


def _compare(step: Step, written: Step, result: int, values: Mapping[str, int]) -> str:
    """Return the verdict on a parsed execution step."""
    if written.name != step.name:
        return "quantity"
    if written.symbol != step.symbol:
        return "operation"
    expected, numbers = operand_values(step, values), [int(operand) for operand in written.operands]
    if expected is None:
        return "undefined"
    if step.symbol in COMMUTATIVE:
        expected, numbers = sorted(expected), sorted(numbers)
    if numbers != expected:
        return "operands"
    return FOLLOWED if result == reduce(OPERATIONS[step.symbol], numbers) else "arithmetic"
