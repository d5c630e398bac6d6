"""Reading of local data files, row by row; a fault is reported with its file and line."""

import bz2
import csv
import gzip
import json
import lzma
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset
from transformers.utils import logging

logger = logging.get_logger(__name__)

Row = dict[str, Any]
PlacedRow = tuple[str, Row]  # such as "line 3 of rows.jsonl", and what it holds

BOM = b"\xef\xbb\xbf"
OPENERS: dict[str, Callable[..., IO[bytes]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, OSError)
TEXT_COLUMNS = ("question", "plan", "execution", "text")  # never converted to text
ROWS_PER_CHUNK = 10_000


def file_kind(path: str | os.PathLike) -> str | None:
    """Return the suffix that says how a file is read, without that of a compression; None for another suffix."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def read_rows(path: str | os.PathLike) -> Iterator[PlacedRow]:
    """Yield the rows of a file, each with its place in the file.

    A file with an unknown suffix is read as JSON lines, whose blank lines are skipped. A blank line of a .txt file is
    an empty document. Texts are UTF-8, with or without a byte order mark, and lines end with LF or CRLF.

    Raises:
        ValueError: for a line that is not UTF-8, not JSON or not an object, and for a CSV line with too many or too
            few fields; the message names the file and the line.
    """
    open_file = OPENERS.get(Path(path).suffix.lower(), open)
    try:
        with open_file(path, "rb") as file:
            for place, row in READERS.get(file_kind(path), _read_json_lines)(file, str(path)):
                yield f"{place} of {path}", row
    except DAMAGED as error:
        if open_file is open:
            raise
        raise ValueError(f"{path} must be a complete compressed file, but reading it failed: {error}") from error


def read_text_rows(path: str | os.PathLike, names: Iterable[str]) -> Iterator[Row]:
    """Yield the rows of a file, each of which must have texts of these names.

    Raises:
        ValueError: as in [`read_rows`], and for a row without one of the texts.
    """
    for place, row in read_rows(path):
        for name in names:
            if not isinstance(row.get(name), str):
                raise ValueError(f"{place} must have the text `{name}`, but got {row.get(name)!r}")
        yield row


def load_files(paths: Sequence[str | os.PathLike], source: str) -> Dataset:
    """Load files as one dataset. The type of a column follows from all of its values; texts are never converted.

    A column with values of several types is kept as text, in JSON, with a warning.

    Raises:
        ValueError: as in [`read_rows`], for files without rows, and for a value of `TEXT_COLUMNS` that is not a string
            among others that are.
    """
    features, mixed = infer_features(lambda: chain.from_iterable(map(read_rows, paths)), source)
    states = [os.stat(path) for path in paths]
    version = tuple((state.st_mtime_ns, state.st_size) for state in states)  # part of the key of the cache
    kwargs = {"paths": tuple(map(os.path.abspath, paths)), "version": version}  # lists would be shards
    kwargs |= {"names": tuple(features), "mixed": tuple(mixed)}
    return Dataset.from_generator(_generate_rows, features=features, gen_kwargs=kwargs)


def stream_files(paths: Sequence[str | os.PathLike]) -> IterableDataset:
    """Return a stream of the rows of files."""
    return IterableDataset.from_generator(_stream_rows, gen_kwargs={"paths": tuple(map(os.path.abspath, paths))})


def infer_features(read: Callable[[], Iterable[PlacedRow]], source: str) -> tuple[Features, list[str]]:
    """Infer the types of columns from all of their values.

    Args:
        read: returns the rows from the first one on; called once or twice.
        source: what messages call the rows' source.

    Returns:
        the types, and the names of the columns with values of several types, to be kept by [`as_text`].

    Raises:
        ValueError: see [`load_files`].
    """
    schema, mixed, rows = {}, [], iter(read())
    while chunk := list(islice(rows, ROWS_PER_CHUNK)):
        for name in dict.fromkeys(chain.from_iterable(row for _, row in chunk)):
            try:
                schema[name] = _merge(schema.get(name, pa.null()), pa.array([row.get(name) for _, row in chunk]).type)
            except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
                if name in TEXT_COLUMNS:
                    check_texts(read(), name)
                schema[name] = pa.string()
                mixed.append(name)
    if not schema:
        raise ValueError(f"{source} must have at least one row, but has none")
    if mixed:
        names = ", ".join(dict.fromkeys(mixed))
        logger.warning(f"{source}: values of several types are kept as JSON texts in the columns {names}")
    # a column without any value is one of texts, as far as anyone can say
    schema = {name: pa.string() if pa.types.is_null(kind) else kind for name, kind in schema.items()}
    return Features.from_arrow_schema(pa.schema(schema.items())), list(dict.fromkeys(mixed))


def check_texts(rows: Iterable[PlacedRow], name: str) -> None:
    """Raise a ValueError for a value that is not a string; only a plan may be None."""
    for place, row in rows:
        value = row.get(name)
        if not isinstance(value, str) and (name != "plan" or value is not None):
            raise ValueError(f"{place}: `{name}` must be a string, but got {value!r}")


def as_text(value: Any) -> str | None:
    """Return a text as it is, and any other value in JSON; None stays None."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _generate_rows(paths: Sequence[str], version: tuple, names: Sequence[str], mixed: Sequence[str]) -> Iterator[Row]:
    for row in _stream_rows(paths):
        yield {name: as_text(row.get(name)) if name in mixed else row.get(name) for name in names}


def _stream_rows(paths: Sequence[str]) -> Iterator[Row]:
    for path in paths:
        for _, row in read_rows(path):
            yield row


def _merge(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    schemas = [pa.schema([("column", kind)]) for kind in (first, second)]
    return pa.unify_schemas(schemas, promote_options="permissive").field("column").type


# The formats


def _read_json_lines(file: IO[bytes], path: str) -> Iterator[PlacedRow]:
    for number, line in _read_lines(file, path):
        if line.strip():
            yield f"line {number}", _parse_row(line, f"line {number}", path)


def _read_json(file: IO[bytes], path: str) -> Iterator[PlacedRow]:
    """Read an array of objects, or JSON lines under the name .json."""
    text = "".join(line for _, line in _read_lines(file, path))
    if not text.lstrip().startswith("["):
        yield from _read_json_lines((line.encode() for line in text.split("\n")), path)
        return
    try:
        rows = json.loads(text, object_pairs_hook=_make_object)
    except ValueError as error:
        place = f"line {error.lineno} of " if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{place}{path} must be JSON, but: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"object {number}", _check_row(row, f"object {number}", path)


def _read_csv(file: IO[bytes], path: str) -> Iterator[PlacedRow]:
    """Read comma-separated values with a line of names; every value is a text."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader((line for _, line in _read_lines(file, path)), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"the number of fields is not that of the first line, {len(reader.fieldnames)}")
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of {path} must be CSV, but: {error}") from error


def _read_text(file: IO[bytes], path: str) -> Iterator[PlacedRow]:
    for number, line in _read_lines(file, path):
        yield f"line {number}", {"text": line.removesuffix("\n").removesuffix("\r")}


READERS: dict[str, Callable[[IO[bytes], str], Iterator[PlacedRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".txt": _read_text,
}


def _read_lines(file: Iterable[bytes], path: str) -> Iterator[tuple[int, str]]:
    """Yield the lines and their ends with their numbers; only LF ends a line, not every line break of Unicode."""
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(BOM) if number == 1 else line
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise ValueError(
                f"line {number} of {path} must be UTF-8, but has the byte {byte:#04x} in column {error.start + 1}"
            ) from error


def _parse_row(text: str, place: str, path: str) -> Row:
    try:
        row = json.loads(text, object_pairs_hook=_make_object)
    except ValueError as error:
        raise ValueError(f"{place} of {path} must be a JSON object, but got {text[:80]!r}: {error}") from error
    return _check_row(row, place, path)


def _check_row(row: Any, place: str, path: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{place} of {path} must be a JSON object, but got {str(row)[:80]!r}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} of {path} must be Unicode text, but has a lone surrogate: {error}") from error
    return row


def _make_object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return row
