"""Profile of a training step and a denoising step, and comparison with the roofline of the machine.

`python -m hierbd3lm.benchmarks.profile [training] [generation]`. The time of each kind of operation is measured by
torch.profiler. The roofline is the longer of two times: the FLOPs of all matrix products at the rate of a large
product, and the minimum number of bytes to move (every weight; in training also its gradient and the optimizer's
state) at the rate of a large copy. The FLOPs do not include attention.
"""

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .generation import denoising_step, endless_model, filled_cache
from .measure import interleaved_medians, read_parts, write_text
from .models import make_model, problem_batches
from .training import block_diffusion_step

STEPS = 20
CONTEXT = 256  # cached tokens of the denoising step
# Prefixes of the operations' names by kind; the first match counts.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "optimizer": ("aten::_fused", "Optimizer"),
    "copies and memory": ("aten::copy_", "aten::empty", "aten::zeros", "aten::fill_", "aten::cat", "aten::clone"),
    "other operations": ("aten::",),
    "autograd": ("autograd::", "torch::autograd"),
}


def seconds_by_kind(step: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of a step by kind of operation; the rest is Python and the profiler."""
    step()
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(STEPS):
            step()
    wall = (time.perf_counter() - start) / STEPS
    seconds: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        fitting = (kind for kind, starts in KINDS.items() if event.key.startswith(starts))
        seconds[next(fitting, "other operations")] += event.self_cpu_time_total / 1e6 / STEPS
    seconds["Python between the operations"] = max(0.0, wall - sum(seconds.values()))
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def count_flops(step: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def machine_rates() -> tuple[float, float]:
    """Return FLOPs per second of a 2,048 x 2,048 matrix product, and bytes per second (read and written) of a copy."""
    matrix, source = torch.randn(2048, 2048), torch.randn(2**26)
    target = torch.empty_like(source)
    cases = {"product": lambda: matrix @ matrix, "copy": lambda: target.copy_(source)}
    seconds = interleaved_medians(cases, repeats=5)
    return 2 * 2048**3 / seconds["product"], 2 * source.nbytes / seconds["copy"]


def weight_bytes(model: HierBD3LMForBlockDiffusion) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def report(name: str, step: Callable[[], object], num_bytes: int) -> str:
    """Format the profile of a step and its roofline in Markdown."""
    achieved, flops = interleaved_medians({"step": step}, repeats=STEPS)["step"], count_flops(step)
    flop_rate, byte_rate = machine_rates()
    attainable = max(flops / flop_rate, num_bytes / byte_rate)
    seconds = seconds_by_kind(step)
    total = sum(seconds.values())
    lines = [f"## {name}", "", "| kind of operation | share of the profiled time |", "|---|---|"]
    lines += [f"| {kind} | {100 * value / total:.1f} % |" for kind, value in seconds.items()]
    lines += [
        "",
        f"- {flops / 1e9:.2f} GFLOP of matrix products, at least {num_bytes / 1e6:.0f} MB to move",
        f"- {flops / num_bytes:.1f} FLOP per byte; machine balance: {flop_rate / byte_rate:.1f}",
        f"- achieved rate / rate of a large product: {flops / achieved / flop_rate:.2f}",
        f"- attainable time / achieved time: {attainable / achieved:.2f}",
        "",
    ]
    return "\n".join(lines)


def profile_training() -> str:
    batches, tokenizer, _ = problem_batches(num_batches=1, batch_size=16)
    model = make_model(max(4096, len(tokenizer)))
    # weights are read twice; gradients are written and read, two moments and the weights read and written
    return report("Training step, 16 problems", block_diffusion_step(model, batches[0]), 10 * weight_bytes(model))


def profile_generation() -> str:
    model = endless_model(question_len=CONTEXT, plan_len=64, execution_len=64)
    cache = filled_cache(model, CONTEXT)
    name = f"Denoising step, 16 tokens after {CONTEXT} cached tokens"
    return report(name, lambda: denoising_step(model, cache, CONTEXT), weight_bytes(model))


PARTS = {"training": profile_training, "generation": profile_generation}


if __name__ == "__main__":
    for part in read_parts("profile", PARTS, __doc__):
        write_text("profile", part, PARTS[part]())
