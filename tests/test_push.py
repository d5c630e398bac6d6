"""Pushes to the Hub, which is a server on loopback: what it holds can be loaded, at every moment of a run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

import hierbd3lm.data.upload as upload
from hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.upload import commit_files, is_transient
from hierbd3lm.hub.files import model_files
from hierbd3lm.hub.push import push
from hierbd3lm.training.lora import add_adapter
from hierbd3lm.training.settings import AdapterArguments

from .hub_server import running_hub
from .test_model_card import base  # noqa: F401  (a fixture)
from .tiny import make_config, make_dataset
from .tiny_tokenizer import make_config_for, make_tokenizer
from .tiny_trainer import make_trainer, seeded_model

LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    print(type(model).__name__, model.generate(**tokenizer("2 + 3?", return_tensors="pt")).sequences.tolist())
"""
ROOT = Path(__file__).parents[1]
CODE = {path.name for path in ROOT.glob("*_hierbd3lm.py")}
MODEL = CODE | {"config.json", "generation_config.json", "model.safetensors", "README.md"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
CARD = {"README.md", "mask.png"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
FOLDERS = {
    "end": [],
    "every_save": [],
    "checkpoint": ["last-checkpoint"],
    "all_checkpoints": ["checkpoint-1", "checkpoint-2"],
}


@pytest.fixture
def hub(monkeypatch):
    """A server that this process takes for the Hub."""
    with running_hub() as server:
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr(upload, "WAITS", (0.01, 0.01))
        for name, value in (("ENDPOINT", server.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield server


@pytest.fixture
def folder(tmp_path):
    """A tiny checkpoint with its tokenizer, and files that nobody else needs."""
    folder, tokenizer = tmp_path / "mine", make_tokenizer()
    HierBD3LMForBlockDiffusion(make_config_for(tokenizer, question_len=128)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("training_args.bin", "notes.txt", "data.py", "events.out", ".env"):
        (folder / name).write_text("mine")
    (folder / "eval").mkdir()
    (folder / "eval" / "predictions.jsonl").write_text("{}\n")
    return folder


def load_elsewhere(hub, home, *names):
    """What a process without the package generates with models of the server."""
    environment = hub.environment(home)
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names], env=environment, capture_output=True, text=True, cwd=home, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines()]


def answer_of(model):
    return model.eval().generate(**make_tokenizer()("2 + 3?", return_tensors="pt")).sequences.tolist()


def texts_of(files):
    return {name: content.decode() for name, content in files.items() if name.endswith((".json", ".md", ".py"))}


# hierbd3lm push


def test_exactly_the_files_that_are_needed_are_pushed(hub, folder):
    DataArguments().save(folder)
    address = push(folder, "me/tiny", private=True)
    assert address.startswith(f"{hub.url}/me/tiny/commit/")
    files = hub.files("me/tiny")
    assert files.keys() == MODEL | TOKENIZER | CARD | {"data_config.json"}
    assert hub.settings["models/me/tiny"]["visibility"] == "private"
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert all(str(folder.parent) not in text for text in texts_of(files).values())
    card = ModelCard(files["README.md"].decode())
    assert '"me/tiny"' in card.content and card.data.tags
    assert not (folder / "README.md").exists()  # the folder is not written to


def test_private_data_is_not_named(hub, folder):
    DataArguments(dataset=str(folder / "notes.txt")).save(folder)
    push(folder, "me/tiny")
    files = hub.files("me/tiny")
    assert "data_config.json" not in files
    assert all(str(folder.parent) not in text for text in texts_of(files).values())


def test_a_push_replaces_weights_and_code_of_an_earlier_one_but_not_what_others_added(hub, folder):
    HierBD3LMForBlockDiffusion.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    (folder / "old_hierbd3lm.py").write_text("")
    commit_files({"samples.txt": b"of a friend"}, "me/tiny", "Samples")
    push(folder, "me/tiny")
    first = hub.files("me/tiny").keys()
    assert {"samples.txt", "old_hierbd3lm.py", "model.safetensors.index.json"} <= first
    assert sum(name.startswith("model-0000") for name in first) > 1
    for path in [*folder.glob("model*"), folder / "old_hierbd3lm.py"]:
        path.unlink()
    HierBD3LMForBlockDiffusion(make_config_for(make_tokenizer())).save_pretrained(folder)
    push(folder, "me/tiny")
    assert hub.files("me/tiny").keys() == MODEL | TOKENIZER | CARD | {"samples.txt"}


@pytest.mark.slow
def test_a_push_is_one_commit_and_failures_of_the_server_are_tried_again(hub, folder, capture_warnings):
    hub.failures += [("POST", "/preupload/", 503), ("PUT", "/objects/", 500), ("POST", "/commit/", 502)]
    hub.failures += [("POST", "/repos/create", 504)]
    push(folder, "me/tiny")
    assert hub.failures == [] and len(hub.repositories["models/me/tiny"]) == 2  # an empty one, and the push
    assert sum("failed and is tried again" in line for line in capture_warnings) == 2
    sent = [path for method, path, status in hub.requests if method == "PUT" and status == 200]
    assert len(sent) == len(set(sent)) == 2  # weights and picture, each once


@pytest.mark.slow
def test_a_push_that_goes_on_failing_raises_and_leaves_the_repository_as_it_was(hub, folder):
    push(folder, "me/tiny")
    before = hub.files("me/tiny")
    hub.failures += [("POST", "/commit/", 500)] * 3
    (folder / "generation_config.json").write_text('{"threshold": 0.5}')
    with pytest.raises(HfHubHTTPError, match="500"):
        push(folder, "me/tiny")
    assert hub.files("me/tiny") == before
    push(folder, "me/tiny")
    assert json.loads(hub.files("me/tiny")["generation_config.json"])["threshold"] == 0.5


def test_a_refusal_is_not_tried_again(hub, folder):
    hub.failures += [("POST", "/commit/", 403)]
    with pytest.raises(HfHubHTTPError, match="403"):
        push(folder, "me/tiny")
    assert sum("/commit/" in path for _, path, _ in hub.requests) == 1
    assert not is_transient(ValueError("bad metadata")) and is_transient(ConnectionResetError())
    error = RuntimeError("while uploading")
    error.__cause__ = ConnectionResetError()
    assert is_transient(error)


def test_weights_that_are_not_finite_are_not_pushed(hub, folder):
    model = HierBD3LMForBlockDiffusion.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 4] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"weights must be finite, but .*lm_head\.weight"):
        push(folder, "me/tiny")
    assert hub.requests == []


def without(folder, *names):
    for name in names:
        for path in folder.glob(name):
            path.unlink()
    return folder


def test_what_could_not_be_loaded_is_not_pushed(hub, folder):
    with pytest.raises(ValueError, match="`folder` must be a folder, but there is no nowhere"):
        push("nowhere", "me/tiny")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1000])
    with pytest.raises(ValueError, match=r"must be whole, but a file of .* is damaged"):
        push(folder, "me/tiny")
    with pytest.raises(ValueError, match=r"has none: training_args\.bin is a pickle"):
        push(without(folder, "model.safetensors"), "me/tiny")
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="has no tokenizer"):
        push(without(folder, "tokenizer*"), "me/tiny")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        push(without(folder, "config.json"), "me/tiny")
    assert hub.requests == []


def test_an_adapter_is_pushed_merged(hub, base, tmp_path):  # noqa: F811
    tokenizer = make_tokenizer()
    model = HierBD3LMForBlockDiffusion.from_autoregressive(
        str(base), tokenizer, question_len=64, plan_len=24, execution_len=24, block_size=4
    )
    model.save_pretrained(tmp_path / "secret" / "own")
    tokenizer.save_pretrained(tmp_path / "secret" / "own")
    adapter = add_adapter(model, str(tmp_path / "secret" / "own"), AdapterArguments(use_peft=True, lora_r=2))
    adapter.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    push(tmp_path / "adapter", "me/merged")
    files = hub.files("me/merged")
    assert files.keys() >= CODE | {"model.safetensors"} and "adapter_config.json" not in files
    assert all("secret" not in text for text in texts_of(files).values())
    assert ModelCard(files["README.md"].decode()).data.library_name == "transformers"
    assert model_files(tmp_path / "adapter").keys().isdisjoint(CODE)


@pytest.mark.slow
def test_what_is_pushed_is_loaded_where_the_package_is_not_installed(hub, folder, tmp_path):
    push(folder, "me/tiny")
    model = HierBD3LMForBlockDiffusion.from_pretrained(folder)
    model.push_to_hub("me/direct")
    make_tokenizer().push_to_hub("me/direct")
    files = hub.files("me/direct")
    assert files.keys() == MODEL | TOKENIZER
    home = tmp_path / "home"
    home.mkdir()
    assert load_elsewhere(hub, home, "me/tiny", "me/direct") == [answer_of(model)] * 2


@pytest.mark.slow
def test_the_snippet_of_the_card_answers(hub, folder, tmp_path):
    push(folder, "me/tiny")
    (code,) = re.findall(r"```python\n(.*?)```", hub.files("me/tiny")["README.md"].decode(), re.DOTALL)
    environment = hub.environment(tmp_path)
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


# Training


def run_of(tmp_path, strategy, **settings):
    tokenizer = make_tokenizer()
    fields = make_config_for(tokenizer).to_dict()
    names = ("backbone_config", *(f"{role}_token_id" for role in ("mask", "plan", "execution", "end", "pad")))
    settings = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": "me/mine"} | settings
    settings |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "hub_always_push": True}
    model = seeded_model(**{name: fields[name] for name in names})
    dataset = make_dataset(8, make_config())  # of the first 40 tokens
    return make_trainer(tmp_path / "run", model, train_dataset=dataset, tokenizer=tokenizer, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", FOLDERS)
def test_every_push_of_a_run_holds_the_model_and_its_card_and_nothing_else(hub, tmp_path, strategy):
    trainer = run_of(tmp_path, strategy)
    trainer.train()
    trainer._finish_current_push()
    commits = hub.repositories["models/me/mine"][1:]
    assert len(commits) == (0 if strategy == "end" else 2)
    trainer.push_to_hub()
    for number, files in enumerate(hub.repositories["models/me/mine"][1:], start=1):
        of_the_model = {name for name in files if "/" not in name}
        assert of_the_model == MODEL | TOKENIZER | {"mask.png"}
        assert '"me/mine"' in files["README.md"].decode()
        states = {name.split("/")[0] for name in files if "/" in name}
        assert states == set(FOLDERS[strategy][:number])
        for state in states:
            inside = {name.split("/")[1] for name in files if name.startswith(f"{state}/")}
            assert inside == MODEL | TOKENIZER | {"mask.png"} | STATE
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith("_push")] == []
    final = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "run")
    assert hub.files("me/mine")["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert final.num_parameters() == trainer.model.num_parameters()


@pytest.mark.slow
def test_a_push_in_the_background_that_fails_is_logged_and_the_last_one_holds_everything(
    hub, tmp_path, capture_warnings
):
    hub.failures += [("POST", "/commit/", 500)] * 3
    trainer = run_of(tmp_path, "every_save")
    trainer.train()
    trainer._finish_current_push()
    warning = "checkpoint-1 was not pushed to me/mine, and the run continues"
    assert sum(warning in line for line in capture_warnings) == 1
    assert len(hub.repositories["models/me/mine"]) == 2  # an empty one, and that of the second checkpoint
    trainer.push_to_hub()
    assert hub.files("me/mine").keys() == MODEL | TOKENIZER | {"mask.png"}


@pytest.mark.slow
def test_a_checkpoint_that_the_run_deletes_meanwhile_is_pushed_whole(hub, tmp_path, monkeypatch):
    trainer = run_of(tmp_path, "every_save", save_total_limit=1)
    wait = trainer._finish_current_push

    def let_the_server_answer():
        assert not (tmp_path / "run" / "checkpoint-1").exists()
        hub.lock.release()
        wait()

    hub.lock.acquire()
    monkeypatch.setattr(trainer, "_finish_current_push", let_the_server_answer)
    trainer.train()
    assert [files.keys() >= MODEL for files in hub.repositories["models/me/mine"][1:]] == [True, True]


def test_metadata_of_the_author_is_in_the_card(hub, tmp_path):
    trainer = run_of(tmp_path, "end")
    trainer.train()
    trainer.push_to_hub(license="mit", language="en")
    data = ModelCard(hub.files("me/mine")["README.md"].decode()).data
    assert (data.license, data.language) == ("mit", "en")


@pytest.mark.slow
def test_a_repository_can_be_loaded_before_the_run_ends(hub, tmp_path):
    trainer = run_of(tmp_path, "every_save")
    trainer.train()
    trainer._finish_current_push()
    home = tmp_path / "home"
    home.mkdir()
    model = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert load_elsewhere(hub, home, "me/mine") == [answer_of(model)]


# Plans


@pytest.fixture
def plans(tmp_path):
    """A finished folder of `hierbd3lm plans`."""
    folder = tmp_path / "plans"
    folder.mkdir()
    row = {"question": "2 + 3?", "plan": "Add.", "execution": "5\n#### 5", "answer": "5"}
    contents = {"plans.jsonl": row, "summary.json": {"num_plans": 1}, "replies.jsonl": {"text": "mine"}}
    contents["manifest.json"] = {"dataset": str(tmp_path / "problems.jsonl"), "model": "someone/writer"}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content) + "\n")
    (folder / "README.md").write_text("---\ntags:\n- plans\n---\n# Plans\n")
    return folder


def test_written_plans_are_pushed_as_a_dataset(hub, plans, tmp_path):
    hub.failures += [("POST", "/commit/", 503)]
    address = push(plans, "me/plans")
    assert address.startswith(f"{hub.url}/datasets/me/plans/commit/")
    files = hub.files("me/plans", "datasets")
    assert files.keys() == {"plans.jsonl", "README.md", "manifest.json", "summary.json"}
    assert json.loads(files["manifest.json"]) == {"dataset": "problems.jsonl", "model": "someone/writer"}
    (plans / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"`folder` must hold finished plans, but .* has no summary\.json"):
        push(plans, "me/plans")
