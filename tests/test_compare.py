"""The comparison: which runs it makes, that it resumes where it stopped, and how its figures are computed."""

import json
import subprocess

import pytest

import hierbd3lm.benchmarks.compare as compare
from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
from hierbd3lm.train import parse_arguments

RECIPE = str(compare.ROOT / "configs" / "quickstart.yaml")
HIER_TOKENS_FIRST = f"hier{compare.TOKENS_FIRST}"
NAMES = [*compare.ALGORITHMS, *compare.ABLATIONS]


def make_run(algorithm="hier", size="base", seed=0, steps=100):
    return compare.Run(algorithm, size, seed, steps, "synthetic", RECIPE)


def make_row(**values):
    columns = dict.fromkeys(compare.COLUMNS, 1.0)
    return columns | {"curve": [(50, 2.0), (100, 1.0)], "training s": 100.0} | values


def test_every_algorithm_runs_at_both_sizes_with_three_seeds_and_every_ablation_once():
    runs = compare.choose_runs("synthetic", RECIPE, 100, quick=False)
    count = {name: sum(run.algorithm == name for run in runs) for name in NAMES}
    assert count == dict.fromkeys(compare.ALGORITHMS, 6) | dict.fromkeys(compare.ABLATIONS, 1)
    assert len({run.folder for run in runs}) == len(runs)
    some = compare.choose_runs("synthetic", RECIPE, 100, quick=True, only=["ar"], seeds=2)
    assert [(run.algorithm, run.size, run.seed) for run in some] == [("ar", "base", 0), ("ar", "base", 1)]
    some = compare.choose_runs("gsm8k", RECIPE, 100, quick=False, only=["ar", HIER_TOKENS_FIRST])
    assert [(run.algorithm, run.seed) for run in some] == [("ar", 0), (HIER_TOKENS_FIRST, 0)]


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_every_run_are_those_of_training(name):
    model_args, data_args, args = parse_arguments(make_run(name).training()[1:])
    fields = {"algorithm": "hier", "hierarchical_mask": True, "joint": False} | compare.ALGORITHMS.get(name, {})
    fields |= compare.ABLATIONS.get(name, {})
    config = HierBD3LMConfig(**model_args.config_fields())
    assert {key: getattr(config, key) for key in ("algorithm", "hierarchical_mask", "joint")} == {
        key: fields[key] for key in ("algorithm", "hierarchical_mask", "joint")
    }
    assert config.plan_clip == config.execution_clip == [0, 1]
    is_growing = name.endswith(compare.TOKENS_FIRST)
    assert (args.noisy_copies, args.resume_from_checkpoint) == (2 if is_growing else 1, "last")
    assert args.block_size_schedule == ({0: 1, 0.5: 4} if is_growing else None)
    assert data_args.num_train_examples == 100 * args.per_device_train_batch_size
    assert args.max_steps == 100


def test_blocks_grow_to_the_default_where_the_recipe_has_none(tmp_path):
    (tmp_path / "recipe.yaml").write_text("plan_len: 32\nexecution_len: 48\n")
    run = compare.Run(HIER_TOKENS_FIRST, "base", 0, 100, "gsm8k", str(tmp_path / "recipe.yaml"))
    assert parse_arguments(run.training()[1:])[2].block_size_schedule == {0: 1, 0.5: 16}


def test_runs_differ_in_nothing_but_what_is_compared():
    settings = {name: make_run(name).training() for name in NAMES if not name.endswith(compare.TOKENS_FIRST)}
    base = settings["hier"]
    for name, words in settings.items():
        added = compare.ALGORITHMS.get(name) or compare.ABLATIONS.get(name, {})
        added = [word for key, value in added.items() for word in (f"--{key}", str(value))]
        folder = str(make_run(name).folder)
        assert words == [folder if word == str(make_run().folder) else word for word in base] + added


@pytest.mark.parametrize("name", ["hier", HIER_TOKENS_FIRST])
def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch, name):
    monkeypatch.setattr(compare, "OUTPUTS", tmp_path)
    run, called = make_run(name), []
    files = list(run.commands())
    history = {"log_history": [{"step": 50, "eval_nll": 2.0}, {"loss": 1.0}, {"step": 100, "eval_nll": 1.0}]}

    def fake(command, fails, **kwargs):
        file = next(name for name, words in run.commands().items() if words == command)
        called.append(file)
        if file == fails:
            raise subprocess.CalledProcessError(1, command)
        written = {file: {"ppl": 1.5, "chosen": {"threshold": 0.9}}}
        if file == "trainer_state.json":
            written = {file: history, "train_results.json": {"train_runtime": 2.0}}
        for name, content in written.items():
            path = run.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))

    monkeypatch.setattr(compare.subprocess, "run", lambda command, **kwargs: fake(command, "eval/summary.json"))
    with pytest.raises(subprocess.CalledProcessError):
        run.finish({})
    monkeypatch.setattr(compare.subprocess, "run", lambda command, **kwargs: fake(command, None))
    row = run.finish({})
    failed = files.index("eval/summary.json")
    assert called == [*files[: failed + 1], *files[failed:]]
    assert (row["PPL"], row["sampler"]) == (1.5, {"threshold": 0.9})
    assert row["curve"] == [(50, 2.0), (100, 1.0)]
    assert row["training s"] == 2.0


def test_a_sampler_is_chosen_before_any_answer_but_for_ar():
    for name in NAMES:
        files = list(make_run(name).commands())
        assert (compare.SAMPLER_FILE in files) == (name != "ar")
        if name != "ar":
            assert (
                files.index("trainer_state.json")
                < files.index(compare.SAMPLER_FILE)
                < files.index("eval/summary.json")
            )


def test_speed_is_relative_to_ar_of_the_same_size_and_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "OUTPUTS", tmp_path)
    runs = [make_run("ar"), make_run(), make_run("ar", seed=1), make_run(seed=1), make_run("mdlm", size="small")]
    measured = []

    def fake(command, **kwargs):
        options = dict(zip(command[3::2], command[4::2], strict=True))
        measured.append((options["--model"], options["--baseline"]))
        text = json.dumps({"eager_over_baseline": 1.5, "compiled_over_baseline": 3.0})
        (compare.Path(options["--model"]) / "speed.json").write_text(text)

    monkeypatch.setattr(compare.subprocess, "run", fake)
    results = {run: make_row() for run in runs}
    for run in runs:
        run.folder.mkdir(parents=True)
    for _ in range(2):  # the second time it is there
        compare.add_speeds(results)
    assert measured == [(str(make_run().folder), str(make_run("ar").folder))]
    assert [run for run, row in results.items() if "x ar, batch 1" in row] == [make_run()]
    assert (results[make_run()]["x ar, batch 1"], results[make_run()]["x ar, compiled"]) == (1.5, 3.0)


def test_equal_time_is_when_the_fastest_run_of_a_size_was_through():
    fast, slow, small = make_run("ar"), make_run("hier"), make_run("ar", size="small")
    results = {
        fast: make_row(**{"training s": 75.0}),
        slow: make_row(**{"training s": 100.0}),
        small: make_row(**{"training s": 10.0}),
    }
    compare.add_equal_time(results)
    nll = {run: compare.math.log(row[compare.EQUAL_TIME]) for run, row in results.items()}
    assert nll[fast] == pytest.approx(1.0)
    assert nll[slow] == pytest.approx(1.5)  # at 75 of 100 seconds, half way from step 50 to step 100
    assert nll[small] == pytest.approx(1.0)


def test_table_has_mean_and_standard_deviation_over_seeds():
    results = {make_run(seed=seed): make_row(PPL=value) for seed, value in enumerate((1.0, 2.0, 3.0))}
    results |= {make_run("ar"): make_row(PPL=4.0, **{"plan match": None})}
    lines = compare.format_table(results, ["PPL", "plan match"]).splitlines()
    assert lines[2:] == ["| hier | base | 2 +/- 1 | 1 +/- 0 |", "| ar | base | 4 |  |"]


def test_page_and_picture_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "DOCS", tmp_path)
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    results = {make_run(name): make_row() for name in NAMES}
    results[make_run("hier")] |= dict.fromkeys(compare.ANALYSIS_COLUMNS, 0.25)
    compare.add_equal_time(results)
    compare.write(results, "command", jobs=1, threads=2, suffix="_longer")
    page = (tmp_path / "comparison_longer.md").read_text()
    assert all(f"| {name} | base |" in page for name in NAMES)
    assert "| hier | base | 0.25 |" in page
    assert "comparison_longer.png" in page and (tmp_path / "comparison_longer.png").stat().st_size > 0
    assert len(json.loads((tmp_path / "compare_longer.json").read_text())["runs"]) == len(NAMES)
