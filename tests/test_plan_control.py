"""The measurements of plans: which commands they run, that they resume, and how their tables are computed."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from hierbd3lm.benchmarks import measure, plan_control, plan_samples
from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.synthetic.plan_swaps import KINDS, UNSEEN_KINDS
from hierbd3lm.train import parse_arguments

from .test_plan_dependence import make_checkpoint  # noqa: F401 (a fixture)


def make_run(name="hier", seed=0):
    return plan_control.Run(name, seed, 100, 50, 0.2, 0.02)


@pytest.mark.parametrize("name", plan_control.MODELS)
def test_every_model_trains_with_the_same_steps_and_unchanged_examples(name, monkeypatch):
    monkeypatch.chdir(plan_control.ROOT)
    model_args, data_args, args = parse_arguments(make_run(name).commands()["trainer_state.json"][2:])
    rates = (0, 0) if name == plan_control.WITHOUT else (0.2, 0.02)
    batch_size = 24 if name == plan_control.WITHOUT else 31  # 24 / (1 - 0.22) = 30.8
    sizes = data_args.num_train_examples, args.max_steps, args.per_device_train_batch_size
    assert sizes == (100 * batch_size, 100, batch_size)
    assert (data_args.counterfactual_plans, data_args.plan_dropout) == rates
    fields = {"algorithm": None, "hierarchical_mask": None, "joint": None}
    changed = {key: getattr(model_args, key) for key, value in fields.items() if getattr(model_args, key) != value}
    expected = {"bd3lm": {"algorithm": "bd3lm"}, "ar": {"algorithm": "ar"}}
    expected |= {"hier, no mask": {"hierarchical_mask": False}, "hier, joint": {"joint": True}}
    assert changed == expected.get(name, {})
    assert args.resume_from_checkpoint == "last"


def test_runs_of_other_settings_have_other_folders(monkeypatch):
    run = make_run()
    schedule = "{0: 1, 0.5: 4}"
    runs = [run, replace(run, seed=1), replace(run, steps=7), replace(run, block_size_schedule=schedule)]
    runs += [make_run(name) for name in plan_control.MODELS if name != "hier"]
    assert len({run.folder for run in runs}) == len(runs)
    command = runs[3].commands()["trainer_state.json"]
    assert command[command.index("--block_size_schedule") + 1] == schedule


def test_a_measurement_resumes_after_its_last_file(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_control, "OUTPUTS", tmp_path)
    run, calls = make_run(), []
    kinds = {KINDS[0]: {"swap_n": 5}} | {
        kind: {"swap_n": n, "swap_follows_step": rate, "swap_ignores_change": 0.0}
        for kind, n, rate in zip(UNSEEN_KINDS, (3, 1), (1.0, 0.0), strict=True)
    }
    contents = {
        file: {key: 0.5 for name, key in plan_control.COLUMNS.values() if name == file} for file in run.commands()
    }
    contents["analysis/analysis.json"]["swap_kinds"] = kinds

    def write(command, **settings):
        file = next(name for name, words in run.commands().items() if words == command)
        calls.append(file)
        (run.folder / file).parent.mkdir(exist_ok=True)
        (run.folder / file).write_text(json.dumps(contents[file]))

    monkeypatch.setattr(plan_control.subprocess, "run", write)
    row = run.finish({})
    assert calls == ["trainer_state.json", "likelihood.json", "analysis/analysis.json"]
    assert row["follows"] == 0.5 and row["follows, unseen kinds"] == pytest.approx(3 / 4)
    (run.folder / "likelihood.json").unlink()
    assert run.finish({}) == row and calls[3:] == ["likelihood.json"]


def test_bars_compare_with_the_model_without_changed_plans(tmp_path):
    def row(**values):
        kinds = {"number": {"swap_n": 3, "swap_follows_step": values.get("follows", 0.5)}}
        return dict.fromkeys(plan_control.COLUMNS, 0.5) | {"kinds": kinds} | values

    results = {make_run(seed=seed): row(follows=value) for seed, value in enumerate((0.9, 1.0))}
    alone = {bar["claim"]: bar for bar in plan_control.measure_bars(results)}
    assert len(alone) == 3 and alone["hier with changed plans: follows"]["measured"] == pytest.approx(0.95)
    results[make_run(plan_control.WITHOUT)] = row(**{"own plan": 0.6, "NLL plan": 0.4})
    bars = {bar["claim"]: bar for bar in plan_control.measure_bars(results)}
    assert bars["loss of exact match with the own plan"]["measured"] == pytest.approx(0.1)
    assert bars["NLL of the plan / without changed plans"]["measured"] == pytest.approx(1.25)
    assert not bars["NLL of the plan / without changed plans"]["met"]
    table = plan_control.format_models(results).split("\n")
    assert table[2].startswith("| hier | 2 | 0.95 |") and len(table) == 4
    kinds = plan_control.format_kinds(results).split("\n")
    assert kinds[0] == "| follows | number |" and kinds[2:] == ["| hier | 0.95 |", f"| {plan_control.WITHOUT} | 0.5 |"]
    plan_control.draw_kinds(results, tmp_path / "kinds.png")
    assert (tmp_path / "kinds.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_parts_are_measured_on_a_checkpoint(make_checkpoint, tmp_path, monkeypatch):  # noqa: F811
    folder = make_checkpoint(plan_len=48, execution_len=64)
    DataArguments(synthetic={"num_steps": [2, 2], "max_value": 50}).save(folder)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    flags = ["--model", folder, "--limit", "6", "--num_plans", "2"]
    monkeypatch.setattr(sys, "argv", ["plan_samples", *flags])
    torch.manual_seed(0)
    plan_samples.main()
    rows = {
        part: json.loads((tmp_path / f"plan_samples_{part}.json").read_text())["details"]["rows"]
        for part in ("replan", "repair", "plans")
    }
    [row] = rows["replan"]
    assert 0 < row["problems"] <= 6 and 0 < row["NFE of replan"] <= row["NFE anew"]
    assert [row["temperature"] for row in rows["repair"]] == [0.0, 1.0]
    assert [row["answers"] for row in rows["plans"]][:2] == ["greedy", "voting over 2 samples"]
    assert rows["plans"][1]["NFE"] > rows["plans"][0]["NFE"]
    text = (tmp_path / "plan_samples_plans.md").read_text()
    assert "| answers | exact match | NFE | tokens |" in text
