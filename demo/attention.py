"""The attention mask of one input, as a picture that shows under the pointer which tokens a token sees."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import torch

from ..masking_hierbd3lm import CLEAN, QUESTION, SEGMENT_NAMES, TokenLayout, dense_mask
from ..order_hierbd3lm import BlockOrder
from .recording import Token
from .rendering import TokenTexts, describe_token, visible

NAMES = {QUESTION: "question"} | SEGMENT_NAMES
HINT = '<p class="caption">Drawn when an answer is finished.</p>'
Run = tuple[int, int]  # columns from the first up to, without, the second


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` (exclusive) of the mask, which see the same columns.

    Args:
        seen, own: runs of the columns that they see, and of those among them that are of their own block.
    """

    start: int
    stop: int
    seen: list[Run]
    own: list[Run]


def generation_mask(order: BlockOrder, segment_ids: Sequence[int]) -> tuple[torch.BoolTensor, torch.LongTensor]:
    """Return which tokens each token sees while it is denoised, and the block of each token.

    Args:
        segment_ids: segment of each token of question, plan and execution.

    Returns:
        mask of shape `(length, length)`, and block ids of shape `(length,)`. Under an autoregressive order every token
        is a block.
    """
    length = len(segment_ids)
    if order.is_autoregressive:
        return torch.ones(length, length, dtype=torch.bool).tril(), torch.arange(length)
    block_ids, position_ids = order.layout(torch.tensor([segment_ids], dtype=torch.long).reshape(1, -1))
    # A noisy token sees the clean tokens of the blocks before its own, and its own block: here each block is in one
    # stream, as a denoised block is in place of its clean tokens.
    layout = TokenLayout(block_ids, torch.full_like(block_ids, CLEAN), position_ids)
    return dense_mask(layout, layout, precedes=order.precedes)[0, 0], block_ids[0]


def equal_rows(mask: torch.BoolTensor, block_ids: torch.LongTensor) -> list[Rows]:
    """Return the rows of a mask, those that follow each other and are equal as one."""
    rows, start = [], 0
    for row in range(1, len(mask) + 1):
        if row < len(mask) and block_ids[row] == block_ids[start] and torch.equal(mask[row], mask[start]):
            continue
        own = mask[start] & (block_ids == block_ids[start])
        rows.append(Rows(start, row, runs_of(mask[start]), runs_of(own)))
        start = row
    return rows


def runs_of(row: torch.BoolTensor) -> list[Run]:
    """Return the runs of true values."""
    padded = torch.nn.functional.pad(row.long(), (1, 1))
    change = padded.diff()
    starts, stops = (change == 1).nonzero()[:, 0].tolist(), (change == -1).nonzero()[:, 0].tolist()
    return [*zip(starts, stops, strict=True)]


def picture_html(
    order: BlockOrder, question_ids: Sequence[int], written: dict[int, Sequence[Token]], texts: TokenTexts
) -> str:
    """Return the picture of the mask, and the tokens, which show what each of them sees.

    Args:
        written: tokens of plan and execution, in this order.
    """
    segments = {QUESTION: [Token(token) for token in question_ids]} | written
    segments = {segment: tokens for segment, tokens in segments.items() if tokens}
    segment_ids = [segment for segment, tokens in segments.items() for _ in tokens]
    if not segment_ids:
        return ""
    mask, block_ids = generation_mask(order, segment_ids)
    rows = equal_rows(mask, block_ids)
    data = json.dumps([[row.start, row.stop, row.seen] for row in rows], separators=(",", ":"))
    tokens = [token for its in segments.values() for token in its]
    spans = []
    for index, (token, segment) in enumerate(zip(tokens, segment_ids, strict=True)):
        is_first = index > 0 and segment != segment_ids[index - 1]
        note = NAMES[segment] if token.step is None else f"{NAMES[segment]}, {describe_token(token)}"
        spans.append('<i class="gap"></i>' * is_first + _token_html(index, texts(token.id), note))
    hint = f"{len(tokens)} tokens. Point at a row or a token, or focus the tokens and use the arrow keys."
    return (
        f'<div class="attention" data-rows="{escape(data, quote=True)}">'
        f'<figure><div class="axis">{_axis_html(segments, len(tokens))}</div>{_svg(rows, segments, len(tokens))}'
        '<figcaption><span class="key finished"></span>finished blocks'
        '<span class="key own"></span>its own block</figcaption></figure>'
        f'<div class="side"><p class="caption" role="status" data-hint="{escape(hint, quote=True)}">{hint}</p>'
        f'<div class="strip" tabindex="0" role="group" aria-label="Tokens">{"".join(spans)}</div></div></div>'
    )


def _token_html(index: int, text: str, note: str) -> str:
    data = f'data-i="{index}" data-text="{escape(text, quote=True)}" data-note="{escape(note, quote=True)}"'
    return f'<span class="t" {data}>{visible(text)}</span>'


def _axis_html(segments: dict[int, Sequence[Token]], length: int) -> str:
    shares = [(NAMES[segment], 100 * len(ids) / length) for segment, ids in segments.items() if ids]
    return "".join(
        f'<span style="width:{share:.3f}%">{name if share > 12 else name[0]}</span>' for name, share in shares
    )


def _svg(rows: list[Rows], segments: dict[int, Sequence[Token]], length: int) -> str:
    shapes = []
    for row in rows:
        for kind, runs in (("finished", row.seen), ("own", row.own)):
            for start, stop in runs:
                shapes.append(
                    f'<rect class="{kind}" x="{start}" y="{row.start}" width="{stop - start}" '
                    f'height="{row.stop - row.start}"/>'
                )
    edge = 0
    for ids in [*segments.values()][:-1]:
        edge += len(ids)
        shapes.append(f'<path class="edge" d="M{edge} 0V{length}M0 {edge}H{length}"/>')
    return (
        f'<svg class="mask" viewBox="0 0 {length} {length}" role="img" preserveAspectRatio="none" '
        f'aria-label="Attention mask: rows attend to columns">{"".join(shapes)}'
        f'<rect class="marker" x="0" y="-1" width="{length}" height="1"/></svg>'
    )
