"""Data arguments and splits, shared by training and evaluation."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..configuration_hierbd3lm import HierBD3LMConfig
from .arguments import check_at_least
from .gsm8k.near_duplicates import NEAR_DUPLICATE, highest_similarities
from .gsm8k.problems import HUB_IDS, load_gsm8k_rows
from .loading import load_documents, load_reasoning_dataset, prepare_dataset
from .synthetic.problems import HASH_SPLITS, SyntheticConfig, generate_dataset
from .text.detokenization import RULES
from .text.rows import TEXT, prepare_text

SYNTHETIC = "synthetic"
FILE_NAME = "data_config.json"  # saved with a checkpoint


@dataclass
class DataArguments:
    """Arguments for the data of a run."""

    dataset: str = field(
        default=SYNTHETIC,
        metadata={
            "help": "`synthetic`, `openai/gsm8k`, a .json or .jsonl file, a .txt file of plain text with one document "
            "per line, a folder, or a dataset on the Hub."
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset; for GSM8K `main` or `socratic`."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a dataset on the Hub."})
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of plain text, for a model without question and plan (`plan_len: 0`); `text` by default "
            "for a .txt file."
        },
    )
    wrap: bool = field(
        default=True,
        metadata={"help": "Plain text: concatenate documents and cut them into rows, else give each its own rows."},
    )
    detokenizer: str | None = field(
        default=None,
        metadata={"help": f"Plain text: detokenization rules, one of {', '.join(RULES)}; none if omitted."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Plain text: stream the training split in its order instead of loading it before training."},
    )
    shuffle_buffer: int = field(
        default=0,
        metadata={"help": "Size, in documents, of the shuffle buffer of a stream; 0 keeps the stream's order."},
    )
    synthetic: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of SyntheticConfig for the synthetic problems, as JSON."}
    )
    num_synthetic_examples: int = field(
        default=0, metadata={"help": "Number of synthetic problems to add to the training split of another dataset."}
    )
    dataset_train_split: str | None = field(default="train", metadata={"help": "Name of the training split."})
    dataset_validation_split: str | None = field(
        default=None, metadata={"help": "Name of the validation split; held out of the training split if omitted."}
    )
    dataset_test_split: str | None = field(default="test", metadata={"help": "Name of the test split."})
    num_train_examples: int | None = field(
        default=None, metadata={"help": "Maximum number of training examples; required for `dataset: synthetic`."}
    )
    num_validation_examples: int = field(
        default=256,
        metadata={"help": "Number of validation examples, or documents of plain text; 0 for no validation."},
    )
    tested_on: str | None = field(
        default=None,
        metadata={
            "help": "Dataset whose test split is used for testing: near-duplicates of its problems are removed from "
            "training and validation. Defaults to GSM8K if `dataset` is GSM8K."
        },
    )
    auto_split: bool = field(
        default=False,
        metadata={"help": "Split examples that have only a `text` at 25 % and 50 % of their tokens."},
    )
    fixed_length: bool = field(
        default=False, metadata={"help": "Pad every segment to its maximum length, not to the longest of the batch."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Number of processes for encoding."})
    over_long: str = field(
        default="drop", metadata={"help": "How to handle over-long examples: `drop` (and count) or `raise`."}
    )

    def __post_init__(self):
        self.synthetic = json.loads(self.synthetic) if isinstance(self.synthetic, str) else self.synthetic or {}
        if self.tested_on is None and self.dataset in HUB_IDS:
            self.tested_on = self.dataset
        if self.text_column is None and self.dataset.endswith(".txt") and not self.auto_split:
            self.text_column = TEXT
        if self.text_column is None:
            for name, default in (("streaming", False), ("detokenizer", None)):
                self._check_default(name, default, "without `text_column`")
        else:
            for name, default in (("auto_split", False), ("num_synthetic_examples", 0), ("tested_on", None)):
                self._check_default(name, default, f"for plain text, `text_column={self.text_column}`")
        if self.detokenizer is not None and self.detokenizer not in RULES:
            raise ValueError(f"`detokenizer` must be one of {', '.join(RULES)}, but got {self.detokenizer!r}")
        if not self.streaming:
            self._check_default("shuffle_buffer", 0, "without `streaming`")
        check_at_least("num_train_examples", self.num_train_examples, 1)
        for name in ("num_validation_examples", "num_synthetic_examples", "shuffle_buffer"):
            check_at_least(name, getattr(self, name), 0)
        if self.dataset == SYNTHETIC and self.num_synthetic_examples:
            raise ValueError(
                f"`num_synthetic_examples` must be 0 for `dataset: synthetic`, but got {self.num_synthetic_examples}"
            )

    def _check_default(self, name: str, default: Any, where: str) -> None:
        if getattr(self, name) != default:
            raise ValueError(f"`{name}` must be {default} {where}, but got {getattr(self, name)!r}")

    def save(self, folder: str) -> None:
        """Save the arguments with a checkpoint."""
        Path(folder, FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str) -> "DataArguments":
        """Load the arguments that a checkpoint was trained with, or the defaults if there is no such file."""
        path = Path(folder, FILE_NAME)
        return cls(**json.loads(path.read_text())) if path.is_file() else cls()


def training_splits(args: DataArguments) -> list[str]:
    """Return the names of the splits for training."""
    return ["train", SYNTHETIC] if args.num_synthetic_examples else ["train"]


def load_split(args: DataArguments, split: str, num_examples: int | None = None) -> Dataset:
    """Return the dataset of [`load_counted_split`]."""
    return load_counted_split(args, split, num_examples)[0]


def load_counted_split(
    args: DataArguments, split: str, num_examples: int | None = None
) -> tuple[Dataset | IterableDataset, dict[str, int]]:
    """Load the examples of one split, with the columns `question`, `plan`, `execution` (or `text`).

    For a stream, the validation split is read into memory; if it is held out of training, it is the stream's start.

    Args:
        split: `train`, `validation` or `test`; `synthetic` for the synthetic problems added to another dataset; for
            `dataset: synthetic` any split of [`generate_dataset`].
        num_examples: maximum number of examples, taken from the start of the split.

    Returns:
        the examples and, for training and validation with `tested_on`, `num_near_test`: the number of problems
        removed as near-duplicates of a test problem (see gsm8k/near_duplicates.py).

    Raises:
        ValueError: for an unknown split, fewer than one example, and synthetic problems without a number of examples.
    """
    if num_examples is None and split in ("train", "validation", SYNTHETIC):
        num_examples = getattr(args, f"num_{split}_examples")
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"`num_examples` must be at least 1 for the split {split!r}, but got {num_examples}")
    if SYNTHETIC in (args.dataset, split):
        if num_examples is None:
            raise ValueError(f"`num_examples` must be given for the synthetic problems' split {split!r}, but got None")
        split = "train" if split == SYNTHETIC else split
        return generate_dataset(split, num_examples, SyntheticConfig(**args.synthetic)), {}
    if split not in HASH_SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(HASH_SPLITS)} for {args.dataset}, but got {split!r}")
    if args.streaming and split != "test":
        return _stream(args, split, num_examples), {}
    dataset, counts = _load_or_hold_out(args, split), {}
    if args.tested_on is not None and split != "test":
        dataset, counts = _without_near_test(dataset, args.tested_on)
    return dataset if num_examples is None else dataset.select(range(min(num_examples, len(dataset)))), counts


def encode_split(
    dataset: Dataset | IterableDataset,
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    config: HierBD3LMConfig,
) -> tuple[Dataset | IterableDataset, dict[str, Any]]:
    """Encode the examples of a split and return them with a report: see [`prepare_text`] and [`prepare_dataset`]."""
    if args.text_column is not None:
        return prepare_text(dataset, tokenizer, config, args.wrap, args.dataset_num_proc)
    return prepare_dataset(
        dataset,
        tokenizer,
        config,
        over_long=args.over_long,
        num_proc=args.dataset_num_proc,
        auto_split=args.auto_split,
    )


def _stream(args: DataArguments, split: str, num_documents: int | None) -> Dataset | IterableDataset:
    has_validation = args.dataset_validation_split is not None
    name = args.dataset_validation_split if split == "validation" and has_validation else args.dataset_train_split
    documents = _load(args, name, streaming=True)
    if split == "train" and not has_validation and args.num_validation_examples:
        documents = documents.skip(args.num_validation_examples)
    if num_documents is not None:
        documents = documents.take(num_documents)
    if split == "train" and args.shuffle_buffer:
        documents = documents.shuffle(seed=0, buffer_size=args.shuffle_buffer)  # the same order in every pass
    return documents if split == "train" else Dataset.from_list(list(documents))


def _load_or_hold_out(args: DataArguments, split: str) -> Dataset:
    """Load a split; without a validation split, hold validation out of the end of the training split."""
    if split == "test" or args.dataset_validation_split is not None:
        return _load(args, getattr(args, f"dataset_{split}_split"))
    dataset = _load(args, args.dataset_train_split)
    num_training = len(dataset) - args.num_validation_examples
    if num_training < 1:
        raise ValueError(
            f"`num_validation_examples` must be less than the number of training examples, {len(dataset)}, but got "
            f"{args.num_validation_examples}"
        )
    return dataset.select(range(num_training) if split == "train" else range(num_training, len(dataset)))


def _without_near_test(dataset: Dataset, tested_on: str) -> tuple[Dataset, dict[str, int]]:
    if "question" not in dataset.column_names:
        raise ValueError(f"`tested_on` must be None for a dataset without questions, but got {tested_on!r}")
    # GSM8K's rows as published: writing its plans takes a while, and they are not needed
    test = load_gsm8k_rows("test") if tested_on in HUB_IDS else _load(DataArguments(dataset=tested_on), "test")
    similarities = highest_similarities(dataset["question"], test["question"])
    kept = [row for row, similarity in enumerate(similarities) if similarity < NEAR_DUPLICATE]
    return dataset.select(kept), {"num_near_test": len(dataset) - len(kept)}


def _load(args: DataArguments, split: str | None, streaming: bool = False) -> Dataset | IterableDataset:
    if Path(args.dataset).is_file():
        split = None  # a file has a single split
    of_hub = {} if args.dataset_revision is None else {"revision": args.dataset_revision}
    if args.text_column is None:
        return load_reasoning_dataset(args.dataset, split, args.dataset_name, auto_split=args.auto_split, **of_hub)
    of_hub |= {"streaming": True} if streaming else {}
    return load_documents(args.dataset, split, args.dataset_name, args.text_column, args.detokenizer, **of_hub)
