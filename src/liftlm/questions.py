"""Files of questions in, files of answers out: JSON lines, in order, resumable.

Finished answers are kept in `OUT.partial`; the final file appears whole, and the partial one goes. A second run of the same
command (same questions, adapter and settings) answers only what is missing; anything else starts anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liftlm.absorbing import Adapter
from liftlm.answering import Answer, answer_all
from liftlm.config import LiftConfig
from liftlm.documents import Document
from liftlm.errors import QuestionsFileError
from liftlm.models import Model
from liftlm.storage import canonical_json, write_errors, write_file

Row = dict[str, Any]


def read_questions(path: Path) -> list[Row]:
    """Rows of a JSONL file, each with a non-empty `question` and not yet an `answer`. Raises QuestionsFileError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise QuestionsFileError(f"The questions file {path} does not exist.", "Check the path given with --questions.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise QuestionsFileError(f"The questions file {path} cannot be read: {error}.", "It must be UTF-8 JSON lines.") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise QuestionsFileError(f"Line {number} of {path} is not JSON: {error}.", 'Write one {"question": "…"} a line.') from None
        if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
            raise QuestionsFileError(f"Line {number} of {path} has no question.", 'Write one {"question": "…"} a line.')
        if "answer" in row:
            raise QuestionsFileError(
                f"Line {number} of {path} has an 'answer' already, which would be overwritten.", "Rename it, e.g. to 'expected'."
            )
        rows.append(row)
    if not rows:
        raise QuestionsFileError(f"The questions file {path} holds no questions.", 'Write one {"question": "…"} a line.')
    return rows


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
        done[index] = dataclasses.asdict(answer)
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
    lines = partial.read_text(encoding="utf-8").splitlines() if partial.exists() else []
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
