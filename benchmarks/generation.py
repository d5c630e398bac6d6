"""Cost of generation, compared with greedy `generate()` of the same weights as an autoregressive model.

`python -m hierbd3lm.benchmarks.generation [part ...]`. Random weights, on 2 threads; ratios are of medians of
interleaved measurements. The parts `smollm2_...` and `qwen3_...`, one for each precision and batch size, have the
shapes of SmolLM2-135M and of Qwen3-0.6B, converted as an open checkpoint is; `samplers` has 8 layers of size 256, in
float32. Eager generation is compared with eager generation, compiled with compiled: there the AR model has
transformers' static cache and compiled step.
"""

import functools
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from transformers import CompileConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hierbd3lm.cache_hierbd3lm import BlockCache, grouped_attention
from hierbd3lm.denoising_hierbd3lm import BlockDenoiser
from hierbd3lm.masking_hierbd3lm import CLEAN, NOISY, TokenLayout
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .measure import Measured, added_memory, bar, interleaved_medians, interleaved_seconds, measure_parts, ratio_bar
from .models import BACKBONE, FIRST_CONTENT_ID, QWEN3, SMOLLM2, SPECIAL_IDS, make_model

NEW_TOKENS = 256  # a plan of 128 and an execution of 128, including their openers
QUESTION_LEN = 57  # GSM8K's mean
ONE, FOUR = "1 token per step", "4 tokens per step"
SAMPLERS = {ONE: {"sampler": "first_hitting"}, FOUR: {"sampler": "ancestral", "num_steps": 4}}
CONVERTED = {"prediction": "shifted", "question_attention": "causal"}
# (batch size, what) -> target
SMALL_TARGETS = {(1, ONE): 0.8, (1, FOUR): 2.5, (8, ONE): 1.0, (8, FOUR): 2.0}
TARGETS = {(1, ONE): 0.9, (1, FOUR): 3.6, (8, ONE): 0.75, (8, FOUR): 2.5}
MOST_OF_A_PASS = 1.15  # of an AR step, at batch size 1
MOST_OUTSIDE = 0.1


def endless_model(backbone: dict[str, Any] = BACKBONE, **fields: object) -> HierBD3LMForBlockDiffusion:
    """Make a model that never generates `<|end|>`, so that every answer has its maximum length."""
    model = make_model(backbone=backbone, **fields).eval()
    bias = torch.zeros(model.config.vocab_size)
    bias[SPECIAL_IDS["end"]] = -1e4
    model.backbone.lm_head.bias = torch.nn.Parameter(bias)
    return model


def questions(batch_size: int, length: int = QUESTION_LEN) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(FIRST_CONTENT_ID, 4096, (batch_size, length), generator=generator)


def autoregressive(
    model: HierBD3LMForBlockDiffusion,
    input_ids: torch.Tensor,
    new_tokens: int,
    mask: torch.Tensor | None = None,
    is_compiled: bool = False,
) -> Callable[[], Any]:
    """Return greedy `generate()` of transformers, with its default cache or with a static one and compiled steps."""
    mask = torch.ones_like(input_ids) if mask is None else mask
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
    if is_compiled:
        compile_config = CompileConfig()
        compile_config._compile_all_devices = True  # else transformers does not compile on a CPU
        settings |= {"cache_implementation": "static", "compile_config": compile_config}
    return lambda: model.backbone.generate(input_ids, attention_mask=mask, **settings)


def measure_samplers(
    model: HierBD3LMForBlockDiffusion,
    batch_sizes: tuple[int, ...],
    new_tokens: int,
    targets: dict[tuple[int, str], float],
    repeats: int,
) -> Measured:
    """Compare tokens per second with the AR model's, eager with eager and compiled with compiled."""
    bars, details = [], {}
    for batch_size in batch_sizes:
        torch.compiler.reset()  # else the second batch size has symbolic shapes
        input_ids, cases = questions(batch_size), {}
        for way, is_compiled in (("eager", False), ("compiled", True)):
            cases[f"AR, {way}"] = autoregressive(model, input_ids, new_tokens, is_compiled=is_compiled)
            for name, settings in SAMPLERS.items():
                run = functools.partial(model.generate, input_ids, compile_steps=is_compiled, **settings)
                cases[f"{name}, {way}"] = run
        seconds = interleaved_seconds(cases, repeats)
        passes = {name: int(cases[f"{name}, eager"]().num_forward_passes.max()) for name in SAMPLERS}
        details[f"batch {batch_size}"] = {"seconds": seconds, "passes": passes, "new_tokens": new_tokens}
        for way in ("eager", "compiled"):
            ar = seconds[f"AR, {way}"]
            for name in SAMPLERS:
                claim = f"batch size {batch_size}, {way}, {name} ({passes[name]} NFE): tokens/s / AR tokens/s"
                own = seconds[f"{name}, {way}"]
                bars.append(ratio_bar(claim, ar, own, targets.get((batch_size, name)), at_most=False))
            claim = f"batch size {batch_size}, {way}: time of a forward pass / time of an AR step"
            per_pass = [one * new_tokens / passes[ONE] for one in seconds[f"{ONE}, {way}"]]
            limit = MOST_OF_A_PASS if batch_size == 1 and targets is TARGETS else None
            bars.append(ratio_bar(claim, per_pass, ar, limit, at_most=True))
        claim = f"batch size {batch_size}, eager: share of the time outside the backbone's layers and head"
        share = statistics.median(share_outside(model, cases[f"{ONE}, eager"]) for _ in range(repeats))
        bars.append(bar(claim, share, MOST_OUTSIDE, at_most=True))
    return bars, details


def share_outside(model: HierBD3LMForBlockDiffusion, run: Callable[[], Any]) -> float:
    """Return the share of the time of a call that passes outside the backbone's body and its head."""
    inside = 0.0

    def timed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            result = forward(*args, **kwargs)
            inside += time.perf_counter() - start
            return result

        return wrapped

    body, head = model.backbone.base_model, model.get_output_embeddings()
    with (
        mock.patch.object(body, "forward", timed(body.forward)),
        mock.patch.object(head, "forward", timed(head.forward)),
    ):
        start = time.perf_counter()
        run()
        return 1 - inside / (time.perf_counter() - start)


def measure_small(repeats: int) -> Measured:
    half = NEW_TOKENS // 2
    model = endless_model(question_len=64, plan_len=half, execution_len=half)
    bars, details = measure_samplers(model, (1, 8), NEW_TOKENS, SMALL_TARGETS, repeats)
    passes = details["batch 1"]["passes"][ONE]
    return [*bars, bar("1 token per step: NFE for 256 tokens", passes, NEW_TOKENS + 2, True)], details


def measure_size(
    backbone: dict[str, Any],
    dtype: torch.dtype,
    new_tokens: int,
    batch_size: int,
    targets: dict[tuple[int, str], float],
    repeats: int,
) -> Measured:
    half = new_tokens // 2
    fields = {"question_len": 64, "plan_len": half, "execution_len": half} | CONVERTED
    model = endless_model(backbone, **fields).to(dtype)
    return measure_samplers(model, (batch_size,), new_tokens, targets, repeats)


def measure_memory() -> Measured:
    """Compare the memory of 64 answers of two blocks, under limits of 256 and 8,192 tokens, with the AR model's."""
    model = endless_model(
        SMOLLM2 | {"max_position_embeddings": 8512}, question_len=64, plan_len=256, execution_len=8192
    )
    input_ids, new_tokens = questions(64), 2 * model.config.plan_block_size
    weights = sum(parameter.nbytes for parameter in model.parameters())
    own = added_memory(lambda: model.generate(input_ids, max_plan_len=16, max_new_tokens=new_tokens, **SAMPLERS[FOUR]))
    ar = added_memory(autoregressive(model, input_ids, new_tokens))
    claim = "batch size 64, limits of 256 and 8,192 tokens, 32 new tokens: memory that generation adds / that of AR"
    return [bar(claim, own / ar, 1.5, True)], {"own": own, "ar": ar, "weights": weights}


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
    cache = BlockCache(BACKBONE["num_hidden_layers"], 1, 64, length + 64, torch.device("cpu"))
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


def measure_attention(repeats: int) -> Measured:
    """Compare attention of a pass to the cache, in bfloat16, with transformers' for the heads of SmolLM2-135M."""
    heads, key_heads, size, num_keys = 9, 3, 64, 256
    module = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)
    bars, details = [], {}
    for batch_size, length in ((1, 16), (8, 16), (128, 4)):
        query = torch.randn(batch_size, heads, length, size, dtype=torch.bfloat16)
        key, value = torch.randn(2, batch_size, key_heads, num_keys, size, dtype=torch.bfloat16)
        mask = torch.ones(batch_size, 1, length, num_keys, dtype=torch.bool)
        cases = {
            function.__name__: functools.partial(function, module, query, key, value, mask)
            for function in (grouped_attention, sdpa_attention_forward)
        }
        seconds = interleaved_seconds(cases, repeats)
        claim = f"attention of {batch_size} x {length} tokens to {num_keys} keys: grouped / transformers' sdpa"
        bars.append(ratio_bar(claim, *seconds.values(), 1, at_most=True))
        details[f"{batch_size} x {length}"] = seconds
    return bars, details


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
    "samplers": lambda: measure_small(repeats=5),
    **{
        f"{name}_{str(dtype).removeprefix('torch.')}_{batch_size}": functools.partial(
            measure_size,
            backbone,
            dtype,
            new_tokens,
            batch_size,
            TARGETS if dtype == torch.bfloat16 else {},
            repeats=5,
        )
        for name, backbone, dtype, new_tokens in (
            ("smollm2", SMOLLM2, torch.bfloat16, NEW_TOKENS),
            ("smollm2", SMOLLM2, torch.float32, 64),
            ("qwen3", QWEN3, torch.bfloat16, 64),
        )
        for batch_size in (1, 4, 8)
    },
    "memory": measure_memory,
    "attention": lambda: measure_attention(repeats=51),
    "context": lambda: measure_context(repeats=15),
    "ragged": lambda: measure_ragged(repeats=1),
}


if __name__ == "__main__":
    measure_parts("generation", PARTS, __doc__)
