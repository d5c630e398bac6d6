"""Filters and score for plans written by a language model."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from ...configuration_hierbd3lm import SPECIAL_TOKENS
from ..gsm8k.numbers import CONSTANTS, NUMBER_WORD, implied_values, values, with_plain_digits
from ..steps import render_steps
from .problems import SolvedProblem
from .prompt import parse_reply

MAX_PLAN_CHARS = 1000  # about 250 tokens; the longest rule-based plan for GSM8K has 872
RUN_LENGTH = 5  # consecutive words that count as copied, not as a coincidence

_COMMON_WORDS = """
a about across add added adding after all also altogether amount an and any apply are as at average back based be
before between both by calculate calculated calculating change combine combined combining compare compute convert cost
count decrease determine difference divide divided dividing do does each earned equal equation every express figure
find finding first for fraction from get given gives giving has have he her him his how if in increase increased
initial into is it its left less long many more most much multiple multiply multiplied multiplying need needed new not
number obtain of off on one only or original other out over part per percent percentage plus price product quantity
rate ratio remain remaining represent result same second set she simplify solve spent step subtract subtracted
subtracting sum take taken taking than that the their them then there these they this those time times to together
total twice two up use used using value was were what when where which who whole will with
"""
COMMON_WORDS = frozenset(_COMMON_WORDS.split())  # of English plans, whatever the problem
REFERENCE = re.compile(
    rf"\[[0-9]+\]|\bsteps?\s+(?:[0-9]+|{NUMBER_WORD})\b(?:(?:,|\s*-|\s+and|\s+or|\s+to)\s*(?:[0-9]+|{NUMBER_WORD})\b)*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class PlanDraft:
    """A reply as a plan for a problem.

    Args:
        problem: the problem.
        reply: the text written by the language model.
        is_cut_off: whether the reply was cut off before its end.
        steps: the steps of the reply; None if it cannot be parsed.
    """

    problem: SolvedProblem
    reply: str
    is_cut_off: bool
    steps: list[str] | None

    @classmethod
    def read(cls, problem: SolvedProblem, reply: str, is_cut_off: bool = False) -> "PlanDraft":
        """Parse the steps of a reply."""
        return cls(problem, reply, is_cut_off, parse_reply(reply))

    @property
    def text(self) -> str:
        """The steps as one text."""
        return render_steps(self.steps or ())

    @cached_property
    def shown(self) -> frozenset[Fraction]:
        """The numbers that the steps show."""
        return shown_values(self.steps or ())


def find_rejection(draft: PlanDraft) -> str | None:
    """Return the name of the first of `FILTERS` that rejects a draft, or None."""
    return next((name for name, rejects in FILTERS.items() if rejects(draft)), None)


def score(draft: PlanDraft) -> float:
    """Mean F1 between the words of the k-th plan step and the k-th step of the solution, in [0, 1].

    Common words and numbers do not count: a plan loses score if it omits the subject of a step, or adds words that
    the solution does not have.
    """
    pairs = zip(draft.steps or (), draft.problem.execution_steps, strict=True)
    scores = [_f1(_content_words(step), _content_words(execution_step)) for step, execution_step in pairs]
    return sum(scores) / len(scores)


def _f1(words: Counter[str], others: Counter[str]) -> float:
    common = (words & others).total()
    return 2 * common / (words.total() + others.total()) if common else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def _content_words(text: str) -> Counter[str]:
    return Counter(word for word in _words(text) if word not in COMMON_WORDS)


# The filters


def _is_empty(draft: PlanDraft) -> bool:
    """Empty or only white space, no steps, or a step without a word or number."""
    is_blank = not draft.reply.strip()
    return is_blank or draft.steps == [] or not all(re.search(r"\w", step) for step in draft.steps or ())


def _is_too_long(draft: PlanDraft) -> bool:
    """Cut off, or longer than `MAX_PLAN_CHARS` characters."""
    return draft.is_cut_off or len(draft.text) > MAX_PLAN_CHARS


def _is_not_steps(draft: PlanDraft) -> bool:
    """Not parsable as steps, or with a special token of the segments."""
    return draft.steps is None or any(token in draft.text for token in SPECIAL_TOKENS.values())


def _is_not_aligned(draft: PlanDraft) -> bool:
    """More or fewer steps than the solution."""
    return len(draft.steps) != len(draft.problem.execution_steps)


def _is_in_wrong_language(draft: PlanDraft) -> bool:
    """Most words occur neither in the problem (question and solution) nor in typical English plans."""
    known = COMMON_WORDS.union(_words(draft.problem.question), _words(draft.problem.solution))
    words = _words(draft.text)
    return 2 * sum(word in known for word in words) < len(words)


def _repeats_question(draft: PlanDraft) -> bool:
    """Most runs of `RUN_LENGTH` words are copied from the question."""
    runs, asked = _runs(draft.text), set(_runs(draft.problem.question))
    return 2 * sum(run in asked for run in runs) > len(runs)


def _runs(text: str) -> list[tuple[str, ...]]:
    words = _words(text)
    return [tuple(words[start : start + RUN_LENGTH]) for start in range(len(words) - RUN_LENGTH + 1)]


def _leaks_final_answer(draft: PlanDraft) -> bool:
    """The plan contains the final answer, and the question does not."""
    problem = draft.problem
    answers = values(problem.answer)
    if not answers:  # an answer in words
        return problem.answer.lower() in draft.text.lower() and problem.answer.lower() not in problem.question.lower()
    return bool(answers & draft.shown - problem.stated)


def _leaks_intermediate_result(draft: PlanDraft) -> bool:
    """The plan contains a number that the question does not state.

    Numbers of general knowledge (`CONSTANTS`) are allowed, unless the solution computes them.
    """
    return bool(draft.shown - draft.problem.stated - (CONSTANTS - draft.problem.computed))


# Applied in this order: each filter may rely on the previous ones.
FILTERS: dict[str, Callable[[PlanDraft], bool]] = {
    "empty": _is_empty,
    "too_long": _is_too_long,
    "not_steps": _is_not_steps,
    "not_aligned": _is_not_aligned,
    "wrong_language": _is_in_wrong_language,
    "repeats_question": _repeats_question,
    "leaks_final_answer": _leaks_final_answer,
    "leaks_intermediate_result": _leaks_intermediate_result,
}


def shown_values(steps: Sequence[str]) -> frozenset[Fraction]:
    """Return the numbers that the steps of a plan show: in digits, in words, and by words such as `dozen`.

    References to earlier steps (`[1]`, `steps 1 and 2`) and the word `one` do not count.
    """
    shown: set[Fraction] = set()
    for k, step in enumerate(map(with_plain_digits, steps), 1):
        step = REFERENCE.sub(lambda match, k=k: _without_earlier_steps(match[0], k), step)
        in_digits = re.sub(r"[^\W\d_]+", " ", step)
        shown |= values(step) - {1} | values(in_digits) | implied_values(step)
    return frozenset(shown)


def _without_earlier_steps(reference: str, k: int) -> str:
    return re.sub(
        rf"[0-9]+|\b{NUMBER_WORD}\b",
        lambda number: " " if values(number[0]) <= set(range(1, k)) else number[0],
        reference,
        flags=re.IGNORECASE,
    )
