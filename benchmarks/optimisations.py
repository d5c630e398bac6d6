"""What two optimisations of a training step are worth: the time of a step without each, over the time with both.

`python -m hierbd3lm.benchmarks.optimisations` measures the last layer's MLP for masked tokens alone, and attention
tile by tile, on GSM8K's training split (`GSM8K_DIR`), and writes results/optimisations.json. A step is the forward and
backward pass of the training loss, without the optimizer's update.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedTokenizerBase

from hierbd3lm import modeling_hierbd3lm
from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig, special_token_ids
from hierbd3lm.data.arguments import check_at_least
from hierbd3lm.data.collator import ID_KEYS, ExampleIds, HierarchicalDataCollator, encode_example, example_length
from hierbd3lm.data.splits import DataArguments, load_split
from hierbd3lm.data.tokenization import train_tokenizer
from hierbd3lm.likelihood import with_predicted_tokens
from hierbd3lm.masking_hierbd3lm import PADDING
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion, needed_columns
from hierbd3lm.objectives import Batch, make_objective

from .measure import RESULTS, describe_machine, interleaved_seconds

SHARED = {"model_type": "llama", "vocab_size": 49_152, "head_dim": 64, "tie_word_embeddings": True}
SIZES = {
    "12 layers x 768": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "30 layers x 576": {  # SmolLM2-135M
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
LENGTHS = {"question_len": 512, "plan_len": 512, "execution_len": 1024, "block_size": 8}
LONG_ROWS = (512, 1024)  # clean tokens
NUM_PROBLEMS = 1000  # of which the median is typical
TOKENIZER_SIZE = 4096
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}  # -> what autocast computes in

# The library has no switch for either: a variant replaces, while its step runs, what decides to use it.
MLP_OFF = (HierBD3LMForBlockDiffusion, "_mlp_of_head_alone", lambda self, kwargs: None)
TILES_OFF = (modeling_hierbd3lm, "worth_tiling", lambda layout: False)
VARIANTS = {
    "both on": (),
    "last MLP for all tokens": (MLP_OFF,),
    "attention not tiled": (TILES_OFF,),
    "both off": (MLP_OFF, TILES_OFF),
}
LONG_VARIANTS = ("both on", "attention not tiled")


def make_config(size: str, tokenizer: PreTrainedTokenizerBase) -> HierBD3LMConfig:
    return HierBD3LMConfig(backbone_config=SHARED | SIZES[size], **LENGTHS, **special_token_ids(tokenizer))


def load_problems() -> tuple[list[ExampleIds], PreTrainedTokenizerBase]:
    """Problems of GSM8K with plans written by rule, and the tokenizer trained on all of the split."""
    dataset = load_split(DataArguments(dataset="openai/gsm8k"), "train")
    texts = (text for name in ("question", "plan", "execution") for text in dataset[name])
    tokenizer = train_tokenizer(texts, TOKENIZER_SIZE)
    return [encode_example(row, tokenizer) for row in dataset.select(range(NUM_PROBLEMS))], tokenizer


def typical(examples: list[ExampleIds], count: int, config: HierBD3LMConfig) -> list[ExampleIds]:
    """The `count` examples in the middle of all by length."""
    by_length = sorted(examples, key=lambda example: example_length(example, config))
    start = (len(examples) - count) // 2
    return by_length[start : start + count]


def joined(examples: Iterable[ExampleIds], length: int, config: HierBD3LMConfig) -> ExampleIds:
    """One example of at most `length` tokens: of each example that still fits, all segments after those before."""
    row: ExampleIds = {key: [] for key in ID_KEYS}
    for example in examples:
        longer = {key: row[key] + example[key] for key in ID_KEYS}
        if example_length(longer, config) <= length:
            row = longer
    return row


def make_step(
    model: HierBD3LMForBlockDiffusion, batch: Batch, dtype: torch.dtype | None, variant: str
) -> Callable[[], float]:
    """Forward and backward pass of one variant, which returns the loss; the n-th call masks the same in all."""
    objective, generator = make_objective(model.config), torch.Generator().manual_seed(0)

    def step() -> float:
        with contextlib.ExitStack() as patches:
            for target, name, replacement in VARIANTS[variant]:
                patches.enter_context(mock.patch.object(target, name, replacement))
            model.zero_grad()
            predicted = with_predicted_tokens(model, batch)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = objective.shares(model, predicted, generator).sum() / predicted["maskable"].sum()
            loss.backward()
            return loss.item()

    return step


def describe_batch(batch: Batch) -> dict[str, int]:
    """How many rows and tokens; `pass_tokens` go through the backbone, clean and noisy, padding included."""
    num_clean, first_noisy = needed_columns(batch["block_ids"])
    rows, length = batch["input_ids"].shape
    return {
        "rows": rows,
        "clean_tokens": int((batch["segment_ids"] != PADDING).sum()),
        "pass_tokens": rows * (num_clean + length - first_noisy),
    }


def compare(
    model: HierBD3LMForBlockDiffusion, batch: Batch, dtype: str, variants: Iterable[str], repeats: int
) -> dict[str, Any]:
    """Seconds of each variant, and the ratios to both on: of medians, and least and greatest of one turn."""
    steps = {variant: make_step(model, batch, DTYPES[dtype], variant) for variant in variants}
    seconds = interleaved_seconds(steps, repeats)
    with_both = seconds.pop("both on")
    ratios = {}
    for variant, without in seconds.items():
        turns = [slow / fast for slow, fast in zip(without, with_both, strict=True)]
        of_medians = statistics.median(without) / statistics.median(with_both)
        ratios[variant] = {"of_medians": of_medians, "least": min(turns), "greatest": max(turns)}
    all_seconds = {"both on": with_both} | seconds
    spread = {name: [statistics.median(of), min(of), max(of)] for name, of in all_seconds.items()}
    return {"dtype": dtype, "time_without_over_with": ratios, "seconds_median_least_greatest": spread}


def measure_size(
    size: str, examples: list[ExampleIds], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """All variants on a batch of typical problems; attention alone on longer rows."""
    torch.manual_seed(0)
    config = make_config(size, tokenizer)
    model, collate = HierBD3LMForBlockDiffusion._from_config(config), HierarchicalDataCollator(config)
    cases = [(typical(examples, args.problems, config), VARIANTS, args.repeats)]
    cases += [([joined(examples, length, config)], LONG_VARIANTS, args.long_repeats) for length in LONG_ROWS]
    results = []
    for dtype in DTYPES:
        for group, variants, repeats in cases:
            batch = collate(group)
            measured = compare(model, batch, dtype, variants, repeats)
            results.append({"size": size} | describe_batch(batch) | {"repeats": repeats} | measured)
            print(json.dumps(results[-1]), flush=True)
    return results


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES], help="Models.")
    parser.add_argument("--problems", type=int, default=2, help="Typical problems in a batch.")
    parser.add_argument("--repeats", type=int, default=7, help="Measured steps of each variant on typical problems.")
    parser.add_argument("--long_repeats", type=int, default=3, help="Measured steps of each variant on longer rows.")
    parser.add_argument("--threads", type=int, default=1, help="Of torch.")
    args = parser.parse_args()
    for name in ("problems", "repeats", "long_repeats", "threads"):
        check_at_least(name, getattr(args, name), 1)
    torch.set_num_threads(args.threads)
    examples, tokenizer = load_problems()
    results = [result for size in args.sizes for result in measure_size(size, examples, tokenizer, args)]
    command = shlex.join(["python", "-m", "hierbd3lm.benchmarks.optimisations", *sys.argv[1:]])
    content = {"command": command, "machine": describe_machine(), "results": results}
    (RESULTS / "optimisations.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
