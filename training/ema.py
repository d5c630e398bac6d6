"""Exponential moving average of the weights."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoints import EMA_FILE, has_average


class EMACallback(TrainerCallback):
    """Exponential moving average (EMA) of the trainable weights, in float32.

    The decay warms up as min(decay, (1 + n) / (10 + n)) over the updates n, so that early weights are forgotten.
    A checkpoint's model.safetensors holds the averaged weights; `EMA_FILE` beside it holds the weights that training
    resumes from.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.num_updates = 0
        self.average: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.global_step == 0:  # a resumed run has already loaded its average
            self.restart(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        for name, parameter in _trainable(model):
            self.average[name].lerp_(parameter.detach().float(), 1 - decay)

    def restart(self, model: nn.Module) -> None:
        """Reset the average to the model's weights, and restart the warm-up of the decay."""
        self.num_updates = 0
        self.average = {name: parameter.detach().float().clone() for name, parameter in _trainable(model)}

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Load the averaged weights, if there are any, into the model within the context."""
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
        """Save the average and the trained weights for [`resume`]. Every process that holds a shard must call it."""
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
        """Load what [`save`] wrote.

        Raises:
            ValueError: if the checkpoint has no average.
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


def _placed_like(parameter: nn.Parameter, tensor: torch.Tensor) -> torch.Tensor:
    """Move an unsharded tensor to the device of a parameter, and shard it like the parameter."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _copy_into(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in _trainable(model):
            parameter.copy_(tensors[name])
