"""No example is trained on and tested on, whatever the dataset."""

import json
import re

import datasets
import pytest
from datasets import Dataset, DatasetDict

from hierbd3lm.data.arguments import FILE_NAME, DataArguments
from hierbd3lm.data.gsm8k.near_duplicates import highest_similarities
from hierbd3lm.data.splits import load_counted_split, load_split, training_splits
from hierbd3lm.data.synthetic.config import SyntheticConfig
from hierbd3lm.data.synthetic.problems import generate_dataset
from hierbd3lm.training.settings import ModelArguments

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


def test_an_unknown_field_of_the_synthetic_problems_is_refused():
    with pytest.raises(ValueError, match=r"`synthetic` must have fields .* 'num_step'; did you mean `num_steps`"):
        DataArguments(synthetic='{"num_step": [1, 1]}')


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
    with pytest.raises(ValueError, match=f"`num_(train_)?examples` must be given .* {split!r}, but got None"):
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
        with pytest.raises(
            ValueError, match="`num_validation_examples` must be less than the number of training examples"
        ):
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


def write_gsm8k(folder, monkeypatch, **questions):
    monkeypatch.setenv("GSM8K_DIR", str(folder))
    for split, texts in questions.items():
        write_lines(folder / f"{split}.jsonl", [{"question": text, "answer": SOLUTION} for text in texts])


def test_gsm8k_is_read_from_its_folder(tmp_path, monkeypatch):
    train = [f"{word} pens does Tom have?" for word in ("a", "b", "c", "d", "e", "f")]
    write_gsm8k(tmp_path, monkeypatch, train=train, test=["one more question", "and another"])
    args = DataArguments(dataset="openai/gsm8k", num_validation_examples=2)
    questions = {split: load_split(args, split)["question"][:] for split in SPLITS}
    assert questions == {
        "train": train[:4],
        "validation": train[4:],
        "test": ["one more question", "and another"],
    }
    assert load_split(args, "test")[0]["execution"].endswith("#### 6")


def test_gsm8k_is_trained_on_without_its_test_problems_in_other_numbers(tmp_path, monkeypatch):
    test = "A plane travels 1,200 miles in 3 hours. How long does it take to travel 2000.5 miles?"
    near = "A train  travels 360 miles in 4 HOURS. How long does it take to travel 20 miles"
    others = ["How long does it take to travel?", "A plane has 3 wings.", "Who?", "Tom has 3 pens."]
    write_gsm8k(tmp_path, monkeypatch, train=[others[0], near, *others[1:], test], test=[test, "Why?"])
    args = DataArguments(dataset="openai/gsm8k", num_validation_examples=2, num_train_examples=3)
    train, counts = load_counted_split(args, "train")
    assert (train["question"][:], counts) == (others[:3], {"num_near_test": 1})  # the first three that are left
    validation, counts = load_counted_split(args, "validation")
    assert (validation["question"][:], counts) == (others[3:], {"num_near_test": 1})
    tests, counts = load_counted_split(args, "test")
    assert (tests["question"][:], counts) == ([test, "Why?"], {})


def test_a_file_is_kept_clear_of_the_test_split_that_is_named(tmp_path, monkeypatch):
    test = "How many pens have Tom and Ann in 3 boxes?"
    write_gsm8k(tmp_path, monkeypatch, test=[test, "Why?"])
    rows = [*make_rows(3), {"question": test.replace("3", "4"), "plan": "Add.", "execution": "#### 1"}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    for tested_on in ("openai/gsm8k", write_lines(tmp_path / "test_rows.jsonl", rows[3:])):
        args = DataArguments(dataset=path, num_validation_examples=0, tested_on=tested_on)
        train, counts = load_counted_split(args, "train")
        assert (train.to_list(), counts) == (rows[:3], {"num_near_test": 1})
    train, counts = load_counted_split(DataArguments(dataset=path, num_validation_examples=0), "train")
    assert (train.to_list(), counts) == (rows, {})


def test_texts_alone_cannot_be_compared_with_a_test_split(tmp_path):
    path = write_lines(tmp_path / "texts.jsonl", [{"text": "a b c"}] * 4)
    args = DataArguments(dataset=path, auto_split=True, num_validation_examples=0, tested_on="openai/gsm8k")
    with pytest.raises(ValueError, match="`tested_on` must be None for a dataset without questions"):
        load_split(args, "train")


# Near-duplicates


def words_of(text):
    return re.sub(r"[0-9][0-9,.]*", "0", text.lower()).replace("?", " ").replace(".", " ").split()


def similarity_by_hand(first, second):
    runs = []
    for words in (words_of(first), words_of(second)):
        runs.append([tuple(words[i : i + 3]) for i in range(len(words) - 2)] or [tuple(words)])
    shared = [run for run in set(runs[0]) if run in runs[1]]
    return len(shared) / len({*runs[0], *runs[1]})


def test_similarity_is_the_jaccard_index_of_runs_of_three_words():
    texts = generate_dataset("train", 60, SyntheticConfig(num_steps=(1, 2), num_names=8, num_things=1))["question"][:]
    texts += ["Tom?", "tom 3", "", "How many pens"]
    questions, references = texts[::2], texts[1::2]
    expected = [max(similarity_by_hand(text, other) for other in references) for text in questions]
    assert highest_similarities(questions, references) == pytest.approx(expected)
    assert 0 in expected and len(set(expected)) > 20


def test_similarity_sees_words_and_neither_numbers_nor_typography():
    question = "Kim has 5 cats, 1,200 dogs and 0.5 birds. How many pets?"
    same = "kim  HAS 7 cats 3 dogs and\n12 birds - how many pets"
    other = "Kim sold 5 cars, 1,200 bikes or 0.5 boats. Which left?"
    assert highest_similarities([question, question, "Ä 1"], [same]) == [1, 1, 0]
    assert highest_similarities([other], [question])[0] < 0.1
    assert highest_similarities([question], []) == [0]


# Synthetic problems beside another dataset


def test_synthetic_problems_are_a_training_split_of_their_own(tmp_path):
    args = file_arguments(
        tmp_path, num_validation_examples=3, num_synthetic_examples=20, synthetic={"num_steps": [2, 2]}
    )
    assert training_splits(args) == ["train", "synthetic"]
    added = load_split(args, "synthetic").to_list()
    assert added == generate_dataset("train", 20, SyntheticConfig(num_steps=(2, 2))).to_list()
    assert load_split(args, "train").to_list() + load_split(args, "validation").to_list() == make_rows(10)
    assert load_split(args, "test").to_list() == make_rows(10)


def test_without_synthetic_problems_there_is_no_such_split(tmp_path):
    assert training_splits(file_arguments(tmp_path)) == ["train"]
    with pytest.raises(
        ValueError, match="`num_synthetic_examples` must be at least 1 for the split 'synthetic', but got 0"
    ):
        load_split(file_arguments(tmp_path), "synthetic")
    with pytest.raises(ValueError, match="`num_synthetic_examples` must be 0 for `dataset: synthetic`, but got 5"):
        DataArguments(num_synthetic_examples=5)


# The arguments


def test_arguments_are_loaded_as_they_were_saved(tmp_path):
    args = DataArguments(
        dataset="openai/gsm8k", dataset_name="socratic", num_train_examples=5, synthetic={"num_steps": [1, 2]}
    )
    args.save(tmp_path)
    assert DataArguments.load(tmp_path) == args != DataArguments()


def test_a_folder_without_saved_arguments_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"`model` must have {FILE_NAME}"):
        DataArguments.load(tmp_path)
    assert not (tmp_path / FILE_NAME).exists()


def test_saved_arguments_with_an_unknown_name_are_refused_with_the_nearest(tmp_path):
    (tmp_path / FILE_NAME).write_text('{"datset": "gsm8k"}')
    with pytest.raises(
        ValueError, match=r"`data_config\.json` must have fields of .*'datset'; did you mean `dataset`"
    ):
        DataArguments.load(tmp_path)


@pytest.mark.parametrize("name", ["dataset_name", "dataset_revision", "parse_example"])
def test_setting_that_synthetic_problems_do_not_read_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be None for `dataset: synthetic`, but got 'a:b'"):
        DataArguments(**{name: "a:b"})


def test_plain_text_is_not_parsed():
    with pytest.raises(ValueError, match=r"`parse_example` must be None for plain text, .* but got 'a:b'"):
        DataArguments(dataset="a.txt", parse_example="a:b")


@pytest.mark.parametrize("name", ["special_tokens", "over_long"])
def test_unknown_choice_is_refused_at_once(name):
    with pytest.raises(ValueError, match=f"`{name}` must be one of drop, raise, but got 'keep'"):
        DataArguments(**{name: "keep"})


def test_setting_that_is_no_json_is_refused_by_name():
    with pytest.raises(ValueError, match=r"`synthetic` must be JSON, but got '\{1: 2\}'"):
        DataArguments(synthetic="{1: 2}")
    with pytest.raises(ValueError, match="`backbone` must be JSON, but got 'qwen3'"):
        ModelArguments(backbone="qwen3")


@pytest.mark.parametrize(
    ("name", "value"), [("num_train_examples", 0), ("num_validation_examples", -1), ("num_synthetic_examples", -1)]
)
def test_number_out_of_range_raises(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be at least .*, but got {value}"):
        DataArguments(**{name: value})
