"""GSM8K's rows, with a rule-based plan for each solution of `main`.

A plan of `main` names, in the solution's words, what each step of the solution finds, and by which calculation. It
contains no number that only the solution computes: `[1]` is the result of step 1.

    Natalia sold 48/2 = <<48/2=24>>24 clips in May.                     (solution)
    Natalia sold 48+24 = <<48+24=72>>72 clips altogether.
    #### 72

    1. Natalia sold clips in May: 48 / 2                                (plan)
    2. Natalia sold clips altogether: 48 + [1]

In `socratic`, every step of a solution has a sub-question: the sub-questions are the plan.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from ..arguments import GSM8K_IDS
from ..files import read_text_rows
from ..steps import STEP_SEPARATOR, make_row, number_steps, pair_lines, row_features
from .answers import reference_answer
from .numbers import CONSTANTS, NUMBER, QUANTITY, plain, quantity_value, stated_values, values

SPLITS = ("train", "test")
ANNOTATION = re.compile(r"<<([^<>]*)>>")


def load_gsm8k(
    split: str, subset: str = "main", keep_calculator: bool = False, data_dir: str | os.PathLike | None = None
) -> Dataset:
    """Load GSM8K as the rows of [`make_row`].

    Args:
        split: `train` or `test`.
        subset: `main` (plans are written by rule) or `socratic` (plans are the sub-questions).
        keep_calculator: keep the calculator annotations `<<48/2=24>>` in the execution.
        data_dir: see [`load_gsm8k_rows`].
    """
    rows = load_gsm8k_rows(split, subset, data_dir)
    parse = partial(PARSERS[subset], keep_calculator=keep_calculator)
    return rows.map(
        parse,
        remove_columns=rows.column_names,
        features=row_features(),
        load_from_cache_file=False,
        desc=f"GSM8K {split}",
    )


def load_gsm8k_rows(split: str, subset: str = "main", data_dir: str | os.PathLike | None = None) -> Dataset:
    """Load the rows as published: `question`, `answer`.

    Args:
        split: `train` or `test`.
        subset: `main` or `socratic`.
        data_dir: folder with the needed files among `train.jsonl`, `test.jsonl`, `train_socratic.jsonl`,
            `test_socratic.jsonl`. Defaults to the environment variable `GSM8K_DIR`; without either, the rows are
            loaded from the Hub.

    Raises:
        ValueError: for an unknown split or subset.
        FileNotFoundError: if the folder does not contain the file.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, but got {split!r}")
    if subset not in PARSERS:
        raise ValueError(f"`subset` must be one of {', '.join(PARSERS)}, but got {subset!r}")
    data_dir = data_dir or os.environ.get("GSM8K_DIR")
    if not data_dir:
        return load_dataset(GSM8K_IDS[0], subset, split=split)
    path = Path(data_dir) / (f"{split}.jsonl" if subset == "main" else f"{split}_{subset}.jsonl")
    if not path.is_file():
        raise FileNotFoundError(f"`data_dir` (or GSM8K_DIR) must contain {path.name}, but {data_dir} does not")
    return Dataset.from_list(list(read_text_rows(path, ("question", "answer"))))


def parse_main(row: dict, keep_calculator: bool = False) -> dict[str, Any]:
    """Parse a row of `main`; the plan is written by [`steps_from_solution`]."""
    plan_steps, execution_steps = steps_from_solution(row["question"], row["answer"])
    return _make_row(row, plan_steps, execution_steps, keep_calculator)


def parse_socratic(row: dict, keep_calculator: bool = False) -> dict[str, Any]:
    """Parse a row of `socratic`, whose lines are `sub-question ** step`.

    Raises:
        ValueError: for a line without the separator.
    """
    lines = [line.partition("**") for line in _lines_of(row["answer"])]
    if not all(separator for _, separator, _ in lines):
        raise ValueError(f"every line of `answer` must be 'sub-question ** step', but got {row['answer']!r}")
    sub_questions, steps = ([line[part].strip() for line in lines] for part in (0, 2))
    return _make_row(row, sub_questions, steps, keep_calculator)


PARSERS: dict[str, Callable[..., dict[str, Any]]] = {"main": parse_main, "socratic": parse_socratic}


def _make_row(row: dict, plan_steps: list[str], steps: list[str], keep_calculator: bool) -> dict[str, Any]:
    execution_steps = steps if keep_calculator else [ANNOTATION.sub("", step) for step in steps]
    return make_row(row["question"], plan_steps, execution_steps, reference_answer(row["answer"]))


def _lines_of(solution: str) -> list[str]:
    return solution.partition("####")[0].strip().split(STEP_SEPARATOR)


# Rule-based plans

CURRENCY = "$€£¢"
OPERATOR = "[-+*/x×÷−–]"
TO_ASCII = str.maketrans("x×÷−–", "**/--")
UNIT = r"(?:(?:[\s/]+|(?<=[0-9]))[A-Za-z]{2,}\b){0,3}"
OPERAND = rf"[(\s]*[{CURRENCY}]?{NUMBER}%?{UNIT}[)\s]*"
# A calculation in the words of a line, such as `3 apples x $2/apple = $6`; at a line's end the result may be missing.
INLINE = re.compile(
    rf"(?<![\w)*/+×÷])(?P<expression>(?:{OPERAND}{OPERATOR})+{OPERAND})"
    rf"=\s*(?:[{CURRENCY}]?(?P<result>{NUMBER})(?![0-9.,]*[0-9]|\s?[-+*/=(]|\s?[A-Za-z]\b)|$)"
)
CALCULATION_WORDS = re.compile(rf"{OPERATOR}|%|times|divided|multipl|plus|minus|\bof\b")

LEADING = re.compile(
    r"(?i:\s*\b(?:So(?! far)|Then|Thus|Therefore|Hence|Now|Next|Finally|First|Also|And|But"
    r"|(?:This|That) means(?: that)?|There (?:are|is|were|was|will be))\b[\s,]*)+"
)
TRAILING = re.compile(rf"(?:\s*(?:\bbecause|\bso|\bor|\bso that[’']s|[(,:;=–{CURRENCY}-]))+\s*$")
TRAILING_VERB = re.compile(r"(?:\s*\b(?:is|are|was|were|be|equals|equal to|which|(?:for )?a total of|of|for))+$")
CLAUSE_EDGE = re.compile(r"(?<=[,.;])\s+|\s+(?=(?:so(?! far| that| many| much)|then|therefore|which means)\s)")
SENTENCE_END = re.compile(r"(?<=[a-z)])\.\s")
MAX_WORDS = 10  # of a description that keeps all its clauses


def steps_from_solution(question: str, solution: str) -> tuple[list[str], list[str]]:
    """Write the plan of a solution: a line `k. what step k finds: its calculation` for each calculation.

    A number in a calculation is written as

    - `[j]`, if step j computed it: the latest such step that no step has used yet, else the question's own number,
      else the latest such step;
    - itself, if the question states it, in digits or words;
    - `20%`, `(100% - 20%)`, `(100 - 20)` or `(50 / 100)`, if it is derived from a percentage or from cents in the
      question;
    - itself, if it is one of `CONSTANTS` and the solution neither computes it nor has it after a `=` or in an
      equation (solving an equation yields new numbers on both sides);
    - `?` otherwise: the solution has computed it without showing a calculation.

    In the words, the result of the step is omitted, and other numbers follow the same rules. A line without a
    calculation is a step if it has an equation, defines a variable or introduces a new number; otherwise it is
    omitted.

    Args:
        question: the problem.
        solution: GSM8K's `answer`: a step per line, calculations marked `<<48/2=24>>`, with or without `#### 24`.

    Returns:
        the lines of plan and solution, grouped into steps by [`pair_lines`].
    """
    lines = _lines_of(solution)
    read = [(i, step) for i, line in enumerate(lines) for step in _read_line(line)]
    plan, execution_indices = _PlanWriter(question, computed_values(solution)), []
    for i, step in read:
        if not step.expression:
            step = replace(step, results=plan.new_numbers(step))
        if step.expression or step.results or re.search(r"=|^\s*Let\b", step.before):
            plan.write(step)
            execution_indices.append(i)
    for i, step in read if not plan.lines else ():
        plan.write(step)
        execution_indices.append(i)
    return pair_lines(number_steps(plan.lines), lines, execution_indices)


def computed_values(solution: str) -> frozenset[Fraction]:
    """Return all numbers that a solution computes: results, numbers after `=` or in an equation, and the answer."""
    steps = [step for line in _lines_of(solution) for step in _read_line(line)]
    body, _, final = solution.partition("####")
    after_equals = " ".join(re.findall(rf"=\s*[{CURRENCY}]?({NUMBER})", ANNOTATION.sub("", body)))
    equations = " ".join(step.before for step in steps if "=" in step.before and not step.expression)
    return values(f"{final} {after_equals} {equations}").union(*(step.results for step in steps))


@dataclass(frozen=True)
class _Step:
    """A calculation and the words around it; `expression` is empty for a line without a calculation."""

    before: str
    expression: str
    after: str
    results: frozenset[Fraction] = frozenset()


def _read_line(line: str) -> list[_Step]:
    """Split a line into steps: one per annotation, else one for its last calculation, else one for its words."""
    if not line.strip():
        return []
    marks = list(ANNOTATION.finditer(line))
    if not marks:
        line = re.sub(rf"(?<=[0-9])\s?\((?={NUMBER}[/%)])", "*(", line)  # `35(.20)`
        inline = [match for match in INLINE.finditer(line) if match["result"]]
        if not inline:
            return [_Step(line, "", "")]
        match = inline[-1]
        return [_Step(line[: match.start()], match["expression"], line[match.end() :], values(match["result"]))]
    steps, start = [], 0
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        end = len(line)
        if following:  # the words up to the next clause belong to this annotation
            end = re.compile(r"[,.;]\s|\sand\s|$").search(line, mark.end(), following.start()).end()
        steps.append(_read_annotation(line[start : mark.start()], mark[1], line[mark.end() : end]))
        start = end
    return steps


def _read_annotation(before: str, annotation: str, after: str) -> _Step:
    expression, _, result = annotation.rpartition("=")
    results = values(result) if re.fullmatch(rf"\s*-?{NUMBER}\s*", result) else frozenset()
    repeated = re.match(rf"\s*-?[{CURRENCY}]?({NUMBER})", after)
    if repeated and values(repeated[1]) <= results:
        after = after[repeated.end() :]
    if not re.fullmatch(rf"[-+\s]*{NUMBER}\s*", expression):
        return _Step(_cut_calculation(before, expression), expression, after, results)
    before = before.rstrip(f" {CURRENCY}")  # only the words have the calculation, as in `30 x .9 = <<27=27>>27`
    inline = INLINE.search(before)
    if inline is None or inline["result"]:
        return _Step(before.rstrip(" ="), "", after, results)
    return _Step(before[: inline.start()], inline["expression"], after, results)


def _cut_calculation(before: str, expression: str) -> str:
    """Remove the calculation at the end of the words before an annotation, if they end with `=`."""
    sign = re.search(rf"(?:=|\bequals?)[\s{CURRENCY}]*$", before)
    if sign is None:
        return before
    words = before[: sign.start()]
    first_ends = [match.start() for match in re.finditer("=", words)]  # `4 * 60 / 5 = 4 * 12 = <<4*60/5=48>>48`
    for end in [*first_ends, len(words)]:
        start = _start_of_calculation(words[:end], expression)
        if start is not None:
            words = re.sub(rf"[\s({CURRENCY}+-]*$", "", words[:start])
            return re.sub(rf"(?:{NUMBER}\s*{OPERATOR}\s*)+$", "", words)
    return words


def _start_of_calculation(words: str, expression: str) -> int | None:
    """Return the start of the calculation that ends the words; None if its last number is not in the expression."""
    operands = Counter(map(quantity_value, QUANTITY.finditer(expression)))
    start = None
    for quantity in reversed(list(QUANTITY.finditer(words))):
        is_joined = start is None or CALCULATION_WORDS.search(words, quantity.end(), start)
        if not is_joined or not operands[quantity_value(quantity)]:
            break
        operands[quantity_value(quantity)] -= 1
        start = quantity.start()
    return start


class _PlanWriter:
    """Writes the lines of a plan in order; keeps track of the numbers that may be shown and of the steps' results."""

    def __init__(self, question: str, computed: frozenset[Fraction]):
        self.stated = stated_values(question)
        self.percentages = sorted(values(" ".join(re.findall(rf"({NUMBER})\s*(?:%|percent)", question))))
        self.constants = CONSTANTS - computed
        self.results: list[frozenset[Fraction]] = []
        self.used: set[int] = set()
        self.lines: list[str] = []

    def new_numbers(self, step: _Step) -> frozenset[Fraction]:
        """Return the last number of a line that is neither stated, nor known, nor computed before."""
        known = (self.stated | self.constants).union(*self.results)
        numbers = map(quantity_value, QUANTITY.finditer(step.before))
        return frozenset([number for number in numbers if number not in known][-1:])

    def write(self, step: _Step) -> None:
        expression = self._write_expression(step.expression)
        gap = "?" if "=" in step.before and not expression else ""  # an equation keeps a placeholder for a number
        before, after = (self._write_words(words, step.results, gap) for words in (step.before, step.after))
        description = _join_words(before, after) if expression else f"{before} {after}"
        description = _tidy(description, is_equation=bool(gap))
        self.lines.append(": ".join(part for part in (description, expression) if part) or "?")
        self.results.append(step.results)

    def _write_expression(self, expression: str) -> str:
        expression = re.sub(r"[\s/]*[A-Za-z]{2,}", "", expression).translate(TO_ASCII).lstrip("+ ")
        expression = re.sub(rf"({NUMBER})\*0?\.01(?![0-9])", r"\1%", expression)
        written = ""
        for token in re.findall(rf"{NUMBER}|[-+*/()%]", expression):
            if token in "+-*/":
                is_sign = not written or written[-1] in "( "
                written += token if is_sign else f" {token} "
            else:
                written += token if token in "()%" else self._write_operand(quantity_value(QUANTITY.match(token)))
        if written.count("(") != written.count(")"):  # the other bracket is in the words
            written = written.strip("()")
        return re.sub(r"\((\[?[0-9.]+\]?%?)\)", r"\1", written.replace("%%", "%"))

    def _write_operand(self, value: Fraction) -> str:
        steps = self._steps_with(value)
        unused = [step for step in steps if step not in self.used]
        if unused or (steps and value not in self.stated):
            return self._refer(unused or steps)
        if value in self.stated:
            return plain(value)
        return self._write_as_percentage(value) or (plain(value) if value in self.constants else "?")

    def _write_as_percentage(self, value: Fraction) -> str | None:
        """Write a number as a percentage of the question or of a step, or as cents of the question, if it is one."""
        if 100 not in self.stated | self.constants:
            return None
        hundredfold = 100 * value if value.denominator > 1 else None
        if hundredfold in self.percentages:
            return f"{plain(hundredfold)}%"
        if self._steps_with(hundredfold):
            return f"{self._refer(self._steps_with(hundredfold))}%"
        for percentage in self.percentages:
            for sign, signed in (("-", -percentage), ("+", percentage)):
                if value == 1 + signed / 100:
                    return f"(100% {sign} {plain(percentage)}%)"
                if value == 100 + signed:
                    return f"(100 {sign} {plain(percentage)})"
        return f"({plain(hundredfold)} / 100)" if hundredfold in self.stated else None

    def _steps_with(self, value: Fraction | None) -> list[int]:
        return [step for step, results in enumerate(self.results, 1) if value in results]

    def _refer(self, steps: list[int]) -> str:
        self.used.add(steps[-1])
        return f"[{steps[-1]}]"

    def _write_words(self, words: str, results: frozenset[Fraction], gap: str) -> str:
        """Write the words without the result of the step; `gap` replaces numbers that may not be shown."""

        def show(quantity: re.Match) -> str:
            value = quantity_value(quantity)
            if quantity["words"] and value == 1:  # hardly ever a number: `one of them`
                return quantity[0]
            if value in results:
                return gap
            if value in self.stated | self.constants:
                return quantity[0]
            steps = self._steps_with(value)
            return f"[{steps[-1]}]" if steps else gap

        return re.sub("[¼-¾⅐-⅞]", gap, QUANTITY.sub(show, ANNOTATION.sub("", words)))


def _join_words(before: str, after: str) -> str:
    """Describe what a step finds: the last clause before its calculation, and the end of the sentence after it."""
    after = SENTENCE_END.split(after.strip(" \t.,;:)%"))[0]
    if len(before.split()) > MAX_WORDS:
        clauses = CLAUSE_EDGE.split(before)
        while len(clauses) > 1 and len(f"{TRAILING_VERB.sub('', clauses[-1])} {after}".split()) < 3:
            clauses[-2:] = [" ".join(clauses[-2:])]
        before = clauses[-1]
    before = before.strip()
    leading = LEADING.match(before)
    before = before[leading.end() :] if leading else before
    is_only_unit = before.rstrip(f" {CURRENCY}").endswith(":") and len(after.split()) <= 3
    if is_only_unit or set(after.lower().split()) <= set(before.lower().split()):
        after = ""
    before = TRAILING.sub("", before)
    return f"{before} {after}" if after else TRAILING_VERB.sub("", before)


def _tidy(words: str, is_equation: bool) -> str:
    """Format the words as a heading, without the signs left by removed numbers; an equation keeps its signs."""
    if not is_equation:
        words = re.sub(rf"[{CURRENCY}](?![\[0-9.])|(?<![\w\]])[/%](?![\w\[])|\(\s*\)|(?<!\S)-(?=[a-z])", "", words)
    words = re.sub(r"\s+([,.;:])", r"\1", re.sub(r"\s+", " ", words)).strip(" .,;:")
    return words[:1].upper() + words[1:] if words[1:2].isalpha() else words
