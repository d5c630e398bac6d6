"""Solved problems for which plans are written."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from ..arguments import GSM8K_IDS, check_at_least
from ..formats import parser_for
from ..gsm8k.numbers import stated_values, with_plain_digits
from ..gsm8k.problems import computed_values, parse_main
from ..loading import is_one_split, load_reasoning_dataset


@dataclass(frozen=True)
class SolvedProblem:
    """A problem with its solution.

    Args:
        index: its row in the dataset.
        question: the text of the problem.
        solution: the text as published: steps, possibly with annotations `<<48/2=24>>`, and `#### <answer>`.
        answer: the final answer.
        execution_steps: the solution's steps without annotations and answer; a plan has one step for each.
        rule_plan_steps: the rule-based plan (see `steps_from_solution`).
    """

    index: int
    question: str
    solution: str
    answer: str
    execution_steps: list[str]
    rule_plan_steps: list[str]

    @cached_property
    def stated(self) -> frozenset[Fraction]:
        """The numbers that the question states."""
        return stated_values(with_plain_digits(self.question))

    @cached_property
    def computed(self) -> frozenset[Fraction]:
        """The numbers that the solution computes."""
        return computed_values(self.solution)


def load_problems(dataset: str, split: str = "train", num_examples: int | None = None) -> list[SolvedProblem]:
    """Load problems with their solutions.

    Args:
        dataset: `openai/gsm8k` (or `gsm8k`), or any dataset of [`load_reasoning_dataset`] with the columns `question`
            and `execution`, which ends with `#### <answer>`.
        split: the split; ignored if `dataset` is a file.
        num_examples: maximum number of problems, taken from the start of the split.

    Raises:
        ValueError: for fewer than one example, a missing column, and a solution without steps or without an answer;
            the message names the row.
    """
    check_at_least("num_examples", num_examples, 1)
    split = None if is_one_split(dataset) else split
    rows = load_reasoning_dataset(dataset, split, parse_example=_read_gsm8k if dataset in GSM8K_IDS else _read_row)
    rows = rows if num_examples is None else rows.select(range(min(num_examples, len(rows))))
    return [_read_problem(index, row["question"], row["execution"]) for index, row in enumerate(rows)]


def _read_gsm8k(row: dict[str, Any]) -> dict[str, str]:
    return {"question": row["question"], "plan": "", "execution": row["answer"]}


def _read_row(row: dict[str, Any]) -> dict[str, str]:
    convert = parser_for(list(row))
    row = row if convert is None else convert(row)
    missing = [column for column in ("question", "execution") if not row.get(column)]
    if missing:
        raise ValueError(
            f"`dataset` must have `question` and `execution` in every row, but {missing} is missing in {row}"
        )
    return {"question": row["question"], "plan": "", "execution": row["execution"]}


def _read_problem(index: int, question: str, solution: str) -> SolvedProblem:
    try:
        row = parse_main({"question": question, "answer": solution})
    except ValueError as error:
        raise ValueError(f"row {index}: {error}") from error
    if not row["execution_steps"]:
        raise ValueError(f"row {index}: the solution must have at least one step, but got {solution!r}")
    return SolvedProblem(
        index=index,
        question=question,
        solution=solution,
        answer=row["answer"],
        execution_steps=row["execution_steps"],
        rule_plan_steps=row["plan_steps"],
    )
