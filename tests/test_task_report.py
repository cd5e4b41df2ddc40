"""`lift tasks`: what it prints and writes, and what it says where there is nothing to write with or about."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from conftest import save_model
from fake_server import COMPLETION_TOKENS, PROMPT_TOKENS, FakeServer, sentence_of
from liftlm import load_document
from liftlm.tasks import Task, read_tasks_file
from liftlm.tasks.extractive import write_extractive_tasks
from liftlm.tasks.sentences import split_into_sentences
from test_cli import Result, lift
from test_tasks_llm import document as sentences

pytestmark = pytest.mark.usefixtures("quick_asking")


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "mill.md"
    path.write_text(f"# The mill\n\n{sentences(10)}\n\nIn May 1743 Ulf sold the mill at Corriden.", encoding="utf-8")
    return path


def asking(server: FakeServer | str, *more: str) -> list[str]:
    url = server if isinstance(server, str) else server.url
    settings = [
        "tasks.writer=llm",
        f"tasks.llm.base_url={url}",
        "tasks.llm.model=writer-1",
        "tasks.per_sentence=2",
        *more,
    ]
    return [part for setting in settings for part in ("--set", setting)]


def shown(result: Result) -> list[tuple[str, str, str]]:
    """Kind, question and answer of the sample."""
    return re.findall(r"^\[(.+?)\] (.+)\n  → (.+)$", result.out, re.M)


def as_shown(task: Task) -> tuple[str, str, str]:
    return task.kind, task.question, task.answer


# --- what is printed and written --------------------------------------------------------------------------------------


def test_statistics_and_a_sample_are_printed(
    book: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liftlm.models.load_model", lambda *arguments, **more: pytest.fail("no model is needed"))
    result = lift(
        capsys, "tasks", book, "--sample", 4, "--set", "tasks.writer=extractive", "--set", "tasks.per_sentence=2"
    )
    text = load_document(book).text
    expected, found = write_extractive_tasks(text, 2), split_into_sentences(text)
    assert result.code == 0 and result.err == ""
    first, second, *_ = result.out.splitlines()
    kinds = Counter(task.kind for task in expected)
    assert first.startswith(f"{len(expected)} tasks about {len(found)} sentences (100% covered): ")
    listed = {kind: int(count) for count, kind in re.findall(r"(\d+) ([a-z ]+?)(?=[,.])", first.partition("): ")[2])}
    assert listed == kinds and list(listed.values()) == sorted(listed.values(), reverse=True)
    words = [sum(len(re.findall(r"\w+", t.question)) for t in expected) / len(expected)]
    mean = float(re.findall(r"Questions of ([\d.]+) words", second)[0])
    assert mean == pytest.approx(words[0], abs=0.3)
    assert f"{len({t.question.lower() for t in expected})} questions differ" in second
    sample = shown(result)
    assert len(sample) == 4 == len(set(sample)) and set(sample) <= set(map(as_shown, expected))
    assert "Filtered out" not in result.out and "Server" not in result.out
    assert not home.exists(), "nothing is to be kept"


def test_the_sample_is_the_seeds_and_not_the_beginning(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(*more: str) -> list[tuple[str, str, str]]:
        return shown(lift(capsys, "tasks", book, "--sample", "3", *more))

    assert drawn() == drawn()
    ordered = list(map(as_shown, write_extractive_tasks(load_document(book).text, 3)))
    places = [ordered.index(task) for task in drawn("--set", "tasks.per_sentence=3")]
    assert places != sorted(places) or max(places) > 5


@pytest.mark.parametrize(("sample", "count"), [("0", 0), ("1000", None)])
def test_as_many_are_shown_as_there_are(
    sample: str, count: int | None, book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = lift(capsys, "tasks", book, "--sample", sample)
    written = int(result.out.split()[0])
    assert result.code == 0 and len(re.findall("  → ", result.out)) == (written if count is None else count)
    assert lift(capsys, "tasks", book, "--sample", "-1").code == 2


def test_out_is_a_file_to_train_on(book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "tasks.jsonl"
    result = lift(capsys, "tasks", book, "--out", out, "--sample", "0", "--set", "tasks.per_sentence=3")
    text = load_document(book).text
    found = read_tasks_file(out, len(text))
    assert result.code == 0 and f"{len(found)} tasks in {out}" in result.err and f"--tasks {out}" in result.err
    assert result.out.startswith(f"{len(found)} tasks")
    assert [task.start for task in found] == sorted(task.start for task in found)
    assert Counter(found) == Counter(write_extractive_tasks(text, 3))
    assert [path.name for path in out.parent.iterdir()] == ["tasks.jsonl"]
    model = save_model(tmp_path / "m", window=1024)
    small = ["--model", str(model), "--set", "adapter.rank=2", "--set", "segments.segment_tokens=128"]
    rows = out.read_text(encoding="utf-8").splitlines()
    out.write_text("\n".join(rows[:3]), encoding="utf-8")
    trained = lift(capsys, "absorb", book, "--tasks", out, *small)
    assert trained.code == 0 and "3 tasks" in trained.err


def test_out_is_not_the_document_nor_a_folder(book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = book.read_bytes()
    for out in (book, tmp_path):
        assert lift(capsys, "tasks", book, "--out", out).code == 2
    assert book.read_bytes() == before


def test_from_standard_input_under_a_title(capsys: pytest.CaptureFixture[str]) -> None:
    result = lift(capsys, "tasks", "-", "--title", "Mills", "--sample", "1", stdin=sentences(5).encode())
    assert result.code == 0 and "about 5 sentences" in result.out


# --- language models --------------------------------------------------------------------------------------------------


def test_a_server_is_reported_with_what_it_cost(
    book: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(body: dict[str, object]) -> str:
        asked = sentence_of(body)
        if asked.startswith("Bert"):
            return "[]"
        useless = {"question": "What does it say?", "answer": "As the text says."}
        return json.dumps([{"question": f"How many sacks, {asked.split()[0]}?", "answer": asked}, useless])

    out = tmp_path / "t.jsonl"
    with FakeServer(reply=reply, failures=["429", "", "500"]) as server:
        result = lift(capsys, "tasks", book, "--out", out, *asking(server, "tasks.llm.concurrency=1"))
    assert result.code == 0
    assert result.out.startswith("10 tasks about 11 sentences (91% covered): 10 llm.")
    assert "Filtered out: 10 says nothing." in result.out
    answered = 11
    assert (
        f"Server: 13 requests (2 repeated), {answered * PROMPT_TOKENS:,} prompt and {answered * COMPLETION_TOKENS} answer "
        "tokens; 0 of 11 sentences failed." in result.out
    )
    assert len(read_tasks_file(out, 10**6)) == 10
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert not any((home / "unfinished").iterdir())


def test_absorbing_says_what_the_server_cost_too(
    book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", window=2048, seed=1)
    small = ["--set", "adapter.rank=4", "--set", "segments.segment_tokens=512"]
    with FakeServer(failures=["", "429"]) as server:
        result = lift(capsys, "absorb", book, "--model", model, *small, *asking(server))
    assert result.code == 0, result.err
    assert "Filtered out: none." in result.err
    assert (
        "Server: 12 requests (1 repeated), 1,100 prompt and 220 answer tokens; 0 of 11 sentences failed." in result.err
    )
    again = lift(capsys, "absorb", book, "--model", model, *small, *asking("http://127.0.0.1:9/v1"))
    assert again.code == 0 and "Server:" not in again.err


def test_a_used_up_budget_is_said(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        result = lift(capsys, "tasks", book, *asking(server, "tasks.llm.budget_tokens=300", "tasks.llm.concurrency=1"))
    assert result.code == 0 and "the budget is used up" in result.out and len(server.requests) == 3


def test_an_interrupted_call_goes_on_but_not_with_another_documents_tasks(
    book: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: what had been written about the one document was mixed into the file of the other."""
    other, out = tmp_path / "other.txt", tmp_path / "t.jsonl"
    other.write_text("The ferryman Oswin Tarrel rang the bell of Corriden twice.")
    with FakeServer(dies_after=6) as server:
        broken = lift(capsys, "tasks", book, "--out", out, *asking(server, "tasks.llm.concurrency=2"))
    assert broken.code == 24 and "kept" in broken.err and broken.out == "" and not out.exists()
    assert len(list((home / "unfinished").iterdir())) == 1
    assert "unfinished" in lift(capsys, "library", "list").out
    with FakeServer() as server:
        assert lift(capsys, "tasks", other, "--out", out, *asking(server)).code == 0
        assert len(server.requests) == 1
    assert {task.answer for task in read_tasks_file(out, 100)} == {other.read_text()}
    with FakeServer() as server:
        assert lift(capsys, "tasks", book, "--out", out, *asking(server, "tasks.llm.concurrency=2")).code == 0
        assert len(server.requests) == 11 - 6
    found = read_tasks_file(out, 10**6)
    assert len(found) == 22 and [task.start for task in found] == sorted(task.start for task in found)
    assert not any((home / "unfinished").iterdir())


def test_the_model_itself_writes(book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny random one writes nothing of use, and that is said."""
    model = save_model(tmp_path / "m", window=2048)
    result = lift(
        capsys, "tasks", book, "--model", model, "--set", "tasks.writer=self", "--set", "tasks.per_sentence=1"
    )
    assert result.code == 11 and ("gave no tasks" in result.err or "none is of use" in result.err)


def test_where_nothing_is_of_use_the_reasons_are_said(
    book: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    useless = json.dumps([{"question": "What does it say there?", "answer": "Unknown."}])
    with FakeServer(reply=lambda body: useless) as server:
        result = lift(capsys, "tasks", book, *asking(server))
    assert result.code == 11 and result.out == ""
    assert "Of the 11 tasks written about 'The mill' none is of use: 11 says nothing." in result.err
    assert not any((home / "unfinished").iterdir())


# --- nothing to write with, or about ----------------------------------------------------------------------------------


def test_no_writer_is_a_wrong_setting(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = lift(capsys, "tasks", book, "--set", "tasks.writer=none")
    assert result.code == 2 and "tasks.writer is none" in result.err and result.out == ""


@pytest.mark.parametrize(
    ("settings", "missing"),
    [([], "tasks.llm.base_url"), (["--set", "tasks.llm.base_url=http://127.0.0.1:9/v1"], "tasks.llm.model")],
)
def test_a_server_that_is_not_named_is_a_wrong_setting(
    settings: list[str], missing: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = lift(capsys, "tasks", book, "--out", tmp_path / "t.jsonl", "--set", "tasks.writer=llm", *settings)
    assert result.code == 2 and f"{missing} is not set" in result.err and result.out == ""
    assert not (tmp_path / "t.jsonl").exists()


def test_a_server_that_is_not_there_is_said(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = lift(capsys, "tasks", book, *asking("http://127.0.0.1:9/v1"))
    assert result.code == 24 and "cannot be reached" in result.err and result.out == ""


@pytest.mark.parametrize("text", ["IV.", "Yes.\n\nNo!\n"])
@pytest.mark.parametrize("writer", ["extractive", "llm"])
def test_a_document_that_gives_no_tasks_is_said(
    writer: str, text: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text(text)
    more = asking("http://127.0.0.1:9/v1") if writer == "llm" else ["--set", "tasks.writer=extractive"]
    result = lift(capsys, "tasks", tmp_path / "short.txt", "--out", tmp_path / "t.jsonl", *more)
    assert result.code == 11 and "gave no tasks" in result.err and "four words" in result.err
    assert result.out == "" and not (tmp_path / "t.jsonl").exists()
    assert not list((home / "unfinished").glob("*"))
