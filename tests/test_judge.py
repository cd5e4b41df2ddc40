"""The judge against a real server on this machine: what it asks, how replies are read, how it fails, what it keeps."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_server import FakeServer
from liftlm.cli import app
from liftlm.errors import ConfigError, LiftError
from liftlm.evaluation.judge import (
    Judge,
    JudgeUnreachableError,
    judge_messages,
    judge_rows,
    read_verdicts,
)
from liftlm.evaluation.scoring import score_folder
from liftlm.evaluation.verdicts import read_verdict
from test_scoring import Toy, row, write

pytestmark = pytest.mark.usefixtures("quick_asking")


def predictions(count: int) -> list[dict[str, Any]]:
    """Every second answer is wrong."""
    return [row("lift", n, question=f"Who rang bell {n}?", answer="Marta" if n % 2 else "Oswin") for n in range(count)]


def same(body: dict[str, Any]) -> str:
    """A judge that compares letters."""
    asked = body["messages"][1]["content"]
    return str(asked.partition("Ground truth: ")[2].split("\n")[0] == asked.partition("Predicted answer: ")[2])


def judge(server: FakeServer, **more: Any) -> Judge:
    return Judge(server.url, "judge-1", **{"concurrency": 4, "timeout_seconds": 5.0} | more)


def kept(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_folder_is_judged_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, predictions(4))
    (tmp_path / "run.json").write_text('{"benchmark": "jsonl"}')
    with FakeServer(reply=same) as server:
        command = ["score", str(tmp_path), "--judge-url", server.url, "--judge-model", "judge-1"]
        app(command, standalone_mode=False)
        app(command, standalone_mode=False)
        assert len(server.requests) == 4 and {body["model"] for body in server.requests} == {"judge-1"}
        for alone in (command[:4], [*command[:2], *command[4:]]):
            with pytest.raises(ConfigError, match="--judge-url and --judge-model"):
                app(alone, standalone_mode=False)
            with pytest.raises(ConfigError, match="--judge-url and --judge-model"):
                app(["evaluate", "jsonl", "--out", str(tmp_path / "new"), *alone[2:]], standalone_mode=False)
        assert len(server.requests) == 4 and not (tmp_path / "new").exists()
    assert capsys.readouterr().out == f"{tmp_path / 'report.md'}\n" * 2
    assert json.loads((tmp_path / "scores.json").read_text())["lift"]["judge"] == 0.5
    assert "| judge | judge-1 |" in (tmp_path / "report.md").read_text()
    app(["score", str(tmp_path)], standalone_mode=False)  # without the server, what it said before
    assert json.loads((tmp_path / "scores.json").read_text())["lift"]["judge"] == 0.5


# --- what is asked and kept -------------------------------------------------------------------------------------------


def test_every_answer_is_judged_once(tmp_path: Path) -> None:
    path = tmp_path / "judgements.jsonl"
    progress: list[tuple[int, int]] = []
    with FakeServer(reply=same, delay_seconds=0.1, slots=4) as server:
        judge_rows(predictions(9), judge(server), path, on_judged=lambda *numbers: progress.append(numbers))
        assert len(server.requests) == 9 and server.most_in_flight > 1
        judge_rows(predictions(10), judge(server), path)  # one more
        assert len(server.requests) == 10
    rows = {row["id"]: row for row in kept(path)}
    assert len(rows) == 10 == len(kept(path))
    for number in range(10):
        found = rows[f"lift/{number}"]
        assert (found["judge"], found["verdict"], found["error"]) == ("judge-1", number % 2 == 0, None)
        assert found["reply"] == str(number % 2 == 0)
    assert progress == [(done, 9) for done in range(1, 10)]


def test_what_the_judge_is_asked(tmp_path: Path) -> None:
    with FakeServer(reply=lambda body: "True") as server:
        judge_rows(
            [row("lift", answer="by Oswin", answers=["Oswin", "the ferryman"])], judge(server), tmp_path / "j.jsonl"
        )
    body = server.requests[0]
    assert (body["model"], body["temperature"]) == ("judge-1", 0.0)
    system, user = (message["content"] for message in body["messages"])
    assert "means the same" in system and system.endswith("True or False.")
    assert (
        user == "Question: Who rang?\nGround truth: any one of these: Oswin; the ferryman\nPredicted answer: by Oswin"
    )
    system, user = (message["content"] for message in judge_messages(row("lift", answer="A paper."), rate=True))
    assert all(word in system for word in ("completeness", "consistency", "fluency", "grammar", "from 0", "to 100"))
    assert user == "Ground truth:\nOswin\n\nGenerated summary:\nA paper."


def test_summaries_are_rated(tmp_path: Path) -> None:
    path = tmp_path / "judgements.jsonl"
    rows = [row("lift", 0), row("lift", 1), row("lift", 2)]
    replies = iter(["Score: 87/100", "40", "12.5"])
    with FakeServer(reply=lambda body: next(replies)) as server:
        judge_rows(rows, judge(server, concurrency=1), path, rate=True)
    assert [found["verdict"] for found in kept(path)] == [87.0, 40.0, 12.5]
    assert read_verdicts(tmp_path, rows, None, rate=True) == (
        "judge-1",
        {"lift/0": 0.87, "lift/1": 0.4, "lift/2": 0.125},
    )


def test_another_judge_and_another_answer_are_asked_about_again(tmp_path: Path) -> None:
    path = tmp_path / "judgements.jsonl"
    with FakeServer(reply=same) as server:
        judge_rows([row("lift")], judge(server), path)
        judge_rows([row("lift")], Judge(server.url, "judge-2"), path)
        assert read_verdicts(tmp_path, [row("lift")], "judge-1") == ("judge-1", {"lift/0": 1.0})
        assert read_verdicts(tmp_path, [row("lift", answer="x")], None) == ("judge-2", {})  # stale
        judge_rows([row("lift", answer="x")], judge(server), path)
        assert len(server.requests) == 3
    assert read_verdicts(tmp_path, [row("lift", answer="x")], None) == ("judge-1", {"lift/0": 0.0})


def test_the_key_is_sent_and_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-1")
    path = tmp_path / "judgements.jsonl"
    with FakeServer(key="sk-secret-1", reply=lambda body: "True, says sk-secret-1") as server:
        judge_rows(predictions(1), judge(server, api_key_variable="MY_KEY"), path)
        assert server.keys == {"sk-secret-1"}
        monkeypatch.setenv("MY_KEY", "sk-wrong-2")
        with pytest.raises(JudgeUnreachableError) as caught:
            judge_rows(predictions(2), judge(server, api_key_variable="MY_KEY"), path)
    assert "status 401" in caught.value.message and "MY_KEY" in caught.value.next_step
    assert "sk-" not in str(caught.value) and "sk-" not in path.read_text()
    assert len(kept(path)) == 1


# --- replies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("True", True),
        ("false", False),
        (" **True** .", True),
        ("'False'", False),
        ("Yes", True),
        ("No.", False),
        ("No, they name different people.", False),
        ("Yes they mean the same.", True),
        ("Correct.", True),
        ("Incorrect!", False),
        ("False\n\nThe prediction says true things, but others.", False),
        ("Answer: Yes", True),
        ("Verdict: **False**", False),
        ("They differ in the year. Verdict: False", False),
        ("The two mean the same, so it is True.", True),
        ('{"verdict": true}', True),
        ('{"same": "No", "reason": "another name"}', False),
        ('```json\n{"score": 1}\n```', True),
        ('{"verdict": "True", "confidence": 0.9}', True),
        ("<think>False? No. It may be true.</think>\nTrue", True),
        ("True or False? I cannot say.", None),
        ("true/false", None),
        ("It is not true.", None),
        ("The ground truth answer is yes, but the prediction denies it.", None),
        ("No verdict is possible.", None),
        ("I would rather talk about the weather.", None),
        ("87", None),
        ('{"score": 87}', None),
        ("", None),
    ],
)
def test_true_and_false_replies(text: str, expected: bool | None) -> None:
    assert read_verdict(text, rate=False) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("87", 87.0),
        ("Score: 87/100", 87.0),
        ("**Score**: 87.5", 87.5),
        ("87 out of 100.", 87.0),
        ("I rate it 8/10.", 80.0),
        ('{"score": 42}', 42.0),
        ('{"score": "42/100", "reason": "Half of the 7 findings are missing."}', 42.0),
        ('{"completeness": 80, "consistency": 90, "overall": 85}', 85.0),
        ("Completeness: 80/100. Fluency: 90/100. Overall score: 84/100", 84.0),
        ("Completeness 8/10, fluency 9/10, overall 7/10", 70.0),
        ("On a scale of 0 to 100, I would give it 65.", 65.0),
        ("It has 3 of the findings and a score of 30.", 30.0),
        ("<think>Maybe 50.</think>55%", 55.0),
        ("0", 0.0),
        ("100", 100.0),
        ("Between 60 and 80", None),
        ("Completeness: 80/100. Fluency: 90/100.", None),
        ("-5", None),
        ("101", None),
        ("1,000", None),
        ("True", None),
        ("Good.", None),
        ("", None),
    ],
)
def test_ratings(text: str, expected: float | None) -> None:
    assert read_verdict(text, rate=True) == expected


def test_nonsense_is_asked_for_once_more_and_then_not_judged(tmp_path: Path) -> None:
    path = tmp_path / "judgements.jsonl"
    replies: Iterator[str] = iter(["Hm.", "False", "Hm.", "Well …", "True"])
    with FakeServer(reply=lambda body: next(replies)) as server:
        judge_rows(predictions(3), judge(server, concurrency=1), path)
        assert len(server.requests) == 5
        again = server.requests[1]["messages"]
        assert [message["role"] for message in again] == ["system", "user", "assistant", "user"]
        assert again[2]["content"] == "Hm." and "True or False" in again[3]["content"]
        judge_rows(predictions(3), judge(server), path)  # the same model would say the same
        assert len(server.requests) == 5
    assert [(found["verdict"], found["reply"]) for found in kept(path)] == [
        (False, "False"),
        (None, "Well …"),
        (True, "True"),
    ]
    assert read_verdicts(tmp_path, predictions(3), None)[1] == {"lift/0": 0.0, "lift/2": 1.0}


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", ["429", "500", "503", "408", "timeout", "drip", "reset", "not json", "no choices"])
def test_what_may_pass_is_tried_again(tmp_path: Path, failure: str) -> None:
    path = tmp_path / "judgements.jsonl"
    with FakeServer(failures=["", failure, failure], reply=same) as server:
        judge_rows(predictions(3), judge(server, concurrency=1, timeout_seconds=0.5), path)
        assert len(server.requests) == 5
    assert [found["verdict"] for found in kept(path)] == [True, False, True]


@pytest.mark.parametrize("wait", ["429:1", "503:date"])
def test_retry_after_is_honoured(tmp_path: Path, wait: str) -> None:
    with FakeServer(failures=[wait], reply=same) as server:
        judge_rows(predictions(1), judge(server), tmp_path / "j.jsonl")
    assert server.times[1] - server.times[0] >= 0.9


def test_a_wait_that_is_too_long_is_not_waited_for(tmp_path: Path) -> None:
    start = time.monotonic()
    with FakeServer(failures=["", "429:100000"], reply=same) as server:
        judge_rows(predictions(3), judge(server, concurrency=1), tmp_path / "j.jsonl")
    assert time.monotonic() - start < 30
    assert [found["verdict"] for found in kept(tmp_path / "j.jsonl")] == [True, None, True]
    assert "status 429" in kept(tmp_path / "j.jsonl")[1]["error"]


def test_a_failed_answer_is_asked_about_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "judgements.jsonl"
    with FakeServer(failures=["", "400"], reply=same) as server:
        judge_rows(predictions(3), judge(server, concurrency=1), path)
        assert [found["verdict"] for found in kept(path)] == [True, None, True]
        assert kept(path)[1]["error"] == "answered with status 400: failing with 400 to order"
        judge_rows(predictions(3), judge(server), path)
        assert len(server.requests) == 4
    assert read_verdicts(tmp_path, predictions(3), None)[1] == {"lift/0": 1.0, "lift/1": 0.0, "lift/2": 1.0}


def test_a_model_without_temperature(tmp_path: Path) -> None:
    with FakeServer(rejects=["temperature"], reply=same) as server:
        judge_rows(predictions(3), judge(server, concurrency=1), tmp_path / "j.jsonl")
    assert ["temperature" in body for body in server.requests] == [True, False, False, False]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"always": "404"}, ("status 404", "judge-1")),
        ({"always": "500"}, ("status 500", "Try again later")),
        ({"always": "html"}, ("sent no completion", "/v1")),
        ({"always": "timeout"}, ("did not answer within 0.3 seconds",)),
        ({"key": "right"}, ("status 401", "OPENAI_API_KEY")),
    ],
)
def test_a_server_of_no_use_shows_at_once(tmp_path: Path, how: dict[str, Any], words: tuple[str, ...]) -> None:
    with FakeServer(**how) as server, pytest.raises(JudgeUnreachableError) as caught:
        judge_rows(predictions(20), judge(server, timeout_seconds=0.3, attempts=2), tmp_path / "j.jsonl")
    assert all(word in str(caught.value) for word in words) and server.url in caught.value.message
    assert len(server.requests) <= 2 and isinstance(caught.value, LiftError)
    assert not (tmp_path / "j.jsonl").exists()


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with FakeServer() as server:
        pass
    with pytest.raises(JudgeUnreachableError, match="cannot be reached: Connection refused"):
        judge_rows(predictions(2), judge(server), tmp_path / "j.jsonl")


def test_a_server_that_dies_leaves_what_it_judged_and_the_next_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "judgements.jsonl"
    with FakeServer(dies_after=6, reply=same) as server, pytest.raises(JudgeUnreachableError) as caught:
        judge_rows(predictions(40), judge(server, attempts=2), path)
    assert "stopped judging after" in caught.value.message and "kept" in caught.value.next_step
    judged = [found["id"] for found in kept(path) if found["verdict"] is not None]
    assert len(judged) >= 5
    with path.open("a") as file:
        file.write('{"id": "lift/3", "verd')  # killed while writing
    with FakeServer(reply=same) as server:
        judge_rows(predictions(40), judge(server), path)
        assert len(server.requests) == 40 - len(judged)
    assert len(read_verdicts(tmp_path, predictions(40), None)[1]) == 40


def test_a_server_that_dies_near_the_end_is_noticed_too(tmp_path: Path) -> None:
    with FakeServer(dies_after=3, reply=same) as server, pytest.raises(JudgeUnreachableError) as caught:
        judge_rows(predictions(5), judge(server, attempts=2, concurrency=1), tmp_path / "j.jsonl")
    assert "stopped judging after 3 of 5 answers: it cannot be reached" in caught.value.message
    assert [found["verdict"] for found in kept(tmp_path / "j.jsonl")] == [True, False, True, None, None]


@pytest.mark.parametrize(
    ("address", "model", "word"),
    [
        ("localhost:8000", "m", "address"),
        ("", "m", "address"),
        ("http://x:y/v1", "m", "address"),
        ("http://x/v1", " ", "model"),
    ],
)
def test_settings(tmp_path: Path, address: str, model: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        judge_rows(predictions(1), Judge(address, model), tmp_path / "j.jsonl")


# --- in the scores ----------------------------------------------------------------------------------------------------


def test_verdicts_become_scores_and_stay_without_the_server(tmp_path: Path) -> None:
    write(tmp_path, [*predictions(4), row("rag", 0, error="broken", answer="")])
    assert score_folder(tmp_path, Toy()).methods["lift"]["judge"] is None
    replies = iter(["True", "False", "True", "Hm.", "Hm."])
    with FakeServer(reply=lambda body: next(replies)) as server:
        scores = score_folder(tmp_path, Toy(), judge(server, concurrency=1))
    entry = scores.methods["lift"]
    assert entry["judge"] == pytest.approx(2 / 3, abs=1e-6) and entry["n"] == 4
    assert scores.details["methods"]["lift"]["counts"]["judge"] == 3  # one is not judged
    assert scores.details["judge"] == "judge-1" and scores.methods["rag"]["judge"] is None
    assert score_folder(tmp_path, Toy()) == scores


def test_summaries_are_rated_in_benchmarks_of_summaries(tmp_path: Path) -> None:
    class Summaries(Toy):
        name = "loogle-summarization"

    write(tmp_path, predictions(2))
    with FakeServer(reply=lambda body: "Score: 60/100") as server:
        scores = score_folder(tmp_path, Summaries(), judge(server))
    assert scores.methods["lift"]["judge"] == 0.6
