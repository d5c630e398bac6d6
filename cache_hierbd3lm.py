"""The block cache: keys and values of finished blocks, which a denoising pass sees and leaves as they are."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .masking_hierbd3lm import CLEAN, PADDING, TokenLayout

LEAST_GROWTH = 32  # columns for finished blocks
GROUPED = "hierbd3lm_grouped_sdpa"  # attention implementation
MOST_GROUPED = 64  # query tokens: of a long prompt, the mask of a group would cost more than repeated keys


class BlockCacheLayer(DynamicLayer):
    """One layer of a [`BlockCache`]: `[scratch | finished blocks]` along the length."""

    def __init__(self, cache: "BlockCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shape = key_states.shape[1], key_states.shape[3], value_states.shape[3]
        self.allocate(*shape, key_states.dtype, key_states.device)

    def allocate(
        self, num_heads: int, key_size: int, value_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype, self.device = dtype, device
        shape = self.cache.num_rows, num_heads, self.cache.scratch + self.cache.room
        # Zeros, as masked attention still multiplies what a column holds, and memory may hold NaN.
        self.keys, self.values = (
            torch.zeros(*shape, size, dtype=dtype, device=device) for size in (key_size, value_size)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts this pass's keys and values into the scratch space; returns views of them and all finished blocks."""
        length = key_states.shape[2]
        if not self.cache.used:
            self.cache.make_room(length)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, rows = self.cache.start_of_pass(length), slice(0, self.cache.num_rows)
        self.keys[rows, :, start : start + length] = key_states
        self.values[rows, :, start : start + length] = value_states
        view = slice(start, start + length + self.cache.used)
        return self.keys[rows, :, view], self.values[rows, :, view]

    def grow(self) -> None:
        """Move to memory of the cache's present number of rows and columns."""
        old, kept = (self.keys, self.values), self.cache.scratch + self.cache.used
        self.allocate(old[0].shape[1], old[0].shape[3], old[1].shape[3], self.dtype, self.device)
        for new, states in zip((self.keys, self.values), old, strict=True):
            new[:, :, :kept] = states[: self.cache.num_rows, :, :kept]

    def get_seq_length(self) -> int:
        return self.cache.used


class BlockCache(Cache):
    """Keys and values of finished blocks. A pass sees them and leaves no trace; `commit` keeps its clean tokens.

    Rows fill at their own pace, each from the left; columns that a row has not filled are padding to it. Memory grows
    by a quarter of what is used. For compiled passes it is allocated once.

    Args:
        num_layers: layers of the backbone.
        num_rows: rows of the batch.
        scratch: most tokens that a pass may have, except where no block is finished: such a pass, as that of the
            prompt, writes where its clean tokens will stay.
        capacity: most tokens that a row may keep, and that a pass before any finished block may have.
        is_compiled: whether passes are compiled. Layers are best allocated before the first one, so that it is no case
            of its own.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        scratch: int,
        capacity: int,
        device: torch.device,
        is_compiled: bool = False,
    ):
        super().__init__(layers=[BlockCacheLayer(self) for _ in range(num_layers)])
        self.is_compiled = is_compiled
        self.num_rows, self.scratch, self.capacity = num_rows, scratch, capacity
        self.room = capacity if is_compiled else 0  # columns for finished blocks that are allocated
        self.used = 0  # columns that a pass sees: some row has filled them
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._block_ids = torch.full((num_rows, capacity), PADDING, device=device)
        self._position_ids = torch.zeros_like(self._block_ids)

    @property
    def layout(self) -> TokenLayout:
        """Layout of the cached tokens, `(batch, used)`."""
        block_ids = self._block_ids[: self.num_rows, : self.used]
        positions = self._position_ids[: self.num_rows, : self.used]
        return TokenLayout(block_ids, torch.full_like(block_ids, CLEAN), positions)

    def start_of_pass(self, length: int) -> int:
        """Return the column in which a pass of `length` tokens starts."""
        return self.scratch - length if self.used else self.scratch

    def commit(self, block_ids: torch.Tensor, position_ids: torch.Tensor, pass_length: int) -> None:
        """Keeps the first tokens of the pass that has just run.

        Args:
            block_ids, position_ids (`torch.LongTensor` of shape `(batch, length)`): of those tokens.
            pass_length: tokens of the pass.
        """
        start, real = self.start_of_pass(pass_length), block_ids != PADDING
        if self.num_rows == 1 and real.all():
            self._commit_row(block_ids, position_ids, start)
            return
        lengths = self.lengths + real.sum(dim=1)
        used = int(lengths.max())
        self.make_room(used)
        row, source = real.nonzero(as_tuple=True)
        target = (self.lengths[:, None] + real.long().cumsum(dim=1) - 1)[row, source]
        self._block_ids[row, target] = block_ids[row, source]
        self._position_ids[row, target] = position_ids[row, source]
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                states[row, :, self.scratch + target] = states[row, :, start + source]
        self.lengths, self.used = lengths, used

    def _commit_row(self, block_ids: torch.Tensor, position_ids: torch.Tensor, start: int) -> None:
        """The same for a single row without padding, whose columns move as one slice; `start` is the first."""
        length = block_ids.shape[1]
        self.make_room(self.used + length)
        target = slice(self.used, self.used + length)
        self._block_ids[:1, target], self._position_ids[:1, target] = block_ids, position_ids
        column = self.scratch + self.used
        if start != column:  # else they are where they stay
            for layer in self.layers:
                for states in (layer.keys, layer.values):
                    states[:1, :, column : column + length] = states[:1, :, start : start + length]
        self.lengths += length
        self.used += length

    def make_room(self, needed: int) -> None:
        """Move to more memory if there is no room for so many columns."""
        if needed > self.room:
            self.room = min(self.capacity, needed + max(needed // 4, LEAST_GROWTH))
            for layer in self.layers:
                if layer.is_initialized:
                    layer.grow()

    def repeat_rows(self, copies: int) -> None:
        """Repeat each row so many times; the copies of a row are next to each other."""
        for layer in (layer for layer in self.layers if layer.is_initialized):
            layer.keys, layer.values = (
                states[: self.num_rows].repeat_interleave(copies, dim=0) for states in (layer.keys, layer.values)
            )
        self._block_ids, self._position_ids, self.lengths = (
            ids[: self.num_rows].repeat_interleave(copies, dim=0)
            for ids in (self._block_ids, self._position_ids, self.lengths)
        )
        self.num_rows *= copies

    def keep_rows(self, keep: torch.BoolTensor) -> torch.LongTensor:
        """Drops the other rows: the last rows move into the holes, so that no more than those are copied.

        Returns:
            `torch.LongTensor` of shape `(kept,)`: the old index of every row.
        """
        order = keep.nonzero()[:, 0]
        count = len(order)
        is_hole = ~keep[:count]
        moved = order[order >= count]
        new_order = torch.arange(count, device=keep.device)
        new_order[is_hole] = moved
        holes = is_hole.nonzero()[:, 0]
        for states in [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]:
            states[holes] = states[moved]
        for ids in (self._block_ids, self._position_ids):
            ids[holes] = ids[moved]
        self.lengths, self.num_rows = self.lengths[new_order], count
        self.used = max(self.lengths.tolist(), default=0)
        return new_order


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention by `scaled_dot_product_attention` that reads a cached key once for all query heads of its group.

    transformers repeats the cached keys and values for each query head, except for a single query token. Here the
    query tokens of a group's heads are one after the other in one head.

    Args:
        query (`torch.Tensor` of shape `(rows, heads, length, size)`), key, value
            (`(rows, key_heads, num_keys, size)`), attention_mask (`(rows, 1, length, num_keys)`, *optional*): as of
            transformers' attention functions.
    """
    rows, heads, length, _ = query.shape
    key_heads = key.shape[1]
    is_short = torch.compiler.is_compiling() or length <= MOST_GROUPED
    is_plain = not kwargs.get("dropout") and all(kwargs.get(name) is None for name in ("softcap", "position_bias"))
    if key_heads == heads or attention_mask is None or not (is_short and is_plain):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    groups = heads // key_heads
    states = nn.functional.scaled_dot_product_attention(
        query.reshape(rows, key_heads, groups * length, -1),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1),
        scale=scaling,
    )
    return states.reshape(rows, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)


@contextlib.contextmanager
def grouping(config: PreTrainedConfig) -> Iterator[None]:
    """Let a backbone with `sdpa` attention run with [`grouped_attention`] within the context."""
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
