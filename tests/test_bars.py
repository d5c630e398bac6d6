"""The command lines of the benchmarks, their limits, and the plot of all results."""

import json
import runpy
import sys
from pathlib import Path

import pytest

import hierbd3lm.benchmarks
from hierbd3lm.benchmarks.bars import MAX_FACTOR, draw_bars, margin
from hierbd3lm.benchmarks.measure import bar, measure_parts

BENCHMARKS = Path(hierbd3lm.benchmarks.__file__).parent
SCRIPTS = [path.stem for path in sorted(BENCHMARKS.glob("*.py")) if '__name__ == "__main__"' in path.read_text()]


@pytest.mark.parametrize(
    ("measured", "at_most", "met", "factor"),
    [
        (0.5, True, True, 4.0),
        (4.0, True, False, 0.5),
        (4.0, False, True, 2.0),
        (0.5, False, False, 0.25),
        (0.0, True, True, MAX_FACTOR),
        (-0.1, True, True, MAX_FACTOR),
        (1e9, True, False, 1 / MAX_FACTOR),
    ],
)
def test_a_limit_of_2_is_margin_a_factor(measured, at_most, met, factor):
    row = bar("claim", measured, 2.0, at_most)
    assert row["met"] is met
    assert margin(row) == pytest.approx(factor)


def test_bars_of_all_results_are_drawn_and_other_files_left_alone(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"bars": [bar("a", 1.0, 2.0, True), bar("b", 0.0, 1.0, True)]}))
    (tmp_path / "other.json").write_text(json.dumps({"runs": []}))
    draw_bars(tmp_path)
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_describes_a_benchmark_and_runs_nothing(script, monkeypatch, capsys):
    files = {path: path.stat().st_mtime_ns for path in BENCHMARKS.rglob("*")}
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.delitem(sys.modules, f"hierbd3lm.benchmarks.{script}", raising=False)
    with pytest.raises(SystemExit) as error:
        runpy.run_module(f"hierbd3lm.benchmarks.{script}", run_name="__main__")
    text = capsys.readouterr().out
    assert error.value.code == 0
    assert text.startswith(f"usage: python -m hierbd3lm.benchmarks.{script} ")
    assert sys.modules["hierbd3lm.benchmarks"].__doc__ not in text and len(text.split("\n\n")[1]) > 20
    assert {path: path.stat().st_mtime_ns for path in BENCHMARKS.rglob("*") if path in files} == files


def test_a_part_that_does_not_exist_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "first", "frist"])
    with pytest.raises(SystemExit):
        measure_parts("script", {"first": pytest.fail, "second": pytest.fail}, "A test.")
    assert "`part` must be one of first, second, but got 'frist'" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["sampler", "speed"])
def test_a_benchmark_that_writes_into_the_folder_of_its_model_takes_folders_only(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--model", "me/tiny", "--baseline", "me/tiny"])
    monkeypatch.delitem(sys.modules, f"hierbd3lm.benchmarks.{script}", raising=False)
    with pytest.raises(SystemExit):
        runpy.run_module(f"hierbd3lm.benchmarks.{script}", run_name="__main__")
    assert "argument --model: must be a folder, but got 'me/tiny'" in capsys.readouterr().err
