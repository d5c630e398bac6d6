"""The command line of lm-evaluation-harness: flags of chats, and several processes."""

import functools
import json
import os
import subprocess
import sys

import lm_eval
import pytest
import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from hierbd3lm.data.tokenization import train_tokenizer
from hierbd3lm.evaluation.lm_eval import __main__ as command
from hierbd3lm.evaluation.lm_eval.adapter import UNANSWERED, HierBD3LMHarnessModel
from hierbd3lm.evaluation.lm_eval.processes import device_of_process, gather

from .tiny import make_model
from .tiny_lm_eval import GREEDY, save_checkpoint

TOO_LONG = "1" * 20
ROWS = [{"question": f"Mia has {i} apples.", "answer": str(i)} for i in range(6)]
PROCESS = """
import json, sys
from hierbd3lm.evaluation.lm_eval.adapter import HierBD3LMHarnessModel
from tests.test_lm_eval_command import evaluate_rows

lm = HierBD3LMHarnessModel(sys.argv[1], num_draws=2, device="cpu")
results, num_requests = evaluate_rows(lm)
with open(f"{sys.argv[2]}/{lm.rank}.json", "w") as file:
    json.dump({"results": results, "num_requests": num_requests, "info": lm.get_model_info()}, file)
"""


def make_task(kind):
    config = {"task": kind, "test_split": "test", "doc_to_text": "{{question}}", "output_type": kind}
    if kind == "multiple_choice":
        rows = ROWS
        config |= {"doc_to_choice": ["1", "2"], "doc_to_target": 0, "target_delimiter": ""}
    else:
        rows = [*ROWS, {"question": TOO_LONG, "answer": "1"}]
        config |= {"doc_to_target": "{{answer}}", "generation_kwargs": GREEDY}
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}})


def evaluate_rows(lm):
    """The results and answers of two tasks, and the number of requests that reached the model."""
    counts = {}

    def count(kind, answer, requests):
        counts[kind] = len(requests)
        return answer(requests)

    for kind in ("generate_until", "loglikelihood"):
        setattr(lm, kind, functools.partial(count, kind, getattr(lm, kind)))
    tasks = {kind: make_task(kind) for kind in ("generate_until", "multiple_choice")}
    output = lm_eval.evaluate(lm, tasks, bootstrap_iters=0, log_samples=True)
    if output is None:
        return None, counts
    samples = {
        kind: sorted((line["doc_id"], json.dumps(line["filtered_resps"])) for line in lines)
        for kind, lines in output["samples"].items()
    }
    return {"results": output["results"], "samples": samples}, counts


@pytest.mark.parametrize(
    "flag", [["--apply_chat_template"], ["--system_instruction", "Hi"], ["--system_instruction=Hi"]]
)
def test_flags_of_chats_are_refused_before_a_model_is_loaded(flag):
    name = flag[0].partition("=")[0]
    for model in (["--model", "hierbd3lm"], ["-M", "hierbd3lm"], ["--model=hierbd3lm"]):
        with pytest.raises(ValueError, match=f"`{name}` must not be given with `--model hierbd3lm`"):
            command.main([*model, "--model_args", "pretrained=nowhere", "--tasks", "gsm8k_hier", *flag])
    command.check_flags(["--model", "hf", *flag])
    command.check_flags(["--model", "hierbd3lm", "--tasks", "gsm8k_hier"])


def test_a_chat_template_is_refused_in_one_sentence(tmp_path):
    lm = HierBD3LMHarnessModel(save_checkpoint(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="`apply_chat_template` must be False for hierbd3lm"):
        lm_eval.evaluate(lm, {"own": make_task("generate_until")}, bootstrap_iters=0, apply_chat_template=True)
    with pytest.raises(ValueError, match="`apply_chat_template` must be False for hierbd3lm"):
        lm.chat_template(True)


def test_a_question_that_the_harness_repeats_is_counted_once(tmp_path):
    lm = HierBD3LMHarnessModel(save_checkpoint(tmp_path), device="cpu")
    request = Instance("generate_until", {}, (TOO_LONG, GREEDY), 0)
    assert lm.generate_until([request] * 3) == [""] * 3
    assert lm.get_model_info()["num_too_long_questions"] == 1


def test_each_of_several_processes_has_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of_process(torch.device("cuda:0"), 4) == torch.device("cuda:3")
    assert device_of_process(torch.device("cuda:0"), 1) == torch.device("cuda:0")
    assert device_of_process(torch.device("cpu"), 4) == torch.device("cpu")
    assert gather("a", 1) == ["a"]


@pytest.mark.slow
def test_two_processes_share_the_requests_and_have_the_results_of_one(tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    (tmp_path / "process.py").write_text(PROCESS)
    root = str(command.TASKS.parents[2])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*launch, str(tmp_path / "process.py"), folder, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    alone, counts = evaluate_rows(HierBD3LMHarnessModel(folder, num_draws=2, device="cpu"))
    assert second["results"] is None and first["results"] == json.loads(json.dumps(alone))
    assert counts == {"generate_until": 7, "loglikelihood": 12}
    assert first["num_requests"] == second["num_requests"] == {"generate_until": 4, "loglikelihood": 6}
    assert [first["info"][name] for name in UNANSWERED] == [1, 0]


def test_the_causal_model_of_the_harness_scores_no_tokens_that_see_themselves(tmp_path):
    model = make_model(question_len=24)
    tokens = torch.tensor([[7, 8, 9, 10, 11]])
    with pytest.raises(ValueError, match="`segment_ids` must be given for `input_ids` without"):
        model(tokens)
    assert model(tokens, segment_ids=torch.zeros_like(tokens)).logits.shape == (1, 5, 40)
    tokenizer = train_tokenizer(["Mia has apples.", "?"])
    tokenizer.eos_token = "<|end|>"  # which that model needs
    lm = HFLM(model, tokenizer=tokenizer, backend="causal")
    with pytest.raises(ValueError, match="`hierbd3lm lm-eval --model hierbd3lm` measure"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("Mia has", " apples."), 0)])


@pytest.mark.parametrize("fields", [{"algorithm": "ar", "block_size": None}, {"prediction": "shifted"}])
def test_models_whose_question_is_causal_are_scored_like_their_backbone(fields):
    fields |= {} if "algorithm" in fields else {"question_attention": "causal"}
    model = make_model(question_len=24, **fields)
    tokens = torch.tensor([[7, 8, 9, 10, 11]])
    torch.testing.assert_close(model(tokens).logits, model.backbone(tokens).logits)
