"""Changed plans of GSM8K: the executions are those that Python computes, and nothing else changes."""

import json
import random
import re
from fractions import Fraction

import pytest

from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.gsm8k.counterfactuals import change_solution
from hierbd3lm.data.gsm8k.problems import load_gsm8k_rows, parse_main
from hierbd3lm.data.splits import load_split, load_training_split
from hierbd3lm.data.steps import first_wrong_step

QUESTION = "Natalia sold clips to 48 friends in April, and half as many in May. How many clips did she sell?"
SOLUTION = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "She sold 48+24 = $<<48+24=72>>72 altogether in April and May.\n#### 72"
)


def evaluate_plan(plan):
    """The results of the steps, by Python's own evaluation."""
    results = []
    for line in plan.split("\n"):
        words = re.findall(r"\[\d+\]|[\d.,]+|[-+*/()]", line.rpartition(": ")[2])
        refers = [f"results[{int(word[1:-1]) - 1}]" if word[0] == "[" else word for word in words]
        numbers = [f"Fraction('{word}')" if word[0].isdigit() or word[0] == "." else word for word in refers]
        results.append(eval(" ".join(numbers), {"results": results, "Fraction": Fraction}))
    return results


def draw(question, solution, num_seeds):
    return [change_solution(random.Random(seed), question, solution) for seed in range(num_seeds)]


def test_one_step_of_the_plan_changes_and_all_results_after_it():
    original = parse_main({"question": QUESTION, "answer": SOLUTION})
    drawn = draw(QUESTION, SOLUTION, 80)
    assert len({row["plan"] for row in drawn}) > 30
    for row in drawn:
        pairs = list(zip(original["plan_steps"], row["plan_steps"], strict=True))
        [(before, after)] = [pair for pair in pairs if pair[0] != pair[1]]
        assert before.rpartition(": ")[0] == after.rpartition(": ")[0]
        first, second = evaluate_plan(row["plan"])
        assert (first.denominator, second.denominator, row["answer"]) == (1, 1, str(second)) and row["answer"] != "72"
        assert row["question"] == QUESTION and first_wrong_step(row["execution"]) is None
        pattern = rf"Natalia sold \d+[-+*/]\d+ = {first} clips in May\.\n"
        pattern += rf"She sold \d+[-+*/]{first} = \${second} altogether in April and May\.\n#### {second}"
        assert re.fullmatch(pattern, row["execution"])


@pytest.mark.parametrize(
    "solution",
    [
        "Natalia sold half, 24, in May.\nShe sold 48+24 = <<48+24=72>>72.\n#### 72",  # a line without annotation
        "She sold 48/2 = <<48/2=24>>24 and then 48+24 = <<48+24=72>>72.\n#### 72",  # two in one line
        "She sold 20% of 48 = <<20*.01*48=9.6>>9.6.\n#### 9.6",  # shows another calculation
        "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 25",  # another answer than the last result
        "Natalia sold 48/2 = <<48/2=24>>240 clips.\n#### 24",  # shows another result
        "With 17 friends she sold 17*2 = <<17*2=34>>34 clips.\n#### 34",  # 17 is not in the question
        "#### 24",
    ],
)
def test_what_cannot_be_recomputed_exactly_is_left(solution):
    assert draw(QUESTION, solution, 3) == [None] * 3


def test_a_number_in_the_words_does_not_change():
    solution = "Of 48 clips for 48 friends, she sold 48/2 = <<48/2=24>>24.\n#### 24"
    rows = [row for row in draw(QUESTION, solution, 30) if row is not None]
    assert len(rows) > 20
    for row in rows:
        assert re.match(r"Of 48 clips for 48 friends, she sold 48[-+*/]\d+ = ", row["execution"])


def test_training_examples_of_gsm8k_are_changed_left_and_counted(tmp_path, monkeypatch):
    other = {"question": "Tom has 3 cats. How many?", "answer": "He has three.\n#### 3"}
    rows = [{"question": f"{QUESTION} {name}", "answer": SOLUTION} for name in ("Ann", "Ben", "Eva")] + [other]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    test = {"question": "What is the time in a far away land of sheep and wolves?", "answer": "#### 1"}
    (tmp_path / "test.jsonl").write_text(json.dumps(test) + "\n")
    monkeypatch.setenv("GSM8K_DIR", str(tmp_path))
    args = DataArguments(dataset="gsm8k", counterfactual_plans=1.0, num_validation_examples=0)
    dataset, counts = load_training_split(args, "train")
    assert (counts["num_changed_plans"], counts["num_unchangeable_plans"], counts["num_dropped_plans"]) == (3, 1, 0)
    original = load_split(args, "train")
    assert dataset["plan_is_given"][:] == [True, True, True, False]
    assert [dataset[row]["plan"] != original[row]["plan"] for row in range(4)] == [True, True, True, False]
    assert "<<" not in dataset[0]["execution"] and dataset[0]["answer"] == str(evaluate_plan(dataset[0]["plan"])[-1])


@pytest.mark.slow
def test_every_changed_solution_of_the_training_split_is_right():
    rows, num_changed = load_gsm8k_rows("train"), 0
    for number, row in enumerate(rows):
        changed = change_solution(random.Random(number), row["question"], row["answer"])
        if changed is not None:
            num_changed += 1
            results = evaluate_plan(changed["plan"])
            assert Fraction(changed["answer"]) == results[-1] and first_wrong_step(changed["execution"]) is None
    assert num_changed > 0.4 * len(rows)
