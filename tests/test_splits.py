"""No example is trained on and tested on, whatever the dataset."""

import json

import datasets
import pytest
from datasets import Dataset, DatasetDict
from hierbd3lm.data.splits import FILE_NAME, DataArguments, load_split

SPLITS = ("train", "validation", "test")
SOLUTION = "Tom has 2*3=<<2*3=6>>6 pens.\n#### 6"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_rows(count, prefix=""):
    return [{"question": f"{prefix}{i} + 1?", "plan": "Add.", "execution": f"#### {i + 1}"} for i in range(count)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def file_arguments(tmp_path, count=10, **fields):
    return DataArguments(dataset=write_lines(tmp_path / "rows.jsonl", make_rows(count)), **fields)


# Synthetic problems


def test_synthetic_splits_share_no_problem():
    args = DataArguments(num_train_examples=300, num_validation_examples=100)
    skeletons = {split: set(load_split(args, split, 100)["skeleton"]) for split in ("validation", "test")}
    skeletons["train"] = set(load_split(args, "train")["skeleton"])
    for first, second in [("train", "validation"), ("train", "test"), ("validation", "test")]:
        assert skeletons[first] and not skeletons[first] & skeletons[second]


def test_synthetic_sizes_are_those_of_the_arguments_unless_given():
    args = DataArguments(num_train_examples=30, num_validation_examples=7)
    assert [len(load_split(args, split)) for split in ("train", "validation")] == [30, 7]
    assert [len(load_split(args, split, 5)) for split in (*SPLITS, "ood_longer")] == [5] * 4


def test_synthetic_fields_reach_the_generator():
    args = DataArguments(synthetic='{"num_steps": [2, 2], "seed": 3}')
    assert args.synthetic == {"num_steps": [2, 2], "seed": 3}
    rows = load_split(args, "test", 20)
    assert set(rows["num_steps"]) == {2}
    assert rows["question"] != load_split(DataArguments(synthetic={"num_steps": [2, 2]}), "test", 20)["question"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_synthetic_without_a_number_of_examples_raises(split):
    with pytest.raises(ValueError, match=f"`num_examples` must be given .* {split!r}, but got None"):
        load_split(DataArguments(), split)


# Files, folders and their splits


def test_validation_is_held_out_of_the_end_of_training(tmp_path):
    args = file_arguments(tmp_path, count=10, num_validation_examples=3)
    train, validation = load_split(args, "train").to_list(), load_split(args, "validation").to_list()
    assert train + validation == make_rows(10)
    assert len(validation) == 3


def test_fewer_training_examples_leave_the_validation_as_it_is(tmp_path):
    args = file_arguments(tmp_path, count=10, num_validation_examples=3, num_train_examples=4)
    assert load_split(args, "train").to_list() == make_rows(10)[:4]
    assert load_split(args, "validation").to_list() == make_rows(10)[7:]
    assert load_split(args, "validation", 2).to_list() == make_rows(10)[7:9]
    assert load_split(args, "train", 100).to_list() == make_rows(10)[:7]


def test_file_is_one_split_and_all_of_it_is_test(tmp_path):
    args = file_arguments(tmp_path, count=4)
    assert load_split(args, "test").to_list() == make_rows(4)
    assert load_split(args, "test", 3).to_list() == make_rows(3)


def test_json_list_is_read_like_json_lines(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(make_rows(4)))
    assert load_split(DataArguments(dataset=str(tmp_path / "rows.json")), "test").to_list() == make_rows(4)


def test_own_validation_split_is_read_and_nothing_is_held_out(tmp_path):
    parts = {"train": make_rows(5, "a"), "dev": make_rows(4, "b"), "test": make_rows(3, "c")}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(tmp_path / "saved")
    args = DataArguments(dataset=str(tmp_path / "saved"), dataset_validation_split="dev", num_validation_examples=2)
    assert load_split(args, "train").to_list() == parts["train"]
    assert load_split(args, "validation").to_list() == parts["dev"][:2]
    assert load_split(args, "test").to_list() == parts["test"]


def test_more_held_out_than_there_is_raises(tmp_path):
    args = file_arguments(tmp_path, count=10, num_validation_examples=10)
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match="`num_validation_examples` must be less than the 10 training examples"):
            load_split(args, split)


def test_unknown_split_raises(tmp_path):
    with pytest.raises(ValueError, match=r"`split` must be one of train, validation, test for .* got 'ood_wider'"):
        load_split(file_arguments(tmp_path), "ood_wider")
    with pytest.raises(ValueError, match=r"`split` must be one of train, validation, test, .* got 'dev'"):
        load_split(DataArguments(), "dev", 5)


@pytest.mark.parametrize("num_examples", [0, -1])
def test_number_of_examples_below_one_raises(tmp_path, num_examples):
    for args in (file_arguments(tmp_path), DataArguments()):
        with pytest.raises(ValueError, match=f"`num_examples` must be .*, but got {num_examples}"):
            load_split(args, "test", num_examples)


# GSM8K


def test_gsm8k_is_read_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GSM8K_DIR", str(tmp_path))
    for split, count in (("train", 6), ("test", 2)):
        rows = [{"question": f"{split} {i}: how many pens?", "answer": SOLUTION} for i in range(count)]
        write_lines(tmp_path / f"{split}.jsonl", rows)
    args = DataArguments(dataset="openai/gsm8k", num_validation_examples=2)
    questions = {split: load_split(args, split)["question"][:] for split in SPLITS}
    assert questions == {
        "train": [f"train {i}: how many pens?" for i in range(4)],
        "validation": [f"train {i}: how many pens?" for i in range(4, 6)],
        "test": [f"test {i}: how many pens?" for i in range(2)],
    }
    assert load_split(args, "test")[0]["execution"].endswith("#### 6")


# The arguments


def test_arguments_are_loaded_as_they_were_saved(tmp_path):
    args = DataArguments(
        dataset="openai/gsm8k", dataset_name="socratic", num_train_examples=5, synthetic={"num_steps": [1, 2]}
    )
    args.save(tmp_path)
    assert DataArguments.load(tmp_path) == args != DataArguments()


def test_folder_that_says_nothing_gives_the_defaults(tmp_path):
    assert DataArguments.load(tmp_path) == DataArguments()
    assert not (tmp_path / FILE_NAME).exists()


@pytest.mark.parametrize(("name", "value"), [("num_train_examples", 0), ("num_validation_examples", -1)])
def test_number_out_of_range_raises(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be at least .*, but got {value}"):
        DataArguments(**{name: value})
