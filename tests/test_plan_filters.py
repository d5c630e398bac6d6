"""A plan is rejected for what is wrong with it, by name, and a good one is not."""

import json
import os
import re
from collections import Counter
from fractions import Fraction

import pytest

from hierbd3lm.configuration_hierbd3lm import SPECIAL_TOKENS
from hierbd3lm.data.gsm8k.numbers import plain
from hierbd3lm.data.gsm8k.problems import load_gsm8k_rows, parse_main
from hierbd3lm.data.plans.filters import (
    COMMON_WORDS,
    FILTERS,
    MAX_PLAN_CHARS,
    PlanDraft,
    find_rejection,
    score,
    shown_values,
)
from hierbd3lm.data.plans.problems import SolvedProblem
from hierbd3lm.data.plans.prompt import EXAMPLE_PLAN, EXAMPLE_QUESTION, EXAMPLE_SOLUTION, parse_reply

from .test_gsm8k import WORD_VALUES, leaks, stated_numbers

LEAKS = {"leaks_final_answer", "leaks_intermediate_result"}
WORDS = {Fraction(value): word for word, value in WORD_VALUES.items() if value > 1}

needs_gsm8k = pytest.mark.skipif(
    "GSM8K_DIR" not in os.environ, reason="GSM8K_DIR must name a folder with GSM8K's train.jsonl and test.jsonl"
)


def make_problem(question, solution):
    row = parse_main({"question": question, "answer": solution})
    return SolvedProblem(0, question, solution, row["answer"], row["execution_steps"], row["plan_steps"])


CLIPS = make_problem(
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?",
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72",
)
FIRST, SECOND = "Find the clips sold in May by taking half of 48", "Add the clips of April and [1]"


def draft_of(*steps, problem=CLIPS, is_cut_off=False):
    return PlanDraft.read(problem, json.dumps({"steps": steps}), is_cut_off)


def rejection_of_reply(reply):
    return find_rejection(PlanDraft.read(CLIPS, reply))


# Each filter

GOOD = [
    (FIRST, SECOND),
    ("Halve the number of clips sold in April", "Add both months"),
    ("May: 48 / 2", "total: 48 + [1]"),
    ("48 / 2", "48 + [1]"),
    ("Divide the forty-eight clips by two", "Add the result of step 1 and the 48 clips"),
    ("Take one half of the clips", "Add them to step one"),
    ("Find the clips of May", "There are 12 months in a year, but only two count: add these"),
]


@pytest.mark.parametrize("steps", GOOD)
def test_good_plan_is_kept(steps):
    assert find_rejection(draft_of(*steps)) is None


BAD_STEPS = {
    "empty": [(FIRST, ""), (FIRST, " "), (FIRST, "..."), ()],
    "too_long": [(FIRST, SECOND + " and so on" * 100)],
    "not_steps": [(FIRST, f"Add them {token}") for token in SPECIAL_TOKENS.values()],
    "not_aligned": [(FIRST,), (FIRST, SECOND, "Write the result")],
    "wrong_language": [
        ("Calcula cuántos clips vendió Natalia en mayo", "Suma los clips de abril y [1]"),
        ("Calculer le nombre de clips vendus par Natalia en mai", "Additionner les clips d'avril et [1]"),
        ("Berechne, wie viele Clips Natalia im Mai verkauft hat", "Addiere die Clips von April und [1]"),
        ("计算娜塔莉亚五月卖出的夹子", "把四月和五月加起来"),
        ("Найди, сколько заколок продано в мае", "Сложи апрель и [1]"),
        ("qzx vbn wty plk", "rrt ggh zzp"),
    ],
    "repeats_question": [
        tuple(re.split(r"(?<=\.) ", CLIPS.question)),
        ("Natalia sold clips to 48 of her friends in April", "then she sold half as many clips in May"),
        ("Find how many clips did Natalia sell altogether", "How many clips did Natalia sell altogether in April"),
    ],
    "leaks_final_answer": [
        (FIRST, f"Add them to get {answer}")
        for answer in ("72", "$72", "72%", "72.0", "seventy-two", "Seventy Two", "７２", "72clips", "[72]", "step 72")
    ]
    + [("48 / 2", "72 - 0"), ("Find 72", "Subtract 24"), ("Double [1] to find half of step 72", SECOND)],
    "leaks_intermediate_result": [
        (f"Find the {number} clips of May", SECOND)
        for number in ("24", "$24.00", "24%", "twenty-four", "２４", "(24)", "[24]", "step 24", "0.24", "24,000", "13")
    ]
    + [(FIRST, "Add 48 and 24"), ("Twenty four clips", SECOND)],
}


@pytest.mark.parametrize(("name", "steps"), [(name, steps) for name, cases in BAD_STEPS.items() for steps in cases])
def test_bad_plan_is_rejected_by_name(name, steps):
    assert find_rejection(draft_of(*steps)) == name


BAD_REPLIES = {
    "empty": ["", " \n ", '{"steps": []}', '{"steps": ["", ""]}'],
    "not_steps": [
        "I am sorry, but I cannot help with that.",
        f"{FIRST}. {SECOND}.",
        '{"steps": "Halve 48, add [1]"}',
        '{"steps": [1, 2]}',
        '{"plan": ["Halve", "Add"]}',
        '["Halve", "Add"]',
        '{"steps": ["Halve',
        "{" * 100_000,
        '{"steps": ' + "[" * 100_000,
        f"1. {FIRST}\n3. {SECOND}",
        f"1. {FIRST}\n2. {SECOND}\nThe answer is 72.",
        f"Sure!\nHere is the plan:\n1. {FIRST}\n2. {SECOND}",
        "\x00\ufffd!!",
    ],
}


@pytest.mark.parametrize(("name", "reply"), [(name, reply) for name, cases in BAD_REPLIES.items() for reply in cases])
def test_bad_reply_is_rejected_by_name(name, reply):
    assert rejection_of_reply(reply) == name


def test_every_filter_has_cases():
    assert set(BAD_STEPS) | set(BAD_REPLIES) == set(FILTERS)
    assert all(BAD_STEPS.values())


def test_reply_that_was_cut_off_is_too_long():
    assert find_rejection(draft_of(FIRST, SECOND, is_cut_off=True)) == "too_long"
    assert find_rejection(PlanDraft.read(CLIPS, '{"steps": ["Find', is_cut_off=True)) == "too_long"


def test_plan_may_have_as_many_characters_as_the_limit_says():
    room = MAX_PLAN_CHARS - len(f"{FIRST}\n")
    for length, name in ((room, None), (room + 1, "too_long")):
        assert find_rejection(draft_of(FIRST, ("add them " * 200)[:length].rstrip().ljust(length, "s"))) == name


# Reading replies


@pytest.mark.parametrize(
    "reply",
    [
        json.dumps({"steps": [FIRST, SECOND]}),
        json.dumps({"steps": [f"1. {FIRST}", f"Step 2: {SECOND}"]}, indent=2),
        f"Here it is:\n```json\n{json.dumps({'steps': [FIRST, SECOND]})}\n```",
        f"1. {FIRST}\n2. {SECOND}",
        f"Plan:\n\n  1) {FIRST}\n\n  2) {SECOND}\n",
        f"Step 1: {FIRST}\nStep 2: {SECOND}",
        json.dumps({"steps": [FIRST.replace(" ", "\n "), SECOND]}),
    ],
)
def test_steps_are_read_from_json_and_from_numbered_lines(reply):
    assert parse_reply(reply) == [FIRST, SECOND]


def test_number_that_begins_a_step_is_no_numbering():
    assert parse_reply('{"steps": ["2.5 times 48", "48 plus [1]"]}') == ["2.5 times 48", "48 plus [1]"]


def test_example_of_the_prompt_is_a_good_plan():
    solution = "\n".join([re.sub(r"([\d*/-]+)=(\d+)", r"<<\1=\2>>\2", step) for step in EXAMPLE_SOLUTION])
    problem = make_problem(EXAMPLE_QUESTION, f"{solution}\n#### 19")
    assert problem.execution_steps != list(EXAMPLE_SOLUTION) and len(problem.execution_steps) == 3
    assert find_rejection(draft_of(*EXAMPLE_PLAN, problem=problem)) is None


# Which numbers a plan may show


@pytest.mark.parametrize(
    ("steps", "numbers"),
    [
        (["one of them, 1 of these"], {1}),
        (["one of them, each one"], set()),
        (["twenty-one boxes"], {21}),
        (["half a dozen"], {2, 12}),
        (["[1]"], {1}),  # there is no step before the first
        (["a", "[1] and step 1", "steps 1, 2 and 30, step two"], {30}),
        (["a", "b", "c", "steps 1-3 and Step three"], set()),
        (["a", "[2] + [3]"], {2, 3}),
        (["1,080 or 0.25 or .5"], {1080, Fraction(1, 4), Fraction(1, 2)}),
    ],
)
def test_references_to_earlier_steps_are_no_numbers(steps, numbers):
    assert shown_values(steps) == numbers


def test_answer_that_the_question_states_may_be_shown():
    problem = make_problem("Tom has 5 pens and loses 0. Has he 5?", "He has 5-0=<<5-0=5>>5 pens.\n#### 5")
    assert find_rejection(draft_of("Subtract 0 from 5", problem=problem)) is None


@pytest.mark.parametrize(
    ("question", "solution", "step", "name"),
    [
        ("How many days are in 3 weeks?", "There are 3*7=<<3*7=21>>21 days.\n#### 21", "Multiply by 7", None),
        ("How many are 3 and 4?", "There are 3+4=<<3+4=7>>7.\n#### 7", "Add them: 7", "leaks_final_answer"),
        ("How much is $1,080 less 80?", "1080-80=<<1080-80=1000>>1,000\n#### 1,000", "1,000", "leaks_final_answer"),
        ("Is it red?", "It is not red but a shade of blue.\n#### blue", "Find that it is Blue", "leaks_final_answer"),
        ("Is it red or blue?", "It is red or blue, so look.\n#### blue", "Find whether it is blue", None),
    ],
)
def test_general_knowledge_may_be_shown_unless_it_is_a_result(question, solution, step, name):
    assert find_rejection(draft_of(step, problem=make_problem(question, solution))) == name


# The score


def score_by_hand(steps, execution_steps):
    """Pairs off equal words one by one."""
    scores = []
    for texts in zip(steps, execution_steps, strict=True):
        words, others = (re.findall("[a-z]+", text.lower()) for text in texts)
        words, others = ([word for word in side if word not in COMMON_WORDS] for side in (words, others))
        rest = list(others)
        for word in words:
            if word in rest:
                rest.remove(word)
        matched = len(others) - len(rest)
        precision, recall = matched / max(len(words), 1), matched / max(len(others), 1)
        scores.append(2 * precision * recall / (precision + recall) if matched else 0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("steps", [*GOOD, ("Natalia sold clips", "Natalia Natalia sold clips altogether in April")])
def test_score_is_the_mean_f1_of_the_content_words_of_paired_steps(steps):
    assert score(draft_of(*steps)) == pytest.approx(score_by_hand(steps, CLIPS.execution_steps))


def test_score_prefers_the_plan_that_names_what_each_step_finds():
    plans = [(FIRST, SECOND), (SECOND, FIRST), ("Find the first amount", "Find the total"), ("48 / 2", "48 + [1]")]
    scores = [score(draft_of(*steps)) for steps in plans]
    assert scores[0] == max(scores) > max(scores[1:])
    assert scores[-1] == 0
    assert score(draft_of(*CLIPS.execution_steps)) == 1


# Real problems


@pytest.fixture(scope="module")
def gsm8k():
    """Every second test problem, with its rule-based plan as the steps of a reply."""
    problems = [make_problem(row["question"], row["answer"]) for row in list(load_gsm8k_rows("test"))[::2]]
    return [(problem, without_numbers(problem.rule_plan_steps)) for problem in problems]


def without_numbers(steps):
    return [" ".join(re.sub(r"^\d+\. ", "", line) for line in step.split("\n")) for step in steps]


@needs_gsm8k
def test_filters_keep_nearly_all_value_free_plans_of_gsm8k(gsm8k):
    rejections = Counter(find_rejection(draft_of(*steps, problem=problem)) for problem, steps in gsm8k)
    assert rejections[None] >= 0.99 * len(gsm8k) > 600
    assert set(rejections) <= {None, "repeats_question", "leaks_intermediate_result"}


@needs_gsm8k
def test_every_result_of_gsm8k_is_a_leak_in_digits_and_in_words(gsm8k):
    num_leaks = 0
    for problem, steps in gsm8k:
        results = {Fraction(result) for result in re.findall(r"=\s*([\d.]+)>>", problem.solution)}
        for result in results - stated_numbers(problem.question):
            for shown in {f"${plain(result)}.", WORDS.get(result, f"{plain(result)}%")}:
                draft = draft_of(*steps[:-1], f"{steps[-1]} that is {shown}", problem=problem)
                assert FILTERS["leaks_final_answer"](draft) == (result == Fraction(problem.answer)), draft.steps
                assert FILTERS["leaks_intermediate_result"](draft), draft.steps
                num_leaks += 1
    assert num_leaks > 2000


@needs_gsm8k
def test_leaks_are_those_that_an_independent_reader_of_numbers_finds(gsm8k):
    num_leaks = 0
    for problem, steps in gsm8k:
        for plan in (steps, without_marks(problem.solution)):
            draft = draft_of(*plan, problem=problem)
            is_leaky = any(FILTERS[name](draft) for name in LEAKS)
            found = leaks(problem.question, problem.solution, "\n".join(plan))
            assert is_leaky or not found, (found, plan)
            num_leaks += bool(found)
    assert num_leaks > 600


def without_marks(solution):
    return re.sub("<<.*?>>", "", solution.partition("\n####")[0]).split("\n")
