"""How the benchmarks judge their figures and draw them."""

import json

import pytest

from hierbd3lm.benchmarks.bars import MAX_FACTOR, draw_bars, margin
from hierbd3lm.benchmarks.measure import bar


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
