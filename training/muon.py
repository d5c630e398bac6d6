"""Optimizer that combines Muon for matrices with AdamW for all other weights."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

STACKED_ELEMENTS = 2**22  # maximum number of elements that are orthogonalised at once


class StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon` for many small matrices: matrices of the same shape are orthogonalised together.

    Orthogonalisation runs in bfloat16 as in the parent class, but in float32 on a CPU, where bfloat16 is slow without
    AMX.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = _loss_of(closure)
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                size = max(1, STACKED_ELEMENTS // shape.numel())
                for start in range(0, len(parameters), size):
                    self._step_together(parameters[start : start + size], group)
        return loss

    def _step_together(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update matrices of the same shape."""
        grads = [parameter.grad for parameter in parameters]
        buffers = [self._momentum_buffer(parameter) for parameter in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch.stack(grads).lerp(torch.stack(buffers), group["momentum"])  # Nesterov
        updates = orthogonalize(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = updates.shape[-2:]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        step_size = group["lr"] * math.sqrt(max(1, rows / columns))
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-step_size)

    def _momentum_buffer(self, parameter: nn.Parameter) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        return state["momentum_buffer"]


def _loss_of(closure: Any) -> Any:
    """Return the loss that a closure of `step` computes, or None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def orthogonalize(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> torch.Tensor:
    """Bring all singular values close to 1 by quintic Newton-Schulz iterations (Jordan et al. 2024).

    Args:
        matrices (`torch.Tensor` of shape `(count, rows, columns)`).
        coefficients: a, b, c of the polynomial a s + b s^3 + c s^5 that each step applies to the singular values.
        eps: lower bound of the norm that a matrix is divided by.

    Returns:
        `torch.Tensor` with the shape and dtype of `matrices`.
    """
    a, b, c = coefficients
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # singular values of at most 1
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the backbone's matrices, AdamW for embeddings, head, norms and biases.

    Muon (Jordan et al. 2024) orthogonalises the momentum of a matrix. A small model then needs fewer steps.

    Args:
        matrices: two-dimensional weights.
        others: all other weights, without weight decay.
        muon_lr, lr: learning rates of Muon and of AdamW.
        betas, eps: settings of AdamW.
        weight_decay: weight decay of the matrices.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        muon_lr: float,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.parts = [
            StackedMuon(matrices, lr=muon_lr, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=0.0),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._link_parts()

    def _link_parts(self) -> None:
        """Make both parts use the parameter groups and the state of this optimizer."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = _loss_of(closure)
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._link_parts()


def split_parameters(model: PreTrainedModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split the trainable weights into matrices and others.

    Matrices that hold a row per token or position (embeddings and head) count as others.
    """
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    by_row = embeddings if head is None else embeddings | {head.weight}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim == 2 and parameter not in by_row]
    chosen = set(matrices)
    return matrices, [parameter for parameter in trainable if parameter not in chosen]
