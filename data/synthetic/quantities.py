"""Quantities of a synthetic problem: a graph of operations with numbers.

Operations are in layers: one in layer `d` needs at least one of layer `d - 1` and none of layer `d` or above. The
asked quantity is alone in the highest layer and needs all the others, so the number of layers is the length of the
longest chain of steps. Numbers are drawn in two passes: downwards the interval of each quantity, upwards the values.
"""

import hashlib
import math
import random
from dataclasses import dataclass, field
from itertools import pairwise

from .config import SyntheticConfig

MAX_FACTOR = 9
MAX_ADDENDS = 7  # a problem of depth 2 and width 4 adds seven people
MAX_ATTEMPTS = 2_000  # at numbers that fit a shape


@dataclass(frozen=True)
class Quantity:
    """The count of one person.

    Args:
        operation (`str`): `"given"` or a key of `SYMBOLS`.
        operands (`tuple` of `int`): the quantities that it is computed from, as indices into the problem's list.
        number (`int`, *optional*): the number stated in its sentence; None for a sum.
        value (`int`): the count.
    """

    operation: str
    operands: tuple[int, ...]
    number: int | None
    value: int


@dataclass(frozen=True)
class Problem:
    """A problem without words: its operations (the asked one last), the given quantities, then the distractors."""

    quantities: list[Quantity]
    num_steps: int
    num_distractors: int

    @property
    def target(self) -> int:
        """Index of the asked quantity."""
        return self.num_steps - 1

    def levels(self) -> list[int]:
        """Length of the longest chain that ends in each operation."""
        levels = []
        for quantity in self.quantities[: self.num_steps]:
            levels.append(1 + max((levels[i] for i in quantity.operands if i < self.num_steps), default=0))
        return levels

    def skeleton(self) -> str:
        """Hash of what the answer needs: operations, what they refer to, and numbers.

        Two problems that differ only in names, words, order, distractors or the order of a sum have the same one.
        """
        needed = self.quantities[: len(self.quantities) - self.num_distractors]
        hashes = [_hash(str(quantity.value)) for quantity in needed]
        for i, quantity in enumerate(needed[: self.num_steps]):
            operands = sorted(hashes[operand] for operand in quantity.operands)
            hashes[i] = _hash(f"{quantity.operation} {quantity.number} {operands}")
        return _hash(f"{self.num_steps} {hashes[self.target]}")


def draw_problem(rng: random.Random, num_steps: int, depth: int, config: SyntheticConfig) -> Problem:
    """Draw a problem of a shape, of any skeleton.

    Raises:
        ValueError: if no numbers fit the shape.
    """
    num_distractors = rng.randint(*config.num_distractors)
    for _ in range(MAX_ATTEMPTS):
        layers = _draw_layers(rng, num_steps, depth)
        layer_start = [layer.start for layer in layers for _ in layer]
        max_given = config.num_names - num_steps - num_distractors
        draft = _Draft(_draw_edges(rng, layers), layer_start, max_given, config.max_value)
        if all(_draw_operation(rng, draft, step) for step in reversed(range(num_steps))):
            quantities = _draw_values(rng, draft)
            if quantities is not None:
                for _ in range(num_distractors):
                    quantities.append(_draw_distractor(rng, quantities, config.max_value))
                return Problem(quantities, num_steps, num_distractors)
    raise ValueError(
        f"`max_value` {config.max_value} is too small for problems of {num_steps} steps and depth {depth}: "
        f"no numbers found in {MAX_ATTEMPTS} attempts"
    )


# The graph


def _draw_layers(rng: random.Random, num_steps: int, depth: int) -> list[range]:
    """Cut the steps into `depth` layers, the last of one step, such that every step can be used by one above it."""
    if depth == 1:
        return [range(1)]
    while True:
        cuts = [0, *sorted(rng.sample(range(1, num_steps - 1), depth - 2)), num_steps - 1, num_steps]
        layers = [range(start, end) for start, end in pairwise(cuts)]
        room, fits = 0, True
        for below, above in reversed(list(pairwise(layers))):
            room += MAX_ADDENDS * len(above) - max(len(below), len(above))
            fits = fits and room >= 0
        if fits:
            return layers


def _draw_edges(rng: random.Random, layers: list[range]) -> list[list[int]]:
    """Choose the steps that each step uses: at least one of the layer below; every step but the last is used."""
    num_steps = layers[-1].stop
    operands = [[] for _ in range(num_steps)]
    for below, above in reversed(list(pairwise(layers))):
        lower, upper = rng.sample(below, len(below)), rng.sample(above, len(above))
        for i, step in enumerate(upper):
            operands[step].append(lower[i % len(lower)])
        for unused in lower[len(upper) :]:
            free = [step for step in range(below.stop, num_steps) if len(operands[step]) < MAX_ADDENDS]
            operands[rng.choice(free)].append(unused)
    return operands


# The numbers


@dataclass
class _Draft:
    """A problem without values. Given quantities follow the steps; bounds are inclusive."""

    operands: list[list[int]]
    layer_start: list[int]  # first step of each step's layer
    max_given: int
    max_value: int
    low: list[int] = field(init=False)
    high: list[int] = field(init=False)
    operations: list[str] = field(init=False)
    numbers: list[int | None] = field(init=False)

    def __post_init__(self):
        num_steps = len(self.operands)
        self.low, self.high = [1] * num_steps, [self.max_value] * num_steps
        self.operations, self.numbers = ["given"] * num_steps, [None] * num_steps

    def limit(self, i: int, low: int, high: int) -> None:
        self.low[i], self.high[i] = max(self.low[i], low), min(self.high[i], high)

    def add_given(self) -> int:
        self.low.append(1)
        self.high.append(self.max_value)
        return len(self.low) - 1

    def draw_operand(self, rng: random.Random, step: int) -> None:
        """Add an operand to a step: a new given quantity, or an existing one that the step does not use yet."""
        num_steps, used = len(self.operands), self.operands[step]
        given = [i for i in range(num_steps, len(self.low)) if i not in used]
        lower = [i for i in range(self.layer_start[step]) if i not in used]
        may_add = len(self.low) - num_steps < self.max_given
        if may_add and (not given + lower or rng.random() < 0.5):
            used.append(self.add_given())
        else:
            used.append(rng.choice(given + lower))


def _draw_operation(rng: random.Random, draft: _Draft, step: int) -> bool:
    """Choose the operation of a step and bound its operands so that its own bounds can be met; False if impossible."""
    low, high, operands = draft.low[step], draft.high[step], draft.operands[step]
    if low > high:
        return False
    choices = ("subtract",) if high == 1 else ("add", "subtract", "multiply", "sum")
    operation = draft.operations[step] = "sum" if len(operands) > 1 else rng.choice(choices)
    while len(operands) < (2 if operation == "sum" else 1):
        draft.draw_operand(rng, step)
    rng.shuffle(operands)
    if operation == "sum":
        return _split_bound(rng, draft, step)
    if operation == "add":
        draft.limit(operands[0], 1, high - 1)
    elif operation == "subtract":
        draft.limit(operands[0], low + 1, draft.max_value)
    else:
        factor = draft.numbers[step] = rng.randint(2, min(MAX_FACTOR, high))
        draft.limit(operands[0], math.ceil(low / factor), high // factor)
    return True


def _split_bound(rng: random.Random, draft: _Draft, step: int) -> bool:
    high, operands = draft.high[step], draft.operands[step]
    if high < len(operands):
        return False
    cuts = [0, *sorted(rng.sample(range(1, high), len(operands) - 1)), high]
    for operand, (start, end) in zip(operands, pairwise(cuts), strict=True):
        draft.limit(operand, 1, end - start)
    return True


def _draw_values(rng: random.Random, draft: _Draft) -> list[Quantity] | None:
    """Draw the given values, then the stated numbers step by step.

    Returns None if the bounds leave no value, or if two steps are the same operation.
    """
    num_steps = len(draft.operands)
    if any(low > high for low, high in zip(draft.low, draft.high, strict=True)):
        return None
    values = [0] * num_steps
    values += [rng.randint(draft.low[i], draft.high[i]) for i in range(num_steps, len(draft.low))]
    for step, operation in enumerate(draft.operations):
        low, high = draft.low[step], draft.high[step]
        base = sum(values[operand] for operand in draft.operands[step])
        if operation == "add":
            draft.numbers[step] = rng.randint(max(1, low - base), high - base)
        elif operation == "subtract":
            draft.numbers[step] = rng.randint(max(1, base - high), base - low)
        values[step] = _apply(operation, base, draft.numbers[step])
        if not low <= values[step] <= high:
            return None
    steps = zip(draft.operations, draft.operands, draft.numbers, strict=True)
    if len({(operation, tuple(sorted(used)), number) for operation, used, number in steps}) < num_steps:
        return None
    steps = zip(draft.operations, map(tuple, draft.operands), draft.numbers, values[:num_steps], strict=True)
    return [Quantity(*step) for step in steps] + [Quantity("given", (), v, v) for v in values[num_steps:]]


def _draw_distractor(rng: random.Random, quantities: list[Quantity], max_value: int) -> Quantity:
    """Draw a quantity that nothing uses: given, or an operation on quantities, with equal probability."""
    if rng.random() < 0.5:
        value = rng.randint(1, max_value)
        return Quantity("given", (), value, value)
    operands = rng.sample(range(len(quantities)), 2)
    base, other = (quantities[operand].value for operand in operands)
    stated = {  # the interval of the number that each operation may state
        "add": (1, max_value - base),
        "subtract": (1, base - 1),
        "multiply": (2, min(MAX_FACTOR, max_value // base)),
    }
    choices = [operation for operation, (low, high) in stated.items() if low <= high]
    operation = rng.choice(choices + ["sum"] * (base + other <= max_value))
    if operation == "sum":
        return Quantity("sum", tuple(operands), None, base + other)
    number = rng.randint(*stated[operation])
    return Quantity(operation, (operands[0],), number, _apply(operation, base, number))


def _apply(operation: str, base: int, number: int | None) -> int:
    """Return the value of an operation; `base` is the sum of its operands."""
    if operation == "sum":
        return base
    return {"add": base + number, "subtract": base - number, "multiply": base * number}[operation]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
