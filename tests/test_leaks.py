"""No token reaches a logit that it must not reach, and every token reaches those that it should, in the real model.

Which input token moves which logit is measured twice, by gradients and by changing tokens, and compared with the
documented rule. What one pass sees in training is what it sees in generation.
"""

import copy
import functools
import itertools

import pytest
import torch
from transformers import DynamicCache

from hierbd3lm.cache_hierbd3lm import BlockCache
from hierbd3lm.masking_hierbd3lm import CLEAN, NOISY, TokenLayout

from .tiny import FIRST_CONTENT_ID, make_batch, make_model
from .tiny_backbones import make_backbone_config

QUESTION_LEN, PLAN_BLOCKS, EXECUTION_BLOCKS, BLOCK_SIZE = 3, 2, 3, 4
IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
BACKBONES_AND_IMPLEMENTATIONS = [
    *itertools.product(("qwen3", "llama", "gemma3"), IMPLEMENTATIONS),
    ("gemma2", "eager"),  # soft caps on scores are its own attention's only
    *itertools.product(("gpt2",), ("sdpa", "eager")),
]
LENGTH = QUESTION_LEN + (PLAN_BLOCKS + EXECUTION_BLOCKS) * BLOCK_SIZE
PLAN = range(QUESTION_LEN, QUESTION_LEN + PLAN_BLOCKS * BLOCK_SIZE)
EXECUTION = range(PLAN.stop, LENGTH)
# Masked attention is exactly zero, so that what may not move does not even round differently; 1e-6 is for kernels.
STILL, MOVED = 1e-6, 1e-4


@pytest.fixture(autouse=True)
def uncompiled_attention():
    """FlexAttention as plain tensor code: compiling it again for every shape takes long."""
    with torch.compiler.set_stance("force_eager"):
        yield


def block_of(column: int) -> int:
    """0 for the question, then 1, 2, ... along plan and execution."""
    return 0 if column < QUESTION_LEN else 1 + (column - QUESTION_LEN) // BLOCK_SIZE


def noise(x0, segment_ids, config, seed=1):
    """About half of the tokens after the question masked; the rest are other tokens than x0, to tell the streams."""
    generator = torch.Generator().manual_seed(seed)
    xt = torch.randint(FIRST_CONTENT_ID, config.vocab_size, x0.shape, generator=generator)
    masked = torch.rand(x0.shape, generator=generator) < 0.5
    return torch.where(segment_ids > 0, xt.masked_fill(masked, config.mask_token_id), x0)


@functools.cache
def model_of(backbone: str, attn_implementation: str):
    """Shared by all tests of this file, so none may change it."""
    torch.manual_seed(0)
    config = make_backbone_config(backbone)
    if "sliding_window" in config.to_dict():
        config.sliding_window = 64  # every token is near: windows have tests of their own
    return make_model(backbone_config=config, attn_implementation=attn_implementation)


@functools.cache
def example(backbone="qwen3"):
    """x0, xt and segment ids of one row."""
    config = model_of(backbone, "eager").config
    batch = make_batch([(QUESTION_LEN, PLAN_BLOCKS, EXECUTION_BLOCKS)], config)
    return batch["input_ids"], noise(**rename(batch), config=config), batch["segment_ids"]


def rename(batch):
    return {"x0": batch["input_ids"], "segment_ids": batch["segment_ids"]}


# --------------------------------------------------------------------------------------------------------------------
# Which token moves which logit
# --------------------------------------------------------------------------------------------------------------------


@functools.cache
def influence_by_gradient(backbone: str, attn_implementation: str) -> torch.Tensor:
    """bool (2, LENGTH, LENGTH): whether a token of x0 (0) or xt (1), second axis, moves the logits at xt, third."""
    model = model_of(backbone, attn_implementation)
    x0, xt, segment_ids = example(backbone)
    embedded = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[-1]))
    logits = model(input_ids=x0, noisy_input_ids=xt, segment_ids=segment_ids).logits[0]
    handle.remove()
    moved = []
    for column in range(LENGTH):
        direction = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(column))
        (gradient,) = torch.autograd.grad(logits[column] @ direction, embedded[0], retain_graph=True)
        moved.append((gradient[0] != 0).any(dim=-1).view(2, LENGTH))
    return torch.stack(moved, dim=-1)


@functools.cache
def influence_by_perturbation(backbone: str, attn_implementation: str) -> torch.Tensor:
    """The same, by one row for each token of x0 and xt in which that token is another one."""
    model = model_of(backbone, attn_implementation)
    x0, xt, segment_ids = example(backbone)
    one_token = torch.eye(2 * LENGTH, dtype=torch.bool)
    tokens = torch.cat([x0, xt], dim=1).repeat(2 * LENGTH, 1)
    tokens = torch.where(one_token, other_tokens(tokens, model.config), tokens)
    with torch.no_grad():
        before = model(input_ids=x0, noisy_input_ids=xt, segment_ids=segment_ids).logits
        after = model(
            input_ids=tokens[:, :LENGTH],
            noisy_input_ids=tokens[:, LENGTH:],
            segment_ids=segment_ids.expand(2 * LENGTH, -1),
        ).logits
    change = (after - before).abs().amax(dim=-1)
    assert ((change < STILL) | (change > MOVED)).all()  # nothing lies between
    return (change > MOVED).view(2, LENGTH, LENGTH)


def other_tokens(tokens, config):
    """Another content token for every token."""
    content = config.vocab_size - FIRST_CONTENT_ID
    return FIRST_CONTENT_ID + (tokens - FIRST_CONTENT_ID + 7) % content


MEASUREMENTS = [
    pytest.param((influence_by_gradient, "qwen3", "sdpa"), id="gradient-sdpa"),
    pytest.param((influence_by_gradient, "qwen3", "eager"), id="gradient-eager"),
    pytest.param((influence_by_perturbation, "qwen3", "sdpa"), id="perturbation-sdpa"),
    pytest.param((influence_by_perturbation, "qwen3", "eager"), id="perturbation-eager"),
    pytest.param((influence_by_perturbation, "qwen3", "flex_attention"), id="perturbation-flex"),
    pytest.param((influence_by_gradient, "llama", "sdpa"), id="gradient-llama"),
    pytest.param((influence_by_gradient, "gpt2", "sdpa"), id="gradient-gpt2"),
    pytest.param((influence_by_gradient, "gemma2", "eager"), id="gradient-gemma2"),
    pytest.param((influence_by_perturbation, "gemma3", "sdpa"), id="perturbation-gemma3"),
]


@pytest.fixture(params=MEASUREMENTS)
def influence(request):
    measure, backbone, attn_implementation = request.param
    return measure(backbone, attn_implementation)


def test_a_logit_is_moved_by_finished_blocks_and_its_own_noisy_block_and_nothing_else(influence):
    answer = [*PLAN, *EXECUTION]
    by_x0 = [[block_of(column) < block_of(query) for query in answer] for column in range(LENGTH)]
    by_xt = [[block_of(column) == block_of(query) for query in answer] for column in range(LENGTH)]
    assert torch.equal(influence[:, :, answer], torch.tensor([by_x0, by_xt]))


def test_no_execution_token_moves_a_plan_logit(influence):
    assert not influence[:, EXECUTION][:, :, PLAN].any()
    assert influence[0, EXECUTION][:, EXECUTION].any() and influence[1, EXECUTION][:, EXECUTION].any()


def test_every_plan_token_moves_every_execution_logit(influence):
    assert influence[0, PLAN][:, EXECUTION].all()


def test_no_noisy_plan_token_moves_an_execution_logit(influence):
    assert not influence[1, PLAN][:, EXECUTION].any()
    assert influence[1, PLAN][:, PLAN].any(dim=1).all()  # although each moves a plan logit


def test_no_token_moves_the_logits_at_its_own_noisy_copy_through_x0(influence):
    assert not influence[0].diagonal()[QUESTION_LEN:].any()
    assert influence[1].diagonal()[QUESTION_LEN:].all()


def test_the_question_moves_every_logit_and_its_noisy_copy_none(influence):
    answer = [*PLAN, *EXECUTION]
    assert influence[0, :QUESTION_LEN][:, answer].all()
    assert not influence[1, :QUESTION_LEN][:, answer].any()


@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block", range(1 + PLAN_BLOCKS + EXECUTION_BLOCKS))
def test_a_new_block_moves_later_blocks_through_x0_and_itself_through_xt(block, attn_implementation):
    model = model_of("qwen3", attn_implementation)
    x0, xt, segment_ids = example()
    blocks = torch.tensor([block_of(column) for column in range(LENGTH)])
    other_x0, other_xt = (torch.where(blocks == block, other_tokens(ids, model.config), ids) for ids in (x0, xt))

    def logits(x0, xt):
        with torch.no_grad():
            return model(input_ids=x0, noisy_input_ids=xt, segment_ids=segment_ids).logits[0, QUESTION_LEN:]

    def moved(logits):
        return (logits - before).abs().amax(dim=-1) > STILL

    before, answer = logits(x0, xt), blocks[QUESTION_LEN:]
    assert torch.equal(moved(logits(other_x0, xt)), answer > block)
    assert torch.equal(moved(logits(x0, other_xt)), answer == block)


# --------------------------------------------------------------------------------------------------------------------
# Padding
# --------------------------------------------------------------------------------------------------------------------

RAGGED = [(5, 1, 2), (2, 3, 1), (0, 2, 3), (7, 1, 1)]


def answer_logits(model, batch, xt):
    """Logits at plan and execution of each row."""
    with torch.no_grad():
        logits = model(**batch, noisy_input_ids=xt).logits
    return [row[segments > 0] for row, segments in zip(logits, batch["segment_ids"], strict=True)]


def row_alone(batch, xt, row):
    """A row of the batch without its padding."""
    real = batch["segment_ids"][row] >= 0
    return {name: ids[row, real][None] for name, ids in batch.items()}, xt[row, real][None]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("backbone", "attn_implementation"), BACKBONES_AND_IMPLEMENTATIONS)
def test_a_row_has_the_same_logits_in_a_batch_and_alone(backbone, attn_implementation):
    model = model_of(backbone, attn_implementation)
    batch = make_batch(RAGGED, model.config)
    xt = noise(**rename(batch), config=model.config)
    for row, logits in enumerate(answer_logits(model, batch, xt)):
        (alone,) = answer_logits(model, *row_alone(batch, xt, row))
        assert_close(logits, alone)


def test_tokens_of_padding_change_nothing_and_tokens_of_the_question_do():
    model = model_of("qwen3", "sdpa")
    batch = make_batch(RAGGED, model.config)
    xt = noise(**rename(batch), config=model.config)
    before = torch.cat(answer_logits(model, batch, xt))
    for segment, changes in ((-1, False), (0, True)):
        inside = batch["segment_ids"] == segment
        other = batch | {"input_ids": torch.where(inside, torch.full_like(xt, 21), batch["input_ids"])}
        after = torch.cat(answer_logits(model, other, torch.where(inside, torch.full_like(xt, 22), xt)))
        assert torch.equal(after, before) != changes


@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
def test_padding_may_stand_anywhere(attn_implementation):
    """Left of a question, and inside or between the segments: block edges and positions count tokens, not columns."""
    model = model_of("qwen3", attn_implementation)
    x0, xt, segment_ids = example()
    (expected,) = answer_logits(model, {"input_ids": x0, "segment_ids": segment_ids}, xt)
    # Columns of the wider row in which the tokens stand, in order.
    columns = torch.randperm(LENGTH + 9, generator=torch.Generator().manual_seed(0))[:LENGTH].sort().values
    assert columns[0] > 0

    def spread(ids, filler):
        return torch.full((1, LENGTH + 9), filler).index_copy(1, columns, ids)

    wide = {"input_ids": spread(x0, 21), "segment_ids": spread(segment_ids, -1)}
    (logits,) = answer_logits(model, wide, spread(xt, 22))
    assert_close(logits, expected)


def test_left_padding_shifts_no_position():
    """Absolute positions would show it: the same question further right, by attention mask and by segments."""
    model = model_of("gpt2", "sdpa")
    x0, xt, segment_ids = example("gpt2")
    (expected,) = answer_logits(model, {"input_ids": x0, "segment_ids": segment_ids}, xt)
    pad = functools.partial(torch.nn.functional.pad, pad=(5, 0))
    inputs = {"input_ids": pad(x0), "noisy_input_ids": pad(xt)}
    with torch.no_grad():
        by_mask = model(**inputs, attention_mask=pad(torch.ones_like(x0))).logits[0, 5 + QUESTION_LEN :]
        unpadded = model(**inputs, attention_mask=torch.ones_like(pad(x0))).logits[0, 5 + QUESTION_LEN :]
    assert_close(by_mask, expected)
    assert (unpadded - expected).abs().max() > MOVED


def test_pad_and_end_may_share_an_id():
    model = model_of("qwen3", "sdpa")
    shared = make_model(pad_token_id=model.config.end_token_id)
    shared.load_state_dict(model.state_dict())
    end = shared.config.pad_token_id
    batch = make_batch(RAGGED, shared.config)
    segment_ids = batch["segment_ids"]
    last = (segment_ids > 0) & (torch.nn.functional.pad(segment_ids[:, 1:], (0, 1), value=-1) != segment_ids)
    batch["input_ids"] = batch["input_ids"].masked_fill(last, end)
    xt = noise(**rename(batch), config=shared.config)
    for row, logits in enumerate(answer_logits(shared, batch, xt)):
        (alone,) = answer_logits(model, *row_alone(batch, xt, row))
        assert_close(logits, alone)
    # An `<|end|>` among real tokens is seen: it is not taken for padding by its id.
    other = batch | {"input_ids": torch.where(last & (segment_ids == 1), 30, batch["input_ids"])}
    assert (
        torch.cat(answer_logits(shared, other, xt)) - torch.cat(answer_logits(shared, batch, xt))
    ).abs().max() > MOVED


def test_segments_are_read_from_openers_and_attention_mask():
    model = model_of("qwen3", "sdpa")
    batch = make_batch(RAGGED, model.config)
    xt = noise(**rename(batch), config=model.config)
    attention_mask = (batch["segment_ids"] >= 0).long()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], noisy_input_ids=xt, attention_mask=attention_mask).logits
    assert torch.equal(logits[batch["segment_ids"] > 0], torch.cat(answer_logits(model, batch, xt)))


# --------------------------------------------------------------------------------------------------------------------
# Training sees what generation sees, and every implementation sees the same
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("backbone", ["qwen3", "gemma3"])
def test_training_logits_are_generation_logits(backbone, attn_implementation):
    """Block by block as `generate` does it: the block before is encoded in the same pass, then kept in the cache."""
    model = model_of(backbone, attn_implementation)
    batch = make_batch([(5, 2, 3), (2, 2, 3), (3, 2, 3)], model.config)
    x0, segment_ids = batch["input_ids"], batch["segment_ids"]
    xt = noise(**rename(batch), config=model.config)
    layout = {"block_ids": ranks(segment_ids), "position_ids": (segment_ids >= 0).cumsum(dim=1).sub(1).clamp(min=0)}
    with torch.no_grad():
        training = model(input_ids=x0, noisy_input_ids=xt, **layout).logits
    cache = BlockCache(num_layers=2, num_rows=3, scratch=9, capacity=x0.shape[1], device=x0.device)
    question_width = 5
    pending = slice(0, question_width)
    for start in range(question_width, x0.shape[1], BLOCK_SIZE):
        canvas = slice(start, start + BLOCK_SIZE)
        generation = denoising_logits(model, cache, x0, xt, layout, pending, canvas)
        assert_close(generation, training[:, canvas])
        cache.commit(
            layout["block_ids"][:, pending],
            layout["position_ids"][:, pending],
            pending.stop - pending.start + BLOCK_SIZE,
        )
        # Later steps of the same block, of which one is of other tokens: no pass leaves a trace in the cache.
        nothing = slice(0, 0)
        other = denoising_logits(model, cache, x0, other_tokens(xt, model.config), layout, nothing, canvas)
        assert (other - training[:, canvas]).abs().max() > MOVED
        again = denoising_logits(model, cache, x0, xt, layout, nothing, canvas)
        assert_close(again, training[:, canvas])
        pending = canvas


def ranks(segment_ids):
    """Block ids of rows whose segments start in the same column."""
    first = int((segment_ids > 0).long().argmax(dim=1)[0])
    columns = torch.arange(segment_ids.shape[1])
    block_ids = torch.where(columns < first, 0, 1 + (columns - first) // BLOCK_SIZE)
    return block_ids.expand(segment_ids.shape).masked_fill(segment_ids < 0, -1)


def denoising_logits(model, cache, x0, xt, layout, pending, canvas):
    """The call of a denoising step; `pending` and `canvas` are slices of columns."""
    with torch.no_grad():
        blocks, positions = layout["block_ids"], layout["position_ids"]
        clean = TokenLayout(blocks[:, pending], torch.full_like(blocks[:, pending], CLEAN), positions[:, pending])
        noisy = TokenLayout(blocks[:, canvas], torch.full_like(blocks[:, canvas], NOISY), positions[:, canvas])
        states = model.encode(torch.cat([x0[:, pending], xt[:, canvas]], dim=1), clean + noisy, cache)
        return model.project(states[:, clean.length :])


def logits_by_a_loop_over_blocks(backbone, x0, xt):
    """The hierarchy by order of computation, without a mask: each block attends to all that was computed before it.

    `backbone` has eager attention. A block is run twice: noisy over a copy of the library's own cache, then clean, to
    extend that cache.
    """
    edges = [0, *range(QUESTION_LEN, LENGTH + 1, BLOCK_SIZE)]
    cache, logits = DynamicCache(config=backbone.config), []
    for start, stop in itertools.pairwise(edges):
        everything = torch.zeros(1, 1, stop - start, stop)  # added to the scores
        if "sliding_attention" in (getattr(backbone.config, "layer_types", None) or []):
            everything = dict.fromkeys(backbone.config.layer_types, everything)
        options = {"attention_mask": everything, "position_ids": torch.arange(start, stop)[None], "use_cache": True}
        noisy = backbone(xt[:, start:stop], past_key_values=copy.deepcopy(cache), **options)
        logits.append(noisy.logits)
        cache = backbone(x0[:, start:stop], past_key_values=cache, **options).past_key_values
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(("backbone", "attn_implementation"), BACKBONES_AND_IMPLEMENTATIONS)
def test_every_implementation_equals_a_loop_over_blocks(backbone, attn_implementation):
    model = model_of(backbone, attn_implementation)
    x0, xt, segment_ids = example(backbone)
    plain = model_of(backbone, "eager")
    with torch.no_grad():
        logits = model(input_ids=x0, noisy_input_ids=xt, segment_ids=segment_ids).logits
        expected = logits_by_a_loop_over_blocks(plain.backbone, x0, xt)
    assert_close(logits[:, QUESTION_LEN:], expected[:, QUESTION_LEN:])


@pytest.mark.slow
def test_compiled_flex_attention_equals_a_loop_over_blocks(compiler):
    model = model_of("qwen3", "flex_attention")
    x0, xt, segment_ids = example()
    with torch.no_grad(), torch.compiler.set_stance("default"):
        logits = model(input_ids=x0, noisy_input_ids=xt, segment_ids=segment_ids).logits
    with torch.no_grad():
        expected = logits_by_a_loop_over_blocks(model_of("qwen3", "eager").backbone, x0, xt)
    assert_close(logits[:, QUESTION_LEN:], expected[:, QUESTION_LEN:])
