"""Run folders, in which a run stores its results so that a kill at any time neither loses nor duplicates one."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any


def start_run(
    folder: Path, settings: dict[str, Any], settings_file: str, result_files: Iterable[str], overwrite: bool = False
) -> None:
    """Create the folder of a run, or check that the folder already contains this run.

    Args:
        settings: all settings that influence the results, JSON-serializable; stored in `settings_file`.
        result_files: files that a run writes; a folder with one of them contains a run.
        overwrite: delete an existing run.

    Raises:
        ValueError: if the folder contains another run; the message lists the differing settings.
    """
    settings = json.loads(json.dumps(settings))  # e.g. tuples become lists, as in the file
    settings_path, result_paths = folder / settings_file, [folder / name for name in result_files]
    if not overwrite and any(path.is_file() for path in (settings_path, *result_paths)):
        stored = json.loads(settings_path.read_text(encoding="utf-8")) if settings_path.is_file() else {}
        pairs = {name: (stored.get(name), settings.get(name)) for name in sorted(stored | settings)}
        changes = "; ".join(f"{name}: {old!r} stored, {new!r} now" for name, (old, new) in pairs.items() if old != new)
        if changes:
            raise ValueError(
                f"`output_dir` must be new or contain this run, but {folder} contains another one ({changes}); use "
                f"`--overwrite` to delete it, or choose another folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in result_paths:
        path.unlink(missing_ok=True)
    write_json(settings_path, settings)


class Log:
    """An append-only file of JSON lines, written by one process at a time.

    Args:
        path: the file; it need not exist. An incomplete last line is removed.

    `records` contains the parsed lines.

    Raises:
        ValueError: if another process has opened the file as a log.
    """

    def __init__(self, path: Path):
        self._file = path.open("a+b")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(f"`output_dir` must be used by one process only, but another has {path} open") from error
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            self._file.truncate(len(whole))
        self.records: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def append(self, *records: dict[str, Any]) -> None:
        """Append lines and flush them, so that they survive a kill of this process."""
        self._file.write(_to_lines(list(records)))
        self._file.flush()
        self.records.extend(records)

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    replace(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Write a file of JSON lines atomically."""
    replace(path, _to_lines(values))


def replace(path: Path, content: bytes) -> None:
    """Write a file atomically: at any time it has its old content or the new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    os.replace(new, path)


def hash_of(value: Any) -> str:
    """Return a hash of a value that is the same in every process; parts that JSON cannot serialize use `str`."""
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()[:16]


def _to_lines(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
