"""The benchmark of parallel steps: its shapes, its training runs, and the passes of reference answers."""

import pytest
from datasets import Dataset

from hierbd3lm import train
from hierbd3lm.backbones_hierbd3lm import special_token_ids
from hierbd3lm.benchmarks.parallel_steps import (
    WIDTHS,
    depth_of,
    format_rows,
    passes_of_reference,
    shape_of,
    test_problems,
    training_command,
)
from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
from hierbd3lm.data.loading import prepare_dataset
from hierbd3lm.data.synthetic.config import SyntheticConfig
from hierbd3lm.data.synthetic.problems import generate_problems
from hierbd3lm.data.synthetic.wording import vocabulary_texts
from hierbd3lm.data.tokenization import train_tokenizer

from .tiny_tokenizer import make_tokenizer

test_problems.__test__ = False  # a function of the benchmark, which pytest takes for a test


def test_every_width_has_its_largest_problem():
    assert [shape_of(width, 12) for width in WIDTHS] == [(12, 12), (12, 8), (10, 4), (12, 3)]
    assert [shape_of(width, 8) for width in WIDTHS] == [(8, 8), (6, 4), (5, 2), (8, 2)]


def test_passes_are_those_of_the_longest_path():
    row = {
        "plan": "ab",
        "execution": "x\nyy\nzzz\n#",
        "depends_on": [[], [], [0, 1]],
        "execution_steps": ["x", "yy", "zzz"],
    }
    counted = passes_of_reference(row, make_tokenizer())
    assert counted == {"chain": 3 + (2 + 3 + 4 + 1) + 1, "plan": 3 + (3 + 1) + (4 + 1) + (1 + 1)}
    assert (depth_of([[], [0], [1], []]), depth_of([[], []])) == (3, 1)


@pytest.mark.parametrize("order", ["chain", "plan"])
def test_all_problems_fit_the_model_that_is_trained(order, tmp_path):
    command = training_command(order, tmp_path, 1000, 12, 0)
    model_args, data_args, args = train.parse_arguments([*command[2:], "--use_cpu", "true"])
    synthetic = SyntheticConfig(**data_args.synthetic)
    tokenizer = train_tokenizer(vocabulary_texts(synthetic))
    fields = model_args.config_fields() | {"block_size": max(args.block_size_schedule.values())}
    config = HierBD3LMConfig(backbone_config={"vocab_size": len(tokenizer)}, **special_token_ids(tokenizer), **fields)
    assert config.execution_order == order
    rows = [*generate_problems("train", 30, synthetic), *test_problems(4.0, 12, 5), *test_problems(1.0, 12, 5)]
    _, report = prepare_dataset(Dataset.from_list(rows), tokenizer, config)
    assert report["num_dropped"] == 0 and report.get("num_in_total_order", 0) == 0


def test_the_table_has_a_row_for_each_width_and_sampler():
    one = {"nfe": 80.0, "tokens_per_second": 100.0, "exact_match": 0.5}
    row = {
        "width": 2.5,
        "steps": 10,
        "sampler": "s",
        "price_per_token": 0.01,
        "chain": one,
        "plan": one | {"nfe": 40.0},
    }
    assert format_rows([row]).splitlines()[2] == (
        "| 2.5 | 10 | s | 80.0 | 40.0 | 0.50 | 100 -> 100 | 50.0 % | 50.0 % | +0.010 |"
    )
