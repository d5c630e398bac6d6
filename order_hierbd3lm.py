"""The order over blocks: which block a token belongs to, what a block may depend on and when it is denoised.

A [`BlockOrder`] is made once from a configuration. Collator, mask, objective and denoiser read it. [`CanvasSchedule`]
follows it through one call of `generate`.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch

from .masking_hierbd3lm import EXECUTION, PADDING, PLAN, QUESTION

TOKEN_IDS = tuple(f"{role}_token_id" for role in ("mask", "plan", "execution", "end", "pad"))


@dataclass(frozen=True)
class Part:
    """A run of blocks of one size. It starts with an opener and ends with an `<|end|>` or at its greatest length.

    Args:
        segments: ids of the segments that it holds, in order. In a part of plan and execution `<|execution|>` is
            predicted like any token, and only an `<|end|>` after it ends the part.
        block_size: tokens that are denoised together.
        max_len: greatest number of tokens.
        opener_token_id: first token of the part, which is given; None if the part has no opener.
        after: numbers of the parts that it depends on. It sees their blocks and those that they depend on.
    """

    segments: tuple[int, ...]
    block_size: int
    max_len: int
    opener_token_id: int | None
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class BlockOrder:
    """The order over the blocks that follow the question.

    Blocks have ranks: 0 is the question, 1, 2, ... number the blocks of all parts along the sequence. In a causal
    question every token is a block; their ranks end with -2, as -1 stands for padding.

    Args:
        parts: the parts in the order of the sequence.
        mask_token_id, plan_token_id, execution_token_id, end_token_id, pad_token_id: see `HierBD3LMConfig`.
        is_aligned: the i-th blocks of all parts are one block: they have one rank and see each other.
        is_joint: all blocks share one noise level and are denoised at the same time; a block sees the noisy tokens
            of those that it depends on.
        is_shifted: a token is predicted at the token before it, not in its own place: inside a block at the noisy
            one, for the first token of a block at the clean one. All parts have openers.
        has_causal_question: a token of the question sees those before it only.
        is_autoregressive: the backbone is a causal language model, which predicts all tokens one by one under its own
            mask.
    """

    parts: tuple[Part, ...]
    mask_token_id: int
    plan_token_id: int
    execution_token_id: int
    end_token_id: int
    pad_token_id: int
    is_aligned: bool = False
    is_joint: bool = False
    is_shifted: bool = False
    has_causal_question: bool = False
    is_autoregressive: bool = False

    @classmethod
    def from_config(cls, config: Any) -> "BlockOrder":
        """The order of a `HierBD3LMConfig`."""
        plan = Part((PLAN,), config.plan_block_size, config.plan_len, config.plan_token_id)
        size, length = config.execution_block_size, config.execution_len
        execution = Part((EXECUTION,), size, length, config.execution_token_id)
        if config.is_flat:
            opener = plan.opener_token_id if config.has_plan else execution.opener_token_id
            parts: tuple[Part, ...] = (Part((PLAN, EXECUTION), size, plan.max_len + length, opener),)
        elif not config.has_plan:
            parts = (execution,)
        else:
            after = (0,) if config.hierarchical_mask else ()
            parts = (plan, Part(execution.segments, size, length, execution.opener_token_id, after))
        return cls(
            parts,
            **{name: getattr(config, name) for name in TOKEN_IDS},
            is_aligned=not config.hierarchical_mask,
            is_joint=config.joint,
            is_shifted=config.prediction == "shifted" and config.algorithm != "ar",
            has_causal_question=config.question_attention == "causal" and config.algorithm != "ar",
            is_autoregressive=config.algorithm == "ar",
        )

    @property
    def is_causal(self) -> bool:
        """True if every token depends on exactly the tokens before it: likelihood and loss need no noise."""
        if self.is_autoregressive:
            return True
        is_token_by_token = self.is_chain and all(part.block_size == 1 for part in self.parts)
        return is_token_by_token and self.is_shifted and self.has_causal_question

    @property
    def segments(self) -> tuple[int, ...]:
        """Segments that an answer has."""
        return (PLAN, EXECUTION) if self.parts[0].opener_token_id == self.plan_token_id else (EXECUTION,)

    @cached_property
    def dependencies(self) -> tuple[frozenset[int], ...]:
        """For each part the numbers of all parts before it, direct or not."""
        closed: list[frozenset[int]] = []
        for part in self.parts:
            closed.append(frozenset(part.after).union(*(closed[other] for other in part.after)))
        return tuple(closed)

    @cached_property
    def is_chain(self) -> bool:
        """True if every part is denoised after the one before it is finished, however long that has become."""
        is_total = all(number - 1 in self.dependencies[number] for number in range(1, len(self.parts)))
        return is_total and not self.is_joint and not self.is_aligned

    @cached_property
    def precedes(self) -> torch.BoolTensor | None:
        """Table of shape `(ranks, ranks)`: may the block of the row's rank see that of the column's?

        None where the ranks themselves are the order (a block sees all of lower rank). Otherwise every part has
        `max_len / block_size` blocks.
        """
        pairs = [(p, q) for q in range(len(self.parts)) for p in range(q)]
        if self.is_aligned or all(p in self.dependencies[q] for p, q in pairs):
            return None
        part_of = [p for p, part in enumerate(self.parts) for _ in range(part.max_len // part.block_size)]
        seen = [[p == q or p in self.dependencies[q] for p in part_of] for q in part_of]
        table = torch.ones(len(part_of) + 1, len(part_of) + 1, dtype=torch.bool)
        table[1:, 1:] = torch.tensor(seen)
        return table.tril(diagonal=-1)

    # Training: what is laid out, masked and predicted

    def layout(self, segment_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and position ids of clean sequences. Block edges count from each part's start, never from a column.

        Args:
            segment_ids (`torch.LongTensor` of shape `(batch, length)`):
                0 question, 1 plan, 2 execution, -1 padding (anywhere); the segments of a row stand in this order.

        Returns:
            `block_ids`, `position_ids`: two `torch.LongTensor` of shape `(batch, length)`. Positions start at 0 at
            the first real token and skip padding, where they are 0. A part that does not wait for the one before it
            starts at a fixed distance from the question, as its first block is denoised before that one's length is
            known.
        """
        is_real = segment_ids != PADDING
        position_ids = (is_real.long().cumsum(dim=1) - 1).clamp(min=0)
        block_ids = self.question_ranks(segment_ids == QUESTION)
        ranks, num_before = self.fixed_ranks, torch.zeros_like(position_ids[:, :1])
        next_rank = torch.ones_like(num_before)
        for number, inside in enumerate(self._members(segment_ids)):
            place = inside.long().cumsum(dim=1) - 1
            rank = place // self.parts[number].block_size
            first = next_rank if self.is_chain else ranks[number]
            block_ids = torch.where(inside, first + rank, block_ids)
            if not self.is_chain:
                position_ids = position_ids + inside * (self.fixed_starts[number] - num_before)
            next_rank, num_before = next_rank + rank[:, -1:] + 1, num_before + place[:, -1:] + 1
        return block_ids, position_ids.masked_fill(~is_real, 0)

    def question_ranks(self, is_question: torch.BoolTensor) -> torch.LongTensor:
        """Ranks of the question's tokens, -1 elsewhere; `is_question` and result are of shape `(batch, length)`."""
        ranks = torch.zeros_like(is_question, dtype=torch.long)
        if self.has_causal_question:
            ranks = is_question.cumsum(dim=1) - is_question.sum(dim=1, keepdim=True) - 2
        return ranks.masked_fill(~is_question, PADDING)

    def noise_blocks(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Ids of the blocks that have a noise level of their own, of the shape of `block_ids`."""
        return block_ids.clamp(max=1) if self.is_joint else block_ids

    @property
    def noise_groups(self) -> tuple[tuple[int, ...], ...]:
        """Segments whose tokens share noise levels, together."""
        if self.is_joint or self.is_aligned:
            return (tuple(segment for part in self.parts for segment in part.segments),)
        return tuple(dict.fromkeys(part.segments for part in self.parts))

    def predicted(self, input_ids: torch.LongTensor, segment_ids: torch.LongTensor) -> torch.BoolTensor:
        """Tokens that the model predicts: all of plan and execution but the openers that it is given.

        Args:
            input_ids, segment_ids (`torch.LongTensor` of shape `(batch, length)`): clean tokens and their segments.
        """
        is_opener = torch.zeros_like(input_ids, dtype=torch.bool)
        for opener in {part.opener_token_id for part in self.parts} - {None}:
            is_opener = is_opener | (input_ids == opener)
        return (segment_ids > QUESTION) & ~is_opener

    def multiple(self, segment: int) -> int:
        """A segment is filled with `<|end|>` up to a multiple of so many tokens; 1 where another follows in its part.

        Args:
            segment: `PLAN` or `EXECUTION`.
        """
        return next((part.block_size for part in self.parts if part.segments == (segment,)), 1)

    def fillers(self, lengths: dict[int, int]) -> dict[int, int]:
        """Number of `<|end|>` that each segment is filled with, so that every part is whole blocks.

        Args:
            lengths: tokens of each segment, opener and first `<|end|>` included.
        """
        filled = dict.fromkeys(lengths, 0)
        for part in self.parts:
            filled[part.segments[-1]] = -sum(lengths.get(segment, 0) for segment in part.segments) % part.block_size
        return filled

    # Generation: what is denoised at the same time

    @property
    def predicts_execution_opener(self) -> bool:
        """True if the model itself divides a part into plan and execution."""
        return any(len(part.segments) > 1 for part in self.parts)

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """For each part the slot of the canvas in which its blocks are denoised.

        Parts share a slot where one is finished before the other starts.
        """
        slots: list[int] = []
        for number in range(len(self.parts)):
            before = set() if self.is_joint or self.is_aligned else self.dependencies[number]
            taken = {slots[other] for other in range(number) if other not in before}
            slots.append(min(set(range(len(taken) + 1)) - taken))
        return tuple(slots)

    @property
    def fixed_starts(self) -> list[int]:
        """Distance of each part from the end of the question, where parts have their greatest lengths."""
        return [sum(part.max_len for part in self.parts[:number]) for number in range(len(self.parts))]

    @property
    def fixed_ranks(self) -> list[int]:
        """Rank of each part's first block, where parts have their greatest lengths."""
        num_blocks = [0 if self.is_aligned else part.max_len // part.block_size for part in self.parts]
        return [1 + sum(num_blocks[:number]) for number in range(len(self.parts))]

    def _members(self, segment_ids: torch.Tensor) -> list[torch.BoolTensor]:
        """The tokens of each part, `(batch, length)`; of several parts of a segment each takes its greatest length."""
        members, taken = [], dict.fromkeys((part.segments for part in self.parts), 0)
        for number, part in enumerate(self.parts):
            inside = torch.isin(segment_ids, segment_ids.new_tensor(part.segments))
            place = inside.long().cumsum(dim=1)
            inside = inside & (place > taken[part.segments])
            taken[part.segments] += part.max_len
            if any(other.segments == part.segments for other in self.parts[number + 1 :]):
                inside = inside & (place <= taken[part.segments])
            members.append(inside)
        return members


@dataclass
class Progress:
    """Where each row stands in its order. The first dimension of every tensor is the row.

    Args:
        part: `(rows, slots)`, number of the part at work in each slot.
        number, num_given: `(rows, parts)`, finished blocks of each part, and how many of them were given.
        start, first_rank: `(rows, parts)`, position of the part's first token, and rank of its first block.
        started, ended: `(rows, parts)`, bool; a part that is not to be denoised has ended.
        awaits_end: `(rows, parts)`, bool, true where the next `<|end|>` ends the part.
        closed: `(rows, parts)`, bool, true where an `<|end|>` has ended the part.
    """

    part: torch.Tensor
    number: torch.Tensor
    num_given: torch.Tensor
    start: torch.Tensor
    first_rank: torch.Tensor
    started: torch.Tensor
    ended: torch.Tensor
    awaits_end: torch.Tensor
    closed: torch.Tensor

    def select(self, rows: torch.LongTensor) -> "Progress":
        return Progress(**{item.name: getattr(self, item.name)[rows] for item in fields(self)})


@dataclass(frozen=True)
class GivenTokens:
    """The first `tokens`, `(batch, parts, length)`, of each part, as far as they are given (else the mask token).

    `lengths`, `(batch, parts)`, are their numbers, without an opener that is given alone.
    """

    tokens: torch.LongTensor
    lengths: torch.LongTensor


class CanvasSchedule:
    """What the rows of one `generate` call denoise, canvas by canvas.

    A canvas holds one block of every part that is at work, each in its slot. Its blocks are finished together.

    Args:
        limits: greatest number of tokens of each part.
        written: for each part, whether it is to be denoised; the other parts are given.
        given: see [`GivenTokens`].
        question_lengths (`torch.LongTensor` of shape `(batch,)`).
        ends_with_plan: the first `<|end|>` ends a part of plan and execution.
        max_new_tokens: greatest number of tokens of all parts that are denoised, if any.

    Raises:
        ValueError: if `max_new_tokens` is less than the tokens of a canvas.
    """

    def __init__(
        self,
        order: BlockOrder,
        limits: list[int],
        written: list[bool],
        given: GivenTokens,
        question_lengths: torch.LongTensor,
        ends_with_plan: bool = False,
        max_new_tokens: int | None = None,
    ):
        self.order, self.given, self.device = order, given, question_lengths.device
        self.question_lengths = question_lengths
        self.block_sizes, self.limits, self.written = (
            torch.tensor(values, device=self.device)
            for values in ([part.block_size for part in order.parts], limits, written)
        )
        # slots in which nothing is denoised have no columns
        used = sorted({slot for slot, its in zip(order.slots, written, strict=True) if its or order.is_aligned})
        self.slots = [used.index(slot) if slot in used else None for slot in order.slots]  # of each part
        sizes = [(slot, part.block_size) for slot, part in zip(order.slots, order.parts, strict=True)]
        self.widths = [max(size for its, size in sizes if its == slot) for slot in used]
        self.width = sum(self.widths)
        if max_new_tokens is not None and max_new_tokens < self.width:
            raise ValueError(f"`max_new_tokens` must be at least {self.width}, one block, but got {max_new_tokens}")
        self.max_new_tokens = max_new_tokens
        columns = [(slot, place) for slot, width in enumerate(self.widths) for place in range(width)]
        self.slot_of, self.place_of = torch.tensor(columns, device=self.device).T
        finished = torch.zeros_like(given.lengths) if order.is_aligned else given.lengths // self.block_sizes
        self.context_lengths = finished * self.block_sizes  # of each part: tokens of blocks that are wholly given
        self.opens_finished = min(part.block_size for part in order.parts) == 1 or bool(
            (given.lengths > self.context_lengths).any()
        )
        self.progress = self._begin(finished, question_lengths, ends_with_plan)
        self.context = self._context()

    def _context(self) -> tuple[torch.LongTensor, ...]:
        """The blocks that are wholly given, part after part.

        Returns:
            tokens, block ids, position ids, part ids: `torch.LongTensor` of shape `(batch, length)`; block and part
            ids are -1 on padding.
        """
        tokens, state = self.given.tokens, self.progress
        place = torch.arange(tokens.shape[2], device=self.device)
        inside = place < self.context_lengths[:, :, None]
        block_ids = torch.where(inside, state.first_rank[:, :, None] + place // self.block_sizes[:, None], PADDING)
        position_ids = torch.where(inside, state.start[:, :, None] + place, 0)
        part_ids = torch.arange(len(self.block_sizes), device=self.device)[:, None]
        part_ids = torch.where(inside, part_ids, PADDING)
        tokens = torch.where(inside, tokens, self.order.pad_token_id)
        used = inside.flatten(1).any(dim=0)
        return tuple(ids.flatten(1)[:, used] for ids in (tokens, block_ids, position_ids, part_ids))

    def fresh_canvas(self, rows: torch.LongTensor) -> tuple[torch.LongTensor, ...]:
        """The next canvas of each row: given tokens and openers where it holds any, else masks.

        Args:
            rows (`torch.LongTensor` of shape `(rows,)`): places of the rows in the batch.

        Returns:
            tokens, block ids (-1 on unused columns), position ids: `torch.LongTensor` of shape `(rows, width)`.
        """
        state, part = self.progress, self.part_ids
        inside = self._active()[:, self.slot_of] & (self.place_of < self.block_sizes[part])
        number = state.number.gather(1, part)
        place = number * self.block_sizes[part] + self.place_of
        length = self.given.tokens.shape[2]
        given = self.given.tokens[rows].flatten(1).gather(1, part * length + place.clamp(max=length - 1))
        tokens = torch.where(place < length, given, self.order.mask_token_id)
        return (
            torch.where(inside, tokens, self.order.pad_token_id),
            torch.where(inside, state.first_rank.gather(1, part) + number, PADDING),
            torch.where(inside, state.start.gather(1, part) + place, 0),
        )

    @property
    def part_ids(self) -> torch.LongTensor:
        """Number of the part that each column of the canvas is of, `(rows, width)`."""
        return self.progress.part[:, self.slot_of]

    @property
    def canvas_sizes(self) -> torch.LongTensor:
        """Tokens of each row's canvas, `(rows,)`, those of parts that have ended included."""
        return self.block_sizes[self.progress.part].sum(dim=1)

    def after_end(self, tokens: torch.LongTensor, inside: torch.BoolTensor) -> torch.BoolTensor:
        """Tokens of the canvas from the `<|end|>` on that ends their part: `(rows, width)`."""
        ends = inside & (tokens == self.order.end_token_id)
        if self.order.predicts_execution_opener:
            awaits_end = self.progress.awaits_end.gather(1, self.part_ids)
            ends = ends & ends_part(tokens, inside, awaits_end, self.order.execution_token_id)
        if len(self.widths) == 1:
            return inside & (ends.cumsum(dim=1) > 0)
        after = [slot.cumsum(dim=1) > 0 for slot in ends.split(self.widths, dim=1)]
        return inside & torch.cat(after, dim=1)

    def advance(
        self, done: torch.BoolTensor, tokens: torch.LongTensor, inside: torch.BoolTensor, after_end: torch.BoolTensor
    ) -> torch.BoolTensor:
        """Move the rows whose canvas is finished to their next one.

        Args:
            done (`torch.BoolTensor` of shape `(rows,)`): rows whose canvas is finished.
            tokens, inside, after_end (of shape `(rows, width)`): the canvas; see [`after_end`].

        Returns:
            `torch.BoolTensor` of shape `(rows,)`: rows all of whose parts have ended.
        """
        state, part = self.progress, self.progress.part
        closing = done[:, None] & self._active()
        by_end = closing & torch.stack([slot.any(dim=1) for slot in after_end.split(self.widths, dim=1)], dim=1)
        length = (state.number.gather(1, part) + 1) * self.block_sizes[part]
        ending = by_end | (closing & (length >= self.limits[part]))
        opened = inside & done[:, None] & (tokens == self.order.execution_token_id)
        opened = torch.stack([slot.any(dim=1) for slot in opened.split(self.widths, dim=1)], dim=1)
        state.number = state.number.scatter_add(1, part, closing.long())
        for name, which in (("ended", ending), ("closed", by_end), ("awaits_end", opened)):
            setattr(state, name, getattr(state, name) | torch.zeros_like(state.ended).scatter(1, part, which))
        if self.max_new_tokens is not None:
            num_new = ((state.number - state.num_given) * self.block_sizes * self.written).sum(dim=1)
            state.ended |= (num_new + self.width > self.max_new_tokens)[:, None]
        self._start_parts()
        return state.ended.all(dim=1)

    def closed(self) -> torch.BoolTensor:
        """Rows of which every part that was denoised is closed by an `<|end|>`: `(rows,)`."""
        return (self.progress.closed | ~self.written).all(dim=1)

    def _begin(self, finished: torch.LongTensor, question_lengths: torch.LongTensor, ends_with_plan: bool) -> Progress:
        """The state before the first canvas; `finished` are the blocks of each part that are wholly given."""
        order, tokens = self.order, self.given.tokens
        nothing = torch.zeros(finished.shape, dtype=torch.bool, device=self.device)
        in_context = torch.arange(tokens.shape[2], device=self.device) < self.context_lengths[:, :, None]
        has_opener = (in_context & (tokens == order.execution_token_id)).any(dim=2)
        has_one_segment = torch.tensor([len(part.segments) == 1 for part in order.parts], device=self.device)
        first_parts = [self.slots.index(slot) for slot in range(len(self.widths))]
        self.progress = Progress(
            part=torch.tensor(first_parts, device=self.device).repeat(len(finished), 1),
            number=finished,
            num_given=finished,
            start=question_lengths[:, None] + torch.tensor(order.fixed_starts, device=self.device),
            first_rank=torch.tensor(order.fixed_ranks, device=self.device).repeat(len(finished), 1),
            started=nothing.clone(),
            ended=nothing | (~self.written & (not order.is_aligned)),  # a given part may be a part of every canvas
            awaits_end=has_one_segment | ends_with_plan | has_opener,
            closed=nothing.clone(),
        )
        self._start_parts()
        return self.progress

    def _active(self) -> torch.BoolTensor:
        """Slots in which a part is at work, `(rows, slots)`."""
        state = self.progress
        return (state.started & ~state.ended).gather(1, state.part)

    def _start_parts(self) -> None:
        """Start the parts whose turn it is."""
        state, order = self.progress, self.order
        at_once = order.is_joint or order.is_aligned
        for number, part in enumerate(order.parts):
            ready = ~state.started[:, number]
            if not at_once:
                ready = ready & state.ended[:, list(part.after)].all(dim=1)
            if number and order.is_chain:
                num_blocks, before = state.number[:, number - 1], number - 1
                start = state.start[:, before] + num_blocks * order.parts[before].block_size
                state.start[:, number] = torch.where(ready, start, state.start[:, number])
                rank = state.first_rank[:, before] + num_blocks
                state.first_rank[:, number] = torch.where(ready, rank, state.first_rank[:, number])
            state.started[:, number] |= ready
            if (slot := self.slots[number]) is not None:
                runs = ready & ~state.ended[:, number]
                state.part[:, slot] = torch.where(runs, number, state.part[:, slot])


def ends_part(
    tokens: torch.LongTensor, inside: torch.BoolTensor, awaits_end: torch.BoolTensor, execution_token_id: int
) -> torch.BoolTensor:
    """Columns in which an `<|end|>` ends a run of plan and execution: those after `<|execution|>`.

    Args:
        tokens, inside (of shape `(rows, length)`): next tokens of each run, and which of them there are.
        awaits_end (`torch.BoolTensor` of shape `(rows, length)` or `(rows, 1)`): rows in which any `<|end|>` does.
    """
    return awaits_end | ((inside & (tokens == execution_token_id)).cumsum(dim=1) > 0)
