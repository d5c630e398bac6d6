"""Parsing of the numbers in an English text, in digits and in words."""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

# Numbers of general knowledge that a solution may use: percent, coins, pints, days, months, hours, feet, angles ...
CONSTANTS = frozenset([Fraction(cents, 100) for cents in (1, 5, 10, 25, 50)]).union(
    map(Fraction, (0, 1, 2, 3, 4, 5, 7, 8, 10, 12, 16, 24, 28, 30, 31, 36, 52, 60, 90, 100)),
    map(Fraction, (180, 360, 365, 1000, 1440, 2000, 3600, 5280)),
)
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
CARDINALS = {word: i for i, word in enumerate(f"{ONES} seventeen eighteen nineteen".split())}
CARDINALS |= {word: 10 * i for i, word in enumerate(TENS.split(), 2)}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
# Words of a question that state a number; in a rule-based plan they are operations or units and are kept.
IMPLIED = {
    word: value
    for value, words in {
        2: "half halve twice double both pair couple",
        3: "third triple thrice",
        4: "fourth quarter quadruple",
        5: "fifth",
        6: "sixth",
        8: "eighth",
        10: "tenth",
        12: "dozen",
    }.items()
    for word in words.split()
}

NUMBER = r"(?:[0-9]+(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]*\.[0-9]+|[0-9]+)"
NUMBER_WORD = f"(?:{'|'.join([*CARDINALS, *SCALES][::-1])})"  # `seventeen` is tried before `seven`
QUANTITY = re.compile(
    rf"(?P<digits>{NUMBER})(?:[\s-]?(?P<scale>{'|'.join(SCALES)})\b)?"
    rf"|\b(?P<words>{NUMBER_WORD}(?:[\s-]{NUMBER_WORD})*)\b",
    re.IGNORECASE,
)


def quantity_value(quantity: re.Match) -> Fraction:
    """Return the value of a match of `QUANTITY`."""
    if quantity["digits"]:
        return Fraction(quantity["digits"].replace(",", "")) * SCALES.get((quantity["scale"] or "").lower(), 1)
    total = current = 0
    for word in re.split(r"[\s-]", quantity["words"].lower()):
        if word in CARDINALS:
            current += CARDINALS[word]
        elif word == "hundred":
            current = 100 * (current or 1)
        else:
            total, current = total + SCALES[word] * (current or 1), 0
    return Fraction(total + current)


def values(text: str) -> frozenset[Fraction]:
    """Return the numbers of a text, in digits and in number words."""
    return frozenset(map(quantity_value, QUANTITY.finditer(text)))


def implied_values(text: str) -> frozenset[Fraction]:
    """Return the numbers that a text states by words such as `half` and `dozens`."""
    return _values_of_words(text, IMPLIED)


def stated_values(text: str) -> frozenset[Fraction]:
    """Return all numbers of a text: in digits, in words, as part of a longer number, and by words such as `half`."""
    alone = [Fraction(digits.replace(",", "")) for digits in re.findall(NUMBER, text)]  # the 6 of `6 million` too
    return values(text).union(alone, _values_of_words(text, CARDINALS | SCALES | IMPLIED))


def _values_of_words(text: str, numbers: dict[str, int]) -> frozenset[Fraction]:
    words = re.findall("[a-z]+", text.lower())
    stems = {stem for word in words for stem in (word, word.removesuffix("s"), word.removesuffix("d"))}
    return frozenset(Fraction(numbers[stem]) for stem in stems & numbers.keys())


def with_plain_digits(text: str) -> str:
    """Replace characters that show numbers, such as `２４`, `²⁴` and `½`, by plain digits."""
    return unicodedata.normalize("NFKC", text)


def plain(value: Fraction) -> str:
    """Format a number in decimal digits, without trailing zeros."""
    return f"{(Decimal(value.numerator) / value.denominator).normalize():f}"
