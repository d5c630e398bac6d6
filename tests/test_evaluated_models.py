"""A model is evaluated on what its run says, whether it comes from a run, one of its checkpoints or the Hub."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hierbd3lm.data.arguments import FILE_NAME, DataArguments
from hierbd3lm.evaluation.arguments import (
    AnalysisArguments,
    EvaluationArguments,
    LikelihoodArguments,
    SampleArguments,
)
from hierbd3lm.evaluation.checkpoints import find_data, load_model
from hierbd3lm.evaluation.lm_eval.adapter import HierBD3LMHarnessModel
from hierbd3lm.evaluation.perplexity import measure_checkpoint
from hierbd3lm.evaluation.runner import evaluate

from .tiny_evaluation import SHORT, without_time
from .tiny_tokenizer import make_tokenizer

HUB_ID = "me/tiny"
SETTINGS = {"limit": 4, "batch_size": 2, "device": "cpu"}


@pytest.fixture
def hub_model(checkpoint, tmp_path, monkeypatch):
    """The id of a checkpoint in a stand-in for the cache of the Hub, seen from an empty working directory."""
    repository = tmp_path / "hub" / "models--me--tiny"
    shutil.copytree(checkpoint, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return HUB_ID


def test_a_model_on_the_hub_answers_the_problems_of_its_run(hub_model, checkpoint, tmp_path):
    folder = EvaluationArguments(model=checkpoint, output_dir=str(tmp_path / "eval"), **SHORT, **SETTINGS)
    expected, _ = evaluate(folder)
    for _ in range(2):  # the results of the first run must not hide the model from the second
        predictions, summary = evaluate(EvaluationArguments(model=hub_model, **SHORT, **SETTINGS))
        assert without_time(predictions) == without_time(expected)
        assert summary["model"] == hub_model
    assert [path.name for path in Path().iterdir()] == ["outputs"]


def test_the_likelihood_of_a_model_on_the_hub_is_that_of_the_folder(hub_model, checkpoint, tmp_path):
    expected = measure_checkpoint(
        LikelihoodArguments(model=checkpoint, output=str(tmp_path / "new" / "folder.json"), num_draws=1, **SETTINGS)
    )
    result = measure_checkpoint(LikelihoodArguments(model=hub_model, num_draws=1, **SETTINGS))
    assert result["nll"] == expected["nll"] and (tmp_path / "new" / "folder.json").is_file()
    assert [str(path) for path in Path().rglob("*.json")] == ["outputs/me--tiny/likelihood.json"]


def test_a_checkpoint_of_a_run_is_evaluated_on_the_data_of_the_run(checkpoint, tmp_path):
    of_the_run = DataArguments(synthetic={"num_steps": [1, 1]})
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint-2")
    of_the_checkpoint = DataArguments.load(checkpoint)
    of_the_run.save(tmp_path / "run")
    model = str(tmp_path / "run" / "checkpoint-2")
    assert find_data(EvaluationArguments(model=model)) == of_the_checkpoint != of_the_run
    Path(model, FILE_NAME).unlink()
    assert find_data(EvaluationArguments(model=model)) == of_the_run
    shutil.move(model, tmp_path / "run" / "other")  # not a checkpoint of that run
    with pytest.raises(ValueError, match=f"`model` must have {FILE_NAME}"):
        find_data(EvaluationArguments(model=str(tmp_path / "run" / "other")))


def test_a_model_without_saved_arguments_needs_a_dataset(checkpoint, tmp_path):
    model = str(shutil.copytree(checkpoint, tmp_path / "model"))
    Path(model, FILE_NAME).unlink()
    with pytest.raises(ValueError, match=f"`model` must have {FILE_NAME}, .* but got '{model}'"):
        evaluate(EvaluationArguments(model=model, **SETTINGS))
    assert find_data(EvaluationArguments(model=model, dataset="gsm8k")) == DataArguments(dataset="gsm8k")


def test_a_model_whose_data_is_elsewhere_needs_a_dataset(checkpoint, tmp_path):
    model = str(shutil.copytree(checkpoint, tmp_path / "model"))
    DataArguments(dataset="data/problems.jsonl").save(model)
    with pytest.raises(ValueError, match=f"`dataset` must be given for {model}, .* data/problems.jsonl: that is not"):
        evaluate(EvaluationArguments(model=model, split="validation", **SETTINGS))
    with pytest.raises(FileNotFoundError, match=r"data/others.jsonl"):
        evaluate(EvaluationArguments(model=model, dataset="data/others.jsonl", **SETTINGS))


@pytest.mark.parametrize(
    ("arguments", "name", "place"),
    [
        (EvaluationArguments, "output_dir", "eval"),
        (LikelihoodArguments, "output", "likelihood.json"),
        (AnalysisArguments, "output_dir", "analysis"),
        (SampleArguments, "output_dir", "samples"),
    ],
)
def test_results_lie_in_the_folder_of_the_model_or_in_outputs(arguments, name, place, tmp_path):
    others = {"scorer": "gpt2", "num_samples": 1} if arguments is SampleArguments else {}
    assert getattr(arguments(model=str(tmp_path), **others), name) == str(tmp_path / place)
    assert getattr(arguments(model=HUB_ID, **others), name) == str(Path("outputs", "me--tiny", place))


def make_autoregressive(folder):
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("load", [lambda path: load_model(path, "cpu"), HierBD3LMHarnessModel])
def test_an_autoregressive_checkpoint_or_a_foreign_adapter_is_refused_in_one_sentence(load, tmp_path):
    model = make_autoregressive(tmp_path / "ar")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    for name, got in {"ar": "of type llama", "empty": "without config.json"}.items():
        path = str(tmp_path / name)
        with pytest.raises(ValueError, match=f"`model` must be a checkpoint of hierbd3lm.* but got '{path}' {got}"):
            load(path)
    with pytest.raises(ValueError, match=r"`base_model_name_or_path` in adapter_config.json of .* there is no None"):
        load(str(tmp_path / "adapter"))


@pytest.mark.parametrize("arguments", [EvaluationArguments, LikelihoodArguments, AnalysisArguments, SampleArguments])
def test_a_command_that_does_not_share_its_work_refuses_several_processes(arguments, monkeypatch):
    others = {"scorer": "gpt2", "num_samples": 1} if arguments is SampleArguments else {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="`WORLD_SIZE` must be 1"):
        arguments(model="a", **others)
    monkeypatch.setenv("WORLD_SIZE", "1")
    arguments(model="a", **others)


@pytest.mark.slow
def test_a_model_is_evaluated_in_the_precision_that_is_asked_for(checkpoint, tmp_path):
    settings = {"model": checkpoint, "output": str(tmp_path / "ppl.json"), "exact": True, **SETTINGS}
    saved, single, half = (
        measure_checkpoint(LikelihoodArguments(dtype=dtype, **settings))["nll"]
        for dtype in (None, "float32", "bfloat16")
    )
    assert saved == single != half
    assert half == pytest.approx(single, rel=0.02)
    with pytest.raises(ValueError, match="`dtype` must be one of float32, bfloat16, float16 or None, but got 'int8'"):
        EvaluationArguments(model=checkpoint, dtype="int8")
