"""Imports run one way, and what is not asked for is not imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hierbd3lm
from hierbd3lm import cli

ROOT = Path(hierbd3lm.__file__).parent
FILES = [
    path
    for path in ROOT.rglob("*.py")
    if not {"tests", "benchmarks", "examples", "docs", "build", ".venv", "outputs"} & set(path.relative_to(ROOT).parts)
]
# at the root or in a folder -> the parts of the package that it knows, beside its own
TRAVELLING = {path.stem for path in FILES if path.parent == ROOT and path.stem.endswith("_hierbd3lm")}
KNOWN = {
    "data": {"configuration_hierbd3lm", "masking_hierbd3lm", "order_hierbd3lm"},
    "training": TRAVELLING | {"data"},
    "evaluation": TRAVELLING | {"data", "training"},
    "serving": TRAVELLING | {"data", "training", "evaluation"},
    "convert": TRAVELLING,
    "hub": TRAVELLING | {"data", "training", "evaluation"},
    "trainer": TRAVELLING | {"data", "training", "evaluation", "hub"},
}
COMMAND_LINES = {command.target.split(":")[0] for command in cli.COMMANDS.values()} | {"cli"}


UNIX_ALONE = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_imported_that_windows_lacks(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    assert names & UNIX_ALONE == set()


def imports_of(path):
    """The modules of the package that a file imports anywhere, without the package's own name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*parts[: len(parts) - node.level], *(node.module.split(".") if node.module else [])]
            names = [alias.name for alias in node.names]
            yield from (
                [".".join(base)]
                if (ROOT / Path(*base)).with_suffix(".py").is_file()
                else (".".join([*base, name]) for name in names)
            )
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "hierbd3lm":
            yield node.module.partition(".")[2]
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "hierbd3lm")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_what_its_place_may_know(path):
    place = path.relative_to(ROOT).with_suffix("").parts[0]
    imported = {name for name in imports_of(path) if name and name != "__version__"}
    if place in KNOWN:
        assert {name.split(".")[0] for name in imported} <= KNOWN[place] | {place}
    if place not in ("cli", "__main__", "__init__"):
        assert not imported & COMMAND_LINES
    assert not {name.split(".")[0] for name in imported} & {"benchmarks", "tests"}


@pytest.mark.slow
def test_the_backbone_of_published_checkpoints_is_not_imported_before_it_is_needed():
    code = """
import sys
from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
import hierbd3lm.trainer, hierbd3lm.evaluation.runner, hierbd3lm.training.preparation
HierBD3LMConfig()
assert "hierbd3lm.dit_hierbd3lm" not in sys.modules
config = HierBD3LMConfig(backbone_config={"model_type": "hierbd3lm_dit", "vocab_size": 200_000})
assert "hierbd3lm.dit_hierbd3lm" in sys.modules and config.backbone_config.model_type == "hierbd3lm_dit"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
