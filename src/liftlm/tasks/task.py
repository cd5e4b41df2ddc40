"""Task: a question about a document, its answer, and the text that supports it. Read and written as JSON lines.

Knows nothing of who writes tasks (the other files of this folder) or of how they are trained on (`examples`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liftlm.errors import TasksFileError
from liftlm.storage import write_errors, write_file


@dataclass(frozen=True)
class Task:
    """An auxiliary task (LIFT, section 3.2). start, end: the evidence, as characters of the document's text."""

    question: str
    answer: str
    kind: str  # what sort of question: "about", "who", "complete", …
    start: int
    end: int


def write_tasks_file(path: Path, tasks: Iterable[Task]) -> None:
    """One JSON object a line, fit for a text editor. Raises NoWritePermissionError, DiskFullError."""
    with write_errors(path):
        write_file(path, "".join(json.dumps(dataclasses.asdict(task), ensure_ascii=False) + "\n" for task in tasks))


def read_tasks_file(path: Path, characters: int) -> list[Task]:
    """Tasks about a document of that many characters, checked one by one. Blank lines are skipped.

    Only question and answer are needed; without start and end the whole document is the evidence. Raises TasksFileError, which
    names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise TasksFileError(
            f"The tasks file {path} does not exist.", "Write one with `lift tasks DOCUMENT --out FILE`."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise TasksFileError(
            f"The tasks file {path} cannot be read: {error}.", "It must be UTF-8 JSON lines."
        ) from error
    tasks = [
        _read_task(line, f"Line {number} of {path}", characters)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not tasks:
        raise TasksFileError(f"The tasks file {path} holds no tasks.", _LIKE_THIS)
    return tasks


_LIKE_THIS = 'Write one {"question": "…", "answer": "…"} a line.'


def _read_task(line: str, where: str, characters: int) -> Task:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TasksFileError(f"{where} is not JSON: {error}.", _LIKE_THIS) from None
    if not isinstance(row, dict):
        raise TasksFileError(f"{where} is not a JSON object.", _LIKE_THIS)
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise TasksFileError(f"{where} has no {key}.", _LIKE_THIS)
    kind, start, end = row.get("kind", "given"), row.get("start", 0), row.get("end", characters)
    if not isinstance(kind, str):
        raise TasksFileError(f"The kind in {where} is not a text.", 'For example "kind": "who".')
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= characters:
        raise TasksFileError(
            f"The evidence in {where} (start {start}, end {end}) is not a span of the document's {characters} characters.",
            "Leave start and end out where you do not know them.",
        )
    return Task(row["question"].strip(), row["answer"].strip(), kind, start, end)
