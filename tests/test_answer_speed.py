"""Speeds of answers are relative to an AR model that writes as many tokens as its own answers have."""

import itertools

import pytest
import torch

import hierbd3lm.benchmarks.answer_speed as answer_speed

from .tiny_generation import speaker

SECONDS = {"token_by_token": 1.0, "first_hitting": 4.0, "confidence": 2.0, 1: 5.0}


@pytest.fixture
def asked(monkeypatch):
    """Numbers of tokens that AR was asked for, in order; the first batch of each model is very slow."""
    clock, calls = itertools.count(), []

    def fake_answer(model, batch, settings):
        if model == "token_by_token":
            return [10 + number for number in batch], 7.0
        seconds = SECONDS[settings.get("sampler", settings.get("block_size"))]
        return [20] * len(batch), seconds if len(calls) > 1 else 1000.0

    def fake_ar(model, input_ids, new_tokens, mask):
        assert (model, input_ids, mask) == ("token_by_token", "ids", "mask")
        return lambda: calls.append(new_tokens)

    class Model:
        config = type("Config", (), {"pad_token_id": 0})

    monkeypatch.setattr(answer_speed, "load_model", lambda path, *_: ((Model(), None), ("token_by_token", None))[path])
    monkeypatch.setattr(answer_speed.DataArguments, "load", lambda folder: None)
    monkeypatch.setattr(answer_speed, "load_split", lambda *_: None)
    monkeypatch.setattr(answer_speed, "read_problems", lambda *_: [1, 2, 3, 4])
    monkeypatch.setattr(answer_speed, "make_batches", lambda problems, size: [problems[:2], problems[2:]])
    monkeypatch.setattr(answer_speed, "collate_prompts", lambda *_: {"input_ids": "ids", "attention_mask": "mask"})
    monkeypatch.setattr(answer_speed, "answer", fake_answer)
    monkeypatch.setattr(answer_speed, "autoregressive", fake_ar)
    monkeypatch.setattr(answer_speed.time, "perf_counter", lambda: float(next(clock)))  # AR takes 1 second
    return calls


def test_the_ratio_is_that_of_tokens_per_second_after_a_batch_that_does_not_count(asked):
    bars, _ = answer_speed.measure_answers(0, 1, 4, (2,), "float32")
    assert asked == [12, 12, 14]  # the longest of each batch, the first one twice
    ar = (11 + 12 + 13 + 14) / 2  # tokens per second
    expected = [80 / (2 * SECONDS[name]) / ar for name in ("first_hitting", "confidence", 1)]
    assert [bar["measured"] for bar in bars] == pytest.approx(expected)


def test_ar_reads_padded_questions_as_the_model_does():
    """Each row of a left-padded batch continues as alone."""
    model = speaker()
    rows, mask = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    written = answer_speed.autoregressive(model, rows, 5, mask)()
    alone = answer_speed.autoregressive(model, rows[:1, 2:], 5)()
    assert written.shape == (2, 9) and written[0, 4:].tolist() == alone[0, 2:].tolist()
