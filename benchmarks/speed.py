"""Generation speed of a trained model at batch size 1, compared with a baseline.

`python -m hierbd3lm.benchmarks.speed --model DIR --baseline AR_DIR` compares a model, with eager and with compiled
steps, with the autoregressive model in AR_DIR on test problems of DIR's data, and writes DIR/speed.json.
"""

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

from .measure import describe_machine, make_parser, trained_folder

SPEED_FILE = "speed.json"
CHUNK = 50  # problems per turn of a model

Answerer = tuple[Any, Any, dict[str, Any]]  # model, tokenizer, generation settings


def answer(answerer: Answerer, dataset: Dataset, batch_size: int) -> list[dict[str, Any]]:
    """Return the predictions, as in evaluation."""
    model, tokenizer, settings = answerer
    with tempfile.TemporaryDirectory() as folder:
        resolved = resolve_settings(model.generation_config, settings)
        return predict(model, tokenizer, dataset, resolved, folder, batch_size)


def answer_in_turns(answerers: dict[str, Answerer], dataset: Dataset) -> dict[str, list[dict[str, Any]]]:
    """Return each model's predictions at batch size 1, after a warm-up chunk."""
    predictions: dict[str, list[dict[str, Any]]] = {name: [] for name in answerers}
    for answerer in answerers.values():
        answer(answerer, dataset.select(range(min(CHUNK, len(dataset)))), 1)
    for start in range(0, len(dataset), CHUNK):
        rows = dataset.select(range(start, min(start + CHUNK, len(dataset))))
        for name, answerer in answerers.items():
            predictions[name] += answer(answerer, rows, 1)
    return predictions


def measure_speed(folder: str, baseline: str, limit: int, device: str) -> dict[str, Any]:
    """Measure tokens per second of the model in `folder`, eager and compiled, relative to that in `baseline`."""
    hier, ar = (load_model(path, device) for path in (folder, baseline))
    answerers = {"baseline": (*ar, {}), "eager": (*hier, {}), "compiled": (*hier, {"compile_steps": True})}
    predictions = answer_in_turns(answerers, load_split(DataArguments.load(folder), "test", limit))
    speed = {name: summarize(lines)["tokens_per_second"] for name, lines in predictions.items()}
    return {
        "tokens_per_second": speed,
        **{f"{name}_over_baseline": speed[name] / speed["baseline"] for name in ("eager", "compiled")},
        "baseline": baseline,
        "machine": describe_machine(),
    }


def main() -> None:
    """Measure the speed, and write and print the result."""
    parser = make_parser("speed", __doc__)
    parser.add_argument("--model", type=trained_folder, required=True, help="Folder of a trained model.")
    parser.add_argument("--baseline", required=True, help="Folder of an autoregressive model with the same data.")
    parser.add_argument("--limit", type=int, default=100, help="Number of test problems.")
    parser.add_argument("--device", default=default_device(), help="Device of both models.")
    args = parser.parse_args(sys.argv[1:])
    check_at_least("limit", args.limit, 1)
    result = measure_speed(args.model, args.baseline, args.limit, args.device)
    write_json(Path(args.model, SPEED_FILE), result)
    print(result)


if __name__ == "__main__":
    main()
