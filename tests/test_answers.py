"""Parsing of answers, against a table checked by hand; votes of several samples, against brute force."""

import itertools
from decimal import Decimal

import pytest
from scipy.stats import binomtest, norm

from hierbd3lm.data.gsm8k.answers import (
    INVALID,
    count_votes,
    cut_at_stops,
    extract_flexible,
    extract_strict,
    is_parsable,
    match_flexible,
    match_numeric,
    match_strict,
    normalize,
    parse_number,
    pass_at_k,
    reference_answer,
    wilson_interval,
)

GOLD_18 = "She sells 16 - 3 - 4 = 9 eggs.\nShe makes 9 * 2 = $18.\n#### 18"
GOLD_1080 = "He earns 27 * 40 = $1,080.\n#### 1,080"
GOLD_NEGATIVE = "It fell to 2 - 7 = -5 degrees.\n#### -5"

# (output, gold, strict answer, flexible answer, strict match, flexible match, numeric match)
TABLE = [
    # as trained
    ("9 * 2 = 18\n#### 18", GOLD_18, "18", "18", True, True, True),
    ("#### 18", GOLD_18, "18", "18", True, True, True),
    ("#### 17", GOLD_18, "17", "17", False, False, False),
    ("#### 1080", GOLD_1080, "1080", "1080", True, True, True),
    ("#### 1,080", GOLD_1080, "1,080", "1,080", True, True, True),
    ("#### -5", GOLD_NEGATIVE, "-5", "-5", True, True, True),
    ("#### 5", GOLD_NEGATIVE, "5", "5", False, False, False),
    # decimals
    ("#### 18.00", GOLD_18, "18.00", "18.00", False, False, True),
    ("#### 18.0", GOLD_18, "18.0", "18.0", False, False, True),
    ("#### 018", GOLD_18, "018", "018", False, False, True),
    ("#### 18.5", GOLD_18, "18.5", "18.5", False, False, False),
    ("#### 18.", GOLD_18, "18.", "18.", True, True, True),
    ("#### 18..", GOLD_18, "18..", "18..", False, False, True),
    ("#### 18...", GOLD_18, "18...", "18...", False, False, True),
    ("#### 18, in total", GOLD_18, "18,", "18,", True, True, True),
    ("#### .5", "#### 0.5", ".5", ".5", False, False, True),
    ("#### 0.5", "#### 0.5", "0.5", "0.5", True, True, True),
    ("#### -0", "#### 0", "-0", "-0", False, False, True),
    # commas anywhere
    ("#### 1,8", GOLD_18, "1,8", "1,8", True, True, True),
    ("#### ,18,", GOLD_18, ",18,", ",18,", True, True, True),
    ("#### 18,", GOLD_18, "18,", "18,", True, True, True),
    ("#### 10,80.00", GOLD_1080, "10,80.00", "10,80.00", False, False, True),
    # signs and units around the number
    ("#### $18", GOLD_18, INVALID, "$18", False, True, False),
    ("#### 18$", GOLD_18, "18", "18$", True, True, True),
    ("#### 18 dollars", GOLD_18, "18", "18", True, True, True),
    ("#### 18%", GOLD_18, "18", "18", True, True, True),
    ("#### +18", GOLD_18, INVALID, "18", False, True, False),
    ("#### - 5", GOLD_NEGATIVE, INVALID, "5", False, False, False),
    ("#### -$5", GOLD_NEGATIVE, INVALID, "-$5", False, True, False),
    ("#### 1.080", GOLD_1080, "1.080", "1.080", False, False, False),
    ("#### 1 080", GOLD_1080, "1", "080", False, False, False),
    ("#### 1e3", "#### 1000", "1", "3", False, False, False),
    # the mark
    ("####18", GOLD_18, INVALID, "18", False, True, False),
    ("####  18", GOLD_18, INVALID, "18", False, True, False),
    ("####\n18", GOLD_18, INVALID, "18", False, True, False),
    ("### 18", GOLD_18, INVALID, "18", False, True, False),
    ("##### 18", GOLD_18, "18", "18", True, True, True),
    ("#### eighteen", GOLD_18, INVALID, INVALID, False, False, False),
    ("The answer is 18.", GOLD_18, INVALID, "18.", False, True, False),
    ("The answer is 18!", GOLD_18, INVALID, "18", False, True, False),
    # the first mark counts, and the last number
    ("#### 18\nQuestion: 2 + 2?\n#### 4", GOLD_18, "18", "4", True, False, True),
    ("#### 4\n#### 18", GOLD_18, "4", "18", False, True, False),
    ("#### x\n#### 18", GOLD_18, "18", "18", True, True, True),
    ("#### 18 because 9 * 2 = 18, with 9 eggs", GOLD_18, "18", "9", True, False, True),
    ("#### 18 eggs...", GOLD_18, "18", "...", True, False, True),
    ("#### 18 ($1 = 1.)", GOLD_18, "18", "1.", True, False, True),
    # punctuation that the filters take for an answer
    ("#### .", GOLD_18, ".", INVALID, False, False, False),
    ("#### ,", GOLD_18, ",", INVALID, False, False, False),
    ("#### ...", GOLD_18, "...", "...", False, False, False),
    ("#### 1.8.0", GOLD_18, "1.8.0", "1.8.0", False, False, False),
    ("$$", GOLD_18, INVALID, "$$", False, False, False),
    # nothing to read
    ("", GOLD_18, INVALID, INVALID, False, False, False),
    ("#### ", GOLD_18, INVALID, INVALID, False, False, False),
    ("no idea", GOLD_18, INVALID, INVALID, False, False, False),
    ("[invalid]", GOLD_18, INVALID, INVALID, False, False, False),
    ("#### １８", GOLD_18, INVALID, INVALID, False, False, False),
    # single digits and ranges in a text
    ("so it is 5", "#### 5", INVALID, "5", False, True, False),
    ("2-5", "#### 5", INVALID, "-5", False, False, False),
    ("pages 10-18", GOLD_18, INVALID, "-18", False, False, False),
    # a target that is the answer alone
    ("#### 18", "18", "18", "18", True, True, True),
    ("#### 1080.0", "1,080", "1080.0", "1080.0", False, False, True),
]


@pytest.mark.parametrize(("output", "gold", "strict", "flexible", "is_strict", "is_flexible", "is_numeric"), TABLE)
def test_answer_is_read_and_compared(output, gold, strict, flexible, is_strict, is_flexible, is_numeric):
    assert extract_strict(output) == strict
    assert extract_flexible(output) == flexible
    assert match_strict(output, gold) is is_strict
    assert match_flexible(output, gold) is is_flexible
    assert match_numeric(output, gold) is is_numeric


def test_table_is_large_and_has_no_row_twice():
    assert len({row[:2] for row in TABLE}) == len(TABLE) >= 40


@pytest.mark.parametrize("row", TABLE)
def test_strict_match_is_a_numeric_match(row):
    output, gold = row[:2]
    assert match_numeric(output, gold) or not match_strict(output, gold)


@pytest.mark.parametrize("text", ["Question: a", "</s>a", "<|im_end|>a", "<|im_end|></s>Question:"])
def test_text_is_cut_at_the_first_stop(text):
    assert cut_at_stops(f"#### 5{text}") == "#### 5"
    assert cut_at_stops("#### 5 question </S>") == "#### 5 question </S>"


@pytest.mark.parametrize(
    ("output", "parsable"),
    [("#### 18", True), ("#### 1,080.50", True), ("#### .5", True), ("#### 1.2.3", False), ("18", False), ("", False)],
)
def test_parsable_is_a_strict_answer_with_a_value(output, parsable):
    assert is_parsable(output) is parsable


def test_numbers_that_python_reads_are_no_answers():
    assert [parse_number(text) for text in ("nan", "inf", "1_000", "1e3", "١٨", "0x12")] == [None] * 6


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (GOLD_1080, "1080"),
        ("$1,080.", "1080"),
        ("#### 1 #### 2", "2"),
        ("a\n####\n#### 3", "3"),
        ("18..", "18."),
        ("Yes.", "yes"),
        ("####18", "####18"),
    ],
)
def test_normalize(text, normal):
    assert normalize(text) == normal


@pytest.mark.parametrize(("text", "answer"), [(GOLD_18, "18"), (GOLD_1080, "1080"), (GOLD_NEGATIVE, "-5")])
def test_reference_answer(text, answer):
    assert reference_answer(text) == answer
    assert match_strict(f"#### {answer}", text)


@pytest.mark.parametrize("text", ["18", "", "#### ", "####18"])
def test_reference_without_answer_raises(text):
    with pytest.raises(ValueError, match="`text` must end with"):
        reference_answer(text)


@pytest.mark.parametrize(
    ("answers", "votes"),
    [
        (["#### 5", "#### 7", "#### 5"], [("5", 2), ("7", 1)]),
        (["#### 7", "#### 5", "#### 5", "#### 7"], [("7", 2), ("5", 2)]),
        (["#### 5", "#### 7", "#### 7", "#### 5.00", "#### 05"], [("5", 3), ("7", 2)]),
        (["#### 1,000", "#### 1000", "x", "#### x", "7"], [("1000", 2)]),
        (["#### -5", "#### 5"], [("-5", 1), ("5", 1)]),
        (["", "5", "#### 1.2.3"], []),
        ([], []),
    ],
)
def test_votes_are_counted_by_value_and_the_first_met_leads_a_tie(answers, votes):
    assert count_votes(answers) == [(Decimal(value), count) for value, count in votes]


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(num_samples):
    for num_right, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        samples = [i < num_right for i in range(num_samples)]
        hits = [any(subset) for subset in itertools.combinations(samples, k)]
        assert pass_at_k(num_samples, num_right, k) == pytest.approx(sum(hits) / len(hits))


def test_pass_at_k_is_unbiased():
    """Its mean over all outcomes of 6 samples that are right with probability p is 1 - (1 - p)^k."""
    for p, k in itertools.product((0.1, 0.5, 0.9), range(1, 7)):
        outcomes = itertools.product((False, True), repeat=6)
        mean = sum(p ** sum(o) * (1 - p) ** (6 - sum(o)) * pass_at_k(6, sum(o), k) for o in outcomes)
        assert mean == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize("arguments", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_of_impossible_counts_raises(arguments):
    with pytest.raises(ValueError, match="1 <= k <= num_samples, but got"):
        pass_at_k(*arguments)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 19), (431, 1319), (1319, 1319)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_interval_equals_scipy(successes, n, level):
    expected = binomtest(successes, n).proportion_ci(level, method="wilson")
    assert wilson_interval(successes, n, norm.ppf((1 + level) / 2)) == pytest.approx(tuple(expected), abs=1e-12)


def test_wilson_interval_is_that_of_95_percent_by_default():
    expected = binomtest(431, 1319).proportion_ci(0.95, method="wilson")
    assert wilson_interval(431, 1319) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize("arguments", [(1, 0), (-1, 5), (6, 5), (1, 5, 0.0), (1, 5, -1.0)])
def test_wilson_interval_of_impossible_counts_raises(arguments):
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        wilson_interval(*arguments)
