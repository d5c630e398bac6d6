"""Replacement plans for a problem: the plan of another problem, or its own plan with one change."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..steps import render_steps, split_steps
from .checks import OPERATIONS, Step, carry_out, given_values, parse_plan
from .quantities import MAX_FACTOR


@dataclass(frozen=True)
class ChangedPlan:
    """A plan with one changed step.

    Args:
        plan: its text.
        step: index of the changed step.
        kind: kind of the change: another `operation`; another `number`; another quantity as an `operand`; or a number
            as the second `addend` of a sum of two.
        answer: value of the last step.
    """

    plan: str
    step: int
    kind: str
    answer: int


def exchange_plans(plans: Sequence[str], seed: int = 0) -> list[int]:
    """Assign to each problem the plan of another one, with a different text; each plan is used once.

    Plans are exchanged among those with the same number of steps, unless more than half of these have the same text:
    such a group is merged with other groups.

    Returns:
        for each problem, the index of the problem whose plan it gets.

    Raises:
        ValueError: if more than half of all plans have the same text.
    """
    groups: dict[int, list[int]] = {}
    for index, plan in enumerate(plans):
        groups.setdefault(len(split_steps(plan)), []).append(index)
    circles = [group for _, group in sorted(groups.items()) if _can_exchange(group, plans)]
    rest = [index for _, group in sorted(groups.items()) if group not in circles for index in group]
    while rest and circles and not _can_exchange(rest, plans):
        rest += circles.pop()
    if rest and not _can_exchange(rest, plans):
        raise ValueError(
            f"`plans` must not have the same text in more than half of all cases, but got {len(plans)} such plans"
        )
    rng, others = random.Random(seed), [0] * len(plans)
    for circle in [*circles, rest]:
        for index, other in _rotate(circle, plans, rng):
            others[index] = other
    return others


def change_plan(rng: random.Random, question: str, plan: str, max_value: int) -> ChangedPlan | None:
    """Draw a plan with one changed step and another answer.

    Steps keep the forms of the synthetic problems, and all values stay in [1, max_value]. The kind of the change is
    drawn first, then the change.

    Returns:
        the changed plan, or None if no change leads to another answer.

    Raises:
        ValueError: for a plan that cannot be parsed, or that names a quantity without a value.
    """
    given, steps = given_values(question), parse_plan(plan)
    answer = carry_out(steps, given)[-1]
    changes: dict[str, list[tuple[int, Step]]] = {}
    for index, step in enumerate(steps):
        known = [*given, *(earlier.name for earlier in steps[:index])]
        for kind, changed in _changes(step, known, max_value):
            changes.setdefault(kind, []).append((index, changed))
    for kind in rng.sample(sorted(changes), len(changes)):
        for index, changed in rng.sample(changes[kind], len(changes[kind])):
            new_steps = [*steps[:index], changed, *steps[index + 1 :]]
            values = carry_out(new_steps, given)
            if values[-1] != answer and all(1 <= value <= max_value for value in values):
                return ChangedPlan(render_steps([str(step) for step in new_steps]), index, kind, values[-1])
    return None


def _can_exchange(group: Sequence[int], plans: Sequence[str]) -> bool:
    return 2 * max(Counter(plans[index] for index in group).values()) <= len(group)


def _rotate(group: Sequence[int], plans: Sequence[str], rng: random.Random) -> Iterator[tuple[int, int]]:
    """Pair each index with the one that is as far ahead as the longest run of equal texts."""
    by_text: dict[str, list[int]] = {}
    for index in group:
        by_text.setdefault(plans[index], []).append(index)
    texts = rng.sample(sorted(by_text), len(by_text))
    order = [index for text in texts for index in by_text[text]]
    longest = max(map(len, by_text.values()), default=0)
    return zip(order, order[longest:] + order[:longest], strict=True)


def _changes(step: Step, known: Sequence[str], max_value: int) -> Iterator[tuple[str, Step]]:
    """Yield steps that differ from `step` in one part, with the kind of change; `known` quantities have a value."""
    *first, last = step.operands
    if last.isdecimal():
        for symbol in OPERATIONS:
            if symbol != step.symbol and int(last) in _numbers(symbol, max_value):
                yield "operation", replace(step, symbol=symbol)
        for number in _numbers(step.symbol, max_value):
            if number != int(last):
                yield "number", replace(step, operands=(*first, str(number)))
    elif len(first) == 1:  # a sum of two, which becomes a sum with a number
        for number in _numbers(step.symbol, max_value):
            yield "addend", replace(step, operands=(*first, str(number)))
    for place, operand in enumerate(step.operands):
        if not operand.isdecimal():
            for name in known:
                if name not in (step.name, *step.operands):
                    operands = (*step.operands[:place], name, *step.operands[place + 1 :])
                    yield "operand", replace(step, operands=operands)


def _numbers(symbol: str, max_value: int) -> range:
    """Return the numbers that a step with this operation may state."""
    return range(2, MAX_FACTOR + 1) if symbol == "*" else range(1, max_value)
