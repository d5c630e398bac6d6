"""What people pass to `generate`, as they pass it to other models: it works, or one sentence says what to use."""

import pytest
import torch
from transformers import BatchEncoding

from hierbd3lm.settings_hierbd3lm import NOT_APPLICABLE, HierBD3LMGenerationConfig

IDS = torch.tensor([[0, 0, 7, 8, 9], [11, 5, 6, 7, 30]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def test_an_encoding_is_taken_by_position_and_by_name(model):
    expected = model.generate(input_ids=IDS, attention_mask=MASK)
    encoding = BatchEncoding({"input_ids": IDS, "attention_mask": MASK, "token_type_ids": torch.zeros_like(IDS)})
    for output in (
        model.generate(encoding),
        model.generate(dict(encoding)),
        model.generate(**encoding),
        model.generate(inputs=IDS, attention_mask=MASK),
        model.generate(IDS.int(), attention_mask=MASK),
    ):
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output[0], output.sequences)


@pytest.mark.parametrize("inputs", [None, [[5, 6, 7]], "How many?", torch.ones(1, 3), {"attention_mask": MASK}])
def test_anything_else_is_refused_with_what_is_accepted(model, inputs):
    with pytest.raises(ValueError, match=r"`input_ids` must be a tensor of token ids of shape \(batch, length\)"):
        model.generate(inputs)


def test_an_empty_batch_is_refused(model):
    with pytest.raises(ValueError, match="`input_ids` must have at least one row"):
        model.generate(torch.zeros(0, 4, dtype=torch.long))


@pytest.mark.parametrize("name", sorted(NOT_APPLICABLE.keys() - {"do_sample"}))  # which `generate` reads
def test_an_argument_that_does_not_apply_is_refused_with_what_to_use_instead(model, name):
    with pytest.raises(ValueError, match=f"`{name}` does not apply to block diffusion: "):
        model.generate(IDS, **{name: 1})
    with pytest.raises(ValueError, match=f"`{name}` does not apply"):
        HierBD3LMGenerationConfig(**{name: 1})


@pytest.mark.parametrize("seed", [2**63, 2**70, -1])
def test_a_seed_that_torch_does_not_take_is_refused(model, seed):
    with pytest.raises(ValueError, match="`seed` must be an integer >= 0 or None, below 2"):
        model.generate(IDS, temperature=0.5, seed=seed)
    model.generate(IDS, temperature=0.5, seed=2**63 - 1)


@pytest.mark.parametrize("role", ["mask", "plan", "execution", "end"])
def test_a_question_that_holds_structure_is_refused(model, role):
    token_id = getattr(model.config, f"{role}_token_id")
    questions = torch.tensor([[5, 6, 7], [5, token_id, 7]])
    with pytest.raises(ValueError, match=rf"must not contain the {role} token \({token_id}\), but row 1 does"):
        model.generate(questions, attention_mask=torch.ones_like(questions))


def test_a_pad_token_inside_a_question_is_a_guess_that_is_said(model, capture_warnings):
    pad = model.config.pad_token_id
    model.generate(torch.tensor([[pad, 5, 6, pad]]))
    assert not capture_warnings
    without_mask = model.generate(torch.tensor([[5, pad, 7]]))
    assert ["pass the tokenizer's `attention_mask`" in line for line in capture_warnings] == [True]
    question = torch.tensor([[5, pad, 7]])
    as_padding = model.generate(question, attention_mask=torch.tensor([[1, 0, 1]]))
    assert without_mask.sequences.tolist() == as_padding.sequences.tolist()


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_a_number_of_answers_that_is_none_is_refused(model, number):
    with pytest.raises(ValueError, match="`num_return_sequences` must be an integer >= 1, but got"):
        model.generate(IDS, num_return_sequences=number, temperature=0.5)


def test_several_greedy_answers_are_refused_as_they_are_the_same(model):
    with pytest.raises(ValueError, match="`num_return_sequences` must be 1 at temperature 0"):
        model.generate(IDS, num_return_sequences=2)
