"""Speed and accuracy of the confidence sampler on the quickstart model, against an AR model of the same size.

`python -m hierbd3lm.benchmarks.quickstart`. Three models are trained unless they exist: that of `make demo`, the same
with larger blocks, and an autoregressive model with the quickstart's recipe. Order and confidence threshold are chosen
on the validation split. Results are reported on the test split, answered in turns at batch size 1.
"""

import functools
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.splits import load_split
from hierbd3lm.evaluation.checkpoints import load_model
from hierbd3lm.evaluation.scoring import summarize

from .measure import Measured, as_flags, bar, is_trained, measure_parts
from .sampler import BATCH_SIZE, NUM_VALIDATION, try_settings
from .speed import answer, answer_in_turns

ROOT = Path(__file__).parents[1]
DEMO, BLOCKS_OF_8, AR = "outputs/quickstart", "outputs/quickstart_8", "outputs/quickstart_ar"
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
NUM_TEST = 500
MAX_ACCURACY_LOSS = 0.01  # of exact match


def train(folder: str, **settings: Any) -> list[str]:
    """Return the command line that trains a model with the quickstart's recipe."""
    command = [sys.executable, "train.py", "configs/quickstart.yaml", "--resume_from_checkpoint", "last"]
    return command + as_flags({"output_dir": folder} | settings)


COMMANDS = {  # training commands
    DEMO: ["make", "demo"],
    BLOCKS_OF_8: train(BLOCKS_OF_8, block_size=8, block_size_schedule="{0: 1, 0.58: 8}"),
    AR: train(AR, algorithm="ar", noisy_copies=1, max_steps=4200, per_device_train_batch_size=16),
}


def train_missing(folders: Iterable[str]) -> None:
    for folder in folders:
        if not is_trained(ROOT / folder):
            subprocess.run(COMMANDS[folder], cwd=ROOT, check=True)


def choose_settings(summaries: list[dict[str, Any]], exact: float) -> tuple[dict[str, Any], bool]:
    """Return the settings with the lowest NFE within `MAX_ACCURACY_LOSS`, and True; else the best, and False."""
    good = [summary for summary in summaries if summary["exact_match_strict"] >= exact - MAX_ACCURACY_LOSS]
    if good:
        return min(good, key=lambda summary: summary["num_forward_passes_mean"])["tried"], True
    return max(summaries, key=lambda summary: summary["exact_match_strict"])["tried"], False


def tokens_per_forward(plans: list[dict[str, Any]], answers: list[dict[str, Any]]) -> dict[str, float]:
    """Return tokens per forward pass by segment; `plans` is a run that stops after the plan."""
    passes = {"plan": sum(plan["num_forward_passes"] for plan in plans)}
    passes["execution"] = sum(whole["num_forward_passes"] for whole in answers) - passes["plan"]
    return {name: sum(whole[f"num_{name}_tokens"] for whole in answers) / passes[name] for name in passes}


def measure_confidence(folder: str) -> Measured:
    """Compare tokens per second with the AR model at batch size 1, and exact match with the exact sampler."""
    train_missing([DEMO, folder, AR])
    hier, ar = (load_model(str(ROOT / path), "cpu") for path in (folder, AR))
    data_args = DataArguments.load(str(ROOT / folder))
    validation = load_split(data_args, "validation", NUM_VALIDATION)
    exact_settings = {"sampler": "first_hitting"}
    exact = summarize(answer((*hier, exact_settings), validation, BATCH_SIZE))["exact_match_strict"]
    tried = try_settings(*hier, validation, THRESHOLDS)
    settings, is_within_limit = choose_settings(tried, exact)

    test = load_split(data_args, "test", NUM_TEST)
    answerers = {
        "ar": (*ar, {}),
        "confidence, eager": (*hier, settings),
        "confidence, compiled": (*hier, settings | {"compile_steps": True}),
        "first_hitting": (*hier, exact_settings),
    }
    predictions = answer_in_turns(answerers, test)
    plans = answer((*hier, settings | {"stage": "plan"}), test, BATCH_SIZE)
    summaries = {name: summarize(lines) for name, lines in predictions.items()}
    speed = {name: summary["tokens_per_second"] for name, summary in summaries.items()}
    num_right = {name: sum(line["exact_match_strict"] for line in lines) for name, lines in predictions.items()}
    bars = [
        bar(f"{Path(folder).name}, batch 1: tokens/s / AR tokens/s, {name}", speed[name] / speed["ar"], 3.0, False)
        for name in answerers
        if name.startswith("confidence")
    ]
    lost = (num_right["first_hitting"] - num_right["confidence, eager"]) / len(test)
    claim = f"{Path(folder).name}: loss of exact match, confidence against first_hitting"
    bars.append(bar(claim, lost, MAX_ACCURACY_LOSS, True))
    details = {
        "settings": settings,
        "settings_are_within_limit_on_validation": is_within_limit,
        "validation": {"first_hitting": exact, "tried": tried},
        "test": {
            "exact_match": {name: count / len(test) for name, count in num_right.items()},
            "tokens_per_second": speed,
        },
        "passes": {name: summary["num_forward_passes_mean"] for name, summary in summaries.items()},
        "tokens_per_forward": tokens_per_forward(plans, predictions["confidence, eager"]),
    }
    return bars, details


PARTS: dict[str, Callable[[], Measured]] = {
    "confidence": functools.partial(measure_confidence, DEMO),
    "blocks_of_8": functools.partial(measure_confidence, BLOCKS_OF_8),
}

if __name__ == "__main__":
    measure_parts("quickstart", PARTS, __doc__)
