"""The llm writer against a real server on this machine: what it asks, how it fails, what it keeps, how it stops."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_server import COMPLETION_TOKENS, PROMPT_TOKENS, FakeServer, make_pairs, sentence_of
from liftlm.config import TasksConfig
from liftlm.errors import ConfigError, DiskFullError, NoWritePermissionError, WriterUnreachableError
from liftlm.tasks import asking, llm
from liftlm.tasks.filters import filter_tasks
from liftlm.tasks.llm import LlmWriter, WriterReport
from liftlm.tasks.replies import FORMS, Pair, make_messages, make_requests, read_reply
from liftlm.tasks.sentences import split_into_sentences
from liftlm.tasks.task import Task
from test_storage import small_disk as small_disk  # a fixture

NAMES = ["Anna", "Bert", "Carla", "Dirk", "Edda", "Falk", "Greta", "Hugo", "Ilse", "Jost"]
NAMES += ["Karla", "Lutz", "Mara", "Nils", "Olga", "Paul", "Rosa", "Sven", "Tilda", "Ulf"]


def document(count: int) -> str:
    """So many sentences, all different, four to a paragraph."""
    lines = [
        f"{NAMES[n % 20]} carried {n + 20} sacks of barley over the bridge at {NAMES[n // 20]} mill."
        for n in range(count)
    ]
    return "\n\n".join(" ".join(lines[n : n + 4]) for n in range(0, count, 4))


pytestmark = pytest.mark.usefixtures("quick_asking")


def config(url: str | None, per_sentence: int = 2, answers: str = "auto", **more: Any) -> TasksConfig:
    server = {"base_url": url, "model": "writer-1", "concurrency": 4, "timeout_seconds": 5.0} | more
    return TasksConfig.model_validate({"per_sentence": per_sentence, "answers": answers, "llm": server})


def run(text: str, settings: TasksConfig, cache: Path) -> tuple[list[list[Task]], WriterReport]:
    writer = LlmWriter(text, settings, cache)
    return list(writer.stream()), writer.report


# --- what is asked and what comes back --------------------------------------------------------------------------------


def test_every_sentence_is_asked_about_and_gets_its_tasks(tmp_path: Path) -> None:
    text = document(10)
    with FakeServer() as server:
        lists, report = run(text, config(server.url, per_sentence=3), tmp_path / "tasks.jsonl")
    spans = [text.index(f"{NAMES[n]} carried {n + 20} ") for n in range(10)]
    assert sorted(tasks[0].start for tasks in lists) == spans
    for tasks in lists:
        assert len(tasks) == 3 == len({task.question for task in tasks})
        for task in tasks:
            assert task.answer == text[task.start : task.end] and task.kind == "fact"
    flat = [task for tasks in lists for task in tasks]
    assert filter_tasks(flat, text) == (flat, {})
    assert sorted(map(sentence_of, server.requests)) == sorted(text[task[0].start : task[0].end] for task in lists)
    assert report == WriterReport(
        sentences=10,
        cached=0,
        written=10,
        failed=0,
        unasked=0,
        tasks=30,
        requests=10,
        retries=0,
        prompt_tokens=10 * PROMPT_TOKENS,
        completion_tokens=10 * COMPLETION_TOKENS,
        budget_reached=False,
        not_supported=(),
        last_failure="",
    )


def test_a_request_holds_settings_schema_and_the_text_before(tmp_path: Path) -> None:
    text = "# The mill\n\n" + document(12) + "\n\nYes. So it was.\n\nIn the end Ulf sold the mill to Rosa."
    with FakeServer() as server:
        run(text, config(server.url, temperature=0.25), tmp_path / "tasks.jsonl")
    bodies = {sentence_of(body): body for body in server.requests}
    assert len(bodies) == 13 or len(bodies) == 14  # "Yes. So it was." has four words only when joined
    for body in bodies.values():
        assert (body["model"], body["temperature"]) == ("writer-1", 0.25)
        schema = body["response_format"]["json_schema"]
        assert body["response_format"]["type"] == "json_schema" and schema["strict"] is True
        fields = schema["schema"]["properties"]["tasks"]["items"]
        assert set(fields["properties"]) == {"kind", "question", "answer"} == set(fields["required"])
        assert fields["properties"]["kind"]["enum"] == list(FORMS)
    first = bodies["Anna carried 20 sacks of barley over the bridge at Anna mill."]["messages"][1]["content"]
    assert first.startswith("Text before the sentence:\n[The mill]\n\nSentence:")
    seventh = bodies["Greta carried 26 sacks of barley over the bridge at Anna mill."]["messages"][1]["content"]
    before, _, after = seventh.partition("\n\nSentence:\n")
    assert all(f"carried {n} sacks" in before for n in range(20, 26)) and "carried 26 sacks" not in before
    assert "carried 27" not in seventh and "2 different question-answer pairs" in after


@pytest.mark.parametrize("seed", range(20))
def test_runs_are_drawn_anew_only_when_all_have_been(seed: int) -> None:
    """Regression: of ten runs some were the same, and so were their tasks."""
    text = document(25)  # ten beginnings of runs of 16

    def drawn(count: int) -> list[int]:
        return [request.sentence.start for request in make_requests(text, 16, count, seed)]

    begins = [sentence.start for sentence in split_into_sentences(text)][:10]
    assert drawn(10) == begins
    some = drawn(4)
    assert len(set(some)) == 4 and some == sorted(some) and set(some) < set(begins)
    assert {drawn(23).count(begin) for begin in begins} == {2, 3} and len(drawn(23)) == 23
    assert len({tuple(make_requests(text, 16, 4, other)) for other in range(20)}) > 15, "not at random"
    assert make_requests("", 16, 10, seed) == [] and len(make_requests(document(3), 16, 2, seed)) == 2


def test_words_about_a_single_sentence_stay_as_they_were() -> None:
    """What was recorded of language models is found by the hash of the whole conversation."""
    text = "# The mill\n\nAnna carried 20 sacks of barley over the bridge. Bert followed her with the cart."
    made = [json.dumps(make_messages(request, 3), sort_keys=True) for request in make_requests(text)]
    found = [hashlib.sha256(conversation.encode()).hexdigest()[:16] for conversation in made]
    assert found == ["739dbf5f5256fd91", "195f94cf2943a873"]


@pytest.mark.parametrize(
    ("answers", "wanted", "unwanted"),
    [
        ("auto", "- An answer is short and complete: a few words, or one sentence", "again"),
        ("short", "- An answer is a few words, never a whole sentence.\n", "again"),
        ("sentence", "- An answer is one whole sentence that says again what was asked about", "a few words"),
        ("mixed", "- By turns, an answer is a few words, and one whole sentence", "never a whole"),
    ],
)
def test_the_form_of_answers_is_asked_for(tmp_path: Path, answers: Any, wanted: str, unwanted: str) -> None:
    with FakeServer() as server:
        run(document(2), config(server.url, answers=answers), tmp_path / "tasks.jsonl")
        assert len(server.requests) == 2
        for body in server.requests:
            system = body["messages"][0]["content"]
            assert wanted in system and unwanted not in system and "{" not in system


def test_a_run_of_sentences_is_asked_about_as_several(tmp_path: Path) -> None:
    """The evidence of its tasks is the whole run; a sentence that is left alone at the end is a single one."""
    text, cache = "# The mill\n\n" + document(5), tmp_path / "tasks.jsonl"
    with FakeServer() as server:
        settings = config(server.url).model_copy(update={"sentences_together": 2})
        lists, report = run(text, settings, cache)
        assert (report.sentences, report.written, report.requests) == (3, 3, 3)
        bodies = sorted(server.requests, key=lambda body: text.index(sentence_of(body)[:20]))
        run(text, settings, cache)
        assert len(server.requests) == 3, "asked again"
        alone = make_messages(make_requests(text)[-1], 2)
        assert bodies[2]["messages"] == alone and "sentences" not in alone[1]["content"].lower()
    for body, first in zip(bodies[:2], (0, 2), strict=True):
        system, user = (message["content"] for message in body["messages"])
        pair = [
            f"{NAMES[n]} carried {n + 20} sacks of barley over the bridge at Anna mill." for n in (first, first + 1)
        ]
        assert (
            f"\n\nSentences:\n{' '.join(pair)}\n\nWrite 2 different question-answer pairs about these sentences. "
            in user
        )
        assert user.startswith("Text before the sentences:\n[The mill]") and "this sentence" not in user
        assert "about neighbouring sentences of a document" in system and "from the sentences alone" in system
        assert "{" not in system and "the sentence " not in system and "one sentence of" not in system
        (tasks,) = [some for some in lists if some[0].answer == " ".join(pair)]
        assert {(task.start, task.end) for task in tasks} == {
            (text.index(pair[0]), text.index(pair[1]) + len(pair[1]))
        }, "not the whole run"


def test_what_was_written_about_a_single_sentence_is_not_taken_for_a_run() -> None:
    """Of the same words: a heading's sentence, say, that another reading of the document splits in two."""
    (single,) = make_requests("Anna carried 20 sacks of barley over the bridge.")
    several = dataclasses.replace(single, sentences=2)
    assert llm._key(single, config("http://x/v1")) != llm._key(several, config("http://x/v1"))


def test_the_text_before_is_whole_sentences_and_at_most_2048_characters() -> None:
    text = " ".join(
        f"Sentence {n} of this one long paragraph speaks of the number {n} at some length." for n in range(100)
    )
    contexts = [request.context for request in make_requests(text)]
    assert contexts[0] == "" and 1900 < len(contexts[-1]) <= 2048
    assert contexts[-1].startswith("Sentence 7") and contexts[-1].endswith("the number 98 at some length.")
    dialogue = "\n\n".join(f"“I saw {n} of them,” said the old ferryman." for n in range(60))
    assert 512 <= len(make_requests(dialogue)[-1].context) < 700  # one paragraph before would be 45 characters
    paragraphs = "\n\n".join(
        " ".join(f"Word {p} and {n} stand here in a row of words." for n in range(20)) for p in range(5)
    )
    last = make_requests(paragraphs)[-1].context
    assert "Word 3 and 0 " in last and "Word 2 and" not in last


def test_sentences_that_say_nothing_are_not_asked_about() -> None:
    asked = [
        request.sentence.text for request in make_requests("Well then.\n\nIV.\n\nThe mill burned down twice.\n\n* * *")
    ]
    assert asked == ["The mill burned down twice."]
    chinese = make_requests("水车在一八三一年烧毁了。\n后来它没有再建。")  # without blanks, a sentence is one word long
    assert "水车在一八三一年烧毁了。" in chinese[0].sentence.text


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Who", "who"),
        ("how_many", "how many"),
        ("", "llm"),
        (None, "llm"),
        ("!!", "llm"),
        ("x" * 60, "llm"),
        (["a"], "a"),
    ],
)
def test_the_kind_is_the_form_that_the_model_names(tmp_path: Path, kind: Any, expected: str) -> None:
    reply = json.dumps([{"question": "Who did it then?", "answer": "Anna", "kind": kind}])
    with FakeServer(reply=lambda body: reply) as server:
        lists, _ = run(document(1), config(server.url), tmp_path / "tasks.jsonl")
    assert [(task.question, task.answer, task.kind) for task in lists[0]] == [("Who did it then?", "Anna", expected)]


def test_more_pairs_than_asked_for_are_cut_and_none_is_an_answer_too(tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> str:
        if "Anna carried" in sentence_of(body):
            return '{"tasks": []}'
        return json.dumps([{"question": f"What about number {n}?", "answer": str(n)} for n in range(7)])

    with FakeServer(reply=reply) as server:
        lists, report = run(document(3), config(server.url, per_sentence=5), tmp_path / "tasks.jsonl")
        assert [len(tasks) for tasks in lists] == [5, 5]
        assert (report.written, report.failed, report.tasks, report.requests) == (3, 0, 10, 3)
        run(document(3), config(server.url, per_sentence=5), tmp_path / "tasks.jsonl")
        assert len(server.requests) == 3


def test_a_document_without_sentences_needs_no_server(tmp_path: Path) -> None:
    lists, report = run("IV.", config("http://127.0.0.1:9/v1"), tmp_path / "tasks.jsonl")
    assert lists == [] and report.sentences == report.requests == 0


# --- many at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 6])
def test_so_many_requests_at_once_and_no_more(tmp_path: Path, concurrency: int) -> None:
    count = 4 if concurrency == 1 else 25
    with FakeServer(delay_seconds=0.15) as server:
        began = time.monotonic()
        run(document(count), config(server.url, concurrency=concurrency), tmp_path / "tasks.jsonl")
        seconds = time.monotonic() - began
    assert server.most_in_flight == concurrency
    assert seconds >= 0.15 * (1 + (count - 1) / concurrency)
    assert concurrency == 1 or seconds < 0.15 * count


def test_tasks_come_while_others_are_still_being_written(tmp_path: Path) -> None:
    with FakeServer(delay_seconds=0.05) as server:
        stream = LlmWriter(document(20), config(server.url, concurrency=2), tmp_path / "tasks.jsonl").stream()
        next(stream)
        assert server.answered < 10
        assert len(list(stream)) == 19 and stream.finished


def test_poll_does_not_wait(tmp_path: Path) -> None:
    with FakeServer(delay_seconds=3) as server:
        stream = LlmWriter(document(1), config(server.url), tmp_path / "tasks.jsonl").stream()
        began = time.monotonic()
        assert stream.poll() is None and stream.poll(0.05) is None and not stream.finished
        assert time.monotonic() - began < 2.5
        tasks = stream.poll(60)
        assert tasks is not None and len(tasks) == 2
        assert stream.poll(10) is None and stream.finished and list(stream) == []


def test_a_writer_far_ahead_waits_for_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "_AHEAD", 4)
    with FakeServer() as server:
        with LlmWriter(document(40), config(server.url, concurrency=2), tmp_path / "tasks.jsonl").stream() as stream:
            time.sleep(0.7)
            assert len(server.requests) == 4 + 2  # four wait, two workers hold one each
            assert len(list(stream)) == 40
        assert len(server.requests) == 40


# --- failures that pass -----------------------------------------------------------------------------------------------


PASSING = ["429", "500", "408", "timeout", "drip", "not json", "prose", "no choices"]


@pytest.mark.parametrize(
    ("failure", "first"),
    # a server whose first answer is a broken connection is not waited for: see the dead ones
    [*((failure, first) for failure in PASSING for first in (True, False)), ("reset", False)],
)
def test_a_failure_that_passes_is_asked_again(tmp_path: Path, failure: str, first: bool) -> None:
    with FakeServer(failures=[failure] if first else ["", failure]) as server:
        settings = config(server.url, timeout_seconds=0.3 if failure in ("timeout", "drip") else 5.0)
        lists, report = run(document(6), settings, tmp_path / "tasks.jsonl")
    assert len(lists) == report.written == 6 and report.failed == 0
    assert (report.requests, report.retries, len(server.requests)) == (7, 1, 7)


@pytest.mark.parametrize(("failure", "least", "most"), [("503:1", 1.0, 1.9), ("429:date", 0.9, 2.9)])
def test_the_server_says_how_long_to_wait(tmp_path: Path, failure: str, least: float, most: float) -> None:
    with FakeServer(failures=["", failure]) as server:
        run(document(2), config(server.url), tmp_path / "tasks.jsonl")
    assert len(server.times) == 3 and least <= server.times[2] - server.times[1] < most


def test_pauses_double_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_FIRST_PAUSE", 1.0)

    def pauses(attempt: int) -> list[float]:
        outcome = SimpleNamespace(exception=lambda: TimeoutError())
        state: Any = SimpleNamespace(attempt_number=attempt, outcome=outcome)
        return [asking.pause(state) for _ in range(200)]

    for attempt in (1, 2, 3, 4):
        drawn = pauses(attempt)
        assert 0.75 * 2 ** (attempt - 1) <= min(drawn) < max(drawn) <= 1.5 * 2 ** (attempt - 1)
        assert len(set(drawn)) > 100
    assert max(pauses(30)) <= 90


# --- failures that stay -----------------------------------------------------------------------------------------------


def test_a_sentence_that_fails_is_counted_and_asked_again_next_time(tmp_path: Path) -> None:
    cache = tmp_path / "tasks.jsonl"
    with FakeServer(failures=["", "500", "500", "500"]) as server:
        lists, report = run(document(6), config(server.url, concurrency=1, attempts=3), cache)
        assert len(lists) == 5
        assert (report.written, report.failed, report.unasked, report.retries, report.requests) == (5, 1, 0, 2, 8)
        assert report.last_failure == "answered with status 500: failing with 500 to order"
        lists, report = run(document(6), config(server.url), cache)
        assert len(lists) == 6 and (report.cached, report.written, report.requests) == (5, 1, 1)
        assert sentence_of(server.requests[-1]) == sentence_of(server.requests[1])


def test_failures_among_successes_do_not_add_up(tmp_path: Path) -> None:
    with FakeServer(failures=["", "500"] * 12) as server:
        lists, report = run(document(24), config(server.url, concurrency=1, attempts=1), tmp_path / "tasks.jsonl")
    assert (len(lists), report.written, report.failed) == (12, 12, 12)


@pytest.mark.parametrize("failure", ["413", "422", "400", "429:3600"])
def test_what_asking_again_cannot_help_is_not_asked_again(tmp_path: Path, failure: str) -> None:
    with FakeServer(failures=["", failure]) as server:
        began = time.monotonic()
        lists, report = run(document(3), config(server.url), tmp_path / "tasks.jsonl")
        assert time.monotonic() - began < 20
    assert len(lists) == 2 and (report.failed, report.retries, report.requests, report.not_supported) == (1, 0, 3, ())


def test_replies_that_cannot_be_read_are_asked_for_twice_only(tmp_path: Path) -> None:
    with FakeServer(failures=["", "prose", "prose"]) as server:
        _, report = run(document(3), config(server.url, concurrency=1, attempts=5), tmp_path / "tasks.jsonl")
    assert (report.failed, report.written, report.requests) == (1, 2, 4)
    assert "I would rather talk about the weather" in report.last_failure
    assert report.completion_tokens == 4 * COMPLETION_TOKENS  # what was of no use is paid for too


def unreachable(settings: TasksConfig, cache: Path, count: int = 6) -> WriterUnreachableError:
    """The error of a writer that must not give any tasks."""
    stream = LlmWriter(document(count), settings, cache).stream()
    with pytest.raises(WriterUnreachableError) as caught:
        next(stream)
    assert (caught.value.exit_code, caught.value.http_status) == (24, 502)
    assert caught.value.message.endswith(".") and caught.value.next_step.endswith(".") and "\n" not in str(caught.value)
    assert stream.finished and list(stream) == []
    return caught.value


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("http://127.0.0.1:9/v1", "Connection refused"),
        ("http://no-such-host.invalid/v1", "cannot be reached"),
    ],
)
def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, word: str) -> None:
    monkeypatch.setattr(asking, "_FIRST_PAUSE", 60.0)  # it is not waited for
    began = time.monotonic()
    error = unreachable(config(url), tmp_path / "tasks.jsonl")
    assert url in error.message and word in error.message and "tasks.llm.base_url" in error.next_step
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("always", "requests", "words"),
    [
        ("401", 1, ("status 401", "OPENAI_API_KEY")),
        ("403", 1, ("status 403", "OPENAI_API_KEY")),
        ("404", 1, ("status 404", "tasks.llm.model (writer-1)", "/v1")),
        ("500", 3, ("status 500", "failing with 500 to order")),
        ("429", 3, ("status 429",)),
        ("timeout", 3, ("did not answer within 0.3 seconds", "tasks.llm.timeout_seconds")),
        ("reset", 1, ("cannot be reached",)),
        ("html", 2, ("sent no completion", "Welcome", "tasks.llm.base_url")),
    ],
)
def test_a_server_of_no_use_is_an_error_before_anything_starts(
    tmp_path: Path, always: str, requests: int, words: tuple[str, ...]
) -> None:
    with FakeServer(always=always) as server:
        settings = config(server.url, attempts=3, timeout_seconds=0.3 if always == "timeout" else 5.0)
        error = unreachable(settings, tmp_path / "tasks.jsonl")
        assert server.url in error.message and all(word in str(error) for word in words), str(error)
        assert len(server.requests) == requests


def test_a_wrong_address_on_a_right_server(tmp_path: Path) -> None:
    with FakeServer() as server:
        error = unreachable(config(server.url.removesuffix("/v1")), tmp_path / "tasks.jsonl")
    assert "no such path: /chat/completions" in error.message and "mostly ends with /v1" in error.next_step


@pytest.mark.parametrize(("count", "asked"), [(3, 3), (40, 8)])
def test_a_model_that_never_writes_is_an_error(tmp_path: Path, count: int, asked: int) -> None:
    with FakeServer(always="prose") as server:
        error = unreachable(config(server.url, concurrency=1), tmp_path / "tasks.jsonl", count)
        assert f"None of the {asked} sentences" in error.message and "tasks.llm.model" in error.next_step
        assert len(server.requests) == 2 * asked


# --- servers that know less -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rejects", [["response_format"], ["temperature"], ["response_format", "temperature"]])
def test_options_that_the_server_rejects_are_left_out_from_then_on(tmp_path: Path, rejects: list[str]) -> None:
    def reply(body: dict[str, Any]) -> str:
        return f"Here you are:\n```json\n{json.dumps(make_pairs(body), indent=1)}\n```\nAnything else?"

    with FakeServer(rejects=rejects, reply=reply) as server:
        lists, report = run(document(8), config(server.url), tmp_path / "tasks.jsonl")
    assert [len(tasks) for tasks in lists] == [2] * 8 and report.failed == 0
    assert report.not_supported == tuple(rejects)
    assert report.requests == len(server.requests) == 8 + len(rejects)
    assert all(option not in body for body in server.requests[len(rejects) :] for option in rejects)
    assert all(option in server.requests[0] for option in ("response_format", "temperature"))


def test_a_server_that_does_not_say_what_it_rejects(tmp_path: Path) -> None:
    with FakeServer(failures=["400"]) as server:
        _, report = run(document(3), config(server.url), tmp_path / "tasks.jsonl")
    assert report.not_supported == ("response_format",) and (report.written, report.requests) == (3, 4)


def test_tokens_are_estimated_where_the_server_does_not_count(tmp_path: Path) -> None:
    with FakeServer(usage=False) as server:
        _, report = run(document(3), config(server.url), tmp_path / "tasks.jsonl")
    characters = sum(len(message["content"]) for body in server.requests for message in body["messages"])
    assert characters // 4 - 3 <= report.prompt_tokens <= characters // 4
    assert 30 < report.completion_tokens < 400


# --- reading replies --------------------------------------------------------------------------------------------------

ONE, TWO = Pair("Who rang the bell?", "Anna", ""), Pair("When did it ring?", "In 1831", "")
WHY = Pair("Why?", "It did", "")
FIRST, SECOND = (
    '"question": "Who rang the bell?", "answer": "Anna"',
    '"question": "When did it ring?", "answer": "In 1831"',
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f'{{"tasks": [{{{FIRST}}}, {{{SECOND}}}]}}', [ONE, TWO]),
        (f"[{{{FIRST}}}, {{{SECOND}}}]", [ONE, TWO]),
        (f"```json\n[{{{FIRST}}},\n{{{SECOND}}}]\n```", [ONE, TWO]),
        (f"Of course {{smile}}! [see]\n\n[{{{FIRST}}}, {{{SECOND}}}]\n\nDo you want {{more}}?", [ONE, TWO]),
        (f"[{{{FIRST},}},\n{{{SECOND}, }},\n]", [ONE, TWO]),
        (f"{{{FIRST},}}", [ONE]),
        (f"{{{FIRST}}}", [ONE]),
        (f"{{{FIRST}}}\n{{{SECOND}}}", [ONE, TWO]),
        (f'{{"tasks": [{{{FIRST}}}, {{"question": "When did it', [ONE]),
        (f'<think>Perhaps {{"question": "No?", "answer": "no"}}</think>\n[{{{FIRST}}}]', [ONE]),
        (f'{{"qa": {{"1": {{{FIRST}}}, "2": {{{SECOND}}}}}}}', [ONE, TWO]),
        ('{"Q": "Who rang the bell?", "A": "Anna"}', [ONE]),
        ('[{"question": "Who rang\nthe bell?", "answer": " Anna "}]', [ONE]),
        ('[{"question": "How many?", "answer": 41}]', [Pair("How many?", "41", "")]),
        ('[{"question": "Did it ring?", "answer": false}]', [Pair("Did it ring?", "No.", "")]),
        ('[{"question": "Who?", "answer": ["Anna", "Bert"]}]', [Pair("Who?", "Anna, Bert", "")]),
        ('[{"question": "Who?", "answer": ""}, {"question": null, "answer": "x"}, {"question": "Why?"}]', None),
        ('[{"question": "Half \\ud83d?", "answer": "x"}]', [Pair("Half ??", "x", "")]),
        ("Question: Who rang the bell?\nAnswer: Anna\n\nQuestion: When did it ring?\nAnswer: In 1831", [ONE, TWO]),
        ("1. **Question:** Who rang the bell?\n   **Answer:** Anna\n2. **Question:** Why?\n   **Answer:** It did", [ONE, WHY]),
        ("**Q1:** Who rang the bell?\n**A1:** Anna\n**Q2:** When did it ring?\n**A2:** In 1831", [ONE, TWO]),
        ("Q: Who rang the bell? A: Anna\nQ: When did it ring? A: In 1831", [ONE, TWO]),
        ("1. Who rang the bell?\nAnswer: Anna\n2. When did it ring?\nAnswer: In\n1831\n\nThat was all.", [ONE, TWO]),
        ("Kind: who\nQuestion:\nWho rang the bell?\nAnswer:\nAnna", [ONE]),
        (f"[{{{FIRST}}}, {{{FIRST}}}]", [ONE]),
        ("[]", []),
        ("```json\n[]\n```", []),
        ('{"tasks": []}', []),
        ("I cannot do that.", None),
        ("Question: Who rang the bell?", None),
        ("", None),
    ],
)  # fmt: skip
def test_replies_in_many_forms(text: str, expected: list[Pair] | None) -> None:
    assert read_reply(text, 5) == expected


LINES = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=40).filter(
    lambda text: text.strip()
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(LINES, LINES), min_size=1, max_size=4, unique=True),
    st.sampled_from(["{}", "```json\n{}\n```", "Here: {}", "{}\nDone!", "<think>Let me see {{…</think>{}"]),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_any_pairs_survive_any_wrapping(
    pairs: list[tuple[str, str]], wrap: str, indent: int | None, inside: bool
) -> None:
    rows = [{"question": question, "answer": answer, "kind": "fact"} for question, answer in pairs]
    text = wrap.format(json.dumps({"tasks": rows} if inside else rows, indent=indent))
    plain = [Pair(" ".join(question.split()), " ".join(answer.split()), "fact") for question, answer in pairs]
    assert read_reply(text, 9) == list(dict.fromkeys(plain))


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from('{}[]",:\\ \nQAqa1.?*<>|-')) | st.text())
def test_no_reply_breaks_the_reader(text: str) -> None:
    pairs = read_reply(text, 3)
    assert pairs is None or (len(pairs) <= 3 and all(pair.question and pair.answer for pair in pairs))


# --- keeping what is written ------------------------------------------------------------------------------------------


def everything(lists: list[list[Task]]) -> Counter[Task]:
    return Counter(task for tasks in lists for task in tasks)


def test_a_second_run_asks_nothing_and_gives_the_same(tmp_path: Path) -> None:
    cache = tmp_path / "below" / "tasks.jsonl"
    with FakeServer() as server:
        first, _ = run(document(9), config(server.url), cache)
    second, report = run(document(9), config(server.url), cache)  # the server is gone
    assert everything(second) == everything(first) and sum(everything(first).values()) == 18
    assert (report.cached, report.written, report.tasks, report.requests, report.prompt_tokens) == (9, 0, 18, 0, 0)


@pytest.mark.parametrize(
    "change", [{"per_sentence": 3}, {"answers": "mixed"}, {"model": "writer-2"}, {"temperature": 0.1}, "prompt", "text"]
)
def test_other_settings_are_other_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    cache, text = tmp_path / "tasks.jsonl", document(4)
    with FakeServer() as server:
        run(text, config(server.url), cache)
        if change == "prompt":
            monkeypatch.setattr(llm, "PROMPT_VERSION", 1000)
        if change == "text":
            text = text.replace("Bert", "Boris")  # one sentence, and the context of the two after it
        more = change if isinstance(change, dict) else {}
        run(text, config(server.url, **more), cache)
        assert len(server.requests) == 4 + (3 if change == "text" else 4)
        run(document(4), config(server.url), cache)  # the first are still there
        assert len(server.requests) == 4 + (3 if change == "text" else 4) or change == "prompt"


def test_how_to_ask_is_no_part_of_what_is_written(tmp_path: Path) -> None:
    cache = tmp_path / "tasks.jsonl"
    with FakeServer() as server:
        run(document(4), config(server.url), cache)
        run(document(4), config(server.url, concurrency=1, attempts=1, timeout_seconds=9), cache)
        assert len(server.requests) == 4


def test_a_server_that_dies_midway_loses_nothing(tmp_path: Path) -> None:
    cache, text, seen = tmp_path / "tasks.jsonl", document(30), []
    with FakeServer(dies_after=12) as server:
        writer = LlmWriter(text, config(server.url, attempts=2), cache)
        with pytest.raises(WriterUnreachableError) as caught:
            for tasks in writer.stream():
                seen.append(tasks)
        first = {sentence_of(body) for body in server.requests}
    assert f"stopped writing after {len(seen)} of 30 sentences" in caught.value.message
    assert "cannot be reached" in caught.value.message and "goes on from there" in caught.value.next_step
    assert 12 - 4 <= len(seen) == writer.report.written <= 12  # what was on its way when it died is lost
    with FakeServer() as server:
        lists, report = run(text, config(server.url), cache)
        assert len(server.requests) == 30 - len(seen) and report.cached == len(seen)
        assert len(first | {sentence_of(body) for body in server.requests}) == 30
    assert set(everything(seen)) <= set(everything(lists)) and len(everything(lists)) == 60


def test_a_process_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "tasks.jsonl"
    program = (
        "import os, sys; from pathlib import Path; from test_tasks_llm import *\n"
        "stream = LlmWriter(document(20), config(sys.argv[1], concurrency=2), Path(sys.argv[2])).stream()\n"
        "[next(stream) for _ in range(6)]; os.kill(os.getpid(), 9)"
    )
    with FakeServer(delay_seconds=0.05) as server:
        command = [sys.executable, "-c", program, server.url, str(cache)]
        assert subprocess.run(command, cwd=Path(__file__).parent, check=False).returncode == -9
        written = cache.read_bytes().count(b"\n")
        asked = len(server.requests)
        assert 6 <= written < 20
        lists, report = run(document(20), config(server.url), cache)
        assert report.cached == written and len(server.requests) - asked == 20 - written and len(lists) == 20


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_last_line_is_asked_for_again(tmp_path: Path, cut: int) -> None:
    cache = tmp_path / "tasks.jsonl"
    with FakeServer() as server:
        run(document(5), config(server.url), cache)
        whole = cache.read_bytes()
        cache.write_bytes(whole[:-cut])
        lists, report = run(document(5), config(server.url), cache)
        # cut = 1 takes the line break only
        assert len(lists) == 5 and len(server.requests) == 5 + (cut > 1) and report.cached == 5 - (cut > 1)
        _, report = run(document(5), config(server.url), cache)
        assert report.cached == 5 and len(server.requests) == 5 + (cut > 1)


@pytest.mark.parametrize(
    "line", [b"[]", b"7", b'{"key": 1}', b'{"key": "k", "pairs": [["a"]], "tokens": [1, 2]}', b"\xff\xfe", b""]
)
def test_lines_that_are_no_tasks_are_passed_over(tmp_path: Path, line: bytes) -> None:
    cache = tmp_path / "tasks.jsonl"
    cache.write_bytes(line + b"\n")
    with FakeServer() as server:
        assert len(run(document(2), config(server.url), cache)[0]) == 2


def test_a_place_that_cannot_be_written_is_an_error_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with FakeServer() as server:
        with pytest.raises(NoWritePermissionError):
            run(document(2), config(server.url), tmp_path / "file" / "tasks.jsonl")
        assert server.requests == []


def test_a_disk_that_fills_up_is_that_error(small_disk: Path) -> None:
    (small_disk / "filling").write_bytes(bytes(250 * 1024))
    with FakeServer() as server, pytest.raises(DiskFullError):
        run(document(60), config(server.url), small_disk / "tasks.jsonl")
    (small_disk / "filling").unlink()
    with FakeServer() as server:
        lists, report = run(document(60), config(server.url), small_disk / "tasks.jsonl")
        assert len(lists) == 60 and report.cached > 0 and len(server.requests) == 60 - report.cached


# --- budget -----------------------------------------------------------------------------------------------------------


def test_the_budget_ends_the_asking_and_counts_earlier_runs(tmp_path: Path) -> None:
    cache, one = tmp_path / "tasks.jsonl", PROMPT_TOKENS + COMPLETION_TOKENS
    with FakeServer() as server:
        lists, report = run(document(12), config(server.url, concurrency=1, budget_tokens=5 * one), cache)
        assert len(lists) == len(server.requests) == report.written == 5
        assert report.budget_reached and report.unasked == 7 and report.failed == 0
        lists, report = run(
            document(12), config("http://127.0.0.1:9/v1", budget_tokens=5 * one), cache
        )  # nothing is asked
        assert len(lists) == report.cached == 5 and report.budget_reached and report.requests == 0
        lists, report = run(document(12), config(server.url, concurrency=1, budget_tokens=7 * one + 1), cache)
        assert len(lists) == 8 and len(server.requests) == 8 and report.unasked == 4
        lists, report = run(document(12), config(server.url), cache)
        assert len(lists) == 12 and not report.budget_reached and report.unasked == 0


def test_the_budget_is_overdrawn_by_what_is_under_way_at_most(tmp_path: Path) -> None:
    budget = 5 * (PROMPT_TOKENS + COMPLETION_TOKENS)
    with FakeServer(delay_seconds=0.05) as server:
        _, report = run(document(40), config(server.url, concurrency=4, budget_tokens=budget), tmp_path / "tasks.jsonl")
    assert 5 <= report.written == len(server.requests) <= 5 + 3 and report.budget_reached


# --- the key ----------------------------------------------------------------------------------------------------------

KEY = "sk-Se.cret/1234567890"


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    with FakeServer(key=KEY, failures=["500"]) as server:
        settings = config(server.url, api_key_variable="MY_KEY")
        run(document(3), settings, tmp_path / "tasks.jsonl")
        assert server.keys == {KEY}
    assert KEY not in settings.model_dump_json()
    assert [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()] == []


def test_a_refused_key_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeServer(key="another") as server:
        error = unreachable(config(server.url), tmp_path / "tasks.jsonl")
    assert "Incorrect API key provided: …" in error.message and KEY not in str(error)


def test_without_a_key_a_local_server_gets_some_word(tmp_path: Path) -> None:
    with FakeServer() as server:
        run(document(1), config(server.url), tmp_path / "tasks.jsonl")
        assert server.keys == {"none"}


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines"])
def test_what_can_be_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
        LlmWriter(document(1), config("http://127.0.0.1:9/v1"), tmp_path / "tasks.jsonl")
    assert key not in str(caught.value)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"base_url": None}, "tasks.llm.base_url is not set"),
        ({"base_url": ""}, "tasks.llm.base_url is not set"),
        ({"model": None}, "tasks.llm.model is not set"),
        ({"base_url": "localhost:8000/v1"}, "not an address: 'localhost:8000/v1'"),
        ({"base_url": "http://[::1/v1"}, "not an address"),
        ({"base_url": "http://host:99999/v1"}, "not an address"),
        ({"base_url": "http:///v1"}, "not an address"),
    ],
)
def test_settings_that_name_no_server(tmp_path: Path, more: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LlmWriter(document(1), config("http://127.0.0.1:9/v1", **more), tmp_path / "tasks.jsonl")
    assert word in caught.value.message and caught.value.next_step and caught.value.exit_code == 2


def test_a_slash_at_the_end_of_the_address_does_not_matter(tmp_path: Path) -> None:
    with FakeServer() as server:
        assert len(run(document(1), config(server.url + "/"), tmp_path / "tasks.jsonl")[0]) == 1


def test_the_client_is_loaded_only_when_it_is_needed() -> None:
    program = "import sys, liftlm.tasks.llm; print(sorted({'openai', 'httpx2', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- stopping ---------------------------------------------------------------------------------------------------------


def writer_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "tasks"]


@pytest.mark.parametrize("how", ["close", "with", "forget", "first"])
def test_closing_early_stops_the_requests(tmp_path: Path, how: str) -> None:
    cache = tmp_path / "tasks.jsonl"
    with FakeServer(delay_seconds=0.1) as server:
        writer = LlmWriter(document(40), config(server.url), cache)
        began = time.monotonic()
        stream = writer.stream()
        if how == "with":
            with stream:
                next(stream)
        elif how == "forget":
            next(stream)
            del stream
            gc.collect()
            time.sleep(0.2)
        else:
            if how == "close":
                next(stream)
            stream.close()
            stream.close()
            assert stream.finished and list(stream) == []
        assert writer_threads() == [] and time.monotonic() - began < 20
        asked = len(server.requests)
        assert asked <= 1 + 4 * 2
        time.sleep(0.25)
        assert len(server.requests) == asked and server.in_flight == 0
        written = cache.read_bytes().count(b"\n") if cache.exists() else 0
        lists, report = run(document(40), config(server.url, concurrency=16), cache)
        assert len(lists) == 40 and report.cached == written and report.written == 40 - written


def test_closing_while_it_waits_to_ask_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_FIRST_PAUSE", 30.0)
    with FakeServer(always="500") as server:
        stream = LlmWriter(document(4), config(server.url), tmp_path / "tasks.jsonl").stream()
        while not server.requests:
            time.sleep(0.01)
        began = time.monotonic()
        stream.close()
        assert time.monotonic() - began < 20 and writer_threads() == []


def test_an_interrupted_reader_stops_waiting(tmp_path: Path) -> None:
    class StopNow(Exception):
        pass

    def stop(number: int, frame: FrameType | None) -> None:
        raise StopNow

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with FakeServer(always="timeout") as server:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            began = time.monotonic()
            with (
                pytest.raises(StopNow),
                LlmWriter(document(4), config(server.url), tmp_path / "tasks.jsonl").stream() as stream,
            ):
                next(stream)
            assert time.monotonic() - began < 20 and writer_threads() == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_writer_can_stream_again(tmp_path: Path) -> None:
    with FakeServer() as server:
        writer = LlmWriter(document(5), config(server.url), tmp_path / "tasks.jsonl")
        first = list(writer.stream())
        assert writer.report.written == 5
        assert everything(list(writer.stream())) == everything(first)
        assert (writer.report.written, writer.report.cached, writer.report.requests) == (0, 5, 0)
