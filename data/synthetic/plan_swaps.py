"""Replacement plans for a problem: the plan of another problem, or its own plan with one change."""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

from ..steps import render_steps, split_steps
from .checks import NAME, OPERATIONS, Step, carry_out, given_values, parse_plan
from .quantities import MAX_FACTOR

# Kinds of changes. One part of one step: another operation, another number, another quantity as an operand, or a
# number as the second addend of a sum of two.
ONE_PART = ("operation", "number", "operand", "addend")
# A step that another one builds on, or that follows the last one, is inserted; a step is removed, and an operand takes
# its place; two steps exchange what they do.
KINDS = (*ONE_PART, "inserted", "removed", "exchanged")
# Kinds that no model is trained on: a step of two numbers, and one part of each of two steps.
UNSEEN_KINDS = ("constant", "two steps")


@dataclass(frozen=True)
class ChangedPlan:
    """A plan with a change.

    Args:
        plan: its text.
        steps: indices of the steps that differ, in the changed plan; the number of its steps stands for a removed end.
        kind: kind of the change, one of `KINDS` and `UNSEEN_KINDS`.
        answer: value of the last step.
    """

    plan: str
    steps: tuple[int, ...]
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


def change_plan(
    rng: random.Random,
    question: str,
    plan: str,
    max_value: int,
    names: Sequence[str] = (),
    kinds: Sequence[str] = (*KINDS, *UNSEEN_KINDS),
    has_other_answer: bool = True,
) -> ChangedPlan | None:
    """Draw a changed plan.

    All values stay in [1, max_value]. The kind of the change is drawn first, then the change.

    Args:
        names: names of inserted quantities; none is inserted where the texts have all of them.
        kinds: kinds of changes to choose from.
        has_other_answer: draw a plan with another answer.

    Returns:
        the changed plan, or None if there is none of these kinds.

    Raises:
        ValueError: for a plan that cannot be parsed, or that names a quantity without a value.
    """
    given, steps = given_values(question), parse_plan(plan)
    answer = carry_out(steps, given)[-1]
    free = [name for name in names if name not in re.findall(NAME, f"{question} {plan}")]
    new_name = rng.choice(free) if free else None
    for kind in rng.sample(sorted(kinds), len(kinds)):
        changes = list(_CHANGES[kind](steps, list(given), max_value, new_name))
        for places, new_steps in rng.sample(changes, len(changes)):
            values = carry_out(new_steps, given)
            is_other = values[-1] != answer if has_other_answer else new_steps != steps
            if is_other and all(1 <= value <= max_value for value in values):
                return ChangedPlan(render_steps([str(step) for step in new_steps]), places, kind, values[-1])
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


Change = tuple[tuple[int, ...], list[Step]]  # places of the steps that differ, and all steps


def _change_part(kind: str, steps: list[Step], given: list[str], max_value: int, name: str | None) -> Iterator[Change]:
    """Yield the changes of one part of one step."""
    for index, step in enumerate(steps):
        known = [*given, *(earlier.name for earlier in steps[:index])]
        for changed in _PARTS[kind](step, known, max_value):
            yield (index,), [*steps[:index], changed, *steps[index + 1 :]]


def _other_operations(step: Step, known: list[str], max_value: int) -> Iterator[Step]:
    last = step.operands[-1]
    for symbol in OPERATIONS if last.isdecimal() else ():
        if symbol != step.symbol and int(last) in _numbers(symbol, max_value):
            yield replace(step, symbol=symbol)


def _other_numbers(step: Step, known: list[str], max_value: int) -> Iterator[Step]:
    *first, last = step.operands
    for number in _numbers(step.symbol, max_value) if last.isdecimal() else ():
        if number != int(last):
            yield replace(step, operands=(*first, str(number)))


def _numbers_as_addends(step: Step, known: list[str], max_value: int) -> Iterator[Step]:
    first, last = step.operands[0], step.operands[-1]
    for number in _numbers(step.symbol, max_value) if len(step.operands) == 2 and not last.isdecimal() else ():
        yield replace(step, operands=(first, str(number)))


def _other_operands(step: Step, known: list[str], max_value: int) -> Iterator[Step]:
    for place, operand in enumerate(step.operands):
        for name in known if not operand.isdecimal() else ():
            if name not in (step.name, *step.operands):
                yield replace(step, operands=(*step.operands[:place], name, *step.operands[place + 1 :]))


def _insert(steps: list[Step], given: list[str], max_value: int, name: str | None) -> Iterator[Change]:
    """Yield plans with a step more: one that an operand of another step is taken from, or one after the last."""
    operations = [(symbol, str(number)) for symbol in OPERATIONS for number in _numbers(symbol, max_value)]
    for symbol, number in operations if name is not None else ():
        for index, step in enumerate(steps):
            for operand in step.operands:
                if not operand.isdecimal():
                    new = Step(name, symbol, (operand, number)), _with_operand(step, operand, name)
                    yield (index, index + 1), [*steps[:index], *new, *steps[index + 1 :]]
        yield (len(steps),), [*steps, Step(name, symbol, (steps[-1].name, number))]


def _remove(steps: list[Step], given: list[str], max_value: int, name: str | None) -> Iterator[Change]:
    """Yield plans without one step, with one of its operands in its place; and the plan without its last step."""
    for index, step in enumerate(steps[:-1]):
        for operand in step.operands:
            if operand.isdecimal():
                continue
            later = [_with_operand(other, step.name, operand) for other in steps[index + 1 :]]
            users = [place for place, other in enumerate(steps[index + 1 :], index) if step.name in other.operands]
            if users and all(len(set(other.operands)) == len(other.operands) for other in later):
                yield tuple(users), [*steps[:index], *later]
    if len(steps) > 1:
        yield (len(steps) - 1,), steps[:-1]


def _exchange(steps: list[Step], given: list[str], max_value: int, name: str | None) -> Iterator[Change]:
    """Yield plans in which two steps exchange operation and number, or places if neither needs the other."""
    for (first, step), (second, other) in combinations(enumerate(steps), 2):
        pairs = []
        if step.operands[-1].isdecimal() and other.operands[-1].isdecimal():
            pairs.append((_with_operation(step, other), _with_operation(other, step)))
        between = {name for inner in steps[first + 1 : second + 1] for name in inner.operands}
        if step.name not in between and not {inner.name for inner in steps[first:second]} & set(other.operands):
            pairs.append((other, step))
        for pair in pairs:
            if pair != (step, other):
                new_steps = steps.copy()
                new_steps[first], new_steps[second] = pair
                yield (first, second), new_steps


def _make_constant(steps: list[Step], given: list[str], max_value: int, name: str | None) -> Iterator[Change]:
    """Yield plans in which a number takes the place of the quantity in a step of a quantity and a number."""
    for index, step in enumerate(steps):
        _, *rest = step.operands
        if len(rest) == 1 and rest[0].isdecimal():
            for number in range(1, max_value):
                constant = replace(step, operands=(str(number), *rest))
                yield (index,), [*steps[:index], constant, *steps[index + 1 :]]


def _change_two(steps: list[Step], given: list[str], max_value: int, name: str | None) -> Iterator[Change]:
    """Yield plans in which one step has another operation, and another step another number."""
    for (index,), changed in _change_part("operation", steps, given, max_value, name):
        for (other,), both in _change_part("number", changed, given, max_value, name):
            if other != index:
                yield (min(index, other), max(index, other)), both


_PARTS = {
    "operation": _other_operations,
    "number": _other_numbers,
    "operand": _other_operands,
    "addend": _numbers_as_addends,
}
_CHANGES = {kind: partial(_change_part, kind) for kind in ONE_PART}
_CHANGES |= {"inserted": _insert, "removed": _remove, "exchanged": _exchange}
_CHANGES |= {"constant": _make_constant, "two steps": _change_two}


def _with_operand(step: Step, old: str, new: str) -> Step:
    return replace(step, operands=tuple(new if operand == old else operand for operand in step.operands))


def _with_operation(step: Step, other: Step) -> Step:
    """Return the step with operation and number of another one."""
    return replace(step, symbol=other.symbol, operands=(*step.operands[:-1], other.operands[-1]))


def _numbers(symbol: str, max_value: int) -> range:
    """Return the numbers that a step with this operation may state."""
    return range(2, MAX_FACTOR + 1) if symbol == "*" else range(1, max_value)
