"""Words that were cut apart are whole again."""

import pytest
from datasets import Dataset

from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.loading import load_documents
from hierbd3lm.data.splits import load_split
from hierbd3lm.data.text.detokenization import RULES, detokenize

CASES = [
    ("wikitext", " = = Early life = = \n", " == Early life ==\n"),
    (
        "wikitext",
        "the 1 @,@ 500 @-@ ton ship , at 3 @.@ 5 knots ; it sank . He",
        "the 1,500-ton ship, at 3.5 knots; it sank. He",
    ),
    ("wikitext", 'He said " no way " ( or so ) [ 1 ] .', 'He said "no way" (or so) [1] .'),
    ("wikitext", "the crew 's boat , the sailors ' oars", "the crew's boat, the sailors' oars"),
    ("wikitext", "Why ? Because ! It is 5 ° C : cold", "Why? Because! It is 5°C: cold"),
    ("ptb", "mr. <unk> did n't sell N N of the company 's shares", "mr. ? didn't sell 1 1 of the company's shares"),
    ("ptb", "$ N million # N and the banks ' loans", "$1 million #1 and the banks' loans"),
    ("ptb", r"a savings \/ loan", "a savings / loan"),
    (
        "lm1b",
        "They won , did they ? Yes ! It is the club 's cup .",
        "They won, did they? Yes! It is the club's cup.",
    ),
    (
        "lm1b",
        'See http : / / a.org : " A day , " he said ; 3 / 4',
        'See http://a.org: "A day," he said; 3/4',
    ),
    ("lm1b", "It cost $ 5 ( or £ 4 ) ?", "It cost $5 (or £4)?"),
    ("lambada", "  “ hello , ” she said\n", '\n" hello , " she said'),
    ("papers", "the model ( fig . 1 ) of xcite , which holds .", "the model (fig. 1) of xcite, which holds."),
]


@pytest.mark.parametrize(("rules", "text", "expected"), CASES)
def test_words_are_whole_again(rules, text, expected):
    assert detokenize(text, rules) == expected


@pytest.mark.parametrize("rules", RULES)
def test_plain_prose_is_left_alone(rules):
    text = "\nThe 3 dogs (all small) didn't bark: \"no\", she said. It's Tom's $5, isn't it? Yes! A-b; c/d."
    assert detokenize(text, rules) == text


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_are_read_through_the_rules(tmp_path, streaming):
    Dataset.from_dict({"body": ["one , two", "it did n't"]}).to_json(tmp_path / "rows.jsonl")
    rows = load_documents(tmp_path / "rows.jsonl", None, None, "body", "wikitext", streaming=streaming)
    assert [row["text"] for row in rows] == ["one, two", "it did n't"]


def test_a_run_names_its_rules(tmp_path):
    Dataset.from_dict({"text": ["it did n't", "b", "c"]}).to_json(tmp_path / "rows.jsonl")
    args = DataArguments(
        dataset=str(tmp_path / "rows.jsonl"), text_column="text", detokenizer="ptb", num_validation_examples=1
    )
    assert load_split(args, "train")["text"][:] == ["it didn't", "b"]


def test_unknown_rules_and_rules_without_plain_text_are_refused():
    with pytest.raises(ValueError, match=r"`detokenizer` must be one of wikitext, ptb, .*but got 'moses'"):
        DataArguments(dataset="a.txt", detokenizer="moses")
    with pytest.raises(ValueError, match="`detokenizer` must be None without `text_column`, but got 'ptb'"):
        DataArguments(detokenizer="ptb")
