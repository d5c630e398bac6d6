"""Command line for training: `accelerate launch train.py configs/quickstart.yaml [--setting value ...]`."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.training.recipes import parse_settings, print_own_help
from hierbd3lm.training.settings import ModelArguments, ObjectiveArguments

if TYPE_CHECKING:
    from hierbd3lm.trainer import HierBD3LMTrainer
    from hierbd3lm.training.arguments import TrainScriptArguments

# function argument -> setting of the command line
FLAGS = {
    "backbone_config": "backbone",
    "model_or_path": "init_from",
    "path_or_hub_id": "dataset",
    "name": "dataset_name",
    "split": "dataset_train_split` or `dataset_validation_split",
}
OTHER_SETTINGS = """The settings of transformers' TrainingArguments are accepted too, such as --output_dir,
--max_steps, --learning_rate, --per_device_train_batch_size, --report_to and --resume_from_checkpoint (a folder, or
`last`): `--help_all` lists them."""


def parse_arguments(
    argv: Sequence[str], prog: str | None = None
) -> tuple[ModelArguments, DataArguments, "TrainScriptArguments"]:
    """Read `[recipe] [--setting value ...]`; see [`~training.recipes.parse_settings`]."""
    if {"-h", "--help"} & set(argv):
        print_own_help((ModelArguments, DataArguments, ObjectiveArguments), prog, OTHER_SETTINGS)

    from hierbd3lm.training.arguments import TrainScriptArguments

    return parse_settings(argv, (ModelArguments, DataArguments, TrainScriptArguments), prog)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse the arguments, build, train, save and evaluate a model."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv, prog)
    try:
        train(*arguments)
    except (ValueError, FileNotFoundError) as error:
        if len(error.args) == 1:
            error.args = (name_flags(str(error)),)
        raise


def name_flags(message: str) -> str:
    """Replace the names of function arguments in an error message by those of command-line settings."""
    return re.sub(r"`(\w+)`", lambda match: f"`{FLAGS.get(match[1], match[1])}`", message)


def train(model_args: ModelArguments, data_args: DataArguments, args: "TrainScriptArguments") -> None:
    """Build, train, save and evaluate a model."""
    from transformers import set_seed

    from hierbd3lm.data.collator import HierarchicalDataCollator
    from hierbd3lm.evaluation.answered_problems import AnsweredProblems
    from hierbd3lm.hub.record import SaveRecord
    from hierbd3lm.trainer import HierBD3LMTrainer
    from hierbd3lm.training.checkpoints import find_checkpoint
    from hierbd3lm.training.preparation import (
        SaveDataArguments,
        load_examples,
        make_datasets,
        make_model,
        make_tokenizer,
        set_largest_block_size,
    )

    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    set_seed(args.seed)
    examples = load_examples(data_args, args)
    tokenizer = make_tokenizer(model_args, data_args, args, examples)
    set_largest_block_size(model_args, args)
    model = make_model(model_args, tokenizer)
    datasets = make_datasets(data_args, args, examples, tokenizer, model.config)
    callbacks, answers = [SaveDataArguments(data_args), SaveRecord(model_args, args)], None
    if args.eval_answers and "validation" in examples:
        problems, _ = examples["validation"]
        of_answers = args.eval_answers, args.per_device_eval_batch_size, args.eval_seed
        answers = AnsweredProblems(problems, tokenizer, model.config, *of_answers)
        callbacks.append(answers)
    trainer = HierBD3LMTrainer(
        model,
        args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        data_collator=HierarchicalDataCollator(
            model.config, tokenizer, fixed_length=data_args.fixed_length, auto_split=data_args.auto_split
        ),
        processing_class=tokenizer,
        callbacks=callbacks,
        compute_model_metrics=answers,
    )
    if trainer.is_world_process_zero():
        data_args.save(args.output_dir)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()  # before the evaluation, in which nothing may lose the model
    if trainer.num_steps_trained:
        report(trainer, "train", result.metrics)
    if datasets["validation"] is not None:
        report(trainer, "eval", trainer.evaluate())
    finish(trainer)


def report(trainer: "HierBD3LMTrainer", split: str, metrics: dict[str, float]) -> None:
    """Print the metrics and write them to `output_dir`/{split}_results.json."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def finish(trainer: "HierBD3LMTrainer") -> None:
    """Save the history of the run, unless the run had ended before, write its card, and push the model if asked."""
    if trainer.num_steps_trained or not Path(trainer.args.output_dir, "trainer_state.json").is_file():
        trainer.save_state()
    trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
