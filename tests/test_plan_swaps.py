"""An exchanged plan is another problem's; a changed plan differs in one thing and has another answer."""

import random
import re
from collections import Counter

import pytest

from hierbd3lm.data.synthetic.config import SyntheticConfig
from hierbd3lm.data.synthetic.plan_swaps import KINDS, ONE_PART, UNSEEN_KINDS, change_plan, exchange_plans
from hierbd3lm.data.synthetic.problems import generate_dataset
from hierbd3lm.data.synthetic.quantities import MAX_FACTOR
from hierbd3lm.data.synthetic.vocabulary import NAMES

CONFIGS = [
    SyntheticConfig(),
    SyntheticConfig(num_steps=(1, 3), max_depth=2, num_distractors=(0, 0), max_value=12, num_names=8, num_things=2),
    SyntheticConfig(num_steps=(2, 6), num_distractors=(0, 3), max_value=60, seed=3),
]


def evaluate_by_python(question, plan):
    """The values of a plan's steps, by Python's own evaluation of the lines as assignments."""
    given = re.findall(r"(\w+) (?:has|owns|keeps) (\d+) \w+\.", question)
    variables = {name: int(number) for name, number in given}
    values = []
    for line in plan.split("\n"):
        exec(line, {"__builtins__": {}}, variables)
        values.append(variables[line.split()[0]])
    return values


def draw_changes(config, num_examples=200, seed=0, kinds=(*KINDS, *UNSEEN_KINDS)):
    rows = generate_dataset("test", num_examples, config)
    rng, names = random.Random(seed), NAMES[: config.num_names]
    return [(row, change_plan(rng, row["question"], row["plan"], config.max_value, names, kinds)) for row in rows]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_changed_plan_has_the_answer_that_it_says_and_stays_in_range(config):
    changes = [(row, change) for row, change in draw_changes(config) if change is not None]
    assert len(changes) > 190
    for row, change in changes:
        values = evaluate_by_python(row["question"], change.plan)
        assert evaluate_by_python(row["question"], row["plan"])[-1] == int(row["answer"])
        assert values[-1] == change.answer != int(row["answer"])
        assert min(values) >= 1 and max(values) <= config.max_value


@pytest.mark.parametrize("config", CONFIGS)
def test_exactly_the_named_step_differs_in_exactly_one_thing_of_the_named_kind(config):
    kinds = Counter()
    for row, change in draw_changes(config, kinds=ONE_PART):
        if change is None:
            continue
        lines, new_lines = row["plan"].split("\n"), change.plan.split("\n")
        assert len(lines) == len(new_lines)
        assert [place for place in range(len(lines)) if lines[place] != new_lines[place]] == [*change.steps]
        words, new_words = (texts[change.steps[0]].split() for texts in (lines, new_lines))
        [(old, new)] = [pair for pair in zip(words, new_words, strict=True) if pair[0] != pair[1]]
        assert new not in words
        expected = {
            "operation": old in "+-*" and new in "+-*",
            "number": old.isdecimal() and new.isdecimal(),
            "operand": old.isalpha() and new.isalpha(),
            "addend": old.isalpha() and new.isdecimal() and len(words) == 5,
        }
        assert [kind for kind, holds in expected.items() if holds] == [change.kind]
        if "*" in new_words:
            assert 2 <= int(new_words[-1]) <= MAX_FACTOR
        kinds[change.kind] += 1
    assert kinds.keys() == {"operation", "number", "operand", "addend"}


@pytest.mark.parametrize("config", CONFIGS)
def test_changes_of_several_steps_are_what_their_kind_says(config):
    kinds = Counter()
    for kind in ("inserted", "removed", "exchanged", *UNSEEN_KINDS):
        for row, change in draw_changes(config, 60, kinds=[kind]):
            if change is None:
                continue
            kinds[kind] += 1
            old, new, places = row["plan"].split("\n"), change.plan.split("\n"), change.steps
            assert change.kind == kind and change.answer == evaluate_by_python(row["question"], change.plan)[-1]
            assert [line for place, line in enumerate(new) if place not in places] == [
                line for line in old if line in new and new.index(line) not in places
            ]
            name = new[min(places[0], len(new) - 1)].split()[0]
            if kind == "inserted":
                assert len(new) == len(old) + 1 and name not in f"{row['question']} {row['plan']}".split()
                assert places == (len(old),) or name in new[places[1]].split()
            elif kind == "removed":
                assert len(new) == len(old) - 1
                assert {line.split()[0] for line in new} < {line.split()[0] for line in old}
            else:
                assert len(new) == len(old)
                assert [place for place in range(len(old)) if old[place] != new[place]] == [*places]
            if kind == "exchanged":
                ends = [sorted(tuple(lines[place].split()[-2:]) for place in places) for lines in (old, new)]
                assert len(places) == 2 and ends[0] == ends[1]
            elif kind == "constant":
                assert re.fullmatch(r"\w+ = \d+ [-+*] \d+", new[places[0]]) and len(places) == 1
            elif kind == "two steps":
                assert len(places) == 2
    assert min(kinds.values()) >= 1 and len(kinds) == 5


def test_steps_that_do_not_need_each_other_exchange_their_places():
    """With another order alone the answer stays, so that only changes of any answer have it."""
    question, plan = "Tom has 5 apples. Ann has 4 apples.", "Mia = Tom + 3\nLeo = Ann - 3\nZoe = Mia + Leo"
    drawn = {
        change_plan(random.Random(seed), question, plan, 20, (), ["exchanged"], has_other_answer=False).plan
        for seed in range(40)
    }
    swapped = "Leo = Ann - 3\nMia = Tom + 3\nZoe = Mia + Leo"
    assert drawn == {swapped, "Mia = Tom - 3\nLeo = Ann + 3\nZoe = Mia + Leo"}
    assert change_plan(random.Random(0), question, plan, 20, (), ["exchanged"]) is None


def test_a_change_is_drawn_by_its_generator_alone():
    assert draw_changes(CONFIGS[0], 40, seed=1) == draw_changes(CONFIGS[0], 40, seed=1)
    assert draw_changes(CONFIGS[0], 40, seed=1) != draw_changes(CONFIGS[0], 40, seed=2)


def test_a_plan_without_a_change_in_range_has_none():
    """Tom + n is in [1, 2] for one n alone, and neither 1 * 2 (the same answer) nor 1 - 1 is another way."""
    question = "Tom has 1 apple. Mia has 1 more apple than Tom."
    assert change_plan(random.Random(0), question, "Mia = Tom + 1", 2, kinds=ONE_PART) is None
    changed = change_plan(random.Random(0), question, "Mia = Tom + 1", 3, kinds=ONE_PART)
    assert (changed.kind, changed.answer, changed.steps) == ("number", 3, (0,))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_problem_gets_another_problems_plan_with_as_many_steps(config, seed):
    plans = generate_dataset("test", 101, config)["plan"][:]
    others = exchange_plans(plans, seed)
    assert sorted(others) == list(range(101))
    for index, other in enumerate(others):
        assert plans[other] != plans[index]
        assert plans[other].count("\n") == plans[index].count("\n")
    assert others == exchange_plans(plans, seed)
    assert others != exchange_plans(plans, seed + 1)


def test_plans_are_exchanged_whenever_they_can_be():
    """Random lists of few texts and few numbers of steps: refused exactly where one text is more than half of all."""
    rng, num_refused = random.Random(0), 0
    for _ in range(500):
        texts = ["a", "b", "a\nb", "b\na", "a\na\na"][: rng.randint(1, 5)]
        plans = rng.choices(texts, weights=[rng.random() ** 3 + 1e-3 for _ in texts], k=rng.randint(1, 9))
        if 2 * max(Counter(plans).values()) > len(plans):
            num_refused += 1
            with pytest.raises(ValueError, match="must not have the same text in more than half"):
                exchange_plans(plans)
        else:
            others = exchange_plans(plans)
            assert sorted(others) == list(range(len(plans)))
            assert all(plans[index] != plans[other] for index, other in enumerate(others))
    assert 50 < num_refused < 450
