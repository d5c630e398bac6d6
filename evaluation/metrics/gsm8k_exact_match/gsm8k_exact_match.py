"""Exact match of GSM8K answers as a metric for `evaluate`; the rules are in `hierbd3lm.data.gsm8k.answers`."""

import datasets
import evaluate

from hierbd3lm.data.gsm8k.answers import cut_at_stops, match_flexible, match_numeric, match_strict

DESCRIPTION = """
Fraction of generated GSM8K solutions with the correct final answer. `exact_match_strict` and `exact_match_flexible`
are the filters `strict-match` and `flexible-extract` of the task `gsm8k` (version 3.0) of lm-evaluation-harness, with
its stop strings. `exact_match_numeric` compares the value of the strict answer, so that `#### 18.00` equals 18.
"""

INPUTS = """
Args:
    predictions (list of `str`): generated solutions, not yet cut at stop strings.
    references (list of `str`): gold solutions, which end with `#### <answer>`, or the answers alone.

Returns:
    exact_match_strict, exact_match_flexible, exact_match_numeric (`float`): fractions in [0, 1] of the predictions.

Examples:
    >>> metric = evaluate.load("evaluation/metrics/gsm8k_exact_match")
    >>> metric.compute(predictions=["9 * 2 = 18\\n#### 18", "It is 18."], references=["#### 18", "#### 18"])
    {'exact_match_strict': 0.5, 'exact_match_flexible': 1.0, 'exact_match_numeric': 0.5}
"""

CITATION = """
@article{cobbe2021gsm8k,
  title={Training Verifiers to Solve Math Word Problems},
  author={Cobbe, Karl and Kosaraju, Vineet and Bavarian, Mohammad and Chen, Mark and Jun, Heewoo and Kaiser, Lukasz and
    Plappert, Matthias and Tworek, Jerry and Hilton, Jacob and Nakano, Reiichiro and Hesse, Christopher and
    Schulman, John},
  journal={arXiv preprint arXiv:2110.14168},
  year={2021}
}
"""

MATCHES = {
    "exact_match_strict": match_strict,
    "exact_match_flexible": match_flexible,
    "exact_match_numeric": match_numeric,
}


class GSM8KExactMatch(evaluate.Metric):
    """Fraction of predictions with the correct answer, for each of `MATCHES`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
            reference_urls=["https://github.com/EleutherAI/lm-evaluation-harness/tree/main/lm_eval/tasks/gsm8k"],
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = [(cut_at_stops(text), gold) for text, gold in zip(predictions, references, strict=True)]
        if not pairs:
            raise ValueError("`predictions` must have at least one text, but has none")
        return {name: sum(match(*pair) for pair in pairs) / len(pairs) for name, match in MATCHES.items()}
