"""Which checkpoint is evaluated on which examples: what every command line of evaluation asks for."""

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

NUM_SYNTHETIC = 300  # problems, unless `--limit` says otherwise


@dataclass
class CheckpointArguments:
    """What is evaluated, on what and where."""

    model: str = field(metadata={"help": "Folder or id of a checkpoint or an adapter, with its tokenizer."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "`synthetic`, `gsm8k`, a .json, .jsonl or .txt file, a folder, a dataset on the Hub, or a set of "
            f"plain text: {', '.join(TEXT_SETS)}; what the checkpoint was trained on if omitted."
        },
    )
    split: str = field(
        default="test",
        metadata={
            "help": "train, validation or test; ood_longer and ood_wider too for `synthetic`. A file is `test`."
        },
    )
    limit: int | None = field(
        default=None,
        metadata={"help": f"The first so many examples; if omitted, all, or {NUM_SYNTHETIC} for `synthetic`."},
    )
    batch_size: int = field(default=32, metadata={"help": "Examples that go through the model together."})
    device: str | None = field(default=None, metadata={"help": "Such as `cpu` or `cuda:0`; a GPU if there is one."})

    def __post_init__(self):
        for name in ("limit", "batch_size"):
            check_at_least(name, getattr(self, name), 1)
        if self.device is None:
            self.device = default_device()


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_examples(args: CheckpointArguments, text_column: str | None = None) -> tuple[DataArguments, Dataset]:
    """The settings of the data (see [`find_data`]), and the examples."""
    data_args = find_data(args, text_column)
    limit = NUM_SYNTHETIC if args.limit is None and data_args.dataset == SYNTHETIC else args.limit
    return data_args, load_split(data_args, args.split, limit)


def find_data(args: CheckpointArguments, text_column: str | None = None) -> DataArguments:
    """What the checkpoint was trained on, unless another dataset is given.

    Another dataset is plain text, in `text_column` or in a column of the same name, if that of training is; never is
    it a stream.

    Raises:
        ValueError: for the test split of a file that the checkpoint was trained on: a file is one split.
    """
    if args.dataset in TEXT_SETS:
        return DataArguments(**TEXT_SETS[args.dataset])
    trained_on = replace(DataArguments.load(args.model), streaming=False)
    if args.dataset is None and not Path(args.model, FILE_NAME).is_file():
        logger.warning(f"{args.model} has no {FILE_NAME}, so that it is evaluated on {trained_on.dataset}")
    if args.dataset not in (None, trained_on.dataset):
        return DataArguments(
            dataset=args.dataset, text_column=text_column or trained_on.text_column, wrap=trained_on.wrap
        )
    if args.split == "test" and Path(trained_on.dataset).is_file():
        raise ValueError(
            f"`split` must be train or validation for {trained_on.dataset}, which {args.model} was trained on, but "
            f"got 'test': give `--dataset` for other examples"
        )
    return trained_on


def versions() -> dict[str, str]:
    """What a result was made with."""
    return {
        "hierbd3lm": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
