"""Data of the tasks `gsm8k_hier` and `gsm8k_fewshot` of lm-evaluation-harness, from GSM8K_DIR or the Hub."""

from typing import Any

from datasets import Dataset

from hierbd3lm.data.gsm8k.problems import load_gsm8k_rows


def load_test_split(**metadata: Any) -> dict[str, Dataset]:
    """Load the test split for the harness, which passes the task's `metadata`; it is not used."""
    return {"test": load_gsm8k_rows("test")}


def load_splits(**metadata: Any) -> dict[str, Dataset]:
    """Load the test split, and the training split for examples in the prompt; see [`load_test_split`]."""
    return load_test_split() | {"train": load_gsm8k_rows("train")}
