"""How a hierarchical block diffusion model is trained and its likelihood measured: a `Trainer` of the NELBO."""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, unwrap_peft_model
from transformers.utils import is_liger_kernel_available, logging

from .diffusion_hierbd3lm import ESTIMATORS
from .evaluation.likelihood import SEGMENT_NAMES, likelihood_metrics, measure_batch, per_segment, with_predicted_tokens
from .masking_hierbd3lm import PADDING
from .training.clip_search import Candidates, ClipSearch, clipped_segments, draw_losses, measure_costs
from .training.muon import MuonAdamW, split_parameters
from .training.objectives import make_objective

logger = logging.get_logger(__name__)

EMA_FILE = "ema.safetensors"
LOWER_IS_BETTER = ("loss", "nll", "bpd", "ppl")


@dataclass
class HierBD3LMTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the settings of block diffusion, and batches grouped by length."""

    estimator: str = field(
        default="stratified",
        metadata={"help": "Estimator of the NELBO: `stratified` mask counts or `bernoulli` (a time and coins)."},
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Trains the backbone's matrices by Muon at this rate, all else by AdamW; > 0."},
    )
    noisy_copies: int = field(
        default=1,
        metadata={"help": "Noisy copies of each example in a training pass; they share its clean tokens; >= 1."},
    )
    filler_weight: float = field(
        default=1.0,
        metadata={"help": "Weight in the training loss of the <|end|> tokens behind a segment's first; >= 0."},
    )
    clip_search: list[float] | None = field(
        default=None,
        metadata={
            "help": "Widths in (0, 1] of the intervals of mask rates, such as 0.5: every evaluation during training "
            "chooses that of least variance of the loss for each segment. None: the intervals stay as they are."
        },
    )
    clip_search_levels: int = field(
        default=20,
        metadata={"help": "Mask rates that a search measures, a pass each; the intervals start and end between them."},
    )
    ema_decay: float = field(
        default=0.9999,
        metadata={"help": "Decay of the weights' average, used to evaluate and to save; in [0, 1), 0 for none."},
    )
    eval_noise_draws: int = field(
        default=4, metadata={"help": "Draws of the noise for each example of an evaluation; >= 1."}
    )
    eval_seed: int = field(default=0, metadata={"help": "Seed of the noise of every evaluation."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "As in TrainingArguments; grouped by length here."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "As in TrainingArguments; the collator reads columns that the model lacks."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "As in TrainingArguments; a loss that is not finite is shown here."}
    )

    def __post_init__(self):
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(LOWER_IS_BETTER):
            self.greater_is_better = False  # TrainingArguments knows this of names in "loss" only
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
            Candidates(tuple(self.clip_search), self.clip_search_levels)  # raises
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), but got {self.ema_decay}")
        if self.eval_noise_draws < 1:
            raise ValueError(f"`eval_noise_draws` must be >= 1, but got {self.eval_noise_draws}")
        if self.label_smoothing_factor != 0:
            raise ValueError(f"`label_smoothing_factor` must be 0 for a NELBO, but got {self.label_smoothing_factor}")
        if self.dataloader_drop_last:
            raise ValueError("`dataloader_drop_last` must be False, but got True: evaluations would lose examples")
        for name in ("fp16_full_eval", "bf16_full_eval"):
            if getattr(self, name):
                raise ValueError(f"`{name}` must be False, but got True: evaluations use the precision of training")


class EMACallback(TrainerCallback):
    """An exponential moving average of the trainable weights, in float32.

    The decay warms up as min(decay, (1 + n) / (10 + n)) over the updates n, so that early weights are forgotten.
    A checkpoint's model.safetensors holds the average; the weights that training goes on with are beside it.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.num_updates = 0
        self.average: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.global_step == 0:  # a resumed run has read its average already
            self.restart(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        for name, parameter in _trainable(model):
            self.average[name].lerp_(parameter.detach().float(), 1 - decay)

    def restart(self, model: nn.Module) -> None:
        """Takes the model's weights as the average, which warms up anew."""
        self.num_updates = 0
        self.average = {name: parameter.detach().float().clone() for name, parameter in _trainable(model)}

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the context the model has the averaged weights, if there are any yet."""
        if not self.average:
            yield
            return
        trained = {name: parameter.detach().clone() for name, parameter in _trainable(model)}
        _copy_into(model, self.average)
        try:
            yield
        finally:
            _copy_into(model, trained)

    def save(self, model: nn.Module, folder: str, is_writer: bool = True) -> None:
        """Writes the average and the weights it is of, for [`resume`]. Every process that has a shard must call it."""
        weights = {f"average.{name}": tensor for name, tensor in self.average.items()}
        weights |= {f"trained.{name}": parameter.detach() for name, parameter in _trainable(model)}
        tensors = {}
        for name, tensor in weights.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if is_writer:
                tensors[name] = whole.cpu()
        if is_writer:
            save_file(tensors, os.path.join(folder, EMA_FILE), metadata={"num_updates": str(self.num_updates)})

    def resume(self, model: nn.Module, folder: str) -> None:
        """Reads what [`save`] wrote.

        Raises:
            ValueError: for a checkpoint of a run without an average.
        """
        if not has_average(folder):
            raise ValueError(
                f"`ema_decay` must be 0 to resume from {folder}, which has no {EMA_FILE}; got {self.decay}"
            )
        with safe_open(os.path.join(folder, EMA_FILE), framework="pt") as file:
            self.num_updates = int(file.metadata()["num_updates"])
            for name, parameter in _trainable(model):
                self.average[name] = _placed_like(parameter, file.get_tensor(f"average.{name}"))
                parameter.data.copy_(_placed_like(parameter, file.get_tensor(f"trained.{name}")))


class EpochLengthSampler(LengthGroupedSampler):
    """Batches of like lengths, in an order that depends on seed and epoch only.

    The order of its base class depends on all that torch's global generator was used for before: a resumed run would
    repeat some examples of its epoch and miss others, and so would processes whose generators are not in step.

    Args:
        epoch: gives the number of the epoch when its iteration starts.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = _seeded("cpu", self.seed, self.epoch())
        return super().__iter__()


def apply_liger_kernel_to_backbone(model: PreTrainedModel | PeftModel, kernel_config: dict[str, bool]) -> None:
    """Gives the backbone Liger's kernels; transformers would look for some of the whole model, and find none.

    The loss is not Liger's, which takes its gradient in the forward pass, before it is known what a token weighs.

    Args:
        kernel_config: Liger's names of kernels, and whether each is used.

    Raises:
        ImportError: without `liger-kernel`.
        ValueError: for a backbone that Liger has no kernels for, or if its fused loss is asked for.
    """
    backbone = unwrap_peft_model(model).backbone
    if kernel_config.get("fused_linear_cross_entropy"):
        raise ValueError(f"`liger_kernel_config` must be without fused_linear_cross_entropy, but got {kernel_config}")
    if is_liger_kernel_available():
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known

        if backbone.config.model_type not in known:
            raise ValueError(
                f"`use_liger_kernel` must be False for a backbone of type {backbone.config.model_type!r}: Liger has "
                f"kernels for {', '.join(sorted(known))}"
            )
    apply_liger_kernel(backbone, {"fused_linear_cross_entropy": False} | kernel_config)


class HierBD3LMTrainer(Trainer):
    r"""
    Trains a [`HierBD3LMForBlockDiffusion`] on the NELBO and evaluates its likelihood.

    Batches are what [`HierarchicalDataCollator`] returns. The training loss is the sum of the weighted NLLs of the
    masked tokens over the number of counted tokens (`labels != -100`: content and the first `<|end|>` of plan and
    execution) of the whole accumulated batch, in nats per token; `loss_plan` and `loss_execution` are logged beside
    it, per token of their segment. Clip intervals and `filler_weight` apply to this loss alone.

    The noise of a step depends on `seed`, step, micro-batch and rank only, the order of the examples on `data_seed`
    (`seed` if None) and epoch only: a resumed run goes on as it would have.

    Evaluations measure the averaged weights and `save_model` writes them; `model` itself keeps the trained ones.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model: PreTrainedModel, args: HierBD3LMTrainingArguments, **kwargs: Any):
        for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` must be None, but got {kwargs[name]}: the loss and metrics are the NELBO's"
                )
        super().__init__(model=model, args=args, **kwargs)
        if args.use_liger_kernel:
            apply_liger_kernel_to_backbone(model, args.liger_kernel_config or {})
        ranks_of_a_batch = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        if ranks_of_a_batch > 1:
            raise ValueError(
                f"`args` must be of data parallel training, but {ranks_of_a_batch} processes share a batch: each "
                f"would draw noise of its own"
            )
        if args.ema_decay > 0 and (self.is_deepspeed_enabled or self.is_fsdp_enabled != self.accelerator.is_fsdp2):
            raise ValueError(
                f"`ema_decay` must be 0 with DeepSpeed or FSDP1, whose shards cannot be averaged: {args.ema_decay}"
            )
        if args.muon_learning_rate is not None and isinstance(model, PeftModel):
            raise ValueError(
                f"`muon_learning_rate` must be None for an adapter, whose matrices are not the backbone's, but got "
                f"{args.muon_learning_rate}"
            )
        if self.is_fsdp_enabled and any("trainable_tokens" in name for name, _ in model.named_parameters()):
            raise ValueError(
                "`args` must be without FSDP for an adapter with rows of single tokens: peft cannot shard them"
            )
        self.ema = EMACallback(args.ema_decay) if args.ema_decay > 0 else None
        if self.ema is not None:
            self.add_callback(self.ema)
        self.objective = make_objective(model.config, args.estimator)
        if args.noisy_copies > 1 and not self.objective.has_noise:
            raise ValueError(f"`noisy_copies` must be 1 for an objective without noise, but got {args.noisy_copies}")
        if args.clip_search is not None:
            if not self.objective.has_noise:
                raise ValueError(f"`clip_search` must be None without noise, but got {args.clip_search}")
            self.add_callback(ClipSearch(args.clip_search, args.clip_search_levels))
        self._num_micro_batches = 0  # of the update at work
        self._progress = TrainingProgress()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers; Muon for the matrices where `muon_learning_rate` is given."""
        args = self.args
        if args.muon_learning_rate is None or self.optimizer is not None:
            return super().create_optimizer(model)
        betas = args.adam_beta1, args.adam_beta2
        self.optimizer = MuonAdamW(
            *split_parameters(self.model if model is None else model),
            muon_lr=args.muon_learning_rate,
            lr=args.learning_rate,
            betas=betas,
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The training loss of one micro-batch: its share of the accumulated batch's mean over counted tokens."""
        batch = with_predicted_tokens(self._unwrapped(), inputs)
        clip, copies = self._clip_intervals(batch["segment_ids"]), self.args.noisy_copies
        nelbo = self._training_shares(model, batch, self._training_generator(), clip, copies)
        self._progress.add(batch, nelbo)
        if num_items_in_batch is None:  # called by hand: the mean of this batch
            loss = nelbo.sum() / (batch["labels"] != -100).sum()
        else:
            loss = nelbo.sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # DDP averages gradients, the count is over all processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def _training_shares(
        self,
        model: nn.Module,
        batch: dict[str, torch.Tensor],
        generator: torch.Generator,
        clip: torch.Tensor,
        noisy_copies: int = 1,
    ) -> torch.Tensor:
        """Each token's share of the training loss in nats, `(batch, length)`."""
        with self.accelerator.autocast():
            shares = self.objective.shares(model, batch, generator, clip=clip, noisy_copies=noisy_copies)
        filler = (batch["labels"] == -100) & (batch["input_ids"] == self.model.config.end_token_id)
        return torch.where(filler, self.args.filler_weight * shares, shares)

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measures the unclipped, unweighted NELBO with the averaged weights, over `eval_noise_draws` fixed draws.

        Returns:
            `{prefix}_nll` (nats per counted token; a bound: what is behind a segment's first `<|end|>` adds to the
            sum and not to the tokens), `_bpd` (bits per token), `_ppl` and `_num_tokens` for all tokens, and the same
            with `plan_` and `execution_` before the name; `_nll_stderr` over the draws; `_loss`, equal to `_nll`.
        """
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(datasets, dict):
            metrics = {}
            for name, dataset in datasets.items():
                # the Trainer keeps the workers of a dataset of its own under the dataset's name
                dataset = name if eval_dataset is None else dataset
                metrics |= self.evaluate(dataset, metric_key_prefix=f"{metric_key_prefix}_{name}")
            return metrics
        start = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        with self._averaged_weights():
            nats, num_tokens = self._measure(self.get_eval_dataloader(eval_dataset))
        self.model.train(was_training)
        seconds = time.perf_counter() - start
        self._progress.pause(seconds)
        metrics = likelihood_metrics(nats, num_tokens)
        metrics |= {"loss": metrics["nll"], "runtime": seconds, "tokens_per_second": metrics["num_tokens"] / seconds}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self, dataloader: torch.utils.data.DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
        """NELBOs of shape `(draws, segments)` in nats, and counted tokens of shape `(segments,)`, over all ranks."""
        self.callback_handler.eval_dataloader = dataloader
        generator = _seeded(self.args.device, self.args.eval_seed, self.args.process_index)
        rows = []
        for inputs in dataloader:
            batch = with_predicted_tokens(self._unwrapped(), self._prepare_inputs(inputs))
            with self.accelerator.autocast():  # also around a model that no training has prepared yet
                row = measure_batch(self.objective, self.model, batch, self.args.eval_noise_draws, generator)
            # the gathering drops the rows that only even out the last batch
            rows.append(self.accelerator.gather_for_metrics(row).cpu())
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        total = torch.cat(rows).sum(dim=0)
        return total[:-1], total[-1]

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers; an evaluation during training chooses the clip intervals of what follows."""
        metrics = super()._evaluate(*args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ClipSearch):
                self._search_clip(callback)
        return metrics

    @torch.no_grad()
    def _search_clip(self, search: ClipSearch) -> None:
        """Measures the variance of the training loss on the (first) evaluation dataset, and applies the choice."""
        start, was_training, config = time.perf_counter(), self.model.training, self.model.config
        name = next(iter(self.eval_dataset)) if isinstance(self.eval_dataset, dict) else None
        generator = _seeded(self.args.device, self.args.eval_seed, self.args.process_index)
        segments, candidates, variances = clipped_segments(config), search.candidates, []
        self.model.eval()
        for inputs in self.get_eval_dataloader(name):
            batch = with_predicted_tokens(self._unwrapped(), self._prepare_inputs(inputs))
            costs = measure_costs(
                functools.partial(self._training_shares, self.model, batch, generator),
                batch,
                self.objective.noise_blocks(batch),
                list(segments.values()),
                candidates.num_levels,
            )
            variances.append(draw_losses(costs, candidates, self.args.noisy_copies, generator).var(dim=2))
        self.model.train(was_training)
        variance = self.accelerator.reduce(torch.stack(variances).mean(dim=0), reduction="mean")
        logs = search.choose(list(segments), variance)
        search.apply(config)
        self._progress.pause(time.perf_counter() - start)
        self.log(logs)

    def _unwrapped(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    def _clip_intervals(self, segment_ids: torch.Tensor) -> torch.Tensor:
        config = self.model.config
        intervals = torch.tensor([[0.0, 1.0], config.plan_clip, config.execution_clip], device=segment_ids.device)
        return intervals[segment_ids.clamp(min=0)]

    def _training_generator(self) -> torch.Generator:
        step, number = self.state.global_step, self._num_micro_batches
        self._num_micro_batches += 1
        return _seeded(self.args.device, self.args.seed, self.args.process_index, step, number)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of the next update, and the tokens that they count together."""
        if self.state.global_step == self._initial_global_step:
            self._progress = TrainingProgress()
        self._num_micro_batches = 0
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self._groups_by_length(dataset):
            return super()._get_train_sampler(dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochLengthSampler(batch_size, self._lengths(dataset), seed, lambda: int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset: Dataset) -> torch.utils.data.Sampler | None:
        if not self._groups_by_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        # one order for all evaluations, as their noise goes by the places in a batch
        return EpochLengthSampler(
            self.args.eval_batch_size, self._lengths(eval_dataset), self.args.eval_seed, lambda: 0
        )

    def _groups_by_length(self, dataset: Dataset) -> bool:
        return self.args.train_sampling_strategy == "group_by_length" and hasattr(dataset, "__len__")

    def _lengths(self, dataset: Dataset) -> list[int]:
        column, columns = self.args.length_column_name, getattr(dataset, "column_names", [])
        if column not in columns:
            raise ValueError(
                f"a dataset must have the column `{column}` for batches of like lengths, but has {columns}; "
                f"`train_sampling_strategy='random'` needs none"
            )
        return dataset[column][:]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each segment's loss and the throughput to the training logs."""
        if "loss" in logs:
            logs |= self._progress.take(self.accelerator)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the averaged weights."""
        with self._averaged_weights():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the model with the code that it is of, sharded or not."""
        with _of_own_class(self.model):
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Writes what a checkpoint has beside its model: what training goes on with."""
        if self.ema is not None:
            self.ema.save(self.model, output_dir, is_writer=self.args.should_save)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is None and has_average(resume_from_checkpoint):
            raise ValueError(
                f"`ema_decay` must be > 0 to resume from {resume_from_checkpoint}, whose model is an average; got 0"
            )
        if self.ema is not None:
            self.ema.resume(self.model, resume_from_checkpoint)

    def _averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.ema is None else self.ema.applied(self.model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ema is not None:
            self.ema.restart(self.model)


class TrainingProgress:
    """What is logged of training since the last log: each segment's loss and tokens per second."""

    def __init__(self):
        self._reset()

    def add(self, batch: dict[str, torch.Tensor], nelbo: torch.Tensor) -> None:
        """Counts a micro-batch. Nothing is read back from the device before `take`."""
        segment_ids = batch["segment_ids"]
        sums = torch.stack(
            [
                per_segment(nelbo.detach(), segment_ids).sum(dim=0),
                per_segment(batch["labels"] != -100, segment_ids).sum(dim=0),
            ]
        )
        self._sums = sums if self._sums is None else self._sums + sums
        self._num_tokens = self._num_tokens + (segment_ids != PADDING).sum()

    def pause(self, seconds: float) -> None:
        """Leaves time that was not spent on training out of the throughput."""
        self._start += seconds

    def take(self, accelerator: Any) -> dict[str, float]:
        """The figures over all processes; counting starts anew."""
        if self._sums is None:
            return {}
        nats, num_tokens = accelerator.reduce(self._sums).tolist()
        logs = {
            f"loss_{name}": n / d for name, n, d in zip(SEGMENT_NAMES.values(), nats, num_tokens, strict=True) if d
        }
        total = accelerator.reduce(self._num_tokens).item()
        logs["tokens_per_second"] = total / (time.perf_counter() - self._start)
        self._reset()
        return logs

    def _reset(self) -> None:
        self._sums: torch.Tensor | None = None
        self._num_tokens: torch.Tensor | int = 0
        self._start = time.perf_counter()


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The checkpoint to resume from: the latest that was written to its end, or None.

    The Trainer writes trainer_state.json last, so a checkpoint whose file is missing or torn is passed over.
    """
    folders = [
        path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()
    ]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            logger.warning(f"{folder} was not written to its end: an earlier checkpoint is looked for.")
            continue
        return str(folder)
    return None


def has_average(checkpoint: str) -> bool:
    """Whether a checkpoint is of a run with an average of the weights."""
    return os.path.isfile(os.path.join(checkpoint, EMA_FILE))


def _seeded(device: torch.device | str, *key: int) -> torch.Generator:
    """Random numbers that depend on the key alone."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device=device).manual_seed(seed)


def _placed_like(parameter: nn.Parameter, tensor: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device of a parameter, or sharded as that is."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


@contextlib.contextmanager
def _of_own_class(model: nn.Module) -> Iterator[None]:
    """Within the context a model that FSDP2 has sharded is not of the class that torch has derived from its own.

    transformers writes the file of a model's class, and its name as that to load, into a checkpoint.
    """
    sharded = type(model)
    model.__class__ = next(cls for cls in sharded.__mro__ if not issubclass(cls, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _copy_into(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in _trainable(model):
            parameter.copy_(tensors[name])
