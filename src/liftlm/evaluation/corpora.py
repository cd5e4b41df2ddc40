"""Documents with questions from whatever file the user names, one after the other: for studies and for `lift pre-sft`.

Formats are told by a row's keys: LooGLE, L-Eval, LongBench, SQuAD by article, SQuALITY, QMSum, and the user's own
{"document", "question", "answer"} or {"text", "questions": [{"question", "answer"}, …]}. A file of another kind (text,
Markdown, PDF …) is one document, a folder all of its files. Files of rows are read line by line and never held whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from liftlm.documents import Document, load_document
from liftlm.errors import BenchmarkDataError, LiftError
from liftlm.evaluation.benchmark import Item, Question
from liftlm.evaluation.data_rows import answers_of, read_literal, text_of, texts_of
from liftlm.evaluation.evidence import EvidenceFinder
from liftlm.evaluation.longbench import longbench_tasks
from liftlm.evaluation.loogle import TIMELINE, kind_of, read_evidence
from liftlm.evaluation.multiple_choice import right_choice, split_options
from liftlm.json_lines import read_json_line
from liftlm.tasks.sentences import split_into_sentences

Row = Mapping[str, Any]
_LIKE_THIS = 'Write {"title": "…", "text": "…", "questions": [{"question": "…", "answer": "…"}]} a line.'
_RANGE = re.compile(r"(.+?):(\d+)(?:-(\d+))?")
_TELLING = 12  # characters of an answer
_TITLE = 80  # characters of a title made of the text's beginning
_SUMMARY = "Write a summary of the text."
LISTED = "options are listed"  # in a question's data: the prompt names its choices


@dataclass(frozen=True)
class Source:
    """A file or folder, and which of its documents (from 0, the last one included; None: all)."""

    path: Path
    first: int = 0
    last: int | None = None


def parse_source(text: str) -> Source:
    """PATH, PATH:3 (one document) or PATH:3-8. Raises BenchmarkDataError where there is no such file or folder."""
    found = _RANGE.fullmatch(text)
    if Path(text).expanduser().exists() or found is None:
        source = Source(Path(text).expanduser())
    else:
        first = int(found[2])
        source = Source(Path(found[1]).expanduser(), first, int(found[3] or first))
    if not source.path.exists():
        raise BenchmarkDataError(f"There is no file or folder {source.path}.", "Check the path, and where it begins.")
    if source.last is not None and source.last < source.first:
        raise BenchmarkDataError(f"'{text}' ends before it begins.", "Write the lower number first: FILE.jsonl:3-8.")
    return source


def read_items(source: Source) -> Iterator[Item]:
    """The source's documents in order; rows of one text that follow each other are one. Raises BenchmarkDataError."""
    count = 0
    for item in _items(source.path):
        if count >= source.first:
            yield item
        count += 1
        if source.last is not None and count > source.last:
            return
    if source.last is not None or not count:
        wanted = f"document {source.last}" if count else "a document"
        raise BenchmarkDataError(f"{source.path} holds {count} documents and not {wanted}.", "Documents count from 0.")


def _items(path: Path) -> Iterator[Item]:
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith("."))
        for file in files:
            yield from _items(file)
    elif path.suffix == ".jsonl":
        yield from _gather(_rows(path))
    else:
        try:
            yield Item(load_document(path), ())
        except LiftError as error:
            raise BenchmarkDataError(error.message, error.next_step) from error


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"Line {number} of {path}"
                yield where, read_json_line(line, where, BenchmarkDataError, _LIKE_THIS)
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkDataError(f"{path} cannot be read: {error}.", "It must be UTF-8 JSON lines.") from error


def _gather(rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[Item]:
    """Rows of one question each are joined where the document is the one before's; questions get ids by their order."""
    held: Item | None = None
    for where, row in rows:
        document, questions = _read(row, where)
        if held is not None and held.document.text == document.text:
            held = Item(held.document, held.questions + questions)
            continue
        if held is not None:
            yield numbered(held)
        held = Item(document, questions)
    if held is not None:
        yield numbered(held)


def numbered(item: Item) -> Item:
    """The questions' ids made their places, so that none comes twice."""
    return Item(item.document, tuple(replace(q, id=str(index)) for index, q in enumerate(item.questions)))


def _read(row: dict[str, Any], where: str) -> tuple[Document, tuple[Question, ...]]:
    for keys, read in _FORMATS:
        if keys <= row.keys():
            return read(row, where)
    raise BenchmarkDataError(f"{where} is of no known format.", _LIKE_THIS)


def _document(text: str, title: Any, where: str) -> Document:
    if not isinstance(title, str) or not title.strip():
        words = " ".join(text[: 4 * _TITLE].split())  # a heading alone ("Introduction") would name many documents
        title = words if len(words) <= _TITLE else words[:_TITLE].rpartition(" ")[0]
    return Document(" ".join(title.replace("_", " ").split()), text, where)


# --- the formats ------------------------------------------------------------------------------------------------------


def _loogle(row: Row, where: str) -> tuple[Document, tuple[Question, ...]]:
    document = _document(text_of(row, "input", where), row.get("title"), where)
    pairs, finder = row["qa_pairs"], EvidenceFinder(document.text)
    if isinstance(pairs, str):
        pairs = [] if pairs.strip().lower() == "none" else read_literal(pairs, "qa_pairs", where)
    questions = [
        Question(
            "",
            text_of(pair, "Q", where).strip(),
            answers_of(pair.get("A"), where),
            finder.find(texts_of(read_evidence(pair.get("S")), "the evidence", where)),
            kind_of(pair.get("type")) or "fact",
        )
        for pair in pairs
    ]
    return document, tuple(questions)


def _leval(row: Row, where: str) -> tuple[Document, tuple[Question, ...]]:
    document = _document(text_of(row, "input", where), row.get("title"), where)
    asked, gold = row["instructions"], row["outputs"]
    if not isinstance(asked, list) or not isinstance(gold, list) or len(asked) != len(gold):
        raise BenchmarkDataError(f"{where} has not as many outputs as instructions.", _LIKE_THIS)
    questions = []
    for instruction, output in zip(asked, gold, strict=True):
        if row.get("evaluation") == "exam":
            question, choices = split_options(str(instruction), where)
            right = (right_choice(str(output), choices, where),)
            questions.append(
                Question("", question, right, kind="multiple choice", choices=choices, data={LISTED: True})
            )
        else:
            questions.append(Question("", str(instruction).strip(), answers_of(output, where), kind="fact"))
    return document, tuple(questions)


def _longbench(row: Row, where: str) -> tuple[Document, tuple[Question, ...]]:
    """An empty input: the task has one request for all of its documents, which `lift evaluate` knows; else a summary."""
    document = _document(text_of(row, "context", where), row.get("title"), where)
    answers = answers_of(row["answers"], where)
    given = row["input"]
    if not isinstance(given, str) or given.strip():
        return document, (Question("", text_of(row, "input", where).strip(), answers, kind="fact"),)
    asked = _longbench_requests().get(str(row.get("dataset"))) or _SUMMARY
    return document, (Question("", asked, answers, kind="summary" if "summary" in asked else "fact"),)


@cache
def _longbench_requests() -> dict[str, str]:
    """Of the tasks that ask the same of every document; the others have ""."""
    return {name: task.asks for name, task in longbench_tasks().items()}


def _squad(row: Row, where: str) -> tuple[Document, tuple[Question, ...]]:
    """Evidence: the sentence that holds the answer, in the paragraph that the row names."""
    document = _document(text_of(row, "document", where), row.get("title"), where)
    text, sentences = document.text, split_into_sentences(document.text)
    paragraphs = [match.span() for match in re.finditer(r"(?:[^\n]|\n(?!\n))+", text)]
    questions = []
    for pair in row["qas"]:
        answers = answers_of(pair.get("answer"), where)
        start, end = paragraphs[pair["paragraph"]] if "paragraph" in pair else (0, len(text))
        at = text.find(answers[0], start, end)
        held = tuple(sentence.text for sentence in sentences if sentence.start <= at < sentence.end)
        questions.append(Question("", text_of(pair, "question", where).strip(), answers, held, "fact"))
    return document, tuple(questions)


def _squality(row: Row, where: str) -> tuple[Document, tuple[Question, ...]]:
    document = _document(text_of(row, "document", where), row.get("title"), where)
    questions = [
        Question(
            "",
            text_of(each, "question_text", where).strip(),
            answers_of([reply["response_text"] for reply in each["responses"]], where),
            kind="summary",
        )
        for each in row["questions"]
    ]
    return document, tuple(questions)


def _qmsum(row: Row, where: str) -> tuple[Document, tuple[Question, ...]]:
    text = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"])
    questions = [
        Question("", text_of(each, "query", where).strip(), answers_of(each.get("answer"), where), kind="summary")
        for each in row["specific_query_list"]
    ]
    return _document(text, row.get("title"), where), tuple(questions)


def _own(row: Row, where: str) -> tuple[Document, tuple[Question, ...]]:
    key = "text" if "text" in row else "document"
    document = _document(text_of(row, key, where), row.get("title"), where)
    given = row.get("questions", [row] if "question" in row else [])
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise BenchmarkDataError(f"{where}: questions must be a list of objects.", _LIKE_THIS)
    finder = EvidenceFinder(document.text)
    questions = [
        Question(
            "",
            text_of(each, "question", where).strip(),
            answers_of(each.get("answer", each.get("answers")), where),
            finder.find(texts_of(each.get("evidence"), "the evidence", where)),
            str(each.get("kind") or "fact"),
            texts_of(each.get("choices"), "the choices", where),
        )
        for each in given
    ]
    return document, tuple(questions)


_Reader = Callable[[dict[str, Any], str], tuple[Document, tuple[Question, ...]]]
_FORMATS: tuple[tuple[set[str], _Reader], ...] = (
    ({"input", "qa_pairs"}, _loogle),
    ({"input", "instructions", "outputs"}, _leval),
    ({"context", "input", "answers"}, _longbench),
    ({"document", "qas"}, _squad),
    ({"meeting_transcripts", "specific_query_list"}, _qmsum),
    ({"metadata", "document", "questions"}, _squality),
    ({"text"}, _own),
    ({"document"}, _own),
)


# --- smaller documents ------------------------------------------------------------------------------------------------


def cut_item(item: Item, characters: int | None) -> Item:
    """The document's beginning, whole sentences, with the questions whose evidence (or else an answer) stands there."""
    text = item.document.text
    if characters is None or len(text) <= characters:
        return item
    ends = [sentence.end for sentence in split_into_sentences(text) if sentence.end <= characters]
    kept = text[: max(ends, default=characters)]
    told = " ".join(kept.split())
    questions = tuple(
        q
        for q in item.questions
        if (all(sentence in kept for sentence in q.evidence) if q.evidence else _stands_in(q.answers, told))
    )
    return Item(replace(item.document, text=kept), questions)


def _stands_in(answers: Sequence[str], told: str) -> bool:
    """Whether a text holds one of the answers word for word; a short one might stand anywhere."""
    return any(len(answer) >= _TELLING and " ".join(answer.split()) in told for answer in answers)


__all__ = ["LISTED", "TIMELINE", "Source", "cut_item", "numbered", "parse_source", "read_items"]
