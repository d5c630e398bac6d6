"""Likelihood command: metrics, counted tokens and output, in agreement with the trainer."""

import json
import math
import sys

import pytest
import torch
from datasets import Dataset

from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.data.loading import prepare_dataset
from hierbd3lm.diffusion_hierbd3lm import exact_nelbo
from hierbd3lm.evaluation import ppl
from hierbd3lm.evaluation.arguments import LikelihoodArguments
from hierbd3lm.evaluation.likelihood import check_counts, format_likelihood, measure_likelihood
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.trainer import HierBD3LMTrainer
from hierbd3lm.training.arguments import HierBD3LMTrainingArguments

from .tiny_algorithms import ALL, OWN_SIZE
from .tiny_tokenizer import make_config_for, make_tokenizer

ROWS = [
    {"question": "2 + 3?", "plan": "add", "execution": "5"},
    {"question": "What is 7 * 2?", "plan": "", "execution": "it is 14"},
    {"question": "?", "plan": "a plan", "execution": "x" * 30},  # exceeds the maximum length of an execution
    {"question": "1?", "plan": "pq", "execution": "12345678"},
]
COUNTS = {"plan": (3 + 1) + (0 + 1) + (2 + 1), "execution": (1 + 1) + (8 + 1) + (8 + 1)}


def make_checkpoint(folder, **fields):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = HierBD3LMForBlockDiffusion._from_config(make_config_for(tokenizer, **fields)).eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    dataset, _ = prepare_dataset(Dataset.from_list(ROWS), tokenizer, model.config)
    return model, dataset


def run(folder, monkeypatch, *arguments):
    argv = ["ppl", "--model", str(folder / "model"), "--dataset", str(folder / "rows.jsonl"), *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    ppl.main()
    return json.loads((folder / "model" / "likelihood.json").read_text())


@pytest.mark.parametrize("name", ALL)
def test_every_algorithm_is_measured_over_the_same_tokens(name, tmp_path, monkeypatch, capsys):
    make_checkpoint(tmp_path, **ALL[name])
    result = run(tmp_path, monkeypatch, "--num_draws", "2")
    assert {segment: result[f"{segment}_num_tokens"] for segment in COUNTS} == COUNTS
    assert result["num_tokens"] == sum(COUNTS.values())
    assert (result["num_examples"], result["num_dropped"]) == (4, 1)
    assert result["dropped_by_segment"] == {"question": 0, "plan": 0, "execution": 1}
    assert result["nll"] == pytest.approx(
        sum(result[f"{segment}_nll"] * count for segment, count in COUNTS.items()) / sum(COUNTS.values())
    )
    assert result["bpd"] == pytest.approx(result["nll"] / math.log(2))
    assert result["ppl"] == pytest.approx(math.exp(result["nll"]))
    assert ("nll_stderr" in result) is (name != "ar")
    printed = capsys.readouterr().out
    assert f"{sum(COUNTS.values())}" in printed and f"{result['ppl']:.4f}" in printed
    assert "1 over-long examples dropped" in printed


@pytest.mark.slow
def test_noise_draws_agree_with_the_enumeration_within_their_error(tmp_path, monkeypatch):
    model, dataset = make_checkpoint(tmp_path)
    exact = run(tmp_path, monkeypatch, "--exact", "true")
    assert "nll_stderr" not in exact
    drawn = run(tmp_path, monkeypatch, "--num_draws", "80", "--batch_size", "2")
    for prefix in ("plan_", "execution_", ""):
        error = drawn[f"{prefix}nll_stderr"]
        assert 0 < error < 0.05 * exact[f"{prefix}nll"]
        assert abs(drawn[f"{prefix}nll"] - exact[f"{prefix}nll"]) < 4 * error
    batch = HierarchicalDataCollator(model.config)(list(dataset))
    with torch.no_grad():
        by_hand = exact_nelbo(
            lambda masked: model.masked_nll(masked, batch["input_ids"], segment_ids=batch["segment_ids"]),
            batch["block_ids"],
            model.order.predicted(batch["input_ids"], batch["segment_ids"]),
        )
    assert exact["nll"] == pytest.approx(by_hand.sum().item() / sum(COUNTS.values()), rel=1e-5)


@pytest.mark.parametrize("fields", [{"block_size": 1}, {"algorithm": "ar", **OWN_SIZE}])
def test_the_trainer_measures_the_same(fields, tmp_path):
    model, dataset = make_checkpoint(tmp_path, **fields)
    arguments = HierBD3LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=2)
    trainer = HierBD3LMTrainer(
        model,
        arguments,
        eval_dataset=dataset,
        data_collator=HierarchicalDataCollator(model.config),
        train_dataset=dataset,
    )
    ours, theirs = measure_likelihood(model, dataset, num_draws=2, batch_size=3), trainer.evaluate()
    for name in ("nll", "plan_nll", "execution_ppl", "num_tokens"):
        assert theirs[f"eval_{name}"] == pytest.approx(ours[name], rel=1e-5)


def test_likelihood_depends_only_on_the_seed(tmp_path):
    model, dataset = make_checkpoint(tmp_path)
    nlls = [measure_likelihood(model, dataset, num_draws=1, seed=seed)["nll"] for seed in (0, 0, 1)]
    assert nlls[0] == nlls[1] != nlls[2]


def test_a_wrong_number_of_counted_tokens_raises(tmp_path):
    model, dataset = make_checkpoint(tmp_path)
    check_counts(torch.tensor([8.0, 20.0]), dataset, model.config)
    with pytest.raises(RuntimeError, match=r"the counted tokens must be \[8, 20\]"):
        check_counts(torch.tensor([8.0, 21.0]), dataset, model.config)


def test_enumeration_of_large_blocks_raises(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, **ALL["mdlm"])
    with pytest.raises(ValueError, match="blocks of at most 8 tokens, got 47"):
        run(tmp_path, monkeypatch, "--exact", "true")


def test_the_table_has_an_error_only_with_noise():
    metrics = {"nll": 1.0, "bpd": 1.44, "ppl": 2.72, "num_tokens": 12345}
    table = {f"{prefix}{name}": value for prefix in ("", "plan_", "execution_") for name, value in metrics.items()}
    assert "+/-" not in format_likelihood(table)
    line = format_likelihood(table | {"nll_stderr": 0.25}).splitlines()[-1]
    assert line.split() == ["total", "12,345", "1.00000", "+/-", "0.25000", "1.4400", "2.7200"]


@pytest.mark.parametrize("setting", [{"num_draws": 0}, {"limit": 0}, {"batch_size": 0}, {"estimator": "exact"}])
def test_settings_out_of_range_are_refused(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        LikelihoodArguments(model="x", **setting)


@pytest.mark.parametrize("name", ALL)
def test_no_token_of_a_given_plan_is_masked(name, tmp_path, monkeypatch):
    """In every algorithm only content, `<|end|>` and filler of the execution are predicted."""
    model, dataset = make_checkpoint(tmp_path, **ALL[name])
    forward, predicted = model.forward, []

    def spy(**inputs):
        kept = inputs["logits_to_keep"]
        predicted.extend(inputs["target_ids"].masked_select(kept.reshape(inputs["target_ids"].shape)).tolist())
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", spy)
    metrics = measure_likelihood(model, dataset, num_draws=3, plan_is_given=True)
    assert metrics.keys() <= {f"execution_{key}" for key in ("nll", "nll_stderr", "bpd", "ppl", "num_tokens")}
    assert metrics["execution_num_tokens"] == COUNTS["execution"]
    in_executions = {token for row in dataset["execution_ids"] for token in row}
    assert predicted and set(predicted) <= in_executions | {model.config.end_token_id}


def test_execution_nll_is_the_same_with_a_given_plan_under_the_hierarchical_mask(tmp_path):
    model, dataset = make_checkpoint(tmp_path)
    whole = measure_likelihood(model, dataset, exact=True)
    alone = measure_likelihood(model, dataset, exact=True, plan_is_given=True)
    assert alone["execution_nll"] == pytest.approx(whole["execution_nll"], rel=1e-6)


def test_execution_nll_of_ar_is_that_of_the_backbone(tmp_path):
    model, dataset = make_checkpoint(tmp_path, **ALL["ar"])
    config, nats = model.config, 0.0
    for row in dataset:
        given = [*row["question_ids"], config.plan_token_id, *row["plan_ids"], config.end_token_id]
        given.append(config.execution_token_id)
        tokens = torch.tensor([*given, *row["execution_ids"], config.end_token_id])
        with torch.no_grad():
            logits = model.backbone(tokens[None]).logits[0]
        log_probs = logits.log_softmax(dim=-1)
        nats -= sum(log_probs[i - 1, tokens[i]].item() for i in range(len(given), len(tokens)))
    measured = measure_likelihood(model, dataset, plan_is_given=True)
    assert measured["execution_nll"] == pytest.approx(nats / COUNTS["execution"], rel=1e-5)


def test_the_price_of_parallelism_is_the_difference_to_the_total_order(tmp_path, monkeypatch):
    rows = [
        {"question": "?", "plan": "x = 1 + 2\ny = 3 + 4\nz = x + y", "execution": "x = 3\ny = 7\nz = 10\n#### 10"},
        {"question": "2?", "plan": "x = 1 + 2\ny = x + 4", "execution": "x = 3\ny = 7\n#### 7"},
    ]
    graphs = {"graph": [[[], [], [0, 1]], [[], [0]]], "total": [[[], [0], [0, 1]], [[], [0]]]}
    make_checkpoint(tmp_path, execution_order="plan", step_len=16, execution_len=96, plan_len=48)
    results = {}
    for name, depends_on in graphs.items():
        lines = [json.dumps(row | {"depends_on": graph}) for row, graph in zip(rows, depends_on, strict=True)]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
        results[name] = run(tmp_path, monkeypatch, "--num_draws", "2")
    graph, total = results["graph"], results["total"]
    assert graph["total_order_nll"] == pytest.approx(total["nll"], rel=1e-6) and graph["nll"] != total["nll"]
    assert graph["price_of_parallelism"] == graph["nll"] - graph["total_order_nll"]
    assert total["price_of_parallelism"] == 0
