"""Plans in place of a problem's own: that of another problem, or its own with one operation changed."""

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
        kind: what was changed: its `operation`; its `number`; an `operand`, for another quantity; or the last `addend`
            of two, for a number.
        answer: the value of its last step.
    """

    plan: str
    step: int
    kind: str
    answer: int


def exchange_plans(plans: Sequence[str], seed: int = 0) -> list[int]:
    """For each problem the index of another one, whose plan has another text; each plan is given away once.

    Plans of as many steps are exchanged among each other. Only where too many of these are the same text do they join
    those of other numbers of steps.

    Raises:
        ValueError: if more than half of all plans are the same text: then there is no such exchange.
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
            f"`plans` must not be one text in more than half of all cases, but got {len(plans)} such plans"
        )
    rng, others = random.Random(seed), [0] * len(plans)
    for circle in [*circles, rest]:
        for index, other in _rotate(circle, plans, rng):
            others[index] = other
    return others


def change_plan(rng: random.Random, question: str, plan: str, max_value: int) -> ChangedPlan | None:
    """Draws a plan in which one step differs in one thing, such that the answer is another one.

    All steps stay of the kinds that the synthetic problems have, and all values in [1, max_value]. What is changed is
    drawn first, then the change.

    Returns:
        the changed plan, or None if no change gives such an answer.

    Raises:
        ValueError: for a plan that cannot be read, or that names a quantity without a value.
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
    """Pairs each index with the one so far ahead that no run of equal texts reaches there."""
    by_text: dict[str, list[int]] = {}
    for index in group:
        by_text.setdefault(plans[index], []).append(index)
    texts = rng.sample(sorted(by_text), len(by_text))
    order = [index for text in texts for index in by_text[text]]
    longest = max(map(len, by_text.values()), default=0)
    return zip(order, order[longest:] + order[:longest], strict=True)


def _changes(step: Step, known: Sequence[str], max_value: int) -> Iterator[tuple[str, Step]]:
    """Steps that differ from `step` in one thing, which is named; `known` are the quantities with a value."""
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
    """The numbers that a step with this operation may state."""
    return range(2, MAX_FACTOR + 1) if symbol == "*" else range(1, max_value)
