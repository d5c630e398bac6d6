"""Documents, tiny models of plain text, and their likelihood."""

import json
import random
import sys

import torch
from datasets import Dataset

from hierbd3lm.evaluation import ppl
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny_tokenizer import make_config_for

NO_SEGMENTS = {"question_len": 0, "plan_len": 0}
WHOLE = 23  # tokens of text on a row of 24
DOCUMENTS = [
    "one two three",
    "",
    "a document that is too long for one row of the tiny model",
    "<|end|> é",
    "x" * WHOLE,
]


def many_documents(count, seed=0):
    letters = random.Random(seed)
    return ["".join(letters.choices("abc d", k=letters.randrange(40))) for _ in range(count)]


def as_dataset(texts):
    return Dataset.from_dict({"text": texts})


def bytes_with_ends(texts, tokenizer, config):
    """The tokens of the texts, each followed by an `<|end|>`, for a tokenizer with one token per byte."""
    vocabulary = {token: ids for token, ids in tokenizer.get_vocab().items() if len(token) == 1}
    alphabet = {byte: vocabulary[token] for byte, token in byte_alphabet().items()}
    return [[alphabet[byte] for byte in text.encode()] + [config.end_token_id] for text in texts]


def byte_alphabet():
    """The character that byte-level tokenizers write a byte as: itself where it can be seen, else the next free."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def texts_of_rows(rows, config):
    """What is written on the rows, the `<|end|>` that the collator adds included."""
    return [row["execution_ids"] + [config.end_token_id] * (not row["continues"]) for row in rows]


def checkpoint(folder, tokenizer, **overrides):
    torch.manual_seed(0)
    model = HierBD3LMForBlockDiffusion(make_config_for(tokenizer, **NO_SEGMENTS | overrides)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def write_lines(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return str(path)


def measure(monkeypatch, folder, **arguments):
    argv = [
        "ppl",
        *(f"--{name}={value}" for name, value in ({"model": folder, "device": "cpu"} | arguments).items()),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    ppl.main()
    return json.loads((folder / "likelihood.json").read_text())
