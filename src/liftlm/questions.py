"""Files of questions in, files of answers out: JSON lines, in order, resumable.

Finished answers are kept in `OUT.partial`; the final file appears whole, and the partial one goes. A second run of the
same command (same questions, adapter and settings) answers only what is missing; anything else starts anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liftlm.absorbing import Adapter
from liftlm.answering import Answer, answer_all
from liftlm.config import LiftConfig
from liftlm.documents import Document
from liftlm.errors import ConfigError, QuestionsFileError
from liftlm.json_lines import read_json_lines
from liftlm.models import Model
from liftlm.storage import canonical_json, write_errors, write_file

Row = dict[str, Any]
_ADDED = [field.name for field in dataclasses.fields(Answer) if field.name != "question"]
_LIKE_THIS = 'Write one {"question": "…"} a line.'


def read_questions(path: Path) -> list[Row]:
    """Rows of a JSONL file, each with a `question` and nothing yet under a name that answering adds.

    Raises QuestionsFileError.
    """
    lines = read_json_lines(path, "questions", QuestionsFileError, "Check the path given with --questions.", _LIKE_THIS)
    for where, row in lines:
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            raise QuestionsFileError(f"{where} has no question.", _LIKE_THIS)
        taken = [name for name in _ADDED if name in row]
        if taken:
            raise QuestionsFileError(
                f"{where} has '{taken[0]}' already, which would be overwritten.",
                f"Rename it, e.g. to 'given_{taken[0]}'.",
            )
    return [row for _, row in lines]


def check_out(out: Path, *sources: Path) -> None:
    """Fails now, not after an hour's work, where `out` cannot be written or is one of the files that are read.

    Raises ConfigError, NoWritePermissionError, DiskFullError.
    """
    with write_errors(out):
        if out.is_dir():
            raise ConfigError(f"{out} is a folder.", "Give --out the name of a file.")
        if any(source.exists() and out.exists() and source.samefile(out) for source in sources):
            raise ConfigError(f"Answers would overwrite {out}, which is read.", "Give --out another name.")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent) as probe:
            probe.write(b"{}")


def answer_rows(
    model: Model,
    adapter: Adapter | None,
    rows: list[Row],
    *,
    document: Document,
    config: LiftConfig,
    out: Path | None = None,
    on_answer: Callable[[int, Answer], None] = lambda index, answer: None,
) -> list[Row]:
    """The rows with answer, method and costs added; with `out`, also written there. Order is kept."""
    partial = None if out is None else out.with_name(out.name + ".partial")
    done = {} if partial is None else _resume(partial, _run_id(model, adapter, rows, document, config))
    todo = [index for index in range(len(rows)) if index not in done]

    def keep(position: int, answer: Answer) -> None:
        index = todo[position]
        done[index] = dataclasses.asdict(answer) | {"sources": list(answer.sources)}
        if partial is not None:
            _append(partial, {"index": index, "answer": done[index]})
        on_answer(index, answer)

    if todo:
        answer_all(
            model,
            adapter,
            [rows[index]["question"] for index in todo],
            document=document,
            config=config,
            on_answer=keep,
        )
    result = [row | done[index] | {"question": row["question"]} for index, row in enumerate(rows)]
    if out is not None and partial is not None:
        write_file(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result))
        partial.unlink(missing_ok=True)
    return result


def _run_id(model: Model, adapter: Adapter | None, rows: list[Row], document: Document, config: LiftConfig) -> str:
    parts = {
        "model": model.fingerprint,
        "window": model.window,
        "adapter": adapter.id if adapter else None,
        "document": [document.id, document.title],
        "answering": config.answering.model_dump(mode="json", exclude={"batch_tokens"}),
        "seed": config.seed,
        "rows": rows,
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def _resume(partial: Path, run_id: str) -> dict[int, Row]:
    """Answers that an interrupted run of the same work has left; starts the partial file anew where there are none."""
    done: dict[int, Row] = {}
    with write_errors(partial):
        lines = partial.read_bytes().rstrip(b"\n").split(b"\n") if partial.exists() else []
    try:
        if lines and json.loads(lines[0]) == {"run": run_id}:
            for line in lines[1:]:
                row = json.loads(line)
                done[row["index"]] = row["answer"]
    except (ValueError, KeyError, TypeError):
        pass  # the line at which a process was killed; those before it count
    rows = [{"run": run_id}, *({"index": index, "answer": answer} for index, answer in done.items())]
    write_file(partial, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return done


def _append(partial: Path, row: Row) -> None:
    with write_errors(partial), partial.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
