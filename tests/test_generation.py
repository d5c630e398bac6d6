import functools
import itertools
import json
import math
from contextlib import contextmanager

import pytest
import torch
from scipy import stats
from transformers import Gemma3TextConfig, GenerationConfig, GPT2Config, Qwen3Config
from transformers.generation.streamers import TextDiffusionStreamer, TextStreamer

from hierbd3lm.cache_hierbd3lm import BlockCache
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.samplers_hierbd3lm import draw_tokens, make_sampler
from hierbd3lm.settings_hierbd3lm import HierBD3LMGenerationConfig

from .reference_generation import MOVE_CHANCE, SlowDenoiser, denoise
from .tiny import make_model
from .tiny_tokenizer import make_config_for, make_tokenizer

PAD, END, PLAN, EXECUTION, MASK = range(5)  # tiny.TINY_TOKEN_IDS
# Settings of the samplers with which the tiny models reveal now one token a step and now several.
SAMPLERS = {
    "first_hitting": {},
    "ancestral": {"num_steps": 3},
    "confidence": {"threshold": 0.35},
    "entropy": {"entropy_bound": 3.0},
}
STAGES = ("full", "plan", "execution")
GIVEN_PLAN = [11, 22, 33, 14, 25]
QUESTION = [7, 8, 9, 10, 11]
RAGGED_QUESTIONS = [[7, 8, 9], [], [10, 11, 12, 13, 14, 15, 16], [17], [18, 19], [20, 21, 22, 23, 24, 25], [26]]


def tiny_backbone(kind, vocab_size=40):
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}
    if kind == "qwen3":
        return Qwen3Config(**sizes, tie_word_embeddings=False)
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        return Gemma3TextConfig(**sizes, sliding_window=5, layer_types=layers, tie_word_embeddings=False)
    return GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=256, tie_word_embeddings=False
    )


@functools.cache
def speaker(
    plan_block_size=4, execution_block_size=6, backbone="qwen3", vocab_size=40, end_bias=4.0, attn="sdpa", **overrides
):
    """A tiny random model in float64 that ends now and then, and would love to say the mask token.

    Every test shares it, so none may change it. The other special tokens are left unsaid, as in all data.
    """
    torch.manual_seed(0)
    fields = {"question_len": 12, "plan_len": 12, "execution_len": 12, "block_size": None}
    fields |= {"plan_block_size": plan_block_size, "execution_block_size": execution_block_size}
    fields |= {"backbone_config": tiny_backbone(backbone, vocab_size), "attn_implementation": attn}
    model = make_model(**(fields | overrides)).double()
    bias = torch.zeros(vocab_size, dtype=torch.float64)
    bias[[PAD, PLAN, EXECUTION]] = -30.0
    bias[MASK], bias[END] = 30.0, end_bias
    model.backbone.lm_head.bias = torch.nn.Parameter(bias)
    return model


def left_pad(rows, pad=PAD):
    width = max(len(row) for row in rows)
    return torch.tensor([[pad] * (width - len(row)) + row for row in rows], dtype=torch.long)


def right_pad(rows, pad=PAD):
    width = max(len(row) for row in rows)
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows], dtype=torch.long)


def tokens_of(row):
    return [token for token in row.tolist() if token != PAD]


def generate_one(model, question, plan=None, **settings):
    plan_ids = None if plan is None else torch.tensor([plan], dtype=torch.long)
    return model.generate(torch.tensor([question], dtype=torch.long), plan_ids=plan_ids, **settings)


def rows_of(output, question_width):
    """What an output says of each row, in python."""
    return [
        {
            "answer": tokens_of(output.sequences[row, question_width:]),
            "plan": tokens_of(output.plan[row]),
            "execution": tokens_of(output.execution[row]),
            "finished": bool(output.finished[row]),
            "num_forward_passes": int(output.num_forward_passes[row]),
            "tokens_per_forward": pytest.approx(float(output.tokens_per_forward[row]), rel=1e-6),
        }
        for row in range(len(output.plan))
    ]


def assert_same_as_reference(model, question, plan=None, **settings):
    """Returns the reference's answer, for claims about what the cases cover."""
    output = generate_one(model, question, plan, **settings)
    expected = denoise(model, question, plan, **settings)
    (row,) = rows_of(output, len(question))
    assert output.sequences[0].tolist() == expected.sequence, settings
    assert row == {
        "answer": expected.sequence[len(question) :],
        "plan": expected.plan,
        "execution": expected.execution,
        "finished": expected.finished,
        "num_forward_passes": expected.num_forward_passes,
        "tokens_per_forward": expected.tokens_per_forward,
    }, settings
    return expected


@contextmanager
def recorded_passes(model):
    """The arguments of every forward pass of the model, cloned, with the cache that it was given."""
    passes = []

    def record(module, args, kwargs):
        passes.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()})

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    yield passes
    handle.remove()


# Cached generation equals the slow reference


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cached_generation_equals_recomputing_everything(sampler, temperature, stage):
    plan, answers = GIVEN_PLAN if stage == "execution" else None, []
    block_sizes, drawn = [(4, 6), (6, 4), (1, 3), (2, 1)], [(1.0, 0), (0.8, 1)] if temperature else [(1.0, 0)]
    for number, (sizes, fill, (top_p, seed)) in enumerate(itertools.product(block_sizes, [True, False], drawn)):
        settings = {"fill_after_end": fill, "seed": seed, "top_p": top_p, "temperature": temperature}
        settings |= {"stage": stage, "sampler": sampler} | SAMPLERS[sampler]
        question = RAGGED_QUESTIONS[number % len(RAGGED_QUESTIONS)]
        answers.append(assert_same_as_reference(speaker(*sizes), question, plan, **settings))
    # The claim is empty unless some answers end early, and unless a step reveals several tokens.
    assert {answer.finished for answer in answers} == {True, False}
    if sampler != "first_hitting":
        assert any(answer.tokens_per_forward > 1 for answer in answers)


@pytest.mark.parametrize("backbone", ["gpt2", "gemma3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_other_backbones_equal_recomputing_everything(backbone, temperature):
    for seed, stage in enumerate(STAGES):
        model = speaker(backbone=backbone, end_bias=0.0)
        plan = GIVEN_PLAN if stage == "execution" else None
        settings = {"temperature": temperature, "seed": seed, "stage": stage, "sampler": "first_hitting"}
        assert_same_as_reference(model, QUESTION, plan, **settings)


def test_eager_attention_equals_recomputing_everything():
    model = speaker(attn="eager")
    output = generate_one(model, QUESTION, sampler="first_hitting")
    assert output.sequences[0].tolist() == denoise(speaker(), QUESTION, sampler="first_hitting").sequence


@pytest.mark.parametrize("noise", MOVE_CHANCE)
def test_ancestral_sampling_follows_the_noise_schedule(noise):
    model = speaker(6, 6, noise=noise, end_bias=0.0)
    for seed, num_steps in enumerate((1, 2, 5, 40)):
        settings = {"num_steps": num_steps, "seed": seed, "temperature": 1.0, "stage": "plan"}
        assert_same_as_reference(model, QUESTION, sampler="ancestral", **settings)


@pytest.mark.parametrize("tokens_per_step", [1, 2])
@pytest.mark.parametrize("sampler", ["confidence", "entropy"])
def test_left_to_right_equals_recomputing_everything(sampler, tokens_per_step):
    pairs = []
    for seed, (bound, temperature) in enumerate(itertools.product((0.1, 0.35, 1.0), (0.0, 1.0))):
        settings = {"threshold": bound} if sampler == "confidence" else {"entropy_bound": 8 * bound}
        settings |= {"temperature": temperature, "seed": seed, "sampler": sampler, "tokens_per_step": tokens_per_step}
        model = speaker(6, 6, end_bias=-1.0)
        assert_same_as_reference(model, QUESTION, left_to_right=True, **settings)
        pairs.append([generate_one(model, QUESTION, left_to_right=order, **settings) for order in (True, False)])
    assert any(not torch.equal(ours.sequences, other.sequences) for ours, other in pairs)


def test_left_to_right_stops_at_the_first_token_that_is_not_sure():
    confidence = torch.tensor([[0.5, 0.95, 0.99, 0.6], [0.99, 0.92, 0.5, 0.99]])
    logits = torch.stack([confidence.log(), (1 - confidence).log()], dim=-1).flatten(0, 1)
    candidates, tokens = torch.ones(2, 4, dtype=torch.bool), torch.zeros(8, dtype=torch.long)
    settings = HierBD3LMGenerationConfig(left_to_right=True)
    assert make_sampler(settings).accept(candidates, logits, tokens).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    settings.left_to_right = False
    assert make_sampler(settings).accept(candidates, logits, tokens).int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 1]]
    candidates[0, 0] = False  # what is revealed already is passed over
    settings.left_to_right = True
    accepted = make_sampler(settings).accept(candidates, logits[1:], tokens[1:])
    assert accepted.int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("settings", [{"max_plan_len": 4, "max_execution_len": 6}, {"tokens_per_step": 3}])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_limits_and_tokens_per_step_equal_recomputing_everything(sampler, settings):
    if "tokens_per_step" in settings and sampler in ("first_hitting", "ancestral"):
        settings = {}  # which it does not read
    for temperature in (0.0, 1.0):
        settings = settings | SAMPLERS[sampler] | {"seed": 3, "temperature": temperature}
        assert_same_as_reference(speaker(end_bias=-1.0), QUESTION, sampler=sampler, **settings)


# Batches


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_greedy_row_does_not_know_its_batch(sampler, stage):
    settings = {"sampler": sampler, "stage": stage} | SAMPLERS[sampler]
    for sizes in [(4, 6), (6, 1), (1, 4)]:
        model, plans = speaker(*sizes), [None] * len(RAGGED_QUESTIONS)
        if stage == "execution":
            plans = [GIVEN_PLAN[: 1 + row % 5] for row in range(len(RAGGED_QUESTIONS))]
        input_ids = left_pad(RAGGED_QUESTIONS)
        plan_ids = right_pad(plans) if stage == "execution" else None
        together = rows_of(model.generate(input_ids, plan_ids=plan_ids, **settings), input_ids.shape[1])
        alone = [
            rows_of(generate_one(model, question, plan, **settings), len(question))[0]
            for question, plan in zip(RAGGED_QUESTIONS, plans, strict=True)
        ]
        assert together == alone
        assert len({row["num_forward_passes"] for row in together}) > 1  # some end before others


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_ended_row_leaves_the_batch_at_once(sampler):
    model = speaker()
    with recorded_passes(model) as passes:
        output = model.generate(left_pad(RAGGED_QUESTIONS), sampler=sampler, **SAMPLERS[sampler])
    taken = output.num_forward_passes
    assert [len(one["noisy_input_ids"]) for one in passes] == [int((taken > n).sum()) for n in range(int(taken.max()))]
    assert taken.min() < taken.max()


def test_a_slow_row_goes_on_to_its_limits_when_a_fast_one_has_ended():
    model, settings, num_left_alone = speaker(4, 4, end_bias=1.0), {"sampler": "confidence", "threshold": 0.2}, 0
    for seed in range(18):
        generator = torch.Generator().manual_seed(seed)
        questions = torch.randint(5, 40, (2, 6), generator=generator)
        together = rows_of(model.generate(questions, **settings), 6)
        assert together == [rows_of(generate_one(model, row.tolist(), **settings), 6)[0] for row in questions]
        fast, slow = sorted(together, key=lambda row: row["num_forward_passes"])
        num_left_alone += fast["num_forward_passes"] < slow["num_forward_passes"] and len(slow["answer"]) == 24
    assert num_left_alone > 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_of_a_sampled_batch_keep_to_themselves(sampler):
    # At temperature 1 a batch draws other numbers than its rows alone, but every row must be a possible answer to
    # its own question: rows with the same question come from the same distribution as a batch of nothing else.
    model = speaker(3, 3, plan_len=3, vocab_size=8, end_bias=0.0)
    settings = {"stage": "plan", "sampler": sampler, "temperature": 1.0, "seed": 0} | SAMPLERS[sampler]
    count = 4000
    mixed = model.generate(torch.tensor([[5, 6], [7, 5]]).repeat(count, 1), **settings).sequences[::2, 3:]
    alone = model.generate(torch.tensor([[5, 6]]).repeat(count, 1), **(settings | {"seed": 1})).sequences[:, 3:]
    other = model.generate(torch.tensor([[7, 5]]).repeat(count, 1), **(settings | {"seed": 2})).sequences[:, 3:]
    assert same_distribution(mixed, alone) > 1e-3
    assert same_distribution(mixed, other) < 1e-6


def same_distribution(first, second):
    """p-value of a chi-square test that two samples of `(count, 2)` tokens come from one distribution."""
    table = torch.stack([torch.bincount(8 * pairs[:, 0] + pairs[:, 1], minlength=64) for pairs in (first, second)])
    return stats.chi2_contingency(table[:, table.sum(dim=0) > 20]).pvalue


@pytest.mark.parametrize("stage", STAGES)
def test_the_side_of_the_padding_changes_nothing(stage):
    model = speaker()
    plan_ids = torch.tensor([GIVEN_PLAN] * len(RAGGED_QUESTIONS)) if stage == "execution" else None
    left, right = left_pad(RAGGED_QUESTIONS), right_pad(RAGGED_QUESTIONS)
    wider = torch.nn.functional.pad(left, (3, 2))
    results = [
        rows_of(model.generate(ids, plan_ids=plan_ids, stage=stage), ids.shape[1]) for ids in (left, right, wider)
    ]
    assert results[0] == results[1] == results[2]


def test_attention_mask_says_what_is_padding():
    model, left = speaker(), left_pad(RAGGED_QUESTIONS)
    garbage = torch.where(left == PAD, 33, left)
    expected = rows_of(model.generate(left), left.shape[1])
    for mask in ((left != PAD), (left != PAD).long()):
        assert rows_of(model.generate(garbage, attention_mask=mask), left.shape[1]) == expected


def test_pad_may_be_the_end_token():
    apart, same = speaker(), speaker(pad_token_id=END)
    expected = rows_of(apart.generate(left_pad(RAGGED_QUESTIONS)), 7)
    output = same.generate(left_pad(RAGGED_QUESTIONS, END))
    for row, wanted in enumerate(expected):
        for name in ("plan", "execution"):
            assert [token for token in output[name][row].tolist() if token != END] == wanted[name]
    assert output.num_forward_passes.tolist() == [row["num_forward_passes"] for row in expected]


@pytest.mark.parametrize("input_ids", [torch.zeros(2, 0, dtype=torch.long), torch.full((2, 3), PAD)])
@pytest.mark.parametrize("stage", STAGES)
def test_an_empty_question_is_answered(stage, input_ids):
    model, plan = speaker(), GIVEN_PLAN if stage == "execution" else None
    plan_ids = None if plan is None else torch.tensor([plan, plan])
    output = model.generate(input_ids, plan_ids=plan_ids, stage=stage, sampler="first_hitting")
    expected = denoise(model, [], plan, stage=stage, sampler="first_hitting")
    for row in rows_of(output, input_ids.shape[1]):
        assert (row["plan"], row["execution"]) == (expected.plan, expected.execution)
        assert row["num_forward_passes"] == expected.num_forward_passes


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
    """What comes out when the three happen with these probabilities; behind an `<|end|>` there is `<|end|>`."""
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
    """How many places the network has filled, openers left out."""
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
        assert all((one["noisy_input_ids"][one["logits_to_keep"]] == MASK).all() for one in passes)
        encoded = [one["input_ids"][one["block_ids"] >= 0] for one in passes]
        last_block = model.config.execution_block_size
        assert torch.cat(encoded).tolist() == output.sequences[0, :-last_block].tolist()


# The cache


@pytest.mark.parametrize("sampler", ["first_hitting", "confidence"])
def test_a_pass_leaves_no_trace_in_finished_blocks(sampler):
    model, snapshots, storages = speaker(), [], set()

    def finished_blocks(cache):
        return [
            states[: cache.num_rows, :, cache.scratch :].clone()
            for layer in cache.layers
            if layer.is_initialized
            for states in (layer.keys, layer.values)
        ]

    def before(module, args, kwargs):
        snapshots.append(finished_blocks(kwargs["past_key_values"]))

    def after(module, args, kwargs, output):
        cache, old = kwargs["past_key_values"], snapshots[-1]
        assert all(torch.equal(a, b) for a, b in zip(old, finished_blocks(cache), strict=bool(old)))
        storages.add(tuple(layer.keys.data_ptr() for layer in cache.layers))

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    model.generate(left_pad(RAGGED_QUESTIONS), sampler=sampler)
    for handle in handles:
        handle.remove()
    assert len(snapshots) > 5
    assert len(storages) == 1  # allocated once


class ListCache:
    """What a `BlockCache` holds, as a list of (key, block, position) for each row."""

    def __init__(self, num_rows):
        self.rows = [[] for _ in range(num_rows)]

    def commit(self, keys, block_ids, position_ids):
        for row, column in itertools.product(range(len(self.rows)), range(block_ids.shape[1])):
            if block_ids[row, column] >= 0:
                entry = (float(keys[row, 0, column, 0]), int(block_ids[row, column]), int(position_ids[row, column]))
                self.rows[row].append(entry)

    def check(self, cache, returned, pass_length):
        """Compares a `BlockCache` and the keys that its `update` has returned."""
        layout = cache.layout
        assert layout.block_ids.shape == (len(self.rows), max((len(row) for row in self.rows), default=0))
        for number, row in enumerate(self.rows):
            width = len(row)
            assert [key for key, _, _ in row] == returned[number, 0, pass_length : pass_length + width, 0].tolist()
            assert [block for _, block, _ in row] == layout.block_ids[number, :width].tolist()
            assert [position for _, _, position in row] == layout.position_ids[number, :width].tolist()
            assert (layout.block_ids[number, width:] == -1).all()


@pytest.mark.parametrize("num_rows", [6, 1])
def test_block_cache_equals_lists(num_rows):
    generator = torch.Generator().manual_seed(0)
    cache = BlockCache(num_layers=2, num_rows=num_rows, scratch=9, capacity=40, device=torch.device("cpu"))
    leaving = {2: [0, 1, 1, 0, 1, 1], 5: [1, 0, 1, 0]} if num_rows > 1 else {}
    expected = [ListCache(num_rows), ListCache(num_rows)]
    for step in range(8):
        pass_length = int(torch.randint(4, 10, (), generator=generator))
        num_clean = 0 if step == 3 else pass_length - 3
        keys = torch.randn(2, num_rows, 2, pass_length, 4, generator=generator)
        for index, layer in enumerate(cache.layers):
            returned, returned_values = cache.update(keys[index], -keys[index], index)
            assert torch.equal(returned[:, :, :pass_length], keys[index])
            assert torch.equal(returned_values, -returned)
            # Views: no finished block is copied for a pass.
            assert returned.untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()
            assert returned_values.untyped_storage().data_ptr() == layer.values.untyped_storage().data_ptr()
        least = -1 if num_rows > 1 or step % 2 else 0  # a single row without padding has a way of its own
        block_ids = torch.randint(least, 3, (num_rows, num_clean), generator=generator)
        position_ids = torch.randint(0, 50, (num_rows, num_clean), generator=generator)
        if num_clean:
            cache.commit(block_ids, position_ids, pass_length)
        for index, lists in enumerate(expected):
            lists.commit(keys[index], block_ids, position_ids)
            probe, _ = cache.layers[index].update(keys[index], -keys[index])
            if step not in leaving:
                lists.check(cache, probe, pass_length)
        if step in leaving:
            keep = torch.tensor(leaving[step]) > 0
            addresses = [layer.keys.data_ptr() for layer in cache.layers]
            order = cache.keep_rows(keep).tolist()
            assert sorted(order) == keep.nonzero()[:, 0].tolist()
            num_rows = len(order)
            for lists in expected:
                lists.rows = [lists.rows[old] for old in order]
            assert addresses == [layer.keys.data_ptr() for layer in cache.layers]


def test_dropping_rows_moves_no_more_than_the_holes():
    cache = BlockCache(num_layers=1, num_rows=6, scratch=2, capacity=4, device=torch.device("cpu"))
    cache.update(torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 2, 1), torch.zeros(6, 1, 2, 1), 0)
    for keep, expected in (
        ([True, False, True, True, True, True], [0, 5, 2, 3, 4]),
        ([True, True, True, True, False], [0, 1, 2, 3]),
        ([False, False, False, True], [3]),
        ([False], []),
    ):
        rows_before = cache.layers[0].keys[:, 0, 0, 0].clone()
        order = cache.keep_rows(torch.tensor(keep)).tolist()
        assert order == expected
        rows = cache.layers[0].keys[:, 0, 0, 0]
        assert rows[: len(order)].tolist() == rows_before[order].tolist()
        assert cache.num_rows == len(order) == len(cache.lengths)


def test_a_row_that_stays_has_its_whole_capacity():
    cache = BlockCache(num_layers=1, num_rows=2, scratch=6, capacity=8, device=torch.device("cpu"))

    def keep(block_ids):
        keys = torch.randn(*block_ids.shape, 1)[:, None]
        cache.update(keys, keys, 0)
        cache.commit(block_ids, torch.arange(block_ids.shape[1]).expand_as(block_ids), block_ids.shape[1])

    keep(torch.tensor([[0] * 6, [-1] * 4 + [0] * 2]))
    cache.keep_rows(torch.tensor([False, True]))
    assert cache.layout.block_ids.tolist() == [[0, 0]]
    keep(torch.ones(1, 6, dtype=torch.long))
    assert cache.layout.block_ids.tolist() == [[0] * 2 + [1] * 6]


def test_what_uninitialised_memory_holds_reaches_no_answer(monkeypatch):
    # A masked column is multiplied by 0, which leaves a NaN a NaN.
    expected = speaker().generate(left_pad(RAGGED_QUESTIONS))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    output = speaker().generate(left_pad(RAGGED_QUESTIONS))
    assert torch.equal(output.sequences, expected.sequences)


# Given plans


@pytest.mark.parametrize("pad_token_id", [PAD, END])
@pytest.mark.parametrize("opener", [[], [PLAN]])
@pytest.mark.parametrize("end", [[], [END], [END, END, END]])
def test_a_given_plan_is_used_verbatim(opener, end, pad_token_id):
    model = speaker(pad_token_id=pad_token_id)
    contents = [GIVEN_PLAN, [12], [], [13, 14, 15], list(range(5, 15))]
    plan_ids = right_pad([opener + content + end for content in contents], pad_token_id)
    questions = left_pad(RAGGED_QUESTIONS[: len(contents)], pad_token_id)
    output = model.generate(questions, plan_ids=plan_ids, stage="execution")
    for row, content in enumerate(contents):
        laid_out = [PLAN, *content, END]
        laid_out += [END] * (-len(laid_out) % 4)
        start = questions.shape[1]
        assert output.sequences[row, start : start + len(laid_out) + 1].tolist() == [*laid_out, EXECUTION]
        assert output.plan[row].tolist() == content + [pad_token_id] * (output.plan.shape[1] - len(content))


def test_a_plan_of_no_tokens_may_be_given_in_no_columns():
    model = speaker()
    output = generate_one(model, QUESTION, [], stage="execution")
    assert output.plan.shape == (1, 0)
    assert output.sequences[0, 5:10].tolist() == [PLAN, END, END, END, EXECUTION]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_stages_compose(sampler):
    # The second has plans that have ended, and one that was cut at its length.
    for end_bias in (1.5, -1.0):
        model, input_ids = speaker(end_bias=end_bias), left_pad(RAGGED_QUESTIONS)
        settings = {"sampler": sampler} | SAMPLERS[sampler]
        full = model.generate(input_ids, **settings)
        plan = model.generate(input_ids, stage="plan", **settings)
        assert plan.execution.shape == (len(input_ids), 0)
        execution = model.generate(input_ids, plan_ids=plan.plan, stage="execution", **settings)
        for name in ("sequences", "plan", "execution"):
            assert torch.equal(full[name], execution[name])
        assert torch.equal(full.plan, plan.plan)
        assert torch.equal(full.num_forward_passes, plan.num_forward_passes + execution.num_forward_passes)
        assert torch.equal(full.finished, plan.finished & execution.finished)


def test_a_given_plan_may_be_longer_than_max_plan_len():
    # That limits what is denoised; here it would cut what the caller wrote.
    settings = {"max_plan_len": 4, "max_execution_len": 6}
    output = generate_one(speaker(), QUESTION, list(range(5, 14)), stage="execution", **settings)
    assert output.plan[0].tolist() == list(range(5, 14))


def test_a_model_that_loves_special_tokens_writes_a_plan_that_can_be_given_back():
    # A plan's readers tell segments by their openers, and content from padding by the pad token.
    model = make_model()
    with torch.no_grad():
        model.backbone.lm_head.weight[[PAD, PLAN, EXECUTION, MASK]] *= 10
    input_ids = left_pad(RAGGED_QUESTIONS)
    for temperature in (0.0, 1.0):
        plan = model.generate(input_ids, stage="plan", temperature=temperature, seed=0).plan
        output = model.generate(input_ids, plan_ids=plan, stage="execution", temperature=temperature, seed=0)
        assert torch.equal(output.plan, plan)
        assert not torch.isin(output.execution, torch.tensor([PLAN, EXECUTION, MASK])).any()


# What is refused


@pytest.mark.parametrize(
    ("plan_ids", "message"),
    [
        ([[PAD, 7, 8], [7, 8, 9]], "`plan_ids` must be padded on the right"),
        ([[7, END, 8], [7, 8, 9]], "`plan_ids` must be padded on the right"),
        ([list(range(5, 17))] * 2, "`plan_ids` must have at most plan_len - 1 = 11 tokens, but got 12"),
        ([[7, MASK, 8], [7, 8, 9]], "but got the mask token inside it"),
        ([[7, PLAN, 8], [7, 8, 9]], "but got the plan token inside it"),
        ([[7, EXECUTION, 8], [7, 8, 9]], "but got the execution token inside it"),
        ([[7, 8, 9]], "`plan_ids` must be .* batch 2"),
        ([7, 8, 9], "`plan_ids` must be .* batch 2"),
        (None, "`plan_ids` must be given for stage='execution'.*without plan_ids"),
    ],
)
def test_a_plan_that_cannot_be_used_verbatim_is_refused(plan_ids, message):
    plan_ids = None if plan_ids is None else torch.tensor(plan_ids)
    with pytest.raises(ValueError, match=message):
        speaker().generate(torch.tensor([QUESTION] * 2), plan_ids=plan_ids, stage="execution")


@pytest.mark.parametrize("stage", ["full", "plan"])
def test_a_plan_is_refused_where_one_is_denoised(stage):
    with pytest.raises(ValueError, match=f"stage='{stage}' with plan_ids"):
        generate_one(speaker(), QUESTION, GIVEN_PLAN, stage=stage)


def test_a_question_over_its_length_is_refused():
    model = speaker()
    longest = torch.full((1, 12), 7)
    model.generate(torch.nn.functional.pad(longest, (5, 0)), stage="plan")  # padding is not counted
    with pytest.raises(ValueError, match="`input_ids` must have at most question_len=12 tokens, but got 13"):
        model.generate(torch.full((1, 13), 7))


def test_an_attention_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"`input_ids` and `attention_mask` must have one shape.*\(1, 5\).*\(1, 4\)"):
        speaker().generate(torch.tensor([QUESTION]), attention_mask=torch.ones(1, 4))


def test_a_streamer_for_two_rows_is_refused():
    with pytest.raises(ValueError, match="`streamer` must be None for more than one row, but got 2 rows"):
        speaker().generate(torch.tensor([QUESTION] * 2), streamer=RecordingStreamer())


def test_another_class_of_generation_config_is_refused():
    with pytest.raises(ValueError, match="`generation_config` must be a HierBD3LMGenerationConfig, but GenerationC"):
        generate_one(speaker(), QUESTION, generation_config=GenerationConfig())


@pytest.mark.parametrize("name", ["beams", "tresh"])
def test_an_unknown_setting_is_refused(name):
    with pytest.raises(ValueError, match=f"`generation_config` has no setting {name}; it has stage, sampler"):
        HierBD3LMGenerationConfig(**{name: 3})
    with pytest.raises(ValueError, match=f"`generation_config` has no setting {name}; it has stage, sampler"):
        generate_one(speaker(), QUESTION, **{name: 3})


@pytest.mark.parametrize(
    ("name", "values", "accepted"),
    [
        ("stage", ["both", None], "one of full, plan, execution"),
        ("sampler", ["greedy", 1], "one of first_hitting, ancestral, confidence, entropy"),
        ("num_steps", [0, -1, 2.5, "3", True, None], "an integer >= 1"),
        ("tokens_per_step", [0, 1.0, None], "an integer >= 1"),
        ("threshold", [0, -0.1, 1.01, math.nan, "0.9", None], r"a number in \(0, 1\]"),
        ("top_p", [0.0, 1.5, math.nan, None], r"a number in \(0, 1\]"),
        ("entropy_bound", [-0.1, math.nan, None], "a number >= 0"),
        ("temperature", [-1, math.nan, math.inf, None, True], "number >= 0"),
        ("left_to_right", [1, None, "yes"], "True or False"),
        ("fill_after_end", [1, None, "yes"], "True or False"),
        ("seed", [-1, 1.0, "1"], "an integer >= 0 or None"),
        ("max_plan_len", [-1, 1.0], "an integer >= 0 or None"),
        ("max_execution_len", [-4, 4.0], "an integer >= 0 or None"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(name, values, accepted):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` must be (a finite )?{accepted}"):
            HierBD3LMGenerationConfig(**{name: value})


@pytest.mark.parametrize("value", [0, 3, 6, 16])
@pytest.mark.parametrize("name", ["max_plan_len", "max_execution_len"])
def test_a_limit_that_cuts_a_block_is_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a multiple of the block size 4 up to 12, but got {value}"):
        generate_one(speaker(4, 4), QUESTION, **{name: value})


@pytest.mark.parametrize("stage", ["full", "plan"])
def test_a_limit_that_leaves_nothing_to_denoise_is_refused(stage):
    with pytest.raises(ValueError, match=r"`max_plan_len` must be .*but got 1"):
        generate_one(speaker(1, 1), QUESTION, stage=stage, max_plan_len=1)


def test_a_setting_changed_after_its_check_is_checked_again():
    settings = HierBD3LMGenerationConfig()
    settings.threshold = 2.0
    with pytest.raises(ValueError, match="`threshold` must be"):
        generate_one(speaker(), QUESTION, generation_config=settings)


# Streaming


class RecordingStreamer:
    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(("put", value.flatten().tolist()))

    def put_draft(self, value):
        self.events.append(("draft", value.tolist()))

    def end(self):
        self.events.append(("end", None))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("sizes", [(4, 6), (1, 4)])
def test_a_streamer_receives_prompt_drafts_and_blocks(sampler, sizes):
    model, streamer = speaker(*sizes, end_bias=0.0), RecordingStreamer()
    settings = {"sampler": sampler, "temperature": 1.0, "seed": 0} | SAMPLERS[sampler]
    output = generate_one(model, QUESTION, streamer=streamer, **settings)
    assert streamer.events[0] == ("put", QUESTION)
    assert streamer.events[-1] == ("end", None)
    written, draft, num_drafts = [], None, 0
    for kind, tokens in streamer.events[1:-1]:
        if kind == "put":
            assert draft is None or list(itertools.takewhile(lambda token: token != END, draft)) == tokens
            written, draft = written + tokens, None
        else:
            assert len(tokens) in sizes
            if draft is not None:  # a step reveals something and takes nothing back
                assert tokens.count(MASK) < draft.count(MASK)
                assert all(new == old for new, old in zip(tokens, draft, strict=True) if old not in (MASK, END))
            draft, num_drafts = tokens, num_drafts + 1
    assert num_drafts == int(output.num_forward_passes)
    assert written == [PLAN, *tokens_of(output.plan[0]), EXECUTION, *tokens_of(output.execution[0])]
    plain = generate_one(model, QUESTION, **settings)
    assert torch.equal(output.sequences, plain.sequences)


@pytest.mark.parametrize("streamer_class", [TextDiffusionStreamer, TextStreamer])
def test_the_streamers_of_transformers_print_the_answer(streamer_class, capsys):
    tokenizer = make_tokenizer()
    config = make_config_for(tokenizer)
    model = HierBD3LMForBlockDiffusion(config).eval()
    question = tokenizer("What? ", return_tensors="pt").input_ids
    output = model.generate(question, streamer=streamer_class(tokenizer), max_plan_len=8, max_execution_len=8)
    printed = capsys.readouterr().out
    answer = output.sequences[0][output.sequences[0] != config.end_token_id]
    if streamer_class is TextStreamer:
        assert printed.strip("\n") == tokenizer.decode(answer).strip("\n")
    else:
        assert printed.startswith("What? ")
        assert printed.count("\033[33m") == int(output.num_forward_passes)  # a draft in yellow for every pass


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


# Settings


SAVED = {
    "stage": "plan",
    "sampler": "entropy",
    "num_steps": 5,
    "threshold": 0.25,
    "entropy_bound": 0.75,
    "tokens_per_step": 2,
    "left_to_right": True,
    "temperature": 1.0,
    "top_p": 0.5,
    "fill_after_end": False,
    "max_plan_len": 8,
    "max_execution_len": 4,
    "seed": 11,
}


def test_settings_travel_with_the_model(tmp_path):
    model = make_model()
    for name, value in SAVED.items():
        setattr(model.generation_config, name, value)
    expected = generate_one(model, QUESTION)
    model.save_pretrained(tmp_path)
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is HierBD3LMGenerationConfig
    assert {name: getattr(loaded.generation_config, name) for name in SAVED} == SAVED
    assert torch.equal(generate_one(loaded, QUESTION).sequences, expected.sequences)
    assert SAVED.keys() <= json.loads((tmp_path / "generation_config.json").read_text()).keys()


def test_a_model_without_saved_settings_has_the_defaults(tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path)
    default = HierBD3LMGenerationConfig()
    assert type(loaded.generation_config) is HierBD3LMGenerationConfig
    assert {name: getattr(loaded.generation_config, name) for name in SAVED} == {
        name: getattr(default, name) for name in SAVED
    }


def test_settings_may_be_given_to_from_pretrained(tmp_path):
    make_model().save_pretrained(tmp_path)
    settings = HierBD3LMGenerationConfig(threshold=0.125)
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path, generation_config=settings)
    assert loaded.generation_config.threshold == 0.125


def test_keyword_arguments_override_the_config_and_change_neither():
    model = make_model()
    model.generation_config.stage = "plan"
    settings = HierBD3LMGenerationConfig(sampler="first_hitting", max_plan_len=4, max_execution_len=4)
    by_model, by_config = generate_one(model, QUESTION), generate_one(model, QUESTION, generation_config=settings)
    assert by_model.execution.shape[1] == 0 < by_config.execution.shape[1]
    both = generate_one(model, QUESTION, generation_config=settings, stage="plan", temperature=0.5)
    assert both.sequences.shape == (1, 5 + 4)
    assert (settings.stage, settings.temperature, model.generation_config.sampler) == ("full", 0.0, "confidence")


# Every output


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_output_holds_no_mask_and_agrees_with_itself(sampler, temperature, num_steps):
    # Its mask logit is far above all others, so that any slip would show.
    model, settings = speaker(5, 3, plan_len=15, end_bias=0.5), {"sampler": sampler} | SAMPLERS[sampler]
    settings |= {"temperature": temperature, "seed": num_steps}
    settings |= {"num_steps": num_steps} if sampler == "ancestral" else {}
    input_ids = left_pad(RAGGED_QUESTIONS)
    output = model.generate(input_ids, **settings)
    assert torch.equal(output.sequences[:, :7], input_ids)
    for answer in rows_of(output, 7):
        tokens = answer["answer"]
        assert all(token in {END, PLAN, EXECUTION, *range(5, 40)} for token in tokens)
        assert tokens.count(PLAN) == tokens.count(EXECUTION) == 1
        start = tokens.index(EXECUTION)
        for segment, name, size, most in (
            (tokens[:start], "plan", 5, 15),
            (tokens[start:], "execution", 3, 12),
        ):
            content, rest = answer[name], segment[1 + len(answer[name]) :]
            assert segment[1 : 1 + len(content)] == content
            assert END not in content
            assert set(rest) <= {END}
            assert len(segment) % size == 0
            assert len(rest) <= size  # filled to the end of its block and no further
            assert rest or len(segment) == most
        assert answer["finished"] == all(END in part for part in (tokens[:start], tokens[start:]))


def test_ancestral_finishes_its_last_masks_by_the_model():
    # One step reveals the whole block at once: each token is the model's best guess from nothing but masks.
    model = speaker(6, 6, end_bias=-5.0)
    block = generate_one(model, QUESTION, sampler="ancestral", num_steps=1, stage="plan", max_plan_len=6).plan[0]
    expected = denoise(model, QUESTION, threshold=1e-12, stage="plan", max_plan_len=6)
    assert block.tolist() == expected.plan
    assert PAD not in expected.plan


def test_sequences_rescored_under_the_training_mask_give_the_same_tokens():
    # With every token of a block masked, the training pass shows each block what one-pass sampling has shown it; its
    # segments are read from the openers.
    model = speaker(4, 6, end_bias=4.0)
    output = model.generate(left_pad(RAGGED_QUESTIONS), threshold=1e-12, fill_after_end=False)
    sequences, padding = output.sequences, output.sequences == PAD
    answer = torch.arange(sequences.shape[1]) >= 7
    masked = answer & ~padding & (sequences != PLAN) & (sequences != EXECUTION)
    xt = sequences.masked_fill(masked, MASK)
    logits = model(sequences, attention_mask=~padding, noisy_input_ids=xt, logits_to_keep=masked).logits
    logits[:, MASK] = -math.inf
    rescored = sequences.masked_scatter(masked, logits.argmax(dim=-1))
    content = (sequences != END) & masked
    first_end = (sequences == END) & (sequences.roll(1, dims=1) != END) & masked
    assert content.sum() > 20
    assert first_end.sum() > 5
    for counted in (content, first_end):
        assert torch.equal(rescored[counted], sequences[counted])


def test_sequences_have_the_layout_they_were_generated_with():
    model, seen, derived = speaker(4, 6), [], []
    with recorded_passes(model) as passes:
        output = generate_one(model, QUESTION, sampler="first_hitting")
    for one in passes:
        for ids, blocks, positions in (
            (one["input_ids"], one["block_ids"], one["position_ids"]),
            (one["noisy_input_ids"], one["noisy_block_ids"], one["noisy_position_ids"]),
        ):
            assert ids.shape == blocks.shape == positions.shape
            real = blocks >= 0
            seen += zip(positions[real].tolist(), blocks[real].tolist(), strict=True)
    layout = model._clean_layout(output.sequences, None, None, None, None, None)
    derived = list(zip(layout.position_ids[0].tolist(), layout.block_ids[0].tolist(), strict=True))
    assert sorted(set(seen)) == derived


@pytest.mark.slow
def test_compiled_steps_give_the_same_tokens():
    model, questions = speaker.__wrapped__(backbone="qwen3"), left_pad(RAGGED_QUESTIONS)
    torch._dynamo.utils.counters.clear()
    for sampler in ("first_hitting", "confidence"):
        settings = {"sampler": sampler, **SAMPLERS[sampler], "temperature": 1.0, "seed": 3}
        eager = model.generate(questions, **settings)
        compiled = model.generate(questions, **settings, compile_steps=True)
        assert compiled.sequences.tolist() == eager.sequences.tolist(), sampler
        assert compiled.num_forward_passes.tolist() == eager.num_forward_passes.tolist(), sampler
        assert len(set(eager.num_forward_passes.tolist())) > 1, "rows left the batch on the way"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
