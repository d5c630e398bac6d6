"""Which examples a run trains on, is validated on and is tested on: one setting for training and evaluation."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from .loading import load_reasoning_dataset
from .synthetic import HASH_SPLITS, SyntheticConfig, generate_dataset

SYNTHETIC = "synthetic"
FILE_NAME = "data_config.json"  # beside a checkpoint: what it was trained on


@dataclass
class DataArguments:
    """What a run reads."""

    dataset: str = field(
        default=SYNTHETIC,
        metadata={"help": "`synthetic`, `openai/gsm8k`, a .json or .jsonl file, a folder, or a dataset on the Hub."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset; for GSM8K `main` or `socratic`."}
    )
    synthetic: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of SyntheticConfig, as JSON, for `dataset: synthetic`."}
    )
    dataset_train_split: str | None = field(default="train", metadata={"help": "Name of the training split."})
    dataset_validation_split: str | None = field(
        default=None, metadata={"help": "Name of the validation split; held out of the training split if omitted."}
    )
    dataset_test_split: str | None = field(default="test", metadata={"help": "Name of the test split."})
    num_train_examples: int | None = field(
        default=None, metadata={"help": "The first so many training examples; needed for `dataset: synthetic`."}
    )
    num_validation_examples: int = field(
        default=256, metadata={"help": "Examples that the likelihood is measured on; 0 for no validation."}
    )
    auto_split: bool = field(
        default=False,
        metadata={"help": "Splits examples that are a `text` alone at 25 % and 50 % of their tokens."},
    )
    over_long: str = field(
        default="drop", metadata={"help": "What is done with over-long examples: `drop` (and count) or `raise`."}
    )

    def __post_init__(self):
        self.synthetic = json.loads(self.synthetic) if isinstance(self.synthetic, str) else self.synthetic or {}
        for name, low in (("num_train_examples", 1), ("num_validation_examples", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"`{name}` must be at least {low}, but got {value}")

    def save(self, folder: str) -> None:
        """Writes the arguments beside a checkpoint."""
        Path(folder, FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str) -> "DataArguments":
        """What a checkpoint was trained on; the defaults where the folder does not say."""
        path = Path(folder, FILE_NAME)
        return cls(**json.loads(path.read_text())) if path.is_file() else cls()


def load_split(args: DataArguments, split: str, num_examples: int | None = None) -> Dataset:
    """The examples of one split, with the columns `question`, `plan`, `execution` (or `text`).

    Args:
        split: `train`, `validation` or `test`; for the synthetic problems any split of [`generate_dataset`].
        num_examples: the first so many of the split.

    Raises:
        ValueError: for a split that there is not, for less than one example, and for synthetic problems without a
            number of examples.
    """
    if num_examples is None and split in ("train", "validation"):
        num_examples = getattr(args, f"num_{split}_examples")
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"`num_examples` must be at least 1 for the split {split!r}, but got {num_examples}")
    if args.dataset == SYNTHETIC:
        if num_examples is None:
            raise ValueError(f"`num_examples` must be given for the synthetic problems' split {split!r}, but got None")
        return generate_dataset(split, num_examples, SyntheticConfig(**args.synthetic))
    if split not in HASH_SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(HASH_SPLITS)} for {args.dataset}, but got {split!r}")
    dataset = _load_or_hold_out(args, split)
    return dataset if num_examples is None else dataset.select(range(min(num_examples, len(dataset))))


def _load_or_hold_out(args: DataArguments, split: str) -> Dataset:
    """The split as the dataset has it; else validation is the end of training, and training the rest."""
    if split == "test" or args.dataset_validation_split is not None:
        return _load(args, getattr(args, f"dataset_{split}_split"))
    dataset = _load(args, args.dataset_train_split)
    num_training = len(dataset) - args.num_validation_examples
    if num_training < 1:
        raise ValueError(
            f"`num_validation_examples` must be less than the {len(dataset)} training examples that it is held out "
            f"of, but got {args.num_validation_examples}"
        )
    return dataset.select(range(num_training) if split == "train" else range(num_training, len(dataset)))


def _load(args: DataArguments, split: str | None) -> Dataset:
    if Path(args.dataset).is_file():
        split = None  # a file is one split, whatever it is called
    return load_reasoning_dataset(args.dataset, split, args.dataset_name, auto_split=args.auto_split)
