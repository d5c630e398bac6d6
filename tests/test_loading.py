"""Loading and encoding of datasets that are written to a temporary folder."""

import json
import logging

import datasets
import pytest
from datasets import Dataset, DatasetDict

from hierbd3lm.data import loading
from hierbd3lm.data.collator import HierarchicalDataCollator, encode_example
from hierbd3lm.data.loading import load_reasoning_dataset, prepare_dataset
from hierbd3lm.data.tokenization import train_tokenizer

from .tiny_tokenizer import make_config_for, make_tokenizer

ROWS = [
    {"question": "2 + 3?", "plan": "", "execution": "5\n#### 5", "answer": "5"},
    {"question": "4 - 1?", "plan": "Subtract.", "execution": "3\n#### 3", "answer": "3"},
    {"question": "2 * 2 * 2?", "plan": "Twice.\nTwice.", "execution": "4\n8\n#### 8", "answer": "8"},
]
SOLUTION = "Tom has 2*3=<<2*3=6>>6 pens.\n#### 6"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def config(tokenizer):
    return make_config_for(tokenizer)


def write_json(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_json_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save(path, dataset):
    dataset.save_to_disk(path)
    return path


SOURCES = {
    "json": lambda folder: write_json(folder / "rows.json", ROWS),
    "json lines": lambda folder: write_json_lines(folder / "rows.jsonl", ROWS),
    "saved dataset": lambda folder: save(folder / "saved", Dataset.from_list(ROWS)),
    "saved splits": lambda folder: save(folder / "saved", DatasetDict({"train": Dataset.from_list(ROWS)})),
    "folder of files": lambda folder: write_json_lines(folder / "data" / "train.jsonl", ROWS).parent,
}


@pytest.mark.parametrize("write", SOURCES.values(), ids=SOURCES.keys())
@pytest.mark.parametrize("as_text", [False, True], ids=["path", "text"])
def test_every_source_gives_the_same_rows(tmp_path, write, as_text):
    path = write(tmp_path)
    assert load_reasoning_dataset(str(path) if as_text else path).to_list() == ROWS


def test_split_is_chosen(tmp_path):
    path = save(tmp_path / "saved", DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])))
    assert len(load_reasoning_dataset(path, split="test")) == 1
    write_json_lines(tmp_path / "data" / "train.jsonl", ROWS)
    write_json_lines(tmp_path / "data" / "test.jsonl", ROWS[:2])
    assert len(load_reasoning_dataset(tmp_path / "data", split="test")) == 2
    assert len(load_reasoning_dataset(tmp_path / "data", split="train[:1]")) == 1


def test_split_that_must_be_chosen_raises(tmp_path):
    path = save(tmp_path / "saved", DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])))
    for split in (None, "validation"):
        with pytest.raises(ValueError, match="`split` must be one of train, test"):
            load_reasoning_dataset(path, split=split)


def test_split_of_a_dataset_without_splits_raises(tmp_path):
    path = save(tmp_path / "saved", Dataset.from_list(ROWS))
    with pytest.raises(ValueError, match=r"`split` must be None or 'train', the only split of .* got 'test'"):
        load_reasoning_dataset(path, split="test")
    for name in (path, write_json_lines(tmp_path / "rows.jsonl", ROWS)):
        assert load_reasoning_dataset(name, split="train").to_list() == ROWS
    with pytest.raises(ValueError, match=r"`split` must be None or 'train', the only split of .* got 'test'"):
        load_reasoning_dataset(tmp_path / "rows.jsonl", split="test")


def test_name_of_a_file_raises(tmp_path):
    with pytest.raises(ValueError, match=r"`name` must be None .* got 'main'"):
        load_reasoning_dataset(write_json(tmp_path / "rows.json", ROWS), name="main")


def test_streaming_raises(tmp_path):
    write_json_lines(tmp_path / "data" / "train.jsonl", ROWS)
    with pytest.raises(ValueError, match="`streaming` is not supported"):
        load_reasoning_dataset(tmp_path / "data", split="train", streaming=True)


@pytest.mark.parametrize("name", ["no_such.jsonl", "no_such.json"])
def test_missing_file_raises(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no_such"):
        load_reasoning_dataset(tmp_path / name)


def test_file_of_another_kind_raises(tmp_path):
    (tmp_path / "rows.xml").write_text("2 + 3?", encoding="utf-8")
    with pytest.raises(ValueError, match=r"must be a \.json, \.jsonl, \.csv, \.txt, \.parquet file"):
        load_reasoning_dataset(tmp_path / "rows.xml")


def test_missing_columns_are_named(tmp_path):
    path = write_json(tmp_path / "rows.json", [{"question": "2 + 3?", "solution": "5"}])
    with pytest.raises(ValueError, match="lacks plan, execution among question, solution; `parse_example`"):
        load_reasoning_dataset(path)


def parse_pair(row):
    return {"question": row["problem"], "plan": "", "execution": f"{row['result']}\n#### {row['result']}"}


def test_parse_example_makes_the_columns_and_no_others(tmp_path):
    path = write_json_lines(tmp_path / "rows.jsonl", [{"problem": "2 + 3?", "result": 5, "id": 1}])
    dataset = load_reasoning_dataset(path, parse_example=parse_pair)
    assert dataset.to_list() == [{"question": "2 + 3?", "plan": "", "execution": "5\n#### 5"}]


PARSED_PLAN = "first"


def parse_with_global(row):
    return parse_pair(row) | {"plan": PARSED_PLAN}


def test_changed_parser_is_not_read_from_a_cache(tmp_path, monkeypatch):
    path = write_json_lines(tmp_path / "rows.jsonl", [{"problem": "2 + 3?", "result": 5}])
    assert load_reasoning_dataset(path, parse_example=parse_with_global)["plan"][0] == "first"
    monkeypatch.setitem(parse_with_global.__globals__, "PARSED_PLAN", "second")
    assert load_reasoning_dataset(path, parse_example=parse_with_global)["plan"][0] == "second"


def test_incomplete_parser_raises(tmp_path):
    path = write_json(tmp_path / "rows.json", ROWS)
    with pytest.raises(ValueError, match="lacks execution among question, plan"):
        load_reasoning_dataset(path, parse_example=lambda row: {"question": row["question"], "plan": row["plan"]})


def test_text_alone_is_loaded_when_asked_for(tmp_path):
    path = write_json(tmp_path / "rows.json", [{"text": "abcdefgh"}])
    assert load_reasoning_dataset(path, auto_split=True).column_names == ["text"]
    with pytest.raises(ValueError, match="lacks question, plan, execution"):
        load_reasoning_dataset(path)


@pytest.mark.parametrize("hub_id", ["gsm8k", "openai/gsm8k"])
def test_gsm8k_is_read_with_its_plans(tmp_path, monkeypatch, hub_id):
    monkeypatch.setenv("GSM8K_DIR", str(tmp_path))
    write_json_lines(tmp_path / "train.jsonl", [{"question": "2 * 3 pens?", "answer": SOLUTION}])
    write_json_lines(
        tmp_path / "train_socratic.jsonl", [{"question": "2 * 3 pens?", "answer": f"How many? ** {SOLUTION}"}]
    )
    assert load_reasoning_dataset(hub_id, "train")["plan"][0] == "1. Tom has pens: 2 * 3"
    assert load_reasoning_dataset(hub_id, "train", "socratic")["plan"][0] == "How many?"
    assert "<<" in load_reasoning_dataset(hub_id, "train", keep_calculator=True)["execution"][0]


def test_gsm8k_takes_a_parser_of_its_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("GSM8K_DIR", str(tmp_path))
    write_json_lines(tmp_path / "train.jsonl", [{"question": "2 * 3 pens?", "answer": SOLUTION}])
    dataset = load_reasoning_dataset(
        "openai/gsm8k",
        "train",
        parse_example=lambda row: {"question": row["question"], "plan": "Think.", "execution": row["answer"]},
    )
    assert dataset.to_list() == [{"question": "2 * 3 pens?", "plan": "Think.", "execution": SOLUTION}]


def test_prepared_columns_are_the_encoded_texts(tokenizer, config):
    prepared, report = prepare_dataset(Dataset.from_list(ROWS), tokenizer, config)
    assert set(prepared.column_names) == {"question_ids", "plan_ids", "execution_ids", "length", "answer"}
    for row, encoded in zip(ROWS, prepared, strict=True):
        assert {key: encoded[key] for key in encode_example(row, tokenizer)} == encode_example(row, tokenizer)
        assert encoded["answer"] == row["answer"]
    nothing = {"question": 0, "plan": 0, "execution": 0}
    assert report == {
        "num_examples": 3,
        "num_kept": 3,
        "num_dropped": 0,
        "dropped_by_segment": nothing,
        "num_with_special_tokens": 0,
        "num_unknown_tokens": 0,
    }


def test_length_is_the_tokens_in_a_batch(tokenizer, config):
    prepared, _ = prepare_dataset(Dataset.from_list(ROWS), tokenizer, config)
    batch = HierarchicalDataCollator(config)(prepared.to_list())
    assert prepared["length"][:] == (batch["segment_ids"] >= 0).sum(dim=1).tolist()


def test_texts_are_kept_when_asked_for(tokenizer, config):
    prepared, _ = prepare_dataset(Dataset.from_list(ROWS), tokenizer, config, keep_text=True)
    assert prepared.select_columns(list(ROWS[0])).to_list() == ROWS


SPECIAL = {"question": "<|plan|>", "plan": "<|mask|>", "execution": "<|execution|>"}
LONG = {
    "question": ROWS[0] | {"question": "x" * 17},
    "plan": ROWS[0] | {"plan": "x" * 23},
    "execution": ROWS[0] | {"execution": "x" * 23},
}


def test_over_long_examples_are_dropped_and_counted(tokenizer, config):
    both = LONG["question"] | {"plan": "x" * 99}
    rows = [LONG["question"], ROWS[0], LONG["plan"], both, ROWS[1], LONG["execution"], LONG["execution"]]
    prepared, report = prepare_dataset(Dataset.from_list(rows), tokenizer, config)
    assert prepared["answer"][:] == [ROWS[0]["answer"], ROWS[1]["answer"]]
    assert tokenizer.batch_decode(prepared["question_ids"][:]) == [ROWS[0]["question"], ROWS[1]["question"]]
    assert report == {
        "num_examples": 7,
        "num_kept": 2,
        "num_dropped": 5,
        "dropped_by_segment": {"question": 2, "plan": 2, "execution": 2},
        "num_with_special_tokens": 0,
        "num_unknown_tokens": 0,
    }


def test_example_at_its_limits_is_kept(tokenizer, config):
    row = {"question": "x" * config.question_len, "plan": "x" * (config.plan_len - 2), "execution": "x" * 22}
    prepared, report = prepare_dataset(Dataset.from_list([row]), tokenizer, config)
    assert report["num_dropped"] == 0
    assert prepared["length"][0] == config.sequence_len


@pytest.mark.parametrize("segment", LONG)
def test_over_long_example_raises_by_choice(tokenizer, config, segment):
    dataset = Dataset.from_list([ROWS[0], LONG[segment]])
    limit = getattr(config, f"{segment}_len")
    with pytest.raises(ValueError, match=rf"row 1: `{segment}` must have at most {segment}_len={limit}"):
        prepare_dataset(dataset, tokenizer, config, over_long="raise")


def test_dropping_everything_leaves_an_empty_dataset(tokenizer, config):
    prepared, report = prepare_dataset(Dataset.from_list([LONG["plan"]] * 2), tokenizer, config)
    assert len(prepared) == report["num_kept"] == 0
    assert report["num_dropped"] == 2


def test_empty_plans_in_every_row_have_the_type_of_ids(tokenizer, config):
    prepared, _ = prepare_dataset(Dataset.from_list(ROWS[:1] * 2), tokenizer, config)
    assert prepared.features["plan_ids"] == prepared.features["question_ids"]


def test_empty_dataset_raises(tokenizer, config):
    with pytest.raises(ValueError, match="`dataset` must have at least one example"):
        prepare_dataset(Dataset.from_list(ROWS).select([]), tokenizer, config)


@pytest.mark.parametrize("name", ["over_long", "special_tokens"])
def test_unknown_choice_raises(tokenizer, config, name):
    with pytest.raises(ValueError, match=f"`{name}` must be one of drop, raise, but got 'truncate'"):
        prepare_dataset(Dataset.from_list(ROWS), tokenizer, config, **{name: "truncate"})


def test_special_token_in_a_text_raises_with_its_row(tokenizer, config):
    dataset = Dataset.from_list([*ROWS, ROWS[0] | {"plan": "<|mask|>"}])
    with pytest.raises(ValueError, match="row 3: `plan_ids` must not contain special tokens"):
        prepare_dataset(dataset, tokenizer, config, special_tokens="raise")


def test_examples_with_special_tokens_are_dropped_and_counted(tokenizer, config):
    special = [ROWS[1] | {name: f"a{token}b"} for name, token in zip(SPECIAL, SPECIAL.values(), strict=True)]
    rows = [ROWS[0], *special, LONG["plan"], LONG["plan"] | {"question": "<|end|>"}, ROWS[2]]
    prepared, report = prepare_dataset(Dataset.from_list(rows), tokenizer, config)
    assert prepared["answer"][:] == ["5", "8"]
    assert report["num_with_special_tokens"] == 4 and report["num_dropped"] == 5
    assert report["dropped_by_segment"] == {"question": 0, "plan": 1, "execution": 0}


def test_texts_alone_are_split_when_asked_for(tokenizer, config):
    prepared, _ = prepare_dataset(Dataset.from_list([{"text": "abcdefgh"}]), tokenizer, config, auto_split=True)
    assert [tokenizer.decode(prepared[0][key]) for key in ("question_ids", "plan_ids", "execution_ids")] == [
        "ab",
        "cd",
        "efgh",
    ]


def test_unknown_words_of_kept_examples_are_counted(monkeypatch):
    messages = []
    monkeypatch.setattr(loading.logger, "warning", messages.append)
    tokenizer = train_tokenizer(text for row in ROWS for text in row.values())
    rows = [ROWS[0] | {"question": "2 + 3? zebra zebra", "plan": " Subtract. gnu"}, ROWS[1]]
    rows.append({"question": "zebra", "plan": "1" * 23, "execution": "5"})  # too long
    _, report = prepare_dataset(Dataset.from_list(rows), tokenizer, make_config_for(tokenizer))
    assert report["num_unknown_tokens"] == 4 and report["num_dropped"] == 1
    assert "4 unknown tokens" in messages[0]


def test_dropped_examples_are_warned_of(tokenizer, config, monkeypatch):
    messages = []
    monkeypatch.setattr(loading.logger, "warning", messages.append)
    prepare_dataset(Dataset.from_list([ROWS[0], LONG["plan"]]), tokenizer, config)
    over_long = {"question": 0, "plan": 1, "execution": 0}
    assert messages == [f"Kept 1 of 2 examples; over-long: {over_long}; with special tokens: 0"]


def test_nothing_is_warned_of(tokenizer, config, caplog):
    datasets.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            prepare_dataset(Dataset.from_list(ROWS), tokenizer, config)
    finally:
        datasets.logging.disable_propagation()
    assert caplog.records == []


def test_processes_give_the_same_dataset(tokenizer, config):
    dataset = Dataset.from_list([*ROWS, LONG["plan"], *ROWS])
    alone, report = prepare_dataset(dataset, tokenizer, config)
    shared, shared_report = prepare_dataset(dataset, tokenizer, config, num_proc=2)
    assert shared.to_list() == alone.to_list()
    assert shared_report == report
