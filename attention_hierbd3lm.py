"""How attention on a CPU passes over the empty part of the mask: tile by tile, each over the keys that it sees.

A tile is a range of neighbouring tokens of one stream. Queries of one tile attend to tiles of keys of three kinds:
none of their pairs may attend (skipped), all may (no mask), or some may (a small mask). The parts are put together by
their log-sum-exp as in FlashAttention (Dao 2023, section 3.1.3), of which torch's CPU kernel is an implementation.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from .masking_hierbd3lm import CLEAN, PADDING, TokenLayout, dense_mask

TILE = 64  # tokens, at most
LEAST_LENGTH = 4 * TILE  # below, tiles are mostly partial
UNMASKED = 4  # tiles of keys without a mask come in multiples of this: the same for many tiles of queries


def worth_tiling(layout: TokenLayout) -> bool:
    """Whether attention of these tokens among themselves is faster by tiles."""
    return layout.block_ids.device.type == "cpu" and layout.length > LEAST_LENGTH and not torch.compiler.is_compiling()


def tiled_mask(queries: TokenLayout, keys: TokenLayout, window: int | None) -> "TiledMask":
    """A [`TiledMask`] of tokens among themselves: `queries` and `keys` are one layout."""
    return TiledMask(queries, window)


@dataclass(frozen=True)
class Part:
    """Queries of some ranges attend to keys of some ranges; `mask` is added to the scores, or None.

    Args:
        rows, columns: the ranges; queries and keys are taken range after range.
        mask (`torch.Tensor` of shape `(batch, 1, queries, keys)`, *optional*): None where all pairs attend.
    """

    rows: list[slice]
    columns: list[slice]
    mask: torch.Tensor | None


def gather(states: torch.Tensor, ranges: list[slice]) -> torch.Tensor:
    """What `states` of shape `(batch, heads, length, ...)` hold in the ranges, side by side; a view of one range."""
    pieces = [states[:, :, one] for one in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def divide(states: torch.Tensor, ranges: list[slice]) -> tuple[torch.Tensor, ...]:
    """What [`gather`] has put side by side, by range."""
    return states.split([one.stop - one.start for one in ranges], dim=2)


class TiledMask(torch.Tensor):
    """A bool mask of shape `(batch, 1, length, length)` of tokens among themselves, for attention tile by tile.

    `scaled_dot_product_attention` computes only what the mask allows; anything else sees the dense mask.
    """

    @staticmethod
    def __new__(cls: type["TiledMask"], layout: TokenLayout, window: int | None) -> "TiledMask":
        shape = layout.block_ids.shape[0], 1, layout.length, layout.length
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=layout.block_ids.device)

    def __init__(self, layout: TokenLayout, window: int | None):
        self.tokens, self.window = layout, window
        self._parts: dict[torch.dtype, list[Part]] = {}

    def parts(self, dtype: torch.dtype) -> list[Part]:
        """All parts, with masks of the scores' dtype; made once for all layers."""
        if dtype not in self._parts:
            self._parts[dtype] = plan_parts(self.tokens, self.window, dtype)
        return self._parts[dtype]

    @functools.cached_property
    def dense(self) -> torch.Tensor:
        return dense_mask(self.tokens, self.tokens, self.window)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not kwargs.get("dropout_p"):
            query, key, value = args
            if torch.is_autocast_enabled("cpu"):  # which knows torch's attention, not ours
                query, key, value = (states.to(torch.get_autocast_dtype("cpu")) for states in args)
            if query.shape[-1] == value.shape[-1]:  # what the kernel takes
                parts = kwargs["attn_mask"].parts(query.dtype)
                return TiledAttention.apply(query, key, value, parts, kwargs.get("scale"))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        args, kwargs = tree_map_only(TiledMask, lambda mask: mask.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


class TiledAttention(torch.autograd.Function):
    """Softmax attention over parts; forward and backward allocate nothing of the size queries x keys."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: list[Part],
        scale: float | None,
    ) -> torch.Tensor:
        lse_dtype = torch.promote_types(query.dtype, torch.float32)  # what the kernel sums in
        output, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=lse_dtype)
        of_tiles: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # by the tile's first query
        for part in parts:
            part_output, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                gather(query, part.rows),
                gather(key, part.columns),
                gather(value, part.columns),
                attn_mask=part.mask,
                scale=scale,
            )
            pieces = divide(part_output, part.rows), divide(part_lse, part.rows)
            for rows, *states in zip(part.rows, *pieces, strict=True):
                of_tiles.setdefault(rows.start, []).append(tuple(states))
        for start, states in of_tiles.items():
            rows = slice(start, start + states[0][1].shape[2])
            output[:, :, rows], lse[:, :, rows] = merge_parts(states)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.parts, ctx.scale = parts, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for part in ctx.parts:
            # The kernel forms the probabilities from the scores and the log-sum-exp of *all* parts: they add up.
            part_grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gather(grad_output, part.rows),
                gather(query, part.rows),
                gather(key, part.columns),
                gather(value, part.columns),
                gather(output, part.rows),
                gather(lse, part.rows),
                0.0,
                False,
                attn_mask=part.mask,
                scale=ctx.scale,
            )
            places = part.rows, part.columns, part.columns
            for grad, part_grad, ranges in zip(grads, part_grads, places, strict=True):
                for place, piece in zip(ranges, divide(part_grad, ranges), strict=True):
                    grad[:, :, place] += piece
        return *grads, None, None


def merge_parts(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp over all keys, from those over each part of them."""
    if len(parts) == 1:
        return parts[0]
    lse = torch.logsumexp(torch.stack([part_lse for _, part_lse in parts]), dim=0)
    output = sum(part * (part_lse - lse).exp()[..., None].to(part.dtype) for part, part_lse in parts)
    return output, lse


def plan_parts(layout: TokenLayout, window: int | None, dtype: torch.dtype) -> list[Part]:
    """What every tile of queries attends to: a part for all keys that need a mask, and parts for those that do not.

    Tiles that see the same keys without a mask, as those of several streams do, share a part.
    """
    may, must = tile_pairs(layout, window)
    may, must = may.any(dim=0).tolist(), must.all(dim=0).tolist()
    edges, unmasked, parts = tile_edges(layout), {}, []
    for q, rows in enumerate(itertools.starmap(slice, itertools.pairwise(edges))):
        masked = []
        # Padding alone attends to nothing: its output is never read, and has to be finite.
        for start, stop in _runs(may[q], must[q]) or [(q, q + 1)]:
            if all(must[q][start:stop]) or not any(may[q]):
                columns = slice(edges[start], edges[stop])
                unmasked.setdefault((start, stop), Part([], [columns], None)).rows.append(rows)
            else:
                masked.append(slice(edges[start], edges[stop]))
        if masked:
            masks = [_additive_mask(layout, rows, columns, window, dtype) for columns in masked]
            parts.append(Part([rows], masked, torch.cat(masks, dim=3)))
    return [*unmasked.values(), *parts]


def tile_edges(layout: TokenLayout) -> list[int]:
    """The first column of every tile, and the length: a stream begins with a tile of its own."""
    streams = layout.stream_ids
    starts = 1 + (streams[:, 1:] != streams[:, :-1]).any(dim=0).nonzero()[:, 0]
    streams = itertools.pairwise([0, *starts.tolist(), layout.length])
    return [edge for start, stop in streams for edge in range(start, stop, TILE)] + [layout.length]


def tile_pairs(layout: TokenLayout, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the mask's predicate says of pairs of tiles, from the least and greatest ids of their tokens.

    Returns:
        `may`, `must`: two `torch.BoolTensor` of shape `(batch, tiles, tiles)`: whether some pair of a query and a key
        may attend (never False if one does), and whether all pairs do (never True if one does not).
    """
    layout = _tiles(layout)
    real = layout.block_ids != PADDING
    clean = real & (layout.stream_ids == CLEAN)
    block = _extremes(layout.block_ids, real)
    stream = _extremes(layout.stream_ids, real)
    clean_block = _extremes(layout.block_ids, clean)
    (q_low, q_high), (k_low, k_high) = ([x[:, :, None] for x in block], [x[:, None, :] for x in block])

    finished = clean_block[0][:, None, :] < q_high
    same_block = _overlap(block) & _overlap(stream)
    all_finished = clean.all(dim=2)[:, None, :] & (k_high < q_low)
    one_block = (k_low == k_high) & (q_low == q_high) & (k_low == q_low)
    one_stream = (stream[0] == stream[1])[:, :, None] & (stream[0] == stream[1])[:, None, :] & _overlap(stream)
    may, must = finished | same_block, all_finished | (one_block & one_stream)
    must &= real.all(dim=2)[:, :, None] & real.all(dim=2)[:, None, :]
    if layout.example_ids is not None:
        example = _extremes(layout.example_ids, real)
        alone = example[0] == example[1]
        may, must = may & _overlap(example), must & _overlap(example) & alone[:, :, None] & alone[:, None, :]
    if window is not None:
        must = torch.zeros_like(must)
    return may, must


def _tiles(layout: TokenLayout) -> TokenLayout:
    """The layout cut into tiles, `(batch, tiles, TILE)`; a shorter tile repeats its last token."""
    edges = torch.tensor(tile_edges(layout), device=layout.block_ids.device)
    columns = torch.arange(TILE, device=edges.device) + edges[:-1, None]
    return layout.take(torch.minimum(columns, edges[1:, None] - 1))


def _extremes(ids: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest id of each tile among the tokens `which`: an empty interval where there are none."""
    bounds = torch.iinfo(ids.dtype)
    return ids.masked_fill(~which, bounds.max).amin(dim=2), ids.masked_fill(~which, bounds.min).amax(dim=2)


def _overlap(interval: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    low, high = interval
    return (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])


def _runs(may: list[bool], must: list[bool]) -> list[tuple[int, int]]:
    """Ranges of neighbouring tiles that are not skipped: `UNMASKED` or a multiple without a mask, or any with one."""
    runs, can_grow = [], False  # whether the last range takes what follows it
    for (is_seen, is_full), group in itertools.groupby(range(len(may)), lambda k: (may[k], may[k] and must[k])):
        tiles = [*group]
        start, stop = tiles[0], tiles[-1] + 1
        if is_full and len(tiles) >= UNMASKED:
            rest = stop - len(tiles) % UNMASKED
            runs.append((start, rest))
            start, can_grow = rest, False
        if is_seen and start < stop:
            runs.append((runs.pop()[0] if can_grow else start, stop))
        can_grow = is_seen and start < stop
    return runs


def _additive_mask(
    layout: TokenLayout, rows: slice, columns: slice, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    mask = dense_mask(layout.columns(rows.start, rows.stop), layout.columns(columns.start, columns.stop), window)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min / 2)
