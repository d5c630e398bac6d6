"""A checkpoint brings its code along: it works in a process in which the package is not installed, without network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.settings_hierbd3lm import HierBD3LMGenerationConfig

from .tiny import make_model
from .tiny_tokenizer import make_config_for, make_tokenizer

CODE = {
    f"{name}_hierbd3lm.py"
    for name in (
        *("backbones", "cache", "configuration", "denoising", "diffusion", "dit", "generation"),
        *("masking", "modeling", "order", "samplers", "schedule", "settings"),
    )
}
AUTO_MAP = {
    "AutoConfig": "configuration_hierbd3lm.HierBD3LMConfig",
    "AutoModel": "modeling_hierbd3lm.HierBD3LMForBlockDiffusion",
    "AutoModelForCausalLM": "modeling_hierbd3lm.HierBD3LMForBlockDiffusion",
}
QUESTION = "2 + 3?"
REPOSITORY, REVISION = "me/tiny", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model with generation settings of its own, and its tokenizer, saved."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    fields = make_config_for(tokenizer).to_dict()
    names = ("backbone_config", *(f"{role}_token_id" for role in ("mask", "plan", "execution", "end", "pad")))
    model = make_model(**{name: fields[name] for name in names})
    model.generation_config = HierBD3LMGenerationConfig(sampler="entropy", entropy_bound=2.0, max_plan_len=12)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint):
    """What the installed package generates from the checkpoint, and with which settings."""
    model = HierBD3LMForBlockDiffusion.from_pretrained(checkpoint)
    tokenizer = make_tokenizer()
    sequences = model.generate(**tokenizer(QUESTION, return_tensors="pt")).sequences
    assert sequences.shape[1] == len(QUESTION) + 12 + 24  # no random model says <|end|>: all blocks are denoised
    return {
        "sequences": sequences.tolist(),
        "texts": tokenizer.batch_decode(sequences),
        "generation_config": model.generation_config.to_dict(),
    }


def load_elsewhere(checkpoint: Path | str, home: Path, *arguments: str) -> dict:
    """The report of `remote_process.py` in a fresh process with caches of its own."""
    environment = os.environ | {
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "HF_HUB_CACHE")}
    script = Path(__file__).with_name("remote_process.py")
    home.mkdir(exist_ok=True)
    process = subprocess.run(
        [sys.executable, script, str(checkpoint), "--question", QUESTION, *arguments],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def hub_cache(home: Path, checkpoint: Path) -> str:
    """Puts the checkpoint where a download from the Hub would; returns the name of its repository."""
    repository = home / "hub" / "models--me--tiny"
    shutil.copytree(checkpoint, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return REPOSITORY


def assert_same_model(report, expected, doors=("AutoModel", "AutoModelForCausalLM")):
    assert report["config_module"].startswith("transformers_modules.")
    assert report["config_module"].endswith(".configuration_hierbd3lm")
    assert tuple(report["doors"]) == doors
    for loaded in report["doors"].values():
        assert loaded["class"] == "HierBD3LMForBlockDiffusion"
        assert loaded["module"].startswith("transformers_modules.")
        assert loaded["generation_class"] == "HierBD3LMGenerationConfig"
        assert loaded["generation_module"].startswith("transformers_modules.")
        for name, value in expected.items():
            assert loaded[name] == value, name


@pytest.mark.parametrize("version", ["4.57.0", "5.10.0"])
def test_an_older_version_of_transformers_is_named(version, checkpoint):
    code = f"""
import importlib.metadata
installed = importlib.metadata.version
importlib.metadata.version = lambda name: {version!r} if name == "transformers" else installed(name)
import runpy
runpy.run_path({str(checkpoint / "configuration_hierbd3lm.py")!r})
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        f"ImportError: transformers>=5.21 is required for a normal functioning of this module, but found "
        f"transformers=={version}." in process.stderr
    )
    assert process.stderr.rstrip().endswith("The code of hierbd3lm needs it: run `pip install -U transformers`.")


def python_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


def test_a_checkpoint_holds_the_code_that_it_needs_and_names_its_classes(checkpoint):
    assert python_files(checkpoint) == CODE
    root = Path(sys.modules[HierBD3LMGenerationConfig.__module__].__file__).parent
    for name in CODE:
        assert (checkpoint / name).read_text() == (root / name).read_text()
    assert json.loads((checkpoint / "config.json").read_text())["auto_map"] == AUTO_MAP
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    assert (settings["sampler"], settings["entropy_bound"], settings["max_plan_len"]) == ("entropy", 2.0, 12)


def test_a_folder_is_loaded_and_generates_where_the_package_is_not_installed(checkpoint, expected, tmp_path):
    assert_same_model(load_elsewhere(checkpoint, tmp_path / "home"), expected)


@pytest.mark.slow
def test_a_repository_of_the_hub_is_loaded_and_generates(checkpoint, expected, tmp_path):
    """Unlike a folder's, the imports of every file of a repository are checked before it is run."""
    home = tmp_path / "home"
    name = hub_cache(home, checkpoint)
    report = load_elsewhere(name, home)
    assert_same_model(report, expected)
    assert REVISION in report["config_module"]


@pytest.mark.slow
@pytest.mark.parametrize("door", ["AutoModel", "AutoModelForCausalLM"])
@pytest.mark.parametrize("origin", ["folder", "hub"])
def test_what_was_loaded_elsewhere_is_saved_with_its_code_and_loads_again(
    checkpoint, expected, tmp_path, origin, door
):
    home, saved = tmp_path / "home", tmp_path / "saved"
    source = hub_cache(home, checkpoint) if origin == "hub" else checkpoint
    assert_same_model(load_elsewhere(source, home, "--doors", door, "--save_to", str(saved)), expected, (door,))
    assert python_files(saved) == CODE
    assert json.loads((saved / "config.json").read_text())["auto_map"] == AUTO_MAP
    # Neither the first folder nor its caches are needed any more.
    assert_same_model(load_elsewhere(saved, tmp_path / "another home"), expected)
