"""From checked rows to items: every fault of a benchmark's file is named by its line. Knows no single benchmark."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from liftlm.documents import Document
from liftlm.errors import BenchmarkDataError
from liftlm.evaluation.benchmark import Item, Question
from liftlm.json_lines import read_json_lines


def read_rows(path: Path, like_this: str) -> list[tuple[str, dict[str, Any]]]:
    """("Line 3 of …", row) of a JSON-lines file. Raises BenchmarkDataError."""
    return read_json_lines(path, "data", BenchmarkDataError, "Check the path given with --data.", like_this)


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """A text with something in it."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BenchmarkDataError(f'{where} has no text "{key}".', "It is needed of every row.")
    return value


def texts_of(value: Any, what: str, where: str) -> tuple[str, ...]:
    """One text or number, or a list of them, without the blank ones; None is no text."""
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(each, str | int | float) and not isinstance(each, bool) for each in values):
        raise BenchmarkDataError(f"{where}: {what} must be a text or a list of texts.", "Mend the row.")
    return tuple(str(each) for each in values if str(each).strip())


def answers_of(value: Any, where: str) -> tuple[str, ...]:
    """At least one accepted answer."""
    answers = texts_of(value, "an answer", where)
    if not answers:
        raise BenchmarkDataError(f"{where} has a question without an answer.", "Give it one, or take the row out.")
    return answers


def read_literal(value: Any, what: str, where: str) -> Any:
    """The value of a Python literal in a text (never evaluated); what is no text is taken as it is."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise BenchmarkDataError(f"{where}: {what} is not a Python literal ({error}).", "Mend the row.") from None


def gather_items(asked: Iterable[tuple[Document, Question]]) -> list[Item]:
    """One item a text, in the order of the data, with all its questions."""
    documents: dict[str, Document] = {}
    questions: dict[str, dict[str, Question]] = {}
    for document, question in asked:
        documents.setdefault(document.id, document)
        known = questions.setdefault(document.id, {})
        if question.id in known:
            raise BenchmarkDataError(
                f'Two questions about "{document.title}" have the id "{question.id}".', "Give every question its own."
            )
        known[question.id] = question
    return [Item(document, tuple(questions[key].values())) for key, document in documents.items()]
