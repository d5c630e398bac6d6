"""Cost of generation, compared with greedy `generate()` of the same weights as an autoregressive model.

`python -m hierbd3lm.benchmarks.generation [part ...]`. Random weights, 256 new tokens, block size 16, in float32 on 2
threads; ratios are of medians of interleaved measurements.
"""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from hierbd3lm.cache_hierbd3lm import BlockCache
from hierbd3lm.denoising_hierbd3lm import BlockDenoiser
from hierbd3lm.masking_hierbd3lm import CLEAN, NOISY, TokenLayout
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .measure import Measured, bar, interleaved_medians, measure_parts
from .models import BACKBONE, FIRST_CONTENT_ID, SPECIAL_IDS, make_model

NEW_TOKENS = 256  # a plan of 128 and an execution of 128, including their openers
QUESTION_LEN = 57  # GSM8K's mean


def endless_model(**fields: object) -> HierBD3LMForBlockDiffusion:
    """Make a model that never generates `<|end|>`, so that every answer has its maximum length."""
    model = make_model(**fields).eval()
    bias = torch.zeros(model.config.vocab_size)
    bias[SPECIAL_IDS["end"]] = -1e4
    model.backbone.lm_head.bias = torch.nn.Parameter(bias)
    return model


def questions(batch_size: int, length: int = QUESTION_LEN) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(FIRST_CONTENT_ID, 4096, (batch_size, length), generator=generator)


def autoregressive(model: HierBD3LMForBlockDiffusion, input_ids: torch.Tensor, new_tokens: int) -> Callable[[], Any]:
    """Return greedy `generate()` of transformers with its default cache."""
    mask = torch.ones_like(input_ids)
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
    return lambda: model.backbone.generate(input_ids, attention_mask=mask, **settings)


def measure_samplers(repeats: int) -> Measured:
    """Compare tokens per second, with eager and with compiled steps; the AR model runs eagerly."""
    model = endless_model(question_len=64, plan_len=NEW_TOKENS // 2, execution_len=NEW_TOKENS // 2)
    four = "4 tokens per step"
    samplers = {"first_hitting": {"sampler": "first_hitting"}, four: {"sampler": "ancestral", "num_steps": 4}}
    limits = {(1, "first_hitting"): 0.8, (1, four): 2.5, (8, "first_hitting"): 1.0, (8, four): 2.0}
    bars, details = [], {}
    for batch_size in (1, 8):
        input_ids = questions(batch_size)
        cases = {"ar": autoregressive(model, input_ids, NEW_TOKENS)}
        for name, settings in samplers.items():
            for compiled in (False, True):
                run = functools.partial(model.generate, input_ids, compile_steps=compiled, **settings)
                cases[f"{name}, {'compiled' if compiled else 'eager'}"] = run
        seconds = interleaved_medians(cases, repeats)
        passes = {
            name: int(model.generate(input_ids, **settings).num_forward_passes.max())
            for name, settings in samplers.items()
        }
        details[f"batch {batch_size}"] = seconds | {"passes": passes}
        for case in list(cases)[1:]:
            name = case.rpartition(", ")[0]
            claim = f"batch {batch_size}: tokens/s / AR tokens/s, {case} ({passes[name]} forward passes)"
            bars.append(bar(claim, seconds["ar"] / seconds[case], limits[batch_size, name], False))
        if batch_size == 1:
            claim = "first_hitting: forward passes for 256 tokens"
            bars.append(bar(claim, passes["first_hitting"], NEW_TOKENS + 2, True))
    return bars, details


def measure_context(repeats: int) -> Measured:
    """Compare a denoising step after 4,096 and after 512 cached tokens; the additional attention is timed alone."""
    model = endless_model(question_len=4096, plan_len=64, execution_len=64)
    lengths, cases = (512, 4096), {}
    for length in lengths:
        cache = filled_cache(model, length)
        cases[f"step {length}"] = lambda cache=cache, length=length: denoising_step(model, cache, length)
        query = torch.randn(1, 8, 16, 32)
        keys = torch.randn(1, 8, length + 16, 32)
        cases[f"attention {length}"] = lambda query=query, keys=keys: attention_of_all_layers(query, keys)
    seconds = interleaved_medians(cases, repeats)
    added = seconds["attention 4096"] - seconds["attention 512"]
    ratio = seconds["step 4096"] / (seconds["step 512"] + added)
    return [bar("step at 4,096 cached tokens / (step at 512 + added attention)", ratio, 1.5, True)], seconds


@torch.no_grad()
def filled_cache(model: HierBD3LMForBlockDiffusion, length: int) -> BlockCache:
    """Make a cache with a question of `length` tokens."""
    cache = BlockCache(BACKBONE["num_hidden_layers"], 1, length + 64, length + 64, torch.device("cpu"))
    input_ids, positions = questions(1, length), torch.arange(length)[None]
    blocks = torch.zeros_like(input_ids)
    model.encode(input_ids, TokenLayout(blocks, torch.full_like(blocks, CLEAN), positions), cache)
    cache.commit(blocks, positions, length)
    return cache


@torch.no_grad()
def denoising_step(model: HierBD3LMForBlockDiffusion, cache: BlockCache, length: int) -> None:
    blocks = torch.ones(1, 16, dtype=torch.long)
    layout = TokenLayout(blocks, torch.full_like(blocks, NOISY), length + torch.arange(16)[None])
    model.project(model.encode(torch.full((1, 16), SPECIAL_IDS["mask"]), layout, cache)[:, 0])


@torch.no_grad()
def attention_of_all_layers(query: torch.Tensor, keys: torch.Tensor) -> None:
    mask = torch.ones(1, 1, query.shape[2], keys.shape[2], dtype=torch.bool)
    for _ in range(BACKBONE["num_hidden_layers"]):
        torch.nn.functional.scaled_dot_product_attention(query, keys, keys, attn_mask=mask)


RAGGED_BLOCKS = [2, 4, 8, 16] * 8  # number of execution blocks of each of 32 rows


class EndingDenoiser(BlockDenoiser):
    """Denoiser that generates `<|end|>` in execution block `blocks[i]` of row i."""

    blocks = torch.tensor(RAGGED_BLOCKS)

    def _reveal(self, candidates: torch.BoolTensor, logits: torch.FloatTensor) -> None:
        num_finished = self.schedule.progress.number[:, -1]  # blocks of the execution
        ends = num_finished + 1 >= self.blocks[self.rows.index]
        logits[ends[candidates.nonzero()[:, 0]], SPECIAL_IDS["end"]] = 1e4
        super()._reveal(candidates, logits)


def measure_ragged(repeats: int) -> Measured:
    """Compare a batch of 32 answers of 2 to 16 blocks with batches of 32 answers of equal length."""
    model = endless_model(question_len=64, plan_len=16, execution_len=NEW_TOKENS)
    input_ids, plan_ids = questions(32), torch.full((32, 1), FIRST_CONTENT_ID)

    def run(blocks: list[int]) -> None:
        denoiser = type("Denoiser", (EndingDenoiser,), {"blocks": torch.tensor(blocks)})
        with mock.patch("hierbd3lm.generation_hierbd3lm.BlockDenoiser", denoiser):
            output = model.generate(input_ids, plan_ids=plan_ids, stage="execution", sampler="ancestral", num_steps=4)
        passes = [4 * (number - 1) + 1 for number in blocks]  # the last block has only `<|end|>`
        if output.num_forward_passes.tolist() != passes:
            raise RuntimeError(f"the rows must take {passes} passes, but took {output.num_forward_passes.tolist()}")

    lengths = sorted(set(RAGGED_BLOCKS))
    cases = {f"all {length} blocks": functools.partial(run, [length] * 32) for length in lengths}
    seconds = interleaved_medians({"ragged": functools.partial(run, RAGGED_BLOCKS)} | cases, repeats)
    own = sum(seconds[f"all {length} blocks"] for length in RAGGED_BLOCKS) / 32
    claim = "ragged batch of 32: time / time of its rows in batches of equal length"
    return [bar(claim, seconds["ragged"] / own, 1.3, True)], seconds


PARTS: dict[str, Callable[[], Measured]] = {
    "samplers": lambda: measure_samplers(repeats=3),
    "context": lambda: measure_context(repeats=15),
    "ragged": lambda: measure_ragged(repeats=1),
}


if __name__ == "__main__":
    measure_parts("generation", PARTS, __doc__)
