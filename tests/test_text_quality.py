"""Reported figures of samples are those counted by hand, and an interrupted drawing resumes exactly."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hierbd3lm.evaluation import samples, text_quality
from hierbd3lm.evaluation.arguments import SampleArguments
from hierbd3lm.evaluation.text_quality import (
    distinct_ngrams,
    draw,
    draw_samples,
    generate_unconditional,
    judge,
    nll_of_sequences,
    read_texts,
    unigram_entropy,
)
from hierbd3lm.generation_hierbd3lm import HierBD3LMGenerationOutput
from hierbd3lm.settings_hierbd3lm import HierBD3LMGenerationConfig

from .tiny import make_model
from .tiny_tokenizer import make_config_for, make_tokenizer

CONTEXT = 16
TEXTS = ["abcab", "", "x", "the cat sat on the mat, twice over", "bb"]
SEQUENCES = [[5, 6, 7, 5], [], [9], list(range(10, 10 + 2 * CONTEXT)), [8, 8]]


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT, "initializer_range": 0.5}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(make_tokenizer()), **sizes, **ids)).eval()


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# Generative perplexity


@torch.no_grad()
def nll_token_by_token(scorer, ids, context):
    """One forward pass for every token, over what its window holds before it."""
    total = 0.0
    for place in range(1, len(ids)):
        start = (place - 1) // (context - 1) * (context - 1)
        logits = scorer(torch.tensor([ids[start:place]])).logits[0, -1].double()
        total -= logits.log_softmax(-1)[ids[place]].item()
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("context", [2, 5, CONTEXT])
def test_the_likelihood_is_that_of_a_loop_over_tokens(scorer, context, batch_size):
    expected = [nll_token_by_token(scorer, ids, context) for ids in SEQUENCES]
    assert [nll > 0 for nll in expected] == [True, False, False, True, True]
    assert nll_of_sequences(scorer, SEQUENCES, context, batch_size) == pytest.approx(expected, rel=1e-5)


def test_without_a_limit_a_text_is_one_window(scorer):
    short = [ids[:CONTEXT] for ids in SEQUENCES]
    assert nll_of_sequences(scorer, short) == nll_of_sequences(scorer, short, CONTEXT)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_first_token_is_scored_only_behind_a_bos_token(scorer, adds_bos):
    tokenizer = make_tokenizer(adds_bos)
    metrics = judge(scorer, tokenizer, TEXTS, CONTEXT)
    assert metrics["num_tokens"] == sum(map(len, TEXTS))  # a token per letter
    counts = [len(text) if adds_bos else max(len(text) - 1, 0) for text in TEXTS]
    assert metrics["num_scored_tokens"] == sum(counts)
    assert metrics["num_unscored"] == counts.count(0) == (1 if adds_bos else 2)
    nlls = [nll_token_by_token(scorer, tokenizer(text)["input_ids"], CONTEXT) for text in TEXTS]
    assert metrics["nll"] == pytest.approx(sum(nlls) / sum(counts), rel=1e-5)
    assert metrics["generative_perplexity"] == pytest.approx(math.exp(sum(nlls) / sum(counts)), rel=1e-5)
    assert metrics["num_longer_than_context"] == 1


def test_a_scorer_that_knows_nothing_has_the_perplexity_of_its_vocabulary(scorer):
    ignorant = GPT2LMHeadModel(scorer.config).eval()
    torch.nn.init.zeros_(ignorant.get_output_embeddings().weight)
    metrics = judge(ignorant, make_tokenizer(), TEXTS, CONTEXT)
    assert metrics["generative_perplexity"] == pytest.approx(scorer.config.vocab_size, rel=1e-5)


@pytest.mark.parametrize(("setting", "accepted"), [({"context": 1}, 2), ({"batch_size": 0}, 1)])
def test_windows_without_room_are_refused(scorer, setting, accepted):
    with pytest.raises(ValueError, match=f"must be at least {accepted}, but got"):
        nll_of_sequences(scorer, SEQUENCES, **setting)


# Entropy and distinct n-grams


@pytest.mark.parametrize(
    ("ids", "entropy"),
    [
        ([7], 0.0),
        ([7, 7, 7, 7], 0.0),
        ([1, 2, 3, 4], math.log(4)),
        ([1, 1, 2], math.log(3) - 2 / 3 * math.log(2)),
        ([1, 2, 1, 2, 1, 2, 3, 3], 2 * 3 / 8 * math.log(8 / 3) + math.log(4) / 4),
    ],
)
def test_the_entropy_is_that_of_the_texts_own_frequencies(ids, entropy):
    assert unigram_entropy(ids) == pytest.approx(entropy, abs=1e-12)
    counts = torch.unique(torch.tensor(ids), return_counts=True)[1].double()
    assert torch.special.entr(counts / counts.sum()).sum().item() == pytest.approx(entropy, abs=1e-12)


@pytest.mark.parametrize(
    ("sequences", "shares"),
    [
        ([[1, 2, 1, 2], [1, 2]], (2 / 6, 2 / 4, 2 / 2)),
        ([[1, 1, 1, 1]], (1 / 4, 1 / 3, 1 / 2)),
        ([[1, 2, 3], [4, 5, 6]], (1.0, 1.0, 1.0)),  # nothing reaches from one text into the next
        ([[1], [], [1]], (1 / 2, None, None)),
    ],
)
def test_distinct_ngrams_are_counted_over_all_texts(sequences, shares):
    assert tuple(distinct_ngrams(sequences, size) for size in (1, 2, 3)) == shares


def test_the_metrics_of_several_texts_are_means_over_those_that_have_tokens(scorer):
    metrics = judge(scorer, make_tokenizer(), ["abab", "", "cccc", "abcd"], CONTEXT)
    entropies = [math.log(2), 0.0, math.log(4)]
    mean = sum(entropies) / 3
    assert metrics["entropy"] == pytest.approx(mean)
    deviation = math.sqrt(sum((entropy - mean) ** 2 for entropy in entropies) / 2)
    assert metrics["entropy_standard_error"] == pytest.approx(deviation / math.sqrt(3))
    assert (metrics["num_samples"], metrics["num_empty"], metrics["num_tokens"]) == (4, 1, 12)
    assert metrics["distinct_1"] == 4 / 12
    assert metrics["distinct_2"] == 5 / 9  # ab ba cc bc cd
    assert metrics["distinct_3"] == 5 / 6  # aba bab ccc abc bcd


def test_texts_without_tokens_have_no_metrics(scorer):
    metrics = judge(scorer, make_tokenizer(), ["", ""], CONTEXT)
    assert metrics["num_empty"] == metrics["num_unscored"] == 2
    names = ("generative_perplexity", "nll", "entropy", "distinct_1", "distinct_2", "distinct_3")
    assert [metrics[name] for name in names] == [None] * 6


# Files and the command


def test_every_line_is_a_text_whatever_it_holds(tmp_path):
    texts = ["one\ntwo", "\u2028\x85", ""]
    assert read_texts(write_lines(tmp_path / "samples.jsonl", [{"text": text} for text in texts])) == texts
    assert read_texts(write_lines(tmp_path / "other.jsonl", [{"execution": "a", "text": "b"}]), "execution") == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"txt": "b"}\n', "line 2 of .* must have the text `text`, but got None"),
        ('{"text": 3}\n', "line 1 of .* must have the text `text`, but got 3"),
        ("plain\n", "line 1 of .* must be a JSON object"),
        ("", "must hold at least one text"),
    ],
)
def test_a_file_that_is_none_of_samples_is_refused(tmp_path, content, message):
    path = tmp_path / "samples.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`samples`, or `model` with `num_samples`"),
        ({"samples": "a.jsonl", "model": "b", "num_samples": 2}, "`samples`, or `model` with `num_samples`"),
        ({"model": "b"}, "`samples`, or `model` with `num_samples`"),
        ({"model": "b", "num_samples": 0}, "`num_samples` must be at least 1"),
        ({"samples": "a.jsonl", "context": 1}, "`context` must be at least 2"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampleArguments(scorer="gpt2", **arguments)


def run_command(monkeypatch, capsys, **arguments):
    monkeypatch.setattr(sys, "argv", ["samples", *(f"--{name}={value}" for name, value in arguments.items())])
    samples.main()
    return capsys.readouterr().out


def test_the_command_judges_a_file_and_writes_beside_it(scorer, tmp_path, monkeypatch, capsys):
    scorer.save_pretrained(tmp_path / "scorer")
    make_tokenizer().save_pretrained(tmp_path / "scorer")
    samples = write_lines(tmp_path / "some.jsonl", [{"text": text} for text in TEXTS])
    printed = run_command(monkeypatch, capsys, scorer=tmp_path / "scorer", samples=samples, device="cpu")
    metrics = json.loads((tmp_path / "some.metrics.json").read_text())
    expected = judge(scorer, make_tokenizer(), TEXTS, CONTEXT)
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["context"] == CONTEXT
    for name in ("generative_perplexity", "entropy", "distinct_1"):
        decimals = 2 if name == "generative_perplexity" else 4
        assert f"{name.replace('_', ' '):<26}{metrics[name]:12,.{decimals}f}" in printed


# Drawing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    tokenizer = make_tokenizer()
    fields = make_config_for(tokenizer).to_dict()
    names = ("backbone_config", *(f"{role}_token_id" for role in ("mask", "plan", "execution", "end", "pad")))
    torch.manual_seed(0)
    model = make_model(**{name: fields[name] for name in names})
    model.generation_config = HierBD3LMGenerationConfig(
        sampler="entropy", entropy_bound=5.0, temperature=1.0, max_plan_len=8, max_execution_len=8
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(checkpoint, tmp_path):
    def make(**fields):
        defaults = {"model": str(checkpoint), "num_samples": 5, "batch_size": 2, "output_dir": str(tmp_path / "out")}
        return SampleArguments(scorer="none", device="cpu", **(defaults | fields))

    return make


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def test_as_many_texts_are_drawn_as_asked_for(arguments):
    rows = read_rows(draw(arguments()))
    assert [row["index"] for row in rows] == list(range(5))
    assert len({row["text"] for row in rows}) == 5
    for row in rows:
        assert row["plan"] and row["execution"]
        assert row["num_forward_passes"] > 0


def test_a_text_is_its_plan_followed_by_its_execution(model, tmp_path, monkeypatch):
    tokenizer, pad = make_tokenizer(), [model.config.pad_token_id]
    plans, executions = [["ab", "c"], ["xyz", "defg"]]
    ids = [[tokenizer(text)["input_ids"] for text in texts] for texts in (plans, executions)]
    written = HierBD3LMGenerationOutput(
        plan=torch.tensor([ids[0][0], ids[0][1] + pad]),
        execution=torch.tensor([ids[1][0] + pad, ids[1][1]]),
        finished=torch.tensor([True, False]),
        num_forward_passes=torch.tensor([3, 4]),
        tokens_per_forward=torch.tensor([2.0, 1.5]),
    )
    monkeypatch.setattr(text_quality, "generate_unconditional", lambda *args: written)
    settings = HierBD3LMGenerationConfig(temperature=1.0, seed=0)
    assert draw_samples(model, tokenizer, 2, settings, tmp_path / "samples.jsonl") == [
        {"index": 0, "text": "ab\nxyz", "plan": "ab", "execution": "xyz"}
        | {"finished": True, "num_forward_passes": 3, "tokens_per_forward": 2.0},
        {"index": 1, "text": "c\ndefg", "plan": "c", "execution": "defg"}
        | {"finished": False, "num_forward_passes": 4, "tokens_per_forward": 1.5},
    ]


def test_settings_are_those_of_the_checkpoint_unless_given(arguments, tmp_path):
    draw(arguments(settings='{"max_plan_len": 12, "top_p": 0.9}', seed=3))
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    expected = {"sampler": "entropy", "entropy_bound": 5.0, "max_plan_len": 12, "top_p": 0.9, "seed": 3}
    expected |= {"max_execution_len": 8}
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize("num_kept", [0, 2, 3])
def test_a_drawing_that_was_interrupted_goes_on_with_the_same_texts(arguments, tmp_path, monkeypatch, num_kept):
    whole = read_rows(draw(arguments(output_dir=str(tmp_path / "whole"))))
    path = draw(arguments())
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:num_kept]) + lines[num_kept][:10])  # killed while it wrote the next line
    batches = []
    write = text_quality.generate_unconditional
    monkeypatch.setattr(text_quality, "generate_unconditional", lambda *args: batches.append(args[2]) or write(*args))
    draw(arguments())
    assert read_rows(path) == whole
    assert sum(batches) == {0: 5, 2: 3, 3: 3}[num_kept]


def test_other_settings_are_another_drawing(arguments):
    draw(arguments())
    with pytest.raises(ValueError, match="seed: 0 stored, 1 now"):
        draw(arguments(seed=1))
    draw(arguments(seed=1, overwrite=True))


def test_greedy_samples_are_refused_before_anything_is_written(arguments, tmp_path):
    with pytest.raises(ValueError, match="`temperature` must be > 0 for num_samples=5"):
        draw(arguments(settings={"temperature": 0.0}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("algorithm", ["hier", "bd3lm", "mdlm", "ar"])
def test_a_model_without_a_plan_writes_none(algorithm):
    sizes = {} if algorithm in ("hier", "bd3lm") else {"block_size": None}
    model = make_model(algorithm=algorithm, plan_len=0, **sizes)
    settings = HierBD3LMGenerationConfig(sampler="first_hitting", temperature=1.0, seed=0)
    output = generate_unconditional(model, make_tokenizer(), 24, settings)
    assert torch.equal(output.finished, (output.sequences == model.config.end_token_id).any(dim=1))
    assert output.finished.any() and not output.finished.all()
    assert (output.sequences[:, 0] == model.config.execution_token_id).all()
    assert not (output.sequences == model.config.plan_token_id).any()
    assert output.plan.shape == (24, 0) and output.execution.shape[1] > 1


def test_a_full_text_is_what_generate_writes(model):
    settings = HierBD3LMGenerationConfig(temperature=1.0, seed=0)
    output = generate_unconditional(model, make_tokenizer(), 2, settings)
    expected = model.generate(torch.zeros(2, 0, dtype=torch.long), generation_config=settings)
    assert torch.equal(output.sequences, expected.sequences)


def test_the_command_draws_and_judges(scorer, checkpoint, tmp_path, monkeypatch, capsys):
    scorer.save_pretrained(tmp_path / "scorer")
    make_tokenizer().save_pretrained(tmp_path / "scorer")
    folder = tmp_path / "drawn"
    arguments = {"scorer": tmp_path / "scorer", "model": checkpoint, "num_samples": 2, "output_dir": folder}
    run_command(monkeypatch, capsys, **arguments, device="cpu")
    metrics = json.loads((folder / "samples.metrics.json").read_text())
    assert metrics["num_samples"] == 2
    texts = [row["text"] for row in read_rows(folder / "samples.jsonl")]
    assert metrics["num_tokens"] == sum(len(make_tokenizer()(text)["input_ids"]) for text in texts)
