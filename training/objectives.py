"""What each algorithm computes from a batch: every token's share of the bound on the negative log-likelihood.

A batch is what [`HierarchicalDataCollator`] returns, with `maskable`, the tokens that the model predicts (see
[`~evaluation.likelihood.with_predicted_tokens`]).
"""

from typing import Any

import torch
import torch.nn.functional as F

from ..configuration_hierbd3lm import HierBD3LMConfig
from ..diffusion_hierbd3lm import draw_mask, exact_nelbo, masked_nll
from ..masking_hierbd3lm import PADDING

Batch = dict[str, torch.Tensor]


class BlockDiffusion:
    """The NELBO over noisy blocks that see the clean ones before them: `hier`, `bd3lm`, `mdlm` and `sedd`.

    Args:
        config: gives the schedule of the noise and the mask token.
        estimator: see `ESTIMATORS`.
    """

    has_noise = True  # whether two calls of `shares` differ

    def __init__(self, config: HierBD3LMConfig, estimator: str = "stratified"):
        self.config, self.estimator = config, estimator

    def shares(
        self,
        model: Any,
        batch: Batch,
        generator: torch.Generator | None = None,
        clip: torch.Tensor | None = None,
        noisy_copies: int = 1,
    ) -> torch.Tensor:
        """Each token's share of one estimate of the batch's bound in nats: `torch.FloatTensor` of `(batch, length)`.

        Args:
            generator, clip, noisy_copies: see [`draw_mask`]; without `clip` the estimate is unbiased.
        """
        config = self.config
        draw = draw_mask(
            self.noise_blocks(batch),
            batch["maskable"],
            clip,
            config.noise,
            self.estimator,
            config.sampling_eps,
            generator,
            noisy_copies,
        )
        losses = self.token_losses(model, batch, draw.masked)
        return draw.weights.masked_scatter(draw.masked, losses * draw.weights[draw.masked]).sum(dim=1)

    def exact(self, model: Any, batch: Batch) -> torch.Tensor:
        """The bound by enumeration of all masks, for blocks of at most 8 tokens: `torch.DoubleTensor`, as `shares`."""
        return exact_nelbo(
            lambda masked: self.token_losses(model, batch, masked), self.noise_blocks(batch), batch["maskable"]
        )

    def noise_blocks(self, batch: Batch) -> torch.Tensor:
        """Ids of the blocks that have a noise level of their own, `(batch, length)`."""
        return batch["block_ids"]

    def token_losses(self, model: Any, batch: Batch, masked: torch.Tensor) -> torch.Tensor:
        """Loss in nats of each masked token: `(num_masked,)`; `masked` is `(batch, length)` or with copies between."""
        layout = {name: batch[name] for name in ("block_ids", "position_ids")}
        return masked_nll(model, masked, batch["input_ids"], self.config.mask_token_id, **layout)


class JointDiffusion(BlockDiffusion):
    """The NELBO of a plan and an execution that share their noise level: no token is clean but the question's."""

    def noise_blocks(self, batch: Batch) -> torch.Tensor:
        return batch["block_ids"].clamp(max=1)

    def token_losses(self, model: Any, batch: Batch, masked: torch.Tensor) -> torch.Tensor:
        copies = 1 if masked.ndim == 2 else masked.shape[1]
        masked = masked.flatten(0, -2)
        x0, block_ids, position_ids = (
            batch[name].repeat_interleave(copies, dim=0) for name in ("input_ids", "block_ids", "position_ids")
        )
        xt = x0.masked_fill(masked, self.config.mask_token_id)
        # One stream: the execution is of a later block, and so attends to the plan as it is, noisy.
        layout = {"block_ids": block_ids, "position_ids": position_ids}
        return model(input_ids=xt, logits_to_keep=masked, target_ids=x0, **layout).nll


class Autoregression:
    """The negative log-likelihood itself, by the next token: `ar`."""

    has_noise = False

    def shares(self, model: Any, batch: Batch, generator: torch.Generator | None = None, **noise: Any) -> torch.Tensor:
        """As in [`BlockDiffusion`]; there is no noise to draw."""
        predicted, x0 = batch["maskable"], batch["input_ids"]
        nll = model(
            input_ids=x0,
            attention_mask=(batch["segment_ids"] != PADDING).long(),
            position_ids=batch["position_ids"],
            logits_to_keep=F.pad(predicted[:, 1:], (0, 1)),  # a token is predicted where the one before it stands
            target_ids=F.pad(x0[:, 1:], (0, 1)),
        ).nll
        return nll.new_zeros(x0.shape).masked_scatter(predicted, nll)

    def exact(self, model: Any, batch: Batch) -> torch.Tensor:
        return self.shares(model, batch).double()


Objective = BlockDiffusion | Autoregression


def make_objective(config: HierBD3LMConfig, estimator: str = "stratified") -> Objective:
    """The objective of a model's algorithm."""
    if config.algorithm == "ar":
        return Autoregression()
    return JointDiffusion(config, estimator) if config.joint else BlockDiffusion(config, estimator)
