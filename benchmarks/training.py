"""Cost of a training step, compared with the autoregressive model and the layout of earlier work.

`python -m hierbd3lm.benchmarks.training [part ...]`. All ratios are of medians of interleaved measurements, in
float32 on 2 threads. The part `checkpoint` is in bfloat16 on one thread, in CPU seconds; it needs `SMOLLM2_DIR`, a
folder with SmolLM2-135M-Instruct, and `GSM8K_DIR`.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedModel

from hierbd3lm.backbones_hierbd3lm import special_token_ids
from hierbd3lm.data.collator import HierarchicalDataCollator, encode_example
from hierbd3lm.diffusion_hierbd3lm import draw_mask
from hierbd3lm.evaluation.likelihood import with_predicted_tokens
from hierbd3lm.masking_hierbd3lm import dense_mask, fixed_length_layout
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.training.block_growth import resize_blocks
from hierbd3lm.training.objectives import make_objective
from hierbd3lm.training.packing import assign_rows, row_lengths

from .measure import Measured, added_memory, bar, interleaved_cpu_seconds, interleaved_medians, measure_parts
from .models import make_model, problem_batches, text_batch

Step = Callable[[], None]
LARGE_VOCABULARY = 151_936


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def block_diffusion_step(model: HierBD3LMForBlockDiffusion, batch: dict[str, torch.Tensor]) -> Step:
    """Return a training step as in the trainer."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    objective, inputs = make_objective(model.config), {name: batch[name] for name in ("input_ids", "segment_ids")}

    def step() -> None:
        predicted = with_predicted_tokens(model, inputs)
        update(optimizer, objective.token_nelbo(model, predicted).sum() / predicted["maskable"].sum())

    return step


def autoregressive_step(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Step:
    """Return a training step of the same backbone as an autoregressive model of transformers."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)

    def step() -> None:
        update(optimizer, model(input_ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss)

    return step


def fixed_length_step(model: HierBD3LMForBlockDiffusion, batch: dict[str, torch.Tensor]) -> Step:
    """Return a training step of earlier work: segments padded to 256/256/512, a dense mask, all logits."""
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
    """Return a training step that computes the logits of all positions, not only of the masked ones."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    input_ids, segment_ids = batch["input_ids"], batch["segment_ids"]

    def step() -> None:
        block_ids, _ = model.order.layout(segment_ids)
        draw = draw_mask(block_ids, model.order.predicted(input_ids, segment_ids))
        xt = input_ids.masked_fill(draw.masked, model.config.mask_token_id)
        logits = model(input_ids, noisy_input_ids=xt, segment_ids=segment_ids).logits.float()
        nll = F.cross_entropy(logits.flatten(0, 1), input_ids.flatten(), reduction="none").view(input_ids.shape)
        update(optimizer, (nll * draw.weights).sum() / draw.masked.sum())

    return step


def measure_problems(repeats: int) -> Measured:
    """Compare step times on length-grouped batches of 16 problems."""
    batches, tokenizer, groups = problem_batches(num_batches=4, batch_size=16)
    ids = special_token_ids(tokenizer)
    vocab_size = max(4096, len(tokenizer))
    hier, ar, fixed = (make_model(vocab_size, **ids) for _ in range(3))
    fixed_collate = HierarchicalDataCollator(fixed.config, fixed_length=True)
    cases, hier_tokens, ar_tokens = {}, 0, 0
    for i, (batch, group) in enumerate(zip(batches, groups, strict=True)):
        hier_tokens += 16 * int(make_objective(hier.config).pass_lengths(batch).max())
        rows = [example["question_ids"] + example["plan_ids"] + example["execution_ids"] for example in group]
        longest = max(map(len, rows))
        input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        attention_mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        ar_tokens += input_ids.numel()
        cases[f"hier {i}"] = block_diffusion_step(hier, batch)
        cases[f"ar {i}"] = autoregressive_step(ar.backbone, input_ids, attention_mask)
    cases["fixed"] = fixed_length_step(fixed, fixed_collate(groups[len(groups) // 2]))
    seconds = interleaved_medians(cases, repeats)
    hier_seconds, ar_seconds = (
        sum(s for name, s in seconds.items() if name.startswith(kind)) for kind in ("hier", "ar")
    )
    token_ratio = hier_tokens / ar_tokens
    bars = [
        bar(
            "examples/s / examples/s of the fixed 1,792-token layout", seconds["fixed"] / (hier_seconds / 4), 4, False
        ),
        bar("step time / AR step time, per backbone token", hier_seconds / ar_seconds / token_ratio, 1.25, True),
    ]
    return bars, {"seconds": seconds, "hier_tokens": hier_tokens, "ar_tokens": ar_tokens}


def measure_text(repeats: int) -> Measured:
    """Compare step times on plain text, batch size 4."""
    bars, details = [], {}
    for length, limit in ((512, 2.0), (1024, 2.3)):
        hier, ar = make_model(), make_model()
        batch = text_batch(4, length, 4096)
        cases = {
            "hier": block_diffusion_step(hier, batch),
            "ar": autoregressive_step(ar.backbone, batch["input_ids"], None),
        }
        seconds = interleaved_medians(cases, repeats)
        details[str(length)] = seconds
        claim = f"plain text of {length:,} tokens: step time / AR step time"
        bars.append(bar(claim, seconds["hier"] / seconds["ar"], limit, True))
    return bars, details


def measure_memory() -> Measured:
    """Compare the memory of a step with and without all logits, each in a separate process."""
    peaks = {}
    for path in ("hier", "all_logits"):
        command = [sys.executable, "-m", "hierbd3lm.benchmarks.training", "added_memory", path]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[path] = int(output.split()[-1])
    claim = f"memory of a step / memory with all logits, vocabulary size {LARGE_VOCABULARY:,}"
    return [bar(claim, peaks["hier"] / peaks["all_logits"], 0.35, True)], peaks


def print_added_memory(path: str) -> None:
    """Print the peak memory of a step in bytes, relative to the memory in use before it, including the weights."""
    model = make_model(LARGE_VOCABULARY)
    batches, _, _ = problem_batches(num_batches=1, batch_size=16)
    print(added_memory({"hier": block_diffusion_step, "all_logits": all_logits_step}[path](model, batches[0])))


def checkpoint_step(
    model: HierBD3LMForBlockDiffusion, examples: list[dict], block_size: int, packing: bool, optimizer: Any
) -> tuple[Step, dict[str, int]]:
    """Return a training step of one batch in bfloat16, and its tokens: `tokens`, of which `real`, and `predicted`."""
    resize_blocks(model, block_size)
    objective = make_objective(model.config)
    batch = with_predicted_tokens(model, HierarchicalDataCollator(model.config)(examples))
    lengths = objective.pass_lengths(batch).tolist()
    rows = assign_rows(lengths, model.backbone.config.hidden_size) if packing else list(range(len(lengths)))
    batch |= {"row_ids": torch.tensor(rows)} if packing else {}
    totals = row_lengths(lengths, rows)

    def step() -> None:
        resize_blocks(model, block_size)
        with torch.autocast("cpu", torch.bfloat16):
            nelbo = objective.token_nelbo(model, batch, torch.Generator().manual_seed(0))
        update(optimizer, nelbo.sum() / (batch["labels"] != -100).sum())

    predicted = batch["maskable"]
    if objective.has_noise:
        seeded = torch.Generator().manual_seed(0)  # as in the step
        predicted = draw_mask(objective.noise_blocks(batch), predicted, generator=seeded).masked
    return step, {"tokens": len(totals) * max(totals), "real": sum(lengths), "predicted": int(predicted.sum())}


def checkpoint_ar_step(
    model: HierBD3LMForBlockDiffusion, examples: list[dict], optimizer: Any
) -> tuple[Step, dict[str, int]]:
    """Return the step of transformers for the same texts, padded on the right; see [`checkpoint_step`]."""
    resize_blocks(model, 1)
    batch = HierarchicalDataCollator(model.config)(examples)
    texts = [ids[segments >= 0] for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True)]
    input_ids = pad_sequence(texts, batch_first=True)
    attention_mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    labels = input_ids.masked_fill(attention_mask == 0, -100)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.backbone(input_ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss
        update(optimizer, loss)

    real = int(attention_mask.sum())
    return step, {"tokens": input_ids.numel(), "real": real, "predicted": real}


def measure_checkpoint(repeats: int) -> Measured:
    """Compare steps of SmolLM2-135M over 8 GSM8K problems in bfloat16 with transformers' step and a matrix product."""
    from hierbd3lm.data.arguments import DataArguments
    from hierbd3lm.data.splits import load_split

    folder = os.environ.get("SMOLLM2_DIR")
    if folder is None or "GSM8K_DIR" not in os.environ:
        raise SystemExit("SMOLLM2_DIR must name a folder with SmolLM2-135M-Instruct, and GSM8K_DIR one with GSM8K")
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    limits = {"question_len": 512, "plan_len": 512, "execution_len": 1024}
    model = HierBD3LMForBlockDiffusion.from_autoregressive(folder, tokenizer, block_size=4, **limits).train()
    problems = load_split(DataArguments(dataset="openai/gsm8k"), "train").select(range(8))
    examples = [encode_example(row, tokenizer, chat_template=model.config.chat_template) for row in problems]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    made = {"AR": checkpoint_ar_step(model, examples, optimizer)}
    for block_size in (1, 4):
        for packing in (False, True):
            name = f"block size {block_size}" + ", packed" * packing
            made[name] = checkpoint_step(model, examples, block_size, packing, optimizer)
    x, weight = torch.randn(2048, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
    cases = {"20 products": lambda: [x @ weight.T for _ in range(20)]} | {
        name: step for name, (step, _) in made.items()
    }
    seconds = interleaved_cpu_seconds(cases, repeats)
    tokens = {name: counts for name, (_, counts) in made.items()}
    head = model.get_output_embeddings().weight.numel()
    body = sum(parameter.numel() for parameter in model.parameters()) - head  # the embeddings are tied
    peak = 20 * 2 * 2048 * 576 * 1536 / seconds["20 products"]

    def rate(name: str) -> float:
        """Floating-point operations of real tokens, without those of attention, by those of a large product."""
        counts = tokens[name]
        return 6 * (body * counts["real"] + head * counts["predicted"]) / seconds[name] / peak

    one, four = "block size 1, packed", "block size 4, packed"
    of_four = seconds[four] / seconds["AR"] / (tokens[four]["real"] / tokens["AR"]["real"])
    bars = [
        bar("step at block size 1, packed / AR step of transformers", seconds[one] / seconds["AR"], 1.1, True),
        bar("the same, not packed", seconds["block size 1"] / seconds["AR"], 1.1, True),
        bar("step at block size 4, packed / AR step / tokens", of_four, 1.25, True),
        bar("rate of model operations / rate of a product, block size 1, packed", rate(one), 0.32, False),
        bar("the same, block size 4, packed", rate(four), 0.32, False),
        bar("the same, AR step of transformers", rate("AR"), 0.32, False),
        bar("real tokens, block size 4, packed", tokens[four]["real"] / tokens[four]["tokens"], 0.95, False),
    ]
    return bars, {"cpu_seconds": seconds, "tokens": tokens, "product_flops_per_second": peak}


PARTS: dict[str, Callable[[], Measured]] = {
    "problems": lambda: measure_problems(repeats=3),
    "text": lambda: measure_text(repeats=5),
    "memory": measure_memory,
    "checkpoint": lambda: measure_checkpoint(repeats=2),
}


def main() -> None:
    """Measure the named parts, or all."""
    if sys.argv[1:2] == ["added_memory"]:
        torch.set_num_threads(2)
        print_added_memory(sys.argv[2])
    else:
        measure_parts("training", PARTS, __doc__)


if __name__ == "__main__":
    main()
