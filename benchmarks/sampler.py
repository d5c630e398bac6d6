"""Choice of the confidence sampler's order and threshold for a trained model, on the validation split.

`python -m hierbd3lm.benchmarks.sampler --model DIR` writes all results to DIR/sampler.json, and the settings with the
highest exact match to the checkpoint's generation config. Ties are broken by the lowest NFE.
"""

import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset

from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.run_folder import write_json
from hierbd3lm.data.splits import load_split
from hierbd3lm.evaluation.arguments import default_device
from hierbd3lm.evaluation.checkpoints import load_model
from hierbd3lm.evaluation.scoring import summarize
from hierbd3lm.settings_hierbd3lm import resolve_settings

from .measure import describe_machine, make_parser, trained_folder
from .speed import answer

SAMPLER_FILE = "sampler.json"
THRESHOLDS = (0.8, 0.9, 0.95, 0.99)
NUM_VALIDATION = 500
BATCH_SIZE = 50


def try_settings(model: Any, tokenizer: Any, dataset: Dataset, thresholds: Iterable[float]) -> list[dict[str, Any]]:
    """Measure exact match and NFE of both orders at every threshold; the settings are returned as `tried`."""
    results = []
    for left_to_right, threshold in itertools.product((True, False), thresholds):
        tried = {"sampler": "confidence", "left_to_right": left_to_right, "threshold": threshold}
        summary = summarize(answer((model, tokenizer, tried), dataset, BATCH_SIZE))
        reported = {name: summary[name] for name in ("exact_match_strict", "num_forward_passes_mean")}
        results.append({"tried": tried} | reported)
    return results


def best_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings with the highest exact match; ties are broken by the lowest NFE."""
    return max(results, key=lambda row: (row["exact_match_strict"], -row["num_forward_passes_mean"]))["tried"]


def main() -> None:
    """Choose the settings, and write and print them."""
    parser = make_parser("sampler", __doc__)
    parser.add_argument("--model", type=trained_folder, required=True, help="Folder of a trained model.")
    parser.add_argument("--device", default=default_device(), help="Device of the model.")
    args = parser.parse_args(sys.argv[1:])
    model, tokenizer = load_model(args.model, args.device)
    validation = load_split(DataArguments.load(args.model), "validation", NUM_VALIDATION)
    results = try_settings(model, tokenizer, validation, THRESHOLDS)
    chosen = best_of(results)
    resolve_settings(model.generation_config, chosen).save_pretrained(args.model)
    content = {"chosen": chosen, "num_examples": len(validation), "tried": results, "machine": describe_machine()}
    write_json(Path(args.model, SAMPLER_FILE), content)
    print(content)


if __name__ == "__main__":
    main()
