"""The problems that plans are written for are those of the dataset, none left out."""

import json
import os

import datasets
import pytest

from hierbd3lm.data.gsm8k.problems import load_gsm8k, load_gsm8k_rows
from hierbd3lm.data.plans.problems import load_problems
from hierbd3lm.data.synthetic.config import SyntheticConfig
from hierbd3lm.data.synthetic.problems import generate_problems

SOLUTION = "Tom has 2*3=<<2*3=6>>6 pens.\n#### 6"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_file_of_questions_and_executions_is_read(tmp_path):
    rows = list(generate_problems("test", 30, SyntheticConfig()))
    path = write_lines(tmp_path / "rows.jsonl", [{key: row[key] for key in ("question", "execution")} for row in rows])
    problems = load_problems(path, split="test")
    assert [problem.index for problem in problems] == list(range(30))
    for problem, row in zip(problems, rows, strict=True):
        assert (problem.question, problem.solution, problem.answer) == (
            row["question"],
            row["execution"],
            row["answer"],
        )
        assert problem.execution_steps == row["execution_steps"]
        assert len(problem.rule_plan_steps) == row["num_steps"]
    assert load_problems(path, num_examples=7) == problems[:7]


def test_dataset_saved_without_splits_and_formats_of_fine_tuning_are_read(tmp_path):
    expected = [
        (problem.question, problem.solution)
        for problem in load_problems(
            write_lines(tmp_path / "a.jsonl", [{"question": "2 * 3?", "execution": SOLUTION}])
        )
    ]
    messages = [{"role": "user", "content": "2 * 3?"}, {"role": "assistant", "content": SOLUTION}]
    for name, row in (("pair", {"prompt": "2 * 3?", "completion": SOLUTION}), ("chat", {"messages": messages})):
        datasets.Dataset.from_list([row]).save_to_disk(tmp_path / name)
        problems = load_problems(str(tmp_path / name))
        assert [(problem.question, problem.solution) for problem in problems] == expected


def test_marks_are_in_the_solution_and_not_in_its_steps(tmp_path):
    (problem,) = load_problems(write_lines(tmp_path / "a.jsonl", [{"question": "2 * 3?", "execution": SOLUTION}]))
    assert problem.solution == SOLUTION
    assert problem.execution_steps == ["Tom has 2*3=6 pens."]
    assert (set(problem.stated), set(problem.computed)) == ({2, 3}, {6})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "2 * 3?", "execution": "6"}, "row 1: `text` must end with '#### '"),
        ({"question": "2 * 3?", "execution": "#### 6"}, "row 1: the solution must have at least one step"),
        ({"question": "", "execution": SOLUTION}, r"in every row, but \['question'\] is missing"),
        ({"question": "2 * 3?", "execution": None}, r"in every row, but \['execution'\] is missing"),
    ],
)
def test_row_that_is_no_solved_problem_is_refused(tmp_path, row, message):
    path = write_lines(tmp_path / "a.jsonl", [{"question": "2 * 3?", "execution": SOLUTION}, row])
    with pytest.raises(ValueError, match=message):
        load_problems(path)


def test_number_of_examples_below_one_is_refused():
    with pytest.raises(ValueError, match="`num_examples` must be at least 1, but got 0"):
        load_problems("gsm8k", num_examples=0)


@pytest.mark.skipif("GSM8K_DIR" not in os.environ, reason="GSM8K_DIR must name a folder with GSM8K's test.jsonl")
def test_gsm8k_is_read_with_its_solutions_and_the_plans_by_rule():
    problems, rows, raw = load_problems("gsm8k", "test"), load_gsm8k("test"), load_gsm8k_rows("test")
    assert len(problems) == len(rows) == 1319
    for problem, row, solution in zip(problems, rows, raw["answer"], strict=True):
        assert problem.solution == solution
        assert (problem.question, problem.answer) == (row["question"], row["answer"])
        assert problem.execution_steps == row["execution_steps"]
        assert problem.rule_plan_steps == row["plan_steps"]
