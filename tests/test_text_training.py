"""Plain text: tiny models learn it, from files and streams."""

import json
import math
import sys

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from hierbd3lm import train
from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.loading import load_documents
from hierbd3lm.data.splits import load_split
from hierbd3lm.evaluation import checkpoints
from hierbd3lm.evaluation.text_quality import generate_unconditional
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.settings_hierbd3lm import HierBD3LMGenerationConfig
from hierbd3lm.trainer import HierBD3LMTrainer

from .tiny_text import NO_SEGMENTS, many_documents, measure, write_lines
from .tiny_tokenizer import make_config_for, make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def config(tokenizer):
    return make_config_for(tokenizer, **NO_SEGMENTS)


# Training


TINY = {
    "backbone": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "head_dim": 16},
    "vocab_size": 300,
    **NO_SEGMENTS,
    "execution_len": 32,
    "block_size": 8,
    "num_validation_examples": 20,
    "max_steps": 20,
    "learning_rate": 3e-3,
    "ema_decay": 0.0,
    "per_device_train_batch_size": 8,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
}


def run(monkeypatch, folder, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(TINY | {"output_dir": str(folder / "out")} | settings))
    monkeypatch.setattr(sys, "argv", ["train.py", str(path)])
    train.main()
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [True, False])
def test_a_tiny_model_learns_a_text_file_writes_and_is_measured(tmp_path, monkeypatch, wrap):
    path = write_lines(tmp_path / "lines.txt", many_documents(300))
    out = run(monkeypatch, tmp_path, dataset=path, wrap=wrap, eval_strategy="steps", eval_steps=1)
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    nlls = [entry["eval_nll"] for entry in log if "eval_nll" in entry]
    assert nlls[-1] < 0.8 * nlls[0]
    assert not any("plan" in name for entry in log for name in entry)
    report = json.loads((out / "data_report.json").read_text())
    assert (report["train"]["num_documents"], report["validation"]["num_documents"]) == (280, 20)
    held_out = write_lines(tmp_path / "held_out.txt", many_documents(300)[280:])
    result = measure(monkeypatch, out, dataset=held_out, num_draws=4)
    again = measure(monkeypatch, out, split="validation", num_draws=4)
    assert result["nll"] == again["nll"] == pytest.approx(nlls[-1], rel=0.05)
    model = HierBD3LMForBlockDiffusion.from_pretrained(out)
    settings = HierBD3LMGenerationConfig(sampler="first_hitting", temperature=1.0, seed=0)
    output = generate_unconditional(model, evaluation_tokenizer(out), 4, settings)
    assert output.plan.shape == (4, 0) and output.execution.shape[1] > 1


def test_a_clip_search_chooses_for_the_text_alone(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "lines.txt", many_documents(100))
    search = {"clip_search": [0.5], "eval_strategy": "steps", "eval_steps": 1}
    out = run(monkeypatch, tmp_path, dataset=path, max_steps=1, **search)
    state = json.loads((out / "trainer_state.json").read_text())
    chosen = state["stateful_callbacks"]["ClipSearch"]["attributes"]["chosen"]
    low, high = chosen["execution"]
    assert high - low == pytest.approx(0.5) and chosen.keys() == {"execution"}
    variances = [entry[name] for entry in state["log_history"] for name in entry if "clip_variance" in name]
    assert variances and all(map(math.isfinite, variances))


def evaluation_tokenizer(folder):
    return checkpoints.load_model(str(folder), "cpu")[1]


@pytest.mark.slow
@pytest.mark.parametrize("shuffle_buffer", [0, 100])
def test_training_on_a_stream_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch, tokenizer, shuffle_buffer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    stream = {"dataset": write_lines(tmp_path / "lines.txt", many_documents(1500)), "streaming": True}
    stream |= {"tokenizer": str(tmp_path / "tokenizer"), "vocab_size": None, "save_strategy": "steps"}
    stream |= {"max_steps": 6, "save_steps": 4, "eval_noise_draws": 1, "shuffle_buffer": shuffle_buffer}
    seen = record_batches(monkeypatch)
    whole = load_file(run(monkeypatch, tmp_path / "whole", **stream) / "model.safetensors")
    expected = list(seen)
    seen.clear()
    last = tmp_path / "whole" / "out" / "checkpoint-4"
    again = run(monkeypatch, tmp_path / "again", **stream, resume_from_checkpoint=str(last))
    assert seen == expected[4:] and len(expected) == 6
    weights = load_file(again / "model.safetensors")
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def record_batches(monkeypatch):
    """The input ids of every training step, as they come."""
    seen, step = [], HierBD3LMTrainer.training_step

    def recording_step(trainer, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].tolist())
        return step(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(HierBD3LMTrainer, "training_step", recording_step)
    return seen


def test_a_stream_holds_its_first_documents_out(tmp_path):
    texts = many_documents(30)
    args = DataArguments(
        dataset=write_lines(tmp_path / "lines.txt", texts),
        streaming=True,
        num_validation_examples=5,
        num_train_examples=8,
    )
    assert [row["text"] for row in load_split(args, "train")] == texts[5:13]
    assert load_split(args, "validation")["text"][:] == texts[:5]


def test_a_stream_is_shuffled_within_its_buffer(tmp_path):
    texts = many_documents(60)
    args = DataArguments(
        dataset=write_lines(tmp_path / "lines.txt", texts),
        streaming=True,
        shuffle_buffer=20,
        num_validation_examples=5,
        num_train_examples=50,
    )
    read, again = ([row["text"] for row in load_split(args, "train")] for _ in range(2))
    assert read == again != texts[5:55]
    assert sorted(read) == sorted(texts[5:55])
    assert all(texts.index(text) - 5 < place + 20 for place, text in enumerate(read))  # once it is in the buffer


@pytest.mark.parametrize("kind", ["txt", "jsonl", "saved", "folder"])
@pytest.mark.parametrize("streaming", [False, True])
def test_documents_are_read_from_wherever_they_are(kind, streaming, tmp_path):
    texts, column = ["one", "two words"], "text" if kind == "txt" else "body"
    rows = Dataset.from_dict({column: texts, "other": [1, 2]})
    path = tmp_path / f"corpus.{kind}"
    if kind == "txt":
        write_lines(path, texts)
    elif kind == "jsonl":
        rows.to_json(path)
    elif kind == "saved":
        rows.save_to_disk(path)
    else:
        path.mkdir()
        rows.to_json(path / "train.jsonl")
    documents = load_documents(path, text_column=column, streaming=streaming)
    assert isinstance(documents, Dataset) is not streaming
    assert list(documents) == [{"text": text} for text in texts]
    with pytest.raises(ValueError, match=f"`text_column` must be one of {column}.*but got 'content'"):
        load_documents(path, text_column="content", streaming=streaming)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"streaming": True}, "`streaming` must be False without `text_column`"),
        ({"text_column": "text", "shuffle_buffer": 9}, "`shuffle_buffer` must be 0 without `streaming`"),
        ({"text_column": "text", "auto_split": True}, "`auto_split` must be False for plain text"),
        ({"text_column": "text", "tested_on": "gsm8k"}, "`tested_on` must be None for plain text"),
    ],
)
def test_settings_that_text_does_not_have_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(dataset="somewhere", **setting)


def test_a_stream_needs_a_tokenizer(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "lines.txt", many_documents(30))
    with pytest.raises(ValueError, match="`tokenizer` must be given to train on a stream"):
        run(monkeypatch, tmp_path, dataset=path, streaming=True)
