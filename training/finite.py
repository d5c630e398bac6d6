"""Detection of losses and weights that are NaN or infinite."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

ADVICE = "lower the learning rate, or clip gradients; `stop_if_not_finite: false` continues"


class LossCheck:
    """Check of training losses, delayed by one update so that no update waits for its loss."""

    def __init__(self):
        self._losses: list[tuple[int, torch.Tensor]] = []

    def add(self, update: int, loss: torch.Tensor) -> None:
        """Add the loss of a micro-batch of an update."""
        self._losses.append((update, loss.detach()))

    def check(self) -> None:
        """Check the losses that have been added since the last check.

        Raises:
            FloatingPointError: if one is NaN or infinite.
        """
        losses, self._losses = self._losses, []
        for update, loss in losses:
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the training loss of step {update} is {loss.item()}: {ADVICE}")


def check_weights(model: nn.Module) -> None:
    """Check the trainable weights of a model; if they are sharded, those of this process.

    Raises:
        FloatingPointError: if one is NaN or infinite.
    """
    names, finite = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            names.append(name)
            finite.append(torch.isfinite(local.detach()).all())
    if not finite:
        return
    wrong = [name for name, is_finite in zip(names, torch.stack(finite).tolist(), strict=True) if not is_finite]
    if wrong:
        raise FloatingPointError(
            f"the model is not saved, as {len(wrong)} of {len(names)} weights are NaN or infinite, such as "
            f"{wrong[0]}: {ADVICE}"
        )
