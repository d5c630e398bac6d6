"""Today's behaviour is that of `golden/values.json`."""

import pytest

from .golden.record import COMPILED, all_cases, generate_case, read_values

CASES, VALUES = all_cases(), read_values()


def assert_equal(value, expected):
    """Integers and texts exactly, floats to a relative deviation of 1e-5, or 1e-6 near 0."""
    assert value.keys() == expected.keys()
    for name, item in expected.items():
        numbers = item if isinstance(item, list) else [item]
        has_floats = any(isinstance(number, float) for number in numbers)
        assert value[name] == (pytest.approx(item, rel=1e-5, abs=1e-6) if has_floats else item), name


def test_every_case_is_recorded():
    assert list(VALUES) == list(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_value_is_the_recorded_one(case):
    assert_equal(CASES[case](), VALUES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_steps_give_the_recorded_ids(case, compiler):
    assert_equal(generate_case(case, compile_steps=True), VALUES[f"generate/{case}"])


def test_cases_cover_rows_that_end_and_rows_that_reach_their_limit():
    finished = [row for name, value in VALUES.items() if name.startswith("generate/") for row in value["finished"]]
    assert 0.3 < sum(finished) / len(finished) < 0.8
