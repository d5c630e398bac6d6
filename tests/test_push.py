"""Checkpoints that are pushed to the Hub while a run goes on; the Hub is a function that copies a folder."""

import fnmatch
import shutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers.trainer

from .tiny_trainer import make_trainer

LOAD = """
import sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, model.config.plan_block_size)
"""


ROOT = Path(__file__).parents[1]
FOLDERS = {"every_save": [""], "checkpoint": ["", "last-checkpoint"], "all_checkpoints": ["", "checkpoint-1"]}


def push(tmp_path, monkeypatch, strategy):
    """Train for a step, and return the repository after the push of its checkpoint."""
    repository = tmp_path / "repository"

    def upload_folder(folder_path, path_in_repo="", ignore_patterns=(), **kwargs):
        for path in Path(folder_path).iterdir():
            if path.is_file() and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignore_patterns):
                target = repository / path_in_repo / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        future = Future()
        future.set_result(None)
        return future

    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", lambda trainer: None)
    settings = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": "me/mine"}
    trainer = make_trainer(tmp_path / "run", save_strategy="steps", save_steps=1, max_steps=1, **settings)
    trainer.hub_model_id, trainer.push_in_progress = "me/mine", None
    trainer.train()
    return repository


@pytest.mark.parametrize("strategy", FOLDERS)
def test_every_push_holds_the_source_code_of_the_model(tmp_path, monkeypatch, strategy):
    repository = push(tmp_path, monkeypatch, strategy)
    code = {path.name for path in ROOT.glob("*_hierbd3lm.py")}
    for folder in FOLDERS[strategy]:
        assert {path.name for path in (repository / folder).glob("*.py")} == code
        assert (repository / folder / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_repository_can_be_loaded_before_the_run_ends(tmp_path, monkeypatch):
    repository = push(tmp_path, monkeypatch, "checkpoint")
    for folder in FOLDERS["checkpoint"]:
        command = [sys.executable, "-c", LOAD, str(repository / folder)]
        environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.stdout.split() == ["HierBD3LMForBlockDiffusion", "4"], done.stderr[-2000:]
