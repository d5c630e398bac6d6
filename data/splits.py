"""Examples of the training, validation and test splits."""

from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..configuration_hierbd3lm import HierBD3LMConfig
from .arguments import GSM8K_IDS, SYNTHETIC, DataArguments
from .counterfactuals import change_gsm8k, change_synthetic, give_plans
from .formats import find_parser
from .gsm8k.near_duplicates import NEAR_DUPLICATE, highest_similarities
from .gsm8k.problems import load_gsm8k_rows
from .loading import is_one_split, load_documents, load_reasoning_dataset, prepare_dataset
from .synthetic.config import HASH_SPLITS, SyntheticConfig
from .synthetic.problems import generate_dataset
from .text.rows import prepare_text


def training_splits(args: DataArguments) -> list[str]:
    """Return the names of the splits that are trained on."""
    return ["train", SYNTHETIC] if args.num_synthetic_examples else ["train"]


def load_split(args: DataArguments, split: str, num_examples: int | None = None) -> Dataset:
    """Load the examples of one split, without the counts of [`load_counted_split`]."""
    return load_counted_split(args, split, num_examples)[0]


def load_counted_split(
    args: DataArguments, split: str, num_examples: int | None = None
) -> tuple[Dataset | IterableDataset, dict[str, int]]:
    """Load the examples of one split, with the columns `question`, `plan`, `execution` (or `text`).

    If validation is held out of a training split, it is the end of a dataset and the start of a stream. The validation
    split of a stream is read into memory.

    Args:
        split: `train`, `validation` or `test`; `synthetic` for the synthetic problems added to another dataset; any
            split of [`generate_dataset`] if the dataset is synthetic.
        num_examples: maximum number of examples, taken from the start.

    Returns:
        the examples, and counts: if `tested_on` is set, for training and validation, `num_near_test`, the number of
        problems removed as near-duplicates of a test problem (see gsm8k/near_duplicates.py).

    Raises:
        ValueError: for an unknown split, fewer than one example, and synthetic problems without `num_examples`.
    """
    setting = "num_examples"
    if num_examples is None and split in ("train", "validation", SYNTHETIC):
        setting = f"num_{split}_examples"
        num_examples = getattr(args, setting)
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"`{setting}` must be at least 1 for the split {split!r}, but got {num_examples}")
    if SYNTHETIC in (args.dataset, split):
        if num_examples is None:
            raise ValueError(f"`{setting}` must be given for the synthetic problems' split {split!r}, but got None")
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


def load_training_split(args: DataArguments, split: str) -> tuple[Dataset | IterableDataset, dict[str, int]]:
    """Load the examples of a split as [`load_counted_split`] does; those that are trained on with given plans.

    See [`give_plans`]: the same rows in every process and every epoch, so that resuming changes nothing.
    """
    dataset, counts = load_counted_split(args, split)
    if split not in training_splits(args):
        return dataset, counts
    config, change = SyntheticConfig(**args.synthetic), None
    if SYNTHETIC in (args.dataset, split):
        change = change_synthetic(config)
    elif args.dataset in GSM8K_IDS and args.counterfactual_plans:
        rows = load_gsm8k_rows(args.dataset_train_split)
        change = change_gsm8k(dict(zip(rows["question"], rows["answer"], strict=True)))
    rates = args.counterfactual_plans if change else 0.0, args.plan_dropout
    dataset, of_plans = give_plans(dataset, change, *rates, seed=f"{split} {config.seed}")
    return dataset, counts | of_plans


def encode_split(
    dataset: Dataset | IterableDataset,
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    config: HierBD3LMConfig,
) -> tuple[Dataset | IterableDataset, dict[str, Any]]:
    """Encode the examples of a split; returns them with the report of [`prepare_text`] or [`prepare_dataset`]."""
    if args.plan_dropout and config.execution_order == "plan":
        raise ValueError(
            f"`plan_dropout` must be 0 for execution_order='plan', whose steps are those of the plan, but got "
            f"{args.plan_dropout}"
        )
    if args.text_column is not None:
        return prepare_text(dataset, tokenizer, config, args.wrap, args.dataset_num_proc)
    return prepare_dataset(
        dataset,
        tokenizer,
        config,
        over_long=args.over_long,
        special_tokens=args.special_tokens,
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
        documents = documents.shuffle(seed=0, buffer_size=args.shuffle_buffer)  # the same whenever it is read
    return documents if split == "train" else Dataset.from_list(list(documents))


def _load_or_hold_out(args: DataArguments, split: str) -> Dataset:
    """Load a split of the dataset; without a validation split, hold out the end of the training split."""
    if split == "test" or args.dataset_validation_split is not None:
        return _load(args, getattr(args, f"dataset_{split}_split"))
    dataset = _load(args, args.dataset_train_split)
    num_training = len(dataset) - args.num_validation_examples
    if num_training < 1:
        raise ValueError(
            f"`num_validation_examples` must be less than the number of training examples {len(dataset)}, from "
            f"which they are held out, but got {args.num_validation_examples}"
        )
    return dataset.select(range(num_training) if split == "train" else range(num_training, len(dataset)))


def _without_near_test(dataset: Dataset, tested_on: str) -> tuple[Dataset, dict[str, int]]:
    if "question" not in dataset.column_names:
        raise ValueError(f"`tested_on` must be None for a dataset without questions, but got {tested_on!r}")
    # GSM8K as published: its plans are not needed here, and writing them takes a while
    test = load_gsm8k_rows("test") if tested_on in GSM8K_IDS else _load(DataArguments(dataset=tested_on), "test")
    similarities = highest_similarities(dataset["question"], test["question"])
    kept = [row for row, similarity in enumerate(similarities) if similarity < NEAR_DUPLICATE]
    return dataset.select(kept), {"num_near_test": len(dataset) - len(kept)}


def _load(args: DataArguments, split: str | None, streaming: bool = False) -> Dataset | IterableDataset:
    if is_one_split(args.dataset):
        split = None  # whatever it is called
    of_hub = {} if args.dataset_revision is None else {"revision": args.dataset_revision}
    if args.text_column is None:
        parse_example = None if args.parse_example is None else find_parser(args.parse_example)
        return load_reasoning_dataset(
            args.dataset, split, args.dataset_name, parse_example, auto_split=args.auto_split, **of_hub
        )
    of_hub |= {"streaming": True} if streaming else {}
    return load_documents(args.dataset, split, args.dataset_name, args.text_column, args.detokenizer, **of_hub)
