"""The command line of training: `accelerate launch train.py configs/quickstart.yaml [--setting value ...]`."""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging
from trl import TrlParser

from hierbd3lm.configuration_hierbd3lm import (
    BLOCK_SIZES,
    HierBD3LMConfig,
    add_special_tokens,
    has_one_block_size,
    special_token_ids,
)
from hierbd3lm.data.collator import SEGMENTS, HierarchicalDataCollator
from hierbd3lm.data.splits import SYNTHETIC, DataArguments, encode_split, load_counted_split, training_splits
from hierbd3lm.data.synthetic.config import SyntheticConfig
from hierbd3lm.data.synthetic.wording import vocabulary_texts
from hierbd3lm.data.tokenization import train_tokenizer
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.trainer import HierBD3LMTrainer
from hierbd3lm.training.arguments import HierBD3LMTrainingArguments
from hierbd3lm.training.checkpoints import last_complete_checkpoint
from hierbd3lm.training.lora import AdapterArguments, HierBD3LMAdapter, add_adapter, load_checkpoint, load_tokenizer

# of HierBD3LMConfig, where they are given
CONFIG_FIELDS = ("block_size", "plan_block_size", "execution_block_size", "question_len", "plan_len", "execution_len")
CONFIG_FIELDS += ("noise", "sampling_eps", "plan_clip", "execution_clip", "algorithm", "hierarchical_mask", "joint")

logger = logging.get_logger(__name__)

Examples = dict[
    str, tuple[Dataset | IterableDataset, dict[str, int]]
]  # of each split, with the counts of what loading dropped


@dataclass
class ModelArguments(AdapterArguments):
    """What is trained: an open checkpoint or a new backbone. What is omitted is as in HierBD3LMConfig."""

    init_from: str | None = field(
        default=None,
        metadata={"help": "An autoregressive checkpoint, one of this model, or an adapter of one, to start from."},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Precision of the weights; `bf16` computes in bfloat16 with weights in float32."},
    )
    backbone: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Configuration of a new backbone, as JSON: `model_type` (default qwen3) and its fields."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Path or id of a tokenizer; that of `init_from`, or trained, if omitted."}
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Size of a trained byte-level BPE; every word is a token if omitted."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or flex_attention."})
    algorithm: str | None = field(default=None, metadata={"help": "hier, bd3lm, mdlm, sedd or ar."})
    hierarchical_mask: bool | None = field(
        default=None, metadata={"help": "For `hier`: whether the plan never sees the execution."}
    )
    joint: bool | None = field(
        default=None, metadata={"help": "For `hier`: whether plan and execution are denoised at the same time."}
    )
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Sets both block sizes. Those of mdlm, sedd, ar and joint follow from the segments' lengths."
        },
    )
    plan_block_size: int | None = field(default=None, metadata={"help": "Tokens of a plan block."})
    execution_block_size: int | None = field(default=None, metadata={"help": "Tokens of an execution block."})
    question_len: int | None = field(default=None, metadata={"help": "Most tokens of a question."})
    plan_len: int | None = field(default=None, metadata={"help": "Most tokens of a plan."})
    execution_len: int | None = field(default=None, metadata={"help": "Most tokens of an execution."})
    noise: str | None = field(default=None, metadata={"help": "Noise schedule."})
    sampling_eps: float | None = field(default=None, metadata={"help": "Least mask probability that is drawn."})
    plan_clip: list[float] | None = field(default=None, metadata={"help": "Mask rates of a plan block in training."})
    execution_clip: list[float] | None = field(
        default=None, metadata={"help": "Mask rates of an execution block in training."}
    )

    def __post_init__(self):
        if isinstance(self.backbone, str):
            self.backbone = json.loads(self.backbone)
        if self.backbone is not None and self.init_from is not None:
            raise ValueError(f"`backbone` must be None with `init_from`, but got {self.backbone} and {self.init_from}")
        if self.use_peft and self.init_from is None:
            raise ValueError("`use_peft` must be False without `init_from`, but got True: an adapter needs a base")

    def config_fields(self) -> dict[str, Any]:
        """The fields of HierBD3LMConfig that are given; block sizes only for an algorithm that can have several."""
        values = {name: getattr(self, name) for name in CONFIG_FIELDS}
        given = {name: value for name, value in values.items() if value is not None}
        if has_one_block_size(given):
            unused = {name: given.pop(name) for name in ("block_size", *BLOCK_SIZES) if name in given}
            logger.info(f"Block sizes follow from the algorithm; not used: {unused}")
        return given


@dataclass
class TrainScriptArguments(HierBD3LMTrainingArguments):
    """The trainer's arguments, with a word for the last checkpoint."""

    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "A checkpoint's folder; `last` for the last complete one in output_dir, if there is one."},
    )


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainScriptArguments]:
    """Reads `[config.yaml] [--setting value ...]`; a setting on the command line wins over the file."""
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    parser = TrlParser((ModelArguments, DataArguments, TrainScriptArguments))
    return parser.parse_args_and_config(argv)


def main() -> None:
    """Parses, builds, trains, evaluates, saves."""
    model_args, data_args, args = parse_arguments(sys.argv[1:])
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)
    examples = load_examples(data_args, args)
    tokenizer = make_tokenizer(model_args, data_args, args, examples)
    model = make_model(model_args, tokenizer)
    datasets = make_datasets(data_args, args, examples, tokenizer, model.config)
    trainer = HierBD3LMTrainer(
        model,
        args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        data_collator=HierarchicalDataCollator(
            model.config, tokenizer, fixed_length=data_args.fixed_length, auto_split=data_args.auto_split
        ),
        processing_class=tokenizer,
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    report(trainer, "train", result.metrics)
    if datasets["validation"] is not None:
        report(trainer, "eval", trainer.evaluate())
    save(trainer, data_args)


def find_checkpoint(args: TrainScriptArguments) -> str | None:
    """The checkpoint to resume from, or None to start anew.

    Raises:
        ValueError: if a new run would mix its checkpoints with those of another in `output_dir`.
    """
    last = last_complete_checkpoint(args.output_dir)
    if args.resume_from_checkpoint is None and last is not None:
        raise ValueError(
            f"`output_dir` must hold no checkpoints of another run, but got {args.output_dir} with {last}: give "
            f"`--resume_from_checkpoint last` to go on with it, or another folder"
        )
    return last if args.resume_from_checkpoint == "last" else args.resume_from_checkpoint


def load_examples(data_args: DataArguments, args: TrainScriptArguments) -> Examples:
    """The examples of every split that is trained on, and of validation if there is one."""
    splits = training_splits(data_args) + (["validation"] if data_args.num_validation_examples else [])
    with args.main_process_first(desc="examples"):
        return {split: load_counted_split(data_args, split) for split in splits}


def make_tokenizer(
    model_args: ModelArguments, data_args: DataArguments, args: TrainScriptArguments, examples: Examples
) -> PreTrainedTokenizerBase:
    """The given tokenizer, or one trained on the training split by the first process and kept in `output_dir`."""
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
    """What a tokenizer is trained on: every word of the synthetic problems, or all that is trained on."""
    if data_args.dataset == SYNTHETIC:
        return vocabulary_texts(SyntheticConfig(**data_args.synthetic))
    texts = []
    for split in training_splits(data_args):
        dataset, _ = examples[split]
        if not isinstance(dataset, Dataset):
            raise ValueError("`tokenizer` must be given to train on a stream, which is not read beforehand; got None")
        columns = [column for column in (*SEGMENTS, "text") if column in dataset.column_names]
        texts += [text for column in columns for text in dataset[column]]
    return texts


def make_model(
    model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase
) -> HierBD3LMForBlockDiffusion | HierBD3LMAdapter:
    """A new model, or one that starts from a checkpoint: whole, or frozen under an adapter."""
    fields = model_args.config_fields()
    kwargs = {"dtype": model_args.dtype}
    if model_args.attn_implementation is not None:
        kwargs["attn_implementation"] = model_args.attn_implementation
    if model_args.init_from is None:
        add_special_tokens(tokenizer)
        backbone = dict(model_args.backbone or {}) | {"vocab_size": len(tokenizer)}
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
    """The encoded training and validation examples; what was dropped is written to `output_dir`/data_report.json."""
    datasets, reports = {}, {}
    for split, (dataset, counts) in examples.items():
        with args.main_process_first(desc=f"{split} examples"):
            datasets[split], report = encode_split(dataset, data_args, tokenizer, config)
            reports[split] = counts | report
    if args.process_index == 0:
        os.makedirs(args.output_dir, exist_ok=True)
        Path(args.output_dir, "data_report.json").write_text(json.dumps(reports, indent=2) + "\n")
    first, *others = (datasets[split] for split in training_splits(data_args))
    trained_on = concatenate_datasets([first, *others]) if others else first
    return {"train": trained_on, "validation": datasets.get("validation")}


def report(trainer: HierBD3LMTrainer, split: str, metrics: dict[str, float]) -> None:
    """Prints the metrics and writes them to `output_dir`/{split}_results.json."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def save(trainer: HierBD3LMTrainer, data_args: DataArguments) -> None:
    """Saves what `AutoModel`, `AutoTokenizer` and eval_gsm8k.py load; pushes it where that is asked for."""
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        data_args.save(trainer.args.output_dir)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
