"""What the evaluation reports is what the model wrote."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from hierbd3lm import eval_gsm8k
from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.gsm8k.answers import wilson_interval
from hierbd3lm.eval_gsm8k import parse_arguments
from hierbd3lm.evaluation import checkpoints
from hierbd3lm.evaluation.checkpoints import find_data
from hierbd3lm.evaluation.prompts import make_batches, read_problems
from hierbd3lm.evaluation.runner import evaluate
from hierbd3lm.evaluation.scoring import format_summary
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny_evaluation import FOREIGN_TOKEN, MODEL_SETTINGS, SHORT, read_lines, read_summary, without_time

# Scores


def test_reference_texts_score_one(args, rows, script):
    script({row["question"]: (row["plan"], row["execution"]) for row in rows})
    _, summary = evaluate(args())
    for name in ("exact_match_strict", "exact_match_flexible", "exact_match_numeric", "plan_match", "finished"):
        assert summary[name] == 1.0
    assert summary["unparsable"] == 0.0


def test_wrong_texts_score_zero(args, rows, script):
    script({row["question"]: ("Mia = 1", f"#### {int(row['answer']) + 1}") for row in rows})
    _, summary = evaluate(args())
    for name in ("exact_match_strict", "exact_match_flexible", "exact_match_numeric", "plan_match", "unparsable"):
        assert summary[name] == 0.0


# execution of a problem whose answer is 5 -> (strict, flexible, numeric, unparsable)
CASES = {
    "2 + 3 = 5\n#### 5": (True, True, True, False),
    "#### 05": (False, False, True, False),
    " 1 2 5": (False, True, False, True),
    "": (False, False, False, True),
    "#### 5 Question: #### 7": (True, True, True, False),
    f"#### 5{FOREIGN_TOKEN} 7": (True, True, True, False),
    f"2{FOREIGN_TOKEN}#### 5": (False, False, False, True),
}
NAMES = ("exact_match_strict", "exact_match_flexible", "exact_match_numeric", "unparsable")


def test_summary_is_what_the_lines_say(args, script, dataset_of):
    """Against cases judged by hand, and sums over the lines."""
    rows = [{"question": f"{i}", "plan": " Mia", "execution": "#### 5"} for i in range(len(CASES))]
    script({f"{i}": ("Mia\n" if i < 2 else "Tom", text) for i, text in enumerate(CASES)})
    run = args(dataset=dataset_of(rows), limit=None)
    predictions, summary = evaluate(run)
    lines = read_lines(run)
    assert lines == predictions
    assert [line["execution"] for line in lines] == list(CASES)
    assert [tuple(line[name] for name in NAMES) for line in lines] == list(CASES.values())
    assert [line["plan_match"] for line in lines] == [True, True, *[False] * (len(CASES) - 2)]
    n = len(CASES)
    rates = dict(zip(NAMES, ([sum(column) for column in zip(*CASES.values(), strict=True)]), strict=True))
    for name, count in (rates | {"plan_match": 2, "finished": n}).items():
        assert summary[name] == count / n
        assert summary[f"{name}_interval"] == list(wilson_interval(count, n))
    assert (summary["n"], summary["num_reference_plans"]) == (n, n)
    assert summary["num_tokens"] == sum(line["num_plan_tokens"] + line["num_execution_tokens"] + 2 for line in lines)
    assert summary["num_forward_passes"] == sum(-(-line["num_tokens"] // 4) for line in lines)
    assert summary["num_forward_passes_mean"] == summary["num_forward_passes"] / n
    assert summary["tokens_per_forward"] == summary["num_tokens"] / summary["num_forward_passes"]
    assert summary["seconds"] == pytest.approx(sum(line["seconds"] for line in lines))
    assert summary["seconds"] > 0
    assert summary["tokens_per_second"] == pytest.approx(summary["num_tokens"] / summary["seconds"])
    assert summary == read_summary(run)


def test_summary_names_the_run(args, checkpoint):
    _, summary = evaluate(args(limit=2, sampler="entropy", entropy_bound=0.5, seed=7))
    named = {"model": checkpoint, "dataset": "synthetic", "split": "test", "seed": 7, "batch_size": 3}
    assert summary == summary | named
    assert summary["versions"].keys() == {"hierbd3lm", "torch", "transformers"}
    assert summary["settings"].keys() == MODEL_SETTINGS
    given = {"sampler": "entropy", "entropy_bound": 0.5, "seed": 7, "stage": "full", "threshold": 0.9}
    assert summary["settings"] == summary["settings"] | given


# Several samples

# executions of four samples of a problem whose answer is 5 -> what wins, how many are right
VOTES = [
    (("#### 5", "#### 5", "#### 7", "#### 7"), "tie, the right value first", 2),
    (("#### 7", "#### 5", "Mia", "#### 5"), "right", 2),
    (("5", "", "####5", "#### Mia"), "no votes", 0),
    (("#### 7", "#### 05", "#### 5.0", "#### 5 Question: #### 7"), "right", 3),
    (("#### 7", "#### 7", "#### 7", "#### 5"), "wrong", 1),
    (("#### 7", "#### 5", "#### 6", "Mia"), "tie, a wrong value first", 1),
]


def test_majority_and_pass_at_k_are_what_the_samples_say(args, script, dataset_of):
    """Against votes counted by hand, and all subsets of the samples."""
    rows = [{"question": f"{i}", "plan": "Mia", "execution": "#### 5"} for i in range(len(VOTES))]
    script({f"{i}": [("Mia", text) for text in texts] for i, (texts, _, _) in enumerate(VOTES)})
    run = args(dataset=dataset_of(rows), limit=None, num_samples=4, temperature=1.0)
    predictions, summary = evaluate(run)
    n = len(VOTES)
    assert read_lines(run) == predictions and summary == read_summary(run)
    assert [(line["index"], line["sample"]) for line in predictions] == list(itertools.product(range(n), range(4)))
    assert [line["execution"] for line in predictions] == [text for texts, _, _ in VOTES for text in texts]
    assert (summary["n"], summary["num_samples"]) == (n, 4)
    assert (summary["num_unparsable_votes"], summary["num_without_votes"], summary["num_tied_votes"]) == (6, 1, 2)
    num_won = sum(outcome in ("right", "tie, the right value first") for _, outcome, _ in VOTES)
    assert summary["majority_vote"] == num_won / n
    assert summary["majority_vote_interval"] == list(wilson_interval(num_won, n))
    for k in range(1, 5):
        hits = [[i < right for i in range(4)] for _, _, right in VOTES]
        expected = [any(subset) for samples in hits for subset in itertools.combinations(samples, k)]
        assert summary[f"pass_at_{k}"] == pytest.approx(sum(expected) / len(expected))
    assert summary["pass_at_1"] == pytest.approx(summary["exact_match_numeric"])
    assert summary["unparsable"] == pytest.approx(6 / (4 * n))
    low, high = summary["pass_at_2_interval"]
    assert low < summary["pass_at_2"] < high
    printed = format_summary(summary).splitlines()
    assert [line.split("  ")[0] for line in printed if "vote" in line or "pass at" in line] == [
        "majority vote",
        *(f"pass at {k}" for k in (1, 2, 4)),
    ]


def test_one_sample_has_no_vote(args):
    _, summary = evaluate(args(limit=2))
    assert summary["num_samples"] == 1
    assert not [name for name in summary if "vote" in name or "pass_at" in name]


def test_every_sample_has_a_plan_of_its_own_and_the_first_is_that_of_a_run_with_one(args):
    sampling = {"temperature": 1.0, "seed": 3}
    predictions, _ = evaluate(args(num_samples=3, **sampling))
    alone, _ = evaluate(args(overwrite=True, **sampling))
    assert without_time(predictions[::3]) == without_time(alone)
    plans = [{line["plan"] for line in predictions[3 * i : 3 * i + 3]} for i in range(10)]
    assert sum(len(of_one) > 1 for of_one in plans) >= 8


def test_greedy_samples_are_refused_before_anything_is_written(args):
    with pytest.raises(ValueError, match=r"`temperature` must be > 0 for num_samples=2, but got 0\.0"):
        evaluate(args(num_samples=2))
    assert not Path(args().output_dir).exists()


def test_number_of_samples_is_part_of_the_run(args):
    evaluate(args(temperature=1.0))
    with pytest.raises(ValueError, match="num_samples: 1 stored, 2 now"):
        evaluate(args(temperature=1.0, num_samples=2))


# What is generated


def test_every_problem_is_answered_as_if_alone(args, checkpoint, rows):
    model = HierBD3LMForBlockDiffusion.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    predictions, _ = evaluate(args())
    assert [prediction["index"] for prediction in predictions] == list(range(10))
    assert len({prediction["execution"] for prediction in predictions}) > 1
    for row, prediction in zip(rows, predictions, strict=True):
        question = torch.tensor([tokenizer(row["question"])["input_ids"]])
        output = model.generate(question, **SHORT)
        answer = output.sequences[0, question.shape[1] :].tolist()
        plan, execution = output.plan[0].tolist(), output.execution[0].tolist()
        assert prediction["question"] == row["question"]
        assert prediction["reference_answer"] == row["answer"]
        assert prediction["reference_plan"] == row["plan"]
        assert (prediction["plan"], prediction["execution"]) == (tokenizer.decode(plan), tokenizer.decode(execution))
        assert prediction["num_forward_passes"] == output.num_forward_passes.item()
        num_closed = (model.config.end_token_id in answer[: len(plan) + 2]) + (
            model.config.end_token_id in answer[answer.index(model.config.execution_token_id) :]
        )
        assert prediction["num_tokens"] == len(plan) + len(execution) + num_closed
        assert (prediction["num_plan_tokens"], prediction["num_execution_tokens"]) == (len(plan), len(execution))
        assert prediction["tokens_per_forward"] == pytest.approx(
            prediction["num_tokens"] / prediction["num_forward_passes"]
        )
        assert prediction["finished"] == (num_closed == 2) == output.finished.item()


def test_problems_of_a_batch_are_alike_in_length_and_the_order_is_restored(args, rows, script):
    scripted = script({row["question"]: (row["plan"], row["execution"]) for row in rows})
    predictions, _ = evaluate(args())
    assert [prediction["question"] for prediction in predictions] == [row["question"] for row in rows]
    lengths = [len(scripted.tokenizer(question)["input_ids"]) for batch in scripted.batches for question in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths != [len(scripted.tokenizer(row["question"])["input_ids"]) for row in rows]
    assert [len(batch) for batch in scripted.batches] == [3, 3, 3, 1]


def test_limit_takes_the_first_examples(args, rows, dataset_of):
    run = args(dataset=dataset_of(rows), limit=4)
    predictions, summary = evaluate(run)
    assert summary["n"] == 4
    assert [prediction["question"] for prediction in predictions] == [row["question"] for row in rows[:4]]


def test_all_of_a_dataset_is_taken_but_so_many_synthetic_problems(args, rows, dataset_of, script, monkeypatch):
    monkeypatch.setattr(checkpoints, "NUM_SYNTHETIC", 6)
    script({row["question"]: (row["plan"], row["execution"]) for row in rows})
    assert evaluate(args(dataset=dataset_of(rows), limit=None))[1]["n"] == 10
    assert evaluate(args(limit=None, overwrite=True))[1]["n"] == 6


@pytest.mark.parametrize("given_plan", [None, "reference"])
def test_too_long_prompts_stay_in_n_and_are_wrong(args, rows, dataset_of, script, given_plan):
    rows[1]["question"] = "How many apples does Mia have?" * 20
    rows[3]["plan"] = "Mia = Tom + 1\n" * 20
    scripted = script({row["question"]: (row["plan"], row["execution"]) for row in rows})
    run = args(dataset=dataset_of(rows), given_plan=given_plan)
    predictions, summary = evaluate(run)
    is_left_out = [i == 1 or (i == 3 and given_plan is not None) for i in range(10)]
    assert [bool(prediction["too_long"]) for prediction in predictions] == is_left_out
    assert sum(map(len, scripted.batches)) == 10 - sum(is_left_out)
    assert (summary["n"], summary["num_too_long"]) == (10, 1)
    assert summary["num_plan_too_long"] == sum(is_left_out) - 1
    assert summary["exact_match_strict"] == 1 - sum(is_left_out) / 10
    assert summary["unparsable"] == sum(is_left_out) / 10
    assert summary["num_forward_passes_mean"] == summary["num_forward_passes"] / (10 - sum(is_left_out))
    assert predictions[1]["execution"] == "" and predictions[1]["num_forward_passes"] == 0


def test_nothing_but_too_long_questions_still_gives_a_report(args, rows, dataset_of):
    rows[0]["question"] *= 20
    _, summary = evaluate(args(dataset=dataset_of(rows[:1])))
    assert (summary["n"], summary["num_too_long"], summary["exact_match_strict"]) == (1, 1, 0.0)
    assert summary["tokens_per_forward"] is summary["num_forward_passes_mean"] is None


@pytest.mark.parametrize("given_plan", [None, "reference"])
def test_problems_with_special_tokens_are_not_answered_and_counted(args, rows, dataset_of, given_plan):
    rows[2]["question"], rows[4]["plan"] = "<|mask|>", "a <|end|>"
    predictions, summary = evaluate(args(dataset=dataset_of(rows), given_plan=given_plan))
    left_out = [2] if given_plan is None else [2, 4]
    assert [line["index"] for line in predictions if line["has_special_token"]] == left_out
    assert [line["index"] for line in predictions if line["num_forward_passes"] == 0] == left_out
    assert (summary["n"], summary["num_with_special_tokens"]) == (len(rows), len(left_out))
    assert f"special token in text     {len(left_out):6}" in format_summary(summary)


def test_reference_without_an_answer_raises(args, rows, dataset_of):
    rows[2] |= {"execution": "5", "answer": None}
    with pytest.raises(ValueError, match="row 2: `text` must end with '#### '"):
        evaluate(args(dataset=dataset_of(rows)))


# Arguments


def test_data_is_what_the_checkpoint_was_trained_on_unless_given(args):
    trained_on = DataArguments(synthetic={"num_steps": [1, 2]})
    assert find_data(args()) == find_data(args(dataset="synthetic")) == trained_on
    assert find_data(args(dataset="gsm8k")) == DataArguments(dataset="gsm8k")


def test_file_that_was_trained_on_is_no_test_split(args, rows, dataset_of, tmp_path):
    path = dataset_of(rows)
    DataArguments(dataset=path).save(tmp_path)
    for dataset in (None, path):
        with pytest.raises(ValueError, match="`split` must be train or validation"):
            find_data(args(model=str(tmp_path), dataset=dataset))
    assert find_data(args(model=str(tmp_path), split="validation")).dataset == path


def test_every_generation_setting_can_be_given():
    values = {"sampler": "entropy", "num_steps": 3, "threshold": 0.5, "entropy_bound": 0.2, "tokens_per_step": 2}
    values |= {"temperature": 0.7, "top_p": 0.8, "fill_after_end": False, "max_plan_len": 8, "max_execution_len": 8}
    values |= {"seed": 5, "block_size": 2, "max_new_tokens": 16, "compile_steps": True, "left_to_right": True}
    assert values.keys() | {"stage"} == MODEL_SETTINGS
    argv = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    assert parse_arguments(["--model", "a", *argv]).generation_settings() == values | {"stage": "full"}
    assert parse_arguments(["--model", "a"]).generation_settings() == {"stage": "full", "seed": 0}
    given = parse_arguments(["--model", "a", "--given_plan", "reference"]).generation_settings()
    assert given == {"stage": "execution", "seed": 0}


@pytest.mark.parametrize(
    ("name", "value"),
    [("limit", 0), ("batch_size", 0), ("num_samples", 0), ("num_examples_to_print", -1), ("given_plan", "mine")],
)
def test_argument_out_of_range_raises(args, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, but got .*{value}"):
        args(**{name: value})


def test_generation_setting_out_of_range_raises_before_anything_is_written(args):
    for name, value in (("threshold", 2.0), ("max_plan_len", 5)):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            evaluate(args(**{name: value}))
    assert not Path(args().output_dir).exists()


def test_batches_are_grouped_by_length_in_any_order_of_the_problems(checkpoint, rows):
    config = HierBD3LMForBlockDiffusion.from_pretrained(checkpoint).config
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    problems = read_problems(datasets.Dataset.from_list(rows), tokenizer, config, plans_are_given=False)
    shuffled = random.Random(0).sample(problems, len(problems))
    widths = [[len(problem.question_ids) for problem in batch] for batch in make_batches(problems, 3)]
    assert widths == [[len(problem.question_ids) for problem in batch] for batch in make_batches(shuffled, 3)]


def test_main_prints_examples_and_the_table(args, rows, checkpoint, script, monkeypatch, capsys, tmp_path):
    script({row["question"]: (row["plan"], row["execution"]) for row in rows})
    argv = ["--model", checkpoint, "--limit", "10", "--output_dir", str(tmp_path / "eval"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["eval_gsm8k.py", *argv, "--num_examples_to_print", "2"])
    eval_gsm8k.main()
    printed = capsys.readouterr().out
    for i in range(3):
        assert (f"Question: {rows[i]['question']}\nPlan:\n{rows[i]['plan']}\n" in printed) == (i < 2)
    assert "exact match strict        100.00 %  [72.25, 100.00]" in printed


@pytest.mark.slow
def test_script_runs_from_the_root(checkpoint, tmp_path):
    argv = ["--model", checkpoint, "--limit", "3", "--output_dir", str(tmp_path / "eval"), "--device", "cpu"]
    subprocess.run(
        [sys.executable, "eval_gsm8k.py", *argv],
        cwd=Path(eval_gsm8k.__file__).parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    assert json.loads((tmp_path / "eval" / "summary.json").read_text())["n"] == 3
