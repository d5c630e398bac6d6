"""The mask: one predicate on blocks and streams, and its renderings for every attention implementation.

A token is described by its block (question 0, then plan blocks, then execution blocks, padding -1) and its stream
(clean x0, or a noisy xt). [`attends`] is the one predicate; the training mask, the masks of generation, the masks of
packed batches and the teaching mask of fixed lengths are all renderings of it.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig

from .settings_hierbd3lm import ATTENTIONS

QUESTION, PLAN, EXECUTION = 0, 1, 2  # segment ids
SEGMENT_NAMES = {PLAN: "plan", EXECUTION: "execution"}  # of the segments that are denoised
SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}  # of a backbone: those that take any mask
PADDING = -1  # segment id and block id of padding
CLEAN, NOISY = 0, 1  # stream ids; further noisy streams are 2, 3, ...

AttentionMask = torch.Tensor | BlockMask | dict[str, torch.Tensor | BlockMask]


@dataclass(frozen=True)
class TokenLayout:
    """What the mask needs to know of each token.

    Args:
        block_ids (`torch.LongTensor` of shape `(batch, length)`): rank of the token's block; -1 on padding.
        stream_ids (`torch.LongTensor` of shape `(batch, length)`): 0 for clean x0, 1, 2, ... for noisy streams.
        position_ids (`torch.LongTensor` of shape `(batch, length)`): shared by a token's x0 and xt.
        example_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): example of a token in a packed row.
    """

    block_ids: torch.Tensor
    stream_ids: torch.Tensor
    position_ids: torch.Tensor
    example_ids: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return self.block_ids.shape[1]

    def __add__(self, other: "TokenLayout") -> "TokenLayout":
        """The two layouts side by side, along the length."""
        if (self.example_ids is None) != (other.example_ids is None):
            raise ValueError("`example_ids` must be given for both layouts or for neither")
        return TokenLayout(
            *(
                None if mine is None else torch.cat([mine, its], dim=1)
                for mine, its in zip(self._tensors(), other._tensors(), strict=True)
            )
        )

    def columns(self, start: int, stop: int | None = None) -> "TokenLayout":
        """The layout of a range of columns."""
        return TokenLayout(*(None if ids is None else ids[:, start:stop] for ids in self._tensors()))

    def take(self, columns: torch.LongTensor) -> "TokenLayout":
        """The layout of chosen columns, of any shape in place of the length."""
        return TokenLayout(*(None if ids is None else ids[:, columns] for ids in self._tensors()))

    def in_stream(self, stream: int) -> "TokenLayout":
        """The same tokens, all in one stream."""
        return replace(self, stream_ids=torch.full_like(self.stream_ids, stream))

    def _tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.block_ids, self.stream_ids, self.position_ids, self.example_ids


@dataclass(frozen=True)
class PackedRows:
    """Places of some tokens of a batch in rows without gaps; a row holds the tokens of one or several examples.

    Args:
        chosen (`torch.BoolTensor` of shape `(batch, length)`): tokens that have a place.
        places (`torch.LongTensor` of shape `(batch, length)`): their places in the flattened rows; 0 for the others.
        shape: number and length of the rows.
        row_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): row of each example; one example per row if None.
    """

    chosen: torch.BoolTensor
    places: torch.LongTensor
    shape: tuple[int, int]
    row_ids: torch.LongTensor | None = None

    @classmethod
    def of(cls, chosen: torch.BoolTensor, row_ids: torch.LongTensor | None = None) -> "PackedRows":
        """Pack the chosen tokens. Examples of one row stand in the order of the batch."""
        examples = torch.arange(len(chosen), device=chosen.device)
        rows = examples if row_ids is None else row_ids
        counts = chosen.sum(dim=1)
        is_before = (rows[:, None] == rows) & (examples[:, None] > examples)  # in the same row
        starts = (is_before * counts).sum(dim=1)
        num_rows, width = torch.stack([rows.max() + 1, (starts + counts).max()]).tolist()
        places = (rows * width + starts)[:, None] + chosen.cumsum(dim=1) - 1
        return cls(chosen, places.masked_fill(~chosen, 0), (num_rows, width), row_ids)

    def pack(self, values: torch.Tensor, fill: int) -> torch.Tensor:
        """Move values of shape `(batch, length)` to their rows, with `fill` on padding."""
        packed = values.new_full((self.shape[0] * self.shape[1],), fill)
        packed[self.places[self.chosen]] = values[self.chosen]
        return packed.view(self.shape)

    def pack_layout(self, layout: TokenLayout) -> TokenLayout:
        """The layout of the rows. The examples of a row are told apart if there may be several."""
        example_ids = layout.example_ids
        if self.row_ids is not None:
            examples = torch.arange(len(self.chosen), device=self.chosen.device)
            example_ids = examples[:, None].expand_as(layout.block_ids)
        return TokenLayout(
            self.pack(layout.block_ids, PADDING),
            self.pack(layout.stream_ids, CLEAN),
            self.pack(layout.position_ids, 0),
            None if example_ids is None else self.pack(example_ids, PADDING),
        )


def attends(
    q_block: torch.Tensor,
    q_stream: torch.Tensor,
    k_block: torch.Tensor,
    k_stream: torch.Tensor,
    precedes: torch.BoolTensor | None = None,
    example: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mask: finished blocks that come before a block are its context, and it sees itself in its own stream.

    For a total order over blocks this is the training mask of BD3-LM (Arriola et al. 2025, section 3.1 and appendix
    B.6): block-diagonal, offset block-causal and block-causal parts.

    Args:
        q_block, q_stream, k_block, k_stream: block and stream ids of queries and keys; they broadcast.
        precedes (`torch.BoolTensor` of shape `(blocks, blocks)` or `(examples, blocks, blocks)`, *optional*): a
            partial order, true where the block of the row sees that of the column; blocks of lower id come before if
            omitted.
        example: example of the query, for a `precedes` of several examples; it broadcasts with the ids.

    Returns:
        `torch.BoolTensor`, true where the query may attend to the key.
    """
    before = k_block < q_block
    if precedes is not None:
        blocks = q_block.clamp(min=0), k_block.clamp(min=0)
        before = before & ((q_block <= 0) | precedes[blocks if precedes.ndim == 2 else (example, *blocks)])
    finished = before & (k_stream == CLEAN)
    same_block = (k_block == q_block) & (k_stream == q_stream)
    return (q_block != PADDING) & (k_block != PADDING) & (finished | same_block)


def dense_mask(
    queries: TokenLayout, keys: TokenLayout, window: int | None = None, precedes: torch.BoolTensor | None = None
) -> torch.Tensor:
    """The mask as a bool tensor of shape `(batch, 1, queries, keys)`, true where attention is allowed."""

    def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(queries, name)[:, :, None], getattr(keys, name)[:, None, :]

    (q_block, k_block), (q_stream, k_stream) = pair("block_ids"), pair("stream_ids")
    if queries.example_ids is None:
        rows = torch.arange(len(q_block), device=q_block.device)[:, None, None]
        mask = attends(q_block, q_stream, k_block, k_stream, precedes, rows)
    else:
        q_example, k_example = pair("example_ids")
        mask = attends(q_block, q_stream, k_block, k_stream, precedes, q_example.clamp(min=0))
        mask &= q_example == k_example
    if window is not None:
        q_position, k_position = pair("position_ids")
        mask &= (q_position - k_position).abs() < window
    return mask[:, None]


def block_mask(
    queries: TokenLayout, keys: TokenLayout, window: int | None = None, precedes: torch.BoolTensor | None = None
) -> BlockMask:
    """The mask as a `BlockMask` of FlexAttention, equal to [`dense_mask`]."""

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        query, key = (queries.block_ids[b, q], queries.stream_ids[b, q]), (keys.block_ids[b, k], keys.stream_ids[b, k])
        example = b if queries.example_ids is None else queries.example_ids[b, q].clamp(min=0)
        mask = attends(*query, *key, precedes, example)
        if queries.example_ids is not None:
            mask = mask & (queries.example_ids[b, q] == keys.example_ids[b, k])
        if window is not None:
            mask = mask & ((queries.position_ids[b, q] - keys.position_ids[b, k]).abs() < window)
        return mask

    batch, device = queries.block_ids.shape[0], queries.block_ids.device
    return create_block_mask(mask_mod, B=batch, H=None, Q_LEN=queries.length, KV_LEN=keys.length, device=device)


def needed_tokens(layout: TokenLayout) -> torch.BoolTensor:
    """Return the tokens that a training pass needs: all noisy ones, and the clean ones that some token attends to.

    None attends to the clean copy of a row's last block. The result has the shape of `layout.block_ids`.
    """
    block_ids = layout.block_ids
    is_read = block_ids < block_ids.amax(dim=1, keepdim=True)
    return (block_ids != PADDING) & (is_read | (layout.stream_ids != CLEAN))


def render_mask(
    backbone_config: PreTrainedConfig,
    queries: TokenLayout,
    keys: TokenLayout,
    dtype: torch.dtype,
    precedes: torch.BoolTensor | None = None,
) -> AttentionMask:
    """The mask in the form that the backbone's attention implementation reads.

    `sdpa` takes a bool tensor, `eager` adds its mask to the scores, `flex_attention` takes a `BlockMask`; a backbone
    with sliding windows takes a dict by layer type, as a ready mask would switch its windows off. A window of w
    tokens reaches w - 1 positions to either side, which inside a block is also to the right.

    Args:
        dtype: of the scores, which `eager` adds its mask to.
        precedes: a partial order over blocks; see [`attends`].

    Raises:
        ValueError: for an attention implementation, or a layer type of the backbone, that cannot take the mask.
    """
    implementation = backbone_config._attn_implementation
    if implementation not in ATTENTIONS:
        raise ValueError(f"`attn_implementation` must be sdpa, eager or flex_attention, but got {implementation!r}")
    layer_types = set(getattr(backbone_config, "layer_types", None) or ())
    if unmasked := layer_types - SUPPORTED_LAYER_TYPES:
        raise ValueError(
            f"`layer_types` of the backbone must be full_attention or sliding_attention, but got {sorted(unmasked)}"
        )

    def render(window: int | None) -> torch.Tensor | BlockMask:
        if implementation == "flex_attention":
            return block_mask(queries, keys, window, precedes)
        mask = dense_mask(queries, keys, window, precedes)
        if implementation == "sdpa":
            return mask
        # A row of padding must not become NaN: finite in float32, where eager attention takes its softmax, and halved
        # so that it stays finite when a score is added (in float16, -65504 - 16 is -inf).
        lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min) / 2
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)

    window = getattr(backbone_config, "sliding_window", None)
    if "sliding_attention" in layer_types:
        return {kind: render(window if kind == "sliding_attention" else None) for kind in sorted(layer_types)}
    return render(None if layer_types else window)


def create_hierarchical_mask(
    question_len: int, plan_len: int, execution_len: int, block_size: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """The fixed-length training mask in the published order of streams, for comparison and for teaching.

    Rows and columns are `[question | plan xt | plan x0 | execution xt | execution x0]`, without padding.

    Returns:
        `torch.BoolTensor` of shape `(total, total)` with `total = question_len + 2 * (plan_len + execution_len)`, True
        where the row's token may attend to the column's.

    Raises:
        ValueError: if a length is negative or `block_size` does not divide `plan_len` and `execution_len`.
    """
    for name, value in (("question_len", question_len), ("plan_len", plan_len), ("execution_len", execution_len)):
        if value < 0:
            raise ValueError(f"`{name}` must be at least 0, but got {value}")
    if block_size < 1 or plan_len % block_size or execution_len % block_size:
        raise ValueError(
            f"`block_size` must be positive and divide plan_len={plan_len} and execution_len={execution_len}, "
            f"but got {block_size}"
        )
    layout = fixed_length_layout(question_len, plan_len, execution_len, block_size, device)
    return dense_mask(layout, layout)[0, 0]


def fixed_length_layout(
    question_len: int, plan_len: int, execution_len: int, block_size: int, device: torch.device | str | None = None
) -> TokenLayout:
    """Layout of one unpadded example in the order `[question | plan xt | plan x0 | execution xt | execution x0]`."""
    lengths = torch.tensor([question_len, plan_len, execution_len], device=device)
    position_ids = torch.arange(question_len + plan_len + execution_len, device=device)[None]
    # `block_size` divides the plan's length: plan and execution are on one grid
    block_ids = torch.where(position_ids < question_len, 0, 1 + (position_ids - question_len) // block_size)
    streams = torch.tensor([CLEAN, NOISY, CLEAN, NOISY, CLEAN], device=device)
    stream_ids = torch.repeat_interleave(streams, lengths[[0, 1, 1, 2, 2]])[None]
    columns = position_ids[0]
    question, plan, execution = columns.split([question_len, plan_len, execution_len])
    order = torch.cat([question, plan, plan, execution, execution])
    return TokenLayout(block_ids[:, order], stream_ids, position_ids[:, order])
