"""What a training step costs, against the autoregressive model and the layouts of earlier work.

`python -m hierbd3lm.benchmarks.training [part ...]`. All ratios are of medians, interleaved in one run, float32, 2
threads.
"""

import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from hierbd3lm.attention_hierbd3lm import TiledMask
from hierbd3lm.configuration_hierbd3lm import special_token_ids
from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.diffusion_hierbd3lm import draw_mask
from hierbd3lm.evaluation.likelihood import with_predicted_tokens
from hierbd3lm.masking_hierbd3lm import dense_mask, fixed_length_layout, layout_from_segments
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion, needed_columns
from hierbd3lm.training.objectives import make_objective

from .measure import Measured, added_memory, bar, interleaved_medians, measure_parts
from .models import make_model, problem_batches, text_batch

Step = Callable[[], None]
LARGE_VOCABULARY = 151_936


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def block_diffusion_step(model: HierBD3LMForBlockDiffusion, batch: dict[str, torch.Tensor]) -> Step:
    """A training step as the trainer takes it."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    objective, inputs = make_objective(model.config), {name: batch[name] for name in ("input_ids", "segment_ids")}

    def step() -> None:
        predicted = with_predicted_tokens(model, inputs)
        update(optimizer, objective.token_nelbo(model, predicted).sum() / predicted["maskable"].sum())

    return step


def autoregressive_step(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Step:
    """A step of the same backbone as transformers trains it."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)

    def step() -> None:
        update(optimizer, model(input_ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss)

    return step


def fixed_length_step(model: HierBD3LMForBlockDiffusion, batch: dict[str, torch.Tensor]) -> Step:
    """The layout of earlier work: 256/256/512 tokens padded, both streams of all of them, a dense mask, all logits."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    layout = fixed_length_layout(256, 256, 512, model.config.plan_block_size)
    question, plan, execution = batch["input_ids"].split([256, 256, 512], dim=1)
    x0 = torch.cat([plan, execution], dim=1)
    mask = dense_mask(layout, layout).expand(len(x0), -1, -1, -1)

    def step() -> None:
        masked = torch.rand(x0.shape) < torch.rand(len(x0), 1).clamp(min=1e-3)
        xt = x0.masked_fill(masked, model.config.mask_token_id)
        tokens = torch.cat([question, xt[:, :256], plan, xt[:, 256:], execution], dim=1)
        positions = layout.position_ids.expand(len(x0), -1)
        logits = model.backbone(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        noisy = torch.cat([logits[:, 256:512], logits[:, 768:1280]], dim=1)
        nll = F.cross_entropy(noisy.flatten(0, 1).float(), x0.flatten(), reduction="none").view(x0.shape)
        update(optimizer, (nll * masked).sum() / masked.sum())

    return step


def all_logits_step(model: HierBD3LMForBlockDiffusion, batch: dict[str, torch.Tensor]) -> Step:
    """A step of our layout that computes the logits of every position before it reads the masked ones."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    input_ids, segment_ids = batch["input_ids"], batch["segment_ids"]

    def step() -> None:
        block_ids, _ = layout_from_segments(segment_ids, 16, 16)
        draw = draw_mask(block_ids, model.order.predicted(input_ids, segment_ids))
        xt = input_ids.masked_fill(draw.masked, model.config.mask_token_id)
        logits = model(input_ids, noisy_input_ids=xt, segment_ids=segment_ids).logits.float()
        nll = F.cross_entropy(logits.flatten(0, 1), input_ids.flatten(), reduction="none").view(input_ids.shape)
        update(optimizer, (nll * draw.weights).sum() / draw.masked.sum())

    return step


def measure_problems(repeats: int) -> Measured:
    """Bars 1 and 2, on length-grouped batches of 16 problems."""
    batches, tokenizer, groups = problem_batches(num_batches=4, batch_size=16)
    ids = special_token_ids(tokenizer)
    vocab_size = max(4096, len(tokenizer))
    ours, ar, fixed = (make_model(vocab_size, **ids) for _ in range(3))
    fixed_collate = HierarchicalDataCollator(fixed.config, fixed_length=True)
    cases, ours_tokens, ar_tokens = {}, 0, 0
    for i, (batch, group) in enumerate(zip(batches, groups, strict=True)):
        num_clean, first_noisy = needed_columns(batch["block_ids"])
        ours_tokens += 16 * (num_clean + batch["input_ids"].shape[1] - first_noisy)
        rows = [example["question_ids"] + example["plan_ids"] + example["execution_ids"] for example in group]
        longest = max(map(len, rows))
        input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        attention_mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        ar_tokens += input_ids.numel()
        cases[f"ours {i}"] = block_diffusion_step(ours, batch)
        cases[f"ar {i}"] = autoregressive_step(ar.backbone, input_ids, attention_mask)
    cases["fixed"] = fixed_length_step(fixed, fixed_collate(groups[len(groups) // 2]))
    seconds = interleaved_medians(cases, repeats)
    ours_seconds, ar_seconds = (
        sum(s for name, s in seconds.items() if name.startswith(kind)) for kind in ("ours", "ar")
    )
    token_ratio = ours_tokens / ar_tokens
    bars = [
        bar("examples/s against the fixed 1,792-token layout", seconds["fixed"] / (ours_seconds / 4), 4, False),
        bar(
            "step time / AR step time, per token through the backbone",
            ours_seconds / ar_seconds / token_ratio,
            1.25,
            True,
        ),
    ]
    return bars, {"seconds": seconds, "ours_tokens": ours_tokens, "ar_tokens": ar_tokens}


def measure_text(repeats: int) -> Measured:
    """Bar 5, on plain text, batch 4."""
    bars, details = [], {}
    for length, limit in ((512, 2.0), (1024, 2.3)):
        ours, ar = make_model(), make_model()
        batch = text_batch(4, length, 4096)
        cases = {
            "ours": block_diffusion_step(ours, batch),
            "ar": autoregressive_step(ar.backbone, batch["input_ids"], None),
        }
        seconds = interleaved_medians(cases, repeats)
        details[str(length)] = seconds
        claim = f"plain text of {length:,} tokens: step time / AR step time"
        bars.append(bar(claim, seconds["ours"] / seconds["ar"], limit, True))
    return bars, details


def measure_mask(repeats: int) -> Measured:
    """Bar 4, on plain text of 8,192 tokens, batch 1."""
    model, batch = make_model(), text_batch(1, 8192, 4096)
    clean = model._clean_layout(batch["input_ids"], None, batch["segment_ids"], None, None, None)
    layout = clean + model._noisy_copies(clean, 1)
    cases = {
        "mask": lambda: TiledMask(layout, None).parts(torch.float32),
        "step": block_diffusion_step(model, batch),
    }
    seconds = interleaved_medians(cases, repeats)
    claim = "mask of 8,192 tokens, share of the step that uses it"
    return [bar(claim, seconds["mask"] / seconds["step"], 0.02, True)], seconds


def measure_memory() -> Measured:
    """Bar 3: each path in a process of its own."""
    peaks = {}
    for path in ("ours", "all_logits"):
        command = [sys.executable, "-m", "hierbd3lm.benchmarks.training", "added_memory", path]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[path] = int(output.split()[-1])
    claim = f"memory that a step adds at vocabulary {LARGE_VOCABULARY:,}, against all logits"
    return [bar(claim, peaks["ours"] / peaks["all_logits"], 0.35, True)], peaks


def print_added_memory(path: str) -> None:
    """Prints the bytes that a step holds beyond what the process held before it, the weights among that."""
    model = make_model(LARGE_VOCABULARY)
    batches, _, _ = problem_batches(num_batches=1, batch_size=16)
    print(added_memory({"ours": block_diffusion_step, "all_logits": all_logits_step}[path](model, batches[0])))


PARTS: dict[str, Callable[[], Measured]] = {
    "problems": lambda: measure_problems(repeats=3),
    "text": lambda: measure_text(repeats=5),
    "mask": lambda: measure_mask(repeats=1),
    "memory": measure_memory,
}


def main() -> None:
    """Measures the parts that are named, or all."""
    if sys.argv[1:2] == ["added_memory"]:
        torch.set_num_threads(2)
        print_added_memory(sys.argv[2])
    else:
        measure_parts("training", PARTS, sys.argv[1:])


if __name__ == "__main__":
    main()
