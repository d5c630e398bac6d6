"""The schedule of one call of `generate`: what is given, and which blocks of each row are denoised next."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from .masking_hierbd3lm import EXECUTION, PADDING, PLAN
from .order_hierbd3lm import BlockOrder, DependsOn
from .settings_hierbd3lm import HierBD3LMGenerationConfig


@dataclass
class Progress:
    """Where each row stands in its order. The first dimension of every tensor is the row.

    Args:
        part: `(rows, slots)`, number of the part at work in each slot.
        active: `(rows, slots)`, bool, true where a part is at work in the slot.
        number, num_given: `(rows, parts)`, finished blocks of each part, and how many of them were given.
        start, first_rank: `(rows, parts)`, position of the part's first token, and rank of its first block.
        started, ended: `(rows, parts)`, bool; a part that is not to be denoised has ended.
        awaits_end: `(rows, parts)`, bool, true where the next `<|end|>` ends the part.
        closed: `(rows, parts)`, bool, true where an `<|end|>` has ended the part.
        sees: `(rows, parts, parts)`, bool, true where the part of the row sees that of the column.
        awaits_plan: `(rows,)`, bool, true where the row's order is not known yet.
    """

    part: torch.Tensor
    active: torch.Tensor
    number: torch.Tensor
    num_given: torch.Tensor
    start: torch.Tensor
    first_rank: torch.Tensor
    started: torch.Tensor
    ended: torch.Tensor
    awaits_end: torch.Tensor
    closed: torch.Tensor
    sees: torch.Tensor
    awaits_plan: torch.Tensor

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

    A canvas holds one block of every part that is at work, each in its slot. Blocks that see each other's noise are
    finished together, all others for themselves.

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
        self.is_one_canvas = order.is_joint or order.is_aligned  # all slots are denoised together
        if not self.is_one_canvas:
            self.widths = [max(self.widths)] * len(used)
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
        inside = state.active[:, self.slot_of] & (self.place_of < self.block_sizes[part])
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
    def relative_places(self) -> torch.FloatTensor:
        """Place of each column among those that are denoised with it, in (0, 1): `(rows, width)`."""
        if self.is_one_canvas:  # columns of parts that have ended included
            columns = torch.arange(self.width, device=self.device)
            return (columns + 0.5) / self.block_sizes[self.progress.part].sum(dim=1)[:, None]
        return (self.place_of + 0.5) / self.block_sizes[self.part_ids]

    def together(self, columns: torch.Tensor) -> torch.Tensor:
        """View `(rows, width)` as `(rows, groups, width of a group)`: the columns that are denoised together."""
        return columns.view(len(columns), 1 if self.is_one_canvas else len(self.widths), -1)

    def finished(self, masked: torch.BoolTensor) -> torch.BoolTensor:
        """Return the slots whose block is finished, `(rows, slots)`; `masked` are those of `(rows, width)`."""
        return ~self.together(masked).any(dim=2) & self.progress.active

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

    def close(
        self, done: torch.BoolTensor, tokens: torch.LongTensor, inside: torch.BoolTensor, after_end: torch.BoolTensor
    ) -> None:
        """Count the blocks that are finished, and end their parts where it is time.

        Args:
            done (`torch.BoolTensor` of shape `(rows, slots)`): slots whose block is finished.
            tokens, inside, after_end (of shape `(rows, width)`): the canvas; see [`after_end`].
        """
        state, part = self.progress, self.progress.part
        by_end = done & torch.stack([slot.any(dim=1) for slot in after_end.split(self.widths, dim=1)], dim=1)
        length = (state.number.gather(1, part) + 1) * self.block_sizes[part]
        ending = by_end | (done & (length >= self.limits[part]))
        opened = inside & done[:, self.slot_of] & (tokens == self.order.execution_token_id)
        opened = torch.stack([slot.any(dim=1) for slot in opened.split(self.widths, dim=1)], dim=1)
        state.number = state.number.scatter_add(1, part, done.long())
        # Sums, as a slot that is not active may name a part that is at work in another.
        for name, which in (("ended", ending), ("closed", by_end), ("awaits_end", opened)):
            found = torch.zeros_like(state.number).scatter_add(1, part, which.long()) > 0
            setattr(state, name, getattr(state, name) | found)
        if self.max_new_tokens is not None:
            num_new = ((state.number - state.num_given) * self.block_sizes * self.written).sum(dim=1)
            state.ended = state.ended | (num_new + self.width > self.max_new_tokens)[:, None]
        state.active = state.active & ~state.ended.gather(1, part)

    def start(self) -> torch.BoolTensor:
        """Start the parts whose turn it is; return the rows all of whose parts have ended, `(rows,)`."""
        if self.order.follows_plan:
            self._start_steps()
        else:
            self._start_parts()
        return self.progress.ended.all(dim=1)

    def unread_plans(self) -> torch.BoolTensor:
        """Rows whose plan is finished, and has not been followed yet: `(rows,)`."""
        return self.progress.awaits_plan & self.progress.ended[:, 0]

    def follow(self, row: int, depends_on: DependsOn) -> None:
        """Let the steps of a row be denoised in the order of its finished plan; see [`BlockOrder.see_steps`]."""
        state, plan, num_parts = self.progress, self.order.parts[0], len(depends_on) + 2
        state.awaits_plan[row] = False
        state.sees[row] = self.order.see_steps(depends_on).to(self.device)
        state.start[row, 1:] += state.number[row, 0] * plan.block_size - plan.max_len
        state.ended[row, num_parts:] = state.closed[row, num_parts:] = True

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
            active=torch.zeros(len(finished), len(first_parts), dtype=torch.bool, device=self.device),
            number=finished,
            num_given=finished,
            start=question_lengths[:, None] + torch.tensor(order.fixed_starts, device=self.device),
            first_rank=torch.tensor(order.fixed_ranks, device=self.device).repeat(len(finished), 1),
            started=nothing.clone(),
            ended=nothing | (~self.written & (not order.is_aligned)),  # a given part may be a part of every canvas
            awaits_end=has_one_segment | ends_with_plan | has_opener,
            closed=nothing.clone(),
            sees=order.sees.to(self.device).repeat(len(finished), 1, 1),
            awaits_plan=torch.full((len(finished),), False, device=self.device),
        )
        if order.follows_plan:
            self.progress.awaits_plan |= self.written[1:].any()
        self.start()
        return self.progress

    def _start_parts(self) -> None:
        state, order = self.progress, self.order
        for number in range(len(order.parts)):
            ready = ~state.started[:, number]
            if not self.is_one_canvas:
                ready = ready & (state.ended | ~state.sees[:, number]).all(dim=1)
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
                state.active[:, slot] |= runs

    def _start_steps(self) -> None:
        """Start the plan, or the steps all of whose ancestors are finished: each in the first slot that is free."""
        state = self.progress
        ready = ~state.started & (state.ended[:, None] | ~state.sees).all(dim=2)
        ready[:, 1:] &= ~state.awaits_plan[:, None]
        state.started |= ready
        runs = ready & ~state.ended
        row, part = runs.nonzero(as_tuple=True)
        free = state.active.long().argsort(dim=1, stable=True)  # slots, those that are free first
        slot = free[row, (runs.cumsum(dim=1) - 1)[row, part]]
        state.part[row, slot] = part
        state.active[row, slot] = True


def ends_part(
    tokens: torch.LongTensor, inside: torch.BoolTensor, awaits_end: torch.BoolTensor, execution_token_id: int
) -> torch.BoolTensor:
    """Columns in which an `<|end|>` ends a run of plan and execution: those after `<|execution|>`.

    Args:
        tokens, inside (of shape `(rows, length)`): next tokens of each run, and which of them there are.
        awaits_end (`torch.BoolTensor` of shape `(rows, length)` or `(rows, 1)`): rows in which any `<|end|>` does.
    """
    return awaits_end | ((inside & (tokens == execution_token_id)).cumsum(dim=1) > 0)


def given_tokens(
    order: BlockOrder,
    batch: int,
    device: torch.device,
    plan: torch.LongTensor | None = None,
    plan_lengths: torch.LongTensor | None = None,
    execution: torch.LongTensor | None = None,
    execution_lengths: torch.LongTensor | None = None,
) -> GivenTokens:
    """Return the openers, and plan and start of the execution where they are given.

    Args:
        plan (`torch.LongTensor` of shape `(batch, length)`, *optional*): with opener, `<|end|>` and filler.
        plan_lengths (`torch.LongTensor` of shape `(batch,)`, *optional*): its tokens; the rest is padding.
        execution, execution_lengths: the same of the execution, without an opener.
    """
    length = 1 + sum(segment.shape[1] for segment in (plan, execution) if segment is not None)
    tokens = torch.full((batch, len(order.parts), length), order.mask_token_id, device=device)
    lengths = torch.zeros(batch, len(order.parts), dtype=torch.long, device=device)
    for number, part in enumerate(order.parts):
        has_several = len(part.segments) > 1
        if part.opener_token_id is not None:
            tokens[:, number, 0] = part.opener_token_id
        if plan is not None and PLAN in part.segments:
            is_plan = torch.arange(plan.shape[1], device=device) < plan_lengths[:, None]
            tokens[:, number, : plan.shape[1]] = torch.where(is_plan, plan, order.mask_token_id)
            lengths[:, number] = plan_lengths
            if has_several:
                tokens[:, number].scatter_(1, plan_lengths[:, None], order.execution_token_id)
        if has_several or (order.is_causal and len(order.parts) == 1):  # the latter is written after its opener
            lengths[:, number] += 1
        if execution is not None and EXECUTION in part.segments:
            place = torch.arange(execution.shape[1], device=device)
            row, column = (place < execution_lengths[:, None]).nonzero(as_tuple=True)
            start = lengths[:, number].clamp(min=1)
            tokens[row, number, start[row] + column] = execution[row, column]
            lengths[:, number] = torch.where(execution_lengths > 0, start + execution_lengths, lengths[:, number])
    return GivenTokens(tokens, lengths)


def lay_out_plan(
    config: Any, order: BlockOrder, plan_ids: torch.LongTensor
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Lay plans of shape `(batch, length)` out as whole segments: opener, content, `<|end|>` and filler, padding.

    Returns:
        tokens of shape `(batch, longest)`, and the length of each plan, `(batch,)`.

    Raises:
        ValueError: for a plan that is not right-padded, is too long, or holds a mask or an execution opener.
    """
    if plan_ids.shape[1] and (plan_ids[:, 0] == config.plan_token_id).all():
        plan_ids = plan_ids[:, 1:]
    content = content_of(config, plan_ids, "plan")
    length, block_size = content.sum(dim=1), order.multiple(PLAN)
    if (length > config.plan_len - 1).any():
        raise ValueError(
            f"`plan_ids` must have at most plan_len - 1 = {config.plan_len - 1} tokens, but got {int(length.amax())}"
        )
    total = (length + 1 + block_size) // block_size * block_size  # ceil((1 + length + 1) / block_size) blocks
    total = total.clamp(max=config.plan_len)  # a plan that generate() cut at its limit has no `<|end|>`
    columns = torch.arange(int(total.amax()), device=plan_ids.device)
    tokens = torch.where(columns < total[:, None], config.end_token_id, config.pad_token_id)
    tokens[:, 0] = config.plan_token_id
    tokens[:, 1 : plan_ids.shape[1] + 1][content[:, : len(columns) - 1]] = plan_ids[content]
    return tokens, total


def repeat_rows(
    copies: int, settings: HierBD3LMGenerationConfig, *tensors: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Repeat the rows of what `generate` is given for several answers to each.

    Raises:
        ValueError: for a number that is not positive, or several answers at temperature 0.
    """
    if not isinstance(copies, int) or isinstance(copies, bool) or copies < 1:
        raise ValueError(f"`num_return_sequences` must be an integer >= 1, but got {copies!r}")
    if copies > 1 and settings.temperature == 0:
        raise ValueError(f"`num_return_sequences` must be 1 at temperature 0, where all are the same; got {copies}")
    return tuple(ids if ids is None or copies == 1 else ids.repeat_interleave(copies, dim=0) for ids in tensors)


def read_execution_start(
    config: Any,
    settings: HierBD3LMGenerationConfig,
    execution_ids: torch.LongTensor | None,
    input_ids: torch.LongTensor,
) -> tuple[torch.LongTensor, torch.LongTensor] | None:
    """Return the tokens with which executions start, `(batch, length)`, and their numbers, `(batch,)`.

    Raises:
        ValueError: for another stage, another batch, or what is not the start of an execution within its limit.
    """
    if execution_ids is None:
        return None
    if config.execution_order == "plan":
        raise ValueError("`execution_ids` must be None for execution_order='plan', whose steps are parts of their own")
    if settings.stage != "execution":
        raise ValueError(f"`execution_ids` must be given for stage='execution' alone, but got {settings.stage!r}")
    if execution_ids.ndim != 2 or len(execution_ids) != len(input_ids):
        raise ValueError(
            f"`execution_ids` must be (batch, length) with batch {len(input_ids)}, got {tuple(execution_ids.shape)}"
        )
    execution_ids = execution_ids.to(input_ids.device)
    lengths = content_of(config, execution_ids, "execution").sum(dim=1)
    most = (settings.max_execution_len or config.execution_len) - 2  # the opener, and a token to denoise
    if (lengths > most).any():
        raise ValueError(f"`execution_ids` must have at most {most} tokens, but got {int(lengths.amax())}")
    return execution_ids, lengths


def content_of(config: Any, ids: torch.LongTensor, segment: str) -> torch.BoolTensor:
    """Return where the given tokens of a segment are content, `(batch, length)`.

    Raises:
        ValueError: if they are not right-padded, or hold a mask or an opener.
    """
    outside = (ids == config.pad_token_id) | (ids == config.end_token_id)
    content = outside.cumsum(dim=1) == 0
    if (~content & ~outside).any():
        raise ValueError(f"`{segment}_ids` must be padded on the right, but a token follows a pad or end token")
    for role in ("mask", "plan", "execution"):
        if (ids == getattr(config, f"{role}_token_id")).any():
            raise ValueError(f"`{segment}_ids` must hold content of the {segment} only, but got the {role} token")
    return content
