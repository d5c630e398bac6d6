"""Strict and flexible match agree with the `gsm8k` task of lm-evaluation-harness."""

import os
import random
from pathlib import Path

import lm_eval
import pytest
import yaml
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import get_metric
from lm_eval.api.task import ConfigurableTask
from lm_eval.filters import build_filter_ensemble
from lm_eval.models.utils import postprocess_generated_text

from hierbd3lm.data.gsm8k.answers import (
    count_votes,
    cut_at_stops,
    extract_flexible,
    extract_strict,
    match_flexible,
    match_strict,
    normalize,
    reference_answer,
)
from hierbd3lm.data.gsm8k.problems import load_gsm8k_rows

from .test_answers import TABLE as ANSWERS_BY_HAND

TASK = yaml.safe_load(Path(lm_eval.__file__).with_name("tasks").joinpath("gsm8k", "gsm8k.yaml").read_text())
MATCHES = {"strict-match": match_strict, "flexible-extract": match_flexible}

GOLD, GOLD_1450, GOLD_MINUS, GOLD_HALF = "9 * 2 = 18\n#### 18", "= $1,450.\n#### 1,450", "2 - 7\n#### -5", "#### 0.5"
TRICKY = [
    # well-formed outputs
    ("16 - 3 - 4 = 9\n9 * 2 = 18\n#### 18", GOLD),
    ("#### 18\n", GOLD),
    ("\n\n#### 18\n\n", GOLD),
    ("#### 18 ", GOLD),
    ("\t#### 18\t", GOLD),
    ("#### 18\r\n", GOLD),
    # commas and dollars
    ("#### 1,450", GOLD_1450),
    ("#### 1450", GOLD_1450),
    ("#### $1,450", GOLD_1450),
    ("#### $ 1,450", GOLD_1450),
    ("#### 1,450$", GOLD_1450),
    ("#### 1,450.00", GOLD_1450),
    ("#### 1, 450", GOLD_1450),
    ("#### 1 450", GOLD_1450),
    ("#### 1.450", GOLD_1450),
    ("#### 1'450", GOLD_1450),
    ("#### 1\u00a0450", GOLD_1450),
    ("#### \u20ac1,450", GOLD_1450),
    ("#### US$1450", GOLD_1450),
    ("#### 1,4,5,0,", GOLD_1450),
    ("#### ,,,", GOLD_1450),
    ("#### $", GOLD_1450),
    ("$1,450 #### ", GOLD_1450),
    # signs
    ("#### -5", GOLD_MINUS),
    ("#### \u22125", GOLD_MINUS),
    ("#### \u20135", GOLD_MINUS),
    ("#### --5", GOLD_MINUS),
    ("#### -$5", GOLD_MINUS),
    ("#### $-5", GOLD_MINUS),
    ("#### (5)", GOLD_MINUS),
    ("#### -5.", GOLD_MINUS),
    ("#### -", GOLD_MINUS),
    ("#### +18", GOLD),
    ("#### 10-18", GOLD),
    # decimals, fractions, units
    ("#### 18.00", GOLD),
    ("#### 18.0", GOLD),
    ("#### 18.", GOLD),
    ("#### 18..", GOLD),
    ("#### 18.,", GOLD),
    ("#### 18,.", GOLD),
    ("18.$", GOLD),
    ("#### .18", GOLD),
    ("#### 18.\n", GOLD),
    ("#### 0.5", GOLD_HALF),
    ("#### .5", GOLD_HALF),
    ("#### 1/2", GOLD_HALF),
    ("#### 50%", GOLD_HALF),
    ("#### 18%", GOLD),
    ("#### 18 %", GOLD),
    ("#### 18 eggs", GOLD),
    ("#### 18eggs", GOLD),
    ("#### 1.8e1", GOLD),
    ("#### 0018", GOLD),
    # marks
    ("####18", GOLD),
    ("####  18", GOLD),
    ("####\t18", GOLD),
    ("####\n18", GOLD),
    ("####\u00a018", GOLD),
    ("### 18", GOLD),
    ("##### 18", GOLD),
    ("# # # # 18", GOLD),
    ("#### #### 18", GOLD),
    ("#### 18 #### 17", GOLD),
    ("#### 17 #### 18", GOLD),
    ("#### a\n#### b\n#### 18", GOLD),
    ("#### 18####", GOLD),
    ("**#### 18**", GOLD),
    ("#### **18**", GOLD),
    ("#### \\boxed{18}", GOLD),
    ("#### [18]", GOLD),
    ("#### =18", GOLD),
    ("#### ~18", GOLD),
    ("#### The answer is 18.", GOLD),
    ("The answer is 18.", GOLD),
    ("It is $18.", GOLD),
    ("18", GOLD),
    ("5", "#### 5"),
    # text after the answer
    ("#### 18\nShe had 16 eggs.", GOLD),
    ("#### 18 (of 20)", GOLD),
    ("#### 18...", GOLD),
    ("#### 18, or 17.", GOLD),
    ("#### 17, no: 18", GOLD),
    # stop strings
    ("#### 18\n\nQuestion: How many?\n#### 3", GOLD),
    ("#### 18</s>#### 3", GOLD),
    ("#### 18<|im_end|>\n3", GOLD),
    ("Question: 16 eggs\n#### 18", GOLD),
    ("</s>#### 18", GOLD),
    ("#### 1</s>8", GOLD),
    ("#### 18 question: 3", GOLD),
    ("#### 18 </S> 3", GOLD),
    ("#### 3<|im_end|>Question: </s>#### 18", GOLD),
    ("3 Question:<|im_end|> 18", "#### 3"),
    # no answer
    ("", GOLD),
    (" ", GOLD),
    ("####", GOLD),
    ("#### ", GOLD),
    ("#### eighteen", GOLD),
    ("#### x", GOLD),
    ("#### \uff11\uff18", GOLD),
    ("#### \u0661\u0668", GOLD),
    ("[invalid]", GOLD),
    ("#### [invalid]", GOLD),
    ("I do not know.", GOLD),
    ("...", GOLD),
]
ROWS = [*TRICKY, *((output, gold) for output, gold, *_ in ANSWERS_BY_HAND)]


class Scripted(LM):
    """Model that returns the outputs of a table, cut at stop strings like those of the harness's models."""

    def generate_until(self, requests, disable_tqdm=False):
        return [
            postprocess_generated_text(request.doc["question"], request.args[1]["until"], None) for request in requests
        ]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture(scope="module")
def harness():
    """Scores of the table's rows for each filter, from a run of the installed harness."""
    rows = [{"question": output, "answer": gold} for output, gold in ROWS]
    own_data = {"custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}, "num_fewshot": 0}
    task = ConfigurableTask(config=TASK | own_data | {"training_split": None, "fewshot_split": None})
    results = lm_eval.evaluate(Scripted(), {"gsm8k": task}, bootstrap_iters=0, log_samples=True)
    samples = results["samples"]["gsm8k"]
    return {(sample["doc_id"], sample["filter"]): sample["exact_match"] for sample in samples}


def test_table_is_large_has_unique_rows_and_both_outcomes(harness):
    assert len(TRICKY) >= 60 and len({*TRICKY}) == len(TRICKY)
    assert len(harness) == 2 * len(ROWS)
    for name in MATCHES:
        right = [harness[row, name] for row in range(len(TRICKY))]
        assert {*right} == {0.0, 1.0} and 20 <= sum(right) <= len(right) - 20


@pytest.mark.parametrize("name", MATCHES)
@pytest.mark.parametrize("row", range(len(ROWS)), ids=[repr(output) for output, _ in ROWS])
def test_match_agrees_with_the_harness(harness, row, name):
    output, gold = ROWS[row]
    assert MATCHES[name](cut_at_stops(output), gold) == harness[row, name]


def filter_texts(name, texts):
    """Apply a filter of the harness's task to texts."""
    steps = next(entry["filter"] for entry in TASK["filter_list"] if entry["name"] == name)
    components = [(step["function"], {k: v for k, v in step.items() if k != "function"}) for step in steps]
    instances = [Instance("generate_until", {}, (text,), i, resps=[text]) for i, text in enumerate(texts)]
    build_filter_ensemble(name, components).apply(instances)
    return [instance.filtered_resps[name] for instance in instances]


def random_texts(count):
    """Random short texts of the patterns that the filters look for, in any order."""
    pieces, draw = ["#### ", "#", "-", "$", ",", ".", "\n", " ", "%", "x", "\u2212", *"0185"], random.Random(0)
    return ["".join(draw.choices(pieces, k=draw.randint(0, 9))) for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "extract"), [("strict-match", extract_strict), ("flexible-extract", extract_flexible)]
)
def test_answers_of_random_texts_are_extracted_as_in_the_harness(name, extract):
    texts = random_texts(3000)
    answers = filter_texts(name, texts)
    assert [extract(text) for text in texts] == answers
    assert 300 < sum(answer != "[invalid]" for answer in answers) < 2990


def test_random_texts_are_compared_as_in_the_harness():
    """Compare all pairs of an answer and a gold text, with the settings of `exact_match` in the task."""
    settings = {name: value for name, value in TASK["metric_list"][0].items() if name.startswith(("ignore", "regex"))}
    assert settings.keys() == {"ignore_case", "ignore_punctuation", "regexes_to_ignore"}
    exact_match, texts = get_metric("exact_match"), random_texts(120)
    outcomes = []
    for answer in dict.fromkeys(filter_texts("flexible-extract", texts)):
        for gold in texts:
            is_match = exact_match(predictions=[answer], references=[gold], **settings)["exact_match"]
            assert (normalize(answer) == normalize(gold)) == is_match
            outcomes.append(is_match)
    assert 50 < sum(outcomes) < len(outcomes) / 2


def test_majority_vote_agrees_with_the_harness():
    """Every text has a strict answer in the same notation, as the filter of the harness counts texts, not values."""
    draw, ties = random.Random(0), 0
    for _ in range(300):
        texts = [f"#### {draw.randint(0, 3)}" for _ in range(draw.randint(1, 7))]
        instance = Instance("generate_until", {}, ("",), 0, resps=texts)
        build_filter_ensemble("vote", [("regex", None), ("majority_vote", None), ("take_first", None)]).apply(
            [instance]
        )
        votes = count_votes(texts)
        assert str(votes[0][0]) == instance.filtered_resps["vote"]
        ties += len(votes) > 1 and votes[0][1] == votes[1][1]
    assert ties > 30


@pytest.mark.skipif("GSM8K_DIR" not in os.environ, reason="GSM8K_DIR is not set: the real GSM8K is not there")
def test_reference_answers_of_gsm8k_match_the_harness():
    """The harness compares with the whole gold text; the dataset only keeps its normalized answer."""
    for split, count in (("train", 7473), ("test", 1319)):
        golds = load_gsm8k_rows(split)["answer"][:]
        assert len(golds) == count
        assert [normalize(gold) for gold in golds] == [normalize(reference_answer(gold)) for gold in golds]
