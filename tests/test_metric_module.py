"""The metric for `evaluate` agrees with lm-evaluation-harness and the evaluation."""

import doctest
import importlib
import re
import sys
from pathlib import Path

import evaluate
import pytest

from hierbd3lm.data.gsm8k.answers import cut_at_stops, match_numeric

from .test_lm_eval_metrics import ROWS, harness  # noqa: F401 a fixture

FOLDER = Path(__file__).parents[1] / "evaluation" / "metrics" / "gsm8k_exact_match"
NAMES = {"exact_match_strict": "strict-match", "exact_match_flexible": "flexible-extract"}


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    """The metric as loaded by `evaluate`, which copies it into a modules folder, here a temporary one."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", cache)
        patch.syspath_prepend(cache)
        yield evaluate.load(str(FOLDER), cache_dir=str(cache))


def test_metric_agrees_with_the_harness(metric, harness):  # noqa: F811
    outputs, golds = zip(*ROWS, strict=True)
    scores = metric.compute(predictions=outputs, references=golds)
    for name, filter_name in NAMES.items():
        expected = [harness[row, filter_name] for row in range(len(ROWS))]
        assert scores[name] == pytest.approx(sum(expected) / len(expected))
    expected = [match_numeric(cut_at_stops(output), gold) for output, gold in ROWS]
    assert scores["exact_match_numeric"] == pytest.approx(sum(expected) / len(expected))
    assert scores.keys() == {*NAMES, "exact_match_numeric"} and len({*scores.values()}) == 3


def test_results_are_added_batch_by_batch(metric):
    for outputs in (["#### 18", "18."], ["#### 18.00"]):
        metric.add_batch(predictions=outputs, references=["#### 18"] * len(outputs))
    scores = metric.compute()
    assert scores == {
        "exact_match_strict": pytest.approx(1 / 3),
        "exact_match_flexible": pytest.approx(2 / 3),
        "exact_match_numeric": pytest.approx(2 / 3),
    }


def test_examples_in_card_and_description_are_correct(metric, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load", lambda path: metric)
    card = (FOLDER / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", card, re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed
    example = doctest.DocTestParser().get_doctest(metric.inputs_description, {"evaluate": evaluate}, "", None, None)
    assert doctest.DocTestRunner().run(example) == (0, 2)


def test_no_prediction_raises(metric):
    with pytest.raises(ValueError, match="`predictions` must have at least one text"):
        metric.compute(predictions=[], references=[])


def test_missing_package_is_reported(metric, monkeypatch):
    monkeypatch.setitem(sys.modules, "hierbd3lm", None)
    with pytest.raises(ImportError, match=r"you need to install the following dependencies.*hierbd3lm"):
        evaluate.load(str(FOLDER))


def test_rules_are_defined_in_one_place(metric):
    module = importlib.import_module(type(metric).__module__)
    answers = importlib.import_module("hierbd3lm.data.gsm8k.answers")
    assert module.match_strict is answers.match_strict and module.match_flexible is answers.match_flexible
    assert Path(module.__file__).parent != FOLDER  # a copy, alone in its folder
