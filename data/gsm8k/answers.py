r"""Extraction of final answers and comparison with the reference, for one text or for several samples.

Strict and flexible match are those of the `gsm8k` task (version 3.0) of lm-evaluation-harness 0.4.13: its two regex
filters, then exact match after its `regexes_to_ignore`. The numeric match is not part of the harness: it compares the
value of the strict answer, so that `#### 18.00` matches 18. If the target is a number, every strict match is a numeric
match.

The harness cuts a generated text at stop strings before it reads the answer: callers apply [`cut_at_stops`].
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from statistics import NormalDist

# tasks/gsm8k/gsm8k.yaml of lm-evaluation-harness: `until`, the filters `strict-match` and `flexible-extract`, and the
# patterns that its metric `exact_match` ignores
STOPS = re.compile("|".join(map(re.escape, ("Question:", "</s>", "<|im_end|>"))))
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = tuple(re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"))
INVALID = "[invalid]"

DECIMAL = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


def cut_at_stops(text: str) -> str:
    """Return the text before the first stop string."""
    return STOPS.split(text, maxsplit=1)[0]


def answer_is_cut(text: str) -> bool:
    """Return whether a stop string cuts off the only answers of a text."""
    return extract_strict(text) != INVALID == extract_strict(cut_at_stops(text))


def extract_strict(text: str) -> str:
    """Return the first answer after `#### `, or `[invalid]`."""
    match = STRICT.search(text)
    return INVALID if match is None else match[1]


def extract_flexible(text: str) -> str:
    """Return the last substring that looks like a number, or `[invalid]`."""
    matches = [match[0] for match in FLEXIBLE.finditer(text)]
    return matches[-1] if matches else INVALID


def normalize(text: str) -> str:
    """Remove, in this order: commas, `$`, everything up to the last `#### `, one trailing period; then lowercase."""
    for pattern in IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def parse_number(text: str) -> Decimal | None:
    """Return the value of an answer, or None if it is not a plain decimal number; trailing periods are ignored."""
    normalized = normalize(text).rstrip(".")
    return Decimal(normalized) if DECIMAL.fullmatch(normalized) else None


def is_parsable(text: str) -> bool:
    """Return whether the strict answer of a text is a number."""
    return parse_number(extract_strict(text)) is not None


def match_strict(prediction: str, target: str) -> bool:
    """Return whether the strict answer of `prediction` equals that of `target`: a text `... #### 18`, or `18`."""
    return normalize(extract_strict(prediction)) == normalize(target)


def match_flexible(prediction: str, target: str) -> bool:
    """Return whether the flexible answer of `prediction` equals that of `target`: a text `... #### 18`, or `18`."""
    return normalize(extract_flexible(prediction)) == normalize(target)


def match_numeric(prediction: str, target: str) -> bool:
    """Return whether the strict answer of `prediction` has the value of `target`; False if it is not a number."""
    value = parse_number(extract_strict(prediction))
    return value is not None and value == parse_number(target)


def reference_answer(text: str) -> str:
    """Return the normalized answer of a reference text, which follows its last `#### `.

    Raises:
        ValueError: if the text has no `#### ` followed by an answer.
    """
    answer = normalize(text).strip()
    if "#### " not in text or not answer:
        raise ValueError(f"`text` must end with '#### ' and an answer, but got {text[-80:]!r}")
    return answer


def count_votes(texts: Iterable[str]) -> list[tuple[Decimal, int]]:
    """Count how many texts gave each strict answer, by value, in order of decreasing count.

    Ties are broken by first occurrence. A text whose answer is not a number has no vote.
    """
    values = (parse_number(extract_strict(text)) for text in texts)
    return Counter(value for value in values if value is not None).most_common()


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the probability that k of the samples, drawn without replacement, include a correct one.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 2.1, equation 1: the unbiased
    estimate for k independent samples.

    Raises:
        ValueError: unless `0 <= num_right <= num_samples` and `1 <= k <= num_samples`.
    """
    if not 0 <= num_right <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f"`num_samples`, `num_right` and `k` must satisfy 0 <= num_right <= num_samples, 1 <= k <= num_samples, "
            f"but got {num_samples}, {num_right}, {k}"
        )
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def wilson_interval(successes: float, n: int, z: float = NormalDist().inv_cdf(0.975)) -> tuple[float, float]:
    """Return the Wilson score interval of a success rate, by default at 95 %.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927), p. 209-212.
    `successes` may be a sum of `n` rates in [0, 1]. None of them has a larger variance than a Bernoulli variable of
    the same mean, so the interval is then conservative.

    Raises:
        ValueError: unless `0 <= successes <= n`, `n >= 1` and `z > 0`.
    """
    if n < 1 or not 0 <= successes <= n or not z > 0:
        raise ValueError(
            f"`successes`, `n` and `z` must satisfy 0 <= successes <= n, n >= 1, z > 0, but got {successes}, {n}, {z}"
        )
    rate = successes / n
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return max(0.0, center - half_width), min(1.0, center + half_width)
