"""Training arguments: transformers' `TrainingArguments` with the settings of block diffusion."""

from dataclasses import dataclass, field
from difflib import get_close_matches

from transformers import TrainingArguments

from ..data.arguments import check_at_least
from ..diffusion_hierbd3lm import ESTIMATORS
from .block_growth import read_schedule
from .clip_search import Candidates
from .settings import ObjectiveArguments

SAMPLING_STRATEGIES = ("group_by_length", "random", "sequential", "batch_rebalance")
ADAMW = ("adamw_torch", "adamw_torch_fused")
LOWER_IS_BETTER = ("loss", "nll", "bpd", "ppl")


@dataclass
class HierBD3LMTrainingArguments(ObjectiveArguments, TrainingArguments):
    """`TrainingArguments` with the settings of block diffusion, and batches grouped by length."""

    def __post_init__(self):
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(LOWER_IS_BETTER):
            self.greater_is_better = False  # TrainingArguments knows this of names in "loss" only
        if not hasattr(TrainingArguments, "activation_checkpointing"):  # transformers < 5.23
            self.gradient_checkpointing = bool(self.activation_checkpointing or self.gradient_checkpointing)
        super().__post_init__()
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"`estimator` must be one of {', '.join(ESTIMATORS)}, but got {self.estimator!r}")
        if self.muon_learning_rate is not None and not self.muon_learning_rate > 0:
            raise ValueError(f"`muon_learning_rate` must be > 0 or None, but got {self.muon_learning_rate}")
        self.block_size_schedule = read_schedule(self.block_size_schedule)
        if self.block_size_schedule is not None and self.metric_for_best_model is not None:
            raise ValueError(
                f"`metric_for_best_model` must be None with `block_size_schedule`, as evaluations at different block "
                f"sizes cannot be compared, but got {self.metric_for_best_model!r}; `load_best_model_at_end` and the "
                f"scheduler `reduce_lr_on_plateau` set it to 'loss'"
            )
        check_at_least("noisy_copies", self.noisy_copies, 1)
        if not self.filler_weight >= 0:
            raise ValueError(f"`filler_weight` must be >= 0, but got {self.filler_weight}")
        if self.clip_search is not None:
            self._check_clip_search()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), but got {self.ema_decay}")
        check_at_least("eval_noise_draws", self.eval_noise_draws, 1)
        check_at_least("eval_answers", self.eval_answers, 0)
        if self.label_smoothing_factor != 0:
            raise ValueError(f"`label_smoothing_factor` must be 0 for a NELBO, but got {self.label_smoothing_factor}")
        if self.dataloader_drop_last:
            raise ValueError("`dataloader_drop_last` must be False, but got True: evaluations would lose examples")
        if self.train_sampling_strategy not in SAMPLING_STRATEGIES:
            close = get_close_matches(self.train_sampling_strategy, SAMPLING_STRATEGIES, n=1)
            raise ValueError(
                f"`train_sampling_strategy` must be one of {', '.join(SAMPLING_STRATEGIES)}, but got "
                f"{self.train_sampling_strategy!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        if self.muon_learning_rate is not None:
            self._check_optimizer_settings()
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("`fp16` must be False on a CPU, which would compute in float32, but got True; use `bf16`")
        for name in ("fp16_full_eval", "bf16_full_eval"):
            if getattr(self, name):
                raise ValueError(f"`{name}` must be False, but got True: evaluations use the precision of training")

    def _check_clip_search(self) -> None:
        check_at_least("clip_search_levels", self.clip_search_levels, 1)
        try:
            Candidates(tuple(self.clip_search), self.clip_search_levels)
        except ValueError as error:
            raise ValueError(str(error).replace("`widths`", "`clip_search`")) from None

    def _check_optimizer_settings(self) -> None:
        if self.optim not in ADAMW:
            raise ValueError(
                f"`optim` must be one of {', '.join(ADAMW)} with `muon_learning_rate`, which trains with Muon and "
                f"AdamW, but got {str(self.optim.value)!r}"
            )
        if self.optim_args is not None:
            raise ValueError(f"`optim_args` must be None with `muon_learning_rate`, but got {self.optim_args!r}")


@dataclass
class TrainScriptArguments(HierBD3LMTrainingArguments):
    """Training arguments of the command line, in which `last` stands for the last checkpoint."""

    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a checkpoint, or `last` for the last complete one in output_dir, if there is one."
        },
    )
