"""Preparation of a training run: examples, tokenizer, model and encoded datasets."""

import json
import os
from pathlib import Path

from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..backbones_hierbd3lm import add_special_tokens, special_token_ids, vocabulary_size
from ..configuration_hierbd3lm import BLOCK_SIZES, HierBD3LMConfig, has_one_block_size
from ..data.arguments import SYNTHETIC, DataArguments
from ..data.collator import SEGMENTS
from ..data.decoding import count_lost_answers
from ..data.splits import encode_split, load_training_split, training_splits
from ..data.synthetic.config import SyntheticConfig
from ..data.synthetic.wording import vocabulary_texts
from ..data.tokenization import train_tokenizer
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from .arguments import TrainScriptArguments
from .lora import HierBD3LMAdapter, add_adapter, load_checkpoint, load_tokenizer
from .settings import ModelArguments

logger = logging.get_logger(__name__)

NUM_CHECKED_ANSWERS = 200  # of each split, for answers that the tokenizer loses
# split -> its examples, and numbers of examples that were dropped
Examples = dict[str, tuple[Dataset | IterableDataset, dict[str, int]]]


def load_examples(data_args: DataArguments, args: TrainScriptArguments) -> Examples:
    """Load the examples of the training splits and of the validation split, if there is one."""
    splits = training_splits(data_args) + (["validation"] if data_args.num_validation_examples else [])
    with args.main_process_first(desc="examples"):
        return {split: load_training_split(data_args, split) for split in splits}


def make_tokenizer(
    model_args: ModelArguments, data_args: DataArguments, args: TrainScriptArguments, examples: Examples
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or train one on the training split in the first process and save it in `output_dir`."""
    if model_args.tokenizer is not None:
        return AutoTokenizer.from_pretrained(model_args.tokenizer)
    if model_args.init_from is not None:
        return load_tokenizer(model_args.init_from)
    folder = Path(args.output_dir, "tokenizer")
    with args.main_process_first(desc="tokenizer"):
        if args.process_index == 0 and not (args.resume_from_checkpoint and folder.is_dir()):
            train_tokenizer(training_texts(data_args, examples), model_args.vocab_size).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def training_texts(data_args: DataArguments, examples: Examples) -> list[str]:
    """Return the texts that a tokenizer is trained on: all words of the synthetic problems, or the training split."""
    if data_args.dataset == SYNTHETIC:
        return vocabulary_texts(SyntheticConfig(**data_args.synthetic))
    texts = []
    for split in training_splits(data_args):
        dataset, _ = examples[split]
        if not isinstance(dataset, Dataset):
            raise ValueError("`tokenizer` must be given to train on a stream, which is not read beforehand; got None")
        columns = [column for column in (*SEGMENTS, "text") if column in dataset.column_names]
        texts += [text for column in columns for text in dataset[column] if text is not None]  # a plan may be None
    return texts


def set_largest_block_size(model_args: ModelArguments, args: TrainScriptArguments) -> None:
    """Give the model the largest block size of `block_size_schedule`, for which examples are encoded, in place.

    The schedule is ignored for a model with only one possible block size, as `block_size` is.

    Raises:
        ValueError: if another block size is given.
    """
    schedule = args.block_size_schedule
    if schedule is not None and has_one_block_size(vars(model_args)):
        logger.info(f"The model has one possible block size; ignored: `block_size_schedule` {schedule}")
        schedule = args.block_size_schedule = None
    if schedule is None:
        return
    largest = max(schedule.values())
    for name in ("block_size", *BLOCK_SIZES):
        if getattr(model_args, name) not in (None, largest):
            raise ValueError(
                f"`{name}` must be omitted or {largest}, the largest block size of `block_size_schedule`, but got "
                f"{getattr(model_args, name)}; `--block_size_schedule null` trains with one block size"
            )
    model_args.block_size = largest


def make_model(
    model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase
) -> HierBD3LMForBlockDiffusion | HierBD3LMAdapter:
    """Make a new model, or load a checkpoint: to train all of its weights, or an adapter."""
    fields = model_args.config_fields()
    kwargs = {"dtype": model_args.dtype}
    if model_args.attn_implementation is not None:
        kwargs["attn_implementation"] = model_args.attn_implementation
    if model_args.init_from is None:
        add_special_tokens(tokenizer)
        backbone = dict(model_args.backbone or {}) | {"vocab_size": vocabulary_size(tokenizer)}
        config = HierBD3LMConfig(backbone_config=backbone, **(special_token_ids(tokenizer) | fields))
        return HierBD3LMForBlockDiffusion._from_config(config, **kwargs)
    model = load_checkpoint(model_args.init_from, tokenizer, fields, **kwargs)
    return add_adapter(model, model_args.init_from, model_args) if model_args.use_peft else model


def make_datasets(
    data_args: DataArguments,
    args: TrainScriptArguments,
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    config: HierBD3LMConfig,
) -> dict[str, Dataset | IterableDataset | None]:
    """Encode the training and validation examples, and report dropped ones in `output_dir`/data_report.json.

    Raises:
        ValueError: if no example of training or of validation is left.
    """
    datasets, reports = {}, {}
    for split, (dataset, counts) in examples.items():
        with args.main_process_first(desc=f"{split} examples"):
            datasets[split], report = encode_split(dataset, data_args, tokenizer, config)
            if "execution" in (dataset.column_names or ()):
                report["num_lost_answers"] = count_lost_answers(dataset[:NUM_CHECKED_ANSWERS]["execution"], tokenizer)
            reports[split] = counts | report
    if args.process_index == 0:
        os.makedirs(args.output_dir, exist_ok=True)
        Path(args.output_dir, "data_report.json").write_text(json.dumps(reports, indent=2) + "\n")
    first, *others = (datasets[split] for split in training_splits(data_args))
    trained_on = concatenate_datasets([first, *others]) if others else first
    chosen = {"train": trained_on, "validation": datasets.get("validation")}
    for split, dataset in chosen.items():
        if dataset is not None and next(iter(dataset), None) is None:
            lengths = {name: getattr(config, name) for name in ("question_len", "plan_len", "execution_len")}
            raise ValueError(
                f"the {split} split must have at least one example that fits {lengths}, but none of them is left: "
                f"{reports[split]}"
            )
    return chosen


class SaveDataArguments(TrainerCallback):
    """Save the data arguments with each checkpoint, so that it can be evaluated like the finished run."""

    def __init__(self, data_args: DataArguments):
        self.data_args = data_args

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.is_world_process_zero:
            self.data_args.save(os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))
