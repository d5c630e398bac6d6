"""Executions are generated from given plans, each for its own question."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from hierbd3lm.evaluation.given_plans import read_plans, with_given_plans
from hierbd3lm.evaluation.runner import evaluate
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny_evaluation import SHORT, without_time


def test_given_plan_is_used_and_is_not_scored(args, rows, checkpoint):
    model = HierBD3LMForBlockDiffusion.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    predictions, summary = evaluate(args(given_plan="reference"))
    own = [prediction["execution"] for prediction in evaluate(args(overwrite=True))[0]]
    for row, prediction in zip(rows, predictions, strict=True):
        ids = {name: torch.tensor([tokenizer(row[name])["input_ids"]]) for name in ("question", "plan")}
        output = model.generate(ids["question"], plan_ids=ids["plan"], stage="execution", **SHORT)
        assert prediction["plan"] == row["plan"]
        assert prediction["execution"] == tokenizer.decode(output.execution[0])
        assert prediction["num_tokens"] == prediction["num_execution_tokens"] + output.finished.item()
    assert [prediction["execution"] for prediction in predictions] != own
    assert summary["settings"]["stage"] == "execution"
    assert summary["num_reference_plans"] == 0 and "plan_match" not in summary


def test_plan_that_is_not_there_cannot_be_given(args, rows, dataset_of):
    rows[2]["plan"] = ""
    with pytest.raises(ValueError, match="row 2: `given_plan` must hold 1 of its plans, but 'reference' has 0"):
        evaluate(args(dataset=dataset_of(rows), given_plan="reference"))
    assert evaluate(args(dataset=dataset_of(rows), overwrite=True))[1]["num_reference_plans"] == 9


def plans_of(tmp_path, plans):
    path = tmp_path / "plans.jsonl"
    lines = [json.dumps({"question": question, "plan": plan}) + "\n" for question, plan in plans]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def test_plans_of_a_file_are_found_by_the_question(args, rows, tmp_path):
    by_reference = evaluate(args(given_plan="reference"))[0]
    plans = [(row["question"], row["plan"]) for row in rows]
    source = plans_of(tmp_path, [("another question", "Mia = 1"), *reversed(plans)])
    given, summary = evaluate(args(given_plan=source, overwrite=True))
    assert without_time(given) == without_time(by_reference)
    assert summary["given_plan"] == source and "plan_match" not in summary


def test_plans_that_a_run_wrote_give_its_executions_again(args, tmp_path):
    written, _ = evaluate(args(output_dir=str(tmp_path / "written")))
    given, _ = evaluate(args(given_plan=str(tmp_path / "written" / "predictions.jsonl")))
    closed = [i for i, line in enumerate(written) if line["num_plan_tokens"] < SHORT["max_plan_len"] - 1]
    assert len(closed) >= 2  # the others were cut at their limit, and are closed when they are given
    assert [given[i]["plan"] for i in closed] == [written[i]["plan"] for i in closed]
    assert [given[i]["execution"] for i in closed] == [written[i]["execution"] for i in closed]


def test_samples_share_one_given_plan_or_have_one_each(args, rows, tmp_path):
    sampling = {"num_samples": 2, "temperature": 1.0, "limit": 3}
    shared = [(row["question"], row["plan"]) for row in rows[:3]]
    predictions, _ = evaluate(args(given_plan=plans_of(tmp_path, shared), **sampling))
    assert [line["plan"] for line in predictions] == [plan for _, plan in shared for _ in range(2)]
    own = [(question, f"Mia = {sample}") for question, _ in shared for sample in range(2)]
    predictions, _ = evaluate(args(given_plan=plans_of(tmp_path, own), overwrite=True, **sampling))
    assert [line["plan"] for line in predictions] == [plan for _, plan in own]


def test_other_plans_in_the_same_file_are_another_run(args, rows, tmp_path):
    plans = [(row["question"], row["plan"]) for row in rows]
    evaluate(args(given_plan=plans_of(tmp_path, plans)))
    plans[3] = (plans[3][0], "Mia = 1")
    with pytest.raises(ValueError, match="hash_of_data"):
        evaluate(args(given_plan=plans_of(tmp_path, plans)))


@pytest.mark.parametrize(("num_plans", "accepted"), [(0, "1"), (2, "1"), (2, "1 or num_samples=3")])
def test_wrong_number_of_plans_raises(args, rows, tmp_path, num_plans, accepted):
    plans = [(row["question"], row["plan"]) for i, row in enumerate(rows) for _ in range(num_plans if i == 4 else 1)]
    sampling = {"num_samples": 3, "temperature": 1.0} if "3" in accepted else {}
    with pytest.raises(ValueError, match=f"row 4: `given_plan` must hold {accepted} of its plans, .* has {num_plans}"):
        evaluate(args(given_plan=plans_of(tmp_path, plans), **sampling))
    assert not Path(args().output_dir).exists()


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"question": "a"}', '{"question": "a", "plan": null}', '{"question": [], "plan": ""}']
)
def test_line_without_a_plan_raises(tmp_path, line):
    path = tmp_path / "plans.jsonl"
    path.write_text('{"question": "a", "plan": ""}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .* must (be a JSON object|have the text `(question|plan)`)"):
        read_plans(path)


def test_reference_plans_of_a_dataset_without_plans_raise(args, rows, tmp_path):
    rows = [{"question": row["question"], "execution": row["execution"]} for row in rows]
    with pytest.raises(ValueError, match="`dataset` must have the column plan, but has question, execution"):
        with_given_plans(datasets.Dataset.from_list(rows), "reference")
