"""Changed plans of GSM8K problems, with their executions recomputed from the calculator annotations.

1. Natalia sold clips in May: 48 / 2            ->    1. Natalia sold clips in May: 48 / 4
2. Natalia sold clips altogether: 48 + [1]            2. Natalia sold clips altogether: 48 + [1]

Natalia sold 48/2 = 24 clips in May.            ->    Natalia sold 48/4 = 12 clips in May.
Natalia sold 48+24 = 72 clips altogether.             Natalia sold 48+12 = 60 clips altogether.
#### 72                                               #### 60
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from ..steps import make_row
from .answers import parse_number, reference_answer
from .numbers import NUMBER, plain, values
from .problems import ANNOTATION, CURRENCY, steps_from_solution

TOKEN = re.compile(rf"{NUMBER}|[-+*/()]")
WRITTEN_TOKEN = re.compile(rf"{NUMBER}|[-+*/x×÷()−–]")
PLAN_TOKEN = re.compile(rf"\[[0-9]+\]|{NUMBER}|[-+*/()]")
OPERATORS = "+-*/"
MAX_CHANGES = 100  # tried for a problem
MAX_DECIMALS = 2


@dataclass(frozen=True)
class _Line:
    """One step: a line of the plan, and one of the execution.

    Args:
        words, expression: the plan line before and after its last colon.
        tokens: operands and operators of the expression; an operand is a number, or `[j]` for the result of step j.
        before, calculation, between, result, after: the execution line; `calculation` has `{}` in place of each token.
        written: the tokens of the calculation as they are written.
    """

    words: str
    expression: str
    tokens: tuple[str, ...]
    before: str
    calculation: str
    written: tuple[str, ...]
    between: str
    result: str
    after: str


def change_solution(rng: random.Random, question: str, solution: str) -> dict[str, Any] | None:
    """Change an operation or a number of the question in one step of the plan, and recompute the execution.

    The change must be exact: every line has one annotation and shows its calculation and result, the plan names each
    operand as a number or as the result of a step, the last result is the answer, and no changed number occurs
    elsewhere in the words. New results are positive, and integers if the old ones are.

    Args:
        solution: GSM8K's `answer`, with annotations.

    Returns:
        the columns of [`make_row`], or None if no change is exact.
    """
    lines = _read(question, solution)
    if lines is None:
        return None
    old = _results(lines)
    if not old or old[-1] != _fraction(reference_answer(solution)):
        return None
    changes = list(_changes(lines))
    for changed in rng.sample(changes, min(MAX_CHANGES, len(changes))):
        new = _results(changed)
        if new is not None and new[-1] != old[-1] and _is_exact(lines, changed, old, new):
            plan_steps = [f"{line.words}{line.expression}" for line in changed]
            execution_steps = [_write(*pair, old, new, k) for k, pair in enumerate(zip(lines, changed, strict=True))]
            return make_row(question, plan_steps, execution_steps, plain(new[-1]))
    return None


def _read(question: str, solution: str) -> list[_Line] | None:
    plan_steps, steps = steps_from_solution(question, solution)
    if len(plan_steps) != len(steps):
        return None
    lines = [_read_line(*pair) for pair in zip(plan_steps, steps, strict=True)]
    return None if None in lines else lines


def _read_line(plan_line: str, line: str) -> _Line | None:
    words, separator, expression = plan_line.rpartition(": ")
    marks = list(ANNOTATION.finditer(line))
    tokens = tuple(PLAN_TOKEN.findall(expression))
    is_whole = not re.sub(r"\s", "", PLAN_TOKEN.sub("", expression))
    if not separator or "\n" in plan_line or "\n" in line or len(marks) != 1 or not is_whole or len(tokens) < 3:
        return None
    annotated, _, result = marks[0][1].rpartition("=")
    numbers = TOKEN.findall(annotated)
    if re.sub(r"\s", "", TOKEN.sub("", annotated)) or len(numbers) != len(tokens):
        return None
    if any(_is_operand(old) != _is_operand(new) for old, new in zip(numbers, tokens, strict=True)):
        return None
    shown = [rf"[{CURRENCY}]?{re.escape(token)}" if _is_operand(token) else _sign(token) for token in numbers]
    calculation = r"\s*".join(shown)
    match = re.search(rf"(?P<calculation>{calculation})(?P<between>\s*=\s*[{CURRENCY}]?)$", line[: marks[0].start()])
    after = line[marks[0].end() :]
    if match is None or not re.match(rf"{re.escape(result.strip())}(?![0-9.,]*[0-9])", after):
        return None
    written = tuple(WRITTEN_TOKEN.findall(match["calculation"]))
    calculation = WRITTEN_TOKEN.sub("{}", match["calculation"])
    texts = line[: match.start()], calculation, written, match["between"], result.strip(), after[len(result.strip()) :]
    return _Line(f"{words}: ", expression, tokens, *texts)


def _sign(token: str) -> str:
    return {"*": "[*x×]", "/": "[/÷]", "-": "[-−–]"}.get(token, re.escape(token))


def _is_operand(token: str) -> bool:
    return token[-1].isdigit() or token[0] == "["


def _results(lines: Sequence[_Line]) -> list[Fraction] | None:
    """Return the result of each step; None where one is not positive, or has too many decimals."""
    results: list[Fraction] = []
    for line in lines:
        numbers = [_value(token, results) if _is_operand(token) else token for token in line.tokens]
        if None in numbers:
            return None
        result = _evaluate(numbers)
        if result is None or result <= 0 or (result * 10**MAX_DECIMALS).denominator > 1:
            return None
        results.append(result)
    return results


def _value(token: str, results: Sequence[Fraction]) -> Fraction | None:
    if token[0] != "[":
        return _fraction(token)
    number = int(token[1:-1])
    return results[number - 1] if 1 <= number <= len(results) else None


def _fraction(text: str) -> Fraction | None:
    number = parse_number(text)
    return None if number is None else Fraction(number)


def _evaluate(tokens: list[Fraction | str]) -> Fraction | None:
    """Evaluate numbers, operators and brackets; None for what is no expression, and for a division by zero."""
    words = "".join(
        token if isinstance(token, str) else f"Fraction({token.numerator},{token.denominator})" for token in tokens
    )
    try:
        return eval(words, {"__builtins__": {}, "Fraction": Fraction})  # digits, signs and brackets alone
    except (SyntaxError, TypeError, ZeroDivisionError):
        return None


def _changes(lines: Sequence[_Line]) -> Iterator[list[_Line]]:
    """Yield all steps with another operation or number in one of them."""
    for index, line in enumerate(lines):
        spans = [match.span() for match in PLAN_TOKEN.finditer(line.expression)]
        for place, token in enumerate(line.tokens):
            if token in OPERATORS and place and line.tokens[place - 1] not in (*OPERATORS, "("):
                new = [symbol for symbol in OPERATORS if symbol != token]
            elif _is_operand(token) and token[0] != "[" and _fraction(token).denominator == 1:
                value = int(_fraction(token))
                new = [str(number) for number in range(2, max(12, 2 * value) + 1) if number != value][:100]
            else:
                continue
            start, end = spans[place]
            for symbol in new:
                tokens = (*line.tokens[:place], symbol, *line.tokens[place + 1 :])
                expression = line.expression[:start] + symbol + line.expression[end:]
                yield [*lines[:index], replace(line, tokens=tokens, expression=expression), *lines[index + 1 :]]


def _is_exact(
    lines: Sequence[_Line], changed: Sequence[_Line], old: Sequence[Fraction], new: Sequence[Fraction]
) -> bool:
    """Return whether results stay integers, and no number that changes occurs in the words."""
    if all(result.denominator == 1 for result in old) and any(result.denominator > 1 for result in new):
        return False
    gone = {before for before, after in zip(old, new, strict=True) if before != after}
    for line, other in zip(lines, changed, strict=True):
        pairs = zip(line.tokens, other.tokens, strict=True)
        gone |= {_fraction(token) for token, token_after in pairs if token != token_after and _is_operand(token)}
    return not any(gone & values(f"{line.before} ; {line.after} ; {line.words.partition('. ')[2]}") for line in lines)


def _write(line: _Line, changed: _Line, old: Sequence[Fraction], new: Sequence[Fraction], index: int) -> str:
    """Write the execution line of a step; what does not change stays as it is written."""
    shown = []
    for written, token, other in zip(line.written, line.tokens, changed.tokens, strict=True):
        if _is_operand(token):
            value = _value(other, new)
            shown.append(written if value == _value(token, old) else plain(value))
        else:
            shown.append(written if token == other else other)
    result = line.result if old[index] == new[index] else plain(new[index])
    return f"{line.before}{line.calculation.format(*shown)}{line.between}{result}{line.after}"
