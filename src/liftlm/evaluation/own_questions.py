"""A user's own questions: any JSONL file of {"document", "question", "answer", …}.

document: the text itself, or the path of a file beside the JSONL (any format that `lift ask` reads). answer: one text or a
list of accepted ones. Optional: title, id, kind, evidence (one sentence or several), choices (the first answer is one of
them; the prompt does not list them). Metrics: those of question answering, and accuracies by likelihood where there are
choices.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from liftlm.documents import Document, load_document
from liftlm.errors import BenchmarkDataError, LiftError
from liftlm.evaluation.benchmark import Benchmark, Item, Question, draw
from liftlm.evaluation.evidence import EvidenceFinder
from liftlm.json_lines import read_json_lines

_LIKE_THIS = 'Write {"document": "text or path", "question": "…", "answer": "…"} a line.'
_LONGEST_PATH = 300  # characters; anything longer, or of several lines, is text
_LIKE_A_PATH = re.compile(r"(?:[\w.~-]+[/\\])*[\w-]+\.(?:txt|md|markdown|html?|pdf|epub|docx|json|csv|py)")


class OwnQuestions(Benchmark):
    """Documents in the order in which they first occur; those of equal text are one, with the first's title."""

    name = "jsonl"
    dataset = "given with --data"
    source = "the user's own"

    def load(self, data: Path | None, *, limit: int | None = None, seed: int = 0) -> list[Item]:
        if data is None:
            raise BenchmarkDataError(
                "The benchmark jsonl has no data of its own.", "Give a file with --data FILE.jsonl."
            )
        lines = read_json_lines(data, "questions", BenchmarkDataError, "Check the path given with --data.", _LIKE_THIS)
        documents: dict[str, Document] = {}
        questions: dict[str, list[Question]] = {}
        for where, row in lines:
            document = _document(row, where, data.parent)
            documents.setdefault(document.id, document)
            held = questions.setdefault(document.id, [])
            question = _question(row, document.text, where, str(len(held)))
            if any(question.id == other.id for other in held):
                raise BenchmarkDataError(f"{where} has the id '{question.id}' for the second time.", "Make ids unique.")
            held.append(question)
        return draw([Item(documents[key], tuple(questions[key])) for key in documents], limit, seed)


def _document(row: dict[str, Any], where: str, folder: Path) -> Document:
    given = row.get("document")
    if not isinstance(given, str) or not given.strip():
        raise BenchmarkDataError(f"{where} has no document.", _LIKE_THIS)
    title = row.get("title")
    if title is not None and (not isinstance(title, str) or not title.strip()):
        raise BenchmarkDataError(f"{where} has a title that is no text.", _LIKE_THIS)
    if _is_file(folder, given):
        try:
            return load_document(str(folder / given), title)
        except LiftError as error:
            raise BenchmarkDataError(f"{where}: {error.message}", error.next_step) from error
    if _LIKE_A_PATH.fullmatch(given.strip()):
        raise BenchmarkDataError(f'{where}: there is no file "{given}" in {folder}.', "Correct the path.")
    return Document(title=title or "the document", text=given, source=where)


def _is_file(folder: Path, given: str) -> bool:
    if "\n" in given or len(given) > _LONGEST_PATH:
        return False
    try:
        return (folder / given).is_file()
    except (OSError, ValueError):  # too long for a name, or with a NUL: a text
        return False


def _question(row: dict[str, Any], text: str, where: str, number: str) -> Question:
    asked = row.get("question")
    if not isinstance(asked, str) or not asked.strip():
        raise BenchmarkDataError(f"{where} has no question.", _LIKE_THIS)
    answers = _texts(row.get("answer"), where, "answer")
    if not answers:
        raise BenchmarkDataError(f"{where} has no answer.", _LIKE_THIS)
    choices = _texts(row.get("choices"), where, "choices")
    if choices and answers[0] not in choices:
        raise BenchmarkDataError(f"{where} has choices without the answer.", "Make the answer one of the choices.")
    return Question(
        id=str(row.get("id", number)),
        question=asked.strip(),
        answers=answers,
        evidence=EvidenceFinder(text).find(_texts(row.get("evidence"), where, "evidence")),
        kind=str(row.get("kind", "")),
        choices=choices,
    )


def _texts(value: Any, where: str, name: str) -> tuple[str, ...]:
    if value is None:
        return ()
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(text, str) and text.strip() for text in listed):
        raise BenchmarkDataError(f"{where} has {name} that is neither a text nor a list of texts.", _LIKE_THIS)
    return tuple(listed)
