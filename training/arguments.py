"""Arguments of the trainer."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..diffusion_hierbd3lm import ESTIMATORS
from .clip_search import Candidates

LOWER_IS_BETTER = ("loss", "nll", "bpd", "ppl")


@dataclass
class HierBD3LMTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the settings of block diffusion. Batches are grouped by length."""

    estimator: str = field(
        default="stratified",
        metadata={"help": "Estimator of the NELBO: `stratified` (mask counts) or `bernoulli` (one time per block)."},
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of Muon for the backbone's matrices, > 0; AdamW trains all other weights."},
    )
    noisy_copies: int = field(
        default=1,
        metadata={"help": "Noisy copies of each example in a training step, which share its clean tokens; >= 1."},
    )
    filler_weight: float = field(
        default=1.0,
        metadata={"help": "Weight in the training loss of the <|end|> tokens after a segment's first one; >= 0."},
    )
    clip_search: list[float] | None = field(
        default=None,
        metadata={
            "help": "Widths in (0, 1] of candidate clip intervals, such as 0.5. Every evaluation during training "
            "selects for each segment the interval with the lowest variance of the loss. If None, the intervals of "
            "the model's configuration are used."
        },
    )
    clip_search_levels: int = field(
        default=20,
        metadata={"help": "Bins of mask rates in a clip search, one forward pass each; intervals end at bin edges."},
    )
    ema_decay: float = field(
        default=0.9999,
        metadata={"help": "Decay of the EMA of the weights, which is evaluated and saved; in [0, 1), 0 for none."},
    )
    eval_noise_draws: int = field(default=4, metadata={"help": "Noise draws per example in an evaluation; >= 1."})
    eval_seed: int = field(default=0, metadata={"help": "Random seed of the noise in evaluations."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "See TrainingArguments; grouped by length by default."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "See TrainingArguments; the collator reads columns that the model lacks."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "See TrainingArguments; by default, a NaN or infinite loss is logged."}
    )

    def __post_init__(self):
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(LOWER_IS_BETTER):
            self.greater_is_better = False  # TrainingArguments only does this for names that end in "loss"
        super().__post_init__()
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"`estimator` must be one of {', '.join(ESTIMATORS)}, but got {self.estimator!r}")
        if self.muon_learning_rate is not None and not self.muon_learning_rate > 0:
            raise ValueError(f"`muon_learning_rate` must be > 0 or None, but got {self.muon_learning_rate}")
        if self.noisy_copies < 1:
            raise ValueError(f"`noisy_copies` must be >= 1, but got {self.noisy_copies}")
        if not self.filler_weight >= 0:
            raise ValueError(f"`filler_weight` must be >= 0, but got {self.filler_weight}")
        if self.clip_search is not None:
            Candidates(tuple(self.clip_search), self.clip_search_levels)  # validates both
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), but got {self.ema_decay}")
        if self.eval_noise_draws < 1:
            raise ValueError(f"`eval_noise_draws` must be >= 1, but got {self.eval_noise_draws}")
        if self.label_smoothing_factor != 0:
            raise ValueError(f"`label_smoothing_factor` must be 0 for a NELBO, but got {self.label_smoothing_factor}")
        if self.dataloader_drop_last:
            raise ValueError("`dataloader_drop_last` must be False, but got True: evaluations would drop examples")
        for name in ("fp16_full_eval", "bf16_full_eval"):
            if getattr(self, name):
                raise ValueError(f"`{name}` must be False, but got True: evaluations run in the training precision")
