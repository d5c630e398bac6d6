"""Checkpoints of the trainer: find the latest, detect a weight average, save sharded models."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)

EMA_FILE = "ema.safetensors"


def find_checkpoint(output_dir: str, resume_from: str | None) -> str | None:
    """Return the checkpoint to resume from, or None for a new run.

    Args:
        resume_from: a checkpoint's folder, or `last` for the last complete one in `output_dir`, if there is one.

    Raises:
        ValueError: if a new run would mix its checkpoints with those of another in `output_dir`.
    """
    last = last_complete_checkpoint(output_dir)
    if resume_from is None and last is not None:
        raise ValueError(
            f"`output_dir` must hold no checkpoints of another run, but got {output_dir} with {last}: give "
            f"`--resume_from_checkpoint last` to continue it, or another folder"
        )
    return last if resume_from == "last" else resume_from


def last_complete_checkpoint(output_dir: str) -> str | None:
    """Return the latest complete checkpoint to resume from, or None.

    The Trainer writes trainer_state.json last, so a checkpoint in which that file is missing or truncated is skipped.
    """
    folders = [
        path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()
    ]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            logger.warning(f"{folder} is incomplete. Looking for an earlier checkpoint.")
            continue
        return str(folder)
    return None


def has_average(checkpoint: str) -> bool:
    """Return True if a checkpoint was saved with an average of the weights."""
    return os.path.isfile(os.path.join(checkpoint, EMA_FILE))


@contextlib.contextmanager
def original_class(model: nn.Module) -> Iterator[None]:
    """Restore the class of a model within the context if FSDP2 has replaced it by a subclass.

    transformers writes the name of a model's class and its source file into a checkpoint.
    """
    sharded = type(model)
    model.__class__ = next(cls for cls in sharded.__mro__ if not issubclass(cls, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded
