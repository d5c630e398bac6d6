"""Several answers to a question are those of a batch that repeats it; the prompt is encoded once for all."""

from unittest import mock

import pytest
import torch

from .tiny_generation import GIVEN_PLAN, PAD, RAGGED_QUESTIONS, SAMPLERS, left_pad, right_pad, speaker

COPIES = 3
MODELS = {
    "hier": {},
    "shifted": {"prediction": "shifted", "question_attention": "causal"},
    "token by token": {"prediction": "shifted", "plan_block_size": 1, "execution_block_size": 1},
    "bd3lm": {"algorithm": "bd3lm", "execution_block_size": 4},
    "gemma3": {"backbone": "gemma3"},
}


def compare(model, questions, plans=None, **settings):
    """Generate with the argument and with repeated rows; return the shapes of passes, and how many more a row took."""
    inputs = {"input_ids": left_pad(questions), "plan_ids": plans}
    inputs = {name: ids for name, ids in inputs.items() if ids is not None}
    repeated = {name: ids.repeat_interleave(COPIES, dim=0) for name, ids in inputs.items()}
    settings = {"temperature": 1.0, "seed": 3} | settings
    shapes, encode = [], model.encode

    def watched(tokens, *args):
        shapes.append(tuple(tokens.shape))
        return encode(tokens, *args)

    with mock.patch.object(model, "encode", watched):
        output = model.generate(**inputs, num_return_sequences=COPIES, **settings)
    expected = model.generate(**repeated, **settings)
    for name in ("sequences", "plan", "execution", "finished"):
        assert torch.equal(output[name], expected[name])
    more = output.num_forward_passes - expected.num_forward_passes
    assert len({tuple(row) for row in output.sequences.tolist()}) > len(questions)  # the answers differ
    return shapes, more


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", MODELS)
def test_answers_are_those_of_repeated_rows(kind, sampler):
    shapes, more = compare(speaker(**MODELS[kind]), RAGGED_QUESTIONS, sampler=sampler, **SAMPLERS[sampler])
    assert shapes[0][0] == len(RAGGED_QUESTIONS)
    assert more.tolist() == [0 if kind == "token by token" else 1] * len(more)  # the prompt's own pass


@pytest.mark.parametrize("compile_steps", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_executions_of_one_plan_share_question_and_plan(compile_steps, request):
    if compile_steps:
        request.getfixturevalue("compiler")
    plans = right_pad([GIVEN_PLAN, GIVEN_PLAN[:2]], PAD)
    questions = RAGGED_QUESTIONS[:1] + RAGGED_QUESTIONS[2:3]
    shapes, _ = compare(speaker(), questions, plans, stage="execution", compile_steps=compile_steps)
    assert shapes[0][0] == 2 and shapes[0][1] >= 7 + len(GIVEN_PLAN)


def test_answers_of_a_model_without_noise_are_those_of_repeated_rows():
    model = speaker(algorithm="ar", plan_block_size=None, execution_block_size=None)
    ids = left_pad(RAGGED_QUESTIONS[2:4])
    output = model.generate(ids, num_return_sequences=COPIES, temperature=1.0, seed=3)
    expected = model.generate(ids.repeat_interleave(COPIES, dim=0), temperature=1.0, seed=3)
    assert torch.equal(output.sequences, expected.sequences)
