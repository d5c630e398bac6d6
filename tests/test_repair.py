"""One step of an answer is changed; everything before it stays token for token."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config

from hierbd3lm.backbones_hierbd3lm import special_token_ids
from hierbd3lm.data.steps import split_steps
from hierbd3lm.data.synthetic.config import SyntheticConfig
from hierbd3lm.data.synthetic.problems import generate_dataset
from hierbd3lm.data.synthetic.wording import vocabulary_texts
from hierbd3lm.data.tokenization import train_tokenizer
from hierbd3lm.evaluation.repair import ids_before_step, repair, replace_step, replan
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny import make_model

PROBLEMS = SyntheticConfig(num_steps=(1, 4), max_value=40)


@pytest.fixture(scope="module", params=[None, 300], ids=["words", "bytes"])
def tokenizer(request):
    return train_tokenizer(vocabulary_texts(PROBLEMS), request.param)


@pytest.fixture(scope="module")
def rows():
    return generate_dataset("test", 12, PROBLEMS).to_list()


@pytest.fixture(scope="module")
def model(tokenizer):
    backbone = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    torch.manual_seed(0)
    lengths = {"question_len": 256, "plan_len": 96, "execution_len": 128}
    return make_model(**special_token_ids(tokenizer), backbone_config=backbone, **lengths)


def encode(texts, tokenizer, left=False):
    ids = [tokenizer(text)["input_ids"] for text in texts]
    width, pad = max(map(len, ids)), tokenizer.pad_token_id
    padded = [[pad] * (width - len(row)) + row if left else row + [pad] * (width - len(row)) for row in ids]
    return torch.tensor(padded)


def answers(rows, tokenizer):
    question = encode([row["question"] for row in rows], tokenizer, left=True)
    inputs = {"input_ids": question, "attention_mask": (question != tokenizer.pad_token_id).long()}
    segments = {name: encode([row[name] for row in rows], tokenizer) for name in ("plan", "execution")}
    return inputs, SimpleNamespace(**segments)


def test_a_replaced_step_is_the_only_one_that_differs(tokenizer, rows):
    for row in rows:
        ids, lines = tokenizer(row["plan"])["input_ids"], row["plan"].split("\n")
        for step in range(len(lines)):
            new = replace_step(ids, step, "Mia = Tom + 7", tokenizer)
            assert tokenizer.decode(new).split("\n") == [*lines[:step], "Mia = Tom + 7", *lines[step + 1 :]]
            before = len(tokenizer("\n".join([*lines[:step], ""]))["input_ids"]) if step else 0
            after = len(tokenizer("\n".join(["", *lines[step + 1 :]]))["input_ids"]) if step + 1 < len(lines) else 0
            assert new[: max(before - 1, 0)] == ids[: max(before - 1, 0)]
            assert after <= 1 or new[-after + 1 :] == ids[-after + 1 :]
        assert replace_step(ids, 0, None, tokenizer) == ids


def test_what_stays_of_an_execution_are_the_tokens_of_its_first_steps(tokenizer, rows):
    for row in rows:
        ids, lines = tokenizer(row["execution"])["input_ids"], row["execution"].split("\n")
        for step in range(len(lines) - 1):
            kept = ids_before_step(ids, step, tokenizer)
            assert ids[: len(kept)] == kept
            assert tokenizer.decode(kept) == "".join(line + "\n" for line in lines[:step])
        assert tokenizer.decode(ids_before_step(ids, 99, tokenizer)) == "\n".join(lines[:-1])


@pytest.mark.parametrize(
    "step, new_step, message",
    [
        (4, "Mia = Tom + 1", r"`step` must be in \[0, 0\] for a plan of 1 steps, but got 4"),
        (-1, None, r"`step` must be in \[0, 0\] .*, but got -1"),
        (0, "Mia = 1\nTom = 2", "`new_step` must be one line, but got 'Mia = 1"),
        (0, "", "`new_step` must be one line, but got ''"),
    ],
)
def test_steps_that_cannot_be_replaced_are_refused(step, new_step, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        replace_step(tokenizer("Mia = Tom + 3")["input_ids"], step, new_step, tokenizer)


@pytest.mark.slow
def test_the_execution_is_denoised_from_the_changed_step_on(tokenizer, rows, model):
    rows = [row for row in rows if len(row["plan_steps"]) > 1][:4]
    inputs, output = answers(rows, tokenizer)
    steps = [random.Random(row["question"]).randrange(1, len(row["plan_steps"])) for row in rows]
    new_steps = ["Mia = Tom + 7", None, "Tom = Mia * 2", "Ann = Mia - 1"]
    settings = {"sampler": "ancestral", "num_steps": 2}
    new = replan(model, tokenizer, inputs, output, steps, new_steps, **settings)
    for place, (row, step, text) in enumerate(zip(rows, steps, new_steps, strict=True)):
        lines = row["plan_steps"].copy()
        lines[step] = text or lines[step]
        written = [ids for ids in new.execution[place].tolist() if ids != tokenizer.pad_token_id]
        kept = tokenizer("".join(line + "\n" for line in row["execution_steps"][:step]))["input_ids"]
        assert written[: len(kept)] == kept
        plan = [ids for ids in new.plan[place].tolist() if ids != tokenizer.pad_token_id]
        assert tokenizer.decode(plan) == "\n".join(lines)
        alone = {name: ids[place : place + 1] for name, ids in inputs.items()}
        expected = model.generate(
            **alone, plan_ids=torch.tensor([plan]), execution_ids=torch.tensor([kept]), stage="execution", **settings
        )
        assert expected.execution[0].tolist() == written
        assert new.num_forward_passes[place] == expected.num_forward_passes[0]


def test_values_of_another_number_than_rows_are_refused(tokenizer, rows, model):
    inputs, output = answers(rows[:3], tokenizer)
    with pytest.raises(ValueError, match="`step` must be one value or one for each of 3 rows, but got 2"):
        replan(model, tokenizer, inputs, output, [0, 0])


def test_only_steps_with_wrong_arithmetic_are_denoised_again(tokenizer, rows, model, monkeypatch):
    """The second execution of a wrong one is kept if its arithmetic is right."""
    inputs, output = answers(rows, tokenizer)
    wrong = {2: "right", 5: "wrong", 7: "right"}
    texts = [row["execution"] for row in rows]
    for row in wrong:
        value = rows[row]["execution_steps"][-1].split()[-1]
        texts[row] = texts[row].replace(f"= {value}\n####", f"= {int(value) + 1}\n####")
    output.execution = encode(texts, tokenizer)
    given = {}

    def generate(model, input_ids, attention_mask, plan_ids, execution_ids=None, **settings):
        given.update(settings, plans=[tokenizer.decode(ids[ids != tokenizer.pad_token_id]) for ids in plan_ids])
        again = [rows[row]["execution"] if verdict == "right" else texts[row] for row, verdict in wrong.items()]
        done = torch.ones(len(again), dtype=torch.bool)
        return SimpleNamespace(execution=encode(again, tokenizer), finished=done, num_forward_passes=done.long() * 3)

    monkeypatch.setattr(HierBD3LMForBlockDiffusion, "generate", generate)
    result = repair(model, tokenizer, inputs, output, temperature=0.4, seed=3)
    assert given["plans"] == [rows[row]["plan"] for row in wrong]
    assert (given["temperature"], given["seed"], given["stage"]) == (0.4, 3, "execution")
    assert result.steps == [
        len(split_steps(row["execution"])) - 1 if place in wrong else None for place, row in enumerate(rows)
    ]
    assert result.is_better == [wrong.get(place) == "right" for place in range(len(rows))]
    assert result.num_forward_passes == [3 * (place in wrong) for place in range(len(rows))]
    decoded = [tokenizer.decode(ids) for ids in result.executions]
    assert decoded == [texts[place] if place == 5 else row["execution"] for place, row in enumerate(rows)]


def test_an_execution_that_was_cut_keeps_what_may_be_given(tokenizer, rows, model):
    """Of an execution without a line break and without an end, all but two tokens stay."""
    inputs, output = answers(rows[:1], tokenizer)
    word = tokenizer(" 7")["input_ids"][-1]
    output.execution = torch.full((1, model.config.execution_len - 1), word)
    new = replan(model, tokenizer, inputs, output, 0 if len(rows[0]["plan_steps"]) == 1 else 1)
    kept = new.execution[0, : model.config.execution_len - 2]
    assert (kept == word).all() or len(rows[0]["plan_steps"]) == 1
