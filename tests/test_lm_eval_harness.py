"""Tasks of lm-evaluation-harness with the model `hierbd3lm`."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import yaml
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager, get_task_dict

from hierbd3lm.data.gsm8k.answers import extract_flexible, extract_strict
from hierbd3lm.data.gsm8k.problems import load_gsm8k_rows
from hierbd3lm.evaluation.arguments import EvaluationArguments
from hierbd3lm.evaluation.lm_eval.adapter import HierBD3LMHarnessModel
from hierbd3lm.evaluation.runner import evaluate

from .tiny_lm_eval import DIGITS, QUESTIONS, TASKS, requests_of, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_task_is_scored_like_gsm8k_of_the_harness():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    own = yaml.load((TASKS / "gsm8k_hier.yaml").read_text(), Loader)
    theirs = yaml.safe_load(Path(lm_eval.__file__).with_name("tasks").joinpath("gsm8k", "gsm8k.yaml").read_text())
    for name in ("filter_list", "metric_list", "generation_kwargs", "output_type", "doc_to_target", "metadata"):
        assert own[name] == theirs[name]
    assert (own["doc_to_text"], own["num_fewshot"]) == ("{{question}}", 0)


@pytest.mark.slow
def test_task_with_examples_is_gsm8k_of_the_harness_on_our_rows(tmp_path, monkeypatch):
    for split, numbers in (("train", range(9)), ("test", range(20, 23))):
        rows = [{"question": f"Mia has {i} apples.", "answer": f"So <<{i}+0={i}>>{i}.\n#### {i}"} for i in numbers]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("GSM8K_DIR", str(tmp_path))
    task = get_task_dict(["gsm8k_fewshot"], TaskManager(include_path=str(TASKS)))["gsm8k_fewshot"]
    path = Path(lm_eval.__file__).with_name("tasks").joinpath("gsm8k", "gsm8k.yaml")
    theirs = yaml.safe_load(path.read_text())
    splits = {split: load_gsm8k_rows(split) for split in ("train", "test")}
    for name in ("tag", "dataset_path", "dataset_name"):
        del theirs[name]
    expected = ConfigurableTask(config=theirs | {"custom_dataset": lambda **_: splits})
    for made in (task, expected):
        made.set_fewshot_seed(1234)
        made.build_all_requests()
    assert [request.args for request in task.instances] == [request.args for request in expected.instances]
    prompt, settings = task.instances[0].args
    assert prompt.count("Question: Mia has") == 6 and prompt.endswith("20 apples.\nAnswer:")
    assert "Question:" in settings["until"]
    assert [task.config.metric_list, task.config.filter_list] == [theirs["metric_list"], theirs["filter_list"]]


def run_task(lm, rows, **fields):
    task = ConfigurableTask(
        config={
            "task": "own",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "doc_to_target": "{{answer}}",
            **fields,
        }
    )
    return lm_eval.evaluate(lm, {"own": task}, bootstrap_iters=0)["results"]["own"]


def test_harness_chooses_the_likeliest_choice(checkpoint):
    lm = HierBD3LMHarnessModel(checkpoint, num_draws=4, batch_size=4, device="cpu")
    rows = [{"question": question, "answer": i % 3} for i, question in enumerate(QUESTIONS * 2)]
    choices = {"output_type": "multiple_choice", "doc_to_choice": ["1", "2", "5 5"], "target_delimiter": ""}
    accuracy = run_task(lm, rows, doc_to_text="{{question}}", **choices)["acc,none"]
    right = []
    for row in rows:
        pairs = [(row["question"], choice) for choice in choices["doc_to_choice"]]
        values = [value for value, _ in lm.loglikelihood(requests_of("loglikelihood", *pairs))]
        right.append(values.index(max(values)) == row["answer"])
    assert accuracy == pytest.approx(sum(right) / len(right))
    assert 0 < accuracy < 1


def test_harness_measures_bits_per_byte(checkpoint):
    lm = HierBD3LMHarnessModel(checkpoint, num_draws=4, batch_size=4, device="cpu")
    texts = ["Mia has 12 apples.\n" * 3, "5"]
    task = {"output_type": "loglikelihood_rolling", "doc_to_text": ""}
    results = run_task(lm, [{"answer": text} for text in texts], **task)
    values = lm.loglikelihood_rolling(requests_of("loglikelihood_rolling", *((text,) for text in texts)))
    num_bytes = sum(map(len, texts))
    assert results["bits_per_byte,none"] == pytest.approx(-sum(values) / num_bytes / math.log(2))


@pytest.mark.slow
def test_command_line_gives_the_scores_of_eval_gsm8k(tmp_path):
    """Use problems of which the model solves a part: their answers are taken from its output."""
    written = ["####", *(f" {digit}" for digit in DIGITS)]
    folder = save_checkpoint(tmp_path / "model", written, question_len=16, execution_len=16)
    questions = [f"Mia has {a} apples.\n{b}?" for a in range(10) for b in range(4)]
    environment = {"GSM8K_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["HF_HOME"] = str(tmp_path / "home")

    def our_evaluation(answers):
        rows = [{"question": q, "answer": f"#### {a}"} for q, a in zip(questions, answers, strict=True)]
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        output = tmp_path / "ours"
        arguments = {"dataset": "gsm8k", "device": "cpu", "batch_size": 8, "overwrite": True}
        return evaluate(EvaluationArguments(folder, output_dir=str(output), **arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GSM8K_DIR", str(tmp_path))
        texts = [line["execution"] for line in our_evaluation(["0"] * len(questions))[0]]
        readers = itertools.cycle([extract_strict, extract_flexible, lambda text: "-1"])
        answers = [reader(text) for reader, text in zip(readers, texts, strict=False)]
        _, ours = our_evaluation(["-1" if answer == "[invalid]" else answer for answer in answers])
    argv = ["--model", "hierbd3lm", "--model_args", f"pretrained={folder}", "--batch_size", "8", "--device", "cpu"]
    argv += [
        "--include_path",
        str(TASKS),
        "--tasks",
        "gsm8k_hier",
        "--output_path",
        str(tmp_path / "out"),
    ]
    subprocess.run(
        [sys.executable, "-m", "hierbd3lm.evaluation.lm_eval", *argv],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())
    theirs = results["results"]["gsm8k_hier"]
    assert results["n-samples"]["gsm8k_hier"]["effective"] == ours["n"] == 40
    assert theirs["exact_match,strict-match"] == pytest.approx(ours["exact_match_strict"])
    assert theirs["exact_match,flexible-extract"] == pytest.approx(ours["exact_match_flexible"])
    assert 0 < ours["exact_match_strict"] < ours["exact_match_flexible"] < 1
    assert results["config"]["num_too_long_questions"] == ours["num_too_long"] == 0
