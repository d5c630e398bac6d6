"""A plan step and the execution step that carries it out are at the same place, and no line is lost on the way."""

import itertools

import pytest

from hierbd3lm.data.steps import (
    first_wrong_step,
    make_row,
    number_steps,
    pair_lines,
    render_steps,
    split_steps,
    step_spans,
)
from hierbd3lm.data.synthetic.config import SyntheticConfig
from hierbd3lm.data.synthetic.problems import generate_dataset


def test_row_has_the_texts_of_its_steps():
    assert make_row("2 + 3 + 4?", ["a", "b\nc"], ["2 + 3 = 5", "5 + 4 = 9"], "9") == {
        "question": "2 + 3 + 4?",
        "plan": "a\nb\nc",
        "execution": "2 + 3 = 5\n5 + 4 = 9\n#### 9",
        "answer": "9",
        "plan_steps": ["a", "b\nc"],
        "execution_steps": ["2 + 3 = 5", "5 + 4 = 9"],
        "depends_on": None,
    }


def test_a_row_has_the_references_of_its_plan_where_each_step_is_one_line():
    steps = ["1. Sold in May: 48 / 2", "2. In both months: 48 + [1]", "3. Twice [2]: 2 * [2] + [1]"]
    assert make_row("?", steps, ["a", "b", "c"], "9")["depends_on"] == [[], [0], [0, 1]]
    assert make_row("?", ["\n".join(steps[:2]), steps[2]], ["a", "b"], "9")["depends_on"] is None


def test_steps_that_are_not_paired_are_refused():
    with pytest.raises(ValueError, match="`plan_steps` must have as many steps as `execution_steps`, 1, but got 2"):
        make_row("2 + 3?", ["a", "b"], ["2 + 3 = 5"], "5")


def test_no_steps_are_no_text_and_an_answer_is_a_line_of_its_own():
    assert (render_steps([]), render_steps([], "5")) == ("", "#### 5")


def test_steps_are_numbered_from_one():
    assert number_steps(["a", "b"]) == ["1. a", "2. b"]


def all_assignments(num_plan_lines, num_execution_lines):
    """Every way in which execution lines can carry out plan lines in order."""
    return itertools.combinations_with_replacement(range(num_execution_lines), num_plan_lines)


@pytest.mark.parametrize("num_plan_lines", [1, 2, 3, 4])
@pytest.mark.parametrize("num_execution_lines", [1, 2, 3, 4])
def test_every_plan_line_is_paired_with_the_line_that_carries_it_out(num_plan_lines, num_execution_lines):
    plan, execution = [f"p{i}" for i in range(num_plan_lines)], [f"e{i}" for i in range(num_execution_lines)]
    for execution_indices in all_assignments(num_plan_lines, num_execution_lines):
        plan_steps, execution_steps = pair_lines(plan, execution, execution_indices)
        assert render_steps(plan_steps).split("\n") == plan
        assert render_steps(execution_steps).split("\n") == execution
        for line, index in zip(plan, execution_indices, strict=True):
            place = next(k for k, step in enumerate(plan_steps) if line in step.split("\n"))
            assert f"e{index}" in execution_steps[place].split("\n")
        assert len(plan_steps) == len(execution_steps) == len(set(execution_indices)), "steps are as short as can be"


def test_line_without_a_plan_line_goes_with_the_next_and_the_last_ones_with_the_last():
    plan_steps, execution_steps = pair_lines(["p", "q"], ["a", "b", "c", "d", "e"], [1, 3])
    assert (plan_steps, execution_steps) == (["p", "q"], ["a\nb", "c\nd\ne"])


def test_nothing_to_pair_gives_no_steps():
    assert pair_lines([], [""], []) == ([], [])


def test_spans_are_the_places_of_the_steps():
    for text in ("", "a", " a \n\n  b c\n#### 7", "a\nb\n", "\n#### 1", "a #### b"):
        assert [text[start:end] for start, end in step_spans(text)] == split_steps(text)


@pytest.mark.parametrize(
    "execution, step",
    [
        ("Mia = 5 + 3 = 8\n#### 8", None),
        ("Mia = 5 + 3 = 9\n#### 9", 0),
        ("A = 2 * 3 = 6\nB = 6 - 1 = 4\n#### 4", 1),
        ("A = 2 * 3 = 6\nB = 6 - 1 = 5\n#### 6", 1),  # another answer than the last step
        ("A = 7 - 2 - 3 = 2\n#### 2", None),
        ("A = 7 - 2 * 3 = 1\n#### 1", None),
        ("A = 7 - 2 * 3 = 15\n#### 15", 0),
        ("He sold 48/2 = $24 in May.\n#### 24", None),
        ("He sold 48/2 = $25 in May.", 0),
        ("1,200 - 2.5 x 4 = 1,190", None),
        ("10 / 3 = 3.33", None),
        ("10 / 3 = 3.4", 0),
        ("10 / 4 = 3", 0),
        ("3 / 0 = 3", 0),
        ("5 - 8 = -3", None),
        ("60 apples * 4/5 = 48", None),  # the operation starts before the numbers that stand next to each other
        ("half of 20% is left", None),
        ("", None),
        ("#### 5", None),
    ],
)
def test_the_first_step_with_wrong_arithmetic_is_found(execution, step):
    assert first_wrong_step(execution) == step


def test_reference_executions_have_no_wrong_step_and_changed_results_are_one():
    """Python's own arithmetic says which results are right."""
    for row in generate_dataset("test", 60, SyntheticConfig(num_steps=(1, 5))):
        assert first_wrong_step(row["execution"]) is None
        for index, line in enumerate(row["execution_steps"]):
            _, operation, result = line.split(" = ")
            for wrong in {int(result) - 1, int(result) + 1, int(result) * 10}:
                assert eval(operation) != wrong
                lines = row["execution_steps"].copy()
                lines[index] = line.rpartition(" ")[0] + f" {wrong}"
                assert first_wrong_step(render_steps(lines, row["answer"])) == index
