"""Where the task `gsm8k_hier` of lm-evaluation-harness has its problems from: GSM8K_DIR, else the Hub."""

from typing import Any

from datasets import Dataset

from hierbd3lm.data.gsm8k.problems import load_gsm8k_rows


def load_test_split(**metadata: Any) -> dict[str, Dataset]:
    """The test split as the harness takes it; it passes the task's `metadata`, of which nothing is needed."""
    return {"test": load_gsm8k_rows("test")}
