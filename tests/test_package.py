"""What is built from a clone is a whole package: it installs, and every command works from an empty folder."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import hierbd3lm
from hierbd3lm import cli

from .test_command_lines import MODULES

ROOT = Path(hierbd3lm.__file__).parent
NOT_INSTALLED = {"tests", "docs", "benchmarks", "examples", "outputs", "build", ".venv"}
TINY_BACKBONE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
TINY_BACKBONE |= {"num_key_value_heads": 1, "head_dim": 16}
TRAIN = ["train", "quickstart", "--num_train_examples", "24", "--num_validation_examples", "8", "--max_steps", "2"]
TRAIN += ["--per_device_train_batch_size", "4", "--backbone", json.dumps(TINY_BACKBONE), "--use_cpu", "true"]
TRAIN += ["--eval_noise_draws", "1", "--output_dir", "out"]


def read_setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def folders_on_disk():
    """Packages by name: the folders that hold code or settings of the package, and those above them."""
    names = {"hierbd3lm"}
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts[:-1]
        if path.suffix in (".py", ".yaml") and all(map(str.isidentifier, parts)) and not NOT_INSTALLED & set(parts):
            names |= {".".join(["hierbd3lm", *parts[:end]]) for end in range(1, len(parts) + 1)}
    return names


def test_every_folder_is_a_package():
    packages = read_setup()["options"]["packages"].split()
    assert packages == sorted(packages) and set(packages) == folders_on_disk()


def test_a_folder_says_what_lives_there_and_imports_nothing():
    for folder in ("convert", "data", "evaluation", "training", *(f"data/{p}" for p in ("gsm8k", "plans", "text"))):
        text = (ROOT / folder / "__init__.py").read_text()
        assert text.startswith('"""') and "import" not in text.replace("imports", "") and text.count("\n") == 1


def test_the_version_is_one():
    assert read_setup()["metadata"]["version"] == "attr: hierbd3lm.__version__"
    assert f"\nversion: {hierbd3lm.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_no_file_is_long():
    installed = [path for path in ROOT.rglob("*.py") if not NOT_INSTALLED & set(path.relative_to(ROOT).parts)]
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in installed}
    assert {path: length for path, length in lengths.items() if length > 500} == {}


def test_a_run_s_folder_needs_nothing_of_unix_alone():
    code = "import sys; sys.modules['fcntl'] = None; import hierbd3lm.data.run_folder"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist of the working tree."""
    folder = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(".*", "outputs", "build", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    return folder, *(build(folder / "source", folder, kind) for kind in ("wheel", "sdist"))


def build(source, folder, kind):
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    process = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-2000:]
    return folder / process.stdout.splitlines()[-1]


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_package_and_the_sdist_builds_the_same_wheel(built):
    folder, wheel, sdist = built
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "py.typed",
        "configs/quickstart.yaml",
        "configs/accelerate/fsdp2.yaml",
        "cli/__init__.py",
        "demo/page.css",
        "demo/picture.js",
        "trainer.py",
    ):
        assert f"hierbd3lm/{name}" in names
    for name in ("gsm8k_hier.yaml", "gsm8k_hier.py"):
        assert f"hierbd3lm/evaluation/lm_eval/tasks/{name}" in names
    assert "hierbd3lm/evaluation/metrics/gsm8k_exact_match/gsm8k_exact_match.py" in names
    assert not [name for name in names if NOT_INSTALLED & set(Path(name).parts)]
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    assert {path.name for path in (source / "tests").glob("*.py")} == {p.name for p in (ROOT / "tests").glob("*.py")}
    (folder / "again").mkdir()
    assert set(zipfile.ZipFile(build(source, folder / "again", "wheel")).namelist()) == names


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Runs programs of a new environment that has the wheel, and the present environment's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(built[1])]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True, timeout=120)
    # The folders that a .pth file names are searched, but for .pth files of their own: an editable install stays out.
    (packages,) = (folder / "lib").glob("python*/site-packages")
    present = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (packages / "present.pth").write_text("".join(f"{path}\n" for path in present))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(program, *arguments, cwd, **variables):
        command = [str(folder / "bin" / program), *arguments]
        process = subprocess.run(
            command, cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=300
        )
        assert process.returncode == 0, f"{command}\n{process.stderr[-3000:]}"
        return process.stdout

    where = run("python", "-c", "import hierbd3lm; print(hierbd3lm.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(packages)
    return run


@pytest.mark.slow
def test_every_command_shows_its_help_from_the_wheel(installed, tmp_path):
    assert sorted(path.name for path in tmp_path.iterdir()) == []
    assert "COMMAND" in installed("hierbd3lm", "--help", cwd=tmp_path)
    for name in cli.COMMANDS:
        assert f"usage: hierbd3lm {name} " in installed("hierbd3lm", name, "--help", cwd=tmp_path)
    for module in MODULES:
        assert "usage" in installed("python", "-m", module, "--help", cwd=tmp_path)


@pytest.mark.slow
def test_a_model_is_trained_and_evaluated_from_the_wheel(installed, tmp_path):
    installed("hierbd3lm", *TRAIN, cwd=tmp_path)
    quick = ["--model", "out", "--limit", "4", "--device", "cpu"]
    installed("hierbd3lm", "eval", *quick, "--given_plan", "reference", cwd=tmp_path)
    assert json.loads((tmp_path / "out" / "eval" / "summary.json").read_text())["n"] == 4
    installed("hierbd3lm", "ppl", *quick, "--num_draws", "1", cwd=tmp_path)
    assert json.loads((tmp_path / "out" / "likelihood.json").read_text())["num_examples"] == 4
    installed("hierbd3lm", "mask", "--output", "mask.png", cwd=tmp_path)
    row = {"question": "Mia has 3 apples. How many apples does Mia have?", "answer": "3\n#### 3"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    harness = ["--model", "hierbd3lm", "--model_args", "pretrained=out", "--device", "cpu", "--tasks", "gsm8k_hier"]
    assert "exact_match" in installed("hierbd3lm", "lm-eval", *harness, cwd=tmp_path, GSM8K_DIR=str(tmp_path))
