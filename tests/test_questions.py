"""Files of questions: the same rows come back with answers, in order, and an interrupted run answers only the rest."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liftlm import Answer, Document, LiftConfig, Model, answer_all, load_config, load_model, questions
from liftlm.errors import ConfigError, DiskFullError, NoWritePermissionError
from liftlm.questions import answer_rows, check_out, read_questions
from test_cli import SMALL, TEXT, lift, only_id
from test_cli import book as book  # a fixture
from test_cli import talker as talker  # a fixture

DOCUMENT = Document(title="Corriden", text=TEXT)
# more text than the default shows, so that what a random model answers depends on the question
SETTINGS = [*SMALL[1::2], "answering.retrieval.neighbours=1", "answering.retrieval.margin=null"]
CONFIG = load_config(None, SETTINGS)
ROWS = [
    {"id": 7, "question": "Who rang the bell?", "expected": "Oswin"},
    {"question": "When?", "of": {"day": 3}},
    {"question": "Who was the ferryman of Corriden, and what did he ring?"},
    {"question": "When?"},  # twice
]


@pytest.fixture(scope="module")
def model(talker: Path) -> Model:
    return load_model(str(talker), CONFIG.model)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that the network is really asked from now on."""
    asked: list[str] = []

    def spy(model: Any, adapter: Any, questions: list[str], **more: Any) -> list[Answer]:
        asked.extend(questions)
        return answer_all(model, adapter, questions, **more)

    monkeypatch.setattr(questions, "answer_all", spy)
    return asked


def stop_after(count: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[[int, Answer], None]:
    """An on_answer that interrupts the work."""
    seen: list[int] = []

    def on_answer(index: int, answer: Answer) -> None:
        seen.append(index)
        if len(seen) == count:
            raise error

    return on_answer


# --- reading ----------------------------------------------------------------------------------------------------------


def test_rows_are_read_as_they_are(tmp_path: Path) -> None:
    rows = [{"question": "Wer läutete?", "n": 1.5, "deep": [{"a": None}]}, {"question": "a\u2028b\x85c"}]
    text = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")  # as Windows writes it
    assert read_questions(tmp_path / "q.jsonl") == rows


# --- answering --------------------------------------------------------------------------------------------------------


def test_the_same_rows_in_the_same_order_with_what_answer_all_says(model: Model) -> None:
    heard: list[int] = []
    result = answer_rows(
        model, None, ROWS, document=DOCUMENT, config=CONFIG, on_answer=lambda index, answer: heard.append(index)
    )
    given = answer_all(model, None, [str(row["question"]) for row in ROWS], document=DOCUMENT, config=CONFIG)
    expected = [
        row | dataclasses.asdict(answer) | {"sources": list(answer.sources)}
        for row, answer in zip(ROWS, given, strict=True)
    ]
    assert without_seconds(result) == without_seconds(expected)
    assert sorted(heard) == [0, 1, 2, 3] and all(row["seconds"] > 0 for row in result)
    assert len({row["answer"] for row in result}) > 1 and result[1]["answer"] == result[3]["answer"]
    assert {row["method"] for row in result} == {"rag"} and "answer" not in ROWS[0]


def test_out_holds_what_is_returned_and_no_partial_file_stays(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "new" / "answers.jsonl"
    result = answer_rows(model, None, ROWS, document=DOCUMENT, config=CONFIG, out=out)
    assert read(out) == result and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_run_answers_only_the_rest(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    out, one_by_one = tmp_path / "a.jsonl", load_config(None, [*SETTINGS, "answering.batch_tokens=1"])
    whole = answer_rows(model, None, ROWS, document=DOCUMENT, config=CONFIG)
    with pytest.raises(error):
        answer_rows(model, None, ROWS, document=DOCUMENT, config=one_by_one, out=out, on_answer=stop_after(2, error))
    assert [path.name for path in tmp_path.glob("*a.jsonl*")] == ["a.jsonl.partial"]
    done = {row["index"] for row in read(tmp_path / "a.jsonl.partial")[1:]}
    assert len(done) == 2
    asked = counting(monkeypatch)
    result = answer_rows(model, None, ROWS, document=DOCUMENT, config=CONFIG, out=out)  # batching does not matter
    assert asked == [row["question"] for index, row in enumerate(ROWS) if index not in done]
    assert without_seconds(result) == without_seconds(whole) and read(out) == result
    assert [path.name for path in tmp_path.glob("*a.jsonl*")] == ["a.jsonl"]


def test_a_line_cut_by_a_kill_costs_that_answer_only(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "a.jsonl", tmp_path / "a.jsonl.partial"
    with pytest.raises(KeyboardInterrupt):
        answer_rows(model, None, ROWS, document=DOCUMENT, config=CONFIG, out=out, on_answer=stop_after(3))
    partial.write_bytes(partial.read_bytes()[:-20])
    kept = [json.loads(line)["index"] for line in partial.read_bytes().split(b"\n")[1:-1]]
    assert len(kept) == 2
    asked = counting(monkeypatch)
    with pytest.raises(KeyboardInterrupt):  # once more: what is appended must not land behind the cut line
        answer_rows(model, None, ROWS, document=DOCUMENT, config=CONFIG, out=out, on_answer=stop_after(1))
    assert len(asked) == 2 and len(read(partial)) == 1 + 3
    answer_rows(model, None, ROWS, document=DOCUMENT, config=CONFIG, out=out)
    assert len(asked) == 3 and [row["question"] for row in read(out)] == [row["question"] for row in ROWS]


def test_every_answer_survives_whatever_is_in_it(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = ["a\u2028b", "c\x85d\x0b\x0c\x1c", 'e\n"f"\\', "牛🐄"]

    def fake(model: Any, adapter: Any, questions: list[str], *, on_answer: Any, **more: Any) -> None:
        for position, question in enumerate(questions):
            on_answer(position, Answer(question, odd[position], "icl", "truncate", 1, 0, 1, 0.5))

    monkeypatch.setattr(questions, "answer_all", fake)
    with pytest.raises(KeyboardInterrupt):
        answer_rows(model, None, ROWS, document=DOCUMENT, config=CONFIG, out=tmp_path / "a", on_answer=stop_after(4))
    monkeypatch.setattr(questions, "answer_all", lambda *arguments, **more: pytest.fail("asked again"))
    result = answer_rows(model, None, ROWS, document=DOCUMENT, config=CONFIG, out=tmp_path / "a")
    assert [row["answer"] for row in result] == odd == [row["answer"] for row in read(tmp_path / "a")]


@pytest.mark.parametrize("change", ["rows", "settings", "seed", "document", "garbage"])
def test_another_run_starts_anew(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    out = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_rows(model, None, ROWS, document=DOCUMENT, config=CONFIG, out=out, on_answer=stop_after(3))
    rows, document, config = ROWS, DOCUMENT, CONFIG
    if change == "rows":
        rows = [*ROWS[:-1], {"question": "Where?"}]
    elif change == "settings":
        config = load_config(None, [*SETTINGS, "answering.max_new_tokens=3"])
    elif change == "seed":
        config = load_config(None, [*SETTINGS, "seed=1"])
    elif change == "document":
        document = Document(title="Another", text=TEXT)
    else:
        (tmp_path / "a.jsonl.partial").write_bytes(b"\xff\xff{")
    asked = counting(monkeypatch)
    result = answer_rows(model, None, rows, document=document, config=config, out=out)
    assert len(asked) == 4 and read(out) == result


def test_a_disk_that_is_full_while_answering(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(DiskFullError):
        answer_rows(model, None, ROWS, document=DOCUMENT, config=CONFIG, out=tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


def test_where_answers_cannot_go_is_said_before_the_work(tmp_path: Path) -> None:
    source = tmp_path / "q.jsonl"
    source.write_text("{}")
    (tmp_path / "link").symlink_to(source)
    for out, error in (
        (tmp_path, ConfigError),
        (source, ConfigError),
        (tmp_path / "link", ConfigError),
        (source / "below", NoWritePermissionError),
        (Path("/proc/nowhere/a.jsonl"), NoWritePermissionError),
    ):
        with pytest.raises(error):
            check_out(out, source, tmp_path / "missing.txt")
    check_out(tmp_path / "new" / "a.jsonl", source)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "new", "q.jsonl"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(
    capsys: pytest.CaptureFixture[str], book: Path, talker: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = book.parent / "q.jsonl", book.parent / "out" / "a.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    more = ["--questions", source, "--model", talker, *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr("liftlm.absorbing.train", lambda *arguments, **more: pytest.fail("trained"))
        for wrong in (book, source, book.parent):
            refused = lift(capsys, "ask", book, "--out", wrong, *more)
            assert refused.code == 2 and refused.out == ""
        assert lift(capsys, "ask", book, "--out", source / "below", *more).code == 31
    done = lift(capsys, "ask", book, "--out", out, *more)
    assert (done.code, done.out) == (0, "") and f"4 answers in {out}." in done.err
    assert [line[:4] for line in done.err.splitlines() if line[1:4] == "/4:"] and "2/4: When?" in done.err
    rows = read(out)
    assert [{key: row[key] for key in given} for row, given in zip(rows, ROWS, strict=True)] == ROWS
    assert {row["method"] for row in rows} == {"lift+rag"} and all("answer" in row for row in rows)
    assert all(0 < row["answer_tokens"] <= 8 and row["prompt_tokens"] <= 248 for row in rows)
    printed = lift(capsys, "ask", only_id(home), *more)  # the same by id, to standard output
    assert without_seconds([json.loads(line) for line in printed.out.splitlines()]) == without_seconds(rows)
    single = lift(capsys, "ask", book, str(ROWS[0]["question"]), "--model", talker, *SMALL)
    assert single.out == f"{rows[0]['answer']}\n"
    assert LiftConfig().answering.context == rows[0]["context"] == "retrieve"
