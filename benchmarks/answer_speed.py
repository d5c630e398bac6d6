"""Tokens per second of a fine-tuned open checkpoint on test problems, relative to autoregressive generation.

`python -m hierbd3lm.benchmarks.answer_speed MODEL --baseline FOLDER`: the model in FOLDER was trained in blocks of one
token. Its backbone runs under transformers' `generate`, and writes as many tokens for a batch as the longest of the
model's own answers has. All run eagerly, in turns, on two threads. Writes results/answer_speed_gsm8k.json and .md.
"""

import time
from collections import defaultdict
from typing import Any

import torch

from hierbd3lm.data.arguments import DataArguments, check_at_least
from hierbd3lm.data.splits import load_split
from hierbd3lm.evaluation.checkpoints import load_model
from hierbd3lm.evaluation.prompts import Problem, collate_prompts, make_batches, read_problems
from hierbd3lm.evaluation.runner import generate_batch
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.settings_hierbd3lm import resolve_settings

from .generation import autoregressive
from .measure import Measured, bar, format_table, make_parser, trained_folder, write_results
from .open_checkpoint import BY_CONFIDENCE, ONE_A_STEP

AR, CONFIDENT = "AR", "by confidence"
SETTINGS = {
    "1 token per step": ONE_A_STEP,
    CONFIDENT: BY_CONFIDENCE,
    "run in blocks of 1": {"block_size": 1},
}
LEAST_SPEED_UP = 2.0  # by confidence, at batch size 1


def measure_answers(folder: str, baseline: str, limit: int, batch_sizes: tuple[int, ...], dtype: str) -> Measured:
    """Time the answers to the first problems of the test split; the first batch is answered twice, to warm up."""
    (model, tokenizer), (token_by_token, _) = (load_model(path, "cpu", dtype) for path in (folder, baseline))
    problems = read_problems(load_split(DataArguments.load(folder), "test", limit), tokenizer, model.config, False)
    bars, details = [], {}
    for batch_size in batch_sizes:
        totals = defaultdict(lambda: [0, 0.0])  # tokens and seconds
        batches = make_batches(problems, batch_size)
        for number, batch in enumerate([batches[0], *batches]):
            for name, (tokens, seconds) in answer_in_turns(model, token_by_token, batch).items():
                totals[name][0] += tokens * (number > 0)
                totals[name][1] += seconds * (number > 0)
        speeds = {name: tokens / seconds for name, (tokens, seconds) in totals.items()}
        details[f"batch {batch_size}"] = totals
        for name in SETTINGS:
            least = LEAST_SPEED_UP if (batch_size, name) == (1, CONFIDENT) else None
            claim = f"batch size {batch_size}, {name}: tokens/s / AR tokens/s"
            bars.append(bar(claim, speeds[name] / speeds[AR], least, at_most=False))
    return bars, details


def answer_in_turns(
    model: HierBD3LMForBlockDiffusion, token_by_token: HierBD3LMForBlockDiffusion, batch: list[Problem]
) -> dict[str, tuple[int, float]]:
    """Return the tokens of all answers to a batch and the seconds that they took, for AR and each of `SETTINGS`."""
    lengths, _ = answer(token_by_token, batch, {})
    prompt = collate_prompts(batch, model.config.pad_token_id)
    run = autoregressive(token_by_token, prompt["input_ids"], max(lengths), prompt["attention_mask"])
    start = time.perf_counter()
    run()
    results = {AR: (sum(lengths), time.perf_counter() - start)}
    for name, settings in SETTINGS.items():
        written, seconds = answer(model, batch, settings)
        results[name] = sum(written), seconds
    return results


def answer(
    model: HierBD3LMForBlockDiffusion, batch: list[Problem], settings: dict[str, Any]
) -> tuple[list[int], float]:
    """Return the number of tokens of each answer, and the seconds of the batch."""
    start = time.perf_counter()
    written = generate_batch(model, batch, resolve_settings(model.generation_config, settings))
    seconds = time.perf_counter() - start
    return [one.num_tokens for one in written], seconds


def main() -> None:
    """Measure, and write the results."""
    parser = make_parser("answer_speed", __doc__)
    parser.add_argument("model", type=trained_folder, help="Folder of a trained model.")
    parser.add_argument("--baseline", required=True, help="Folder of the model trained in blocks of one token.")
    parser.add_argument("--limit", type=int, default=32, help="Number of test problems.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="Batch sizes.")
    parser.add_argument("--dtype", default="bfloat16", help="Precision of the weights.")
    args = parser.parse_args()
    check_at_least("limit", args.limit, 1)
    torch.set_num_threads(2)
    bars, details = measure_answers(args.model, args.baseline, args.limit, args.batch_sizes, args.dtype)
    write_results("answer_speed", "gsm8k", bars, details, format_table(bars))


if __name__ == "__main__":
    main()
