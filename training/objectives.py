"""Objectives: the contribution of every token of a batch to the bound on the negative log-likelihood.

A batch is what [`HierarchicalDataCollator`] returns, with `maskable`, the tokens that the model predicts (see
[`~evaluation.likelihood.with_predicted_tokens`]).
"""

from typing import Any

import torch
import torch.nn.functional as F

from ..configuration_hierbd3lm import HierBD3LMConfig
from ..diffusion_hierbd3lm import draw_mask, exact_nelbo, masked_nll
from ..masking_hierbd3lm import PADDING
from ..order_hierbd3lm import BlockOrder

Batch = dict[str, torch.Tensor]


class BlockDiffusion:
    """The NELBO over noisy blocks that see the clean ones before them.

    Args:
        config: gives the schedule of the noise, the mask token and the order over blocks.
        estimator: see `ESTIMATORS`.
    """

    has_noise = True  # whether two calls of `shares` differ

    def __init__(self, config: HierBD3LMConfig, estimator: str = "stratified"):
        self.config, self.estimator = config, estimator
        self.order = BlockOrder.from_config(config)

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
        return self.order.noise_blocks(batch["block_ids"])

    def token_losses(self, model: Any, batch: Batch, masked: torch.Tensor) -> torch.Tensor:
        """Loss in nats of each masked token: `(num_masked,)`; `masked` is `(batch, length)` or with copies between."""
        layout = {name: batch[name] for name in ("block_ids", "position_ids")}
        if not self.order.is_joint:
            return masked_nll(model, masked, batch["input_ids"], self.config.mask_token_id, **layout)
        # One stream, as no token is clean but the question's: a later block attends to earlier ones as they are.
        copies = 1 if masked.ndim == 2 else masked.shape[1]
        masked, x0 = masked.flatten(0, -2), batch["input_ids"].repeat_interleave(copies, dim=0)
        layout = {name: ids.repeat_interleave(copies, dim=0) for name, ids in layout.items()}
        xt = x0.masked_fill(masked, self.config.mask_token_id)
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
    """The objective of a model's configuration."""
    if BlockOrder.from_config(config).is_causal:
        return Autoregression()
    return BlockDiffusion(config, estimator)
