"""The folder of a run's results, kept such that killing it at any moment loses none and doubles none."""

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
    """Makes the folder of a run, or makes sure that the run which it holds is this one.

    Args:
        settings: all that decides on the results, as JSON takes it; kept in `settings_file`.
        result_files: what a run writes; a folder with one of them holds a run.
        overwrite: whether a run that is there is thrown away.

    Raises:
        ValueError: if the folder holds another run; the message says in what it differs.
    """
    settings = json.loads(json.dumps(settings))  # as they will be read
    settings_path, result_paths = folder / settings_file, [folder / name for name in result_files]
    if not overwrite and any(path.is_file() for path in (settings_path, *result_paths)):
        there = json.loads(settings_path.read_text(encoding="utf-8")) if settings_path.is_file() else {}
        different = [name for name in sorted(there | settings) if there.get(name) != settings.get(name)]
        if different:
            changes = "; ".join(
                f"{name}: {there.get(name)!r} stored, {settings.get(name)!r} now" for name in different
            )
            raise ValueError(
                f"`output_dir` must be new or contain this run, but got {folder} with another one ({changes}): give "
                f"`--overwrite` to throw that away, or another folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in result_paths:
        path.unlink(missing_ok=True)
    write_json(settings_path, settings)


class Log:
    """A file of JSON lines that grows line by line, written by one process at a time.

    Args:
        path: the file; may not exist. A last line that was not written to its end is cut off.

    `records` holds what the lines say.

    Raises:
        ValueError: if the file is open as a log, in another process or in this one.
    """

    def __init__(self, path: Path):
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))  # a file of its own, which stays
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
        self.records: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def append(self, *records: dict[str, Any]) -> None:
        """Adds lines, which outlive this process from now on."""
        self._file.write(_to_lines(list(records)))
        self._file.flush()
        self.records.extend(records)

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._lock.release()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a file that is never half there."""
    replace(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Writes a file of JSON lines that is never half there."""
    replace(path, _to_lines(values))


def replace(path: Path, content: bytes) -> None:
    """Writes a file that has its old content or the new one at any moment."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    os.replace(new, path)


def hash_of(value: Any) -> str:
    """Hash of a value, which is taken as text where JSON does not take it; the same in every process."""
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()[:16]


def _to_lines(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
