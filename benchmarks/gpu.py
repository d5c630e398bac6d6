"""Cost of training and generation on one GPU: FlexAttention against SDPA, and both against the same AR model.

`bash benchmarks/gpu.sh`. Random weights of the shape of Qwen3-0.6B in bfloat16; writes results/gpu.json. A part that
fails is recorded with its error, and the others still run. `--tiny` runs all parts on a small model and any device, to
test the script.
"""

import functools
import json
import time
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

import hierbd3lm.modeling_hierbd3lm
from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .measure import RESULTS, describe_machine, interleaved_medians, make_parser
from .models import FIRST_CONTENT_ID, SPECIAL_IDS, text_batch
from .training import autoregressive_step, block_diffusion_step

BACKBONE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
BACKBONE |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 16_384}
TINY = BACKBONE | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, NVIDIA data sheets
GSM8K_TOKENS = {"question": (57, 98), "plan": (52, 79), "execution": (67, 127)}  # mean, 95th percentile
NEW_TOKENS = 256
REPEATS = 10


class Bench:
    """Device, models and lengths of all parts."""

    def __init__(self, tiny: bool):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backbone = TINY if tiny else BACKBONE
        self.text_length = 256 if tiny else 4096
        self.batch_size = 2 if tiny else 32
        self.new_tokens = 32 if tiny else NEW_TOKENS
        self.repeats = 1 if tiny else REPEATS

    def model(self, attention: str, **fields: Any) -> HierBD3LMForBlockDiffusion:
        torch.manual_seed(0)
        ids = {f"{role}_token_id": token for role, token in SPECIAL_IDS.items()}
        lengths = {"question_len": 1024, "plan_len": 1024, "execution_len": 8192}
        config = HierBD3LMConfig(backbone_config=self.backbone, **(ids | lengths | {"block_size": 16} | fields))
        model = HierBD3LMForBlockDiffusion._from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
        return model.to(self.device)

    def text(self, batch_size: int) -> dict[str, torch.Tensor]:
        batch = text_batch(batch_size, self.text_length, self.backbone["vocab_size"])
        return {name: value.to(self.device) for name, value in batch.items()}

    def problems(self, config: HierBD3LMConfig) -> dict[str, torch.Tensor]:
        """Make a batch of random tokens with the lengths of GSM8K."""
        generator = torch.Generator().manual_seed(0)
        examples = []
        for _ in range(self.batch_size):
            example = {}
            for segment, (mean, high) in GSM8K_TOKENS.items():
                length = max(8, int(torch.normal(mean, (high - mean) / 1.64, (1,), generator=generator)))
                ids = torch.randint(FIRST_CONTENT_ID, self.backbone["vocab_size"], (length,), generator=generator)
                example[f"{segment}_ids"] = ids.tolist()
            examples.append(example)
        return {name: value.to(self.device) for name, value in HierarchicalDataCollator(config)(examples).items()}

    def timed(self, cases: dict[str, Callable[[], Any]], at_most: int = REPEATS) -> dict[str, float]:
        """Return the median seconds of each case over at most `at_most` runs, including the device's work."""
        finished = {name: functools.partial(self._finished, run) for name, run in cases.items()}
        return interleaved_medians(finished, min(self.repeats, at_most))

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        """Return the peak memory of `run`, relative to the memory in use before; None without a GPU."""
        if self.device.type != "cuda":
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self._finished(run)
        return torch.cuda.max_memory_allocated() - before

    def _finished(self, run: Callable[[], Any]) -> None:
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@torch.no_grad()
def check_attention(bench: Bench) -> dict[str, float]:
    """Compare the NLLs under FlexAttention and SDPA, in nats, and generation with and without compiled steps."""
    nll = {}
    for attention in ("sdpa", "flex_attention"):
        model = bench.model(attention).eval()
        batch = bench.problems(model.config)
        masked = model.order.predicted(batch["input_ids"], batch["segment_ids"])
        nll[attention] = model.masked_nll(masked, batch["input_ids"], segment_ids=batch["segment_ids"]).float()
    model = bench.model("sdpa").eval()
    question = batch["input_ids"][:1, :32]
    generate = functools.partial(
        model.generate, question, attention_mask=torch.ones_like(question), max_plan_len=16, max_execution_len=16
    )
    eager, compiled = (generate(compile_steps=compile_steps).sequences[0] for compile_steps in (False, True))
    num_tokens = max(len(eager), len(compiled))
    num_equal = sum(a == b for a, b in zip(eager.tolist(), compiled.tolist(), strict=False))
    return {
        "flex - sdpa, largest nats": (nll["sdpa"] - nll["flex_attention"]).abs().max().item(),
        "flex - sdpa, mean nats": (nll["sdpa"].mean() - nll["flex_attention"].mean()).abs().item(),
        "compiled steps, share of equal tokens": num_equal / num_tokens,
    }


def measure_training(bench: Bench) -> dict[str, Any]:
    """Measure tokens per second and MFU at GSM8K's lengths and on long text, also of the AR model."""
    results = {}
    for name in ("problems", "text"):
        cases, tokens = {}, {}
        # FlexAttention has no backward pass on a CPU
        for attention in ("flex_attention", "sdpa") if bench.device.type == "cuda" else ("sdpa",):
            model = bench.model(attention)
            batch = bench.problems(model.config) if name == "problems" else bench.text(2)
            cases[attention] = block_diffusion_step(model, batch)
            tokens[attention] = tokens_of_both_streams(batch)
        ar, mask = bench.model("sdpa").backbone, (batch["segment_ids"] >= 0).long()
        cases["ar"] = autoregressive_step(ar, batch["input_ids"], mask if name == "problems" else None)
        tokens["ar"] = int(mask.sum())
        seconds = bench.timed(cases)
        results[name] = {case: rates(bench, model, tokens[case], seconds[case]) for case in cases}
    return results


def tokens_of_both_streams(batch: dict[str, torch.Tensor]) -> int:
    """Count the question once, plan and execution twice (noisy and clean)."""
    return 2 * int((batch["segment_ids"] > 0).sum()) + int((batch["segment_ids"] == 0).sum())


def rates(bench: Bench, model: HierBD3LMForBlockDiffusion, num_tokens: int, seconds: float) -> dict[str, float]:
    """Return tokens of both streams per second, and MFU with 6 FLOPs per parameter and token."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = 6 * num_parameters * num_tokens / seconds
    figures = {"seconds": seconds, "tokens_per_second": num_tokens / seconds, "flops_per_second": flops}
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else ""
    peak = next((peak for kind, peak in PEAK_FLOPS.items() if kind in name), None)
    return figures if peak is None else figures | {"mfu": flops / peak}


def measure_generation(bench: Bench) -> dict[str, Any]:
    """Measure tokens per second at 1 and 4 tokens per forward pass against the AR model, at several batch sizes."""
    half = bench.new_tokens // 2
    model = bench.model("sdpa", question_len=64, plan_len=half, execution_len=half).eval()
    bias = torch.zeros(bench.backbone["vocab_size"], device=bench.device, dtype=model.dtype)
    bias[SPECIAL_IDS["end"]] = -1e4  # every answer has its maximum length
    model.backbone.lm_head.bias = torch.nn.Parameter(bias)
    results = {}
    for batch_size in (1, 8, 64):
        generator = torch.Generator().manual_seed(0)
        question = torch.randint(FIRST_CONTENT_ID, 512, (batch_size, 57), generator=generator).to(bench.device)
        mask, new = torch.ones_like(question), bench.new_tokens
        fixed = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        generate = functools.partial(model.generate, question)
        four = functools.partial(generate, sampler="ancestral", num_steps=4)
        cases = {
            "ar": functools.partial(model.backbone.generate, question, attention_mask=mask, **fixed),
            "first_hitting": functools.partial(generate, sampler="first_hitting"),
            "four": four,
            "four, compiled": functools.partial(four, compile_steps=True),
        }
        seconds = bench.timed(cases, at_most=3)
        results[f"batch {batch_size}"] = {
            name: {"seconds": value, "tokens_per_second": batch_size * new / value, "over_ar": seconds["ar"] / value}
            for name, value in seconds.items()
        }
    return results


def measure_head(bench: Bench) -> dict[str, Any]:
    """Measure seconds and peak memory of loss and gradient on a long text, by the limit of logits in memory."""
    model = bench.model("sdpa")
    size, vocab_size = bench.backbone["hidden_size"], bench.backbone["vocab_size"]
    hidden_states = torch.randn(bench.text_length, size, device=bench.device, dtype=model.dtype, requires_grad=True)
    targets = torch.randint(FIRST_CONTENT_ID, vocab_size, (bench.text_length,)).to(bench.device)

    def step(limit: int) -> None:
        with mock.patch.dict(hierbd3lm.modeling_hierbd3lm.LOGITS_AT_ONCE, cpu=limit, others=limit):
            model.nll_in_chunks(hidden_states, targets).sum().backward()

    cases = {f"2^{power}": functools.partial(step, 2**power) for power in (24, 25, 26, 27, 28, 30)}
    seconds = bench.timed(cases)
    return {name: {"seconds": seconds[name], "bytes": bench.peak_bytes(run)} for name, run in cases.items()}


def measure_liger(bench: Bench) -> dict[str, Any]:
    """Measure training with Liger's kernels; must be the last part, as the kernels stay active in the process."""
    if bench.device.type != "cuda" or not is_liger_kernel_available():
        return {"skipped": "needs a GPU and liger-kernel"}
    model = bench.model("flex_attention")
    batches = {"problems": bench.problems(model.config), "text": bench.text(2)}
    input_ids, segment_ids = (batches["problems"][name] for name in ("input_ids", "segment_ids"))
    masked = model.order.predicted(input_ids, segment_ids)
    with torch.no_grad():
        plain = model.masked_nll(masked, input_ids, segment_ids=segment_ids).float()
        apply_liger_kernel(model.backbone, {"fused_linear_cross_entropy": False})  # as the trainer does
        fast = model.masked_nll(masked, input_ids, segment_ids=segment_ids).float()
    results: dict[str, Any] = {"liger - plain, largest nats": (fast - plain).abs().max().item()}
    for name, batch in batches.items():
        seconds = bench.timed({"liger": block_diffusion_step(model, batch)})["liger"]
        results[name] = rates(bench, model, tokens_of_both_streams(batch), seconds)
    return results


PARTS = {
    "attention": check_attention,
    "training": measure_training,
    "generation": measure_generation,
    "head": measure_head,
    "liger": measure_liger,
}


def main() -> None:
    """Run all parts and write the results."""
    parser = make_parser("gpu", __doc__)
    parser.add_argument("--tiny", action="store_true", help="Use a small model, to test the script.")
    parser.add_argument("--output", default=str(RESULTS / "gpu.json"), help="Output file.")
    args = parser.parse_args()
    machine = describe_machine()
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    results: dict[str, Any] = {"command": "bash benchmarks/gpu.sh", "machine": machine}
    for name, measure in PARTS.items():
        start = time.perf_counter()
        try:
            results[name] = measure(Bench(args.tiny))
        except Exception:  # recorded, so that the results of the other parts are not lost
            results[name] = {"error": traceback.format_exc()}
        print(f"{name}: {time.perf_counter() - start:.0f} s\n{json.dumps(results[name], indent=2)}", flush=True)
        with open(args.output, "w") as file:
            json.dump(results, file, indent=2)
    if any("error" in results[name] for name in PARTS):
        raise SystemExit(f"a part failed, see {args.output}")


if __name__ == "__main__":
    main()
