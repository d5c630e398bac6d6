"""Folder of a run's results: a run that is killed at any moment loses no result and repeats none."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout


def start_run(
    folder: Path, settings: dict[str, Any], settings_file: str, result_files: Iterable[str], overwrite: bool = False
) -> None:
    """Create the folder of a run, or check that the folder contains this run.

    Args:
        settings: everything that the results depend on, as JSON values; saved to `settings_file`.
        result_files: the files that a run writes; a folder with one of them contains a run.
        overwrite: delete the results of an existing run.

    Raises:
        ValueError: if the folder contains another run (the message names the differences), or its settings cannot be
            parsed.
    """
    settings = json.loads(json.dumps(settings))  # as they are read from the file
    settings_path, result_paths = folder / settings_file, [folder / name for name in result_files]
    if not overwrite and any(path.is_file() for path in (settings_path, *result_paths)):
        there = _parse(settings_path.read_bytes(), str(settings_path)) if settings_path.is_file() else {}
        different = [name for name in sorted(there | settings) if there.get(name) != settings.get(name)]
        if different:
            changes = "; ".join(
                f"{name}: {there.get(name)!r} stored, {settings.get(name)!r} now" for name in different
            )
            raise ValueError(
                f"`output_dir` must be new or contain this run, but got {folder} with another one ({changes}): give "
                f"`--overwrite` to delete that one, or another folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in result_paths:
        path.unlink(missing_ok=True)
    write_json(settings_path, settings)


class Log:
    """Append-only file of JSON lines, written by one process at a time.

    Args:
        path: the file; created if it does not exist. An incomplete last line is removed.

    `records` holds the parsed lines.

    Raises:
        ValueError: if the file is open as a log already, in this process or another one, or a line cannot be parsed.
    """

    def __init__(self, path: Path):
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))  # a separate file, which is not deleted
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise ValueError(f"`output_dir` must be written by one process, but {path} is by another") from error
        self._file = path.open("a+b")
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            self._file.truncate(len(whole))
        lines = enumerate(whole.splitlines(), start=1)
        try:
            self.records: list[dict[str, Any]] = [_parse(line, f"line {number} of {path}") for number, line in lines]
        except ValueError:
            self._close()
            raise

    def append(self, *records: dict[str, Any]) -> None:
        """Append lines and flush them, so that they survive this process."""
        self._file.write(_to_lines(list(records)))
        self._file.flush()
        self.records.extend(records)

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._file.close()
        self._lock.release()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    replace(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Write a file of JSON lines atomically."""
    replace(path, _to_lines(values))


def replace(path: Path, content: bytes) -> None:
    """Write a file atomically: at any moment it has its old content or the new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    os.replace(new, path)


def hash_of(value: Any) -> str:
    """Return a hash of a value, the same in every process; parts that are not JSON values are hashed as text."""
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()[:16]


def _parse(content: bytes, place: str) -> dict[str, Any]:
    try:
        return json.loads(content)
    except ValueError as error:  # also for bytes that are not UTF-8
        raise ValueError(
            f"{place} must be JSON as the run wrote it, but got {content[:80]!r}: mend it, or give `--overwrite` to "
            f"delete the results"
        ) from error


def _to_lines(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
