"""Rows of other formats become question, plan and execution."""

import json

import datasets
import pytest
from datasets import Dataset

from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.formats import find_parser
from hierbd3lm.data.loading import load_reasoning_dataset
from hierbd3lm.data.splits import load_split


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text} | fields


SYSTEM = {"role": "system", "content": "Be brief."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "3?"}]}
EXAMPLES = {
    "texts": ({"prompt": "2 + 3?", "completion": "5"}, ("2 + 3?", "", "5")),
    "texts and a plan": ({"prompt": "2 + 3?", "completion": "5", "plan": "Add."}, ("2 + 3?", "Add.", "5")),
    "lists": ({"prompt": [user("2 + 3?")], "completion": [assistant("5")]}, ("2 + 3?", "", "5")),
    "messages": ({"messages": [user("2 + 3?"), assistant("5")]}, ("2 + 3?", "", "5")),
    "system": ({"messages": [SYSTEM, user("2 + 3?"), assistant("5")]}, ("Be brief.\n\n2 + 3?", "", "5")),
    "reasoning": ({"messages": [user("a"), assistant("5", reasoning_content="Add.")]}, ("a", "Add.", "5")),
    "thinking": ({"messages": [user("a"), assistant("5", thinking="Add.")]}, ("a", "Add.", "5")),
}


@pytest.mark.parametrize(("row", "segments"), EXAMPLES.values(), ids=EXAMPLES)
def test_formats_of_supervised_fine_tuning_need_no_parser(tmp_path, row, segments):
    expected = dict(zip(("question", "plan", "execution"), segments, strict=True))
    assert load_reasoning_dataset(write_lines(tmp_path / "rows.jsonl", row, row)).to_list() == [expected] * 2
    Dataset.from_list([row | {"answer": "5"}]).save_to_disk(tmp_path / "saved")
    assert load_reasoning_dataset(tmp_path / "saved").to_list() == [expected | {"answer": "5"}]


def test_messages_of_mixed_contents_and_messages_as_json_are_read(tmp_path):
    rows = [{"messages": [user("a"), assistant("b")]}, {"messages": [PARTS, assistant("5")]}]
    expected = [("a", "", "b"), ("2 + 3?", "", "5")]
    for turned in (rows, [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows]):
        dataset = load_reasoning_dataset(write_lines(tmp_path / f"{len(turned[0])}.jsonl", *turned))
        assert [tuple(row.values()) for row in dataset] == expected
    path = write_lines(tmp_path / "rows.jsonl", *({"messages": json.dumps(row["messages"])} for row in rows))
    assert [tuple(row.values()) for row in load_reasoning_dataset(path)] == expected
    row = {"prompt": "[{'no': JSON", "completion": "[1]"}
    dataset = load_reasoning_dataset(write_lines(tmp_path / "texts.jsonl", row))
    assert (dataset["question"][0], dataset["execution"][0]) == tuple(row.values())


def test_plan_that_only_some_messages_have_is_empty_elsewhere(tmp_path):
    rows = [{"messages": [user("a"), assistant("b", **plan)]} for plan in ({}, {"thinking": "c"})]
    assert load_reasoning_dataset(write_lines(tmp_path / "rows.jsonl", *rows))["plan"][:] == ["", "c"]


CONVERSATIONS = {
    "no answer": [user("a")],
    "two turns": [user("a"), assistant("b"), user("c"), assistant("d")],
    "tools": [user("a"), {"role": "tool", "content": "b"}, assistant("c")],
    "nothing": [],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_other_conversations_are_refused_with_their_row(tmp_path, messages):
    rows = [{"messages": [user("a"), assistant("b")]}, {"messages": messages}]
    with pytest.raises(ValueError, match=r"row 1 of .*: `messages` must be of user and assistant"):
        load_reasoning_dataset(write_lines(tmp_path / "rows.jsonl", *rows))


@pytest.mark.parametrize("content", [None, [{"type": "image"}]])
def test_content_that_is_no_text_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"row 0 of .*: `content` of a message must be a text"):
        load_reasoning_dataset(write_lines(tmp_path / "rows.jsonl", {"messages": [user(content), assistant("b")]}))


def test_own_columns_are_not_taken_for_another_format(tmp_path):
    row = {"question": "a", "plan": "b", "execution": "c", "messages": []}
    assert load_reasoning_dataset(write_lines(tmp_path / "rows.jsonl", row))["question"][:] == ["a"]


# Functions of users


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_format.py").write_text(
        "def parse(row):\n    return {'question': row['q'], 'plan': None, 'execution': row['a'], 'answer': row['a']}\n"
        "def fail(row):\n    return {'question': row['absent']}\n"
        "def wrong(row):\n    return row['q']\n"
        "number = 5\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    return write_lines(tmp_path / "rows.jsonl", {"q": "2 + 3?", "a": "5"}, {"q": "1 + 1?", "a": "2"})


def test_function_of_the_working_directory_parses_rows(module):
    args = DataArguments(dataset=module, parse_example="my_format:parse", num_validation_examples=1)
    expected = {"question": "2 + 3?", "plan": None, "execution": "5", "answer": "5"}
    assert load_split(args, "train").to_list() == [expected]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_format", "must have the form 'module:function', but got 'my_format'"),
        ("no_such_module:parse", "must name a module, but got 'no_such_module:parse'"),
        ("my_format:prase", "must name a function of the module my_format, but got 'my_format:prase'"),
        ("my_format:number", "must name a function of the module my_format"),
    ],
)
def test_function_that_is_not_there_is_refused(module, target, message):
    with pytest.raises(ValueError, match=f"`parse_example` {message}"):
        find_parser(target)


@pytest.mark.parametrize(("name", "message"), [("fail", "failed: KeyError"), ("wrong", "must return a dict, but got")])
def test_failing_function_is_refused_with_the_row(module, name, message):
    with pytest.raises(ValueError, match=rf"row 0 of .*: `parse_example` {message}"):
        load_reasoning_dataset(module, parse_example=find_parser(f"my_format:{name}"))


def test_parser_may_return_none_first_and_texts_later(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", *({"n": n} for n in range(3000)))
    dataset = load_reasoning_dataset(
        path,
        parse_example=lambda row: {"question": "a", "plan": "late" if row["n"] > 2000 else None, "execution": "b"},
    )
    assert dataset["plan"][:] == [None] * 2001 + ["late"] * 999
