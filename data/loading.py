"""Loading of datasets, and encoding of problems."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..configuration_hierbd3lm import HierBD3LMConfig
from .arguments import GSM8K_IDS, UNFIT
from .collator import (
    ID_KEYS,
    SEGMENTS,
    ExampleIds,
    check_content,
    check_lengths,
    cut_steps,
    encode_examples,
    example_length,
    has_special_token,
    over_long_segments,
)
from .files import READERS, PlacedRow, as_text, check_texts, file_kind, infer_features, load_files, stream_files
from .formats import Parser, parser_for
from .gsm8k.problems import load_gsm8k, load_gsm8k_rows
from .text.detokenization import detokenize
from .tokenization import count_unknown

logger = logging.get_logger(__name__)

PARQUET = ".parquet"
KINDS = (*READERS, PARQUET)
SAVED_FILES = ("dataset_info.json", "dataset_dict.json")  # `save_to_disk` writes one of them
STEP_FEATURES = {"step_lengths": List(Value("int64")), "depends_on": List(List(Value("int64")))}
ENCODED_FEATURES = {
    **{key: List(Value("int64")) for key in ID_KEYS},
    **{"length": Value("int64"), "num_unknown": Value("int64")},
    **{"over_long": List(Value("string")), "has_special_token": Value("bool")},
}


def load_reasoning_dataset(
    path_or_hub_id: str | os.PathLike,
    split: str | None = None,
    name: str | None = None,
    parse_example: Parser | None = None,
    auto_split: bool = False,
    **load_dataset_kwargs: Any,
) -> Dataset:
    """Load a dataset with the columns `question`, `plan`, `execution`; other columns, such as `answer`, are kept.

    Args:
        path_or_hub_id: a `.json`, `.jsonl`, `.csv` or `.parquet` file (see [`load_files`]), a folder written by
            `save_to_disk`, a folder with data files, or a Hub id. `openai/gsm8k` is loaded with [`load_gsm8k`].
        split: the split to load; may be omitted if there is only one.
        name: the dataset's configuration; for GSM8K the subset, `main` (default) or `socratic`.
        parse_example: function that maps a row of another format to `question`, `plan`, `execution` (and `answer`).
            The result has only the columns that it returns. If omitted, rows with `prompt` and `completion` or with
            `messages` are converted as in [`parse_prompt_completion`] and [`parse_messages`].
        auto_split: accept a dataset with `text` in place of the three columns, for a collator with `auto_split`.
        load_dataset_kwargs: passed to `datasets.load_dataset`, for GSM8K to [`load_gsm8k`].

    Raises:
        ValueError: if there are several splits and none is given, a column is missing, a file cannot be read, a row
            cannot be parsed, or a value is not a text (only a plan may be None); the message names the row.
        FileNotFoundError: if a file does not exist.
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
    if parse_example is None:
        parse_example = parser_for(dataset.column_names)
    if parse_example is not None:
        dataset = _parse(dataset, parse_example, str(path_or_hub_id))
    missing = [segment for segment in SEGMENTS if segment not in dataset.column_names]
    is_text_alone = "text" in dataset.column_names and len(missing) == len(SEGMENTS)
    if missing and not (auto_split and is_text_alone):
        raise ValueError(
            f"`{path_or_hub_id}` must have the columns {', '.join(SEGMENTS)}, but lacks {', '.join(missing)} among "
            f"{', '.join(dataset.column_names)}; `parse_example` converts another format"
        )
    for name in dataset.column_names if is_text_alone else SEGMENTS:
        _check_column(dataset, name, str(path_or_hub_id))
    return dataset


def is_one_split(source: str | os.PathLike) -> bool:
    """Return True for a file and for a single dataset saved by `save_to_disk`, which have no names of splits."""
    return Path(source).is_file() or Path(source, SAVED_FILES[0]).is_file()


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
            A file may be compressed: `.gz`, `.bz2`, `.xz`.
        text_column: name of the column that contains the documents.
        detokenizer: name of the rules for [`detokenize`]; texts are kept unchanged if omitted.
        load_dataset_kwargs: passed to `datasets.load_dataset`; `streaming=True` returns a stream, also for a saved
            dataset.

    Raises:
        ValueError: if there are several splits and none is given, the column is missing, a file cannot be read, or a
            document is not a text; the message names the row, except for a stream.
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
    if isinstance(dataset, Dataset):
        _check_column(dataset, "text", str(path_or_hub_id))
    if detokenizer is None:
        return dataset
    # the cache's key does not include the rules, and a stream has no cache
    uncached = {"load_from_cache_file": False} if isinstance(dataset, Dataset) else {}
    return dataset.map(_detokenize_row, fn_kwargs={"rules": detokenizer}, **uncached)


def _detokenize_row(row: dict[str, Any], rules: str) -> dict[str, Any]:
    if not isinstance(row["text"], str):
        raise ValueError(f"`text` must be a string, but got {row['text']!r}")
    return {"text": detokenize(row["text"], rules)}


def prepare_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: HierBD3LMConfig,
    over_long: str = "drop",
    special_tokens: str = "drop",
    num_proc: int | None = None,
    keep_text: bool = False,
    auto_split: bool = False,
) -> tuple[Dataset, dict[str, Any]]:
    """Encode a dataset for training and evaluation.

    Args:
        dataset: has `question`, `plan`, `execution`, or `text` if `auto_split` is set; `plan_is_given` is kept.
        over_long: `drop` or `raise`, for an example with a segment that exceeds its configured length.
        special_tokens: `drop` or `raise`, for an example with a text that spells out a special token of the layout,
            such as `<|plan|>`.
        num_proc: number of processes for encoding; one by default.
        keep_text: keep the texts in addition to `answer`, which is always kept.

    Returns:
        the dataset with `question_ids`, `plan_ids`, `execution_ids` (content only; with `execution_order="plan"` also
        `step_lengths` and `depends_on`) and `length` (tokens of the laid-out example), and a report: `num_examples`,
        `num_kept`, `num_dropped`, `dropped_by_segment` (an example with two over-long segments counts in both),
        `num_with_special_tokens` (these are not counted by segment),
        `num_unknown_tokens` (tokens of kept examples for text that is not in the vocabulary), and with
        `execution_order="plan"` `num_in_total_order` (kept examples without `depends_on`, see [`cut_steps`]).

    Raises:
        ValueError: for an unknown `over_long` or `special_tokens`, an empty dataset, an example that is to raise, and
            one that [`encode_examples`] rejects; the message names the row.
    """
    for name, choice in (("over_long", over_long), ("special_tokens", special_tokens)):
        if choice not in UNFIT:
            raise ValueError(f"`{name}` must be one of {', '.join(UNFIT)}, but got {choice!r}")
    if len(dataset) == 0:
        raise ValueError("`dataset` must have at least one example, but has none")
    wanted = {"answer", "plan_is_given", *((*SEGMENTS, "text") if keep_text else ())}
    kept_features = {column: feature for column, feature in dataset.features.items() if column in wanted}
    step_features = STEP_FEATURES | {"has_no_graph": Value("bool")} if config.execution_order == "plan" else {}
    kept_features = {name: feature for name, feature in kept_features.items() if name not in step_features}
    checks = (check_content,) if special_tokens == "raise" else ()
    checks += (check_lengths,) if over_long == "raise" else ()
    prepared = dataset.map(
        partial(_encode_rows, tokenizer=tokenizer, config=config, checks=checks, auto_split=auto_split),
        with_indices=True,
        batched=True,
        remove_columns=[column for column in dataset.column_names if column not in kept_features],
        features=Features(kept_features | ENCODED_FEATURES | step_features),
        num_proc=num_proc,
        load_from_cache_file=False,  # its key does not include the encoding code
        desc="Encoding",
    )
    special, too_long = prepared["has_special_token"][:], prepared["over_long"][:]
    kept = [row for row, segments in enumerate(too_long) if not segments and not special[row]]
    report = {
        "num_examples": len(dataset),
        "num_kept": len(kept),
        "num_dropped": len(dataset) - len(kept),
        "dropped_by_segment": {segment: sum(segment in row for row in too_long) for segment in SEGMENTS},
        "num_with_special_tokens": sum(special),
    }
    prepared = prepared.select(kept)
    report["num_unknown_tokens"] = sum(prepared["num_unknown"][:])
    if step_features:
        report["num_in_total_order"] = sum(prepared["has_no_graph"][:])
        if report["num_in_total_order"]:
            logger.warning(
                f"{report['num_in_total_order']} examples have no `depends_on`: there a step depends on all before it"
            )
        prepared = prepared.remove_columns("has_no_graph")
    if report["num_unknown_tokens"]:
        logger.warning(
            f"The tokenizer has no token for some of the text: {report['num_unknown_tokens']} unknown tokens"
        )
    log = logger.warning if report["num_dropped"] else logger.info
    log(
        f"Kept {report['num_kept']} of {report['num_examples']} examples; over-long: {report['dropped_by_segment']}; "
        f"with special tokens: {report['num_with_special_tokens']}"
    )
    return prepared.remove_columns(["over_long", "has_special_token", "num_unknown"]), report


def _parse(dataset: Dataset, parse_example: Parser, source: str) -> Dataset:
    def parse(row: int) -> dict[str, Any]:
        try:
            parsed = parse_example(dataset[row])
        except ValueError as error:
            raise ValueError(f"row {row} of {source}: {error}") from error
        except Exception as error:
            raise ValueError(f"row {row} of {source}: `parse_example` failed: {error!r}") from error
        if not isinstance(parsed, dict):
            raise ValueError(f"row {row} of {source}: `parse_example` must return a dict, but got {parsed!r}")
        return parsed

    def read() -> Iterator[PlacedRow]:
        return ((f"row {row} of {source}", parse(row)) for row in range(len(dataset)))

    features, mixed = infer_features(read, source)
    return dataset.map(
        lambda _, row: {name: as_text(value) if name in mixed else value for name, value in parse(row).items()},
        with_indices=True,
        remove_columns=dataset.column_names,
        features=features,
        load_from_cache_file=False,  # its key does not include what the parser imports
        desc="Parsing",
    )


def _check_column(dataset: Dataset, name: str, source: str) -> None:
    is_text = dataset.features[name] in (Value("string"), Value("large_string"))
    if not (is_text and (name == "plan" or dataset.data.column(name).null_count == 0)):
        check_texts(((f"row {row} of {source}", example) for row, example in enumerate(dataset)), name)


def _load(source: str, split: str | None, name: str | None, kwargs: dict[str, Any]) -> Dataset | IterableDataset:
    path = Path(source)
    kind = PARQUET if path.suffix == PARQUET else file_kind(path)
    is_saved = any((path / file).is_file() for file in SAVED_FILES)
    is_file = path.is_file() or (kind is not None and "://" not in source)
    if name is not None and (is_saved or is_file):
        raise ValueError(f"`name` must be None for a file or a saved dataset, but got {name!r} for {source}")
    if is_saved:
        streaming = kwargs.pop("streaming", False)
        dataset = _choose_split(load_from_disk(source, **kwargs), source, split)
        return dataset.to_iterable_dataset() if streaming else dataset
    if is_file:
        return _load_file(path, kind, split, **kwargs)
    files = _files_in_folder(source, split, name) if path.is_dir() else []
    if files:
        return stream_files(files) if kwargs.get("streaming") else load_files(files, source)
    try:
        dataset = load_dataset(source, name, split=split, **kwargs)
    except DatasetGenerationError as error:
        cause = str(error.__cause__ or error)[:500]
        raise ValueError(f"{source} must be readable by `datasets`, but got: {cause}") from error
    return _choose_split(dataset, source, split if isinstance(dataset, dict) else None)


def _load_file(
    path: Path, kind: str | None, split: str | None, streaming: bool = False, **kwargs: Any
) -> Dataset | IterableDataset:
    if not path.is_file():
        raise FileNotFoundError(f"`path_or_hub_id` must be an existing file, but got {path}")
    if kind is None:
        raise ValueError(f"`path_or_hub_id` must be a {', '.join(KINDS)} file, but got {path}")
    if split not in (None, "train"):
        raise ValueError(f"`split` must be None or 'train', the only split of a file, but got {split!r} for {path}")
    if kwargs:
        raise ValueError(f"`load_dataset_kwargs` must be empty for a file, but got {kwargs} for {path}")
    if kind == PARQUET:
        return load_dataset("parquet", data_files=str(path), split="train", streaming=streaming)
    return stream_files([path]) if streaming else load_files([path], str(path))


def _files_in_folder(source: str, split: str | None, name: str | None) -> list[str]:
    """Return the files of a split of a folder if all of them can be read with checks, else none."""
    files = {str(part): paths for part, paths in (load_dataset_builder(source, name).config.data_files or {}).items()}
    chosen = next(iter(files.values())) if split is None and len(files) == 1 else files.get(split, [])
    return [*chosen] if all(map(file_kind, chosen)) else []


def _choose_split(dataset: Any, source: str, split: str | None) -> Dataset | IterableDataset:
    if isinstance(dataset, dict):
        if split is None and len(dataset) == 1:
            return next(iter(dataset.values()))
        if split not in dataset:
            raise ValueError(f"`split` must be one of {', '.join(dataset)} for {source}, but got {split!r}")
        return dataset[split]
    only = str(dataset.split or "train")
    if split not in (None, only):
        raise ValueError(f"`split` must be None or {only!r}, the only split of {source}, but got {split!r}")
    return dataset


def _encode_rows(
    batch: dict[str, list[Any]],
    rows: list[int],
    tokenizer: PreTrainedTokenizerBase,
    config: HierBD3LMConfig,
    checks: Sequence[Callable[[ExampleIds, HierBD3LMConfig], None]],
    auto_split: bool,
) -> dict[str, list[Any]]:
    examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    encode = partial(encode_examples, tokenizer=tokenizer, auto_split=auto_split, chat_template=config.chat_template)
    try:
        encoded = encode(examples)
    except ValueError:  # by one row
        encoded = [_of_row(row, encode, [example])[0] for row, example in zip(rows, examples, strict=True)]
    described = [
        _of_row(row, _describe, example, ids, tokenizer, config, checks)
        for row, example, ids in zip(rows, examples, encoded, strict=True)
    ]
    return {name: [row[name] for row in described] for name in described[0]}


def _of_row(row: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function whose errors name the row."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"row {row}: {error}") from error


def _describe(
    example: dict[str, Any],
    ids: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    config: HierBD3LMConfig,
    checks: Sequence[Callable[[ExampleIds, HierBD3LMConfig], None]],
) -> dict[str, Any]:
    """Return the columns of an encoded example."""
    follows_plan = config.execution_order == "plan"
    if follows_plan:
        ids = ids | cut_steps(example, tokenizer)
    for check in checks:
        check(ids, config)
    special, num_unknown = has_special_token(ids, config), count_unknown(chain(*map(ids.get, ID_KEYS)), tokenizer)
    over_long = [] if special else over_long_segments(ids, config)
    counts = {"length": example_length(ids, config), "num_unknown": num_unknown}
    counts |= {"has_no_graph": example.get("depends_on") is None} if follows_plan else {}
    return ids | counts | {"over_long": over_long, "has_special_token": special}
