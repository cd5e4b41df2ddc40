"""Evaluations and studies shared out over workers give the rows of one process: by a crew of one, and (slow) by Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import save_model
from liftlm.cli import app
from liftlm.errors import ConfigError, DocumentsFailedError
from liftlm.evaluation.sharing import EvaluatingWorker, Part, lines_about, lines_added
from liftlm.homes import Home
from liftlm.worklist import CrewOfOne, Outcome
from test_studies import two_documents as two_documents  # a fixture

SETTINGS = [
    *("model.dtype=float32", "model.threads=1", "segments.segment_tokens=128", "tasks.per_sentence=1"),
    *("training.batch_tokens=1024", "adapter.rank=4", "answering.max_new_tokens=4"),
]
FLAGS = [part for setting in SETTINGS for part in ("--set", setting)]
# of a row, what may differ between runs
_MEASURED = ("seconds", "peak_memory_bytes", "absorb_seconds", "context_id", "tokens_per_second")
CREWS = pytest.mark.parametrize("crew", ["alone", pytest.param("ray", marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("m") / "m", window=1024)


@pytest.fixture
def hire(crew: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What was worked on; where there is to be no Ray, this process is the crew."""
    given: list[Any] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if crew == "ray":
        pytest.importorskip("ray")
        return given

    @contextmanager
    def hired(address: str, config: Any, make_worker: Any, order: Any, display: Any) -> Iterator[CrewOfOne]:
        worker = make_worker(order)
        work = worker.work
        worker.work = lambda payload, tell: given.append(payload) or work(payload, tell)
        yield CrewOfOne(worker, display.tell)

    monkeypatch.setattr("liftlm.cluster_commands.hired", hired)
    return given


def run(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return sorted(
        ({k: v for k, v in row.items() if k not in _MEASURED} for row in found), key=lambda row: str(row["id"])
    )


@CREWS
def test_an_evaluation(
    crew: str, hire: list[Any], folder: Path, two_documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data,) = (Path(path) for _, path in two_documents)
    questions = [
        {"document": row["text"], "title": row["title"], "question": asked["question"], "answer": asked["answer"]}
        for row in map(json.loads, data.read_text().splitlines())
        for asked in row["questions"]
    ]
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in questions))
    command = ["evaluate", "jsonl", "--data", data, "--model", folder, "--methods", "icl,lift,lift-other", *FLAGS]
    run(*command, "--out", tmp_path / "alone")
    shared = [*command, "--out", tmp_path / "shared", "--ray", "local", "--library", tmp_path / "adapters"]
    shared += ["--set", "cluster.workers=1"]
    run(*shared)
    assert rows(tmp_path / "shared", "predictions.jsonl") == rows(tmp_path / "alone", "predictions.jsonl")
    assert len(rows(tmp_path / "shared", "predictions.jsonl")) == 18
    assert len((tmp_path / "shared" / "absorbs.jsonl").read_text().splitlines()) == 4  # own and control, of two
    assert len(Home(str(tmp_path / "adapters")).entry_ids()) == 2  # each absorbed once
    assert (tmp_path / "shared" / "report.md").exists()

    lines = (tmp_path / "shared" / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "shared" / "predictions.jsonl").write_text("".join(lines[:-2]))  # two rows are missing
    run(*shared)
    again = (tmp_path / "shared" / "predictions.jsonl").read_text().splitlines(keepends=True)
    assert again[:-2] == lines[:-2] and len(again) == 18
    if crew == "alone":
        assert [part.kind for part in hire] == ["absorb", "absorb", "ask", "ask"] * 2


@CREWS
def test_a_study(crew: str, hire: list[Any], folder: Path, two_documents: Any, tmp_path: Path) -> None:
    ((domain, data),) = two_documents
    command = ["study", "baseline", "--data", f"{domain}={data}", "--quick", "--model", folder]
    command += ["--set", "model.dtype=float32", "--set", "model.threads=1", "--set", "cluster.workers=1"]
    run(*command, "--out", tmp_path / "alone", "--jobs", 1)
    run(*command, "--out", tmp_path / "shared", "--ray", "local")
    measured = rows(tmp_path / "shared", "rows.jsonl")
    assert measured == rows(tmp_path / "alone", "rows.jsonl") and len(measured) > 6
    assert (tmp_path / "shared" / "verdict.json").read_text() == (tmp_path / "alone" / "verdict.json").read_text()
    run(*command, "--out", tmp_path / "shared", "--ray", "local")
    assert rows(tmp_path / "shared", "rows.jsonl") == measured  # nothing was missing
    with pytest.raises(ConfigError, match="--keep keeps adapters of this machine"):
        run(*command, "--out", tmp_path / "shared", "--ray", "local", "--keep")


@pytest.mark.parametrize("crew", ["alone"])
def test_what_fails_is_told_and_the_rest_is_kept(
    hire: list[Any], folder: Path, two_documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data,) = (Path(path) for _, path in two_documents)
    row = json.loads(data.read_text().splitlines()[0])
    own = [{"document": f"{n} {row['text']}", "question": "Who?", "answer": "x"} for n in ("One", "Two")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    work = EvaluatingWorker.work

    def failing(self: EvaluatingWorker, payload: Part, tell: Any) -> Outcome:
        return Outcome(error="no") if payload.kind == "ask" and payload.index == 1 else work(self, payload, tell)

    command = ["evaluate", "jsonl", "--data", tmp_path / "own.jsonl", "--model", folder, "--methods", "icl", *FLAGS]
    command += ["--out", tmp_path / "out", "--ray", "local"]
    with monkeypatch.context() as patch:
        patch.setattr(EvaluatingWorker, "work", failing)
        with pytest.raises(DocumentsFailedError, match=r"1 parts of the work failed: questions about .*: no"):
            run(*command)
    assert len(rows(tmp_path / "out", "predictions.jsonl")) == 1
    run(*command)
    assert len(rows(tmp_path / "out", "predictions.jsonl")) == 2
    with pytest.raises(ConfigError, match="--library goes with --ray"):
        run(*command[:-2], "--library", tmp_path)


def test_lines_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a.jsonl").write_text('{"document_id": "x", "n": 1}\n{"document_id": "y"}\n{"torn')
    (tmp_path / "below" / "b.jsonl").write_text('{"document_id": "x", "n": 2}\n[1]\n')
    known = lines_about(tmp_path, "x")
    assert known == {"a.jsonl": ['{"document_id": "x", "n": 1}'], "below/b.jsonl": ['{"document_id": "x", "n": 2}']}
    with lines_added(known) as (folder, added):
        assert added() == {}
        with (folder / "below" / "b.jsonl").open("a") as file:
            file.write('{"n": 3}\n')
        (folder / "c.jsonl").write_text('{"n": 4}\n')
        assert added() == {"below/b.jsonl": ['{"n": 3}'], "c.jsonl": ['{"n": 4}']}
    assert not folder.exists()
