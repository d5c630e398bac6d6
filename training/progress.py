"""What is logged of training: each segment's loss, tokens per second, and no warnings that do not apply."""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..masking_hierbd3lm import SEGMENT_NAMES


class TrainingProgress:
    """Accumulate training metrics between two logs."""

    def __init__(self):
        self._reset()

    def add(self, nats: torch.Tensor, num_counted: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """Add a micro-batch. Nothing is copied from the device before `take`.

        Args:
            nats, num_counted (`torch.DoubleTensor` of shape `(segments,)`): loss and counted tokens of each segment.
            num_tokens (`torch.LongTensor` of shape `()`): number of tokens without padding.
        """
        sums = torch.stack([nats, num_counted])
        self._sums = sums if self._sums is None else self._sums + sums
        self._num_tokens = self._num_tokens + num_tokens

    def pause(self, seconds: float) -> None:
        """Exclude time that was not spent on training from the throughput."""
        self._start += seconds

    def take(self, accelerator: Any) -> dict[str, float]:
        """Return the metrics over all processes, and reset them."""
        if self._sums is None:
            return {}
        nats, num_tokens = accelerator.reduce(self._sums).tolist()
        logs = {
            f"loss_{name}": n / d for name, n, d in zip(SEGMENT_NAMES.values(), nats, num_tokens, strict=True) if d
        }
        total = accelerator.reduce(self._num_tokens).item()
        logs["tokens_per_second"] = total / (time.perf_counter() - self._start)
        self._reset()
        return logs

    def _reset(self) -> None:
        self._sums: torch.Tensor | None = None
        self._num_tokens: torch.Tensor | int = 0
        self._start = time.perf_counter()


@contextlib.contextmanager
def without_warning(module: str, start: str) -> Iterator[None]:
    """Leave out log messages of a module that start with a text, within the context."""
    logger = logging.getLogger(module)

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(start)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
