"""The course of a generation: at which forward pass each token was committed, and with what confidence."""

import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.generation.streamers import BaseStreamer

from ..data.collator import collate_questions
from ..denoising_hierbd3lm import HierBD3LMGenerationOutput
from ..diffusion_hierbd3lm import NoiseSchedule
from ..generation_hierbd3lm import check_stage, make_schedule, order_of
from ..masking_hierbd3lm import EXECUTION, PADDING
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..samplers_hierbd3lm import Sampler, make_sampler, spread
from ..schedule_hierbd3lm import CanvasSchedule
from ..settings_hierbd3lm import HierBD3LMGenerationConfig, resolve_settings


@dataclass(frozen=True)
class Token:
    """A token of plan or execution.

    Args:
        id: the mask token's where it is not committed yet.
        step: forward pass that committed it, counted from 1; None if it is masked or was given.
        confidence: the model's plain probability of the token; None where the model did not predict it in this step
            (given tokens, filler after `<|end|>`), and for autoregressive models.
    """

    id: int
    step: int | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Frame:
    """Plan and execution after `step` forward passes: every token from the opener to the filler of the last block."""

    step: int
    segments: dict[int, tuple[Token, ...]]


@dataclass(frozen=True)
class Outcome:
    """The end of a generation: its last frame, the output of `generate`, and the seconds that it took."""

    frame: Frame
    output: HierBD3LMGenerationOutput
    seconds: float


class Stopped(Exception):
    """Ends a generation that nobody watches any more."""


class Recorder(BaseStreamer):
    """Streamer that follows one row of `generate`: a [`Frame`] of every new canvas and after every forward pass.

    Args:
        schedule: a schedule of its own, equal to the one that `generate` makes. It moves on with each finished canvas.
        is_causal: the model writes token by token, without drafts.
        frames: receives the frames.
    """

    def __init__(self, schedule: CanvasSchedule, is_causal: bool, frames: "queue.SimpleQueue[Frame | None]"):
        self.schedule, self.order, self.is_causal, self.frames = schedule, schedule.order, is_causal, frames
        self.step, self.is_stopped = 0, False
        self.drafted: tuple[torch.Tensor, torch.Tensor] | None = None  # tokens and probabilities of one pass
        context, _, positions, part_ids = (ids[0].tolist() for ids in schedule.context)
        # by position: number of the part, token
        self.written = {
            place: (part, Token(token))
            for token, place, part in zip(context, positions, part_ids, strict=True)
            if part != PADDING
        }
        self.num_put = 0
        if is_causal:
            self.next_position = int(schedule.question_lengths[0]) + len(self.written)
        else:
            self._open()

    @property
    def frame(self) -> Frame:
        segments: dict[int, list[Token]] = {segment: [] for segment in self.order.segments}
        segment = self.order.segments[0]
        for _, (part, token) in sorted(self.written.items()):
            own = self.order.parts[part].segments
            if len(own) == 1:
                segment = own[0]
            elif token.id == self.order.execution_token_id:
                segment = EXECUTION
            segments[segment].append(token)
        return Frame(self.step, {segment: tuple(tokens) for segment, tokens in segments.items()})

    def put(self, value: torch.LongTensor) -> None:
        """Receive the question, then finished blocks."""
        self._check()
        self.num_put += 1
        if self.num_put == 1:
            return
        if self.is_causal:
            self._put_next(int(value.flatten()[-1]))
            return
        after_end = self.schedule.after_end(self.canvas, self.inside)
        self._write(self.canvas.masked_fill(after_end, self.order.end_token_id))
        self.schedule.close(self.schedule.progress.active, self.canvas, self.inside, after_end)
        if not self.schedule.start().any():
            self._open()

    def put_draft(self, value: torch.LongTensor) -> None:
        """Receive the canvas after a forward pass."""
        self._check()
        self.step += 1
        self._write(self.canvas.masked_scatter(self.inside, value))
        self.frames.put(self.frame)

    def end(self) -> None:
        pass

    def stop(self) -> None:
        """Have `generate` end at the next forward pass."""
        self.is_stopped = True

    def _check(self) -> None:
        if self.is_stopped:
            raise Stopped

    def _put_next(self, token: int) -> None:
        if self.num_put > 2:  # the second is the end of the prompt
            self.step += 1
            self.written[self.next_position] = (0, Token(token, self.step))
            self.next_position += 1
            self.frames.put(self.frame)

    def _open(self) -> None:
        canvas, block_ids, positions = self.schedule.fresh_canvas(torch.tensor([0]))
        self.canvas, self.inside = canvas, block_ids != PADDING
        self.places = [*zip(positions[0].tolist(), self.schedule.part_ids[0].tolist(), strict=True)]
        for column in self.inside[0].nonzero().flatten().tolist():
            place, part = self.places[column]
            self.written[place] = (part, Token(int(canvas[0, column])))
        self.frames.put(self.frame)

    def _write(self, canvas: torch.LongTensor) -> None:
        """Note what is new in the canvas, `(1, width)`."""
        for column in (self.inside & (canvas != self.canvas))[0].nonzero().flatten().tolist():
            place, part = self.places[column]
            token = int(canvas[0, column])
            self.written[place] = (part, Token(token, self.step, self._confidence(column, token)))
        self.canvas = canvas

    def _confidence(self, column: int, token: int) -> float | None:
        if self.drafted is None:
            return None
        tokens, probabilities = self.drafted
        confidence = float(probabilities[0, column])
        return confidence if int(tokens[0, column]) == token and not math.isnan(confidence) else None


@dataclass(frozen=True)
class RecordingSampler(Sampler):
    """A sampler that reveals what `inner` reveals, and tells the recorder the probabilities of the drafted tokens."""

    inner: Sampler
    recorder: Recorder

    def schedule(self, quantiles: torch.DoubleTensor, noise: NoiseSchedule) -> torch.DoubleTensor | None:
        return self.inner.schedule(quantiles, noise)

    def accept(
        self, candidates: torch.BoolTensor, logits: torch.FloatTensor, tokens: torch.LongTensor
    ) -> torch.BoolTensor:
        probabilities = logits.softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]
        drafted = torch.full_like(candidates, -1, dtype=torch.long).masked_scatter(candidates, tokens)
        self.recorder.drafted = drafted.cpu(), spread(probabilities, candidates, fill=math.nan).cpu()
        return self.inner.accept(candidates, logits, tokens)


class Recording:
    """A generation in a thread of its own, which is followed frame by frame.

    Args:
        question_ids, plan_ids: token ids; `plan_ids` for `stage="execution"` of a model with a plan.
        settings: generation settings of the model.

    Raises:
        ValueError: for what `generate` refuses before its first forward pass.
    """

    def __init__(
        self,
        model: HierBD3LMForBlockDiffusion,
        question_ids: list[int],
        settings: HierBD3LMGenerationConfig,
        plan_ids: list[int] | None = None,
    ):
        batch = collate_questions([question_ids], model.config.pad_token_id)
        plan = None if plan_ids is None else torch.tensor([plan_ids], dtype=torch.long)
        order = order_of(model, settings)
        settings = resolve_settings(settings, {"stage": check_stage(order, settings.stage)})
        # The recorder's schedule stays on the CPU: drafts come from there.
        schedule = make_schedule(model.config, order, settings, batch["attention_mask"], plan)
        self.frames_queue: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self.recorder = Recorder(schedule, order.is_causal and len(order.parts) == 1, self.frames_queue)
        self.order, self.question_ids = order, question_ids
        self.error: Exception | None = None
        self.outcome: Outcome | None = None
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        if plan is not None:
            inputs["plan_ids"] = plan.to(model.device)
        self.thread = threading.Thread(target=self._run, args=(model, settings, inputs), daemon=True)
        self.thread.start()

    def frames(self, pause: float = 0.0) -> Iterator[Frame]:
        """Yield the frames in order, each at least `pause` seconds after the one before; without a pause the latest.

        A consumer that stops early stops the generation.

        Raises:
            ValueError: for what `generate` refuses.
        """
        try:
            while (frame := self.frames_queue.get()) is not None:
                while pause == 0 and not self.frames_queue.empty():
                    if (later := self.frames_queue.get()) is None:
                        self.frames_queue.put(None)
                        break
                    frame = later
                yield frame
                time.sleep(pause)
        finally:
            self.recorder.stop()
            self.thread.join()
        if self.error is not None:
            raise self.error

    def _run(
        self,
        model: HierBD3LMForBlockDiffusion,
        settings: HierBD3LMGenerationConfig,
        inputs: dict[str, torch.Tensor],
    ) -> None:
        start = time.perf_counter()
        try:
            sampler = RecordingSampler(make_sampler(settings), self.recorder)
            output = model.generate(**inputs, generation_config=settings, streamer=self.recorder, sampler=sampler)
            self.outcome = Outcome(self.recorder.frame, output, time.perf_counter() - start)
        except Stopped:
            pass
        except Exception as error:  # raised again where the frames are read
            self.error = error
        finally:
            self.frames_queue.put(None)
