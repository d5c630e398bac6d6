"""`Trainer` of hierarchical block diffusion models."""

import contextlib
import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NoReturn

import torch
from huggingface_hub import CommitInfo, run_as_future
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import PushInProgress

from .configuration_hierbd3lm import BLOCK_SIZES
from .evaluation.likelihood import likelihood_metrics, measure_batch, per_segment, with_predicted_tokens
from .hub.card import write_card
from .hub.checkpoints import push_checkpoint, push_run
from .masking_hierbd3lm import PADDING
from .order_hierbd3lm import BlockOrder
from .training.arguments import HierBD3LMTrainingArguments
from .training.block_growth import BlockGrowth, check_schedule, lay_out_blocks, resize_blocks, resized
from .training.checkpoints import has_average, original_class
from .training.checks import check_arguments, check_trainer
from .training.clip_search import ClipSearch, clipped_segments, draw_losses, measure_costs
from .training.ema import EMACallback
from .training.finite import LossCheck, check_weights
from .training.length_sampler import EpochLengthSampler
from .training.liger import apply_liger_kernel_to_backbone
from .training.muon import MuonAdamW, split_parameters
from .training.objectives import make_objective
from .training.packing import assign_rows
from .training.progress import TrainingProgress, without_warning
from .training.resuming import ExampleOrder, check_complete, check_same_model
from .training.seeding import seeded_generator


class HierBD3LMTrainer(Trainer):
    r"""
    Train a [`HierBD3LMForBlockDiffusion`] on the NELBO and evaluate its likelihood.

    Batches are outputs of [`HierarchicalDataCollator`]. The training loss is the sum of the weighted NLLs of the
    masked tokens divided by the number of counted tokens (`labels != -100`: content and the first `<|end|>` of plan
    and execution) of the whole accumulated batch, in nats per token. `loss_plan` and `loss_execution` are logged too,
    per token of their segment. Clip intervals and `filler_weight` apply only to this loss.

    The noise of a step depends only on `seed`, step, micro-batch and rank, the order of the examples only on
    `data_seed` (`seed` if None), total batch size and epoch: a resumed run is identical to an uninterrupted one.

    Evaluations and `save_model` use the averaged weights; `model` itself keeps the trained weights. Clip intervals
    that a search has selected are part of the trainer's state and saved in `trainer_state.json`; the model's
    configuration does not change. With `block_size_schedule` it holds the block size of the last step, and so do
    checkpoints. Evaluations use that block size.

    Every evaluation adds the metrics that `compute_model_metrics` returns for the model with the averaged weights.

    Overridden methods of transformers' `Trainer`:

    - `train`: leave out a warning that does not apply.
    - `create_optimizer`: use Muon for the backbone's matrices if `muon_learning_rate` is set.
    - `compute_loss`: compute the NELBO over noisy copies, in nats per counted token.
    - `predict`, `evaluation_loop`, `prediction_step`: refuse, as there are no predictions.
    - `evaluate`: measure the unclipped NELBO of the averaged weights under fixed noise draws.
    - `_evaluate`: run the search for clip intervals after an evaluation during training.
    - `_run_epoch`: train no further step when a finished run is resumed.
    - `get_batch_samples`: check the losses of the update before, and number the micro-batches of this one, for the
      seed of their noise.
    - `_get_train_sampler`, `_get_eval_sampler`: group batches by length, in an order that resuming does not change.
    - `log`: add the loss of each segment, the throughput, and a block size that changes.
    - `save_model`: save the averaged weights, unless a loss or a weight is NaN or infinite.
    - `_save`: write the model's original class, not the subclass of FSDP2, into a checkpoint.
    - `create_model_card`: write the card from the files of the run.
    - `push_to_hub`, `_push_from_checkpoint`: push the model with its source code and card, in one commit.
    - `_save_optimizer_and_scheduler`: save the trained weights and the average.
    - `_load_from_checkpoint`: load the trained weights and the average of a complete checkpoint of the same model.
    - `_issue_warnings_after_load`: leave out tied weights.
    - `_load_best_model`: restart the average from the best weights.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: HierBD3LMTrainingArguments,
        compute_model_metrics: Callable[[PreTrainedModel], dict[str, float]] | None = None,
        **kwargs: Any,
    ):
        check_arguments(model, kwargs)
        self.compute_model_metrics = compute_model_metrics
        super().__init__(model=model, args=args, **kwargs)
        if args.use_liger_kernel:
            apply_liger_kernel_to_backbone(model, args.liger_kernel_config or {})
        self.block_growth: BlockGrowth | None = None
        self.objective = make_objective(model.config, args.estimator)
        if args.block_size_schedule is not None:
            self._start_block_growth(args.block_size_schedule)
        check_trainer(self)
        self.ema = EMACallback(args.ema_decay) if args.ema_decay > 0 else None
        if self.ema is not None:
            self.add_callback(self.ema)
        if args.clip_search is not None:
            self.add_callback(ClipSearch(args.clip_search, args.clip_search_levels))
        if self.train_dataset is not None:
            self.add_callback(self._example_order())
        self._num_micro_batches = 0  # of the current update
        self._loss_check = LossCheck()
        self._progress = TrainingProgress()

    def _start_block_growth(self, schedule: dict[int | float, int]) -> None:
        """Collate batches for the largest block size, and set the first one; see [`lay_out_blocks`]."""
        config = self.model.config
        check_schedule(schedule, config, self.data_collator)
        self.data_collator = copy.copy(self.data_collator)
        self.data_collator.order = BlockOrder.from_config(resized(config, max(schedule.values())))
        self.block_growth = BlockGrowth(schedule, self._resize_blocks)
        self._resize_blocks(schedule[0])
        self.add_callback(self.block_growth)

    def _resize_blocks(self, block_size: int) -> None:
        """Set the block size of model and objective. Clip intervals that were chosen for another one are dropped."""
        resize_blocks(self.model, block_size)
        self.objective = make_objective(self.model.config, self.args.estimator)
        if self.clip_search is not None:
            self.clip_search.reset()

    def _example_order(self) -> ExampleOrder:
        args, dataset = self.args, self.train_dataset
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size  # of an update
        length = len(dataset) if hasattr(dataset, "__len__") else None
        return ExampleOrder(batch_size, length, self._order_seed(), args.train_sampling_strategy, args.packing)

    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    @property
    def clip_search(self) -> ClipSearch | None:
        """Callback with the state of the clip search; looked up each time, as a resumed run may replace it."""
        searches = (callback for callback in self.callback_handler.callbacks if isinstance(callback, ClipSearch))
        return next(searches, None)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, without a warning about special tokens: they are those of the configuration."""
        with without_warning("transformers.trainer_utils", "The tokenizer has new PAD/BOS/EOS tokens"):
            return super().train(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer: Muon and AdamW if `muon_learning_rate` is set, else the one of `args.optim`."""
        args = self.args
        if args.muon_learning_rate is None or self.optimizer is not None:
            return super().create_optimizer(model)
        self.optimizer = MuonAdamW(
            *split_parameters(self.model if model is None else model),
            muon_lr=args.muon_learning_rate,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
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
        """Compute the training loss of one micro-batch: its contribution to the mean over the counted tokens of the
        accumulated batch.
        """
        batch = self._read_batch(inputs)
        clip = self._clip_intervals(batch["segment_ids"])
        nelbo = self._training_nelbo(model, batch, self._training_generator(), clip, self.args.noisy_copies)
        self._count_progress(batch, nelbo.detach())
        if num_items_in_batch is None:  # called outside of `train`: the mean of this batch
            loss = nelbo.sum() / (batch["labels"] != -100).sum()
        else:
            loss = nelbo.sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:
                # The count is over all processes, and DDP averages the gradients.
                loss = loss * self.accelerator.num_processes
        if self.is_in_train and self.args.stop_if_not_finite:
            self._loss_check.add(self.state.global_step + 1, loss)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _read_batch(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Lay out a collated batch for the present block size, and mark the tokens that the model predicts."""
        model = self._unwrapped()
        if self.block_growth is not None:
            inputs = lay_out_blocks(inputs, model.order, keep_columns=self.data_collator.fixed_length)
        batch = with_predicted_tokens(model, inputs)
        if self.args.packing:
            copies = self.args.noisy_copies if self.objective.has_noise else 1
            lengths = self.objective.pass_lengths(batch, copies)
            rows = assign_rows(lengths.tolist(), model.backbone.config.hidden_size)
            batch["row_ids"] = lengths.new_tensor(rows)
        return batch

    def _count_progress(self, batch: dict[str, torch.Tensor], nelbo: torch.Tensor) -> None:
        segment_ids, counted = batch["segment_ids"], batch["labels"] != -100
        nats, num_counted = (per_segment(column, segment_ids).sum(dim=0) for column in (nelbo, counted))
        self._progress.add(nats, num_counted, (segment_ids != PADDING).sum())

    def _training_nelbo(
        self,
        model: nn.Module,
        batch: dict[str, torch.Tensor],
        generator: torch.Generator,
        clip: torch.Tensor,
        noisy_copies: int = 1,
    ) -> torch.Tensor:
        """Return the contribution of each token to the training loss in nats, `(batch, length)`."""
        noisy_copies = noisy_copies if self.objective.has_noise else 1
        with self.accelerator.autocast():
            nelbo = self.objective.token_nelbo(model, batch, generator, clip=clip, noisy_copies=noisy_copies)
        filler = (batch["labels"] == -100) & (batch["input_ids"] == self.model.config.end_token_id)
        return torch.where(filler, self.args.filler_weight * nelbo, nelbo)

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the unclipped, unweighted NELBO of the averaged weights over `eval_noise_draws` fixed draws.

        Returns:
            `{prefix}_nll` (nats per counted token; an upper bound: tokens after a segment's first `<|end|>` add to
            the sum but are not counted), `_bpd` (bits per token), `_ppl` and `_num_tokens` for all tokens, and the
            same with `plan_` and `execution_` before the name; `_nll_stderr` over the draws; `_loss`, equal to `_nll`.
        """
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(datasets, dict):
            metrics = {}
            for name, dataset in datasets.items():
                # given a name, the Trainer reuses the persistent workers of that dataset
                dataset = name if eval_dataset is None else dataset
                metrics |= self.evaluate(dataset, metric_key_prefix=f"{metric_key_prefix}_{name}")
            return metrics
        start = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        with self._averaged_weights():
            nats, num_tokens = self._measure(self.get_eval_dataloader(eval_dataset))
            seconds, metrics = time.perf_counter() - start, likelihood_metrics(nats, num_tokens)
            if self.compute_model_metrics is not None:
                metrics |= self.compute_model_metrics(self._unwrapped())
        self.model.train(was_training)
        self._progress.pause(time.perf_counter() - start)
        metrics |= {"loss": metrics["nll"], "runtime": seconds, "tokens_per_second": metrics["num_tokens"] / seconds}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise an error: a pass over clean tokens predicts nothing."""
        raise NotImplementedError(
            "`predict` has no meaning for block diffusion: `evaluate(dataset)` measures the likelihood, and "
            "`model.generate` answers questions"
        )

    evaluation_loop = prediction_step = predict

    def _measure(self, dataloader: torch.utils.data.DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over the data of all ranks: NELBOs in nats, `(draws, segments)`, and counted tokens, `(segments,)`."""
        self.callback_handler.eval_dataloader = dataloader
        generator = seeded_generator(self.args.device, self.args.eval_seed, self.args.process_index)
        rows = []
        for inputs in dataloader:
            batch = self._read_batch(self._prepare_inputs(inputs))
            with self.accelerator.autocast():  # needed for a model that `train` has not prepared yet
                row = measure_batch(self.objective, self.model, batch, self.args.eval_noise_draws, generator)
            # drops the rows that pad the last batch
            rows.append(self.accelerator.gather_for_metrics(row).cpu())
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        total = torch.cat(rows).sum(dim=0)
        return total[:-1], total[-1]

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate during training, then select clip intervals for the next steps."""
        metrics = super()._evaluate(*args, **kwargs)
        if self.clip_search is not None and self.objective.has_noise:
            self._search_clip(self.clip_search)
        return metrics

    @torch.no_grad()
    def _search_clip(self, search: ClipSearch) -> None:
        """Select clip intervals by the variance of the training loss on the (first) evaluation dataset."""
        start, was_training = time.perf_counter(), self.model.training
        name = next(iter(self.eval_dataset)) if isinstance(self.eval_dataset, dict) else None
        generator = seeded_generator(self.args.device, self.args.eval_seed, self.args.process_index)
        segments, candidates, variances = clipped_segments(self.model.config), search.candidates, []
        self.model.eval()
        for inputs in self.get_eval_dataloader(name):
            batch = self._read_batch(self._prepare_inputs(inputs))
            costs = measure_costs(
                functools.partial(self._training_nelbo, self.model, batch, generator),
                batch,
                self.objective.noise_blocks(batch),
                list(segments.values()),
                candidates.num_levels,
            )
            variances.append(draw_losses(costs, candidates, self.args.noisy_copies, generator).var(dim=2))
        self.model.train(was_training)
        variance = self.accelerator.reduce(torch.stack(variances).mean(dim=0), reduction="mean")
        logs = search.choose(list(segments), variance)
        self._progress.pause(time.perf_counter() - start)
        self.log(logs)

    def _unwrapped(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    def _clip_intervals(self, segment_ids: torch.Tensor) -> torch.Tensor:
        """Return the clip interval of each token in training: `(batch, length, 2)`."""
        config, search = self.model.config, self.clip_search
        clips = {"plan": config.plan_clip, "execution": config.execution_clip}
        if search is not None:
            clips |= search.segment_intervals()
        intervals = torch.tensor([[0.0, 1.0], clips["plan"], clips["execution"]], device=segment_ids.device)
        return intervals[segment_ids.clamp(min=0)]

    def _training_generator(self) -> torch.Generator:
        step, number = self.state.global_step, self._num_micro_batches
        self._num_micro_batches += 1
        return seeded_generator(self.args.device, self.args.seed, self.args.process_index, step, number)

    @property
    def num_steps_trained(self) -> int:
        """Number of updates of the last call of `train`."""
        return self.state.global_step - self._initial_global_step

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train for an epoch, unless a finished run is resumed."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Return the micro-batches of the next update, and the number of tokens that they count together."""
        self._loss_check.check()
        if self.state.global_step == self._initial_global_step:
            self._progress = TrainingProgress()
        self._num_micro_batches = 0
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self._groups_by_length(dataset):
            return super()._get_train_sampler(dataset)
        args = self.args
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size  # of an update
        lengths = self._lengths(dataset)
        if args.packing and getattr(self.data_collator, "order", self.model.order).has_noisy_stream:
            # a pass holds plan and execution twice
            lengths = [2 * length - len(ids) for length, ids in zip(lengths, dataset["question_ids"], strict=True)]
        return EpochLengthSampler(batch_size, lengths, self._order_seed(), lambda: int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset: Dataset) -> torch.utils.data.Sampler | None:
        if not self._groups_by_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        # the same order in all evaluations, as the noise depends on the position in a batch
        return EpochLengthSampler(
            self.args.eval_batch_size, self._lengths(eval_dataset), self.args.eval_seed, lambda: 0
        )

    def _groups_by_length(self, dataset: Dataset) -> bool:
        return self.args.train_sampling_strategy == "group_by_length" and hasattr(dataset, "__len__")

    def _lengths(self, dataset: Dataset) -> list[int]:
        column, columns = self.args.length_column_name, getattr(dataset, "column_names", [])
        if column not in columns:
            raise ValueError(
                f"a dataset must have the column `{column}` to group batches by length, but has {columns}; use "
                f"`train_sampling_strategy='random'` without it"
            )
        return dataset[column][:]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss of each segment and the throughput to the training logs, and a block size that changes."""
        if "train_loss" in logs and self.num_steps_trained == 0:
            return  # of a finished run
        if "loss" in logs:
            logs |= self._progress.take(self.accelerator)
        if self.block_growth is not None:
            logs = logs | {"block_size": self.block_growth.block_size}
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the averaged weights, unless a loss or a weight is NaN or infinite."""
        if self.args.stop_if_not_finite:
            self._loss_check.check()
            check_weights(self.model)
        with self._averaged_weights():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save the model with its own source code, even if it is sharded."""
        with original_class(self.model):
            super()._save(output_dir, state_dict)

    def create_model_card(self, **metadata: Any) -> None:
        """Write README.md in `output_dir` from the files of the run.

        Args:
            metadata: fields of `huggingface_hub.ModelCardData`, such as `license` and `language`.
        """
        if self.is_world_process_zero():
            folder, offline = self.args.output_dir, not self.args.push_to_hub
            repo_id = getattr(self, "hub_model_id", None)
            write_card(folder, repo_id, local_files_only=offline, state=dataclasses.asdict(self.state), **metadata)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **metadata: Any,
    ) -> CommitInfo | Future | None:
        """Push the model in one commit: weights, source code, tokenizer and card. Arguments as in transformers.

        Args:
            metadata: see [`create_model_card`].
        """
        args, token = self.args, self.args.hub_token if token is None else token
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if getattr(self, "hub_model_id", None) is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**metadata)
        self._finish_current_push()
        revision = args.hub_revision if revision is None else revision
        push = functools.partial(push_run, args.output_dir, self.hub_model_id, commit_message, token, revision)
        return push() if blocking else run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Start to push a checkpoint, unless the push before is not done yet."""
        args, pushing = self.args, self.push_in_progress
        is_busy = pushing is not None and not pushing.is_done()
        if args.hub_strategy == HubStrategy.END or (is_busy and not args.hub_always_push):
            return
        if not self.is_world_process_zero():
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        where = self.hub_model_id, args.hub_strategy, message, args.hub_token, args.hub_revision
        job = push_checkpoint(checkpoint_folder, *where)
        self.push_in_progress = PushInProgress([*pushing.jobs, job] if is_busy else [job])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the state that training resumes from, with the trained weights and their average."""
        if self.ema is not None:
            self.ema.save(self.model, output_dir, is_writer=self.args.should_save)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_complete(resume_from_checkpoint)
        saved = check_same_model(
            resume_from_checkpoint, self._unwrapped().config, () if self.block_growth is None else BLOCK_SIZES
        )
        if self.block_growth is not None:
            self.block_growth.checkpoint_block_size = None if saved is None else saved.execution_block_size
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is None and has_average(resume_from_checkpoint):
            raise ValueError(
                f"`ema_decay` must be > 0 to resume from {resume_from_checkpoint}, which has an average, but got 0"
            )
        if self.ema is not None:
            self.ema.resume(self.model, resume_from_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of missing weights, but not of those that are tied to others."""
        tied = getattr(self._unwrapped(), "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.ema is None else self.ema.applied(self.model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ema is not None:
            self.ema.restart(self.model)
