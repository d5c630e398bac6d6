"""An execution agrees with a plan exactly where each of its steps is what the plan says."""

import re

import pytest

from hierbd3lm.data.steps import render_steps, split_steps
from hierbd3lm.data.synthetic.checks import (
    VERDICTS,
    carry_out,
    check_execution,
    given_values,
    parse_execution_step,
    parse_plan,
    parse_plan_step,
)
from hierbd3lm.data.synthetic.config import SyntheticConfig
from hierbd3lm.data.synthetic.problems import generate_dataset

SPLITS = [
    ("test", SyntheticConfig()),
    ("test", SyntheticConfig(num_steps=(2, 7), num_distractors=(0, 4), max_value=1000, num_names=40, seed=1)),
    ("ood_longer", SyntheticConfig()),
    ("ood_wider", SyntheticConfig(num_steps=(3, 5), depth=3)),
]
QUESTION = (
    "Mia has 3 more apples than Tom. Tom has 5 apples. Ann keeps 1 apple. Compared to Ann, Leo has 9 more apples."
)
PLAN = "Mia = Tom + 3\nBen = Mia - 2\nZoe = Ben + Mia + Ann"
EXECUTION = "Mia = 5 + 3 = 8\nBen = 8 - 2 = 6\nZoe = 6 + 8 + 1 = 15\n#### 15"


@pytest.mark.parametrize("split, config", SPLITS)
def test_every_execution_of_the_generator_carries_out_its_plan(split, config):
    for row in generate_dataset(split, 200, config):
        verdicts = check_execution(row["question"], row["plan"], row["execution"])
        assert verdicts == ["followed"] * row["num_steps"]
        values = carry_out(parse_plan(row["plan"]), given_values(row["question"]))
        assert str(values[-1]) == row["answer"]
        assert [str(step) for step in parse_plan(row["plan"])] == row["plan_steps"] == split_steps(row["plan"])
        assert split_steps(row["execution"]) == row["execution_steps"]


def add_to_result(line, difference):
    return re.sub(r"\d+$", lambda match: str(int(match[0]) + difference), line)


def apply_other_operation(line):
    """With the right result of the other operation, so that nothing but the operation is wrong."""
    name, operation, _ = line.split(" = ")
    new = operation.replace("*", "-") if "*" in operation else operation.translate(str.maketrans("+-", "-+"))
    return f"{name} = {new} = {eval(new)}"


def apply_to_other_number(line):
    """With the right result for the other number, so that nothing but the number is wrong."""
    name, operation, _ = line.split(" = ")
    new = add_to_result(operation, 1)
    return f"{name} = {new} = {eval(new)}"


def apply_to_other_operand(line):
    name, operation, _ = line.split(" = ")
    new = re.sub(r"^\d+", lambda match: str(int(match[0]) + 1), operation)
    return f"{name} = {new} = {eval(new)}"


CORRUPTIONS = {
    "operands": (apply_to_other_operand, apply_to_other_number),
    "operation": (apply_other_operation,),
    "arithmetic": (lambda line: add_to_result(line, 1), lambda line: add_to_result(line, -1)),
    "quantity": (lambda line: "Nobody" + line[line.index(" ") :],),
    "unreadable": (
        lambda line: line.replace(" = ", " ", 1),
        lambda line: line.rpartition(" = ")[0],
        lambda line: line + " =",
        lambda line: line.replace("= ", "= 1 ", 1),
        lambda line: line.replace(" = ", " = Tom + ", 1),
    ),
}


@pytest.mark.parametrize("verdict, corrupt", [(name, c) for name, all_of_it in CORRUPTIONS.items() for c in all_of_it])
def test_every_corrupted_step_is_caught_where_it_is(verdict, corrupt):
    """Later steps are compared with what the execution says: one is wrong alone, or those that use it are too."""
    for row in generate_dataset("test", 60, SyntheticConfig(num_steps=(1, 4))):
        for place in range(row["num_steps"]):
            steps = list(row["execution_steps"])
            steps[place] = corrupt(steps[place])
            verdicts = check_execution(row["question"], row["plan"], render_steps(steps, row["answer"]))
            assert len(verdicts) == row["num_steps"]
            assert verdicts[:place] == ["followed"] * place
            assert verdicts[place] == verdict
            unaffected = [later for later in range(place + 1, row["num_steps"]) if place not in used_by(row, later)]
            assert {verdicts[later] for later in unaffected} <= {"followed"}


def used_by(row, step):
    """Every step that a step depends on, at any distance."""
    direct = row["depends_on"][step]
    return set(direct).union(*(used_by(row, earlier) for earlier in direct))


def test_every_missing_step_is_caught():
    for row in generate_dataset("test", 60, SyntheticConfig(num_steps=(1, 4))):
        for place in range(row["num_steps"]):
            steps = row["execution_steps"][:place] + row["execution_steps"][place + 1 :]
            verdicts = check_execution(row["question"], row["plan"], render_steps(steps, row["answer"]))
            assert len(verdicts) == row["num_steps"]
            assert verdicts[:place] == ["followed"] * place
            assert verdicts[place] in ("quantity", "missing")
            assert verdicts[-1] == "missing"


# plan, execution -> verdicts
CASES = [
    (PLAN, EXECUTION, ["followed"] * 3),
    (PLAN, EXECUTION.replace("5 + 3", "3 + 5"), ["followed"] * 3),
    (PLAN, EXECUTION.replace("6 + 8 + 1", "1 + 8 + 6"), ["followed"] * 3),
    (PLAN, EXECUTION.replace("8 - 2 = 6", "2 - 8 = -6"), ["followed", "operands", "operands"]),
    (PLAN, EXECUTION.replace("5 + 3 = 8", "5 + 3 = 9"), ["arithmetic", "operands", "operands"]),
    (PLAN, "Mia = 5 + 3 = 9\nBen = 9 - 2 = 7\nZoe = 7 + 9 + 1 = 17", ["arithmetic", "followed", "followed"]),
    (PLAN, EXECUTION.replace("6 + 8 + 1", "6 + 9"), ["followed", "followed", "operands"]),
    (PLAN, EXECUTION.replace("6 + 8 + 1 = 15", "6 + 8 - 1 = 13"), ["followed", "followed", "unreadable"]),
    (PLAN, "Mia = 5 + 3 = 8\n#### 8", ["followed", "missing", "missing"]),
    (PLAN, "", ["missing"] * 3),
    ("Mia = Tom + 3", EXECUTION, ["followed", "extra", "extra"]),
    ("", EXECUTION, ["extra"] * 3),
    ("", "#### 15", []),
    ("Mia = Tom + 3\nMia", EXECUTION, ["followed", "unreadable plan", "extra"]),
    ("Mia = Tom + 3\nBen = Leo - 2", EXECUTION, ["followed", "undefined", "extra"]),
    ("Mia = Tom + 3\nBen = Mia * 2 + 1", EXECUTION, ["followed", "unreadable plan", "extra"]),
    ("Mia = Tom * 3", "Mia = 5 * 3 = 15", ["followed"]),
    (f"\n{PLAN}\n\n", f"{EXECUTION}\n", ["followed"] * 3),
]


@pytest.mark.parametrize("plan, execution, verdicts", CASES)
def test_verdicts_are_those_given_by_hand(plan, execution, verdicts):
    assert check_execution(QUESTION, plan, execution) == verdicts
    assert set(verdicts) <= VERDICTS.keys()


def test_given_values_are_those_that_the_question_gives_outright():
    assert given_values(QUESTION) == {"Tom": 5, "Ann": 1}
    for row in generate_dataset("test", 200, SyntheticConfig(num_distractors=(0, 2))):
        given = given_values(row["question"])
        computed = {step.split(" = ")[0] for step in row["plan_steps"]}
        named = {name for step in row["plan_steps"] for name in re.findall("[A-Za-z]+", step)}
        assert named - computed <= given.keys()
        assert not computed & given.keys()


@pytest.mark.parametrize(
    "line", ["", "Mia", "Mia = ", "Mia = Tom", "Mia = Tom + ", "Mia = Tom + 3 - 2", "3 = Tom + 1"]
)
def test_what_is_no_step_is_not_read(line):
    assert parse_plan_step(line) is None
    assert parse_execution_step(f"{line} = 8") is None
    with pytest.raises(ValueError, match="`plan` must have lines such as"):
        parse_plan(line)


def test_a_quantity_without_a_value_is_refused():
    with pytest.raises(ValueError, match="must name quantities among Tom, Ann, but got 'Mia = Leo"):
        carry_out(parse_plan("Mia = Leo + 3"), given_values(QUESTION))
