"""The table of an open checkpoint: its paired test, what depends on what, and that it resumes."""

import json
import math

import pytest

import hierbd3lm.benchmarks.open_checkpoint as open_checkpoint
from hierbd3lm.benchmarks.measure import as_flags
from hierbd3lm.train import parse_arguments


def test_the_paired_test_is_the_binomial_test_of_the_problems_that_one_of_two_solves():
    mine = {index: index < 40 for index in range(100)}
    its = {index: 8 <= index < 42 for index in range(100)}  # 8 only by the first, 2 only by the second
    expected = 2 * sum(math.comb(10, k) for k in range(3)) / 2**10
    assert open_checkpoint.compare(mine, its) == {"only_this": 8, "only_other": 2, "p_value": pytest.approx(expected)}
    assert open_checkpoint.compare(mine, mine)["p_value"] == 1
    with pytest.raises(ValueError, match="must answer the same problems, but got 100 and 99"):
        open_checkpoint.compare(mine, dict.fromkeys(range(99), True))


def test_a_run_comes_after_those_that_it_starts_from():
    assert open_checkpoint.ancestry("hier_8") == ["sft", "hier_4", "hier_8"]
    assert {row.training for row in open_checkpoint.ROWS.values()} <= open_checkpoint.TRAININGS.keys()


@pytest.mark.parametrize("name", open_checkpoint.TRAININGS)
def test_the_settings_of_every_training_are_accepted(name, tmp_path):
    settings = {"init_from": "checkpoint", "output_dir": tmp_path, "use_cpu": True}
    settings |= open_checkpoint.TRAININGS[name].settings
    model_args, _, args = parse_arguments([open_checkpoint.RECIPE, *as_flags(settings)])
    sizes = set((args.block_size_schedule or {}).values()) | {model_args.block_size}
    assert max(sizes) == (8 if name.endswith("8") else 4 if name.endswith("4") else 1)
    assert (model_args.prediction == "in_place") == (name == "in_place_1")  # later runs have it from their start


def test_only_missing_files_are_made_and_the_row_is_read_from_them(tmp_path, monkeypatch):
    commands = []

    def run(words, **kwargs):
        commands.append(words[3:])
        flags = dict(zip(words[4::2], words[5::2], strict=False))
        if words[3] == "train":
            (tmp_path / "sft").mkdir(exist_ok=True)
            (tmp_path / "sft" / "trainer_state.json").write_text(json.dumps({"global_step": 100}))
        elif words[3] == "ppl":
            (tmp_path / "sft" / "likelihood.json").write_text(json.dumps({"nll": 0.5, "num_tokens": 9}))
        else:
            folder = tmp_path / "answers" / "sft"
            assert flags["--model"] == str(tmp_path / "sft") and flags["--output_dir"] == str(folder)
            folder.mkdir(parents=True)
            summary = {"n": 2, "finished": 1.0, "num_forward_passes_mean": 7.0, "tokens_per_forward": 1.0}
            for kind in ("strict", "flexible"):
                summary |= {f"exact_match_{kind}": 0.5, f"exact_match_{kind}_interval": [0.1, 0.9]}
            (folder / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(open_checkpoint, "describe_machine", dict)
    monkeypatch.setattr(open_checkpoint.subprocess, "run", run)
    made = open_checkpoint.Run("checkpoint", tmp_path, 100, 2)
    for _ in range(2):
        made.train("sft")
        made.answer("sft")
    assert [command[0] for command in commands] == ["train", "ppl", "eval"]
    row = made.row("sft")
    assert row["strict"] == 0.5 and row["NFE"] == 7.0
    page = open_checkpoint.format_page({"sft": row}, made.trained(), "the command")
    assert "50.00 % [10.00, 90.00]" in page and "| sft | the checkpoint | 100 | 0.5000 |" in page


def test_answers_of_the_harness_are_read_problem_by_problem(tmp_path):
    samples = [
        {"doc_id": index, "filter": kind, "exact_match": float(index == 1 and kind == "strict-match")}
        for kind in ("strict-match", "flexible-extract")
        for index in (2, 0, 1, 3)
    ]
    path = tmp_path / "folder" / "samples_gsm8k_fewshot_2026-01-01.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    open_checkpoint.write_few_shot_summary(tmp_path)
    assert open_checkpoint.read_matches(tmp_path) == {0: False, 1: True, 2: False, 3: False}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["n"], summary["exact_match_strict"], summary["exact_match_flexible"]) == (4, 0.25, 0)
