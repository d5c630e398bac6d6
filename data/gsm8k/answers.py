r"""Final answers: read from a text, compared with the reference, and counted over several samples.

Strict and flexible match are those of the `gsm8k` task (version 3.0) of lm-evaluation-harness 0.4.13: its two regex
filters, then exact match after its `regexes_to_ignore`. The numeric match is our own: it reads the strict answer and
compares values, so that `#### 18.00` is 18; where the target is a number, every strict match is a numeric match.

The harness cuts a generated text before it reads the answer; here that is [`cut_at_stops`], which the caller does.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from statistics import NormalDist

# tasks/gsm8k/gsm8k.yaml of lm-evaluation-harness: `until`, filters `strict-match` and `flexible-extract`, and what its
# metric `exact_match` ignores
STOPS = re.compile("|".join(map(re.escape, ("Question:", "</s>", "<|im_end|>"))))
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = tuple(re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"))
INVALID = "[invalid]"

DECIMAL = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


def cut_at_stops(text: str) -> str:
    """The text before the first of `STOPS`."""
    return STOPS.split(text, maxsplit=1)[0]


def extract_strict(text: str) -> str:
    """The first answer that stands behind `#### `, or `[invalid]`."""
    match = STRICT.search(text)
    return INVALID if match is None else match[1]


def extract_flexible(text: str) -> str:
    """The last thing in the text that looks like a number, or `[invalid]`."""
    matches = [match[0] for match in FLEXIBLE.finditer(text)]
    return matches[-1] if matches else INVALID


def normalize(text: str) -> str:
    """Removes, in this order: commas, `$`, everything up to the last `#### `, one trailing period; lowers the case."""
    for pattern in IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def parse_number(text: str) -> Decimal | None:
    """The value of a normalized answer; None where it is no plain decimal number."""
    normalized = normalize(text)
    return Decimal(normalized) if DECIMAL.fullmatch(normalized) else None


def is_parsable(text: str) -> bool:
    """Whether a text has a strict answer that is a number."""
    return parse_number(extract_strict(text)) is not None


def match_strict(prediction: str, target: str) -> bool:
    """Whether the strict answer of `prediction` is that of `target`: a gold text `... #### 18`, or `18` alone."""
    return normalize(extract_strict(prediction)) == normalize(target)


def match_flexible(prediction: str, target: str) -> bool:
    """Whether the flexible answer of `prediction` is that of `target`: a gold text `... #### 18`, or `18` alone."""
    return normalize(extract_flexible(prediction)) == normalize(target)


def match_numeric(prediction: str, target: str) -> bool:
    """Whether the strict answer of `prediction` has the value of `target`; an unparsable answer never has."""
    value = parse_number(extract_strict(prediction))
    return value is not None and value == parse_number(target)


def reference_answer(text: str) -> str:
    """The normalized answer of a gold text, which stands behind its last `#### `.

    Raises:
        ValueError: if the text has no `#### ` with an answer behind it.
    """
    answer = normalize(text).strip()
    if "#### " not in text or not answer:
        raise ValueError(f"`text` must end with '#### ' and the answer, but got {text[-80:]!r}")
    return answer


def count_votes(texts: Iterable[str]) -> list[tuple[Decimal, int]]:
    """The values of the texts' strict answers with the number of texts that gave each, most first.

    Of values with equally many votes, the one that was met first comes first. An unparsable text has no vote.
    """
    values = (parse_number(extract_strict(text)) for text in texts)
    return Counter(value for value in values if value is not None).most_common()


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a right one.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 2.1, equation 1: unbiased for k
    independent samples.

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
    """The score interval of a success rate, by default at 95 %.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927), p. 209-212.
    `successes` may be a sum of `n` rates in [0, 1]; as none of them varies more than a coin, the interval then errs on
    the wide side.

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
