"""An evaluation that was interrupted gives the same results as one that was not."""

import json
from pathlib import Path

import pytest
import torch

from hierbd3lm.evaluation import runner
from hierbd3lm.evaluation.runner import evaluate
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny_evaluation import read_lines, read_summary, without_time

# Interruptions


def interrupt(monkeypatch, after):
    """Lets so many batches through, then fails."""
    generate, calls = HierBD3LMForBlockDiffusion.generate, []

    def failing(model, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        if len(calls) > after:
            raise KeyboardInterrupt
        return generate(model, **kwargs)

    monkeypatch.setattr(HierBD3LMForBlockDiffusion, "generate", failing)
    return calls


@pytest.mark.parametrize(
    ("after", "cut", "num_samples"), [(0, 0, 1), (1, 0, 1), (3, 0, 1), (1, 1, 1), (3, 40, 1), (6, 1, 2)]
)
def test_resumed_run_equals_an_uninterrupted_one(args, monkeypatch, tmp_path, after, cut, num_samples):
    """Interrupted after so many batches, with the last bytes of the file cut off."""
    sampling = {"temperature": 1.0, "sampler": "first_hitting", "seed": 3, "num_samples": num_samples}
    whole = args(output_dir=str(tmp_path / "whole"), **sampling)
    evaluate(whole)
    run = args(**sampling)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, after)
        evaluate(run)
    path = Path(run.output_dir, "predictions.jsonl")
    content = path.read_bytes()
    assert content.count(b"\n") == 3 * after - 2 * (after > 4)  # the fourth batch has the tenth problem alone
    path.write_bytes(content[: len(content) - cut])
    seconds = [json.loads(line)["seconds"] for line in content.splitlines()]
    kept_batches = after if cut == 0 else max(after - 1, 0)
    calls = interrupt(monkeypatch, after=10)
    evaluate(run)
    assert len(calls) == 4 * num_samples - kept_batches
    assert without_time(read_lines(run)) == without_time(read_lines(whole))
    is_time = {"seconds", "tokens_per_second"}
    assert {name: value for name, value in read_summary(run).items() if name not in is_time} == {
        name: value for name, value in read_summary(whole).items() if name not in is_time
    }
    times = [line["seconds"] for line in read_lines(run)]
    num_kept = 3 * kept_batches - 2 * (kept_batches > 3)
    assert set(seconds[:num_kept]) <= set(times)  # the time of the first part counts
    assert read_summary(run)["seconds"] == pytest.approx(sum(times))


def test_run_that_is_interrupted_again_after_a_torn_line_goes_on(args, monkeypatch):
    run = args()
    path = Path(run.output_dir, "predictions.jsonl")
    for after, num_lines in [(2, 6), (1, 5 + 3)]:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, after)
            evaluate(run)
        assert len(read_lines(run)) == num_lines
        path.write_bytes(path.read_bytes()[:-40])
    evaluate(run)
    assert [line["index"] for line in read_lines(run)] == list(range(10))


def test_answers_are_on_the_disk_before_the_next_batch_begins(args, monkeypatch):
    run, on_disk, generate = args(), [], HierBD3LMForBlockDiffusion.generate

    def counting(model, **kwargs):
        on_disk.append(len(read_lines(run)))
        return generate(model, **kwargs)

    monkeypatch.setattr(HierBD3LMForBlockDiffusion, "generate", counting)
    evaluate(run)
    assert on_disk == [0, 3, 6, 9]


def test_batches_draw_different_numbers(args, rows, dataset_of):
    run = args(dataset=dataset_of(rows[:1] * 4), batch_size=1, temperature=1.0)
    assert len({prediction["execution"] for prediction in evaluate(run)[0]}) > 1


def test_finished_run_is_only_summarised_again(args, monkeypatch):
    run = args()
    first = evaluate(run)
    calls = interrupt(monkeypatch, after=0)
    assert evaluate(run) == first
    assert calls == []


CHANGES = {"threshold": 0.5, "limit": 9, "split": "validation", "seed": 1, "batch_size": 4, "given_plan": "reference"}


@pytest.mark.parametrize(("name", "value"), CHANGES.items())
def test_other_settings_are_refused_until_overwritten(args, name, value):
    first = evaluate(args())
    before = {path.name: path.read_bytes() for path in Path(args().output_dir).iterdir()}
    with pytest.raises(ValueError, match="`output_dir` must be new or contain this run"):
        evaluate(args(**{name: value}))
    assert {path.name: path.read_bytes() for path in Path(args().output_dir).iterdir()} == before
    second = evaluate(args(overwrite=True, **{name: value}))
    assert second[1]["n"] == (9 if name == "limit" else 10)
    assert evaluate(args(**{name: value}))[0] == second[0] != first[0]


def test_refusal_names_what_differs(args):
    evaluate(args())
    with pytest.raises(ValueError, match=r"another one \(threshold: 0\.9 stored, 0\.5 now\)"):
        evaluate(args(threshold=0.5))


def test_other_weights_and_other_rows_in_the_same_place_are_refused(args, rows, dataset_of, monkeypatch):
    evaluate(args(dataset=dataset_of(rows)))
    load_model = runner.load_model

    def retrained(*args):
        model, tokenizer = load_model(*args)
        with torch.no_grad():
            next(model.parameters())[0, 0] += 1
        return model, tokenizer

    with monkeypatch.context() as patch:
        patch.setattr(runner, "load_model", retrained)
        with pytest.raises(ValueError, match="checksum_of_weights"):
            evaluate(args(dataset=dataset_of(rows)))
    rows[0]["execution"] = "#### 1"
    with pytest.raises(ValueError, match="hash_of_data"):
        evaluate(args(dataset=dataset_of(rows)))


def test_predictions_of_nobody_knows_what_are_refused(args):
    evaluate(args())
    Path(args().output_dir, "settings.json").unlink()
    with pytest.raises(ValueError, match="`output_dir` must be new"):
        evaluate(args())
