"""Checkpoints on disk: the one to resume from, and what of them transformers does not write."""

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
    """The checkpoint to resume from, or None to start anew.

    Args:
        resume_from: a checkpoint's folder, or `last` for the last complete one in `output_dir`, if there is one.

    Raises:
        ValueError: if a new run would mix its checkpoints with those of another in `output_dir`.
    """
    last = last_complete_checkpoint(output_dir)
    if resume_from is None and last is not None:
        raise ValueError(
            f"`output_dir` must hold no checkpoints of another run, but got {output_dir} with {last}: give "
            f"`--resume_from_checkpoint last` to go on with it, or another folder"
        )
    return last if resume_from == "last" else resume_from


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The checkpoint to resume from: the latest that was written to its end, or None.

    The Trainer writes trainer_state.json last, so a checkpoint whose file is missing or torn is passed over.
    """
    folders = [
        path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()
    ]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            logger.warning(f"{folder} was not written to its end: an earlier checkpoint is looked for.")
            continue
        return str(folder)
    return None


def has_average(checkpoint: str) -> bool:
    """Whether a checkpoint is of a run with an average of the weights."""
    return os.path.isfile(os.path.join(checkpoint, EMA_FILE))


@contextlib.contextmanager
def of_own_class(model: nn.Module) -> Iterator[None]:
    """Within the context a model that FSDP2 has sharded is not of the class that torch has derived from its own.

    transformers writes the file of a model's class, and its name as that to load, into a checkpoint.
    """
    sharded = type(model)
    model.__class__ = next(cls for cls in sharded.__mro__ if not issubclass(cls, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded
