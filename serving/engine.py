"""The engine: one thread that answers queued prompts in batches of those with like settings."""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..data.collator import collate_questions
from ..data.decoding import decode_text
from ..denoising_hierbd3lm import Answer
from ..evaluation.prompts import Prompt
from ..evaluation.runner import Written, generate_batch, read_output
from ..masking_hierbd3lm import PADDING
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..order_hierbd3lm import BlockOrder
from ..settings_hierbd3lm import HierBD3LMGenerationConfig, settings_of
from .answers import read_answer

logger = logging.get_logger(__name__)

SEGMENTS = ("plan", "execution")
INCOMPLETE = "\ufffd"  # ends a text whose last character has only some of its bytes yet


class QueueFull(Exception):
    """There is no room in the queue."""


class Closed(Exception):
    """The engine takes no more jobs."""


@dataclass(frozen=True)
class Delta:
    """Text that a segment has gained: `plan` or `execution`."""

    segment: str
    text: str


@dataclass(frozen=True)
class Done:
    """The whole answer; see [`read_answer`]."""

    answer: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """There is no answer, as generation raised an error."""

    message: str


@dataclass(eq=False)
class Job:
    """A prompt that waits for its answer.

    Args:
        report: called in the engine's thread with a [`Delta`], if `streams`, and at last [`Done`] or [`Failed`];
            no more after `cancelled` is set.
    """

    prompt: Prompt
    settings: HierBD3LMGenerationConfig
    report: Callable[[Delta | Done | Failed], None]
    streams: bool = False
    cancelled: bool = False
    is_done: bool = field(default=False, init=False)
    sent: dict[str, str] = field(default_factory=lambda: dict.fromkeys(SEGMENTS, ""), init=False)

    @property
    def is_over(self) -> bool:
        return self.is_done or self.cancelled

    def key(self) -> Hashable:
        """What jobs of one batch have in common. One that draws from a seed of its own is alone: the draws of a batch
        depend on all of its rows."""
        settings = settings_of(self.settings)
        is_seeded = settings["seed"] is not None and settings["temperature"] > 0
        return (*settings.items(), id(self) if is_seeded else None)

    def show(self, texts: dict[str, str], is_last: bool) -> None:
        """Report what the segments have gained."""
        for segment, text in texts.items():
            text = text if is_last else text.rstrip(INCOMPLETE)
            if text.startswith(self.sent[segment]) and text != self.sent[segment]:
                self.report(Delta(segment, text[len(self.sent[segment]) :]))
                self.sent[segment] = text

    def finish(self, last: Done | Failed) -> None:
        """Report the end, once."""
        if not self.is_over:
            self.is_done = True
            self.report(last)


class Engine:
    """Answers jobs in the order in which they come; jobs with the settings of the oldest one join its batch.

    Clients that have their answers often ask again at once. So a batch waits for as many jobs as there were at once
    during the last one, but at most `patience` times as long as that one took: else the same clients would be answered
    in two alternating batches.

    Args:
        max_batch_size: most rows of a batch.
        max_queue: most jobs that wait.
        observe_batch: called with the jobs of each batch before it runs.
    """

    patience = 0.1

    def __init__(
        self,
        model: HierBD3LMForBlockDiffusion,
        tokenizer: PreTrainedTokenizerBase,
        max_batch_size: int,
        max_queue: int,
        observe_batch: Callable[[Sequence[Job]], None] = lambda batch: None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_size, self.max_queue = max_batch_size, max_queue
        self.observe_batch = observe_batch
        self.running: list[Job] = []
        self._queue: list[Job] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._most_at_once, self._expected, self._wait_until = 0, 0, 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """False when the engine is closing."""
        return self._thread.is_alive() and not self._is_closing

    @property
    def num_waiting(self) -> int:
        """The number of jobs in the queue."""
        return len(self._queue)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none.

        Raises:
            QueueFull: if there is no room for them.
            Closed: if the engine is closing.
        """
        with self._changed:
            if not self.is_ready:
                raise Closed
            self._drop_cancelled()
            if len(self._queue) + len(jobs) > self.max_queue:
                raise QueueFull
            self._queue += jobs
            self._count_jobs()
            self._changed.notify()

    def close(self) -> None:
        """Take no more jobs, and return when all that were taken have ended."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _count_jobs(self) -> None:
        jobs = len(self._queue) + sum(not job.is_over for job in self.running)
        self._most_at_once = max(self._most_at_once, jobs)

    def _drop_cancelled(self) -> None:
        self._queue = [job for job in self._queue if not job.cancelled]

    def _run(self) -> None:
        while batch := self._next_batch():
            self.running, start = batch, time.monotonic()
            self.observe_batch(batch)
            try:
                self._answer(batch)
            except Exception as error:  # a fault of one batch must not end the engine
                logger.exception("generation failed")
                for job in batch:
                    job.finish(Failed(f"generation failed: {type(error).__name__}"))
            with self._changed:
                now = time.monotonic()
                self._expected, self._most_at_once = min(self._most_at_once, self.max_batch_size), 0
                self._wait_until = now + self.patience * (now - start)
                self.running = []

    def _next_batch(self) -> list[Job]:
        """Wait for jobs, and take those of the next batch; none if the engine is closing."""
        with self._changed:
            while True:
                self._drop_cancelled()
                rest = self._wait_until - time.monotonic()
                if self._is_closing or (self._queue and (len(self._queue) >= self._expected or rest <= 0)):
                    break
                self._changed.wait(rest if self._queue else None)
            if not self._queue:
                return []
            self._count_jobs()
            key = self._queue[0].key()
            batch = [job for job in self._queue if job.key() == key][: self.max_batch_size]
            self._queue = [job for job in self._queue if job not in batch]
            return batch

    def _answer(self, batch: list[Job]) -> None:
        prompts, settings = [job.prompt for job in batch], batch[0].settings
        rows = BatchStreamer(batch, self.tokenizer, self.model.order)
        answers = generate_batch(self.model, prompts, settings, rows, self.tokenizer)
        for job, written in zip(batch, answers, strict=True):
            if not job.is_over:
                rows.finish(job, written)


class BatchStreamer(BaseStreamer):
    """Reports to each job of a batch what its row has written, and stops the rows of cancelled jobs."""

    def __init__(self, batch: list[Job], tokenizer: PreTrainedTokenizerBase, order: BlockOrder):
        self.batch, self.tokenizer, self.pad = batch, tokenizer, order.pad_token_id
        self.question = collate_questions([job.prompt.question_ids for job in batch], self.pad)["input_ids"]
        # steps that are written at the same time make no text that grows at its end
        self.growing = SEGMENTS[:1] if order.follows_plan else SEGMENTS
        self.num_written = 0

    def put(self, value: torch.LongTensor) -> None:
        """Blocks of all rows, mixed: `put_rows` has them by row."""

    def end(self) -> None:
        """The engine finishes the jobs."""

    def put_rows(self, answer: Answer, active: list[int]) -> list[int]:
        """Report new texts and finished rows; return the rows of cancelled jobs."""
        ended = [row for row in set(range(len(self.batch))).difference(active) if not self.batch[row].is_over]
        streams = [row for row in active if self.batch[row].streams and not self.batch[row].is_over]
        if ended or (streams and self._has_more(answer)):
            written = read_output(answer.output(self.question.to(answer.tokens.device)), self.pad)
            for row in ended:
                self.finish(self.batch[row], written[row])
            for row in streams:
                texts = self._texts(written[row])
                self.batch[row].show({segment: texts[segment] for segment in self.growing}, is_last=False)
        return [row for row in active if self.batch[row].cancelled]

    def finish(self, job: Job, written: Written) -> None:
        """Report the rest of the texts, and the answer."""
        if job.streams:
            job.show(self._texts(written), is_last=True)
        job.finish(Done(read_answer(job.prompt, written, self.tokenizer)))

    def _texts(self, written: Written) -> dict[str, str]:
        ids = dict(zip(SEGMENTS, (written.plan_ids, written.execution_ids), strict=True))
        return {segment: decode_text(ids[segment], self.tokenizer) for segment in SEGMENTS}

    def _has_more(self, answer: Answer) -> bool:
        """Return True if blocks were finished since the last call."""
        before, self.num_written = self.num_written, int((answer.part_ids != PADDING).sum())
        return self.num_written > before
