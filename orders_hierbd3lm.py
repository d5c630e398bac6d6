"""How `generate` denoises in the other orders over blocks: as one run of tokens, or both segments at the same time."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from .generation_hierbd3lm import BlockDenoiser, HierBD3LMGenerationConfig, HierBD3LMGenerationOutput, left_justify
from .masking_hierbd3lm import EXECUTION, PADDING, PLAN, QUESTION


def denoiser_class(config: Any, settings: HierBD3LMGenerationConfig) -> type[BlockDenoiser]:
    """The denoiser of a model's order.

    Raises:
        ValueError: for a stage that the order does not have.
    """
    if settings.stage == "joint" and not config.joint:
        raise ValueError("`stage` must not be 'joint' for a model that is not trained jointly (`joint=True`)")
    if settings.stage == "plan" and not config.has_plan:
        raise ValueError("`stage` must not be 'plan' for a model without a plan (`plan_len=0`)")
    if config.is_flat:
        return AutoregressiveWriter if config.algorithm == "ar" else FlatDenoiser
    if not config.hierarchical_mask and settings.stage == "plan":
        raise ValueError("`stage` must not be 'plan' without the hierarchical mask: the plan sees the execution")
    is_paired = not config.hierarchical_mask or (config.joint and settings.stage in ("full", "joint"))
    return PairedDenoiser if is_paired else BlockDenoiser


class FlatDenoiser(BlockDenoiser):
    """Denoises one run of blocks, which the model itself divides into plan and execution by `<|execution|>`."""

    opens_finished = True

    def _start(self, prompt: torch.LongTensor, prompt_segments: torch.LongTensor) -> None:
        """As in the base, with the opener that is given; what fills no whole block is put into the first canvas."""
        config, is_execution = self.config, self.settings.stage == "execution"
        segment = EXECUTION if is_execution else PLAN
        opener = prompt.new_full((len(prompt), 1), config.execution_token_id if is_execution else config.plan_token_id)
        prompt = torch.cat([prompt, opener], dim=1)
        prompt_segments = torch.cat([prompt_segments, torch.full_like(opener, segment)], dim=1)
        self.first_segment = self.last_segment = segment  # a row is never seen to go from one to the other
        run_limit = self.limits.sum()
        self.limits = torch.where(torch.arange(3, device=self.device) == segment, run_limit, 0)
        self.openers = torch.full_like(self.openers, config.mask_token_id)  # those that are given are in the prompt
        if self.settings.stage == "full":
            self.never_written = self.never_written[self.never_written != config.execution_token_id]
        number = (prompt_segments > QUESTION).cumsum(dim=1)  # 1 for the first token of the run
        in_canvas = (prompt_segments > QUESTION) & (number > number[:, -1:] // self.width * self.width)
        # Where the canvas holds the given <|execution|>, the plan's <|end|> may stand there before it.
        awaits = torch.full_like(number[:, 0], self.settings.stage == "plan", dtype=torch.bool)
        self.awaits_last_end = awaits | ~in_canvas.any(dim=1) if is_execution else awaits
        self.given = torch.full((len(prompt), self.width), config.mask_token_id, device=self.device)
        row, column = in_canvas.nonzero(as_tuple=True)
        self.given[row, (number[row, column] - 1) % self.width] = prompt[row, column]
        super()._start(prompt, prompt_segments.masked_fill(in_canvas, PADDING))
        rows = self.rows
        rows.limit = self.question_lengths + run_limit
        self._write(rows.pending_block_ids > QUESTION, rows.pending, rows.pending_position_ids, rows.segment)

    def _open_blocks(self, which: torch.BoolTensor) -> None:
        super()._open_blocks(which)
        rows, given = self.rows, self.given[self.rows.index]
        is_given = (given != self.config.mask_token_id) & (which & rows.opens)[:, None]
        rows.canvas = torch.where(is_given, given, rows.canvas)

    def _after_end(self) -> torch.BoolTensor:
        """Tokens of the block behind the run's last `<|end|>`, the first one behind `<|execution|>`, and that one."""
        rows = self.rows
        return behind_last_end(
            rows.canvas, rows.canvas_block_ids != PADDING, self.awaits_last_end[rows.index], self.config
        )

    def _close_blocks(
        self, done: torch.BoolTensor, segment_done: torch.BoolTensor, after_end: torch.BoolTensor
    ) -> None:
        has_opener = (self.rows.canvas == self.config.execution_token_id).any(dim=1)
        super()._close_blocks(done, segment_done, after_end)
        self.awaits_last_end[self.rows.index] |= done & has_opener

    def output(self, question: torch.LongTensor) -> HierBD3LMGenerationOutput:
        """Divides what was written at `<|execution|>`."""
        written = self.segments != PADDING
        in_execution = (written & (self.tokens == self.config.execution_token_id)).cumsum(dim=1) > 0
        self.segments = torch.where(in_execution, EXECUTION, PLAN).masked_fill(~written, PADDING)
        ended = written & ~in_execution & (self.tokens == self.config.end_token_id)
        has_plan = (self.segments == PLAN).any(dim=1)
        self.finished = self.finished & (ended.any(dim=1) | ~has_plan)
        return super().output(question)


def behind_last_end(
    tokens: torch.LongTensor, inside: torch.BoolTensor, awaits_last_end: torch.BoolTensor, config: Any
) -> torch.BoolTensor:
    """The `<|end|>` that ends a run of plan and execution, and what follows it: `(rows, length)`.

    Args:
        tokens, inside: `(rows, length)`, some next tokens of each run, and which of them there are.
        awaits_last_end: `(rows,)`, whether `<|execution|>` stands before them, or the run has only one `<|end|>`.
    """
    in_last = awaits_last_end[:, None] | ((inside & (tokens == config.execution_token_id)).cumsum(dim=1) > 0)
    return inside & ((inside & in_last & (tokens == config.end_token_id)).cumsum(dim=1) > 0)


class AutoregressiveWriter(FlatDenoiser):
    """Has the run written token by token, by the `generate` that transformers gives the backbone, with its cache."""

    def run(self) -> None:
        rows = self.rows
        prompt, attention_mask = right_justify(rows.pending, rows.pending_block_ids != PADDING)
        num_left = rows.limit - rows.position
        with seeded(self.settings.seed if self.settings.temperature > 0 else None, self.device):
            sequences = self.model.backbone.generate(
                prompt,
                attention_mask=attention_mask,
                max_new_tokens=int(num_left.amax()),
                stopping_criteria=[LastEnd(self.awaits_last_end, self.config)],
                streamer=None if self.streamer is None else StreamerBehindPrompt(self.streamer),
                **self._settings(),
            )
        tokens = sequences[:, prompt.shape[1] :]
        columns = torch.arange(tokens.shape[1], device=self.device)
        behind = behind_last_end(tokens, torch.ones_like(tokens, dtype=torch.bool), self.awaits_last_end, self.config)
        within = (behind.cumsum(dim=1) <= 1) & (columns < num_left[:, None])
        self._write(within, tokens, rows.position[:, None] + columns, rows.segment)
        self.finished = (behind & within).any(dim=1)
        self.num_forward_passes += within.sum(dim=1)

    def _settings(self) -> dict[str, Any]:
        """Ours in the words of transformers; those that the checkpoint may have set otherwise are all said."""
        settings = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
        if self.settings.temperature > 0:
            settings |= {"do_sample": True, "temperature": float(self.settings.temperature)}
            settings |= {"top_p": float(self.settings.top_p), "top_k": 0}
        return settings | {
            "eos_token_id": None,
            "pad_token_id": self.config.pad_token_id,
            "suppress_tokens": self.never_written.tolist(),
            "use_cache": True,
        }


class LastEnd(StoppingCriteria):
    """Ends a row with the last `<|end|>` of its run.

    Args:
        awaits_last_end (`torch.BoolTensor` of shape `(batch,)`): rows of which the next one is the last.
    """

    def __init__(self, awaits_last_end: torch.BoolTensor, config: Any):
        self.awaits_last_end = awaits_last_end.clone()
        self.ended = torch.zeros_like(awaits_last_end)
        self.config = config

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        last = input_ids[:, -1]
        self.ended = self.ended | (self.awaits_last_end & (last == self.config.end_token_id))
        self.awaits_last_end = self.awaits_last_end | (last == self.config.execution_token_id)
        return self.ended


class StreamerBehindPrompt(BaseStreamer):
    """Passes on what is written: the prompt has been put, and whoever put it ends the stream."""

    def __init__(self, streamer: BaseStreamer):
        self.streamer, self.is_prompt = streamer, True

    def put(self, value: torch.LongTensor) -> None:
        if not self.is_prompt:
            self.streamer.put(value)
        self.is_prompt = False

    def end(self) -> None:
        pass


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Within the context torch's global generators start from a seed, and afterwards go on as if nothing had been."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def right_justify(tokens: torch.LongTensor, keep: torch.BoolTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """The kept tokens of each row side by side, padded on the left, and their attention mask: `(batch, most kept)`."""
    order = keep.long().argsort(dim=1, stable=True)
    width = int(keep.sum(dim=1).amax())
    start = tokens.shape[1] - width
    return tokens.gather(1, order)[:, start:], keep.gather(1, order)[:, start:].long()


class PairedDenoiser(BlockDenoiser):
    """Denoises the i-th block of the plan and the i-th of the execution at the same time, in one canvas."""

    opens_finished = True

    def _start(self, prompt: torch.LongTensor, prompt_segments: torch.LongTensor) -> None:
        """As in the base; a given plan is no context but a part of every canvas, as the model was trained with it."""
        config, batch = self.config, len(prompt)
        self.sizes = torch.tensor([config.plan_block_size, config.execution_block_size], device=self.device)
        self.width = int(self.sizes.sum())
        self.part = torch.repeat_interleave(torch.arange(2, device=self.device), self.sizes)  # of a column: 0 plan
        self.ended = torch.zeros(batch, 2, dtype=torch.bool, device=self.device)
        is_plan = prompt_segments == PLAN
        self.given_plan = torch.full((batch, config.plan_len), config.mask_token_id, device=self.device)
        row, column = is_plan.nonzero(as_tuple=True)
        self.given_plan[row, is_plan.cumsum(dim=1)[row, column] - 1] = prompt[row, column]
        prompt_segments = prompt_segments.masked_fill(is_plan, PADDING)
        self.question_lengths = (prompt_segments == QUESTION).sum(dim=1)
        super()._start(prompt, prompt_segments)
        self.rows.segment = torch.full_like(self.rows.segment, self.last_segment)
        # The execution is written where its positions are, behind the longest plan.
        self.tokens = torch.full((batch, config.sequence_len), config.pad_token_id, device=self.device)
        self.segments = torch.full_like(self.tokens, PADDING)

    def _open_blocks(self, which: torch.BoolTensor) -> None:
        rows, config, part = self.rows, self.config, self.part
        columns = torch.arange(self.width, device=self.device)
        number = (rows.block[:, None] - 1) * self.sizes[part] + columns - part * self.sizes[0]  # in its segment
        inside = ~self.ended[rows.index][:, part]
        canvas = torch.where(part == 0, self._given(number), config.mask_token_id)
        canvas = torch.where(number == 0, self.openers[part + PLAN], canvas)
        first_position = self.question_lengths[rows.index][:, None] + part * config.plan_len
        # Under the mask, the joint plan is a block before the execution; else the two are one block.
        block = rows.block[:, None] + part * config.hierarchical_mask
        fresh = {
            "canvas": torch.where(inside, canvas, config.pad_token_id),
            "canvas_block_ids": torch.where(inside, block, PADDING),
            "canvas_position_ids": torch.where(inside, first_position + number, 0),
            "reveal_times": self._reveal_times(torch.full_like(rows.block, self.width)[:, None], columns),
        }
        for name, value in fresh.items():
            setattr(rows, name, torch.where(which[:, None], value, getattr(rows, name)))

    def _given(self, number: torch.LongTensor) -> torch.LongTensor:
        """Tokens of the given plan, masks where it has none: `(rows, width)`."""
        return self.given_plan[self.rows.index].gather(1, number.clamp(0, self.config.plan_len - 1))

    def _after_end(self) -> torch.BoolTensor:
        inside = self.rows.canvas_block_ids != PADDING
        ends = inside & (self.rows.canvas == self.config.end_token_id)
        behind = [part.cumsum(dim=1) > 0 for part in ends.split(self.sizes.tolist(), dim=1)]
        return inside & torch.cat(behind, dim=1)

    def _ended_parts(self, after_end: torch.BoolTensor) -> tuple[torch.BoolTensor, torch.BoolTensor]:
        """Which segments end with their blocks, and which of them by an `<|end|>`: two `(rows, 2)`."""
        by_end = torch.stack([part.any(dim=1) for part in after_end.split(self.sizes.tolist(), dim=1)], dim=1)
        at_limit = self.rows.block[:, None] * self.sizes >= self.limits[PLAN:]
        return by_end | at_limit | self.ended[self.rows.index], by_end

    def _ends_segment(self, after_end: torch.BoolTensor) -> torch.BoolTensor:
        return self._ended_parts(after_end)[0].all(dim=1)

    def _close_blocks(
        self, done: torch.BoolTensor, segment_done: torch.BoolTensor, after_end: torch.BoolTensor
    ) -> None:
        rows = self.rows
        index, was_ended, (ended, by_end) = rows.index, self.ended[rows.index], self._ended_parts(after_end)
        inside, position_ids = rows.canvas_block_ids != PADDING, rows.canvas_position_ids
        finished = self.finished[index] & (~(ended & ~was_ended & ~by_end).any(dim=1) | ~done)
        super()._close_blocks(done, segment_done, after_end)
        in_plan = inside & done[:, None] & (self.part == 0)
        self._write(in_plan, rows.canvas, position_ids, torch.full_like(rows.segment, PLAN))
        self.finished[index] = finished
        self.ended[index] = torch.where(done[:, None], ended, was_ended)

    def output(self, question: torch.LongTensor) -> HierBD3LMGenerationOutput:
        """Puts plan and execution side by side."""
        written = self.segments != PADDING
        self.tokens = left_justify(self.tokens, written, self.config.pad_token_id)
        self.segments = left_justify(self.segments, written, PADDING)
        return super().output(question)
