"""The examples run as they are documented: each in a process of its own, from a folder that is not the clone's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, folder, *arguments):
    """What a script prints where it is run in `folder`."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The model that train_on_jsonl.py trains, and what the script prints."""
    folder = tmp_path_factory.mktemp("examples")
    printed = run("train_on_jsonl.py", folder)
    return folder / "outputs" / "apples", printed


@pytest.mark.slow
def test_a_model_learns_the_problems_of_a_jsonl_file(trained):
    _, printed = trained
    answer = printed[printed.index("<|plan|>") :]
    assert "<|execution|>" in answer and "#### 9<|end|>" in answer


@pytest.mark.slow
def test_a_checkpoint_answers_another_question(trained, tmp_path):
    model, _ = trained
    question = "Mia has 5 red, 1 green and 6 blue apples. How many apples does Mia have?"
    printed = run("use_checkpoint.py", tmp_path, "--model", str(model), "--question", question)
    assert "#### 12" in printed and "forward passes" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan, first_step", [("green + blue\n+ red", "3 + 2 = 5"), ("red + green\n+ blue", "4 + 3 = 7")]
)
def test_an_execution_follows_the_edited_plan(trained, tmp_path, plan, first_step):
    model, _ = trained
    printed = run("edit_a_plan.py", tmp_path, "--model", str(model), "--plan", plan)
    edited = printed[printed.index("--- The edited plan") :]
    assert f"{plan}\n--- Its execution\n{first_step}\n" in edited


@pytest.mark.slow
def test_a_replaced_step_leaves_the_steps_before_it(trained, tmp_path):
    model, _ = trained
    printed = run("edit_a_plan.py", tmp_path, "--model", str(model), "--step", "1", "--new_step", "+ blue")
    before, after = (part.split("--- Its execution\n") for part in printed.split("--- One step replaced\n"))
    assert after[0].split("\n")[0] == before[0].split("\n")[1] and after[0].split("\n")[1] == "+ blue"
    assert after[1].split("\n")[0] == before[1].split("\n")[0]


def test_the_examples_are_short():
    assert {path.name for path in EXAMPLES.glob("*.py") if len(path.read_text().splitlines()) >= 60} == set()
