"""Speeds are those of models that answer the same problems in turns, and of what they answer when they are warm."""

import json

import pytest
from datasets import Dataset

import hierbd3lm.benchmarks.speed as speed

TOKENS_PER_SECOND = {"ar": 10.0, "eager": 20.0, "compiled": 40.0}


@pytest.fixture
def answered(monkeypatch):
    """What each model was asked, in order; the first time that it is asked it is very slow."""
    calls = []

    def fake(answerer, dataset, batch_size):
        name = "compiled" if answerer[2].get("compile_steps") else answerer[0]
        seconds = 1 / TOKENS_PER_SECOND[name] if name in dict(calls) else 100.0
        calls.append((name, dataset["number"][:]))
        return [{"num_tokens": 1, "seconds": seconds, "number": number} for number in dataset["number"]]

    monkeypatch.setattr(speed, "answer", fake)
    monkeypatch.setattr(speed, "load_model", lambda path, device: (path, None))
    monkeypatch.setattr(speed.DataArguments, "load", lambda folder: None)
    monkeypatch.setattr(speed, "load_split", lambda args, split, limit: Dataset.from_dict({"number": [*range(limit)]}))

    def totals(lines):
        return {"tokens_per_second": len(lines) / sum(line["seconds"] for line in lines)}

    monkeypatch.setattr(speed, "summarize", totals)
    return calls


def test_models_answer_in_turns_after_a_chunk_that_does_not_count(answered):
    result = speed.measure_speed("eager", "ar", 120, "cpu")
    chunks = [[*range(50)], [*range(50)], [*range(50, 100)], [*range(100, 120)]]
    assert answered == [(name, chunk) for chunk in chunks for name in ("ar", "eager", "compiled")]
    assert result["eager_over_baseline"] == pytest.approx(2.0)
    assert result["compiled_over_baseline"] == pytest.approx(4.0)


def test_the_result_is_written_to_the_folder_of_the_model(answered, tmp_path, monkeypatch):
    monkeypatch.setitem(TOKENS_PER_SECOND, str(tmp_path), 20.0)
    monkeypatch.setattr(speed.sys, "argv", ["speed", "--model", str(tmp_path), "--baseline", "ar", "--limit", "30"])
    speed.main()
    result = json.loads((tmp_path / "speed.json").read_text())
    assert (result["baseline"], result["eager_over_baseline"]) == ("ar", pytest.approx(2.0))
    monkeypatch.setattr(speed.sys, "argv", ["speed", "--model", str(tmp_path), "--baseline", "ar", "--limit", "0"])
    with pytest.raises(ValueError, match="limit"):
        speed.main()
