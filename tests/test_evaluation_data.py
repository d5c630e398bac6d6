"""What is evaluated: which rows of which dataset, against which answers."""

import json

import datasets
import pytest
from datasets import Dataset, DatasetDict

from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.tokenization import train_tokenizer
from hierbd3lm.evaluation import prompts
from hierbd3lm.evaluation.arguments import CheckpointArguments
from hierbd3lm.evaluation.checkpoints import find_data, load_examples
from hierbd3lm.evaluation.prompts import read_problems

from .tiny_tokenizer import make_config_for, make_tokenizer

ROWS = [{"question": f"{i} + 1?", "plan": "Add.", "execution": f"#### {i + 1}"} for i in range(8)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# The dataset


@pytest.fixture
def load(tmp_path):
    """Load what a checkpoint is evaluated on; what it was trained on is given by the fields."""

    def load(trained_on=None, **arguments):
        (tmp_path / "model").mkdir(exist_ok=True)
        (trained_on or DataArguments()).save(tmp_path / "model")
        return load_examples(CheckpointArguments(model=str(tmp_path / "model"), device="cpu", **arguments))[
            1
        ].to_list()

    return load


def test_dataset_saved_without_splits_is_a_test_split_like_a_file(load, tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert load(dataset=str(tmp_path / "saved")) == ROWS
    trained_on = DataArguments(dataset=str(tmp_path / "saved"), num_validation_examples=3)
    assert load(trained_on, split="validation") == ROWS[-3:]
    with pytest.raises(ValueError, match=r"`split` must be train or validation for .*saved"):
        load(trained_on)


def test_folder_with_a_train_split_alone_is_evaluated_whole(load, tmp_path):
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for folder in ("saved", "files"):
        assert load(dataset=str(tmp_path / folder), split="train") == ROWS


def test_another_split_than_those_of_a_folder_is_refused_with_their_names(load, tmp_path):
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"`split` must be one of train for .*saved, but got 'test'"):
        load(dataset=str(tmp_path / "saved"))


def test_configuration_of_the_dataset_can_be_given(load, tmp_path, monkeypatch):
    monkeypatch.setenv("GSM8K_DIR", str(tmp_path))
    for name, answer in (("test", "2*3=<<2*3=6>>6 pens.\n"), ("test_socratic", "How many? ** 2*3=<<2*3=6>>6 pens.\n")):
        row = {"question": "2 * 3 pens?", "answer": f"{answer}#### 6"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    trained_on = DataArguments(dataset="openai/gsm8k", dataset_name="socratic")
    assert load(trained_on)[0]["plan"] == "How many?"
    for arguments in (
        {"dataset_name": "main"},
        {"dataset": "gsm8k"},
        {"dataset": "openai/gsm8k", "dataset_name": "main"},
    ):
        assert load(trained_on, **arguments)[0]["plan"] == "1. Pens: 2 * 3"
    assert load(dataset="gsm8k", dataset_name="socratic")[0]["plan"] == "How many?"


def test_configuration_of_a_published_set_of_texts_can_be_given(tmp_path):
    for name in (None, "wikitext-2-raw-v1"):
        args = CheckpointArguments(model=str(tmp_path), device="cpu", dataset="wikitext", dataset_name=name)
        assert find_data(args).dataset_name == (name or "wikitext-103-raw-v1")


def test_another_dataset_may_have_another_format(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "format_of_mine.py").write_text(
        "def parse(row):\n    return {'question': row['q'], 'plan': '', 'execution': '', 'answer': row['a']}\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"q": "1 + 1?", "a": 2}\n')
    rows = load(dataset=str(tmp_path / "rows.jsonl"), parse_example="format_of_mine:parse")
    assert rows == [{"question": "1 + 1?", "plan": "", "execution": "", "answer": 2}]


# The answers


def read(rows):
    tokenizer = make_tokenizer()
    return read_problems(Dataset.from_list(rows), tokenizer, make_config_for(tokenizer), plans_are_given=False)


ANSWERS = {
    "text": ("007", "007"),
    "number": (12, "12"),
    "float": (12.0, "12"),
    "fraction": (0.5, "0.5"),
    "thousands": ("$1,000.", "1000"),
    "solution": ("so 2 + 3 = 5\n#### 5", "5"),
    "none": (None, "8"),
}


@pytest.mark.parametrize(("answer", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_column_of_answers_is_the_reference(answer, expected):
    assert read([ROWS[7] | {"answer": answer}])[0].reference_answer == expected
    if answer is not None:
        assert read([{"question": "a", "answer": answer}])[0].reference_answer == expected


def test_answers_that_differ_from_the_execution_are_counted(monkeypatch):
    messages = []
    monkeypatch.setattr(prompts.logger, "warning", messages.append)
    executions = ["#### 1", "#### 1.0", "a #### 1\n#### 2", "no answer", "", "#### one"]
    read([{"question": "a", "execution": execution, "answer": "1"} for execution in executions])
    assert [message[:84] for message in messages] == [
        "`answer` differs from the answer of `execution` in 2 of 6 rows, the first is row 2: "
    ]


def test_questions_with_unknown_words_are_counted(monkeypatch):
    messages = []
    monkeypatch.setattr(prompts.logger, "warning", messages.append)
    tokenizer = train_tokenizer(["a b"])
    rows = Dataset.from_list([{"question": question, "answer": "1"} for question in ("a b", "a zebra gnu", "zebra")])
    read_problems(rows, tokenizer, make_config_for(tokenizer), plans_are_given=False, num_samples=2)
    assert messages == ["2 of 3 questions have text that the tokenizer has no token for"]


@pytest.mark.parametrize("row", [{"answer": " "}, {"answer": None, "execution": "5"}, {"answer": None}])
def test_row_without_an_answer_raises(row):
    with pytest.raises(ValueError, match="row 1: `text` must end with '#### '"):
        read([{"question": "a", "execution": "", "answer": "1"}, {"question": "a", "execution": ""} | row])
