"""Loading of datasets, and encoding of problems."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..configuration_hierbd3lm import HierBD3LMConfig
from .arguments import GSM8K_IDS
from .collator import (
    ID_KEYS,
    SEGMENTS,
    check_content,
    check_lengths,
    encode_example,
    example_length,
    over_long_segments,
)
from .gsm8k.problems import load_gsm8k, load_gsm8k_rows
from .text.detokenization import detokenize

logger = logging.get_logger(__name__)

FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".txt": "text"}  # of `load_dataset`; .txt: one row per line
SAVED_FILES = ("dataset_info.json", "dataset_dict.json")  # `save_to_disk` writes one of them
OVER_LONG = ("drop", "raise")
ENCODED_FEATURES = {
    **{key: List(Value("int64")) for key in ID_KEYS},
    **{"length": Value("int64"), "over_long": List(Value("string"))},
}


def load_reasoning_dataset(
    path_or_hub_id: str | os.PathLike,
    split: str | None = None,
    name: str | None = None,
    parse_example: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    auto_split: bool = False,
    **load_dataset_kwargs: Any,
) -> Dataset:
    """Load a dataset with the columns `question`, `plan`, `execution`; other columns, such as `answer`, are kept.

    Args:
        path_or_hub_id: a `.json` or `.jsonl` file, a folder written by `save_to_disk`, a folder with data files, or
            a Hub id. `openai/gsm8k` is loaded with [`load_gsm8k`].
        split: the split to load; may be omitted if there is only one.
        name: the dataset's configuration; for GSM8K the subset, `main` (default) or `socratic`.
        parse_example: function that maps a row of another format to `question`, `plan`, `execution` (and `answer`).
            The result has only the columns that it returns.
        auto_split: accept a dataset with `text` in place of the three columns, for a collator with `auto_split`.
        load_dataset_kwargs: passed to `datasets.load_dataset`, for GSM8K to [`load_gsm8k`].

    Raises:
        ValueError: if there are several splits and none is given, or a column is missing.
        FileNotFoundError: if a `.json` or `.jsonl` file does not exist.
    """
    if str(path_or_hub_id) in GSM8K_IDS:
        load = load_gsm8k if parse_example is None else load_gsm8k_rows
        dataset = load(split, name or "main", **load_dataset_kwargs)
    else:
        dataset = _load(os.fspath(path_or_hub_id), split, name, load_dataset_kwargs)
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{path_or_hub_id} must load as a Dataset, but got {type(dataset).__name__}: `streaming` is not supported"
        )
    if parse_example is not None:
        # not from the cache: its key does not include what the parser imports
        dataset = dataset.map(parse_example, remove_columns=dataset.column_names, load_from_cache_file=False)
    missing = [segment for segment in SEGMENTS if segment not in dataset.column_names]
    is_text_alone = "text" in dataset.column_names and len(missing) == len(SEGMENTS)
    if missing and not (auto_split and is_text_alone):
        raise ValueError(
            f"`{path_or_hub_id}` must have the columns {', '.join(SEGMENTS)}, but lacks {', '.join(missing)} among "
            f"{', '.join(dataset.column_names)}; `parse_example` can convert another format"
        )
    return dataset


def load_documents(
    path_or_hub_id: str | os.PathLike,
    split: str | None = None,
    name: str | None = None,
    text_column: str = "text",
    detokenizer: str | None = None,
    **load_dataset_kwargs: Any,
) -> Dataset | IterableDataset:
    """Load plain text: a dataset with the single column `text` and one document per row.

    Args:
        path_or_hub_id, split, name: as in [`load_reasoning_dataset`]; also a `.txt` file with one document per line.
        text_column: name of the column that contains the documents.
        detokenizer: name of the rules for [`detokenize`]; texts are kept unchanged if omitted.
        load_dataset_kwargs: passed to `datasets.load_dataset`; `streaming=True` returns a stream, also for a saved
            dataset.

    Raises:
        ValueError: if there are several splits and none is given, or the column is missing.
        FileNotFoundError: if a file does not exist.
    """
    dataset = _load(os.fspath(path_or_hub_id), split, name, load_dataset_kwargs)
    columns = dataset.column_names if isinstance(dataset, Dataset) else next(iter(dataset.take(1)), {}).keys()
    if text_column not in columns:
        raise ValueError(
            f"`text_column` must be one of {', '.join(columns)} for {path_or_hub_id}, but got {text_column!r}"
        )
    dataset = dataset.select_columns(text_column)
    dataset = dataset if text_column == "text" else dataset.rename_column(text_column, "text")
    if detokenizer is None:
        return dataset
    # the cache's key does not include the rules, and a stream has no cache
    uncached = {"load_from_cache_file": False} if isinstance(dataset, Dataset) else {}
    return dataset.map(_detokenize_row, fn_kwargs={"rules": detokenizer}, **uncached)


def _detokenize_row(row: dict[str, Any], rules: str) -> dict[str, Any]:
    return {"text": detokenize(row["text"], rules)}


def prepare_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: HierBD3LMConfig,
    over_long: str = "drop",
    num_proc: int | None = None,
    keep_text: bool = False,
    auto_split: bool = False,
) -> tuple[Dataset, dict[str, Any]]:
    """Encode a dataset for training and evaluation.

    Args:
        dataset: has `question`, `plan`, `execution`, or `text` if `auto_split` is set.
        over_long: `drop` or `raise`, for an example with a segment that exceeds its configured length.
        num_proc: number of processes for encoding; one by default.
        keep_text: keep the texts in addition to `answer`, which is always kept.

    Returns:
        the dataset with `question_ids`, `plan_ids`, `execution_ids` (content only) and `length` (tokens of the
        laid-out example), and a report: `num_examples`, `num_kept`, `num_dropped`, `dropped_by_segment` (an example
        with two over-long segments counts in both).

    Raises:
        ValueError: for an unknown `over_long`, an empty dataset, an over-long example with `over_long="raise"`, and
            an example that [`encode_example`] or [`check_content`] rejects; the message names the row.
    """
    if over_long not in OVER_LONG:
        raise ValueError(f"`over_long` must be one of {', '.join(OVER_LONG)}, but got {over_long!r}")
    if len(dataset) == 0:
        raise ValueError("`dataset` must have at least one example, but has none")
    wanted = {"answer", *((*SEGMENTS, "text") if keep_text else ())}
    kept_features = {column: feature for column, feature in dataset.features.items() if column in wanted}
    prepared = dataset.map(
        partial(_encode_row, tokenizer=tokenizer, config=config, must_fit=over_long == "raise", auto_split=auto_split),
        with_indices=True,
        remove_columns=[column for column in dataset.column_names if column not in kept_features],
        features=Features(kept_features | ENCODED_FEATURES),
        num_proc=num_proc,
        load_from_cache_file=False,  # its key does not include the encoding code
        desc="Encoding",
    )
    too_long = prepared["over_long"][:]
    kept = [row for row, segments in enumerate(too_long) if not segments]
    report = {
        "num_examples": len(dataset),
        "num_kept": len(kept),
        "num_dropped": len(dataset) - len(kept),
        "dropped_by_segment": {segment: sum(segment in row for row in too_long) for segment in SEGMENTS},
    }
    log = logger.warning if report["num_dropped"] else logger.info
    log(f"Kept {report['num_kept']} of {report['num_examples']} examples; over-long: {report['dropped_by_segment']}")
    return prepared.select(kept).remove_columns("over_long"), report


def _load(source: str, split: str | None, name: str | None, kwargs: dict[str, Any]) -> Dataset | IterableDataset:
    path = Path(source)
    is_saved = any((path / file).is_file() for file in SAVED_FILES)
    is_file = path.is_file() or (path.suffix in FILE_BUILDERS and "://" not in source)
    if name is not None and (is_saved or is_file):
        raise ValueError(f"`name` must be None for a file or a saved dataset, but got {name!r} for {source}")
    if is_saved:
        streaming = kwargs.pop("streaming", False)
        dataset = _choose_split(load_from_disk(source, **kwargs), source, split)
        return dataset.to_iterable_dataset() if streaming else dataset
    if not is_file:
        dataset = load_dataset(source, name, split=split, **kwargs)
        return _choose_split(dataset, source, split if isinstance(dataset, dict) else None)
    if path.suffix not in FILE_BUILDERS or not path.is_file():
        raise FileNotFoundError(f"`path_or_hub_id` must be an existing .json, .jsonl or .txt file, but got {source}")
    return load_dataset(FILE_BUILDERS[path.suffix], data_files=source, split=split or "train", **kwargs)


def _choose_split(dataset: Any, source: str, split: str | None) -> Dataset | IterableDataset:
    if isinstance(dataset, dict):
        if split is None and len(dataset) == 1:
            return next(iter(dataset.values()))
        if split not in dataset:
            raise ValueError(f"`split` must be one of {', '.join(dataset)} for {source}, but got {split!r}")
        return dataset[split]
    if split not in (None, str(dataset.split)):
        raise ValueError(f"`split` must be None for {source}, whose only split is {dataset.split}, but got {split!r}")
    return dataset


def _encode_row(
    example: dict[str, Any],
    row: int,
    tokenizer: PreTrainedTokenizerBase,
    config: HierBD3LMConfig,
    must_fit: bool,
    auto_split: bool,
) -> dict[str, Any]:
    try:
        ids = encode_example(example, tokenizer, auto_split)
        check_content(ids, config)
        if must_fit:
            check_lengths(ids, config)
    except ValueError as error:
        raise ValueError(f"row {row}: {error}") from error
    return ids | {"length": example_length(ids, config), "over_long": over_long_segments(ids, config)}
