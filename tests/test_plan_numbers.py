"""Numbers of a text are read alike in digits and in words."""

from fractions import Fraction

import pytest

from hierbd3lm.data.gsm8k.numbers import implied_values, plain, stated_values, values

ONES = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
WORDS = ["zero", *ONES.split(), "eighteen", "nineteen"]
TENS = {20: "twenty", 30: "thirty", 40: "forty", 50: "fifty", 60: "sixty", 70: "seventy", 80: "eighty", 90: "ninety"}


def in_words(number):
    """English for a number below a million."""
    if number < 20:
        return WORDS[number]
    if number < 100:
        return TENS[number - number % 10] + (f"-{WORDS[number % 10]}" if number % 10 else "")
    for value, name in ((1000, "thousand"), (100, "hundred")):
        if number >= value:
            rest = number % value
            return f"{in_words(number // value)} {name}" + (f" {in_words(rest)}" if rest else "")
    raise AssertionError


@pytest.mark.parametrize("number", [*range(130), 200, 345, 999, 1000, 1001, 1234, 20_000, 123_456, 900_090])
def test_number_in_words_commas_and_digits_is_the_same(number):
    for text in (
        f"{number}",
        f"{number:,}",
        f"${number:,}.00",
        f"{number}%",
        in_words(number),
        in_words(number).upper(),
    ):
        assert values(f"He has {text} of them.") == {number}, text


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.5 and .25", {Fraction(1, 2), Fraction(1, 4)}),
        ("24clips, x24", {24}),
        ("6 million and 2 hundred", {6_000_000, 200}),
        ("1/2", {1, 2}),
        ("someone's tension is often weighty", set()),
        ("", set()),
    ],
)
def test_numbers_of_a_text(text, numbers):
    assert values(text) == numbers


def test_words_imply_numbers_whatever_their_ending():
    assert implied_values("Half a dozen, twice; both halved and doubled, two thirds") == {12, 2, 3}
    assert implied_values("one two 3") == set()


def test_stated_are_numbers_their_parts_and_what_words_imply():
    assert stated_values("6 million in forty-five boxes, a third of them red") == {6, 10**6, 6 * 10**6, 45, 40, 5, 3}


@pytest.mark.parametrize(
    ("value", "text"), [(Fraction(5), "5"), (Fraction(1, 4), "0.25"), (Fraction(10**6), "1000000"), (Fraction(0), "0")]
)
def test_number_is_written_in_plain_digits(value, text):
    assert plain(value) == text
