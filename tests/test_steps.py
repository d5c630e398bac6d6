"""A plan step and the execution step that carries it out are at the same place, and no line is lost on the way."""

import itertools

import pytest

from hierbd3lm.data.steps import make_row, number_steps, pair_lines, render_steps


def test_row_has_the_texts_of_its_steps():
    assert make_row("2 + 3 + 4?", ["a", "b\nc"], ["2 + 3 = 5", "5 + 4 = 9"], "9") == {
        "question": "2 + 3 + 4?",
        "plan": "a\nb\nc",
        "execution": "2 + 3 = 5\n5 + 4 = 9\n#### 9",
        "answer": "9",
        "plan_steps": ["a", "b\nc"],
        "execution_steps": ["2 + 3 = 5", "5 + 4 = 9"],
    }


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
