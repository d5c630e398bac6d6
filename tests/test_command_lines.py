"""Every command line shows its settings at once, under its own name, and imports nothing heavy to do so."""

import ast
import os
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import hierbd3lm
from hierbd3lm import cli, train
from hierbd3lm.convert.published import ConversionArguments
from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.plans.arguments import WritePlansArguments
from hierbd3lm.evaluation.arguments import (
    AnalysisArguments,
    EvaluationArguments,
    LikelihoodArguments,
    SampleArguments,
)
from hierbd3lm.evaluation.lm_eval.__main__ import TASKS, with_include_path
from hierbd3lm.rl.settings import PolicyArguments, RolloutArguments
from hierbd3lm.serving.arguments import GenerateArguments, ServeArguments
from hierbd3lm.training.recipes import find_recipe, recipe_names
from hierbd3lm.training.settings import ModelArguments, ObjectiveArguments

ROOT = Path(hierbd3lm.__file__).parent
SETTINGS = {
    "train": (ModelArguments, DataArguments, ObjectiveArguments),
    "grpo": (PolicyArguments, DataArguments, RolloutArguments),
    "eval": (EvaluationArguments,),
    "generate": (GenerateArguments,),
    "serve": (ServeArguments,),
    "ppl": (LikelihoodArguments,),
    "plans": (WritePlansArguments,),
    "analyze": (AnalysisArguments,),
    "samples": (SampleArguments,),
    "convert": (ConversionArguments,),
}
OTHER_FLAGS = {
    "mask": ("--question-len", "--plan-len", "--execution-len", "--block-size", "--output"),
    "push": ("DIR", "REPO", "--private", "--revision"),
    "lm-eval": ("--model_args", "--tasks", "--include_path"),
    "hierbd3lm.data.synthetic.problems": ("--split", "--num-examples", "--max-value"),
    "hierbd3lm.cli": tuple(cli.COMMANDS),
    "demo": ("MODEL", "--autoregressive", "--port", "--share", "--device"),
}
HEAVY = ("torch", "gradio", "datasets", "trl", "peft", "matplotlib", "hierbd3lm.modeling_hierbd3lm")
SECONDS = 2.0


def is_entry_point(path):
    return 'if __name__ == "__main__"' in path.read_text()


def module_of(path):
    parts = ("hierbd3lm", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__main__" else parts)


MODULES = sorted(
    module_of(path)
    for path in ROOT.rglob("*.py")
    if not {"tests", "benchmarks", "examples", ".venv", "build"} & set(path.relative_to(ROOT).parts)
    and is_entry_point(path)
)
COMMAND_OF = {f"hierbd3lm.{command.target.split(':')[0]}": name for name, command in cli.COMMANDS.items()}
COMMAND_OF |= {module.removesuffix(".__main__"): name for module, name in COMMAND_OF.items()}


def flags_of(name):
    name = COMMAND_OF.get(name, name)
    settings = [f"--{item.name}" for cls in SETTINGS.get(name, ()) for item in fields(cls)]
    return [*settings, *OTHER_FLAGS.get(name, ())]


def show_help(arguments):
    """What `--help` prints, and the seconds of CPU that it took: on a quiet machine those that one waits."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", *arguments, "--help"]
    environment = os.environ | {"COLUMNS": "100"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("arguments", [*(["hierbd3lm.cli", name] for name in cli.COMMANDS), *([m] for m in MODULES)])
def test_help_shows_every_setting_at_once(arguments):
    text, seconds = show_help(arguments)
    flags = flags_of(arguments[-1])
    assert flags and [flag for flag in flags if flag not in text] == []
    if len(arguments) == 2:
        assert text.startswith(f"usage: hierbd3lm {arguments[1]} ")
    assert seconds < SECONDS or show_help(arguments)[1] < SECONDS  # the first try may have read files from a disk


def test_help_imports_nothing_heavy():
    code = f"""
import sys
from hierbd3lm.cli import main
for name in {list(cli.COMMANDS)}:
    try:
        main([name, "--help"])
    except SystemExit:
        print(name, *sorted(set({HEAVY}) & sys.modules.keys()), file=sys.stderr)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert process.stderr.split() == list(cli.COMMANDS)


@pytest.mark.slow
def test_every_setting_of_training_is_listed_where_all_are_asked_for(capsys):
    with pytest.raises(SystemExit) as error:
        train.main(["--help_all"], prog="hierbd3lm train")
    text = capsys.readouterr().out
    assert error.value.code == 0 and all(flag in text for flag in (*flags_of("train"), "--learning_rate"))


def test_the_table_of_commands_is_the_help(capsys):
    for argv in ([], ["--help"], ["-h"]):
        cli.main(argv)
        text = capsys.readouterr().out
        assert text.startswith("usage: hierbd3lm COMMAND")
        assert all(f"  {name} " in text and command.help in text for name, command in cli.COMMANDS.items())
    cli.main(["--version"])
    assert capsys.readouterr().out == f"hierbd3lm {hierbd3lm.__version__}\n"


@pytest.mark.parametrize(
    "name, nearest", [("evaluate", "eval"), ("trian", "train"), ("lm_eval", "lm-eval"), ("zzz", None)]
)
def test_an_unknown_command_is_refused_with_the_nearest(name, nearest, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main([name])
    message = capsys.readouterr().err
    assert error.value.code == 2 and repr(name) in message
    assert nearest is None or f"did you mean `hierbd3lm {nearest}`?" in message


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_is_handed_its_arguments_and_its_name(name, monkeypatch):
    module, function = cli.COMMANDS[name].target.split(":")
    calls = []
    monkeypatch.setattr(f"hierbd3lm.{module}.{function}", lambda argv, prog: calls.append((argv, prog)))
    cli.main([name, "--limit", "3"])
    assert calls == [(["--limit", "3"], f"hierbd3lm {name}")]


# Recipes


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_a_recipe_of_the_package_is_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == ROOT / "configs" / "quickstart.yaml"
    _, data_args, args = train.parse_arguments([name, "--use_cpu", "true"])
    assert (data_args.dataset, args.output_dir) == ("synthetic", "outputs/quickstart")


def test_a_file_is_taken_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").write_text("output_dir: mine\nuse_cpu: true\n")
    assert train.parse_arguments(["quickstart.yaml"])[2].output_dir == "mine"
    assert train.parse_arguments(["--config", "quickstart.yaml"])[2].output_dir == "mine"


def test_an_unknown_recipe_is_refused_with_the_list_of_them():
    with pytest.raises(ValueError, match=r"`config` must be .*, but got .fastest.") as error:
        train.parse_arguments(["fastest"])
    assert all(name in str(error.value) for name in recipe_names()) and len(recipe_names()) > 5


# Of single commands


def test_the_harness_finds_the_tasks_of_the_package_unless_told_otherwise():
    assert (TASKS / "gsm8k_hier.yaml").is_file()
    assert with_include_path(["--tasks", "a"]) == ["run", "--tasks", "a", "--include_path", str(TASKS)]
    assert with_include_path(["ls", "tasks"]) == ["ls", "tasks", "--include_path", str(TASKS)]
    for given in (["--include_path", "mine"], ["--include_path=mine"]):
        assert with_include_path(["run", *given]) == ["run", *given]


def test_the_harness_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(ImportError, match=r'run `pip install -e "\.\[eval\]"`'):
        cli.main(["lm-eval", "--tasks", "gsm8k_hier"])


# What the package exports


def test_exports_are_known_to_type_checkers_and_to_dir():
    tree = ast.parse(Path(hierbd3lm.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == hierbd3lm._EXPORTS and sorted(seen) == sorted(hierbd3lm.__all__)
    assert set(seen) <= set(dir(hierbd3lm))
    for name in seen:
        assert getattr(hierbd3lm, name).__name__ == name
