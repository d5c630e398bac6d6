"""How a synthetic grade-school problem is made: its graph of operations, its numbers, its words and its split.

The quantities of a problem are counts of one thing, one per person. A few are given; every other is one operation on
quantities below it. The operations stand in layers: one of layer `d` needs at least one of layer `d - 1` and none of
layer `d` or above, the asked quantity is alone in the highest layer, and it needs all the others. So the number of
layers is the exact length of the longest chain of steps.

    Mia has 3 more apples than Tom. Tom has 5 apples. How many apples does Mia have?    (question)
    Mia = Tom + 3                                                                       (plan)
    Mia = 5 + 3 = 8                                                                     (execution)
    #### 8

Numbers are drawn twice over the graph: downwards the interval that each quantity must lie in, upwards the values.
"""

import argparse
import hashlib
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from datasets import Dataset, Features, List, Value

from ..steps import STEP_SEPARATOR, make_row

NAMES = (
    *("Mia", "Tom", "Ann", "Ben", "Eva", "Leo", "Zoe", "Sam", "Ida", "Max", "Amy", "Dan", "Joy", "Kai", "Liv", "Ned"),
    *("Pia", "Ray", "Sue", "Ted", "Uma", "Vic", "Wes", "Yan", "Bob", "Cleo", "Finn", "Gus", "Hana", "Ivan", "Jack"),
    *("Kate", "Lars", "Nora", "Omar", "Paul", "Rosa", "Tara", "Vera", "Will"),
)
THINGS = (
    *("apples", "books", "coins", "cards", "pens", "shells", "stamps", "stones"),
    *("balls", "beads", "cups", "eggs", "kites", "nuts", "plums", "rings"),
)
TOTAL = "total"  # what a plan calls a sum that only the asking sentence mentions

SYMBOLS = {"add": "+", "subtract": "-", "multiply": "*", "sum": "+"}
MAX_FACTOR = 9
MAX_ADDENDS = 7  # a problem of depth 2 and width 4 adds seven people
MAX_WIDTH = 4  # steps / depth

# {things} agrees with {number}; {others} are the people that the quantity is made from.
PHRASINGS = {
    "given": ("{name} has {number} {things}.", "{name} owns {number} {things}.", "{name} keeps {number} {things}."),
    "add": (
        "{name} has {number} more {things} than {others}.",
        "{name} owns {number} more {things} than {others}.",
        "Compared to {others}, {name} has {number} more {things}.",
    ),
    "subtract": (
        "{name} has {number} fewer {things} than {others}.",
        "{name} owns {number} fewer {things} than {others}.",
        "Compared to {others}, {name} has {number} fewer {things}.",
    ),
    "multiply": (
        "{name} has {times} as many {plural} as {others}.",
        "{name} owns {times} as many {plural} as {others}.",
        "Compared to {others}, {name} has {times} as many {plural}.",
    ),
    "sum": (
        "{name} has as many {plural} as {others} together.",
        "{name} owns as many {plural} as {others} combined.",
        "{others} together have as many {plural} as {name}.",
    ),
    "ask": (
        "How many {plural} does {name} have?",
        "How many {plural} does {name} own?",
        "What is the number of {plural} that {name} has?",
    ),
    "ask_total": (
        "How many {plural} do {others} have together?",
        "How many {plural} do {others} own together?",
        "What is the total number of {plural} that {others} have?",
    ),
}

# The splits that a skeleton's hash chooses between: the hundredths of the hashes that are theirs.
HASH_SPLITS = {"train": range(0, 80), "validation": range(80, 90), "test": range(90, 100)}
SPLITS = (*HASH_SPLITS, "ood_longer", "ood_wider")

MAX_ATTEMPTS = 2_000  # at numbers that fit a shape
MAX_DRAWS = 10_000  # of problems, for one that its split has not got yet
MAX_DRAWS_OF_SKELETON = 500  # of these, before one may differ from another in its words alone

FEATURES = Features(
    {
        "question": Value("string"),
        "plan": Value("string"),
        "execution": Value("string"),
        "answer": Value("string"),
        "plan_steps": List(Value("string")),
        "execution_steps": List(Value("string")),
        "dependencies": List(List(Value("int64"))),
        "num_steps": Value("int64"),
        "depth": Value("int64"),
        "skeleton": Value("string"),
    }
)


@dataclass(frozen=True)
class SyntheticConfig:
    """What the training problems are like; the other splits follow from it (see [`shapes`]).

    Args:
        num_steps (pair of `int`): least and most operations that the answer needs; drawn evenly.
        depth (`int`, *optional*):
            operations on the longest chain. If omitted, drawn evenly from all that the number of steps allows: from
            steps / 4 (at least 2 where there are 2 steps or more) to the number of steps.
        max_depth (`int`, *optional*): most operations on the longest chain, where `depth` is omitted.
        num_distractors (pair of `int`): least and most people that the answer does not need; drawn evenly.
        max_value (`int`): every given, stated and computed number is an integer in [1, max_value]; at least 10.
        num_names, num_things (`int`): how many of `NAMES` and `THINGS` are used.
        seed (`int`): start of the random numbers.

    Raises:
        ValueError: for a value out of its range.
    """

    num_steps: tuple[int, int] = (1, 3)
    depth: int | None = None
    max_depth: int | None = None
    num_distractors: tuple[int, int] = (0, 1)
    max_value: int = 100
    num_names: int = 24
    num_things: int = 8
    seed: int = 0

    def __post_init__(self):
        for name, low in (("num_steps", 1), ("num_distractors", 0)):
            object.__setattr__(self, name, _check_pair(name, getattr(self, name), low))
        (fewest, most), most_distractors = self.num_steps, self.num_distractors[1]
        if self.depth is not None:
            shallowest = min_depth(most)
            if shallowest > fewest:
                raise ValueError(f"`depth` must be None for num_steps={self.num_steps}, which no one depth fits")
            _check_integer("depth", self.depth, shallowest, fewest)
        if self.max_depth is not None:
            if self.depth is not None:
                raise ValueError(f"`max_depth` must be None with depth={self.depth}, but got {self.max_depth}")
            _check_integer("max_depth", self.max_depth, min_depth(most), None)
        _check_integer("max_value", self.max_value, 10, None)
        _check_integer("num_names", self.num_names, _names_needed(most, most_distractors), len(NAMES))
        _check_integer("num_things", self.num_things, 1, len(THINGS))
        _check_integer("seed", self.seed, None, None)


@dataclass(frozen=True)
class Quantity:
    """What one person has.

    Args:
        operation (`str`): `"given"` or a key of `SYMBOLS`.
        operands (`tuple` of `int`): the quantities it is made from, as indices into the problem's list.
        number (`int`, *optional*): the number that its sentence states; none for a sum.
        value (`int`): the count.
    """

    operation: str
    operands: tuple[int, ...]
    number: int | None
    value: int


@dataclass(frozen=True)
class Problem:
    """A problem without words: its operations (the asked one last), then what is given, then the distractors."""

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


def min_depth(num_steps: int) -> int:
    """The least depth that so many steps may have: two steps that the answer needs cannot both be the last one."""
    return 1 if num_steps == 1 else max(2, math.ceil(num_steps / MAX_WIDTH))


def shapes(split: str, config: SyntheticConfig) -> dict[int, list[int]]:
    """The depths that a split's problems have, by number of steps. Steps are drawn evenly, then the depth.

    - `train`, `validation`, `test`: as the configuration says; its skeleton decides which of them a problem is in.
    - `ood_longer`: one or two steps more than the longest of training, no wider (steps / depth) than the widest.
    - `ood_wider`: wider than the widest of training, up to 4; at training's least depth, 2 if that is 1.

    Raises:
        ValueError: for an unknown split, one that cannot exist (training is as wide as can be), or one that needs more
            names than the configuration has.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, but got {split!r}")
    fewest, most = config.num_steps
    by_steps = {steps: _depths(steps, config) for steps in range(fewest, most + 1)}
    widest = max(steps / depths[0] for steps, depths in by_steps.items())
    if split == "ood_longer":
        longer = (most + 1, most + 2)
        by_steps = {steps: [d for d in range(min_depth(steps), steps + 1) if steps / d <= widest] for steps in longer}
    if split == "ood_wider":
        depth = max(2, min(depths[0] for depths in by_steps.values()))
        by_steps = {steps: [depth] for steps in range(depth, MAX_WIDTH * depth + 1) if steps / depth > widest}
        if not by_steps:
            raise ValueError(f"`split` 'ood_wider' needs training problems below steps / depth = {MAX_WIDTH}")
    needed = _names_needed(max(by_steps), config.num_distractors[1])
    if needed > config.num_names:
        raise ValueError(f"`num_names` must be at least {needed} for split {split!r}, but got {config.num_names}")
    return by_steps


def generate_problem(rng: random.Random, config: SyntheticConfig) -> dict:
    """Draws one row of the training distribution, of any skeleton (see [`generate_dataset`] for the columns)."""
    problem = _draw_problem(rng, *_draw_shape(rng, shapes("train", config)), config)
    return _to_row(rng, problem, problem.skeleton(), config)


def generate_problems(split: str, num_examples: int, config: SyntheticConfig) -> Iterator[dict]:
    """Yields the rows of [`generate_dataset`]; fewer of them are the first ones of more."""
    by_steps = shapes(split, config)
    _check_integer("num_examples", num_examples, 1, None)
    rng, skeletons, questions = random.Random(f"synthetic {config.seed} {split}"), set(), set()
    for _ in range(num_examples):
        row = _draw_new_row(rng, split, *_draw_shape(rng, by_steps), config, skeletons, questions)
        if split != "train":
            skeletons.add(row["skeleton"])
            questions.add(row["question"])
        yield row


def generate_dataset(split: str, num_examples: int, config: SyntheticConfig | None = None) -> Dataset:
    """Draws a split: the same rows for the same `config.seed` and `split`, in every process.

    No two of the splits share a skeleton. No two rows of a split other than `train` share a question; they share a
    skeleton only where its shape has hardly any that has not been drawn. Columns:
    `question`, `plan`, `execution` (ends with `#### <answer>`), `answer`; `plan_steps`, `execution_steps` (the steps,
    layer by layer, within a layer as the question states them), `dependencies` (for each step the earlier steps that
    it uses, counted from 0), `num_steps`, `depth`, `skeleton` (its hash).

    Raises:
        ValueError: for a bad `split` or `num_examples`, and if the split has no more different problems.
    """
    rows = list(generate_problems(split, num_examples, SyntheticConfig() if config is None else config))
    return Dataset.from_list(rows, features=FEATURES)


def vocabulary_texts(config: SyntheticConfig) -> list[str]:
    """Texts that hold every word of every split, first in a text and after a space: what a tokenizer must know."""
    names = NAMES[: config.num_names]
    words = {"name": names[0], "number": 1, "others": f"{names[0]}, {names[0]} and {names[0]}", "things": THINGS[0]}
    sentences = [
        phrasing.format(plural=THINGS[0], times=times, **words)
        for phrasing in sum(PHRASINGS.values(), ())
        for times in ("twice", "1 times")
    ]
    counted = [f"1 {thing[:-1]} 1 {thing}" for thing in THINGS[: config.num_things]]
    steps = [f"{name} = {name} {symbol} 1" for name in (*names, TOTAL) for symbol in SYMBOLS.values()]
    return [*sentences, *(f" {sentence}" for sentence in sentences), *counted, *steps, f"{STEP_SEPARATOR}####"]


# The graph


def _depths(num_steps: int, config: SyntheticConfig) -> list[int]:
    if config.depth is not None:
        return [config.depth]
    deepest = num_steps if config.max_depth is None else min(num_steps, config.max_depth)
    return list(range(min_depth(num_steps), deepest + 1))


def _names_needed(num_steps: int, num_distractors: int) -> int:
    return num_steps + 2 + num_distractors  # two given people are enough for any graph


def _draw_shape(rng: random.Random, by_steps: dict[int, list[int]]) -> tuple[int, int]:
    num_steps = rng.choice(list(by_steps))
    return num_steps, rng.choice(by_steps[num_steps])


def _draw_layers(rng: random.Random, num_steps: int, depth: int) -> list[range]:
    """Cuts the steps into `depth` layers, the last of one step, such that every step can be used by one above it."""
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
    """Chooses the steps that each step uses: one of the layer below at least, and every step by another."""
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
    """A problem whose values are not drawn yet. Given quantities follow the steps; bounds are inclusive."""

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
        """Gives a step one more operand: a new given quantity, or one that exists and is not in use by this step."""
        num_steps, used = len(self.operands), self.operands[step]
        given = [i for i in range(num_steps, len(self.low)) if i not in used]
        lower = [i for i in range(self.layer_start[step]) if i not in used]
        may_add = len(self.low) - num_steps < self.max_given
        if may_add and (not given + lower or rng.random() < 0.5):
            used.append(self.add_given())
        else:
            used.append(rng.choice(given + lower))


def _draw_problem(rng: random.Random, num_steps: int, depth: int, config: SyntheticConfig) -> Problem:
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


def _draw_operation(rng: random.Random, draft: _Draft, step: int) -> bool:
    """Chooses a step's operation and bounds its operands such that its own bounds can be met; False if none can be."""
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
    """Draws the given values, then the stated numbers step by step.

    Returns None if the bounds leave no value, or if two steps turn out to be one and the same operation.
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
    """Draws a quantity that nothing uses: given, or an operation on quantities of the problem, half and half."""
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
    """The value of an operation, where `base` is the sum of its operands."""
    if operation == "sum":
        return base
    return {"add": base + number, "subtract": base - number, "multiply": base * number}[operation]


# The split


def _draw_new_row(
    rng: random.Random,
    split: str,
    num_steps: int,
    depth: int,
    config: SyntheticConfig,
    skeletons: set[str],
    questions: set[str],
) -> dict:
    """Draws problems of one shape until one is of the split and new to it: another skeleton, or other words."""
    for draw in range(MAX_DRAWS):
        problem = _draw_problem(rng, num_steps, depth, config)
        skeleton = problem.skeleton()
        if split in HASH_SPLITS and int(skeleton, 16) % 100 not in HASH_SPLITS[split]:
            continue
        if skeleton in skeletons and draw < MAX_DRAWS_OF_SKELETON:
            continue
        row = _to_row(rng, problem, skeleton, config)
        if row["question"] not in questions:
            return row
    raise ValueError(
        f"`num_examples` is more than split {split!r} has: after {len(questions)} different problems, {MAX_DRAWS} "
        f"draws of {num_steps} steps and depth {depth} gave no new one. Ask for fewer, or raise `num_steps`, "
        f"`max_value` or `num_names`"
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# The words


def _to_row(rng: random.Random, problem: Problem, skeleton: str, config: SyntheticConfig) -> dict:
    """Puts a problem into words: draws names, thing, phrasings and the order of the sentences."""
    quantities, target, levels = problem.quantities, problem.target, problem.levels()
    names = rng.sample(NAMES[: config.num_names], len(quantities))
    referred = {operand for quantity in quantities for operand in quantity.operands}
    if quantities[target].operation == "sum" and target not in referred and rng.random() < 0.5:
        names[target] = TOTAL
    question, positions = _write_question(rng, problem, names, rng.choice(THINGS[: config.num_things]))
    order = sorted(range(problem.num_steps), key=lambda step: (levels[step], positions[step]))
    plan_steps = [_write_plan_step(quantities, names, step) for step in order]
    execution_steps = [_write_execution_step(quantities, names, step) for step in order]
    rank = {step: i for i, step in enumerate(order)}
    return make_row(question, plan_steps, execution_steps, str(quantities[target].value)) | {
        "dependencies": [sorted(rank[i] for i in quantities[step].operands if i in rank) for step in order],
        "num_steps": problem.num_steps,
        "depth": levels[target],
        "skeleton": skeleton,
    }


def _write_question(rng: random.Random, problem: Problem, names: list[str], plural: str) -> tuple[str, list[int]]:
    """Returns the question and the place of each quantity's sentence in it; what is asked comes last."""
    told = [i for i in range(len(names)) if names[i] != TOTAL]
    rng.shuffle(told)
    positions = [len(told)] * len(names)
    for position, i in enumerate(told):
        positions[i] = position
    ask = "ask_total" if TOTAL in names else "ask"
    sentences = [_write_sentence(rng, problem.quantities, names, i, plural) for i in told]
    sentences.append(_write_sentence(rng, problem.quantities, names, problem.target, plural, ask))
    return " ".join(sentences), positions


def _write_sentence(
    rng: random.Random, quantities: list[Quantity], names: list[str], i: int, plural: str, phrasing: str | None = None
) -> str:
    quantity = quantities[i]
    *first, last = [names[operand] for operand in quantity.operands] or [""]
    return rng.choice(PHRASINGS[phrasing or quantity.operation]).format(
        name=names[i],
        number=quantity.number,
        plural=plural,
        things=plural[:-1] if quantity.number == 1 else plural,
        times="twice" if quantity.number == 2 else f"{quantity.number} times",
        others=f"{', '.join(first)} and {last}" if first else last,
    )


def _write_plan_step(quantities: list[Quantity], names: list[str], step: int) -> str:
    return f"{names[step]} = {_write_operation(quantities[step], [names[i] for i in quantities[step].operands])}"


def _write_execution_step(quantities: list[Quantity], names: list[str], step: int) -> str:
    quantity = quantities[step]
    operands = [str(quantities[i].value) for i in quantity.operands]
    return f"{names[step]} = {_write_operation(quantity, operands)} = {quantity.value}"


def _write_operation(quantity: Quantity, operands: list[str]) -> str:
    stated = [] if quantity.number is None else [str(quantity.number)]
    return f" {SYMBOLS[quantity.operation]} ".join(operands + stated)


# Arguments


def _check_integer(name: str, value: object, low: int | None, high: int | None) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or (low is not None and value < low) or (high is not None and value > high):
        accepted = "" if low is None else f" >= {low}" if high is None else f" in [{low}, {high}]"
        raise ValueError(f"`{name}` must be an integer{accepted}, but got {value!r}")


def _check_pair(name: str, value: object, low: int) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"`{name}` must be two integers, least and most, but got {value!r}")
    _check_integer(f"{name}[0]", value[0], low, None)
    _check_integer(f"{name}[1]", value[1], value[0], None)
    return tuple(value)


def main() -> None:
    """Prints problems as JSON lines."""
    defaults = SyntheticConfig()
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--num-examples", type=int, default=5)
    for name in ("num_steps", "num_distractors"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, nargs=2, metavar=("LEAST", "MOST"), default=getattr(defaults, name))
    for name in ("depth", "max_value", "num_names", "num_things", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    fields = vars(parser.parse_args())
    split, num_examples = fields.pop("split"), fields.pop("num_examples")
    for row in generate_problems(split, num_examples, SyntheticConfig(**fields)):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
