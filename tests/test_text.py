"""Plain text: no token is lost on the way to a row, and every model counts the same tokens."""

import json
import math
from dataclasses import fields
from itertools import chain

import pytest
import torch
from datasets import Dataset

from hierbd3lm import train
from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.data.text.detokenization import RULES, detokenize
from hierbd3lm.data.text.rows import DOCUMENTS_PER_BATCH, prepare_text
from hierbd3lm.data.text.sets import TEXT_SETS
from hierbd3lm.evaluation import checkpoints
from hierbd3lm.evaluation.likelihood import measure_likelihood
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny import make_model
from .tiny_algorithms import ALGORITHMS
from .tiny_text import (
    DOCUMENTS,
    NO_SEGMENTS,
    WHOLE,
    as_dataset,
    bytes_with_ends,
    checkpoint,
    many_documents,
    measure,
    texts_of_rows,
    write_lines,
)
from .tiny_tokenizer import make_config_for, make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def config(tokenizer):
    return make_config_for(tokenizer, **NO_SEGMENTS)


# From documents to rows


def test_wrapped_rows_side_by_side_are_the_documents_with_ends_behind_them(tokenizer, config):
    rows, _ = prepare_text(as_dataset(DOCUMENTS), tokenizer, config)
    expected = list(chain(*bytes_with_ends(DOCUMENTS, tokenizer, config)))
    pieces = texts_of_rows(rows, config)
    assert list(chain(*pieces)) == expected
    assert [len(piece) for piece in pieces[:-1]] == [WHOLE] * (len(expected) // WHOLE)
    assert len(pieces[-1]) == len(expected) % WHOLE
    assert all(row["question_ids"] == row["plan_ids"] == [] for row in rows)


def test_a_document_of_its_own_rows_is_cut_into_consecutive_ones(tokenizer, config):
    rows, _ = prepare_text(as_dataset(DOCUMENTS), tokenizer, config, wrap=False)
    pieces, start = texts_of_rows(rows, config), 0
    for document in bytes_with_ends(DOCUMENTS, tokenizer, config):
        stop = start + math.ceil(len(document) / WHOLE)
        assert list(chain(*pieces[start:stop])) == document
        assert [row["continues"] for row in rows.select(range(start, stop))] == [True] * (stop - start - 1) + [False]
        start = stop
    assert start == len(rows) == 8


@pytest.mark.parametrize("wrap", [True, False])
def test_a_report_counts_what_there_is(tokenizer, config, wrap):
    rows, report = prepare_text(as_dataset(DOCUMENTS), tokenizer, config, wrap)
    sizes = [len(text.encode()) for text in DOCUMENTS]
    assert report == {
        "num_documents": 5,
        "num_bytes": sum(sizes),
        "num_tokens": sum(sizes) + 5,
        "num_rows": len(rows),
        "num_unknown_tokens": 0,
        "num_short_rows": 1 if wrap else 5,
        "num_long_documents": 2,
    }


@pytest.mark.parametrize("wrap", [True, False])
def test_a_stream_has_the_rows_of_a_dataset(tokenizer, config, wrap):
    documents = as_dataset(many_documents(2 * DOCUMENTS_PER_BATCH + 203))
    rows, _ = prepare_text(documents, tokenizer, config, wrap)
    streamed, report = prepare_text(documents.to_iterable_dataset(), tokenizer, config, wrap)
    assert list(streamed) == list(rows) and report == {}
    expected = bytes_with_ends(documents["text"], tokenizer, config)
    assert list(chain(*texts_of_rows(rows, config))) == list(chain(*expected))


@pytest.mark.slow
def test_processes_do_not_change_the_rows(tokenizer, config):
    documents = as_dataset(many_documents(DOCUMENTS_PER_BATCH + 203))
    one, two = (prepare_text(documents, tokenizer, config, num_proc=number)[0] for number in (1, 2))
    assert list(one) == list(two)


@pytest.mark.parametrize("num_read", [0, 1, 30, 700])
def test_the_state_of_a_stream_goes_on_with_the_next_row(tokenizer, config, num_read):
    def stream():
        documents = as_dataset(many_documents(DOCUMENTS_PER_BATCH + 203)).to_iterable_dataset(num_shards=2)
        return prepare_text(documents.skip(3), tokenizer, config)[0]

    whole, started = list(stream()), stream()
    rows = iter(started)
    assert [next(rows) for _ in range(num_read)] == whole[:num_read]
    resumed = stream()
    resumed.load_state_dict(json.loads(json.dumps(started.state_dict())))
    assert list(resumed) == whole[num_read:]


def test_a_bos_token_stands_in_the_question_and_is_not_counted(tmp_path):
    tokenizer = make_tokenizer(adds_bos=True)
    config = make_config_for(tokenizer, **NO_SEGMENTS | {"question_len": 1})
    rows, report = prepare_text(as_dataset(DOCUMENTS), tokenizer, config)
    assert rows["question_ids"][:] == [[tokenizer.bos_token_id]] * len(rows)
    labels = HierarchicalDataCollator(config)(list(rows))["labels"]
    assert (labels != -100).sum() == report["num_tokens"] and not (labels == tokenizer.bos_token_id).any()
    with pytest.raises(ValueError, match="`question` must have at most question_len=0 tokens, but got 1"):
        prepare_text(as_dataset(DOCUMENTS), tokenizer, make_config_for(tokenizer, **NO_SEGMENTS))


def test_text_for_a_model_with_a_plan_and_text_that_is_none_are_refused(tokenizer, config):
    with pytest.raises(ValueError, match="`plan_len` must be 0 for a model of plain text, but got 24"):
        prepare_text(as_dataset(DOCUMENTS), tokenizer, make_config_for(tokenizer))
    with pytest.raises(ValueError, match="at least one document"):
        prepare_text(as_dataset([]), tokenizer, config)
    with pytest.raises(ValueError, match="`text` must be a string, but got None"):
        prepare_text(as_dataset(["a", None]), tokenizer, config)


# Rows as a batch


def test_a_row_is_an_opener_and_its_tokens(tokenizer, config):
    ids = [7, 8, config.end_token_id, 9, 10]
    continues, ends = (
        {"question_ids": [], "plan_ids": [], "execution_ids": ids[3:] if closed else ids, "continues": not closed}
        for closed in (False, True)
    )
    batch = HierarchicalDataCollator(config)([continues, ends])
    opener, end, pad = config.execution_token_id, config.end_token_id, config.pad_token_id
    assert batch["input_ids"].tolist() == [[opener, *ids], [opener, 9, 10, end, pad, pad]]
    assert batch["labels"].tolist() == [[-100, *ids], [-100, 9, 10, end, -100, -100]]
    assert batch["block_ids"].tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, -1, -1]]
    with pytest.raises(ValueError, match="`execution_ids` must not contain special tokens"):
        HierarchicalDataCollator(config)([continues | {"continues": False}])


def test_a_model_without_a_plan_refuses_one(config):
    example = {"question_ids": [], "plan_ids": [7], "execution_ids": [8]}
    with pytest.raises(ValueError, match="`plan` must have at most plan_len=0 tokens"):
        HierarchicalDataCollator(config)([example])


@pytest.mark.parametrize("wrap", [True, False])
def test_only_documents_on_one_row_see_each_other(tokenizer, config, wrap):
    torch.manual_seed(0)
    model = HierBD3LMForBlockDiffusion(config).eval()

    def nll_of_second(first):
        rows, _ = prepare_text(as_dataset([first, "defghij"]), tokenizer, config, wrap)
        batch = HierarchicalDataCollator(config)(list(rows))
        is_d = batch["input_ids"] == tokenizer("d")["input_ids"][0]
        layout = {name: batch[name] for name in ("block_ids", "position_ids")}
        return model.masked_nll(is_d, batch["input_ids"], **layout).item()

    assert (nll_of_second("aaaaaaa") != nll_of_second("aaabaaa")) is wrap


# Likelihood


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_counts_the_tokens_of_the_text(name, wrap, tmp_path, tokenizer, monkeypatch, capsys):
    checkpoint(tmp_path / "model", tokenizer, **ALGORITHMS[name])
    DataArguments(dataset=write_lines(tmp_path / "seen.txt", ["?"]), wrap=wrap).save(tmp_path / "model")
    path = write_lines(tmp_path / "lines.txt", DOCUMENTS)
    result = measure(monkeypatch, tmp_path / "model", dataset=path, num_draws=2)
    num_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    assert result["num_tokens"] == result["execution_num_tokens"] == num_bytes + len(DOCUMENTS)
    assert "plan_num_tokens" not in result
    assert result["bits_per_byte"] == pytest.approx(result["nll"] * result["num_tokens"] / math.log(2) / num_bytes)
    assert (result["num_documents"], result["num_rows"]) == (5, 5 if wrap else 8)
    assert ("nll_stderr" in result) is (name != "ar")
    assert f"5 documents of {num_bytes} bytes" in capsys.readouterr().out


@pytest.mark.parametrize("fields", [{"block_size": 1}, {"algorithm": "bd3lm", "block_size": 1}, ALGORITHMS["ar"]])
def test_blocks_of_one_token_have_the_likelihood_of_the_chain_rule(fields, tokenizer):
    torch.manual_seed(0)
    config = make_config_for(tokenizer, **NO_SEGMENTS | fields)
    model = HierBD3LMForBlockDiffusion(config).eval()
    rows, report = prepare_text(as_dataset(DOCUMENTS), tokenizer, config)
    nats = 0.0
    for row in rows["execution_ids"]:
        tokens = torch.tensor([[config.execution_token_id, *row]])
        for place in range(1, tokens.shape[1]):
            nats -= log_probabilities_of_next(model, tokens[:, :place])[tokens[0, place]].item()
    assert measure_likelihood(model, rows, num_draws=1)["nll"] == pytest.approx(nats / report["num_tokens"], rel=1e-5)


@torch.no_grad()
def log_probabilities_of_next(model, tokens):
    """From a text that ends there, with one mask behind it unless the model is autoregressive."""
    if model.config.algorithm == "ar":
        return model.backbone(tokens).logits[0, -1].log_softmax(-1)
    mask = torch.tensor([[model.config.mask_token_id]])
    text = torch.cat([tokens, mask], dim=1)
    logits = model(input_ids=text, noisy_input_ids=text, segment_ids=torch.full_like(text, 2)).logits[0, -1]
    logits[model.config.mask_token_id] = -math.inf
    return logits.log_softmax(-1)


@pytest.mark.slow
def test_without_a_plan_hier_is_bd3lm_and_one_block_is_mdlm(tokenizer):
    torch.manual_seed(0)
    base = HierBD3LMForBlockDiffusion(make_config_for(tokenizer, **NO_SEGMENTS))

    def nll(**overrides):
        model = HierBD3LMForBlockDiffusion(make_config_for(tokenizer, **NO_SEGMENTS | overrides)).eval()
        model.load_state_dict(base.state_dict())
        rows, _ = prepare_text(as_dataset(many_documents(40)), tokenizer, model.config)
        return measure_likelihood(model, rows, num_draws=2)["nll"]

    assert nll() == nll(algorithm="bd3lm") != nll(block_size=24)
    assert nll(block_size=24) == nll(**ALGORITHMS["mdlm"])


@pytest.mark.parametrize("fields", [{"joint": True, "block_size": None}, {"hierarchical_mask": False}])
def test_there_is_no_hierarchy_to_take_away_from_a_model_without_a_plan(fields, tokenizer):
    with pytest.raises(ValueError, match=r"must be .* for plan_len=0, but got"):
        make_config_for(tokenizer, **NO_SEGMENTS | fields)


# Generation


def test_a_model_without_a_plan_answers_questions_at_once():
    model, question = make_model(plan_len=0), torch.tensor([[7, 8, 9]])
    full, execution = (model.generate(question, stage=stage) for stage in ("full", "execution"))
    assert torch.equal(full.sequences, execution.sequences)
    assert full.sequences[0, :4].tolist() == [7, 8, 9, model.config.execution_token_id]
    with pytest.raises(ValueError, match="`stage` must not be 'plan' for a model without a plan"):
        model.generate(question, stage="plan")
    with pytest.raises(ValueError, match="`plan_ids` must be given for stage='execution' of a model with a plan"):
        model.generate(question, plan_ids=question, stage="execution")


# The sets that a zero-shot perplexity is published of


def test_the_sets_are_those_of_the_published_tables():
    assert list(TEXT_SETS) == ["ptb", "wikitext", "lm1b", "lambada", "ag_news", "pubmed", "arxiv"]
    assert all(set(settings) <= {field.name for field in fields(DataArguments)} for settings in TEXT_SETS.values())
    by_test = {name for name, settings in TEXT_SETS.items() if settings["dataset_test_split"] == "test"}
    assert by_test == {"lm1b", "lambada", "ag_news"}  # the others by validation
    assert all(DataArguments(**settings).wrap for settings in TEXT_SETS.values())
    assert {settings.get("detokenizer") for settings in TEXT_SETS.values()} == {None, *RULES}
    assert len({settings["dataset"] for settings in TEXT_SETS.values()}) == 7


@pytest.mark.parametrize("name", TEXT_SETS)
def test_a_set_is_measured_by_its_name(name, tmp_path, tokenizer, monkeypatch, capsys):
    settings = TEXT_SETS[name]
    column, split = settings["text_column"], settings["dataset_test_split"]
    rules = settings.get("detokenizer")
    documents = [text if rules is None else detokenize(text, rules) for text in many_documents(9)]
    rows = Dataset.from_dict({column: many_documents(9), "other": list(range(9))})
    for part, number in (("train", 2), (split, 9)):
        rows.select(range(number)).to_json(tmp_path / "hub" / f"{part}.jsonl")
    stand_in = {**settings, "dataset": str(tmp_path / "hub"), "dataset_name": None}
    monkeypatch.setitem(checkpoints.TEXT_SETS, name, stand_in)
    checkpoint(tmp_path / "model", tokenizer)
    result = measure(monkeypatch, tmp_path / "model", dataset=name, num_draws=1)
    assert (result["split"], result["num_documents"]) == (split, 9)
    assert result["num_tokens"] == sum(map(len, documents)) + 9
    assert f"{tmp_path / 'hub'}, {split}" in capsys.readouterr().out
    limited = measure(monkeypatch, tmp_path / "model", dataset=name, num_draws=1, limit=4)
    assert limited["num_tokens"] == sum(map(len, documents[:4])) + 4


def test_a_column_of_text_can_be_named(tmp_path, tokenizer, monkeypatch):
    checkpoint(tmp_path / "model", tokenizer)
    Dataset.from_dict({"body": ["ab", "c"]}).to_json(tmp_path / "rows.jsonl")
    result = measure(monkeypatch, tmp_path / "model", dataset=tmp_path / "rows.jsonl", text_column="body", num_draws=1)
    assert result["num_tokens"] == 3 + 2


def test_the_recipe_is_of_plain_text_alone(tmp_path):
    path = "configs/text_small.yaml"
    root = train.__file__.rsplit("/", 1)[0]
    model_args, data_args, _ = train.parse_arguments([f"{root}/{path}", "--use_cpu", "true"])
    assert data_args.text_column == "text" and data_args.wrap
    config = HierBD3LMConfig(**model_args.config_fields())
    assert not config.has_plan and config.question_len == 0 and config.execution_block_size == 16
