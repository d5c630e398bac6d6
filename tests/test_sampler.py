"""The confidence sampler is chosen on the validation split, and is the checkpoint's from then on."""

import json

import pytest

import hierbd3lm.benchmarks.sampler as sampler
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny import make_model


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ({(True, 0.9): (0.5, 9.0), (False, 0.9): (0.6, 20.0)}, (False, 0.9)),
        ({(True, 0.9): (0.6, 9.0), (True, 0.8): (0.6, 8.0), (False, 0.8): (0.59, 7.0)}, (True, 0.8)),
    ],
)
def test_right_answers_count_first_and_then_passes(rates, best):
    results = [
        {
            "tried": {"left_to_right": left_to_right, "threshold": threshold},
            "exact_match_strict": right,
            "num_forward_passes_mean": passes,
        }
        for (left_to_right, threshold), (right, passes) in rates.items()
    ]
    assert sampler.best_of(results) == dict(zip(("left_to_right", "threshold"), best, strict=True))


def test_the_choice_is_written_into_the_checkpoint(tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path)
    asked = []

    def fake(answerer, dataset, batch_size):
        asked.append((dataset, answerer[2]))
        return answerer[2]

    def rate(settings):
        is_best = settings["left_to_right"] and settings["threshold"] == 0.95
        return {"exact_match_strict": float(is_best), "num_forward_passes_mean": 5.0, "n": 3}

    monkeypatch.setattr(sampler, "answer", fake)
    monkeypatch.setattr(sampler, "summarize", rate)
    monkeypatch.setattr(
        sampler, "load_model", lambda path, device: (HierBD3LMForBlockDiffusion.from_pretrained(path), None)
    )
    monkeypatch.setattr(sampler.DataArguments, "load", lambda folder: None)
    monkeypatch.setattr(sampler, "load_split", lambda args, split, limit: split)
    monkeypatch.setattr(sampler.sys, "argv", ["sampler", "--model", str(tmp_path), "--device", "cpu"])
    sampler.main()
    assert {split for split, _ in asked} == {"validation"}
    assert len({tuple(settings.items()) for _, settings in asked}) == 2 * len(sampler.THRESHOLDS)
    chosen = {"sampler": "confidence", "left_to_right": True, "threshold": 0.95}
    assert json.loads((tmp_path / "sampler.json").read_text())["chosen"] == chosen
    settings = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path).generation_config
    assert {name: getattr(settings, name) for name in chosen} == chosen
