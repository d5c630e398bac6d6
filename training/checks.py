"""Arguments that the trainer refuses, with the reason."""

import os
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import Trainer

OF_THE_NELBO = "loss and metrics are computed from the NELBO"
REFUSED = {  # arguments of transformers' Trainer
    "compute_metrics": OF_THE_NELBO,
    "compute_loss_func": OF_THE_NELBO,
    "preprocess_logits_for_metrics": OF_THE_NELBO,
    "model_init": "order, objective and average are those of one model; give `model`",
}


def check_arguments(model: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise a ValueError for an argument that is not supported, or without a model."""
    for name, reason in REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"`{name}` must be None, but got {kwargs[name]}: {reason}")
    if model is None:
        raise ValueError("`model` must be a model, but got None")


def check_trainer(trainer: Trainer) -> None:
    """Raise a ValueError if settings, model and data of a trainer do not fit together."""
    check_parallelism(trainer)
    check_optimizer(trainer)
    check_noise(trainer)
    check_packing(trainer)
    check_datasets(trainer)


def check_parallelism(trainer: Trainer) -> None:
    """Refuse processes that share a batch or an average, and single embedding rows with FSDP."""
    args = trainer.args
    ranks_of_a_batch = trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size()
    if ranks_of_a_batch > 1:
        raise ValueError(
            f"`parallelism_config` must be of data parallelism only, but {ranks_of_a_batch} processes share a batch: "
            f"each would draw its own noise"
        )
    if args.ema_decay > 0 and (
        trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled != trainer.accelerator.is_fsdp2
    ):
        raise ValueError(
            f"`ema_decay` must be 0 with DeepSpeed or FSDP1, whose shards cannot be averaged, but got {args.ema_decay}"
        )
    if trainer.compute_model_metrics is not None and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        raise ValueError(
            f"`compute_model_metrics` must be None with DeepSpeed and FSDP, whose shards cannot generate, but got "
            f"{trainer.compute_model_metrics}; `eval_answers` sets it"
        )
    if args.push_to_hub and isinstance(trainer.model, PeftModel):
        base = trainer.model.active_peft_config.base_model_name_or_path
        if base is None or os.path.isdir(base):
            raise ValueError(
                f"`push_to_hub` must be False for an adapter whose base is on this machine, but that is {base}: "
                "nobody else could load it. Push the base, and start from its id on the Hub"
            )
    if trainer.is_fsdp_enabled and any("trainable_tokens" in name for name, _ in trainer.model.named_parameters()):
        raise ValueError(
            f"`fsdp` must be off for an adapter that trains single embedding rows, which peft cannot shard, but got "
            f"{args.fsdp}"
        )


def check_optimizer(trainer: Trainer) -> None:
    """Refuse Muon where it would be ignored, or has no weights."""
    rate = trainer.args.muon_learning_rate
    if rate is None:
        return
    if isinstance(trainer.model, PeftModel):
        raise ValueError(
            f"`muon_learning_rate` must be None for an adapter, which does not train the backbone's matrices, but got "
            f"{rate}"
        )
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError(f"`muon_learning_rate` must be None if an optimizer is given, but got {rate}")


def check_noise(trainer: Any) -> None:
    """Refuse settings of the noise for an objective without noise."""
    args = trainer.args
    if trainer.objective.has_noise or trainer.block_growth is not None:
        return
    if args.noisy_copies > 1:
        raise ValueError(f"`noisy_copies` must be 1 for an objective without noise, but got {args.noisy_copies}")
    if args.clip_search is not None:
        raise ValueError(f"`clip_search` must be None for an objective without noise, but got {args.clip_search}")


def check_packing(trainer: Trainer) -> None:
    """Refuse packing of segments that are padded to fixed lengths."""
    if trainer.args.packing and getattr(trainer.data_collator, "fixed_length", False):
        raise ValueError("`packing` must be False with `fixed_length`, whose padding it would remove, but got True")


def check_datasets(trainer: Trainer) -> None:
    """Refuse datasets without examples."""
    of_evaluation = trainer.eval_dataset
    datasets = of_evaluation if isinstance(of_evaluation, dict) else {"eval_dataset": of_evaluation}
    for name, dataset in ({"train_dataset": trainer.train_dataset} | datasets).items():
        if dataset is not None and hasattr(dataset, "__len__") and len(dataset) == 0:
            raise ValueError(f"`{name}` must have at least one example, but has none")
