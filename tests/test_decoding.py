"""A tokenizer that does not keep answers is noticed before anything is trained or evaluated."""

import json

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel, WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer, Whitespace
from transformers import PreTrainedTokenizerFast

from hierbd3lm import train
from hierbd3lm.backbones_hierbd3lm import add_special_tokens
from hierbd3lm.data.decoding import count_lost_answers
from hierbd3lm.data.gsm8k.answers import answer_is_cut
from hierbd3lm.evaluation.runner import evaluate
from hierbd3lm.evaluation.scoring import format_summary

from .tiny_evaluation import FOREIGN_TOKEN, read_lines
from .tiny_tokenizer import make_tokenizer

ANSWERS = ["so 3 + 4 = 7\n#### 7", "#### 1,000", "no answer here"]
VOCABULARY = ["[UNK]", "[PAD]", *"0123456789+=#,", "####", "so", "no", "answer", "here", "1000", "000"]


def make_word_tokenizer(model, pre_tokenizer, decoder=None):
    tokenizer = Tokenizer(model({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (make_tokenizer, []),
        (lambda: make_word_tokenizer(WordPiece, BertPreTokenizer(), decoders.WordPiece()), [0, 1]),
        (lambda: make_word_tokenizer(WordLevel, Whitespace()), [1]),  # "1 , 000" is read as 1
    ],
)
def test_answers_that_a_tokenizer_does_not_keep_are_counted_and_shown(make, lost, capture_warnings):
    assert count_lost_answers(ANSWERS, make()) == len(lost)
    warnings = [line for line in capture_warnings if "does not keep" in line]
    assert len(warnings) == bool(lost)
    for row in range(len(ANSWERS)):
        assert (f"row {row}: " in "".join(warnings)) is (row in lost)


def test_training_says_which_answers_its_tokenizer_does_not_keep(tmp_path, capture_warnings):
    tokenizer = make_word_tokenizer(WordPiece, BertPreTokenizer(), decoders.WordPiece())
    add_special_tokens(tokenizer)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"question": "so", "plan": "+", "execution": ANSWERS[i % 2]} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"dataset": tmp_path / "rows.jsonl", "tokenizer": tmp_path / "tokenizer"}
    settings["output_dir"] = tmp_path / "out"
    settings |= {"question_len": 16, "plan_len": 8, "execution_len": 32, "block_size": 4, "max_steps": 1}
    settings |= {"num_validation_examples": 2, "use_cpu": True, "ema_decay": 0, "save_strategy": "no"}
    backbone = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings["backbone"] = json.dumps(backbone | {"num_key_value_heads": 1, "head_dim": 16})
    train.main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert (report["train"]["num_lost_answers"], report["validation"]["num_lost_answers"]) == (4, 2)
    assert any("does not keep 4 of 4 reference answers" in line for line in capture_warnings)


def test_an_evaluation_counts_lost_references_and_answers_after_a_stop_string(args, rows, script, dataset_of):
    texts = {row["question"]: (row["plan"], row["execution"]) for row in rows}
    cut = f"1 + 2 = 3\n {FOREIGN_TOKEN}{rows[0]['execution'].split(chr(10))[-1]}"
    texts[rows[0]["question"]] = (rows[0]["plan"], cut)
    script(texts)
    rows[3]["execution"] = f"{FOREIGN_TOKEN}{rows[3]['execution']}"
    arguments = args(dataset=dataset_of(rows))
    _, summary = evaluate(arguments)
    assert [row for row, line in enumerate(read_lines(arguments)) if line["unparsable"]] == [0]
    assert (summary["num_cut_answers"], summary["num_lost_references"]) == (1, 1)
    table = format_summary(summary)
    assert "answer after stop string       1" in table and "reference answer lost          1" in table


@pytest.mark.parametrize(
    ("text", "is_cut"),
    [("7</s>#### 7", True), ("#### 7</s>#### 8", False), ("7</s>", False), ("#### 7", False), ("", False)],
)
def test_an_answer_is_cut_if_all_of_them_come_after_a_stop_string(text, is_cut):
    assert answer_is_cut(text) is is_cut
