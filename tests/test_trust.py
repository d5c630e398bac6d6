"""What a user trusts the package with: no network that is not asked for, no pickle, no damaged checkpoint."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hierbd3lm
from hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.evaluation.checkpoints import load_model

from .tiny_tokenizer import make_config_for, make_tokenizer

ROOT = Path(hierbd3lm.__file__).parent
OUTSIDE = {"tests", "benchmarks", "examples", "docs", "build", ".venv", "outputs"}
SOURCES = [path for path in ROOT.rglob("*.py") if not OUTSIDE & set(path.relative_to(ROOT).parts)]
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
# A process in which every attempt to leave the machine is an error that is printed.
WITHOUT_NETWORK = """
import socket
import sys

def refuse(*args, **kwargs):
    print("NETWORK", args, file=sys.stderr)
    raise OSError("this process has no network")

socket.getaddrinfo = socket.create_connection = refuse
socket.socket.connect = socket.socket.connect_ex = refuse
from hierbd3lm.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def folder(tmp_path):
    tokenizer = make_tokenizer()
    HierBD3LMForBlockDiffusion(make_config_for(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_weights(folder, change):
    model = HierBD3LMForBlockDiffusion.from_pretrained(folder)
    state = model.state_dict()
    change(state)
    model.save_pretrained(folder, state_dict=state)


# Network and pickles


@pytest.mark.slow
def test_training_and_evaluation_of_local_files_use_no_network(tmp_path):
    row = {"question": "2 + 3?", "plan": "2 + 3", "execution": "5\n#### 5"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(12)))
    train = ["train", "quickstart", "--dataset", "rows.jsonl", "--output_dir", "run", "--max_steps", "2"]
    train += ["--num_validation_examples", "4", "--per_device_train_batch_size", "4", "--use_cpu", "true"]
    train += ["--backbone", json.dumps(SIZES | {"num_key_value_heads": 1, "head_dim": 16}), "--synthetic", "null"]
    train += ["--num_train_examples", "null", "--dataset_num_proc", "null", "--eval_noise_draws", "1"]
    model = ["--model", "run", "--split", "validation", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(tmp_path / "home")}
    for arguments in (train, ["eval", *model], ["ppl", *model, "--num_draws", "1"]):
        command = [sys.executable, "-c", WITHOUT_NETWORK, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0 and "NETWORK" not in done.stderr, done.stderr[-3000:]
    assert (tmp_path / "run" / "README.md").is_file()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_reads_a_pickle(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"} & set(names)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("weights_only") == "True" or given.get("allow_pickle") == "False", ast.unparse(node)


def test_weights_in_a_pickle_are_not_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError)):
        load_model(str(folder), "cpu")


# Damaged checkpoints


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(folder, value):
    change_weights(folder, lambda state: state["backbone.model.norm.weight"].fill_(value))
    with pytest.raises(ValueError, match=r"weights must be finite, but 1 of .* such as .*model\.norm\.weight"):
        load_model(str(folder), "cpu")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_that_is_cut_off_is_refused(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"weights must be whole, but a file of .* is damaged"):
        load_model(str(folder), "cpu")


def test_weights_that_are_missing_are_refused_by_name(folder):
    change_weights(folder, lambda state: state.pop("backbone.model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"must be whole, but .* lacks 1, such as .*layers\.0\.mlp\.up_proj\.weight"):
        load_model(str(folder), "cpu")


@pytest.mark.parametrize("token", ["<|plan|>", "<|end|>"])
def test_a_tokenizer_that_lost_a_special_token_is_refused(folder, token):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [item for item in content["added_tokens"] if item["content"] != token]
    path.write_text(json.dumps(content), encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("extra_special_tokens", None)
    settings.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"`tokenizer`"):
        load_model(str(folder), "cpu")


def test_the_tokenizer_of_another_model_is_refused(folder):
    tokenizer = make_tokenizer()
    config = make_config_for(tokenizer)
    config.plan_token_id, config.execution_token_id = config.execution_token_id, config.plan_token_id
    HierBD3LMForBlockDiffusion(config).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"`tokenizer` of .* must have the id \d+ for <\|plan\|>, but got \d+"):
        load_model(str(folder), "cpu")
