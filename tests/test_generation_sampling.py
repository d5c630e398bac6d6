"""Samplers draw from the right distributions, in the right number of forward passes."""

import functools
import math

import pytest
import torch
from scipy import stats

from hierbd3lm.samplers_hierbd3lm import draw_tokens

from .reference_generation import SlowDenoiser
from .tiny_generation import (
    END,
    EXECUTION,
    GIVEN_PLAN,
    MASK,
    PAD,
    PLAN,
    QUESTION,
    RAGGED_QUESTIONS,
    SAMPLERS,
    STAGES,
    generate_one,
    left_pad,
    recorded_passes,
    rows_of,
    speaker,
)

# Distributions


CHI_SQUARE_SAMPLES = 24_000


@functools.cache
def pair_speaker(noise="loglinear"):
    """A model of 8 tokens whose plan is one block: its opener, and two tokens to denoise."""
    return speaker(3, 3, plan_len=3, vocab_size=8, end_bias=0.0, noise=noise)


@functools.cache
def exact_pair_distributions():
    """Distributions of a block of two tokens by enumeration, `(8, 8)`: in either order, and both at once."""

    def conditional(block, place):
        (logits,) = SlowDenoiser(pair_speaker(), {"stage": "plan"})._logits(block, [place])
        return logits.double().softmax(dim=0)

    first, second = (conditional([PLAN, MASK, MASK], place) for place in (1, 2))
    second_given_first = torch.stack([conditional([PLAN, token, MASK], 2) for token in range(8)])
    first_given_second = torch.stack([conditional([PLAN, MASK, token], 1) for token in range(8)], dim=1)
    forward, backward = first[:, None] * second_given_first, second[None] * first_given_second
    return {"forward": forward, "backward": backward, "at_once": first[:, None] * second[None]}


def mixture(forward, backward, at_once):
    """What comes out when the three happen with these probabilities; after an `<|end|>` there is `<|end|>`."""
    exact = exact_pair_distributions()
    joint = forward * exact["forward"] + backward * exact["backward"] + at_once * exact["at_once"]
    joint[END], joint[END, END] = 0.0, joint[END].sum()
    return joint


def p_value(pairs, expected):
    """Of the chi-square test of `(count, 2)` tokens against probabilities `(8, 8)`."""
    observed = torch.bincount(8 * pairs[:, 0] + pairs[:, 1], minlength=64).double()
    expected = expected.flatten() * len(pairs)
    assert observed[expected < 1e-6].sum() == 0  # the special tokens
    observed, expected = observed[expected > 0], expected[expected > 0]
    rare = expected < 5
    if rare.any():
        observed, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (observed, expected))
    return stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


def sample_pairs(model, seed, **settings):
    question = torch.zeros(CHI_SQUARE_SAMPLES, 0, dtype=torch.long)
    return model.generate(question, stage="plan", temperature=1.0, seed=seed, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("fill_after_end", [True, False])
def test_first_hitting_draws_from_the_exact_distribution(fill_after_end):
    output = sample_pairs(pair_speaker(), 0, sampler="first_hitting", fill_after_end=fill_after_end)
    pairs = output.sequences[:, 1:]
    assert p_value(pairs, mixture(0.5, 0.5, 0.0)) > 1e-3
    for wrong in (mixture(1.0, 0.0, 0.0), mixture(0.0, 1.0, 0.0), mixture(0.0, 0.0, 1.0)):
        assert p_value(pairs, wrong) < 1e-6
    # The first token is an <|end|> that comes first half of the time; then the second costs no pass.
    filled = 0.5 * float(exact_pair_distributions()["forward"][END].sum()) if fill_after_end else 0.0
    count = int((output.num_forward_passes == 1).sum())
    assert stats.binomtest(count, CHI_SQUARE_SAMPLES, filled).pvalue > 1e-3
    assert count > 0 or not fill_after_end


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "num_steps", "last_step"), [("loglinear", 1, 0.0), ("loglinear", 2, 0.5), ("square", 2, 0.75)]
)
def test_ancestral_draws_from_the_exact_distribution(noise, num_steps, last_step):
    # Of two steps, a token falls into the first (time 1 to 1/2) with the mask probability that it covers.
    at_once = last_step**2 + (1 - last_step) ** 2
    apart = (1 - at_once) / 2
    output = sample_pairs(pair_speaker(noise), 0, sampler="ancestral", num_steps=num_steps, fill_after_end=False)
    pairs = output.sequences[:, 1:]
    assert p_value(pairs, mixture(apart, apart, at_once)) > 1e-3
    assert p_value(pairs, mixture(0.5, 0.5, 0.0)) < 1e-6
    passes = torch.bincount(output.num_forward_passes, minlength=3)[1:3]
    assert passes.sum() == CHI_SQUARE_SAMPLES
    assert stats.binomtest(int(passes[0]), CHI_SQUARE_SAMPLES, at_once).pvalue > 1e-3


def draw(logits, count, temperature, top_p):
    generator = torch.Generator().manual_seed(0)
    return draw_tokens(logits.expand(count, -1), temperature, top_p, generator)


@pytest.mark.parametrize("temperature", [0.5, 1, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.05])
def test_tokens_are_drawn_from_the_tempered_nucleus(temperature, top_p):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, -math.inf, 1.2, 0.9])
    weights = [math.exp(logit / temperature) for logit in logits.tolist()]
    probabilities, above, nucleus = [weight / sum(weights) for weight in weights], 0.0, {}
    for token in sorted(range(7), key=lambda token: -probabilities[token]):
        if above < top_p and probabilities[token] > 0:
            nucleus[token] = probabilities[token]
        above += probabilities[token]
    count = 40_000
    observed = torch.bincount(draw(logits, count, temperature, top_p), minlength=7).tolist()
    assert {token for token, hits in enumerate(observed) if hits} == set(nucleus)
    if len(nucleus) > 1:
        expected = [count * probability / sum(nucleus.values()) for probability in nucleus.values()]
        assert stats.chisquare([observed[token] for token in nucleus], expected).pvalue > 1e-3


def test_temperature_zero_takes_the_likeliest_token():
    logits = torch.randn(50, 9)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(draw_tokens(logits, 0, 0.5, generator), logits.argmax(dim=-1))
    assert torch.equal(generator.get_state(), before)


# Numbers of forward passes


def denoised_places(output, question_width):
    """Number of places that the network has filled, without openers."""
    answer = output.sequences[:, question_width:]
    openers = (answer == PLAN) | (answer == EXECUTION)
    return (answer != PAD).sum(dim=1) - openers.sum(dim=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_first_hitting_takes_one_pass_per_token(temperature):
    for sizes in [(4, 6), (1, 4)]:
        settings = {"sampler": "first_hitting", "fill_after_end": False, "temperature": temperature, "seed": 1}
        output = speaker(*sizes).generate(left_pad(RAGGED_QUESTIONS), **settings)
        assert torch.equal(output.num_forward_passes, denoised_places(output, 7))


@pytest.mark.parametrize("num_steps", [1, 2, 5, 100])
def test_ancestral_takes_one_pass_per_distinct_reveal_time(num_steps):
    model = speaker(6, 6, end_bias=-5.0)
    for seed in range(5):
        settings = {"sampler": "ancestral", "num_steps": num_steps, "temperature": 1.0, "seed": seed}
        output = generate_one(model, QUESTION, stage="plan", max_plan_len=6, **settings)
        times = torch.rand((1, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        steps = {math.ceil(time * num_steps) for time in times[0, 1:].tolist()}
        assert int(output.num_forward_passes) == len(steps) <= num_steps


def test_greedy_ancestral_spreads_the_tokens_over_its_steps():
    model = speaker(6, 6, end_bias=-5.0)
    for num_steps, passes in ((1, 2), (2, 4), (3, 6), (50, 11)):  # of 5 and then 6 tokens
        output = generate_one(model, QUESTION, stage="plan", sampler="ancestral", num_steps=num_steps)
        assert int(output.num_forward_passes) == passes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("settings", [{"threshold": 1e-12}, {"sampler": "entropy", "entropy_bound": math.inf}])
def test_a_sampler_that_accepts_anything_takes_one_pass_per_block(settings, temperature):
    settings = {"fill_after_end": False, "temperature": temperature, "seed": 0} | settings
    output = speaker(4, 6).generate(left_pad(RAGGED_QUESTIONS), **settings)
    for row, answer in enumerate(rows_of(output, 7)):
        start = answer["answer"].index(EXECUTION)
        blocks = start / 4 + (len(answer["answer"]) - start) / 6
        assert output.num_forward_passes[row] == blocks


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tokens_per_step", [1, 2, 4, 9])
@pytest.mark.parametrize("settings", [{"threshold": 1.0}, {"sampler": "entropy", "entropy_bound": 0}])
def test_a_sampler_that_is_never_sure_takes_tokens_per_step(settings, tokens_per_step, temperature):
    settings = settings | {"tokens_per_step": tokens_per_step, "temperature": temperature, "seed": 0}
    output = generate_one(speaker(6, 6, end_bias=-5.0), QUESTION, fill_after_end=False, **settings)
    masked_of_blocks = [5, 6, 5, 6]
    assert int(output.num_forward_passes) == sum(math.ceil(masked / tokens_per_step) for masked in masked_of_blocks)


def test_certain_tokens_are_accepted_together_by_entropy():
    # Entropies near zero sum to less than any bound, so that all are accepted; a bound of 0 admits the first alone.
    model = speaker(4, 4, end_bias=60.0)
    assert int(generate_one(model, QUESTION, sampler="entropy", entropy_bound=1e-3).num_forward_passes) == 2


@pytest.mark.parametrize("stage", STAGES)
def test_tokens_per_forward_counts_tokens_up_to_the_first_end(stage):
    model = speaker()
    plan_ids = torch.tensor([GIVEN_PLAN] * len(RAGGED_QUESTIONS)) if stage == "execution" else None
    output = model.generate(left_pad(RAGGED_QUESTIONS), plan_ids=plan_ids, stage=stage, threshold=0.35)
    for row, answer in enumerate(rows_of(output, 7)):
        start = answer["answer"].index(EXECUTION) if stage != "plan" else len(answer["answer"])
        segments = {"plan": answer["answer"][:start], "execution": answer["answer"][start:]}
        denoised = [segments[name] for name in ("plan", "execution") if stage in ("full", name)]
        num_tokens = sum([*tokens, END].index(END) - 1 + (END in tokens) for tokens in denoised)
        assert float(output.tokens_per_forward[row]) == pytest.approx(num_tokens / answer["num_forward_passes"])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_token_is_encoded_once_and_never_in_a_pass_of_its_own(sampler):
    for sizes in [(4, 6), (1, 4), (1, 1)]:
        model = speaker(*sizes, end_bias=-2.0)
        with recorded_passes(model) as passes:
            output = generate_one(model, QUESTION, sampler=sampler, **SAMPLERS[sampler])
        assert len(passes) == int(output.num_forward_passes)
        assert all((one["noisy_input_ids"] == MASK).any() for one in passes)
        encoded = [one["input_ids"][one["block_ids"] >= 0] for one in passes]
        last_block = model.config.execution_block_size
        assert torch.cat(encoded).tolist() == output.sequences[0, :-last_block].tolist()


# Random numbers


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_says_which_tokens_are_drawn(sampler):
    def draw(**seed):
        settings = {"sampler": sampler, "temperature": 1.0} | SAMPLERS[sampler] | seed
        return speaker(end_bias=-2.0).generate(left_pad(RAGGED_QUESTIONS), **settings).sequences.tolist()

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    torch.manual_seed(7)
    first, second = draw(), draw()
    torch.manual_seed(7)
    assert [first, second] == [draw(), draw()]
    assert first != second


@pytest.mark.parametrize("settings", [{}, {"sampler": "ancestral"}, {"sampler": "first_hitting"}, {"seed": 3}])
def test_greedy_decoding_leaves_the_global_generator_alone(settings):
    model = speaker()  # the first call draws its weights
    state = torch.get_rng_state()
    outputs = [generate_one(model, QUESTION, **settings).sequences for _ in range(2)]
    assert torch.equal(*outputs)
    generate_one(model, QUESTION, temperature=1.0, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
