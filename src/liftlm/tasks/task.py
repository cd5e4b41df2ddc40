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
from liftlm.json_lines import read_json_lines
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
    written_by = "Write one with `lift tasks DOCUMENT --out FILE`."
    lines = read_json_lines(path, "tasks", TasksFileError, written_by, _LIKE_THIS)
    return [_read_task(row, where, characters) for where, row in lines]


_LIKE_THIS = 'Write one {"question": "…", "answer": "…"} a line.'


def _read_task(row: dict[str, Any], where: str, characters: int) -> Task:
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
