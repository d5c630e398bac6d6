"""Graphs of plans: read from texts, exact in the data, and the steps of an execution cut by them without a loss."""

import os
import random

import pytest
import torch
from datasets import Dataset

from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.collator import HierarchicalDataCollator, cut_steps, encode_example
from hierbd3lm.data.counterfactuals import change_synthetic
from hierbd3lm.data.gsm8k.problems import parse_main, parse_socratic
from hierbd3lm.data.loading import prepare_dataset
from hierbd3lm.data.splits import encode_split
from hierbd3lm.data.synthetic.config import SyntheticConfig
from hierbd3lm.data.synthetic.problems import generate_problems
from hierbd3lm.evaluation.likelihood import measure_likelihood
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.order_hierbd3lm import BlockOrder, parse_plan
from hierbd3lm.trainer import HierBD3LMTrainer
from hierbd3lm.training.arguments import HierBD3LMTrainingArguments
from hierbd3lm.training.block_growth import check_schedule, lay_out_blocks, resized

from .tiny_tokenizer import make_config_for, make_tokenizer

WIDE = SyntheticConfig(num_steps=(3, 8))
STEP_LEN, MOST_STEPS = 24, 9
FIELDS = {"execution_order": "plan", "step_len": STEP_LEN, "execution_len": (MOST_STEPS + 1) * STEP_LEN}
FIELDS |= {"question_len": 400, "plan_len": 160, "block_size": 4}


@pytest.mark.parametrize(
    "plan, expected",
    [
        ("Mia = Tom + 3", [[]]),
        ("Mia = Tom + 3\nAnn = Mia + Tom\n\nTotal = Mia + Ann + Mia", [[], [0], [0, 1]]),
        ("x=2\ny = x * x", [[], [0]]),
        ("1. Sold in May: 48 / 2\n2. Sold: 48 + [1]\n3. Half of [1] and [2]: ([1] + [2]) / 2", [[], [0], [0, 1]]),
        ("1) Half of 8\n2) Twice: ?\n3) All: ? + [1]", [[], [0], [0, 1]]),  # `?` may be of any step
        ("1. Tom = 3\n2. Mia = Tom", [[], []]),  # numbered steps refer by numbers alone
        ("", None),
        ("Add the numbers", None),
        ("Mia = Tom + 3\nthen add", None),
        ("Mia = Ann + 3\nAnn = 4 + 1", None),  # refers to a later step
        ("Mia = Mia + 3", None),
        ("Mia = 3 + 1\nMia = 4 + 1", None),  # two steps of one name
        ("1. A: [2]\n2. B: 3", None),
        ("1. A: [1]", None),
        ("1. A: 3\n3. B: [1]", None),
        ("1. A: 3\n2. B: [0]", None),
    ],
)
def test_a_plan_is_read_or_refused(plan, expected):
    assert parse_plan(plan) == expected


def test_the_graphs_of_synthetic_problems_are_those_of_their_plans():
    """`depends_on` comes from the problem's own operands, the parser sees the text alone."""
    rows = list(generate_problems("train", 200, WIDE))
    assert [parse_plan(row["plan"]) for row in rows] == [row["depends_on"] for row in rows]
    assert any(row["depends_on"] != [[*range(step)] for step in range(row["num_steps"])] for row in rows)


def test_the_graphs_of_gsm8k_are_the_references_of_its_plans():
    solution = "She has 6*2=<<6*2=12>>12.\nHe has 7-3=<<7-3=4>>4.\nTogether 12+4=<<12+4=16>>16.\n#### 16"
    question = "She has 6 bags of 2. He had 7 and lost 3. How many together?"
    row = parse_main({"question": question, "answer": solution})
    assert row["plan"].splitlines()[2].endswith("[1] + [2]") and row["depends_on"] == [[], [], [0, 1]]
    socratic = solution.replace("She", "How many? ** She").replace("He", "And he? ** He")
    socratic = socratic.replace("Together", "And all? ** Together")
    assert parse_socratic({"question": question, "answer": socratic})["depends_on"] is None


@pytest.mark.skipif(not os.environ.get("GSM8K_DIR"), reason="GSM8K_DIR is not set")
def test_every_plan_of_gsm8k_has_a_graph_with_a_step_per_line():
    from hierbd3lm.data.gsm8k.problems import load_gsm8k

    for row in load_gsm8k("test").select(range(300)):
        assert row["depends_on"] is not None and len(row["depends_on"]) == len(row["execution_steps"])


@pytest.mark.parametrize("adds_bos", [False, True])
def test_steps_are_cut_from_the_tokens_of_the_whole_execution(adds_bos):
    tokenizer = make_tokenizer(adds_bos)
    for row in generate_problems("train", 20, WIDE):
        ids, steps = encode_example(row, tokenizer)["execution_ids"], cut_steps(row, tokenizer)
        pieces, start = [], 0
        for length in steps["step_lengths"]:
            pieces.append(tokenizer.decode(ids[start : start + length]))
            start += length
        assert start == len(ids) and steps["depends_on"] == row["depends_on"]
        assert pieces == [*(f"{step}\n" for step in row["execution_steps"]), f"#### {row['answer']}"]


def test_what_has_no_graph_is_cut_at_its_lines():
    tokenizer = make_tokenizer()
    steps = cut_steps({"execution": "a b\n\nc\nd\n#### 4"}, tokenizer)
    assert steps == {"step_lengths": [5, 2, 2, 6], "depends_on": [[], [0], [0, 1]]}
    assert cut_steps({"execution": "a\nb"}, tokenizer) == {"step_lengths": [2, 1, 0], "depends_on": [[], [0]]}
    empty_line = {"execution": "a\n\nb\n#### 4", "execution_steps": ["a", "\nb"]}  # some rows of GSM8K have such steps
    assert cut_steps(empty_line, tokenizer)["step_lengths"] == [3, 2, 6]
    assert cut_steps({"execution": ""}, tokenizer) == {"step_lengths": [0], "depends_on": []}


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"execution_steps": ["b", "a"]},
            "`execution` must hold the steps of `execution_steps` in order, but lacks 'a'",
        ),
        ({"depends_on": [[]]}, "`depends_on` must have a list for each of 2 steps, but got 1"),
        ({"depends_on": [[], [1]]}, r"`depends_on` must hold numbers of earlier steps.* but step 1 has \[1\]"),
        ({"depends_on": [[-1], []]}, r"but step 0 has \[-1\]"),
    ],
)
def test_a_graph_that_does_not_fit_its_steps_is_refused_with_its_row(row, message):
    rows = [{"question": "?", "plan": "p", "execution": "a\nb\n#### 1"} | row]
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=f"row 0: .*{message}|row 0: {message}"):
        prepare_dataset(Dataset.from_list(rows), tokenizer, make_config_for(tokenizer, **FIELDS))


def prepare(rows, **fields):
    tokenizer = make_tokenizer()
    config = make_config_for(tokenizer, **(FIELDS | fields))
    dataset, report = prepare_dataset(Dataset.from_list(rows), tokenizer, config)
    return dataset, report, config, tokenizer


def test_a_dataset_counts_what_has_no_graph_and_drops_steps_that_are_too_long():
    texts = {"question": "?", "plan": "x = 1 + 2\ny = x + 1"}
    rows = [
        texts | {"execution": "x = 3\ny = 4\n#### 4", "depends_on": [[], [0]]},
        texts | {"execution": "x = 3\ny = 4\n#### 4", "depends_on": None},
        texts | {"execution": "x = 1 + 1 + 1 + 1 + 1 + 1\ny = 4\n#### 4", "depends_on": [[], [0]]},
        texts | {"execution": "x = 3\n" * (MOST_STEPS + 1) + "#### 4", "depends_on": None},
    ]
    dataset, report, config, tokenizer = prepare(rows)
    assert (report["num_kept"], report["num_in_total_order"]) == (2, 1)
    assert report["dropped_by_segment"] == {"question": 0, "plan": 0, "execution": 2}
    with pytest.raises(ValueError, match=f"`execution` must have at most {MOST_STEPS} steps and an answer of at most"):
        prepare_dataset(Dataset.from_list(rows[2:]), tokenizer, config, over_long="raise")
    batch = HierarchicalDataCollator(config)([dict(row) for row in dataset])
    from_texts = HierarchicalDataCollator(config, tokenizer)(rows[:2])
    assert batch.keys() == from_texts.keys() and all(torch.equal(batch[name], from_texts[name]) for name in batch)
    assert dataset["length"][0] == int((batch["segment_ids"][0] >= 0).sum())
    fixed = HierarchicalDataCollator(config, fixed_length=True)([dict(row) for row in dataset])
    for name in ("input_ids", "block_ids", "position_ids", "labels"):
        for one, other in ((batch, fixed),):
            kept = [ids[name][0][ids["segment_ids"][0] >= 0].tolist() for ids in (one, other)]
            assert kept[0] == kept[1], name
    chain, chain_report, _, _ = prepare(rows, execution_order="chain", step_len=None)
    assert "step_lengths" not in chain.column_names and "num_in_total_order" not in chain_report


def test_an_example_without_its_steps_is_refused():
    config = make_config_for(make_tokenizer(), **FIELDS)
    example = {"question_ids": [5], "plan_ids": [6], "execution_ids": [7, 8]}
    with pytest.raises(ValueError, match="an example must have step_lengths, depends_on for execution_order='plan'"):
        HierarchicalDataCollator(config)([example])
    with pytest.raises(
        ValueError, match=r"`step_lengths` must be those of 1 steps and of the answer, 2 tokens in all"
    ):
        HierarchicalDataCollator(config)([example | {"step_lengths": [1], "depends_on": [[]]}])
    with pytest.raises(ValueError, match="`continues` must be False for execution_order='plan'"):
        steps = {"step_lengths": [1, 1], "depends_on": [[]], "continues": True}
        HierarchicalDataCollator(config)([example | steps])


@pytest.mark.slow
def test_a_model_trains_and_measures_over_the_steps(tmp_path):
    torch.manual_seed(0)
    rows = list(generate_problems("train", 12, SyntheticConfig(num_steps=(2, 4))))
    dataset, _, config, _ = prepare(rows)
    model = HierBD3LMForBlockDiffusion(config)
    args = HierBD3LMTrainingArguments(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=4, learning_rate=3e-3, report_to="none",
        use_cpu=True, save_strategy="no", eval_noise_draws=1, disable_tqdm=True,
    )  # fmt: skip
    before = measure_likelihood(model.eval(), dataset, num_draws=2)
    counted = sum(len(ids) + 1 for ids in dataset["plan_ids"])
    assert before["plan_num_tokens"] == counted
    ends = sum(len(lengths) for lengths in dataset["step_lengths"])
    assert before["execution_num_tokens"] == sum(map(len, dataset["execution_ids"])) + ends
    HierBD3LMTrainer(
        model=model, args=args, data_collator=HierarchicalDataCollator(config), train_dataset=dataset
    ).train()
    assert measure_likelihood(model.eval(), dataset, num_draws=2)["nll"] < before["nll"] - 1


@pytest.mark.parametrize("size", [1, 2])
def test_smaller_blocks_have_the_layout_that_the_collator_gives_them(size):
    """A batch for blocks of four, laid out for smaller ones as `block_size_schedule` does."""
    rows = list(generate_problems("train", 5, WIDE))
    dataset, _, config, _ = prepare(rows)
    batch = HierarchicalDataCollator(config)([dict(row) for row in dataset])
    smaller = resized(config, size)
    expected = HierarchicalDataCollator(smaller)([dict(row) for row in dataset])
    laid_out = lay_out_blocks(batch, BlockOrder.from_config(smaller))
    assert laid_out.keys() == expected.keys()
    assert all(torch.equal(laid_out[name], expected[name]) for name in expected)
    with pytest.raises(
        ValueError, match="`block_size_schedule` must have a largest block size that divides step_len=24"
    ):
        check_schedule({0: 16}, config, HierarchicalDataCollator(config))


def test_an_empty_plan_is_refused_where_the_steps_are_those_of_the_plan():
    tokenizer = make_tokenizer()
    config, rows = make_config_for(tokenizer, **FIELDS), Dataset.from_list(list(generate_problems("train", 2, WIDE)))
    args = DataArguments(dataset="synthetic", plan_dropout=0.1, num_train_examples=2)
    with pytest.raises(ValueError, match=r"`plan_dropout` must be 0 for execution_order='plan', .* but got 0.1"):
        encode_split(rows, args, tokenizer, config)


def test_a_changed_plan_has_the_graph_of_its_own():
    change = change_synthetic(WIDE)
    for seed, row in enumerate(generate_problems("train", 40, WIDE)):
        changed = change(random.Random(seed), row)
        assert changed is None or changed["depends_on"] == parse_plan(changed["plan"])
