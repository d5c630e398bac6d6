"""The command line of reinforcement learning: `hierbd3lm grpo [recipe] [--setting value ...]`."""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.rl.settings import PolicyArguments, RolloutArguments
from hierbd3lm.training.recipes import GRPO_FOLDER, parse_settings, print_own_help

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
    from hierbd3lm.rl.grpo import HierBD3LMGRPOConfig, HierBD3LMGRPOTrainer

RECORDED = (*(item.name for item in fields(RolloutArguments)), "temperature", "beta", "epsilon", "num_iterations")
OTHER_SETTINGS = """The settings of TRL's GRPOConfig are accepted too, such as --output_dir, --max_steps,
--learning_rate, --temperature, --beta and --resume_from_checkpoint (a folder, or `last`): `--help_all` lists them."""


def parse_arguments(
    argv: Sequence[str], prog: str | None = None
) -> tuple[PolicyArguments, DataArguments, "HierBD3LMGRPOConfig"]:
    """Read `[recipe] [--setting value ...]`; see [`~training.recipes.parse_settings`]."""
    if {"-h", "--help"} & set(argv):
        print_own_help((PolicyArguments, DataArguments, RolloutArguments), prog, OTHER_SETTINGS, GRPO_FOLDER)

    from hierbd3lm.rl.grpo import HierBD3LMGRPOConfig

    return parse_settings(argv, (PolicyArguments, DataArguments, HierBD3LMGRPOConfig), prog, GRPO_FOLDER)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Load a model and problems, train with GRPO, and save the model."""
    train(*parse_arguments(sys.argv[1:] if argv is None else argv, prog))


def train(
    policy_args: PolicyArguments,
    data_args: DataArguments,
    args: "HierBD3LMGRPOConfig",
    callbacks: Sequence["TrainerCallback"] = (),
) -> None:
    """Load a model and problems, train with GRPO, and save the model."""
    from hierbd3lm.training.checkpoints import find_checkpoint

    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    trainer = make_trainer(policy_args, data_args, args, callbacks)
    if trainer.is_world_process_zero():
        data_args.save(args.output_dir)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.create_model_card()


def make_trainer(
    policy_args: PolicyArguments,
    data_args: DataArguments,
    args: "HierBD3LMGRPOConfig",
    callbacks: Sequence["TrainerCallback"] = (),
) -> "HierBD3LMGRPOTrainer":
    """Load a model and problems, and return their trainer."""
    from hierbd3lm.data.splits import load_split
    from hierbd3lm.hub.record import SaveRecord
    from hierbd3lm.rl.grpo import HierBD3LMGRPOTrainer
    from hierbd3lm.training.lora import add_adapter, load_checkpoint, load_tokenizer
    from hierbd3lm.training.preparation import SaveDataArguments

    rewards = [find_reward(name) for name in policy_args.rewards]
    tokenizer = load_tokenizer(policy_args.init_from)
    fields_of_config = {} if policy_args.block_size is None else {"block_size": policy_args.block_size}
    model = load_checkpoint(policy_args.init_from, tokenizer, fields_of_config)
    dataset = make_prompts(load_split(data_args, "train"), tokenizer, model.config)
    if policy_args.use_peft:
        model = add_adapter(model, policy_args.init_from, policy_args)
    recorded = {"method": "GRPO"} | {name: getattr(args, name) for name in RECORDED}
    recorded["rewards"] = ", ".join(policy_args.rewards)
    return HierBD3LMGRPOTrainer(
        model,
        rewards,
        args,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[SaveDataArguments(data_args), SaveRecord(policy_args, args, recorded), *callbacks],
    )


def make_prompts(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", config: "HierBD3LMConfig") -> "Dataset":
    """Return the questions that the model accepts as `prompt`, with their `answer`, and print how many were dropped.

    Raises:
        ValueError: if none is left.
    """
    from hierbd3lm.data.gsm8k.answers import reference_answer
    from hierbd3lm.evaluation.prompts import encode_prompt

    rows = [
        {"prompt": row["question"], "answer": reference_answer(row["execution"])}
        for row in dataset
        if encode_prompt(0, row["question"], None, tokenizer, config).is_answered
    ]
    print(f"{len(rows):,} problems; dropped, as the model does not accept the question: {len(dataset) - len(rows):,}")
    if not rows:
        raise ValueError(
            f"`dataset` must have questions of at most question_len={config.question_len} tokens; got none"
        )
    return type(dataset).from_list(rows)


def find_reward(name: str) -> Callable:
    """Return a reward function of [`~rl.rewards`], or another one by `module:function`.

    Raises:
        ValueError: if there is none of this name.
    """
    from hierbd3lm.rl.rewards import REWARDS

    module, colon, function = name.partition(":")
    if not colon:
        if name not in REWARDS:
            raise ValueError(f"`rewards` must be among {', '.join(REWARDS)}, or `module:function`, but got {name!r}")
        return REWARDS[name]
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`rewards` must name functions that can be imported, but got {name!r}: {error}") from error


if __name__ == "__main__":
    main()
