"""How matrices and all other weights get an optimizer each, under one learning rate schedule."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the backbone's matrices, AdamW for embeddings, head, norms and biases.

    Muon (Jordan et al. 2024) orthogonalises the momentum of a matrix; a small model learns the same in fewer steps.

    Args:
        matrices: weights of two dimensions.
        others: all other weights; they have no weight decay.
        muon_lr, lr: learning rates of the two.
        betas, eps: of AdamW.
        weight_decay: of the matrices.
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
        self.parts = {
            "muon": torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay),
            "adamw": torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=0.0),
        }
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        # The parts have new groups now: a schedule sets the rates of those that it finds here.
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]


def split_parameters(model: PreTrainedModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable matrices of a model without those that hold a row per token or position, and all other weights."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    by_row = embeddings if head is None else embeddings | {head.weight}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim == 2 and parameter not in by_row]
    chosen = set(matrices)
    return matrices, [parameter for parameter in trainable if parameter not in chosen]
