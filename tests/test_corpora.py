"""Documents with questions from every format that is known, and what is said of those that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from liftlm.errors import BenchmarkDataError
from liftlm.evaluation.benchmark import Question
from liftlm.evaluation.corpora import LISTED, parse_source, read_items
from liftlm.evaluation.registry import make_benchmark

TEXT = "Mara Quill cast the bell. It rang in the flood of 1743. The miller paid for it in old coins."
ROWS: dict[str, tuple[dict[str, Any], int, str]] = {
    # format: a row, questions, the first answer
    "loogle": (
        {"input": TEXT, "title": "T", "qa_pairs": "[{'Q': 'Who?', 'A': 'Mara', 'S': ['Mara Quill cast the bell.']}]"},
        1,
        "Mara",
    ),
    "loogle, none": ({"input": TEXT, "title": "T", "qa_pairs": "none"}, 0, ""),
    "leval": ({"input": TEXT, "instructions": ["Who?", "When?"], "outputs": ["Mara", "1743"]}, 2, "Mara"),
    "exam": (
        {
            "input": TEXT,
            "instructions": ["Who?\n (A) Mara\n (B) Jonas"],
            "outputs": ["(B) Jonas"],
            "evaluation": "exam",
        },
        1,
        "Jonas",
    ),
    "longbench": ({"context": TEXT, "input": "Who?", "answers": ["Mara"]}, 1, "Mara"),
    "squad": (
        {"title": "The_bell", "document": TEXT, "qas": [{"question": "When?", "answer": "1743", "paragraph": 0}]},
        1,
        "1743",
    ),
    "squality": (
        {
            "metadata": {},
            "document": TEXT,
            "questions": [{"question_text": "Plot?", "responses": [{"response_text": "A bell."}]}],
        },
        1,
        "A bell.",
    ),
    "qmsum": (
        {
            "meeting_transcripts": [{"speaker": "A", "content": TEXT}],
            "specific_query_list": [{"query": "What was said?", "answer": "Much."}],
        },
        1,
        "Much.",
    ),
    "own": ({"title": "T", "text": TEXT, "questions": [{"question": "Who?", "answer": "Mara"}]}, 1, "Mara"),
    "one question": ({"document": TEXT, "question": "Who?", "answer": "Mara"}, 1, "Mara"),
    "no question": ({"text": TEXT}, 0, ""),
}


@pytest.mark.parametrize("name", ROWS)
def test_formats(name: str, tmp_path: Path) -> None:
    row, count, answer = ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (item,) = read_items(parse_source(str(path)))
    assert TEXT in item.document.text and item.document.title and len(item.questions) == count
    assert [q.id for q in item.questions] == [str(n) for n in range(count)]
    if count:
        assert item.questions[0].answers[0] == answer
        assert (LISTED in item.questions[0].data) == (name == "exam")
    if name == "squad":
        assert item.document.title == "The bell"
        assert item.questions[0].evidence == ("It rang in the flood of 1743.",)


def test_longbenchs_rows_without_a_question_ask_what_the_task_asks(tmp_path: Path) -> None:
    """Regression: gov_report, whose input is empty, was no readable row."""
    path = tmp_path / "gov_report.jsonl"

    def read(**row: Any) -> Question:
        path.write_text(json.dumps({"context": TEXT, "input": "", "answers": ["A bell rang."]} | row) + "\n")
        (item,) = read_items(parse_source(str(path)))
        (question,) = item.questions
        assert question.answers == ("A bell rang.",)
        return question

    report = read(dataset="gov_report")
    (evaluated,) = make_benchmark("longbench/gov_report").load(path)
    assert report.question == evaluated.questions[0].question and "summary" in report.question
    assert report.kind == "summary"
    counted = read(dataset="passage_count")
    assert counted.question == "How many non-repeating paragraphs are there in total?" and counted.kind == "fact"
    for unknown in ({}, {"dataset": "vcsum"}, {"dataset": "hotpotqa"}, {"dataset": None}):
        assert (read(**unknown).question, read(**unknown).kind) == ("Write a summary of the text.", "summary")
    asked = read(dataset="gov_report", input="Who?")
    assert (asked.question, asked.kind) == ("Who?", "fact"), "what a row asks goes first"
    assert read(dataset="gov_report", input=" ") == report
    for wrong in (None, 3):
        with pytest.raises(BenchmarkDataError, match='no text "input"'):
            read(input=wrong)


def test_ranges_folders_and_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{TEXT} {n}", "title": f"T{n}"}) + "\n" for n in range(5)))
    titles = [item.document.title for item in read_items(parse_source(f"{path}:1-3"))]
    assert titles == ["T1", "T2", "T3"]
    assert [item.document.title for item in read_items(parse_source(f"{path}:4"))] == ["T4"]
    (tmp_path / "z.txt").write_text(TEXT)
    assert len(list(read_items(parse_source(str(tmp_path))))) == 6
    for wrong, words in (
        (f"{path}:3-9", "holds 5 documents"),
        (f"{path}:3-1", "ends before"),
        (f"{tmp_path}/no", "no file"),
    ):
        with pytest.raises(BenchmarkDataError, match=words):
            list(read_items(parse_source(wrong)))


def test_a_title_made_of_the_text_is_not_a_heading_alone(tmp_path: Path) -> None:
    """Regression: papers that all begin with "Introduction" were one title, and leaks of each other."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": f"Introduction\n{TEXT}"}) + "\n")
    (item,) = read_items(parse_source(str(path)))
    assert item.document.title.startswith("Introduction Mara Quill cast")
