"""Nothing that training reads is a question of GSM8K's test split, in its own words or nearly so.

Likeness is measured here without the code that leaves near-duplicates out: the Jaccard index of the sets of runs of
three words, in lower case, numbers as `#` and all else than letters as a space, by products of sparse matrices.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.gsm8k import problems as gsm8k
from hierbd3lm.data.splits import load_counted_split, training_splits

pytestmark = pytest.mark.skipif(
    "GSM8K_DIR" not in os.environ, reason="GSM8K_DIR must name a folder with GSM8K's train.jsonl and test.jsonl"
)

NEAR = 0.5
# What was found in the official split: four problems of it with other numbers and names, and what comes next.
HIGHEST_OFFICIAL = [0.840, 0.840, 0.683, 0.511, 0.439, 0.364]
NUM_TEST, NUM_TRAIN = 1319, 7473


@pytest.fixture(scope="module")
def test_questions():
    return published("test")


@pytest.fixture(scope="module")
def read_by_training():
    """The questions of each split that training reads, and what was left out of it.

    The plans take most of the time of loading and are no part of the claim.
    """
    args = DataArguments(dataset="openai/gsm8k", num_synthetic_examples=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gsm8k, "steps_from_solution", lambda question, solution: ([], []))
        splits = {name: load_counted_split(args, name) for name in (*training_splits(args), "validation")}
    return {name: (dataset["question"][:], counts) for name, (dataset, counts) in splits.items()}


def published(split):
    path = Path(os.environ["GSM8K_DIR"], f"{split}.jsonl")
    return [json.loads(line)["question"] for line in path.read_text(encoding="utf-8").splitlines()]


def plain(text):
    text = re.sub(r"[0-9]+([,.][0-9]+)*", " # ", text.lower())
    return " ".join("".join(c if c.isalpha() or c == "#" else " " for c in text).split())


def runs_of_three(text):
    words = plain(text).split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def likeness(questions, references):
    """The highest Jaccard index of each question with a reference, `(questions,)`."""
    rows = [runs_of_three(text) for text in [*questions, *references]]
    columns = {run: number for number, run in enumerate(sorted(set().union(*rows)))}
    entries = [(row, columns[run]) for row, runs in enumerate(rows) for run in runs]
    incidence = csr_matrix((np.ones(len(entries)), np.array(entries).T), shape=(len(rows), len(columns)))
    sizes = incidence.sum(axis=1).A1
    shared = (incidence[: len(questions)] @ incidence[len(questions) :].T).tocoo()
    index = shared.data / (sizes[shared.row] + sizes[len(questions) + shared.col] - shared.data)
    highest = np.zeros(len(questions))
    np.maximum.at(highest, shared.row, index)
    return highest


def test_the_splits_are_those_that_were_published(read_by_training, test_questions):
    assert (len(test_questions), len(set(test_questions))) == (NUM_TEST, NUM_TEST)
    questions = {name: texts for name, (texts, _) in read_by_training.items()}
    counts = [counts.get("num_near_test", 0) for _, counts in read_by_training.values()]
    assert len(questions["train"]) + len(questions["validation"]) + sum(counts) == NUM_TRAIN == len(published("train"))
    assert set(questions["train"] + questions["validation"]) < set(published("train"))
    assert len(questions["synthetic"]) == 1000


def test_no_test_question_is_read_by_training(read_by_training, test_questions):
    held_out = set(map(plain, test_questions))
    for name, (questions, _) in read_by_training.items():
        assert not held_out & set(map(plain, questions)), name


def test_no_near_duplicate_of_a_test_question_is_read_by_training(read_by_training, test_questions):
    highest = {name: likeness(texts, test_questions).max() for name, (texts, _) in read_by_training.items()}
    assert max(highest.values()) < NEAR, highest
    assert highest["train"] == pytest.approx(HIGHEST_OFFICIAL[4], abs=1e-3)


def test_the_near_duplicates_of_the_official_split_are_left_out_and_counted(read_by_training, test_questions):
    official = published("train")
    found = likeness(official, test_questions)
    assert sorted(found, reverse=True)[:6] == pytest.approx(HIGHEST_OFFICIAL, abs=1e-3)
    near = {question for question, value in zip(official, found, strict=True) if value >= NEAR}
    left = {question for name in ("train", "validation") for question in read_by_training[name][0]}
    assert set(official) - left == near
    assert {name: counts for name, (_, counts) in read_by_training.items()} == {
        "train": {"num_near_test": 4},
        "synthetic": {},
        "validation": {"num_near_test": 0},
    }


def test_the_measure_finds_a_test_question_in_disguise(test_questions):
    disguised = [re.sub(r"[0-9]+", "77", question.upper()).replace(" ", "\n") for question in test_questions[:50]]
    assert likeness(disguised, test_questions) == pytest.approx(1)
