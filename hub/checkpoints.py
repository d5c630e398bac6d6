"""Pushes of a training run: the model with its card in one commit, checkpoints in the background."""

import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from tempfile import mkdtemp

from huggingface_hub import CommitInfo, run_as_future
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..data.upload import commit_files
from .card import write_card
from .files import PICKLED_ARGUMENTS, REPLACED, model_files

STATE_FOLDERS = {HubStrategy.CHECKPOINT: "last-checkpoint"}  # the others are named like the checkpoint

logger = logging.get_logger(__name__)


def push_run(folder: str, repo_id: str, message: str, token: str | None, revision: str | None) -> CommitInfo:
    """Push the model of a run with its card: nothing else that is in the folder."""
    return commit_files(model_files(Path(folder)), repo_id, message, token=token, revision=revision, replaced=REPLACED)


def push_checkpoint(
    folder: str, repo_id: str, strategy: HubStrategy, message: str, token: str | None, revision: str | None
) -> Future:
    """Start to push a checkpoint as the repository's model; with its training state too if the strategy says so.

    The files are linked first: the run may delete the checkpoint meanwhile. A push that fails is logged.
    """
    checkpoint = Path(folder)
    write_card(checkpoint, repo_id, local_files_only=False)
    staging = Path(mkdtemp(prefix="_push-", dir=checkpoint.parent))
    shutil.copytree(checkpoint, staging / checkpoint.name, copy_function=_link)
    files = model_files(staging / checkpoint.name)
    replaced = list(REPLACED)
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = STATE_FOLDERS.get(strategy, checkpoint.name)
        others = {path.name: path for path in (staging / checkpoint.name).iterdir() if path.is_file()}
        others.pop(PICKLED_ARGUMENTS, None)
        files |= {f"{place}/{name}": file for name, file in (others | files).items()}
        replaced.append(f"{place}/*")

    def commit() -> CommitInfo:
        try:
            return commit_files(files, repo_id, message, token=token, revision=revision, replaced=replaced)
        except Exception as error:
            logger.warning(f"{folder} was not pushed to {repo_id}, and the run continues: {error}")
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    return run_as_future(commit)  # one after the other: a later checkpoint must not be overtaken


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
