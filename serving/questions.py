"""Questions of a file or of stdin."""

import io
import sys
from pathlib import Path

from ..data.files import READERS, file_kind, read_rows
from .arguments import STDIN


def read_questions(path: str) -> list[str]:
    """Read questions: rows with `question`, or one question per line, where blank lines are none.

    Rows are told by the suffix (.jsonl, .json, .csv), or by a first line that begins with `{`.

    Raises:
        ValueError: if there is no question, as in [`~data.files.read_rows`], and for a row without one.
        FileNotFoundError: if there is no such file.
    """
    if path != STDIN and file_kind(path) not in (None, ".txt"):
        rows = read_rows(path)
    else:
        name = "stdin" if path == STDIN else path
        content = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
        kind = ".jsonl" if content.lstrip().startswith(b"{") else ".txt"
        rows = ((f"{place} of {name}", row) for place, row in READERS[kind](io.BytesIO(content), name))
    questions = []
    for place, row in rows:
        question = row.get("question", row.get("text"))
        if not isinstance(question, str):
            raise ValueError(f"{place} must have the text `question`, but got {question!r}")
        if question.strip():
            questions.append(question)
    if not questions:
        raise ValueError(f"`questions` must have at least one question, but {path} has none")
    return questions
