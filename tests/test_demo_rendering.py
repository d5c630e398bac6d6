"""Tokens and masks as HTML: nothing is lost, nothing of a text becomes markup."""

import json
from html.parser import HTMLParser

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hierbd3lm.data.tokenization import train_tokenizer
from hierbd3lm.demo.attention import equal_rows, generation_mask, picture_html
from hierbd3lm.demo.recording import Token
from hierbd3lm.demo.rendering import (
    TokenTexts,
    confidence_colour,
    describe_token,
    figures_html,
    message_html,
    panel_html,
    segment_html,
)
from hierbd3lm.masking_hierbd3lm import EXECUTION, PLAN, QUESTION

from .tiny import make_model
from .tiny_algorithms import OWN_SIZE
from .tiny_tokenizer import make_config_for, make_tokenizer

TEXT = "Ä girl's 3 + 4 → 7 👍\n  x\ty"
SCRIPT = "<script>alert(1)</script> & \"quoted\" 'text' ${1} {{2}}"


class Tags(HTMLParser):
    """Tags with their attributes, and the text of a piece of HTML."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.texts, self.depth = [], [], 0
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.depth += tag not in ("rect", "path")

    def handle_endtag(self, tag):
        self.depth -= tag not in ("rect", "path")

    def handle_data(self, data):
        self.texts.append(data)


def metaspace_tokenizer():
    """A tokenizer that drops the first space when it decodes, as that of Llama 2 does."""
    letters = ["▁", *dict.fromkeys(TEXT.replace(" ", "")), "a"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(dict.fromkeys(letters))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {
    "bytes": make_tokenizer,
    "words": lambda: train_tokenizer([TEXT, "a"]),
    "byte-level BPE": lambda: train_tokenizer([TEXT, "a"], 300),
    "metaspace": metaspace_tokenizer,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_of_tokens_make_the_whole_text(name):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    groups = [*TokenTexts(tokenizer).group(ids)]
    assert "".join(text for _, _, text in groups).lstrip(" ") == tokenizer.decode(ids) == TEXT
    assert [start for start, _, _ in groups[1:]] == [stop for _, stop, _ in groups[:-1]]
    assert groups[0][0] == 0 and groups[-1][1] == len(ids)


def test_bytes_of_one_character_are_one_span_unless_one_of_them_is_masked():
    tokenizer = make_tokenizer()
    order = make_model(backbone_config=make_config_for(tokenizer).backbone_config, **ids_of(tokenizer)).order
    tokens = [Token(token, 2, 0.9) for token in tokenizer("👍")["input_ids"]]
    spans = Tags(segment_html(tokens, TokenTexts(tokenizer), order))
    assert len(tokens) == 4 and len(spans.tags) == 1 and spans.texts == ["👍"]
    tokens[2] = Token(order.mask_token_id)
    assert len(Tags(segment_html(tokens, TokenTexts(tokenizer), order)).tags) == 4


def ids_of(tokenizer):
    config = make_config_for(tokenizer)
    return {
        f"{role}_token_id": getattr(config, f"{role}_token_id") for role in ("mask", "plan", "execution", "end", "pad")
    }


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def order(tokenizer):
    return make_model(backbone_config=make_config_for(tokenizer).backbone_config, **ids_of(tokenizer)).order


def test_a_segment_shows_its_tokens_with_colour_and_step(tokenizer, order):
    a, b, c = tokenizer("abc")["input_ids"]
    end, mask = order.end_token_id, order.mask_token_id
    tokens = [Token(order.plan_token_id), Token(a, 1, 0.42), Token(b, 3, 0.995), Token(mask), Token(c)]
    tokens += [Token(end, 4, 0.8), Token(end, 4), Token(end, 4)]
    found = Tags(segment_html(tokens, TokenTexts(tokenizer), order, step=4))
    classes = [attributes["class"].split() for _, attributes in found.tags]
    assert classes == [
        ["tok", "c0"],
        ["tok", "c4"],
        ["tok", "masked"],
        ["tok", "given"],
        ["tok", "c2", "end", "new"],  # the filler after it is not shown
    ]
    titles = [attributes.get("title") for _, attributes in found.tags]
    assert titles == [
        "step 1, confidence 42.0 %",
        "step 3, confidence 99.5 %",
        None,
        "given",
        "step 4, confidence 80.0 %",
    ]
    assert found.texts == ["a", "b", "c", "end"]


@pytest.mark.parametrize(
    ("confidence", "colour"), [(0.0, 0), (0.5, 1), (0.7, 2), (0.899, 2), (0.9, 3), (0.99, 4), (1.0, 4)]
)
def test_the_colour_of_a_confidence(confidence, colour):
    assert confidence_colour(confidence) == colour


def test_a_token_without_confidence_has_its_step_alone():
    assert describe_token(Token(7, 12)) == "step 12"


def test_no_text_becomes_markup(tokenizer, order):
    tokens = [Token(token, 1, 0.9) for token in tokenizer(SCRIPT)["input_ids"]]
    for source in (
        segment_html(tokens, TokenTexts(tokenizer), order),
        picture_html(
            order, tokenizer(SCRIPT)["input_ids"], {PLAN: tokens[:4], EXECUTION: tokens}, TokenTexts(tokenizer)
        ),
        panel_html(SCRIPT, "", SCRIPT),
        figures_html({SCRIPT: SCRIPT}),
        message_html(SCRIPT),
    ):
        found = Tags(source)
        assert found.depth == 0 and "<script" not in source
        assert {tag for tag, _ in found.tags} <= {
            *("span", "i", "div", "figure", "svg", "rect", "path", "figcaption", "p"),
            *("section", "header", "h3", "dl", "dt", "dd"),
        }
        assert SCRIPT in "".join(found.texts)


# The mask


def expected_mask(segments, size, sees):
    """The mask by its definition: a token sees the blocks before its own and its own; `sees` says which segments."""
    blocks, places = [], {}
    for segment in segments:
        place = places[segment] = places.get(segment, -1) + 1
        blocks.append((segment, 0 if segment == QUESTION else place // size))
    return torch.tensor([[key == query or sees(query, key) for key in blocks] for query in blocks])


SEGMENTS = [QUESTION] * 3 + [PLAN] * 8 + [EXECUTION] * 4
FLAT = {"algorithm": "bd3lm"}


@pytest.mark.parametrize(
    ("overrides", "sees"),
    [
        ({}, lambda query, key: key < query),
        (
            {"hierarchical_mask": False},
            lambda query, key: key[0] == QUESTION or (query[0] > QUESTION and key[1] <= query[1]),
        ),
    ],
)
def test_a_token_sees_finished_blocks_and_its_own(overrides, sees):
    order = make_model(**overrides).order
    mask, _ = generation_mask(order, SEGMENTS)
    assert torch.equal(mask, expected_mask(SEGMENTS, 4, sees))


def test_an_autoregressive_model_and_a_causal_question_see_what_is_before():
    mask, _ = generation_mask(make_model(algorithm="ar", **OWN_SIZE).order, SEGMENTS)
    assert torch.equal(mask, torch.ones(15, 15, dtype=torch.bool).tril())
    order = make_model(prediction="shifted", question_attention="causal").order
    assert torch.equal(generation_mask(order, SEGMENTS)[0][:3, :3], torch.ones(3, 3, dtype=torch.bool).tril())


@pytest.mark.parametrize("overrides", [{}, FLAT, {"hierarchical_mask": False}, {"algorithm": "ar", **OWN_SIZE}])
def test_the_picture_holds_the_mask(overrides, tokenizer):
    config = make_config_for(tokenizer)
    overrides = {"backbone_config": config.backbone_config} | ids_of(tokenizer) | overrides
    order = make_model(**overrides).order
    written = {PLAN: [Token(7, 1, 0.5)] * 8, EXECUTION: [Token(8, 2)] * 4}
    found = Tags(picture_html(order, [5, 6, 7], written, TokenTexts(tokenizer)))
    mask, block_ids = generation_mask(order, SEGMENTS)
    own = mask & (block_ids[:, None] == block_ids[None, :])
    (rows,) = [json.loads(attributes["data-rows"]) for _, attributes in found.tags if "data-rows" in attributes]
    from_rows = torch.zeros_like(mask)
    for start, stop, runs in rows:
        for first, last in runs:
            from_rows[start:stop, first:last] = True
    assert torch.equal(from_rows, mask)
    painted = torch.zeros(mask.shape, dtype=torch.long)
    for tag, attributes in found.tags:
        if tag == "rect" and attributes["class"] in ("finished", "own"):
            x, y, width, height = (int(attributes[name]) for name in ("x", "y", "width", "height"))
            painted[y : y + height, x : x + width] = 1 + (attributes["class"] == "own")
    assert torch.equal(painted, mask.long() + own)
    notes = [attributes["data-note"] for _, attributes in found.tags if "data-note" in attributes]
    assert notes == ["question"] * 3 + ["plan, step 1, confidence 50.0 %"] * 8 + ["execution, step 2"] * 4


def test_the_picture_of_a_long_input_is_small():
    mask, block_ids = generation_mask(make_model().order, [QUESTION] * 256 + [PLAN] * 256 + [EXECUTION] * 512)
    rows = equal_rows(mask, block_ids)
    assert len(rows) == 1 + 64 + 128 and all(len(row.seen) == 1 for row in rows)


def test_an_empty_input_has_no_picture(order, tokenizer):
    assert picture_html(order, [], {PLAN: [], EXECUTION: []}, TokenTexts(tokenizer)) == ""
