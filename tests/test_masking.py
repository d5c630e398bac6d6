"""The mask says what the documentation says, in every form that an attention implementation reads."""

import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config, Qwen3NextConfig

from hierbd3lm.masking_hierbd3lm import (
    CLEAN,
    NOISY,
    PADDING,
    TokenLayout,
    block_mask,
    create_hierarchical_mask,
    dense_mask,
    fixed_length_layout,
    render_mask,
)

from .tiny import layout_from_segments

PLAN_BLOCK_SIZE, EXECUTION_BLOCK_SIZE = 3, 2


# --------------------------------------------------------------------------------------------------------------------
# The reference: one token at a time, in words of the documentation
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """A token as a reader of the documentation would describe it; `None` stands for padding."""

    example: int
    segment: str
    block: int  # counted from 0 inside its segment
    stream: int
    position: int


def sees(query: Token | None, key: Token | None, window: int | None) -> bool:
    """Segment by segment, without the rank of a block in the whole sequence that the implementation works with."""
    if query is None or key is None or query.example != key.example:
        return False
    if window is not None and abs(query.position - key.position) >= window:
        return False
    if query.segment == key.segment:
        if query.block == key.block:
            return query.stream == key.stream
        return key.block < query.block and key.stream == CLEAN
    earlier = {"question": (), "plan": ("question",), "execution": ("question", "plan")}
    return key.segment in earlier[query.segment] and key.stream == CLEAN


def reference_mask(queries, keys, window=None) -> torch.Tensor:
    """`queries`, `keys`: rows of tokens; returns a bool tensor (batch, 1, queries, keys)."""
    rows = [
        [[[sees(query, key, window) for key in key_row] for query in query_row]]
        for query_row, key_row in zip(queries, keys, strict=True)
    ]
    return torch.tensor(rows)


def random_example(rng: random.Random, example: int) -> tuple[list[int], list[Token | None]]:
    """Segment ids of an example with padding strewn anywhere, and its clean tokens."""
    lengths = {"question": rng.randint(0, 4), "plan": rng.randint(0, 7), "execution": rng.randint(0, 5)}
    block_sizes = {"question": 1000, "plan": PLAN_BLOCK_SIZE, "execution": EXECUTION_BLOCK_SIZE}
    segment_ids, tokens, position = [], [], 0
    for segment_id, (segment, length) in enumerate(lengths.items()):
        for i in range(length):
            for _ in range(rng.choice([0, 0, 0, 2])):
                segment_ids.append(PADDING)
                tokens.append(None)
            segment_ids.append(segment_id)
            tokens.append(Token(example, segment, i // block_sizes[segment], CLEAN, position))
            position += 1
    return segment_ids, tokens


def noised(tokens, stream):
    return [token and Token(token.example, token.segment, token.block, stream, token.position) for token in tokens]


def padded(rows, filler):
    longest = max(map(len, rows))
    return [row + [filler] * (longest - len(row)) for row in rows]


def clean_layout(segment_rows: list[list[int]], example: int | None = None) -> TokenLayout:
    segment_ids = torch.tensor(segment_rows)
    block_ids, position_ids = layout_from_segments(segment_ids, PLAN_BLOCK_SIZE, EXECUTION_BLOCK_SIZE)
    example_ids = None if example is None else torch.full_like(segment_ids, example)
    return TokenLayout(block_ids, torch.full_like(segment_ids, CLEAN), position_ids, example_ids)


def in_stream(layout: TokenLayout, stream: int) -> TokenLayout:
    streams = torch.full_like(layout.stream_ids, stream)
    return TokenLayout(layout.block_ids, streams, layout.position_ids, layout.example_ids)


def random_batch(seed: int, num_noisy_streams: int) -> tuple[TokenLayout, list[list[Token | None]]]:
    """Three rows `[x0 | xt | xt' ...]` as a layout, and the same rows as tokens."""
    rng = random.Random(seed)
    segments, tokens = zip(*(random_example(rng, example=0) for _ in range(3)), strict=True)
    layout = clean = clean_layout(padded(segments, PADDING))
    rows = clean_rows = padded(tokens, None)
    for stream in range(NOISY, NOISY + num_noisy_streams):
        layout = layout + in_stream(clean, stream)
        rows = [row + noised(clean_row, stream) for row, clean_row in zip(rows, clean_rows, strict=True)]
    return layout, rows


def random_packed_row(seed: int) -> tuple[TokenLayout, list[list[Token | None]]]:
    """One row of three examples, each `[x0 | xt]`, as a layout and as tokens."""
    rng = random.Random(seed)
    layouts, row = [], []
    for example in range(3):
        segment_ids, tokens = random_example(rng, example)
        segment_ids, tokens = [*segment_ids, PADDING], [*tokens, None]  # an example may have no token of its own
        clean = clean_layout([segment_ids], example)
        layouts += [clean, in_stream(clean, NOISY)]
        row += tokens + noised(tokens, NOISY)
    return sum(layouts[1:], start=layouts[0]), [row]


# --------------------------------------------------------------------------------------------------------------------
# The predicate
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("num_noisy_streams", [0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_dense_mask_is_the_documented_rule_for_every_pair_of_tokens(seed, num_noisy_streams, window):
    layout, rows = random_batch(seed, num_noisy_streams)
    assert torch.equal(dense_mask(layout, layout, window), reference_mask(rows, rows, window))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("seed", range(4))
def test_packed_examples_do_not_see_each_other(seed, window):
    layout, rows = random_packed_row(seed)
    assert torch.equal(dense_mask(layout, layout, window), reference_mask(rows, rows, window))


@pytest.mark.parametrize("seed", range(3))
def test_queries_may_be_some_columns_of_the_keys(seed):
    layout, rows = random_batch(seed, num_noisy_streams=1)
    start, stop = layout.length // 3, layout.length - 2
    mask = dense_mask(layout.columns(start, stop), layout)
    assert torch.equal(mask, reference_mask([row[start:stop] for row in rows], rows))


def test_layouts_with_and_without_examples_do_not_join():
    with pytest.raises(ValueError, match="`example_ids` must be given for both layouts or for neither"):
        clean_layout([[0, 1]]) + clean_layout([[0, 1]], example=0)


# --------------------------------------------------------------------------------------------------------------------
# Fixed lengths
# --------------------------------------------------------------------------------------------------------------------


def bd3lm_training_mask(length: int, block_size: int) -> torch.Tensor:
    """Over `[xt | x0]` (Arriola et al. 2025, section 3.1 and appendix B.6): built of its four published quarters."""
    ones = torch.ones(block_size, block_size)
    num_blocks = length // block_size
    block_diagonal = torch.kron(torch.eye(num_blocks), ones)
    offset_block_causal = torch.kron(torch.tril(torch.ones(num_blocks, num_blocks), diagonal=-1), ones)
    block_causal = torch.kron(torch.tril(torch.ones(num_blocks, num_blocks)), ones)
    noisy_rows = torch.cat([block_diagonal, offset_block_causal], dim=1)
    clean_rows = torch.cat([torch.zeros(length, length), block_causal], dim=1)
    return torch.cat([noisy_rows, clean_rows]).bool()


@pytest.mark.parametrize(("length", "block_size"), [(12, 1), (12, 3), (12, 4), (12, 12), (128, 16)])
@pytest.mark.parametrize("segment", ["plan", "execution"])
def test_one_segment_and_no_question_is_the_mask_of_bd3lm(segment, length, block_size):
    lengths = {"plan_len": 0, "execution_len": 0} | {f"{segment}_len": length}
    mask = create_hierarchical_mask(question_len=0, block_size=block_size, **lengths)
    assert torch.equal(mask, bd3lm_training_mask(length, block_size))


def test_plan_and_execution_cut_at_a_block_edge_are_the_mask_of_bd3lm():
    """The hierarchy adds nothing to the flat order but where it may be cut, once the streams are sorted alike."""
    plan_len, execution_len, block_size = 8, 12, 4
    plan_xt, plan_x0, execution_xt, execution_x0 = torch.arange(40).split([8, 8, 12, 12])
    order = torch.cat([plan_xt, execution_xt, plan_x0, execution_x0])
    mask = create_hierarchical_mask(0, plan_len, execution_len, block_size)[order][:, order]
    assert torch.equal(mask, bd3lm_training_mask(plan_len + execution_len, block_size))


def published_streams(question_len, plan_len, execution_len) -> dict[str, slice]:
    lengths = {
        "question": question_len,
        "plan xt": plan_len,
        "plan x0": plan_len,
        "execution xt": execution_len,
        "execution x0": execution_len,
    }
    stops = itertools.accumulate(lengths.values())
    return {name: slice(stop - lengths[name], stop) for name, stop in zip(lengths, stops, strict=True)}


def test_default_lengths_make_1792_tokens_and_no_plan_token_sees_the_execution():
    mask = create_hierarchical_mask(question_len=256, plan_len=256, execution_len=512, block_size=16)
    assert mask.shape == (1792, 1792) and mask.dtype == torch.bool
    assert not mask[256:768, 768:].any()
    assert mask.any(dim=1).all()  # every token sees something


def test_execution_sees_all_of_the_clean_plan_and_nothing_of_the_noisy_plan():
    mask = create_hierarchical_mask(question_len=6, plan_len=8, execution_len=12, block_size=4)
    at = published_streams(6, 8, 12)
    for stream in ("execution xt", "execution x0"):
        assert mask[at[stream], at["plan x0"]].all()
        assert mask[at[stream], at["question"]].all()
        assert not mask[at[stream], at["plan xt"]].any()


def test_clean_tokens_never_see_noise():
    mask = create_hierarchical_mask(question_len=6, plan_len=8, execution_len=12, block_size=4)
    at = published_streams(6, 8, 12)
    for clean, noisy in itertools.product(("question", "plan x0", "execution x0"), ("plan xt", "execution xt")):
        assert not mask[at[clean], at[noisy]].any()


def test_question_sees_itself_whole_and_nothing_else():
    mask = create_hierarchical_mask(question_len=6, plan_len=8, execution_len=12, block_size=4)
    assert mask[:6, :6].all() and not mask[:6, 6:].any()


def test_noisy_and_clean_token_share_a_position():
    layout, at = fixed_length_layout(6, 8, 12, 4), published_streams(6, 8, 12)
    positions = {name: layout.position_ids[0, columns].tolist() for name, columns in at.items()}
    assert positions["question"] == list(range(6))
    assert positions["plan xt"] == positions["plan x0"] == list(range(6, 14))
    assert positions["execution xt"] == positions["execution x0"] == list(range(14, 26))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((-1, 4, 4, 2), "`question_len` must be at least 0, but got -1"),
        ((4, -4, 4, 2), "`plan_len` must be at least 0, but got -4"),
        ((4, 4, -4, 2), "`execution_len` must be at least 0, but got -4"),
        ((4, 4, 4, 0), "`block_size` must be positive .*, but got 0"),
        ((4, 6, 4, 4), "`block_size` must .* divide plan_len=6 and execution_len=4, but got 4"),
        ((4, 4, 6, 4), "`block_size` must .* divide plan_len=4 and execution_len=6, but got 4"),
    ],
)
def test_lengths_that_make_no_mask_raise(lengths, message):
    with pytest.raises(ValueError, match=message):
        create_hierarchical_mask(*lengths)


# --------------------------------------------------------------------------------------------------------------------
# Blocks and positions of segments
# --------------------------------------------------------------------------------------------------------------------

PADDINGS = {
    "none": "QQPPPPPPPPEEEEE",
    "left": "..QQPPPPPPPPEEEEE",
    "right": "QQPPPPPPPPEEEEE....",
    "between segments": "QQ.PPPPPPPP...EEEEE",
    "inside segments": ".Q.QPP.PPPPPP.EE.EEE.",
}


def from_letters(row: str) -> torch.Tensor:
    return torch.tensor([[".QPE".index(letter) - 1 for letter in row]])


@pytest.mark.parametrize("row", PADDINGS.values(), ids=PADDINGS.keys())
def test_block_edges_and_positions_do_not_move_with_padding(row):
    block_ids, position_ids = layout_from_segments(from_letters(row), plan_block_size=4, execution_block_size=2)
    is_real = torch.tensor([letter != "." for letter in row])
    assert block_ids[0, is_real].tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 5]
    assert position_ids[0, is_real].tolist() == list(range(15))
    assert (block_ids[0, ~is_real] == PADDING).all() and (position_ids[0, ~is_real] == 0).all()


def test_rows_of_a_batch_are_laid_out_independently():
    rows = ["..QPPPPEE", "QQQPPEEEE", "QQQQQQQQQ", "PPPPPPPPP", "EEEEEEEEE", "........."]
    together = layout_from_segments(torch.cat([from_letters(row) for row in rows]), 2, 3)
    for i, row in enumerate(rows):
        alone = layout_from_segments(from_letters(row), 2, 3)
        assert torch.equal(together[0][i : i + 1], alone[0]) and torch.equal(together[1][i : i + 1], alone[1])


@pytest.mark.parametrize(
    ("row", "blocks"),
    [
        ("QQEEE", [0, 0, 1, 1, 2]),  # no plan: the execution follows the question
        ("PPPEE", [1, 1, 2, 3, 3]),  # no question: its rank stays free
        ("QQPPP", [0, 0, 1, 1, 2]),
    ],
)
def test_missing_segments_leave_the_order_whole(row, blocks):
    block_ids, _ = layout_from_segments(from_letters(row), 2, 2)
    assert block_ids[0].tolist() == blocks


# --------------------------------------------------------------------------------------------------------------------
# Renderings
# --------------------------------------------------------------------------------------------------------------------


def long_layout(packed: bool) -> TokenLayout:
    """Two rows of some 300 tokens, so that a `BlockMask` has several tiles of 128 in each direction."""
    rows = torch.cat([from_letters("." * 5 + "Q" * 20 + "P" * 60 + "E" * 65), from_letters("Q" * 10 + "P" * 140)])
    block_ids, position_ids = layout_from_segments(rows, 6, 5)
    example_ids = (torch.arange(150) // 50).expand(2, 150) if packed else None
    clean = TokenLayout(block_ids, torch.full_like(block_ids, CLEAN), position_ids, example_ids)
    return clean + in_stream(clean, NOISY)


@pytest.mark.parametrize("packed", [False, True], ids=["one example", "packed"])
@pytest.mark.parametrize("window", [None, 17])
def test_block_mask_of_flex_attention_is_the_dense_mask(packed, window):
    keys = long_layout(packed)
    for queries in (keys, keys.columns(150, 290)):
        dense = dense_mask(queries, keys, window)
        blocks = block_mask(queries, keys, window)
        assert blocks.seq_lengths == (queries.length, keys.length)
        assert torch.equal(create_mask(blocks.mask_mod, 2, 1, queries.length, keys.length, device="cpu"), dense)
        assert torch.equal(blocks.to_dense().bool(), tiles_with_any(dense, blocks.BLOCK_SIZE))


def tiles_with_any(mask: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """(batch, 1, query tiles, key tiles): whether a tile holds an allowed pair, tile by tile."""
    rows = []
    for query_tile in mask.split(tile[0], dim=2):
        key_tiles = query_tile.split(tile[1], dim=3)
        rows.append(torch.stack([key_tile.flatten(2).any(dim=2) for key_tile in key_tiles], dim=-1))
    return torch.stack(rows, dim=2)


SMALL = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "head_dim": 4}
FULL, SLIDING = "full_attention", "sliding_attention"


def backbone_config(config_class=LlamaConfig, attn_implementation="sdpa", **fields):
    config = config_class(**(SMALL | {"num_key_value_heads": 1, "num_hidden_layers": 2} | fields))
    config._attn_implementation = attn_implementation
    return config


@pytest.fixture
def layout():
    return random_batch(seed=0, num_noisy_streams=1)[0]


def test_sdpa_gets_a_bool_tensor(layout):
    mask = render_mask(backbone_config(attn_implementation="sdpa"), layout, layout, torch.bfloat16)
    assert mask.dtype == torch.bool and torch.equal(mask, dense_mask(layout, layout))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_eager_gets_a_mask_to_add_that_stays_finite_where_the_softmax_is_taken(layout, dtype):
    mask = render_mask(backbone_config(attn_implementation="eager"), layout, layout, dtype)
    allowed = dense_mask(layout, layout)
    assert mask.dtype == dtype and (mask[allowed] == 0).all()
    scores = (torch.randn(mask.shape) * 30).to(dtype) + mask
    assert scores.float().isfinite().all()
    weights = scores.float().softmax(dim=-1)
    sees_something = allowed.any(dim=-1)
    assert not sees_something.all()  # there are rows of padding, whose weights must be numbers too
    assert weights.isfinite().all()
    assert (weights[sees_something][~allowed[sees_something]] == 0).all()


def test_flex_attention_gets_a_block_mask(layout):
    mask = render_mask(backbone_config(attn_implementation="flex_attention"), layout, layout, torch.float32)
    dense = create_mask(mask.mask_mod, 3, 1, layout.length, layout.length, device="cpu")
    assert torch.equal(dense, dense_mask(layout, layout))


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager", "flex_attention"])
def test_backbone_with_sliding_layers_gets_a_mask_for_each_type_of_layer(layout, attn_implementation):
    config = backbone_config(Gemma2Config, attn_implementation, sliding_window=4, layer_types=[SLIDING, FULL])
    masks = render_mask(config, layout, layout, torch.float32)
    assert set(masks) == {FULL, SLIDING}
    assert torch.equal(as_bool(masks[FULL], layout), dense_mask(layout, layout))
    assert torch.equal(as_bool(masks[SLIDING], layout), dense_mask(layout, layout, window=4))
    assert not torch.equal(as_bool(masks[SLIDING], layout), as_bool(masks[FULL], layout))


def as_bool(mask, layout) -> torch.Tensor:
    if isinstance(mask, torch.Tensor):
        return mask if mask.dtype == torch.bool else mask == 0
    return create_mask(mask.mask_mod, layout.block_ids.shape[0], 1, layout.length, layout.length, device="cpu")


def test_backbone_without_layer_types_has_its_window_in_every_layer(layout):
    mask = render_mask(backbone_config(MistralConfig, sliding_window=4), layout, layout, torch.float32)
    assert torch.equal(mask, dense_mask(layout, layout, window=4))


def test_window_of_a_backbone_whose_layers_are_all_full_is_not_used(layout):
    config = backbone_config(Qwen3Config, sliding_window=4, layer_types=[FULL, FULL])
    config.sliding_window = 4  # Qwen3 itself forgets it when `use_sliding_window` is False
    assert torch.equal(render_mask(config, layout, layout, torch.float32), dense_mask(layout, layout))


def test_attention_that_cannot_take_the_mask_raises(layout):
    config = backbone_config(attn_implementation="flash_attention_2")
    message = "`attn_implementation` must be sdpa, eager or flex_attention, but got 'flash_attention_2'"
    with pytest.raises(ValueError, match=message):
        render_mask(config, layout, layout, torch.float32)


def test_backbone_with_layers_that_read_no_mask_raises(layout):
    config = backbone_config(Qwen3NextConfig, layer_types=["linear_attention", FULL])
    with pytest.raises(
        ValueError, match=r"`layer_types` .* must be full_attention .*, but got \['linear_attention'\]"
    ):
        render_mask(config, layout, layout, torch.float32)
