"""The plans that are written make a training set, and killing the command at any moment changes nothing in it."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from hierbd3lm.data import run_folder
from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.loading import load_reasoning_dataset, prepare_dataset
from hierbd3lm.data.plans import hub, run
from hierbd3lm.data.plans.arguments import WritePlansArguments
from hierbd3lm.data.plans.filters import FILTERS, PlanDraft, score
from hierbd3lm.data.plans.problems import load_problems
from hierbd3lm.data.plans.run import MAX_REFUSALS, choose_plans, write_plans
from hierbd3lm.data.plans.write_plans import parse_arguments
from hierbd3lm.data.splits import load_split

from .plan_server import PlanServer
from .tiny_plans import (
    KINDS,
    NUM_PROBLEMS,
    NUM_SAMPLES,
    RESULTS,
    VERDICTS,
    kind_of,
    make_problem_row,
    read_lines,
    results_of,
    seeds_of,
    write_problems,
    write_reply,
)
from .tiny_tokenizer import make_config_for, make_tokenizer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed")


@pytest.fixture
def problems_file(tmp_path):
    return write_problems(tmp_path)


@pytest.fixture
def server():
    with PlanServer(write_reply) as server:
        yield server


@pytest.fixture
def arguments(problems_file, server, tmp_path):
    def make(**fields):
        defaults = {
            "dataset": problems_file,
            "output_dir": str(tmp_path / "plans"),
            "model": "fake",
            "base_url": server.url,
            "num_samples": NUM_SAMPLES,
            "max_retries": 0,
        }
        return WritePlansArguments(**defaults | fields)

    return make


# What is written


def test_every_reply_is_kept_or_rejected_by_what_is_wrong_with_it(arguments, server):
    args = arguments()
    summary = write_plans(args)
    kinds = Counter(kind_of(body["seed"]) for body in server.bodies)
    assert set(kinds) == set(KINDS), "the seeds must draw every kind"
    assert sum(kinds.values()) == NUM_PROBLEMS * NUM_SAMPLES == summary["num_replies"]
    assert summary["rejected_by"] == dict.fromkeys(FILTERS, 0) | {VERDICTS[k]: kinds[k] for k in VERDICTS}
    assert summary["num_accepted"] == kinds["good"] + kinds["better"]
    rejected = Counter(reply["rejected_by"] for reply in read_lines(args.output_dir, "rejected.jsonl"))
    assert rejected == {VERDICTS[kind]: kinds[kind] for kind in VERDICTS}
    assert json.loads(Path(args.output_dir, "summary.json").read_text()) == summary


def test_problem_gets_the_plan_with_the_best_score_or_none(arguments, server):
    args = arguments()
    summary = write_plans(args)
    rows = {row["question"]: row for row in read_lines(args.output_dir, "plans.jsonl")}
    for i, (question, seeds) in enumerate(seeds_of(server.bodies).items()):
        kinds = {kind_of(seed) for seed in seeds}
        best = next((kind for kind in ("better", "good") if kind in kinds), None)
        assert (question in rows) == (best is not None), (i, kinds)
        if best is not None:
            assert ("Find all pens" in rows[question]["plan"]) == (best == "better")
    assert 0 < len(rows) < NUM_PROBLEMS, "some have a plan and some have none"
    assert summary["num_plans"] == summary["num_plans_by_model"] == len(rows)
    assert summary["num_without_plan"] == NUM_PROBLEMS - len(rows)


def test_kept_plan_has_the_greatest_score_and_is_the_first_of_several(problems_file):
    (problem, *_) = load_problems(problems_file)
    texts = [json.dumps({"steps": [word, word]}) for word in ("Multiply", "Tom keeps pens", "pens", "pens keeps Tom")]
    records = [{"index": 0, "sample": i, "text": text, "is_cut_off": False} for i, text in enumerate(texts)]
    scores = [score(PlanDraft.read(problem, text)) for text in texts]
    assert scores[1] == scores[3] == max(scores) > scores[2] > scores[0]
    (row,), _, _ = choose_plans([problem], records[::-1], len(records))
    assert (row["plan"], row["score"]) == ("1. Tom keeps pens\n2. Tom keeps pens", scores[1])


def test_fallback_gives_every_problem_a_plan(arguments, problems_file):
    args = arguments(fallback="rule")
    summary = write_plans(args)
    rows = read_lines(args.output_dir, "plans.jsonl")
    assert [row["index"] for row in rows] == list(range(NUM_PROBLEMS))
    by_rule = [row for row in rows if row["plan_source"] == "rule"]
    assert 0 < len(by_rule) == summary["num_plans_by_rule"] < NUM_PROBLEMS
    for row in by_rule:
        assert row["plan_steps"] == load_problems(problems_file)[row["index"]].rule_plan_steps
        assert row["score"] is None


def test_rows_are_a_training_set(arguments):
    args = arguments(fallback="rule")
    write_plans(args)
    path = str(Path(args.output_dir, "plans.jsonl"))
    dataset = load_split(DataArguments(dataset=path, num_validation_examples=2), "train")
    assert len(dataset) == NUM_PROBLEMS - 2
    dataset = load_reasoning_dataset(path)
    assert dataset.to_list() == read_lines(args.output_dir, "plans.jsonl")
    tokenizer = make_tokenizer()
    config = make_config_for(tokenizer, question_len=256, plan_len=256, execution_len=256)
    prepared, report = prepare_dataset(dataset, tokenizer, config, over_long="raise")
    assert report["num_kept"] == NUM_PROBLEMS
    for row, ids in zip(dataset, prepared, strict=True):
        assert tokenizer.decode(ids["plan_ids"]) == row["plan"] == "\n".join(row["plan_steps"])
        assert tokenizer.decode(ids["execution_ids"]) == row["execution"]
        assert row["execution"] == "\n".join([*row["execution_steps"], f"#### {row['answer']}"])
        assert row["execution"] == make_problem_row(row["index"])["execution"]
        assert len(row["plan_steps"]) == len(row["execution_steps"]) == 2


def test_each_sample_is_drawn_with_a_seed_of_its_own_that_follows_from_the_seed(arguments, server):
    write_plans(arguments())
    first = seeds_of(server.bodies)
    assert len(set().union(*first.values())) == NUM_PROBLEMS * NUM_SAMPLES
    server.bodies.clear()
    write_plans(arguments(overwrite=True))
    assert seeds_of(server.bodies) == first
    server.bodies.clear()
    write_plans(arguments(seed=1, overwrite=True))
    assert not set().union(*seeds_of(server.bodies).values()) & set().union(*first.values())


# Interruptions


def test_complete_run_requests_nothing_and_writes_its_results_again(arguments, server):
    args = arguments()
    write_plans(args)
    expected = results_of(args.output_dir)
    for name in RESULTS:
        Path(args.output_dir, name).unlink()
    server.bodies.clear()
    write_plans(args)
    assert server.bodies == []
    assert results_of(args.output_dir) == expected
    assert write_plans(arguments(fallback="rule"))["num_plans"] == NUM_PROBLEMS
    assert server.bodies == []


def test_run_that_the_server_broke_off_asks_only_for_what_is_missing(arguments, server, tmp_path):
    write_plans(arguments(output_dir=str(tmp_path / "whole")))
    server.bodies.clear()
    server.reply = lambda body: write_reply(body) if len(server.bodies) <= 7 else 404
    args = arguments(concurrency=1)
    with pytest.raises(Exception, match="status 404"):
        write_plans(args)
    assert len(read_lines(args.output_dir, "replies.jsonl")) == 7
    assert not any(Path(args.output_dir, name).exists() for name in RESULTS)
    server.reply = write_reply
    server.bodies.clear()
    write_plans(args)
    assert len(server.bodies) == NUM_PROBLEMS * NUM_SAMPLES - 7
    assert results_of(args.output_dir) == results_of(tmp_path / "whole")


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(number):
    """Makes this process kill itself at its n-th write: in the middle of a line or a file, or before a file moves."""
    left = number

    def count_down(write_half):
        nonlocal left
        left -= 1
        if left == 0:
            write_half()
            kill_self()

    append, replace = run_folder.Log.append, run_folder.replace

    def torn_append(log, record):
        def write_half():
            line = json.dumps(record).encode()
            log._file.write(line[: len(line) // 2])
            log._file.flush()

        count_down(write_half)
        append(log, record)

    def torn_replace(path, content):
        new = path.with_name(f"{path.name}.new")
        count_down(lambda: new.write_bytes(content[: len(content) // 2]))
        count_down(lambda: new.write_bytes(content))
        replace(path, content)

    run_folder.Log.append = torn_append
    run_folder.replace = hub.replace = torn_replace


def run_and_die(args, number):
    """Exit status of a process that dies at its n-th write, or ends before that."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            die_at(number)
            write_plans(args)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
def test_run_that_is_killed_at_any_write_goes_on_without_loss_or_duplicate(arguments, tmp_path):
    few = {"limit": 2, "num_samples": 2}
    write_plans(arguments(output_dir=str(tmp_path / "whole"), **few))
    expected = results_of(tmp_path / "whole")
    num_writes = 2 * len(("manifest.json", *RESULTS)) + 4  # a file has two moments, a reply one
    for number in range(1, num_writes + 1):
        args = arguments(output_dir=str(tmp_path / f"killed {number}"), **few)
        assert run_and_die(args, number) == -signal.SIGKILL
        write_plans(args)
        assert results_of(args.output_dir) == expected
    assert run_and_die(arguments(output_dir=str(tmp_path / "late"), **few), num_writes + 1) == 0


@pytest.mark.slow
def test_run_that_is_killed_again_and_again_ends(arguments, server, tmp_path):
    write_plans(arguments(output_dir=str(tmp_path / "whole")))
    server.bodies.clear()
    args, number = arguments(), 3
    while (status := run_and_die(args, number)) != 0:
        assert status == -signal.SIGKILL
        number += 1
    assert number > 5
    assert results_of(args.output_dir) == results_of(tmp_path / "whole")


@pytest.mark.slow
def test_command_that_is_killed_again_and_again_ends_with_the_same_plans(arguments, server, tmp_path):
    write_plans(arguments(output_dir=str(tmp_path / "whole"), fallback="rule"))
    args = arguments()
    command = [sys.executable, "-m", "hierbd3lm.data.plans.write_plans", "--fallback", "rule", "--concurrency", "2"]
    for name in ("dataset", "output_dir", "model", "base_url", "num_samples"):
        command += [f"--{name}", str(getattr(args, name))]
    process, draws, num_kills = None, random.Random(0), 0
    allowed = draws.randint(2, 9)  # requests until the next kill

    def reply_or_kill(body):
        nonlocal allowed
        allowed -= 1
        if allowed == 0:
            process.kill()
        return write_reply(body)

    server.reply = reply_or_kill
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    while process is None or process.returncode != 0:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        printed, errors = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), errors
        num_kills += process.returncode != 0
        allowed = draws.randint(2, 9)
    assert num_kills >= 2
    assert printed.endswith(f"has a plan for {NUM_PROBLEMS} of {NUM_PROBLEMS}\n")
    assert results_of(args.output_dir) == results_of(tmp_path / "whole")


CHANGES = {
    "model": "other",
    "seed": 1,
    "num_samples": 4,
    "temperature": 0.1,
    "top_p": 0.5,
    "max_tokens": 9,
    "structured_output": False,
    "limit": 3,
}


def test_other_settings_are_another_run(arguments):
    write_plans(arguments())
    for name, value in CHANGES.items():
        changed = "num_problems" if name == "limit" else name
        with pytest.raises(ValueError, match=rf"`output_dir` must .*{changed}: .* stored, {value!r} now"):
            write_plans(arguments(**{name: value}))


def test_other_prompt_version_or_problems_are_another_run(arguments, problems_file, monkeypatch):
    args = arguments()
    write_plans(args)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="prompt_hash: "):
        patch.setattr("hierbd3lm.data.plans.prompt.INSTRUCTIONS", "Write a plan.")
        write_plans(args)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="version: "):
        patch.setattr(run, "__version__", "0.0")
        write_plans(args)
    Path(problems_file).write_text(Path(problems_file).read_text().replace("Tom", "Ann"))
    with pytest.raises(ValueError, match="hash_of_problems: "):
        write_plans(args)


def test_other_server_concurrency_and_fallback_are_the_same_run(arguments):
    write_plans(arguments())
    with PlanServer(write_reply) as other:
        write_plans(arguments(base_url=other.url, concurrency=2, timeout=3.0, fallback="rule"))


# Refusals


def test_refused_request_is_counted_and_asked_for_again(arguments, server, tmp_path):
    write_plans(arguments(output_dir=str(tmp_path / "whole")))
    refused = sorted(body["seed"] for body in server.bodies)[4]
    server.reply = lambda body: 400 if body["seed"] == refused else write_reply(body)
    args = arguments()
    summary = write_plans(args)
    assert (summary["num_refused"], summary["num_replies"]) == (1, NUM_PROBLEMS * NUM_SAMPLES - 1)
    server.reply = write_reply
    server.bodies.clear()
    assert write_plans(args)["num_refused"] == 0
    assert [body["seed"] for body in server.bodies] == [refused]
    assert results_of(args.output_dir) == results_of(tmp_path / "whole")


def test_server_that_refuses_everything_ends_the_run(arguments, server):
    server.reply = lambda body: 400
    with pytest.raises(ValueError, match=f"refused {MAX_REFUSALS} consecutive requests.*status 400"):
        write_plans(arguments(num_samples=MAX_REFUSALS))
    assert MAX_REFUSALS <= len(server.bodies) < NUM_PROBLEMS * MAX_REFUSALS


# The dataset on the Hub


def test_folder_is_a_dataset_with_a_card_that_tells_the_counts(arguments):
    args = arguments()
    summary = write_plans(args)
    dataset = load_reasoning_dataset(args.output_dir)
    assert dataset.to_list() == read_lines(args.output_dir, "plans.jsonl")
    card = Path(args.output_dir, "README.md").read_text("utf-8")
    assert f"A plan for {summary['num_plans']} of {NUM_PROBLEMS} solved problems" in card
    for name, count in summary["rejected_by"].items():
        assert re.search(rf"^\| `{name}` \| .+ \| {count} \|$", card, re.MULTILINE), name


def test_dataset_is_pushed_with_its_card_and_without_the_replies(arguments, monkeypatch):
    calls = []
    commit = SimpleNamespace(commit_url="https://a.commit")
    monkeypatch.setattr(hub, "commit_files", lambda files, *args, **kwargs: calls.append((set(files), args)) or commit)
    write_plans(arguments())
    assert calls == []
    write_plans(arguments(push_to_hub="me/plans", private=True))
    files = {"plans.jsonl", "README.md", "manifest.json", "summary.json"}
    assert calls == [(files, ("me/plans", "Upload plans", "dataset", True))]


# Arguments


def test_arguments_are_read_with_either_dash():
    args = parse_arguments(["--base-url", "http://x/v1", "--num_samples", "2", "--no_structured_output"])
    assert (args.base_url, args.num_samples, args.structured_output) == ("http://x/v1", 2, False)
    assert parse_arguments([]) == WritePlansArguments()
    assert "llama-3" in WritePlansArguments().model.lower()


@pytest.mark.parametrize(
    ("name", "value"), [("limit", 0), ("num_samples", 0), ("fallback", "socratic"), ("max_tokens", 0), ("top_p", 2.0)]
)
def test_bad_argument_is_refused_with_its_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, but got {value!r}"):
        WritePlansArguments(**{name: value})
