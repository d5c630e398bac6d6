"""Answers to validation problems in the course of a training run."""

from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..settings_hierbd3lm import resolve_settings
from .prompts import make_batches, read_problems
from .runner import answer_batch

EXACT_MATCH = "exact_match"


class AnsweredProblems(TrainerCallback):
    """Strict exact match of answers to the first problems of a dataset.

    Called with a model it answers them as `generate` does by default, and returns the metrics. As a callback it prints
    a line after every evaluation.

    Args:
        dataset: problems; see [`read_problems`]. One whose question does not fit counts as wrong.
        num_problems: largest number of problems to answer.
        batch_size, seed: of the generation.

    Raises:
        ValueError: if the dataset is plain text.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: PreTrainedTokenizerBase,
        config: Any,
        num_problems: int,
        batch_size: int = 32,
        seed: int = 0,
    ):
        if not isinstance(dataset, Dataset) or "question" not in dataset.column_names:
            raise ValueError(
                f"`eval_answers` must be 0 for a validation split of plain text, which is not answered, but got "
                f"{num_problems}"
            )
        self.tokenizer, self.batch_size, self.seed = tokenizer, batch_size, seed
        chosen = dataset.select(range(min(num_problems, len(dataset))))
        self.problems = read_problems(chosen, tokenizer, config, plans_are_given=False)

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Answer the problems; returns `exact_match`, a fraction of all of them."""
        settings = resolve_settings(model.generation_config, {"seed": self.seed})
        num_right = sum(
            answer["exact_match_strict"]
            for problems in make_batches(self.problems, self.batch_size)
            for answer in answer_batch(model, self.tokenizer, problems, settings)
        )
        return {EXACT_MATCH: num_right / len(self.problems)}

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Print a line, in the first process."""
        if state.is_world_process_zero and f"eval_{EXACT_MATCH}" in metrics:
            tqdm.write(
                f"Step {state.global_step:,} of {state.max_steps:,}: {100 * metrics[f'eval_{EXACT_MATCH}']:.1f} % of "
                f"{len(self.problems)} problems right, NELBO {metrics['eval_nll']:.3f} nats per token"
            )
