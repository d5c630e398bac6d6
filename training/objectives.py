"""Training objectives: the contribution of each token of a batch to the bound on the negative log-likelihood.

A batch is the output of [`HierarchicalDataCollator`] with `maskable`, which marks the tokens that the model predicts
(see [`~evaluation.likelihood.with_predicted_tokens`]).
"""

from typing import Any

import torch
import torch.nn.functional as F

from ..configuration_hierbd3lm import HierBD3LMConfig
from ..diffusion_hierbd3lm import draw_mask, exact_nelbo, masked_nll, widest_dtype
from ..masking_hierbd3lm import CLEAN, PADDING, QUESTION, TokenLayout, needed_tokens
from ..order_hierbd3lm import BlockOrder

Batch = dict[str, torch.Tensor]


class BlockDiffusion:
    """NELBO of noisy blocks given the clean blocks before them.

    Args:
        config: configuration with the noise schedule, the mask token and the order over blocks.
        estimator: one of `ESTIMATORS`.
    """

    def __init__(self, config: HierBD3LMConfig, estimator: str = "stratified"):
        self.config, self.estimator = config, estimator
        self.order = BlockOrder.from_config(config)

    @property
    def has_noise(self) -> bool:
        """True if two calls of `token_nelbo` differ. A block of one token is always masked, with a weight of 1."""
        return self.estimator != "stratified" or not self.order.is_token_by_token

    def token_nelbo(
        self,
        model: Any,
        batch: Batch,
        generator: torch.Generator | None = None,
        clip: torch.Tensor | None = None,
        noisy_copies: int = 1,
    ) -> torch.Tensor:
        """Estimate the contribution of each token to the NELBO from one draw of the noise.

        Args:
            generator, clip, noisy_copies: see [`draw_mask`]. Without `clip` the estimate is unbiased.

        Returns:
            `torch.FloatTensor` of shape `(batch, length)`, in nats.
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
        """Compute the NELBO by enumeration of all masks, for blocks of at most 8 tokens.

        Returns:
            `torch.DoubleTensor` of shape `(batch, length)`: the contribution of each token in nats.
        """
        return exact_nelbo(
            lambda masked: self.token_losses(model, batch, masked), self.noise_blocks(batch), batch["maskable"]
        )

    def noise_blocks(self, batch: Batch) -> torch.Tensor:
        """Return block ids such that tokens with the same id share a noise level: `(batch, length)`."""
        return self.order.noise_blocks(batch["block_ids"])

    def pass_lengths(self, batch: Batch, noisy_copies: int = 1) -> torch.Tensor:
        """Return the number of tokens of each example in a pass of `token_nelbo`: `(batch,)`."""
        block_ids = batch["block_ids"]
        if not self.order.has_noisy_stream:
            return noisy_copies * (block_ids != PADDING).sum(dim=1)
        layout = TokenLayout(block_ids, torch.full_like(block_ids, CLEAN), block_ids)
        return needed_tokens(layout).sum(dim=1) + noisy_copies * (block_ids > QUESTION).sum(dim=1)

    def token_losses(self, model: Any, batch: Batch, masked: torch.Tensor) -> torch.Tensor:
        """Return the loss of each masked token in nats.

        Args:
            masked (`torch.BoolTensor` of shape `(batch, length)` or `(batch, noisy_copies, length)`).

        Returns:
            `torch.FloatTensor` of shape `(num_masked,)`.
        """
        names = ("block_ids", "position_ids", "row_ids", "sees")
        layout = {name: batch[name] for name in names if name in batch}
        if self.order.has_noisy_stream:
            return masked_nll(model, masked, batch["input_ids"], self.config.mask_token_id, **layout)
        copies = 1 if masked.ndim == 2 else masked.shape[1]
        masked, x0 = masked.flatten(0, -2), batch["input_ids"].repeat_interleave(copies, dim=0)
        layout = {name: ids.repeat_interleave(copies, dim=0) for name, ids in layout.items()}
        # All are clean if nothing reads a noisy token, else only the question: blocks attend to earlier noisy ones.
        tokens = x0 if self.order.predicts_from_clean else x0.masked_fill(masked, self.config.mask_token_id)
        if self.order.is_shifted:
            masked, x0 = before(masked), before(x0)
        return model(input_ids=tokens, logits_to_keep=masked, target_ids=x0, **layout).nll


class Autoregression:
    """Exact negative log-likelihood by next-token prediction, for orders in which each token sees all before it."""

    has_noise = False

    def token_nelbo(
        self, model: Any, batch: Batch, generator: torch.Generator | None = None, **noise: Any
    ) -> torch.Tensor:
        """Return the negative log-likelihood of each token, `(batch, length)`. Settings of the noise are ignored."""
        predicted, x0 = batch["maskable"], batch["input_ids"]
        nll = model(
            input_ids=x0,
            attention_mask=(batch["segment_ids"] != PADDING).long(),
            position_ids=batch["position_ids"],
            row_ids=batch.get("row_ids"),
            logits_to_keep=before(predicted),
            target_ids=before(x0),
        ).nll
        return nll.new_zeros(x0.shape).masked_scatter(predicted, nll)

    def pass_lengths(self, batch: Batch, noisy_copies: int = 1) -> torch.Tensor:
        """Return the number of tokens of each example in a pass of `token_nelbo`: `(batch,)`."""
        return (batch["segment_ids"] != PADDING).sum(dim=1)

    def exact(self, model: Any, batch: Batch) -> torch.Tensor:
        nelbo = self.token_nelbo(model, batch)
        return nelbo.to(widest_dtype(nelbo.device))


def before(columns: torch.Tensor) -> torch.Tensor:
    """Move every column of `(batch, length)` to the place before it, where its token is predicted."""
    return F.pad(columns[:, 1:], (0, 1))


Objective = BlockDiffusion | Autoregression


def make_objective(config: HierBD3LMConfig, estimator: str = "stratified") -> Objective:
    """Return the objective for a model's configuration."""
    if BlockOrder.from_config(config).is_causal:
        return Autoregression()
    return BlockDiffusion(config, estimator)
