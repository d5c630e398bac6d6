"""Wording of synthetic problems: names, sentences, plan and execution steps."""

import random

from ..steps import make_row
from .graphs import SYMBOLS, Problem, Quantity

NAMES = (
    *("Mia", "Tom", "Ann", "Ben", "Eva", "Leo", "Zoe", "Sam", "Ida", "Max", "Amy", "Dan", "Joy", "Kai", "Liv", "Ned"),
    *("Pia", "Ray", "Sue", "Ted", "Uma", "Vic", "Wes", "Yan", "Bob", "Cleo", "Finn", "Gus", "Hana", "Ivan", "Jack"),
    *("Kate", "Lars", "Nora", "Omar", "Paul", "Rosa", "Tara", "Vera", "Will"),
)
THINGS = (
    *("apples", "books", "coins", "cards", "pens", "shells", "stamps", "stones"),
    *("balls", "beads", "cups", "eggs", "kites", "nuts", "plums", "rings"),
)
TOTAL = "total"  # name in the plan for a sum that only the last sentence mentions

# {things} agrees with {number}; {others} are the people whose quantities are the operands.
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


def write_row(rng: random.Random, problem: Problem, skeleton: str, num_names: int, num_things: int) -> dict:
    """Put a problem into words: draw names, thing, phrasings and the order of the sentences."""
    quantities, target, levels = problem.quantities, problem.target, problem.levels()
    names = rng.sample(NAMES[:num_names], len(quantities))
    referred = {operand for quantity in quantities for operand in quantity.operands}
    if quantities[target].operation == "sum" and target not in referred and rng.random() < 0.5:
        names[target] = TOTAL
    question, positions = _write_question(rng, problem, names, rng.choice(THINGS[:num_things]))
    order = sorted(range(problem.num_steps), key=lambda step: (levels[step], positions[step]))
    plan_steps = [f"{names[i]} = {_write_operation(quantities[i], names)}" for i in order]
    counts = [str(quantity.value) for quantity in quantities]
    execution_steps = [f"{names[i]} = {_write_operation(quantities[i], counts)} = {counts[i]}" for i in order]
    rank = {step: i for i, step in enumerate(order)}
    return make_row(question, plan_steps, execution_steps, str(quantities[target].value)) | {
        "dependencies": [sorted(rank[i] for i in quantities[step].operands if i in rank) for step in order],
        "num_steps": problem.num_steps,
        "depth": levels[target],
        "skeleton": skeleton,
    }


def _write_question(rng: random.Random, problem: Problem, names: list[str], plural: str) -> tuple[str, list[int]]:
    """Return the question and the position of each quantity's sentence; the sentence that asks comes last."""
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


def _write_operation(quantity: Quantity, texts: list[str]) -> str:
    """Write an operation; `texts` has the name or the value of every quantity."""
    stated = [] if quantity.number is None else [str(quantity.number)]
    return f" {SYMBOLS[quantity.operation]} ".join([texts[i] for i in quantity.operands] + stated)
