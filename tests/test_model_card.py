"""The card of a checkpoint says what the files of its run say, and nothing of the machine."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.data.names import is_hub_id, public_name, without_local_paths
from hierbd3lm.evaluation.checkpoints import checksum_of_weights
from hierbd3lm.hub.card import MARK, make_card, write_card
from hierbd3lm.hub.facts import Facts, read_facts
from hierbd3lm.train import main as train

from .tiny_algorithms import ALL
from .tiny_tokenizer import make_config_for, make_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
SIZES |= {"num_key_value_heads": 1, "head_dim": 16}
RUN = {"num_train_examples": 24, "num_validation_examples": 8, "max_steps": 2, "per_device_train_batch_size": 4}
RUN |= {"use_cpu": "true", "eval_noise_draws": 1, "save_strategy": "steps", "save_steps": 1, "dataset_num_proc": 1}
SUMMARY = {
    "n": 20,
    "exact_match_numeric": 0.25,
    "exact_match_numeric_interval": [0.1119, 0.4687],
    "num_forward_passes_mean": 7.5,
    "tokens_per_forward": 2.25,
    "dataset": "openai/gsm8k",
    "split": "test",
    "given_plan": None,
    "settings": {"sampler": "confidence", "threshold": 0.9, "temperature": 0.0},
}


def run_training(folder, **settings):
    settings = RUN | {"backbone": json.dumps(SIZES), "output_dir": folder} | settings
    train(["quickstart", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))])
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run, with two evaluations: one of its weights and one of others."""
    folder = run_training(tmp_path_factory.mktemp("runs") / "mine")
    checksum = checksum_of_weights(HierBD3LMForBlockDiffusion.from_pretrained(folder))
    for name, summary in {
        "eval": SUMMARY | {"checksum_of_weights": checksum},
        "old": SUMMARY | {"checksum_of_weights": checksum + 1, "exact_match_numeric": 0.95},
    }.items():
        (folder / name).mkdir()
        (folder / name / "summary.json").write_text(json.dumps(summary))
    return folder, checksum


@pytest.fixture
def card(run, tmp_path):
    folder, checksum = run
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))
    return write_card(tmp_path / "copy", "me/mine", checksum).read_text(encoding="utf-8")


def facts_of(algorithm="hier", **fields):
    config = make_config_for(make_tokenizer(), **(ALL[algorithm] | fields)).to_dict()
    return Facts(config=config)


def section(card, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)[1]


def cells(text):
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_every_run_ends_with_a_card(run):
    folder, _ = run
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert MARK in card and ModelCard(card).data.library_name == "transformers"
    assert (folder / "mask.png").read_bytes().startswith(b"\x89PNG") and "](mask.png)" in card


def test_metadata_is_what_the_hub_reads(card):
    data = ModelCard(card).data  # parses the model-index into EvalResult, and refuses what it cannot
    assert data.pipeline_tag == "text-generation" and data.model_name == "mine"
    assert {"hierbd3lm", "block-diffusion", "custom_code", "hier"} <= set(data.tags)
    assert all(isinstance(result, EvalResult) for result in data.eval_results)
    metrics = {(result.dataset_type, result.metric_type): result for result in data.eval_results}
    match = metrics["openai/gsm8k", "exact_match"]
    assert (match.metric_value, match.dataset_split, match.metric_args) == (25.0, "test", {"sampler": "confidence"})
    assert metrics["openai/gsm8k", "num_forward_passes"].metric_value == 7.5
    assert ("synthetic", "perplexity") in metrics
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["widget"][0]["text"].endswith("?")
    again = ModelCard(str(ModelCard(card)))
    assert again.data.to_dict() == data.to_dict()


def test_numbers_are_those_of_the_files(card, run):
    folder, _ = run
    report = json.loads((folder / "data_report.json").read_text())
    rows = {row[0]: row[1:] for row in cells(section(card, "Data"))}
    assert rows["examples read"] == [str(report[split]["num_examples"]) for split in ("train", "validation")]
    assert rows["dropped: too long"] == [str(report[split]["num_dropped"]) for split in ("train", "validation")]
    results = json.loads((folder / "eval_results.json").read_text())
    likelihood = {row[2]: row for row in cells(section(card, "Likelihood"))}
    for segment, prefix in {"plan": "plan_", "execution": "execution_", "both": ""}.items():
        assert likelihood[segment][3] == str(results[f"eval_{prefix}num_tokens"])
        assert float(likelihood[segment][4]) == pytest.approx(results[f"eval_{prefix}nll"], abs=1e-4)
        assert float(likelihood[segment][6]) == pytest.approx(results[f"eval_{prefix}ppl"], abs=1e-3)
    training = {row[0]: row[1] for row in cells(section(card, "Training"))}
    assert training["training steps"] == "2 of 2"
    assert training["`ema_decay`"] == "0.98" and training["`per_device_train_batch_size`"] == "4"
    model = HierBD3LMForBlockDiffusion.from_pretrained(folder)
    about = {row[0]: row[1] for row in cells(card) if len(row) == 2}
    assert about["weights"] == f"{model.num_parameters():,}"


def test_only_evaluations_of_these_weights_are_in_the_card(card, run, capture_warnings):
    folder, checksum = run
    assert "25.00 % [11.19, 46.87]" in section(card, "Evaluation") and "95.00" not in card
    assert len(read_facts(folder, checksum).evaluations) == 1
    assert sum("old/summary.json is not of these weights" in line for line in capture_warnings) == 1
    samplers = {row[0]: row[-1] for row in cells(section(card, "Samplers"))}
    assert samplers["`confidence` (default)"] == "7.5" and samplers["`entropy`"] == "not measured"
    assert "openai/gsm8k (test) only" in section(card, "Limits")


def test_a_checkpoint_of_the_run_has_the_facts_of_its_step(run):
    folder, _ = run
    facts = read_facts(folder / "checkpoint-2")
    assert facts.state["global_step"] == 2 and facts.counts and facts.record["settings"]["max_steps"] == 2
    assert facts.data["dataset"] == "synthetic"


@pytest.mark.slow
def test_the_snippet_runs_where_the_package_is_not_installed(card, run, tmp_path):
    folder, _ = run
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace("me/mine", str(folder))
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    model, tokenizer = HierBD3LMForBlockDiffusion.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    question = re.search(r'question = "(.*)"', code)[1]
    output = model.generate(**tokenizer(question, return_tensors="pt"))
    texts = [tokenizer.decode(ids[0], skip_special_tokens=True) for ids in (output.plan, output.execution)]
    assert done.stdout == "".join(f"{text}\n" for text in texts)


def test_the_snippet_of_a_chat_model_renders_the_template():
    card = str(make_card(facts_of(chat_template=True), "me/mine"))
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")
    assert "apply_chat_template" in code


@pytest.mark.parametrize("name", ALL)
def test_every_algorithm_has_a_card(name):
    card = str(make_card(facts_of(name), "me/mine"))
    assert ModelCard(card).data.tags
    assert "No answer of this model has been scored." in card
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        compile(code, "card", "exec")


def test_a_card_of_the_author_is_kept(run, tmp_path):
    folder, checksum = run
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))
    path = tmp_path / "copy" / "README.md"
    path.write_text("# Mine\n")
    assert write_card(tmp_path / "copy", "me/mine", checksum).read_text() == "# Mine\n"


# The base


@pytest.fixture
def base(tmp_path):
    """An autoregressive checkpoint in a folder, with a card that states a licence."""
    folder, tokenizer = tmp_path / "secret" / "base", make_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlicense_link: a.b/c\n---\n# Base\n")
    return folder


LENGTHS = {"question_len": 96, "plan_len": 64, "execution_len": 96, "block_size": 4}


@pytest.mark.parametrize("use_peft", [False, True])
def test_licence_and_name_of_a_base_in_a_folder_are_inherited_but_not_its_path(base, tmp_path, use_peft):
    rows = [{"question": f"{i} + 3?", "plan": "Add.", "execution": f"{i + 3}\n#### {i + 3}"} for i in range(8)]
    data = tmp_path / "secret" / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"init_from": base, "dataset": data, "output_dir": tmp_path / "run", "num_validation_examples": 2}
    settings |= LENGTHS | {"max_steps": 1, "save_strategy": "no", "use_cpu": True, "use_peft": use_peft}
    train([word for name, value in settings.items() for word in (f"--{name}", str(value))])
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.license_link) == ("other", "tiny", "a.b/c")
    assert "fine-tuned from the checkpoint `base`" in text and "own data (rows.jsonl)" in text
    assert data.base_model is None  # an id of the Hub only
    assert data.library_name == ("peft" if use_peft else "transformers")
    for name in ("README.md", "config.json", "training_config.json"):
        assert "secret" not in (tmp_path / "run" / name).read_text(encoding="utf-8"), name


def test_a_base_on_the_hub_is_named_with_its_licence(tmp_path, monkeypatch):
    facts = facts_of()
    facts.config["backbone_config"]["_name_or_path"] = "someone/base-1B"
    card = str(make_card(facts, "me/mine", {"license": "mit"}))
    data = ModelCard(card).data
    assert (data.base_model, data.license) == ("someone/base-1B", "mit")
    assert "`mit`, inherited from someone/base-1B" in section(card, "License")
    unknown = str(make_card(facts, "me/mine"))
    assert "its licence applies" in section(unknown, "License") and ModelCard(unknown).data.license is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/home/me/models/base", "base"),
        ("../models/base", "base"),
        ("a/b/c", "c"),
        ("gpt2", "gpt2"),
        ("", ""),
        (None, None),
    ],
)
def test_a_name_that_is_published_is_no_path(name, expected):
    assert public_name(name) == expected


def test_a_folder_that_looks_like_an_id_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs/base").mkdir(parents=True)
    assert not is_hub_id("outputs/base") and public_name("outputs/base") == "base"
    nested = {"a": [{"_name_or_path": "/x/y"}], "base_model_name_or_path": "outputs/base", "b": "/x/y"}
    assert without_local_paths(nested) == {
        "a": [{"_name_or_path": "y"}],
        "base_model_name_or_path": "base",
        "b": "/x/y",
    }
