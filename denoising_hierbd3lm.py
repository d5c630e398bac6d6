"""The denoiser: fills canvas after canvas of every row of a `generate` call, and keeps what has been written."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer, TextStreamer
from transformers.utils import ModelOutput

from .cache_hierbd3lm import BlockCache
from .diffusion_hierbd3lm import SCHEDULES, widest_dtype
from .masking_hierbd3lm import CLEAN, EXECUTION, NOISY, PADDING, PLAN, TokenLayout
from .order_hierbd3lm import BlockOrder, DependsOn
from .samplers_hierbd3lm import Sampler, draw_tokens
from .schedule_hierbd3lm import CanvasSchedule
from .settings_hierbd3lm import HierBD3LMGenerationConfig


@dataclass
class HierBD3LMGenerationOutput(ModelOutput):
    """
    Args:
        sequences (`torch.LongTensor` of shape `(batch, length)`):
            Question (left-padded as given), plan and execution with their special tokens, right-padded.
        plan, execution (`torch.LongTensor` of shape `(batch, plan_length)` and `(batch, execution_length)`):
            Content of the segments, without opener and `<|end|>`, right-padded with the pad token.
        finished (`torch.BoolTensor` of shape `(batch,)`):
            Whether every denoised segment was closed by an `<|end|>` within its length.
        num_forward_passes (`torch.LongTensor` of shape `(batch,)`): passes in which the row took part (NFE).
        tokens_per_forward (`torch.FloatTensor` of shape `(batch,)`):
            Denoised tokens up to and with the `<|end|>` of each segment, or of each step, per forward pass.
        reveal_steps (`torch.LongTensor` of shape `(batch, length)`):
            Forward pass of the row, from 1, that denoised each of those tokens, in order; right-padded with 0.
        plan_followed (`torch.BoolTensor` of shape `(batch,)`, *optional*):
            With `execution_order="plan"`: whether the execution has the order of its plan. It is false where the plan
            could not be parsed or has too many steps, so that each step came after all before it.
    """

    sequences: torch.LongTensor | None = None
    plan: torch.LongTensor | None = None
    execution: torch.LongTensor | None = None
    finished: torch.BoolTensor | None = None
    num_forward_passes: torch.LongTensor | None = None
    tokens_per_forward: torch.FloatTensor | None = None
    reveal_steps: torch.LongTensor | None = None
    plan_followed: torch.BoolTensor | None = None


class Answer:
    """What has been written so far for the rows of one `generate` call.

    Args:
        schedule: knows the parts, and what of them is given.
    """

    def __init__(self, schedule: CanvasSchedule):
        self.schedule, self.order = schedule, schedule.order
        batch, device = len(schedule.given.lengths), schedule.device
        self.question_lengths = schedule.question_lengths
        width = sum(part.max_len for part in self.order.parts)
        self.tokens = torch.full((batch, width), self.order.pad_token_id, device=device)  # by position
        self.part_ids = torch.full_like(self.tokens, PADDING)
        self.reveal_steps = torch.zeros_like(self.tokens)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.num_forward_passes = torch.zeros(batch, dtype=torch.long, device=device)
        self.plan_followed = torch.ones_like(self.finished) if self.order.follows_plan else None
        tokens, block_ids, position_ids, part_ids = schedule.context
        self.write(torch.arange(batch, device=device), block_ids != PADDING, tokens, position_ids, part_ids, 0)

    def write(
        self,
        index: torch.LongTensor,
        which: torch.BoolTensor,
        tokens: torch.LongTensor,
        position_ids: torch.LongTensor,
        part_ids: torch.LongTensor,
        reveal_steps: torch.LongTensor | int,
    ) -> None:
        """Write tokens down where `which`, `(rows, length)`; `index` is the place of each row in the batch."""
        row, column = which.nonzero(as_tuple=True)
        target = index[row], position_ids[row, column] - self.question_lengths[index[row]]
        self.tokens[target] = tokens[row, column]
        self.part_ids[target] = part_ids[row, column]
        self.reveal_steps[target] = torch.as_tensor(reveal_steps, device=tokens.device).expand_as(tokens)[row, column]

    def plan(self, index: int) -> list[int]:
        """Return the content of the plan of a row, without opener and `<|end|>`; `index` is its place in the batch."""
        tokens = self.tokens[index, self.part_ids[index] == 0].tolist()[1:]
        return tokens[: tokens.index(self.order.end_token_id)] if self.order.end_token_id in tokens else tokens

    def output(self, question: torch.LongTensor) -> HierBD3LMGenerationOutput:
        """Return everything that was written; `question` has the shape `(batch, question_length)`, as it was given."""
        order = self.order
        written = self.part_ids != PADDING
        tokens = left_justify(self.tokens, written, order.pad_token_id)
        part_ids = left_justify(self.part_ids, written, PADDING)
        reveal_steps = left_justify(self.reveal_steps, written, 0)
        segment_ids = self._segment_ids(tokens, part_ids)
        # a run is a segment, or a step of it: an opener, content, and what an `<|end|>` begins
        edges = torch.stack(
            [ids.diff(dim=1, prepend=torch.full_like(ids[:, :1], -2)) for ids in (part_ids, segment_ids)]
        )
        opens = (edges != 0).any(dim=0)
        is_end = tokens == order.end_token_id
        num_ends = is_end.cumsum(dim=1)
        num_ends -= torch.where(opens, num_ends - is_end.long(), 0).cummax(dim=1).values  # of the run so far
        contents, has_end, is_denoised = {}, {}, torch.zeros_like(is_end)
        for segment in (PLAN, EXECUTION):
            inside = segment_ids == segment
            content, first_end = inside & (num_ends == 0) & ~opens, inside & is_end & (num_ends == 1)
            contents[segment] = left_justify(tokens, content, order.pad_token_id)
            has_end[segment] = first_end.any(dim=1) | ~inside.any(dim=1)
            is_denoised = is_denoised | ((content | first_end) & (reveal_steps > 0))
        finished = self.finished & has_end[PLAN] if order.predicts_execution_opener else self.finished
        return HierBD3LMGenerationOutput(
            sequences=torch.cat([question, tokens], dim=1),
            plan=contents[PLAN],
            execution=contents[EXECUTION],
            finished=finished,
            num_forward_passes=self.num_forward_passes,
            tokens_per_forward=is_denoised.sum(dim=1) / self.num_forward_passes,
            reveal_steps=left_justify(reveal_steps, is_denoised, 0),
            plan_followed=self.plan_followed,
        )

    def _segment_ids(self, tokens: torch.LongTensor, part_ids: torch.LongTensor) -> torch.LongTensor:
        """Segment of each token, `(batch, length)`; a part of plan and execution is divided at `<|execution|>`."""
        first_segments = [part.segments[0] for part in self.order.parts]
        segment_ids = torch.tensor([*first_segments, PADDING], device=tokens.device)[part_ids]  # -1 is the last
        if not self.order.predicts_execution_opener:
            return segment_ids
        is_opener = (part_ids != PADDING) & (tokens == self.order.execution_token_id)
        return torch.where((is_opener.cumsum(dim=1) > 0) & (part_ids != PADDING), EXECUTION, segment_ids)


@dataclass
class ActiveRows:
    """The rows that still denoise. The first dimension of every tensor is the row.

    Args:
        index: `(rows,)`, place of the row in the batch.
        pending, pending_block_ids, pending_position_ids: `(rows, length)`, clean tokens that are not cached yet.
        canvas, canvas_block_ids, canvas_position_ids: `(rows, width)`; block ids are -1 on unused columns.
        states_before: `(rows, slots, hidden_size)`, states of the tokens before the canvas's blocks, if shifted.
        reveal_steps: `(rows, width)`, forward pass of the row that denoised each token of the canvas.
        reveal_times: `(rows, width)`, times in [0, 1] at which a scheduled sampler reveals each token, 1 first.
    """

    index: torch.Tensor
    pending: torch.Tensor
    pending_block_ids: torch.Tensor
    pending_position_ids: torch.Tensor
    canvas: torch.Tensor
    canvas_block_ids: torch.Tensor
    canvas_position_ids: torch.Tensor
    reveal_steps: torch.Tensor
    states_before: torch.Tensor | None
    reveal_times: torch.Tensor | None

    def select(self, order: torch.LongTensor) -> "ActiveRows":
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        return ActiveRows(**{name: None if one is None else one[order] for name, one in tensors.items()})


class BlockDenoiser:
    """Denoises the rows of one `generate` call.

    Args:
        answer: receives what is written, and gives the order.
        question (`torch.LongTensor` of shape `(batch, question_length)`), attention_mask: as in `generate`.
        read_plan: returns for the content ids of a plan what each of its steps depends on, and whether the plan says
            so; of an order that follows the plan only.
        copies: number of rows next to each other that have the same prompt, which is then encoded once for all.
    """

    def __init__(
        self,
        model: Any,
        settings: HierBD3LMGenerationConfig,
        sampler: Sampler,
        answer: Answer,
        question: torch.LongTensor,
        attention_mask: torch.Tensor,
        streamer: BaseStreamer | None,
        read_plan: Callable[[list[int]], tuple[DependsOn, bool]] | None = None,
        copies: int = 1,
    ):
        self.read_plan, self.copies = read_plan, copies
        self.model, self.settings, self.sampler, self.streamer = model, settings, sampler, streamer
        self.answer, self.schedule, self.order = answer, answer.schedule, answer.order
        self.device, self.width = question.device, answer.schedule.width
        self.starts = self.schedule.place_of == 0  # columns of the canvas in which a block starts
        # A shifted order predicts the first token of a block before the block: blocks of one token predict nothing.
        self.reads_canvas = not (self.order.is_shifted and self.width == len(self.schedule.widths))
        self.columns: slice | torch.LongTensor = slice(None)  # those of the canvas that some row uses
        self.never_written = never_written(self.order, settings).to(self.device)
        self.generator = torch.Generator(device=self.device)
        if settings.temperature > 0:
            self.generator.manual_seed(int(torch.randint(2**62, ())) if settings.seed is None else settings.seed)
        self.question, self.is_question = right_justify(question, attention_mask.bool())
        self.is_question = self.is_question.bool()
        prompt, block_ids, position_ids = self._prompt(question, attention_mask)
        blank = question.new_zeros(len(question), self.width)
        index = torch.arange(len(question), device=self.device)
        self.rows = ActiveRows(index, prompt, block_ids, position_ids, blank, blank, blank, blank, None, None)
        self._read_plans()
        self.schedule.start()
        self._open_canvases(torch.ones_like(self.schedule.progress.active))
        # finished blocks that are not cached yet, and the canvas
        pass_width = (3 if self.schedule.opens_finished else 2) * self.width
        self.cache = BlockCache(
            num_layers=model.config.backbone_config.num_hidden_layers,
            num_rows=len(question) // copies,
            scratch=pass_width,
            capacity=prompt.shape[1] + max(pass_width, int(self.schedule.limits.sum())),
            device=self.device,
            is_compiled=settings.compile_steps,
        )
        if settings.compile_steps:
            for layer, shape in zip(self.cache.layers, model.cache_shapes, strict=False):
                layer.allocate(*shape, model.dtype, self.device)

    def run(self, processors: LogitsProcessorList, criteria: StoppingCriteriaList) -> None:
        """Denoise until no row is left.

        Args:
            processors, criteria: see `generate`.
        """
        self.processors = processors
        self._advance()
        if self.copies > 1:
            self._encode_prompts()
        while len(self.rows.index):
            self._step()
            self._advance()
            puts_rows = hasattr(self.streamer, "put_rows")
            if puts_rows and (stopped := self.streamer.put_rows(self.answer, self.rows.index.tolist())):
                self._leave_out(torch.isin(self.rows.index, torch.tensor(stopped, device=self.device)))
            if criteria and len(self.rows.index):
                self._leave_out(criteria(right_justify(*self._text())[0], None))

    def _prompt(
        self, question: torch.LongTensor, attention_mask: torch.Tensor
    ) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
        """The question and all blocks that are given: tokens, block ids and position ids, `(batch, length)`."""
        is_real = attention_mask.bool()
        position_ids = (is_real.long().cumsum(dim=1) - 1).clamp(min=0).masked_fill(~is_real, 0)
        of_question = question, self.order.question_ranks(is_real), position_ids
        return tuple(torch.cat(pair, dim=1) for pair in zip(of_question, self.schedule.context[:3], strict=True))

    def _step(self) -> None:
        """Run one forward pass: encode what is pending, denoise one step of every row's canvas."""
        rows, masked = self.rows, self._masked()
        candidates = masked if rows.reveal_times is None else masked & self._due(masked)
        states = self._states()
        logits = self.model.project(states[candidates[:, self.columns]]).float()
        self._keep_pending(slice(0))
        if self.processors:
            logits = self.processors(self._before(candidates), logits)
        self._reveal(candidates, logits.index_fill(-1, self.never_written, -math.inf))
        if self.streamer is not None and hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(value=rows.canvas[self._inside()].cpu())

    def _text(self) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """Question and finished blocks of each row, a column per position, and where there are any."""
        index, answer = self.rows.index, self.answer
        written = torch.cat([self.is_question[index], answer.part_ids[index] != PADDING], dim=1)
        tokens = torch.cat([self.question[index], answer.tokens[index]], dim=1)
        return tokens.masked_fill(~written, self.order.mask_token_id), written

    def _before(self, candidates: torch.BoolTensor) -> torch.LongTensor:
        """What stands before each candidate, left-padded with the mask token: `(num_candidates, longest)`."""
        tokens, _ = self._text()
        first = self.question.shape[1] - self.answer.question_lengths[self.rows.index]  # column of position 0
        columns = self.rows.canvas_position_ids + first[:, None]
        row, column = self._inside().nonzero(as_tuple=True)
        tokens[row, columns[row, column]] = self.rows.canvas[row, column]
        row, end = candidates.nonzero(as_tuple=True)[0], columns[candidates]
        place = torch.arange(int(end.amax()), device=self.device) - (end.amax() - end)[:, None]
        return tokens[row[:, None], place.clamp(min=0)].masked_fill(place < 0, self.order.mask_token_id)

    def _states(self) -> torch.FloatTensor:
        """Run one forward pass; return the hidden states that predict the canvas, `(rows, columns, hidden_size)`."""
        rows, num_pending = self.rows, self.rows.pending.shape[1]
        tokens, block_ids, position_ids = rows.pending, rows.pending_block_ids, rows.pending_position_ids
        stream_ids = torch.full_like(block_ids, CLEAN)
        if self.reads_canvas:
            # Blocks that are denoised jointly are told apart by their ranks: the later one sees the earlier one.
            stream = CLEAN if self.order.is_joint else NOISY
            canvas, canvas_ids, canvas_positions = (
                ids[:, self.columns] for ids in (rows.canvas, rows.canvas_block_ids, rows.canvas_position_ids)
            )
            tokens = torch.cat([tokens, canvas], dim=1)
            block_ids = torch.cat([block_ids, canvas_ids], dim=1)
            position_ids = torch.cat([position_ids, canvas_positions], dim=1)
            stream_ids = torch.cat([stream_ids, torch.full_like(canvas, stream)], dim=1)
        if not tokens.shape[1]:
            return rows.states_before
        layout = TokenLayout(block_ids, stream_ids, position_ids)
        sees = self.schedule.progress.sees if self.order.follows_plan else None
        states = self.model.encode(tokens, layout, self.cache, self.order, sees)
        self.answer.num_forward_passes[rows.index] += 1
        if num_pending:
            self.cache.commit(rows.pending_block_ids, rows.pending_position_ids, tokens.shape[1])
        if not self.order.is_shifted:
            return states[:, num_pending:]
        self._find_states_before(states)
        if not self.reads_canvas:
            return rows.states_before
        shifted = states[:, num_pending:].roll(1, dims=1)
        starts = self.starts[self.columns]
        shifted[:, starts] = rows.states_before[:, self.schedule.slot_of[self.columns][starts]]
        return shifted

    def _find_states_before(self, states: torch.FloatTensor) -> None:
        """Keep the hidden states of the tokens before the canvas that are among those of a pass."""
        rows = self.rows
        if rows.states_before is None:
            rows.states_before = states.new_zeros(len(states), len(self.schedule.widths), states.shape[-1])
        if rows.pending.shape[1]:
            before = rows.canvas_position_ids[:, self.starts, None] - 1 == rows.pending_position_ids[:, None]
            before = before & (rows.pending_block_ids != PADDING)[:, None]  # (rows, slots, pending)
            found = states[torch.arange(len(states), device=self.device)[:, None], before.long().argmax(dim=2)]
            rows.states_before = torch.where(before.any(dim=2, keepdim=True), found, rows.states_before)

    def _encode_prompts(self) -> None:
        """Encode the prompt of each group of copies once, and give every copy its keys and values."""
        ids = self.rows.pending, self.rows.pending_block_ids, self.rows.pending_position_ids
        tokens, block_ids, position_ids = (one[:: self.copies] for one in ids)
        sees = self.schedule.progress.sees[:: self.copies] if self.order.follows_plan else None
        if tokens.shape[1]:
            layout = TokenLayout(block_ids, torch.full_like(block_ids, CLEAN), position_ids)
            states = self.model.encode(tokens, layout, self.cache, self.order, sees)
            self.cache.commit(block_ids, position_ids, tokens.shape[1])
            self.answer.num_forward_passes += 1
            if self.order.is_shifted:
                self._find_states_before(states.repeat_interleave(self.copies, dim=0))
            self._keep_pending(slice(0))
        self.cache.repeat_rows(self.copies)

    def _masked(self) -> torch.BoolTensor:
        return self.rows.canvas == self.order.mask_token_id

    def _inside(self) -> torch.BoolTensor:
        return self.rows.canvas_block_ids != PADDING

    def _due(self, masked: torch.BoolTensor) -> torch.BoolTensor:
        """The tokens that a scheduled sampler reveals next: those of the latest time."""
        times = self.schedule.together(self.rows.reveal_times.masked_fill(~masked, -1))
        return (times == times.amax(dim=2, keepdim=True)).view(masked.shape)

    def _after_end(self) -> torch.BoolTensor:
        return self.schedule.after_end(self.rows.canvas, self._inside())

    def _reveal(self, candidates: torch.BoolTensor, logits: torch.FloatTensor) -> None:
        """Draw the candidates' tokens and write those that the sampler accepts into the canvas."""
        rows = self.rows
        tokens = draw_tokens(logits, self.settings.temperature, self.settings.top_p, self.generator)
        drafted = rows.canvas.masked_scatter(candidates, tokens)
        groups = self.schedule.together(candidates).flatten(0, 1)
        accepted = self.sampler.accept(groups, logits, tokens).view(candidates.shape)
        rows.canvas = torch.where(accepted, drafted, rows.canvas)
        step = self.answer.num_forward_passes[rows.index, None]
        rows.reveal_steps = torch.where(accepted, step, rows.reveal_steps)
        if self.settings.fill_after_end:
            rows.canvas = rows.canvas.masked_fill(self._after_end(), self.order.end_token_id)

    def _advance(self) -> None:
        """Close finished blocks until every row that is left has something to denoise."""
        while len(self.rows.index):
            done = self.schedule.finished(self._masked())
            if not done.any():  # the one synchronisation of most steps
                return
            still_active = self.schedule.progress.active & ~done
            self._close_blocks(done)
            self._read_plans()
            ended = self.schedule.start()
            if ended.any():
                self.answer.finished[self.rows.index[ended]] = self.schedule.closed()[ended]
                still_active = still_active[self._leave_out(ended)]
            self._open_canvases(~still_active)
            if not self.schedule.opens_finished:
                return
            self._drop_padding()

    def _leave_out(self, which: torch.BoolTensor) -> torch.LongTensor:
        """Take rows out of the batch; returns the old index of every row that is left."""
        order = self.cache.keep_rows(~which)
        self.rows, self.schedule.progress = self.rows.select(order), self.schedule.progress.select(order)
        return order

    def _close_blocks(self, done: torch.BoolTensor) -> None:
        """Write the finished blocks down and queue them for the cache; `done`, `(rows, slots)`, are their slots."""
        rows, after_end, part_ids = self.rows, self._after_end(), self.schedule.part_ids
        closing = done[:, self.schedule.slot_of]
        rows.canvas = rows.canvas.masked_fill(after_end & closing, self.order.end_token_id)
        closing = closing & self._inside()
        self.answer.write(rows.index, closing, rows.canvas, rows.canvas_position_ids, part_ids, rows.reveal_steps)
        if self.streamer is not None:
            stream(self.streamer, rows.canvas[closing & ~after_end].cpu(), self.order)
        # of many slots, as a rule few have a block that is finished
        columns = closing.any(dim=0) if self.order.follows_plan else slice(None)
        block_ids = rows.canvas_block_ids.masked_fill(~closing, PADDING)
        for name, ids in (
            ("pending", rows.canvas),
            ("pending_block_ids", block_ids),
            ("pending_position_ids", rows.canvas_position_ids),
        ):
            setattr(rows, name, torch.cat([getattr(rows, name), ids[:, columns]], dim=1))
        self.schedule.close(done, rows.canvas, self._inside(), after_end)

    def _read_plans(self) -> None:
        """Let the rows whose plan has just been finished follow it."""
        if self.read_plan is None:
            return
        for row in self.schedule.unread_plans().nonzero().flatten().tolist():  # once for each row
            index = int(self.rows.index[row])
            depends_on, self.answer.plan_followed[index] = self.read_plan(self.answer.plan(index))
            self.schedule.follow(row, depends_on)

    def _open_canvases(self, which: torch.BoolTensor) -> None:
        """Give the slots `which`, `(rows, slots)`, a fresh block."""
        rows, which = self.rows, which[:, self.schedule.slot_of]
        tokens, block_ids, position_ids = self.schedule.fresh_canvas(rows.index)
        fresh = {"canvas": tokens, "canvas_block_ids": block_ids, "canvas_position_ids": position_ids}
        fresh["reveal_steps"] = torch.zeros_like(tokens)
        times = self.sampler.schedule(self._quantiles(), SCHEDULES[self.model.config.noise])
        if rows.reveal_times is None:
            rows.reveal_times = times
        elif times is not None:
            fresh["reveal_times"] = times
        for name, value in fresh.items():
            setattr(rows, name, torch.where(which, value, getattr(rows, name)))
        if self.order.follows_plan and self.reads_canvas:
            self.columns = self._inside().any(dim=0).nonzero().flatten()

    def _quantiles(self) -> torch.DoubleTensor:
        """Where in [0, 1) each token's time lies among all times: evenly spaced from left to right if greedy."""
        shape, dtype = (len(self.rows.index), self.width), widest_dtype(self.device)
        if self.settings.temperature > 0:
            return torch.rand(shape, generator=self.generator, device=self.device, dtype=dtype)
        return (1 - self.schedule.relative_places).to(dtype).expand(shape).clamp(min=0)

    def _drop_padding(self) -> None:
        """Drop pending columns that no row uses, such as those of rows that have left."""
        if self.rows.pending.shape[1] > 2 * self.width:
            self._keep_pending((self.rows.pending_block_ids != PADDING).any(dim=0))

    def _keep_pending(self, columns: slice | torch.BoolTensor) -> None:
        for name in ("pending", "pending_block_ids", "pending_position_ids"):
            setattr(self.rows, name, getattr(self.rows, name)[:, columns])


def never_written(order: BlockOrder, settings: HierBD3LMGenerationConfig) -> torch.LongTensor:
    """Ids that no block can hold: the mask token (SUBS), and those by which a reader tells segments and padding."""
    ids = {order.mask_token_id, order.plan_token_id, order.execution_token_id, order.pad_token_id}
    ids -= {order.end_token_id}
    if order.predicts_execution_opener and settings.stage == "full":
        ids -= {order.execution_token_id}
    return torch.tensor(sorted(ids))


def right_justify(tokens: torch.LongTensor, keep: torch.BoolTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Move the kept tokens of each row to its right end; return them and their mask: `(batch, most kept)`."""
    order = keep.long().argsort(dim=1, stable=True)
    width = int(keep.sum(dim=1).amax())
    start = tokens.shape[1] - width
    return tokens.gather(1, order)[:, start:], keep.gather(1, order)[:, start:].long()


def left_justify(tokens: torch.LongTensor, keep: torch.BoolTensor, pad_token_id: int) -> torch.LongTensor:
    """The kept tokens of each row side by side, right-padded: `(batch, most kept)`."""
    order = (~keep).long().argsort(dim=1, stable=True)
    count = keep.sum(dim=1, keepdim=True)
    columns = torch.arange(int(count.amax()), device=tokens.device)
    return tokens.gather(1, order)[:, : len(columns)].masked_fill(columns >= count, pad_token_id)


def stream(streamer: BaseStreamer, tokens: torch.LongTensor, order: BlockOrder) -> None:
    """Put tokens of shape `(length,)` into a streamer.

    If it prints text without special tokens, each segment starts a new line: nothing else would separate them.
    """
    start = 0
    if isinstance(streamer, TextStreamer) and streamer.decode_kwargs.get("skip_special_tokens"):
        openers = torch.tensor([order.plan_token_id, order.execution_token_id])
        for place in torch.isin(tokens, openers).nonzero().flatten().tolist():
            streamer.put(tokens[start:place])
            start = place
            if text := streamer.tokenizer.decode(streamer.token_cache, **streamer.decode_kwargs):
                streamer.on_finalized_text(text[streamer.print_len :] + "\n")
                streamer.token_cache, streamer.print_len = [], 0
    streamer.put(tokens[start:])
