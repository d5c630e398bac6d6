"""Samplers: which masked tokens of a canvas a denoising step reveals.

A sampler is a small object with two methods. `schedule` draws, before a canvas is denoised, when each token is
revealed; `accept` says, after a forward pass, which of the drafted tokens stay. To write one of your own, subclass
[`Sampler`] and pass an instance to `generate`:

    @dataclass(frozen=True)
    class TopK(Sampler):
        k: int = 2

        def accept(self, candidates, logits, tokens):
            confidence = spread(logits.softmax(dim=-1).amax(dim=-1), candidates, fill=-1.0)
            return candidates & (rank(-confidence) < self.k)

    model.generate(**inputs, sampler=TopK(k=4))
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from .diffusion_hierbd3lm import NoiseSchedule, widest_dtype


@dataclass(frozen=True)
class Sampler:
    """Reveals every candidate; the base of all samplers. The fields of a sampler are settings of its name."""

    def schedule(self, quantiles: torch.DoubleTensor, noise: NoiseSchedule) -> torch.DoubleTensor | None:
        """Draw when each token is revealed, from time 1 to 0.

        Args:
            quantiles (`torch.DoubleTensor` of shape `(rows, width)`): independent and uniform in [0, 1); at
                temperature 0 evenly spaced, from high to low.
            noise: a token is still masked at time t with probability `noise.move_chance(t)`.

        Returns:
            `torch.DoubleTensor` of shape `(rows, width)`: the masked tokens of the latest time are the candidates of
            a step. None if all masked tokens are.
        """
        return None

    def accept(
        self, candidates: torch.BoolTensor, logits: torch.FloatTensor, tokens: torch.LongTensor
    ) -> torch.BoolTensor:
        """Return the candidates whose drafted token stays, `(rows, width)`: at least one in each row that has any.

        Args:
            candidates (`torch.BoolTensor` of shape `(rows, width)`): tokens that may be revealed in this step.
            logits (`torch.FloatTensor` of shape `(num_candidates, vocab_size)`): in row-major order.
            tokens (`torch.LongTensor` of shape `(num_candidates,)`): drafted tokens.
        """
        return candidates


@dataclass(frozen=True)
class FirstHitting(Sampler):
    """One token per step, at random times; exact (Zheng et al. 2024, alg. 1).

    Times are independent, so the next of n masked tokens comes at the latest of n: the first hitting time of their
    equation 7. Only the order of the times matters, as the network is not told the time.
    """

    def schedule(self, quantiles: torch.DoubleTensor, noise: NoiseSchedule) -> torch.DoubleTensor:
        return noise.time(quantiles)


@dataclass(frozen=True)
class Ancestral(Sampler):
    """`num_steps` equal time steps per block (MDLM, section 3.4). A step that reveals nothing costs no pass."""

    num_steps: int = 16

    def schedule(self, quantiles: torch.DoubleTensor, noise: NoiseSchedule) -> torch.DoubleTensor:
        return (noise.time(quantiles) * self.num_steps).ceil() / self.num_steps


@dataclass(frozen=True)
class AdaptiveSampler(Sampler):
    """Reveals the tokens that the model is sure of, by its plain probabilities.

    Args:
        tokens_per_step: minimum number of tokens per step.
        left_to_right: accepts from the left of the block up to the first token that fails the test (as Stern et al.
            2018, section 3), instead of the most confident tokens first.
    """

    tokens_per_step: int = 1
    left_to_right: bool = False

    def accept(
        self, candidates: torch.BoolTensor, logits: torch.FloatTensor, tokens: torch.LongTensor
    ) -> torch.BoolTensor:
        doubt = spread(self.doubt(logits.softmax(dim=-1), tokens), candidates, fill=torch.inf)
        key = (~candidates).long() if self.left_to_right else doubt
        order = key.argsort(dim=1, stable=True)
        sure = self.is_sure(doubt.gather(1, order))
        sure = sure | (torch.arange(sure.shape[1], device=sure.device) < self.tokens_per_step)
        return candidates & torch.zeros_like(candidates).scatter(1, order, sure)

    def doubt(self, probabilities: torch.FloatTensor, tokens: torch.LongTensor) -> torch.FloatTensor:
        """Return what is least for the token that the model is most sure of, `(num_candidates,)`."""
        raise NotImplementedError

    def is_sure(self, doubt: torch.FloatTensor) -> torch.BoolTensor:
        """Return the tokens that pass the test; `doubt`, `(rows, width)`, is in the order of acceptance."""
        raise NotImplementedError


@dataclass(frozen=True)
class Confidence(AdaptiveSampler):
    """Every token whose probability exceeds `threshold`."""

    threshold: float = 0.9

    def doubt(self, probabilities: torch.FloatTensor, tokens: torch.LongTensor) -> torch.FloatTensor:
        return -probabilities.gather(-1, tokens[:, None])[:, 0]

    def is_sure(self, doubt: torch.FloatTensor) -> torch.BoolTensor:
        return (doubt < -self.threshold).cumprod(dim=1).bool()


@dataclass(frozen=True)
class EntropyBound(AdaptiveSampler):
    """The tokens of lowest entropy, as many as keep the sum of the others' entropies within `entropy_bound`, in nats.

    Ben-Hamu et al. 2025, alg. 1: the joint's divergence from the product of marginals is at most the sum of all
    entropies but the largest.
    """

    entropy_bound: float = 0.1

    def doubt(self, probabilities: torch.FloatTensor, tokens: torch.LongTensor) -> torch.FloatTensor:
        return torch.special.entr(probabilities).sum(dim=-1)

    def is_sure(self, doubt: torch.FloatTensor) -> torch.BoolTensor:
        return doubt.cumsum(dim=1) - doubt.cummax(dim=1).values <= self.entropy_bound


SAMPLERS: dict[str, type[Sampler]] = {
    "first_hitting": FirstHitting,
    "ancestral": Ancestral,
    "confidence": Confidence,
    "entropy": EntropyBound,
}


def make_sampler(settings: Any) -> Sampler:
    """Return the sampler that generation settings name, with the settings that it reads."""
    sampler = SAMPLERS[settings.sampler]
    return sampler(**{item.name: getattr(settings, item.name) for item in fields(sampler)})


def spread(values: torch.FloatTensor, candidates: torch.BoolTensor, fill: float) -> torch.FloatTensor:
    """Return the candidates' values at their places, `fill` elsewhere: `(rows, width)`.

    Args:
        values (`torch.FloatTensor` of shape `(num_candidates,)`): in row-major order of `candidates`.
    """
    return torch.full(candidates.shape, fill, dtype=values.dtype, device=values.device).masked_scatter(
        candidates, values
    )


def rank(keys: torch.FloatTensor) -> torch.LongTensor:
    """Return the place of each key in its row, 0 for the least; equal keys as they stand: `(rows, width)`."""
    return keys.argsort(dim=1, stable=True).argsort(dim=1)


def draw_tokens(
    logits: torch.FloatTensor, temperature: float, top_p: float, generator: torch.Generator
) -> torch.LongTensor:
    """Draw one token for each row of `logits` of shape `(num_tokens, vocab_size)`; greedy at temperature 0.

    By the Gumbel-max trick in float64, where the device has it: in float32 the noise is truncated, which lowers the
    temperature unnoticed (Zheng et al. 2024, section 4).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    scores = TemperatureLogitsWarper(float(temperature))(None, logits.to(widest_dtype(logits.device)))
    if top_p < 1:
        scores = TopPLogitsWarper(float(top_p))(None, scores)
    uniform = torch.rand(scores.shape, generator=generator, device=scores.device, dtype=scores.dtype)
    return (scores - torch.log(-torch.log(uniform))).argmax(dim=-1)
