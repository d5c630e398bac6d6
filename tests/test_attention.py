"""Attention by tiles is attention under the dense mask: outputs, gradients, and what it skips."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma3TextConfig

from hierbd3lm import attention_hierbd3lm as attention
from hierbd3lm.attention_hierbd3lm import (
    TILE,
    UNMASKED,
    TiledMask,
    plan_parts,
    tile_edges,
    tile_pairs,
    worth_tiling,
)
from hierbd3lm.masking_hierbd3lm import CLEAN, NOISY, PADDING, TokenLayout, dense_mask

from .tiny import layout_from_segments, make_batch, make_model

LENGTHS = [(70, 40, 90), (30, 100, 150), (0, 16, 33)]  # tokens of question, plan, execution of each row


def clean_layout(lengths=LENGTHS, block_size=8):
    """Rows side by side: the question left-padded, the rest right-padded."""
    widest, answer = (max(row[0] for row in lengths), max(row[1] + row[2] for row in lengths))
    rows = [
        [PADDING] * (widest - q) + [0] * q + [1] * p + [2] * e + [PADDING] * (answer - p - e) for q, p, e in lengths
    ]
    block_ids, position_ids = layout_from_segments(torch.tensor(rows), block_size, block_size)
    return TokenLayout(block_ids, torch.full_like(block_ids, CLEAN), position_ids)


def training_layout(copies=1, packed=False):
    clean = clean_layout()
    if packed:  # the second half of each row is another example
        clean = TokenLayout(clean.block_ids, clean.stream_ids, clean.position_ids, (clean.position_ids > 100).long())
    noisy = TokenLayout(
        clean.block_ids.masked_fill(clean.block_ids == 0, PADDING),
        clean.stream_ids,
        clean.position_ids,
        clean.example_ids,
    )
    layout = clean
    for copy in range(copies):
        layout = layout + noisy.in_stream(NOISY + copy)
    return layout


LAYOUTS = {
    "two streams": training_layout(),
    "three noisy copies": training_layout(copies=3),
    "packed": training_layout(packed=True),
    "one stream": clean_layout(),
}


def attend(layout, mask, dtype=torch.float64, window=None):
    """Output where some key is visible, and the gradients of queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    shape = len(layout.block_ids), 2, layout.length, 16
    tensors = [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for _ in range(3)]
    seen = dense_mask(layout, layout, window).any(dim=-1)[..., None]  # (batch, 1, length, 1)
    weights = torch.randn(shape, generator=generator, dtype=dtype) * seen
    output = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    return output.detach() * seen, torch.autograd.grad(output, tensors, weights)


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("name", LAYOUTS)
def test_tiled_attention_is_dense_attention(name, window):
    layout = LAYOUTS[name]
    output, grads = attend(layout, TiledMask(layout, window), window=window)
    expected, expected_grads = attend(layout, dense_mask(layout, layout, window), window=window)
    torch.testing.assert_close(output, expected.nan_to_num(), atol=1e-12, rtol=0)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_other_precisions(dtype, tolerance):
    layout = LAYOUTS["two streams"]
    output, grads = attend(layout, TiledMask(layout, None), dtype)
    expected, expected_grads = attend(layout, dense_mask(layout, layout), dtype)
    for ours, theirs in zip([output, *grads], [expected, *expected_grads], strict=True):
        torch.testing.assert_close(ours, theirs.nan_to_num(), atol=tolerance, rtol=tolerance)


def test_autocast_computes_in_its_own_precision_whatever_it_is_given():
    """Rotated queries and keys are float32 under autocast, values are not."""
    layout = LAYOUTS["two streams"]
    shape = len(layout.block_ids), 2, layout.length, 16
    states = [torch.randn(shape, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (
            F.scaled_dot_product_attention(*states, attn_mask=mask)
            for mask in (TiledMask(layout, None), dense_mask(layout, layout))
        )
    seen = dense_mask(layout, layout).any(dim=-1)[..., None]
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours * seen, theirs.nan_to_num() * seen, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_said_of_pairs_of_tiles_holds_for_their_tokens(name, window):
    layout = LAYOUTS[name]
    may, must = tile_pairs(layout, window)
    mask, edges = dense_mask(layout, layout, window)[:, 0], tile_edges(layout)
    num_tiles = len(edges) - 1
    assert may.shape == (len(mask), num_tiles, num_tiles)
    for b, q, k in itertools.product(range(len(mask)), range(num_tiles), range(num_tiles)):
        pairs = mask[b, edges[q] : edges[q + 1], edges[k] : edges[k + 1]]
        assert may[b, q, k] or not pairs.any()
        assert pairs.all() or not must[b, q, k]


def test_tiles_begin_with_the_streams():
    assert tile_edges(training_text(80)) == [0, 64, 80, 144, 160]
    assert tile_edges(training_text(80).columns(16)) == [0, 64, 128, 144]  # a last block without its clean copy


@pytest.mark.parametrize("length", [1024, 4096])
def test_most_of_a_long_text_is_skipped_or_needs_no_mask(length):
    # Flat text: of the dense (2L)^2 pairs the mask allows little more than L^2, of which only block edges need a mask.
    layout = training_text(length)
    parts = plan_parts(layout, None, torch.float32)

    def pairs(parts):
        def size(ranges):
            return sum(one.stop - one.start for one in ranges)

        return sum(size(part.rows) * size(part.columns) for part in parts)

    allowed = int(dense_mask(layout, layout).sum())
    assert pairs(parts) < 1.3 * allowed
    # Each of 2L queries needs a mask for its own tile in both streams and for fewer than UNMASKED before these.
    assert pairs(part for part in parts if part.mask is not None) < 2 * length * TILE * (UNMASKED + 1)


def training_text(length):
    clean = clean_layout([(0, 0, length)], block_size=16)
    return clean + clean.in_stream(NOISY)


def test_dropout_falls_back_to_the_dense_mask():
    layout = LAYOUTS["two streams"]
    query = torch.randn(len(layout.block_ids), 2, layout.length, 16)

    def attend(mask):
        torch.manual_seed(0)
        return F.scaled_dot_product_attention(query, query, query, attn_mask=mask, dropout_p=0.5)

    seen = dense_mask(layout, layout).any(dim=-1)[..., None]
    torch.testing.assert_close(
        (attend(TiledMask(layout, None)) * seen).nan_to_num(),
        (attend(dense_mask(layout, layout)) * seen).nan_to_num(),
    )


def test_anything_but_attention_sees_the_dense_mask():
    layout = LAYOUTS["two streams"]
    mask, dense = TiledMask(layout, None), dense_mask(layout, layout)
    assert (mask.shape, mask.dtype, mask.device) == (dense.shape, dense.dtype, dense.device)
    assert torch.equal(mask[:, :, :5], dense[:, :, :5])
    assert torch.equal(torch.logical_not(mask), ~dense)


def long_batch(model):
    batch = make_batch([(60, 8, 30), (20, 12, 25), (45, 3, 31)], model.config)
    masked = model.order.predicted(**batch) & (torch.arange(batch["input_ids"].shape[1]) % 3 != 0)
    return batch, masked


def nll_and_gradients(model):
    batch, masked = long_batch(model)
    model.zero_grad()
    nll = model.masked_nll(masked, **batch)
    nll.sum().backward()
    return nll.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("sliding", [False, True])
def test_a_training_pass_by_tiles_is_the_pass_under_the_dense_mask(sliding, monkeypatch):
    lengths = {"question_len": 64, "plan_len": 64, "execution_len": 128}
    if sliding:
        lengths["backbone_config"] = Gemma3TextConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=20,
            layer_types=["sliding_attention", "full_attention"],
            max_position_embeddings=512,
        )
    model = make_model(**lengths).double()
    used = []
    monkeypatch.setattr(attention, "plan_parts", lambda *args: used.append(args) or plan_parts(*args))
    nll, grads = nll_and_gradients(model)
    assert len(used) == 1 + sliding  # one plan for all layers of a kind
    monkeypatch.setattr("hierbd3lm.modeling_hierbd3lm.worth_tiling", lambda layout: False)
    expected, expected_grads = nll_and_gradients(model)
    torch.testing.assert_close(nll, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_short_sequences_are_not_tiled():
    assert not worth_tiling(training_text(TILE))
    assert worth_tiling(training_text(4 * TILE))
