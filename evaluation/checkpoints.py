"""Arguments that all evaluation commands share: the checkpoint, and the examples to evaluate it on."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers.utils import logging

from .. import __version__
from ..data.arguments import check_at_least
from ..data.splits import FILE_NAME, SYNTHETIC, DataArguments, load_split
from ..data.text.sets import TEXT_SETS

logger = logging.get_logger(__name__)

NUM_SYNTHETIC = 300  # default maximum number of synthetic problems


@dataclass
class CheckpointArguments:
    """Arguments for the checkpoint, the data and the device of an evaluation."""

    model: str = field(metadata={"help": "Folder or Hub id of a checkpoint or an adapter, with its tokenizer."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "`synthetic`, `gsm8k`, a .json, .jsonl or .txt file, a folder, a dataset on the Hub, or a plain "
            f"text dataset: {', '.join(TEXT_SETS)}. If omitted, the dataset that the checkpoint was trained on."
        },
    )
    split: str = field(
        default="test",
        metadata={
            "help": "train, validation or test; for `synthetic` also ood_longer and ood_wider. A file is `test` only."
        },
    )
    limit: int | None = field(
        default=None,
        metadata={"help": f"Maximum number of examples; defaults to all, or {NUM_SYNTHETIC} for `synthetic`."},
    )
    batch_size: int = field(default=32, metadata={"help": "Batch size."})
    device: str | None = field(default=None, metadata={"help": "Device, such as `cuda:0`; defaults to a GPU, if any."})

    def __post_init__(self):
        for name in ("limit", "batch_size"):
            check_at_least(name, getattr(self, name), 1)
        if self.device is None:
            self.device = default_device()


def default_device() -> str:
    """Return `cuda` if a GPU is available, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_examples(args: CheckpointArguments, text_column: str | None = None) -> tuple[DataArguments, Dataset]:
    """Load the examples to evaluate on, with their data arguments (see [`find_data`])."""
    data_args = find_data(args, text_column)
    limit = NUM_SYNTHETIC if args.limit is None and data_args.dataset == SYNTHETIC else args.limit
    return data_args, load_split(data_args, args.split, limit)


def find_data(args: CheckpointArguments, text_column: str | None = None) -> DataArguments:
    """Return the data arguments of `args.dataset`, or those that the checkpoint was trained on if it is None.

    If the checkpoint was trained on plain text, another dataset is read as plain text too, from `text_column` or from
    the column of that name in training. Evaluation data is never streamed.

    Raises:
        ValueError: for the test split of a file that the checkpoint was trained on, which has no test split.
    """
    if args.dataset in TEXT_SETS:
        return DataArguments(**TEXT_SETS[args.dataset])
    trained_on = replace(DataArguments.load(args.model), streaming=False)
    if args.dataset is None and not Path(args.model, FILE_NAME).is_file():
        logger.warning(f"{args.model} has no {FILE_NAME}. Evaluating on {trained_on.dataset}.")
    if args.dataset not in (None, trained_on.dataset):
        return DataArguments(
            dataset=args.dataset, text_column=text_column or trained_on.text_column, wrap=trained_on.wrap
        )
    if args.split == "test" and Path(trained_on.dataset).is_file():
        raise ValueError(
            f"`split` must be train or validation for {trained_on.dataset}, which {args.model} was trained on, but "
            f"got 'test'; use `--dataset` to evaluate on other examples"
        )
    return trained_on


def versions() -> dict[str, str]:
    """Return the library versions to record with a result."""
    return {
        "hierbd3lm": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
