"""How fast a trained model answers problems one at a time, in turns with others.

`python -m hierbd3lm.benchmarks.speed --model DIR --beside AR_DIR` compares it, with and without compiled passes, with
the autoregressive model in AR_DIR on test problems of DIR's data, and writes DIR/speed.json.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset

from hierbd3lm.data.arguments import DataArguments, check_at_least
from hierbd3lm.data.run_folder import write_json
from hierbd3lm.data.splits import load_split
from hierbd3lm.evaluation.arguments import default_device
from hierbd3lm.evaluation.checkpoints import load_model
from hierbd3lm.evaluation.runner import predict
from hierbd3lm.evaluation.scoring import summarize
from hierbd3lm.settings_hierbd3lm import resolve_settings

from .measure import describe_machine

SPEED_FILE = "speed.json"
CHUNK = 50  # problems that one model answers before it is the next one's turn

Answerer = tuple[Any, Any, dict[str, Any]]  # model, tokenizer, generation settings


def answer(answerer: Answerer, dataset: Dataset, batch_size: int) -> list[dict[str, Any]]:
    """Predictions, as evaluation makes them."""
    model, tokenizer, settings = answerer
    with tempfile.TemporaryDirectory() as folder:
        resolved = resolve_settings(model.generation_config, settings)
        return predict(model, tokenizer, dataset, resolved, folder, batch_size)


def answer_in_turns(answerers: dict[str, Answerer], dataset: Dataset) -> dict[str, list[dict[str, Any]]]:
    """Each model's predictions, one problem at a time, after a chunk that is not measured."""
    predictions: dict[str, list[dict[str, Any]]] = {name: [] for name in answerers}
    for answerer in answerers.values():
        answer(answerer, dataset.select(range(min(CHUNK, len(dataset)))), 1)
    for start in range(0, len(dataset), CHUNK):
        rows = dataset.select(range(start, min(start + CHUNK, len(dataset))))
        for name, answerer in answerers.items():
            predictions[name] += answer(answerer, rows, 1)
    return predictions


def measure_speed(folder: str, beside: str, limit: int, device: str) -> dict[str, Any]:
    """Tokens a second of the model in `folder`, eager and compiled, in multiples of those of the model in `beside`."""
    ours, theirs = (load_model(path, device) for path in (folder, beside))
    answerers = {"beside": (*theirs, {}), "eager": (*ours, {}), "compiled": (*ours, {"compile_steps": True})}
    predictions = answer_in_turns(answerers, load_split(DataArguments.load(folder), "test", limit))
    speed = {name: summarize(lines)["tokens_per_second"] for name, lines in predictions.items()}
    return {
        "tokens_per_second": speed,
        **{f"{name}_over_beside": speed[name] / speed["beside"] for name in ("eager", "compiled")},
        "beside": beside,
        "machine": describe_machine(),
    }


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Folder of a trained model.")
    parser.add_argument("--beside", required=True, help="Folder of an autoregressive model trained on the same data.")
    parser.add_argument("--limit", type=int, default=100, help="Problems of the test split.")
    parser.add_argument("--device", default=default_device(), help="Of both models; a GPU if there is one.")
    args = parser.parse_args(sys.argv[1:])
    check_at_least("limit", args.limit, 1)
    result = measure_speed(args.model, args.beside, args.limit, args.device)
    write_json(Path(args.model, SPEED_FILE), result)
    print(result)


if __name__ == "__main__":
    main()
