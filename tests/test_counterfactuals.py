"""Examples with changed plans or without a plan: what they say is right, and the loss counts for executions alone."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.data.splits import load_split, load_training_split
from hierbd3lm.evaluation.likelihood import measure_likelihood, with_predicted_tokens
from hierbd3lm.order_hierbd3lm import BlockOrder
from hierbd3lm.training.block_growth import lay_out_blocks, resized
from hierbd3lm.training.objectives import make_objective

from .test_plan_swaps import evaluate_by_python
from .test_train import run, write_config
from .tiny import make_config, make_dataset, make_model
from .tiny_algorithms import ALL
from .tiny_trainer import assert_bit_equal

SMALL = {"num_steps": [1, 3], "max_depth": 2, "num_distractors": [0, 0], "max_value": 12}


def load(counterfactual_plans, plan_dropout=0.0, num_examples=300, synthetic=SMALL, split="train"):
    rates = {"counterfactual_plans": counterfactual_plans, "plan_dropout": plan_dropout}
    return load_training_split(DataArguments(synthetic=synthetic, num_train_examples=num_examples, **rates), split)


def load_original(num_examples=300, synthetic=SMALL):
    return load_split(DataArguments(synthetic=synthetic, num_train_examples=num_examples), "train")


def is_changed(row):
    return row["plan_is_given"] and bool(row["plan"])


# The examples


@pytest.mark.parametrize("synthetic", [SMALL, {"num_steps": [2, 6], "num_distractors": [0, 3], "max_value": 60}])
def test_changed_executions_are_those_that_python_computes(synthetic):
    dataset, counts = load(1.0, synthetic=synthetic)
    originals = load_original(synthetic=synthetic)
    assert counts["num_changed_plans"] + counts["num_unchangeable_plans"] == len(dataset) == 300
    assert counts["num_changed_plans"] >= 299
    for row, original in zip(dataset, originals, strict=True):
        assert row["question"] == original["question"]
        if not row["plan_is_given"]:
            assert row == original | {"plan_is_given": False}
            continue
        assert row["plan"] != original["plan"]
        given = re.findall(r"(\w+) (?:has|owns|keeps) (\d+) \w+\.", row["question"])
        values = {name: int(number) for name, number in given}
        expected = []
        for line, value in zip(row["plan"].split("\n"), evaluate_by_python(row["question"], row["plan"]), strict=True):
            name, operation = line.split(" = ")
            numbers = " ".join(str(values.get(word, word)) for word in operation.split())
            expected.append(f"{name} = {numbers} = {value}")
            values[name] = value
        assert row["execution"] == "\n".join([*expected, f"#### {value}"])
        assert row["answer"] == str(value) and 1 <= value <= synthetic["max_value"]
        assert row["plan_steps"] == row["plan"].split("\n") and row["execution_steps"] == expected
        names = [line.split(" = ")[0] for line in row["plan_steps"]]
        for line, needed in zip(row["plan_steps"], row["depends_on"], strict=True):
            words = re.findall("[A-Za-z]+", line.split(" = ")[1])
            assert needed == sorted({names.index(word) for word in words if word in names})


def test_rates_are_those_of_the_settings():
    dataset, counts = load(0.3, 0.1, num_examples=600)
    changed = sum(is_changed(row) for row in dataset)
    dropped = sum(row["plan_is_given"] and not row["plan"] for row in dataset)
    assert (counts["num_changed_plans"], counts["num_dropped_plans"]) == (changed, dropped)
    assert abs(changed + counts["num_unchangeable_plans"] - 180) < 45 and abs(dropped - 60) < 30


def test_an_example_without_a_plan_keeps_its_execution():
    dataset, counts = load(0.0, 1.0, num_examples=20)
    assert counts == {"num_changed_plans": 0, "num_unchangeable_plans": 0, "num_dropped_plans": 20}
    for row, original in zip(dataset, load_original(20), strict=True):
        assert row == original | {"plan": "", "plan_steps": [], "depends_on": None, "plan_is_given": True}


def test_a_row_does_not_depend_on_the_other_rows():
    assert load(0.5, 0.2, num_examples=40)[0][:] == load(0.5, 0.2, num_examples=90)[0][:40]


def test_without_the_settings_nothing_is_added():
    dataset, counts = load(0.0)
    assert counts == {} and dataset[:] == load_original()[:]


def test_validation_and_evaluation_see_the_plans_of_the_questions():
    args = DataArguments(synthetic=SMALL, num_train_examples=20, num_validation_examples=20, counterfactual_plans=1.0)
    plain = DataArguments(synthetic=SMALL, num_train_examples=20, num_validation_examples=20)
    assert load_training_split(args, "validation")[0][:] == load_split(plain, "validation")[:]
    assert load_split(args, "train", 20)[:] == load_split(plain, "train", 20)[:]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"counterfactual_plans": 1.5}, r"`counterfactual_plans` must be in \[0, 1\], but got 1.5"),
        ({"plan_dropout": -0.1}, r"`plan_dropout` must be in \[0, 1\], but got -0.1"),
        ({"counterfactual_plans": 0.7, "plan_dropout": 0.7}, "must be at most 1, but got 0.7 [+] 0.7"),
        ({"counterfactual_plans": 0.1, "dataset": "rows.jsonl"}, "`counterfactual_plans` must be 0 for other data"),
        ({"counterfactual_plans": 0.1, "dataset": "gsm8k", "dataset_name": "socratic"}, "must be 0 for other data"),
        ({"plan_dropout": 0.1, "dataset": "rows.txt"}, "`plan_dropout` must be 0 for data without plans"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**settings)


# The loss


def with_given(dataset, which):
    return dataset.add_column("plan_is_given", which)


@pytest.mark.parametrize("name", ALL)
def test_the_loss_of_a_given_plan_is_that_of_the_execution_alone(name):
    """In every algorithm the exact likelihood is the one that the evaluation measures under given plans."""
    config = make_config(**ALL[name])
    model, dataset = make_model(**ALL[name]), make_dataset(5, config)
    marked = with_given(dataset, [True] * len(dataset))
    settings = {"num_draws": 3, "batch_size": 5, "seed": 7}
    given = measure_likelihood(model, dataset, plan_is_given=True, **settings)
    measured = measure_likelihood(model, marked, **settings)
    assert "plan_nll" not in measured
    for key, value in given.items():
        assert measured[key] == pytest.approx(value, rel=1e-5)
    assert measured["num_tokens"] == sum(len(row["execution_ids"]) + 1 for row in dataset)


@pytest.mark.parametrize("name", ALL)
def test_only_tokens_of_the_execution_are_predicted_in_marked_rows(name):
    model = make_model(**ALL[name])
    dataset = make_dataset(6, model.config, plan=(1, 7))
    marked = [True, False, True, False, False, True]
    batch = with_predicted_tokens(model, HierarchicalDataCollator(model.config)(list(with_given(dataset, marked))))
    plain = with_predicted_tokens(model, HierarchicalDataCollator(model.config)(list(dataset)))
    is_execution = batch["segment_ids"] == 2
    is_opener = batch["input_ids"] == model.config.execution_token_id
    for row, given in enumerate(marked):
        expected = plain["maskable"][row] & is_execution[row] & ~is_opener[row] if given else plain["maskable"][row]
        assert torch.equal(batch["maskable"][row], expected)
        labels = torch.where(is_execution[row] | (not given), plain["labels"][row], -100)
        assert torch.equal(batch["labels"][row], labels)
    nelbo = make_objective(model.config).token_nelbo(model, batch, torch.Generator().manual_seed(0))
    assert (nelbo[~batch["maskable"]] == 0).all() and (nelbo[batch["maskable"] & is_execution] != 0).any()


@pytest.mark.parametrize("fields", [{}, {"algorithm": "bd3lm"}, {"hierarchical_mask": False}])
@pytest.mark.parametrize("fixed_length", [False, True])
def test_given_plans_keep_their_end_when_blocks_shrink(fields, fixed_length):
    config = make_config(**fields)
    rows = list(with_given(make_dataset(12, config), [True, False, False] * 4))
    batch = HierarchicalDataCollator(config, fixed_length=fixed_length)(rows)
    for size in (1, 2, 4):
        smaller = resized(config, size)
        expected = HierarchicalDataCollator(smaller, fixed_length=fixed_length)(rows)
        laid_out = lay_out_blocks(batch, BlockOrder.from_config(smaller), keep_columns=fixed_length)
        assert_bit_equal(laid_out, expected)


# Training


RATES = {"counterfactual_plans": 0.5, "plan_dropout": 0.2}


@pytest.mark.slow
def test_a_run_counts_its_changed_plans_and_resumes_exactly(tmp_path, monkeypatch):
    run(monkeypatch, write_config(tmp_path, **RATES))
    out = tmp_path / "out"
    report = json.loads((out / "data_report.json").read_text())
    dataset, counts = load_training_split(DataArguments(num_train_examples=24, **RATES), "train")
    assert counts.items() <= report["train"].items() and counts["num_changed_plans"] > 0
    assert "num_changed_plans" not in report["validation"]
    assert sum(dataset["plan_is_given"]) == counts["num_changed_plans"] + counts["num_dropped_plans"]
    resumed = tmp_path / "resumed"
    shutil.copytree(out, resumed, ignore=shutil.ignore_patterns("checkpoint-4", "model.safetensors"))
    shutil.copytree(out / "checkpoint-2", resumed / "checkpoint-2", dirs_exist_ok=True)
    run(monkeypatch, write_config(tmp_path, output_dir=str(resumed), **RATES), "--resume_from_checkpoint", "last")
    weights = [load_file(folder / "model.safetensors") for folder in (out, resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
