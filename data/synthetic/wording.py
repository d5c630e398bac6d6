"""Text of a synthetic problem: question, plan and execution."""

import random
from typing import Any

from ..steps import STEP_SEPARATOR, make_row
from .config import SyntheticConfig
from .quantities import Problem, Quantity
from .vocabulary import NAMES, PHRASINGS, SYMBOLS, THINGS, TOTAL


def vocabulary_texts(config: SyntheticConfig) -> list[str]:
    """Return texts with every word of every split, at the start of a text and after a space, to train a tokenizer."""
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


def write_row(rng: random.Random, problem: Problem, skeleton: str, config: SyntheticConfig) -> dict[str, Any]:
    """Write the texts of a problem with random names, thing, phrasings and order of the sentences."""
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
    depends_on = [sorted(rank[i] for i in quantities[step].operands if i in rank) for step in order]
    return make_row(question, plan_steps, execution_steps, str(quantities[target].value), depends_on) | {
        "num_steps": problem.num_steps,
        "depth": levels[target],
        "skeleton": skeleton,
    }


def _write_question(rng: random.Random, problem: Problem, names: list[str], plural: str) -> tuple[str, list[int]]:
    """Return the question and the position of each quantity's sentence in it; the final question comes last."""
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
