"""Tasks on disk: a file that is written is read back, one that a person edited too, and what is wrong is named by its line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liftlm.demo import load_demo
from liftlm.errors import DiskFullError, NoWritePermissionError, TasksFileError
from liftlm.tasks import Task, read_tasks_file, write_tasks_file
from liftlm.tasks.extractive import write_extractive_tasks

LENGTH = 100  # characters of the document

# any text that is not white space alone; one end of it may be white space, which is dropped
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(bool)
SPAN = st.tuples(st.integers(0, LENGTH - 1), st.integers(1, LENGTH)).filter(lambda span: span[0] < span[1])
TASK = st.builds(lambda q, a, k, span: Task(q, a, k, *span), TEXT, TEXT, st.text(max_size=9), SPAN)


@settings(deadline=None)
@given(st.lists(TASK, min_size=1, max_size=8))
def test_tasks_are_read_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, tasks: list[Task]) -> None:
    path = tmp_path_factory.getbasetemp() / "tasks.jsonl"
    write_tasks_file(path, tasks)
    assert read_tasks_file(path, LENGTH) == tasks
    assert path.read_bytes().count(b"\n") == len(tasks), "one line a task"


def test_the_chronicles_tasks_go_through_a_file(tmp_path: Path) -> None:
    text = load_demo()[0].text
    tasks = write_extractive_tasks(text, 3)
    write_tasks_file(tmp_path / "t.jsonl", tasks)
    assert read_tasks_file(tmp_path / "t.jsonl", len(text)) == tasks
    first = json.loads((tmp_path / "t.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert list(first) == ["question", "answer", "kind", "start", "end"]
    assert "“" in (tmp_path / "t.jsonl").read_text(encoding="utf-8"), "readable, not \\u201c"


def test_a_file_that_a_person_edited(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(
        "\ufeff"  # as Windows' editor begins a file
        '{"question": "  Who rang? ", "answer": " Oswin\\nTarrel. "}\r\n'
        "\r\n   \n"
        '{"kind":"when","answer":"1743","question":"Wann läutete es? 鐘\u2028","start":3,"end":9,"note":"mine"}\n'
        '{"question": "Why?", "answer": "Because.", "start": 90}'.encode()
    )
    assert read_tasks_file(path, LENGTH) == [
        Task("Who rang?", "Oswin\nTarrel.", "given", 0, LENGTH),
        Task("Wann läutete es? 鐘", "1743", "when", 3, 9),
        Task("Why?", "Because.", "given", 90, LENGTH),
    ]


GOOD = '{"question": "Who?", "answer": "Oswin."}'


def refusal(path: Path) -> TasksFileError:
    with pytest.raises(TasksFileError) as caught:
        read_tasks_file(path, LENGTH)
    error = caught.value
    assert error.exit_code == 18 and str(path) in error.message
    assert error.message.endswith(".") and "\n" not in error.message and error.next_step.endswith((".", '".'))
    return error


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Who rang?", "is not JSON"),
        ('{"question": "Who?", "answer": ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["Who?", "Oswin."]', "is not a JSON object"),
        ("null", "is not a JSON object"),
        ('"Who?"', "is not a JSON object"),
        ("{}", "has no question"),
        ('{"answer": "Oswin."}', "has no question"),
        ('{"question": "  ", "answer": "Oswin."}', "has no question"),
        ('{"question": 5, "answer": "Oswin."}', "has no question"),
        ('{"question": "Who?"}', "has no answer"),
        ('{"question": "Who?", "answer": null}', "has no answer"),
        ('{"question": "Who?", "answer": "\\n"}', "has no answer"),
        ('{"question": "Who?", "answer": "O.", "kind": 3}', "is not a text"),
        ('{"question": "Who?", "answer": "O.", "start": -1}', "(start -1, end 100) is not a span"),
        ('{"question": "Who?", "answer": "O.", "start": 7, "end": 7}', "(start 7, end 7) is not a span"),
        ('{"question": "Who?", "answer": "O.", "end": 101}', "the document's 100 characters"),
        ('{"question": "Who?", "answer": "O.", "start": "3"}', "is not a span"),
        ('{"question": "Who?", "answer": "O.", "start": 1.0}', "is not a span"),
        ('{"question": "Who?", "answer": "O.", "start": true}', "is not a span"),
        ('{"question": "Who?", "answer": "O.", "start": null}', "is not a span"),
    ],
)
def test_a_bad_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    for before in range(3):  # the blank line counts
        path.write_text("\n".join([*[GOOD, "", GOOD][:before], line, GOOD]), encoding="utf-8")
        error = refusal(path)
        assert f"ine {before + 1} of {path}" in error.message and words in error.message, error.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = refusal(tmp_path / "none.jsonl")
    assert "does not exist" in missing.message and "lift tasks" in missing.next_step
    assert "cannot be read" in refusal(tmp_path).message
    (tmp_path / "latin.jsonl").write_bytes('{"question": "Wer läutete?", "answer": "O."}'.encode("latin-1"))
    assert "cannot be read" in refusal(tmp_path / "latin.jsonl").message
    (tmp_path / "empty.jsonl").write_text("\n \n")
    assert "holds no tasks" in refusal(tmp_path / "empty.jsonl").message


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [Task("Who?", "Oswin.", "given", 0, 5)]
    path = tmp_path / "t.jsonl"
    write_tasks_file(path, tasks)
    before = path.read_bytes()
    with pytest.raises(NoWritePermissionError):
        write_tasks_file(path / "below.jsonl", tasks)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DiskFullError):
        write_tasks_file(path, tasks * 2)
    monkeypatch.undo()
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["t.jsonl"]
