"""What the page shows of a generation is what `generate` writes, pass by pass."""

import itertools

import pytest
import torch

from hierbd3lm.demo.recording import Recording
from hierbd3lm.masking_hierbd3lm import EXECUTION, PLAN, TokenLayout
from hierbd3lm.settings_hierbd3lm import HierBD3LMGenerationConfig

from .tiny_algorithms import ALL
from .tiny_generation import END, GIVEN_PLAN, MASK, PAD, QUESTION, SAMPLERS, generate_one, speaker, tokens_of
from .tiny_generation import EXECUTION as EXECUTION_TOKEN
from .tiny_generation import PLAN as PLAN_TOKEN

OWN_SIZES = {"plan_block_size": None, "execution_block_size": None, "block_size": 4}
TOKEN_BY_TOKEN = {"plan_block_size": 1, "execution_block_size": 1, "prediction": "shifted"}
MODELS = {
    **{name: OWN_SIZES | overrides for name, overrides in ALL.items()},
    "blocks of two sizes": {"plan_block_size": 4, "execution_block_size": 6},
    "blocks of one token": TOKEN_BY_TOKEN,
    "one causal part": TOKEN_BY_TOKEN | {"plan_block_size": None, "plan_len": 0, "question_attention": "causal"},
    "without a plan": {"plan_block_size": None, "plan_len": 0},
}


def record(model, plan=None, **settings):
    recording = Recording(model, QUESTION, HierBD3LMGenerationConfig(**settings), plan)
    return [*recording.frames(pause=1e-6)], recording.outcome


def content(tokens):
    """Content of a segment: what follows the opener, up to the first `<|end|>`."""
    return [*itertools.takewhile(lambda token: token != END, [token.id for token in tokens][1:])]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stage", ["full", "execution"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_last_frame_is_the_answer(name, stage, temperature):
    model = speaker(**MODELS[name])
    has_plan = PLAN in model.order.segments
    plan = GIVEN_PLAN if stage == "execution" and has_plan else None
    settings = {"stage": stage, "temperature": temperature, "seed": 3}
    frames, outcome = record(model, plan, **settings)
    expected = generate_one(model, QUESTION, plan, **settings)
    assert torch.equal(outcome.output.sequences, expected.sequences)
    steps = [frame.step for frame in frames]
    assert steps == sorted(steps) and {*steps} - {0} == {*range(1, int(expected.num_forward_passes) + 1)}
    segments = outcome.frame.segments
    assert (PLAN in segments) == has_plan
    for segment, ids in ((PLAN, expected.plan), (EXECUTION, expected.execution)):
        if tokens := segments.get(segment):
            assert tokens[0].id == {PLAN: PLAN_TOKEN, EXECUTION: EXECUTION_TOKEN}[segment]
        assert content(segments.get(segment, ())) == tokens_of(ids[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_token_has_the_step_and_the_confidence_of_the_pass_that_committed_it(sampler):
    model = speaker(4, 6)
    frames, outcome = record(model, sampler=sampler, seed=0, **SAMPLERS[sampler])
    seen, changed = {}, {}  # (segment, place) -> token id, and the last step at which it changed
    for frame in frames:
        for segment, its in frame.segments.items():
            for key, token in {(segment, place): token.id for place, token in enumerate(its)}.items():
                if seen.get(key, MASK) != token and key[1] > 0:
                    changed[key] = frame.step
                seen[key] = token
    tokens = {(s, i): token for s, its in outcome.frame.segments.items() for i, token in enumerate(its)}
    assert changed == {key: token.step for key, token in tokens.items() if token.step is not None}
    assert {key for key, token in tokens.items() if token.step is None} == {(PLAN, 0), (EXECUTION, 0)}
    confident = [token.confidence for token in tokens.values() if token.confidence is not None]
    assert confident and all(0 < confidence <= 1 for confidence in confident)
    assert all(token.id == END for token in tokens.values() if token.step and token.confidence is None)


def test_confidence_is_the_plain_probability_of_the_first_pass():
    """The first pass, recomputed without a cache, at a temperature that changes what is drawn but no probability."""
    model = speaker(4, 6)
    frames, _ = record(model, sampler="first_hitting", temperature=2.0, seed=1)
    assert [token.step for token in frames[0].segments[PLAN]] == [None] * 4  # the canvas
    (place, token), *others = [
        (place, token) for place, token in enumerate(frames[1].segments[PLAN]) if token.step == 1
    ]
    assert others == []
    noisy = torch.tensor([[PLAN_TOKEN, MASK, MASK, MASK]])
    order, length = model.order, len(QUESTION)
    segment_ids = torch.tensor([[0] * length + [1] * 4])
    block_ids, position_ids = order.layout(segment_ids)
    clean = TokenLayout(block_ids, torch.zeros_like(block_ids), position_ids).columns(0, length)
    layout = clean + TokenLayout(block_ids, torch.ones_like(block_ids), position_ids).columns(length)
    with torch.no_grad():
        states = model.encode(torch.cat([torch.tensor([QUESTION]), noisy], dim=1), layout, None, order)
        logits = model.project(states[0, length + place]).float()
    logits[[PAD, PLAN_TOKEN, EXECUTION_TOKEN, MASK]] = -torch.inf
    assert token.confidence == pytest.approx(float(logits.softmax(dim=-1)[token.id]), rel=1e-5)


def test_a_given_plan_has_neither_step_nor_confidence():
    _, outcome = record(speaker(), GIVEN_PLAN, stage="execution")
    assert {(token.step, token.confidence) for token in outcome.frame.segments[PLAN]} == {(None, None)}


def test_without_a_pause_the_last_frame_is_always_seen():
    recording = Recording(speaker(), QUESTION, HierBD3LMGenerationConfig())
    recording.thread.join()
    (frame,) = recording.frames()
    assert frame == recording.outcome.frame


def test_a_consumer_that_leaves_stops_the_generation():
    recording = Recording(speaker(end_bias=-30.0), QUESTION, HierBD3LMGenerationConfig(sampler="first_hitting"))
    frames = recording.frames(pause=1e-6)
    next(frames)
    frames.close()
    assert not recording.thread.is_alive() and recording.outcome is None and recording.error is None


@pytest.mark.parametrize(
    ("question", "settings", "message"),
    [
        ([7] * 13, {}, "`input_ids` must have at most question_len=12 tokens, but got 13"),
        ([7], {"block_size": 5}, "`block_size` must divide"),
        ([7], {"max_plan_len": 9}, "`max_plan_len` must be a multiple of the block size 4"),
    ],
)
def test_what_generate_refuses_is_raised_where_the_frames_are_read(question, settings, message):
    with pytest.raises(ValueError, match=message):
        [*Recording(speaker(4, 4), question, HierBD3LMGenerationConfig(**settings)).frames()]
