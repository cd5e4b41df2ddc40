"""Tasks as their writer finishes them: kept in the order of their arrival, filtered, and taken up where a run was stopped."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import liftlm.writing
from conftest import save_model
from fake_server import FakeServer, make_pairs, sentence_of
from liftlm import Document, LiftConfig, Model, absorb, load_config, load_model
from liftlm.adapters import attach_adapter, use_adapter
from liftlm.errors import ConfigError, InterruptedWorkError, TerminatedWorkError, WriterUnreachableError
from liftlm.generating import Generated, Prompt
from liftlm.likelihood import Ranker
from liftlm.models import Model as ModelClass
from liftlm.prompts import Turn, encode_text, render_prompt
from liftlm.reading import with_text
from liftlm.tasks import Task, read_tasks_file
from liftlm.tasks.extractive import write_extractive_tasks
from liftlm.tasks.filters import filter_tasks
from liftlm.tasks.replies import make_requests
from liftlm.tasks.self_written import self_request
from liftlm.tasks.sentences import Sentence, split_into_sentences
from liftlm.training import StepMetrics
from liftlm.writing import ArrivingTasks
from test_tasks_llm import document as sentences
from test_tasks_llm import writer_threads

pytestmark = pytest.mark.usefixtures("quick_asking")

TEXT = sentences(12)
DOCUMENT = Document(title="The mill", text=TEXT)


def config(writer: str, *more: str, server: FakeServer | str = "http://127.0.0.1:9/v1") -> LiftConfig:
    url = server if isinstance(server, str) else server.url
    asking = [f"tasks.llm.base_url={url}", "tasks.llm.model=writer-1", "tasks.llm.concurrency=3"]
    return load_config(None, [f"tasks.writer={writer}", "tasks.per_sentence=2", *asking, *more])


def arriving(
    settings: LiftConfig,
    folder: Path | None = None,
    *,
    given: Sequence[Task] | None = None,
    model: Model | None = None,
    document: Document = DOCUMENT,
) -> ArrivingTasks:
    return ArrivingTasks(document, model, settings, folder, given)


def kept(folder: Path) -> list[Task]:
    return [Task(**json.loads(line)) for line in (folder / "tasks.jsonl").read_text(encoding="utf-8").splitlines()]


def evidence(task: Task) -> str:
    return TEXT[task.start : task.end]


# --- everything at once -----------------------------------------------------------------------------------------------


def test_extractive_tasks_are_there_at_once(tmp_path: Path) -> None:
    expected = write_extractive_tasks(TEXT, 2, seed=5)
    for _ in range(2):  # regression: a second run added them to the file once more
        with arriving(config("extractive", "seed=5"), tmp_path / "new") as tasks:
            assert not tasks.slow and not tasks.finished
            assert tasks.poll() == expected and tasks.count == len(expected)
            assert tasks.poll() == [] and tasks.finished and not tasks.dropped and tasks.report is None
        assert kept(tmp_path / "new") == expected == read_tasks_file(tmp_path / "new" / "tasks.jsonl", len(TEXT))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tasks.jsonl"]


def test_what_other_settings_left_there_is_not_mixed_in(tmp_path: Path) -> None:
    for seed in (1, 2):
        with arriving(config("extractive", f"seed={seed}"), tmp_path) as tasks:
            assert tasks.all() == write_extractive_tasks(TEXT, 2, seed) == kept(tmp_path)


def test_no_writer_no_tasks(tmp_path: Path) -> None:
    with arriving(config("none"), tmp_path) as tasks:
        assert tasks.poll() == [] and tasks.finished and tasks.all() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", ["llm", "self", "extractive", "none"])
def test_given_tasks_are_used_as_they_are(writer: str, tmp_path: Path) -> None:
    """Even those that the filters would drop, in their order; no writer is needed."""
    given = [
        Task("Who?", "who", "given", 9, 20),
        Task("Who?", "who", "given", 9, 20),
        Task("What now?", "?", "x", 0, 4),
    ]
    assert filter_tasks(given, TEXT)[0] == []
    for _ in range(2):
        with arriving(config(writer), tmp_path, given=given) as tasks:
            assert not tasks.slow and tasks.all() == given and tasks.count == 3
        assert kept(tmp_path) == given


# --- a server ---------------------------------------------------------------------------------------------------------


def test_tasks_of_a_server_come_sentence_by_sentence(tmp_path: Path) -> None:
    with FakeServer(delay_seconds=0.1, slots=1) as server, arriving(config("llm", server=server), tmp_path) as tasks:
        assert tasks.slow and tasks.expected == 12 * 2
        assert tasks.poll() == [] and not tasks.finished, "it waited"
        lists = [tasks.poll(wait=True)]
        assert server.answered < 12 and kept(tmp_path) == lists[0], "not kept at once"
        while some := tasks.poll(wait=True):
            lists.append(some)
        assert tasks.finished and tasks.report is not None and tasks.report.written == 12
    flat = [task for some in lists for task in some]
    assert len(lists) == 12 and len(flat) == 24 == tasks.count and not tasks.dropped
    assert [evidence(some[0]) for some in lists] == [sentence_of(body) for body in server.begun]
    assert kept(tmp_path) == flat
    for some in lists:
        wanted = make_pairs({"messages": [{"content": f"Sentence:\n{evidence(some[0])}\n\nWrite 2 "}]})
        assert [(t.question, t.answer) for t in some] == [(p["question"], p["answer"]) for p in wanted]


def test_filters_are_on_and_counted(tmp_path: Path) -> None:
    text = "\n\n".join(
        ["Anna carried 20 sacks of barley.", "Bert carried 30 sacks of rye.", "The mill burned down at last."]
    )
    again = text + "\n\nAnna carried 20 sacks of barley."  # regression: repetitions of other sentences' tasks were kept

    def reply(body: dict[str, Any]) -> str:
        pairs = {
            "Anna": [("Who carried 20 sacks?", "Anna."), ("Who?", "Anna."), ("Who carried 20 SACKS?", "Anna")],
            "Bert": [
                ("Who carried sacks of rye?", "As the text says."),
                ("What did Bert carry there?", "40 sacks of rye."),
            ],
            "The ": [("Did the mill burn down at last?", "The mill burned down."), ("What burned down?", "The mill.")],
        }[sentence_of(body)[:4]]
        return json.dumps([{"question": q, "answer": a} for q, a in pairs])

    document = Document(title="x", text=again)
    for work, stopped in (("a", False), ("b", True)):
        with FakeServer(reply=reply) as server:
            settings = config("llm", "tasks.per_sentence=5", "tasks.llm.concurrency=1", server=server)
            if stopped:  # between the two about Anna; what was filtered out is counted once more, what was kept is not
                with arriving(settings, tmp_path / work, document=document) as tasks:
                    assert len(tasks.poll(wait=True)) == 1
            with arriving(settings, tmp_path / work, document=document) as tasks:
                found = tasks.all()
                assert tasks.report is not None and tasks.report.tasks == 10
        assert [(t.question, t.answer) for t in found] == [
            ("Who carried 20 sacks?", "Anna."),
            ("What burned down?", "The mill."),
        ]
        assert tasks.dropped == {
            "malformed": 2, "duplicate": 3, "says nothing": 1, "unanswerable": 1, "gives its answer away": 1
        }  # fmt: skip
        assert kept(tmp_path / work) == found


def first_part(settings: LiftConfig, folder: Path, lists: int) -> list[Task]:
    """A run that is stopped after so many lists."""
    found: list[Task] = []
    with arriving(settings, folder) as tasks:
        for _ in range(lists):
            found += tasks.poll(wait=True)
    return found


def whole_set() -> set[tuple[str, str, int]]:
    with FakeServer() as server, arriving(config("llm", server=server)) as tasks:
        return {(task.question, task.answer, task.start) for task in tasks.all()}


def test_a_stopped_run_goes_on_in_the_same_order_and_asks_only_for_the_rest(tmp_path: Path) -> None:
    with FakeServer() as server:
        before = first_part(config("llm", server=server), tmp_path, lists=4)
    assert len(before) == 8 and kept(tmp_path) == before
    finished = {json.loads(line)["key"] for line in (tmp_path / "replies.jsonl").read_text().splitlines()}
    with FakeServer() as second, arriving(config("llm", server=second), tmp_path) as tasks:
        assert tasks.count == 8 and tasks.poll() == before, "first what is there, without waiting"
        rest = tasks.all()
        assert tasks.count == 24 and tasks.report is not None and tasks.report.cached == len(finished) >= 4
        assert not tasks.dropped, "what is there already was taken for a repetition"
    assert kept(tmp_path) == before + rest
    assert len(second.requests) == 12 - len(finished)
    assert not {sentence_of(body) for body in second.requests} & {evidence(task) for task in before}
    assert {(task.question, task.answer, task.start) for task in before + rest} == whole_set() and len(rest) == 16


def test_what_a_dying_server_wrote_is_given_before_the_error(tmp_path: Path) -> None:
    """Regression: where fewer sentences were left than show that a server is gone, it passed for finished."""
    with (
        FakeServer(dies_after=7) as server,
        arriving(config("llm", server=server), tmp_path) as tasks,
        pytest.raises(WriterUnreachableError, match="stopped writing after 7 of 12 sentences") as caught,
    ):
        tasks.all()
    assert "kept" in caught.value.next_step and caught.value.exit_code == 24
    assert len(kept(tmp_path)) == 14
    with FakeServer() as second, arriving(config("llm", server=second), tmp_path) as tasks:
        assert len(tasks.all()) == 24 and len(second.requests) == 5


@pytest.mark.parametrize("cut", [1, 25, -1, 0])
def test_a_torn_last_line_is_written_again(cut: int, tmp_path: Path) -> None:
    """Of a process that was killed while it wrote: without its end, in the middle, within a letter of two bytes, before it."""
    text = TEXT.replace("barley", "Gerstenkörner")
    document = Document(title="The mill", text=text)
    path = tmp_path / "tasks.jsonl"
    with FakeServer() as server:
        settings = config("llm", server=server)
        with arriving(settings, tmp_path, document=document) as tasks:
            whole = tasks.all()
        content = path.read_bytes()
        last = len(content.splitlines(keepends=True)[-1])
        end = {-1: content.rindex("ö".encode()) + 1, 0: len(content) - last}.get(cut, len(content) - cut)
        path.write_bytes(content[:end])
        with arriving(settings, tmp_path, document=document) as tasks:
            assert tasks.poll() == whole[:-1] and tasks.count == len(whole) - 1
            assert tasks.all() == whole[-1:]
        assert len(server.requests) == 12, "asked again"
    assert path.read_bytes() == content


def test_begin_waits_for_the_first_tasks_and_gives_them_later(tmp_path: Path) -> None:
    with FakeServer(delay_seconds=0.1) as server, arriving(config("llm", server=server), tmp_path) as tasks:
        tasks.begin()
        assert server.answered >= 1 and not tasks.finished
        first = sentence_of(server.requests[0])
        assert [evidence(task) for task in tasks.poll()] == [first, first]
        assert first != split_into_sentences(TEXT)[0].text, "asked in the order of the text"
    with FakeServer() as server, arriving(config("llm", server=server), tmp_path) as tasks:
        tasks.begin()
        while not tasks._ended:  # as where a writer is quick
            tasks.begin()
        assert not tasks.finished, "there are tasks that nobody has seen"
        assert len(tasks.poll()) == 24 and tasks.finished


@pytest.mark.parametrize("lists", [0, 3])
def test_a_dead_server_shows_at_the_beginning(lists: int, tmp_path: Path) -> None:
    """Also where an earlier run has left tasks to train on."""
    if lists:
        with FakeServer(delay_seconds=0.05) as server:
            first_part(config("llm", server=server), tmp_path, lists)
    with arriving(config("llm"), tmp_path) as tasks, pytest.raises(WriterUnreachableError, match="cannot be reached"):
        tasks.begin()


def test_leaving_stops_the_writer(tmp_path: Path) -> None:
    with FakeServer(delay_seconds=0.1) as server:
        with arriving(config("llm", server=server), tmp_path) as tasks:
            tasks.begin()
            assert writer_threads()
        asked = len(server.requests)
        assert writer_threads() == [] and tasks.poll() and tasks.finished
        time.sleep(0.2)
        assert len(server.requests) == asked < 12


def test_without_a_folder_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with FakeServer() as server, arriving(config("llm", server=server)) as tasks:
        assert len(tasks.all()) == 24 and list(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_named_is_said() -> None:
    settings = load_config(None, ["tasks.writer=llm"])
    with arriving(settings) as tasks, pytest.raises(ConfigError, match=r"tasks\.llm\.base_url is not set"):
        tasks.begin()


# --- the model itself -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokens are letters: a request about a sentence takes some 1,800."""
    return save_model(tmp_path_factory.mktemp("models") / "writer", window=4096, seed=1)


Reply = Callable[[str], str]


class Stub:
    """Stands for `generate`: answers each request by its sentence, not in order, and notes what it was asked and how."""

    def __init__(self, reply: Reply, look: Callable[[Model], Any] = lambda model: None) -> None:
        self.calls: list[list[str]] = []
        self.seen: list[Any] = []
        self._reply, self._look = reply, look

    def __call__(self, model: Model, prompts: Sequence[Prompt], settings: Any, seed: int) -> Iterator[Generated]:
        shown = [model.decode(prompt.tokens) for prompt in prompts]
        assert all(len(prompt.tokens) + settings.max_new_tokens <= model.window for prompt in prompts)
        assert len({prompt.group for prompt in prompts}) == 1 and settings.temperature > 0
        self.calls.append([text.rpartition("Sentence: ")[2].partition("\n")[0] for text in shown])
        self.seen.append(self._look(model))
        for index in reversed(range(len(prompts))):
            yield Generated(index, self._reply(self.calls[-1][index]), 9, 0.1, True)


class Judge:
    """Stands for the ranker: a question speaks of the sentence whose number it names, or is as it is told."""

    def __init__(self, nats: float = 9.0) -> None:
        self.nats = nats
        self.title = ""

    def __call__(self, model: Model, title: str) -> Judge:
        self.title = title
        return self

    def relevance(self, question: str, sentences: Sequence[str]) -> list[float]:
        return [self.nats if set(question.split()) & set(sentence.split()[2:3]) else -1.0 for sentence in sentences]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Judge:
    judge = Judge()
    monkeypatch.setattr(liftlm.writing, "Ranker", judge)
    return judge


def asks_well(sentence: str) -> str:
    """Another question each time that it is asked about a sentence."""
    _asked[sentence] += 1
    return f"Who carried {sentence.split()[2]} sacks {_TIMES[_asked[sentence] - 1]}? Nobody knows."


_TIMES = ("by day", "by night", "at noon", "on foot")
_asked: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _nothing_asked_yet() -> None:
    _asked.clear()


def test_the_model_writes_batch_by_batch_in_the_order_of_the_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judged: Judge
) -> None:
    text = sentences(40)
    document = Document(title="The mill", text=text)
    stub = Stub(asks_well)
    monkeypatch.setattr(liftlm.writing, "generate", stub)
    model = load_model(str(folder))
    with arriving(config("self"), tmp_path, model=model, document=document) as tasks:
        assert tasks.slow and tasks.expected == 80
        first = tasks.poll()  # the first without being waited for
        assert len(first) == 32 and tasks.poll() == [] and len(stub.calls) == 1, "wrote though nobody waited"
        second = tasks.poll(wait=True)
        assert len(stub.calls) == 2 and kept(tmp_path) == first + second
    found = [sentence.text for sentence in split_into_sentences(text)]
    assert stub.calls == [[s for s in batch for _ in range(2)] for batch in (found[:16], found[16:32])]
    assert judged.title == "The mill"
    assert {(t.question, t.answer, t.kind) for t in first[:2]} == {
        (f"Who carried 20 sacks {time}?", found[0], "who") for time in ("by day", "by night")
    }
    assert all(text[t.start : t.end] == t.answer for t in first + second)
    # the rest in a second run: only the batch that was the last may lack something
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    _asked.clear()
    with arriving(config("self"), tmp_path, model=model, document=document) as tasks:
        assert tasks.poll() == (first + second)[:-1]
        rest = tasks.all()
    assert [sorted(set(call)) for call in stub.calls[2:]] == [sorted(found[16:32]), sorted(found[32:])]
    assert rest[0] == second[-1] and len(rest) == 1 + 16
    assert kept(tmp_path) == first + second + rest[1:] == sorted(kept(tmp_path), key=lambda task: task.start)


def test_only_questions_that_speak_of_their_sentence_are_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, judged: Judge
) -> None:
    """And a sentence is asked about once more where a first round brought too few."""

    def reply(sentence: str) -> str:
        name = sentence.split()[0]
        said = {"Anna": "Nobody?", "Bert": "Who carried sacks to Vienna?", "Carla": "Who carried the sacks?"}
        return said.get(name) or (asks_well(sentence) if name != "Dirk" else "Who carried 23 sacks?")

    stub = Stub(reply)
    monkeypatch.setattr(liftlm.writing, "generate", stub)
    document = Document(title="x", text=sentences(5))
    with arriving(config("self"), model=load_model(str(folder)), document=document) as tasks:
        questions = [task.question for task in tasks.all()]
        assert questions == [
            "Who carried 23 sacks?",
            *(f"Who carried 24 sacks {time}?" for time in ("by night", "by day")),
        ]
        assert tasks.dropped == {
            "malformed": 4,
            "names what the document does not": 4,
            "about something else": 4,
        }
    names = [[sentence.split()[0] for sentence in call] for call in stub.calls]
    asked = ["Anna", "Anna", "Bert", "Bert", "Carla", "Carla", "Dirk"]
    assert names == [[*asked, "Dirk", "Edda", "Edda"], asked]
    judged.nats = 7.9
    _asked.clear()
    with arriving(config("self"), model=load_model(str(folder)), document=document) as tasks:
        assert tasks.all() == []


def test_of_several_sentences_the_one_that_is_meant_is_the_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, judged: Judge
) -> None:
    monkeypatch.setattr(liftlm.writing, "generate", Stub(lambda sentences: "Who was it that carried 22 sacks?"))
    text = sentences(8)
    settings = config("self", "tasks.sentences_together=4", "tasks.per_sentence=1")
    with arriving(settings, model=load_model(str(folder)), document=Document(title="x", text=text)) as tasks:
        (task,) = tasks.all()
        assert text[task.start : task.end] == task.answer == split_into_sentences(text)[2].text
        assert tasks.dropped == {"about something else": 2}


def test_a_request_that_leaves_no_room_for_a_question_is_not_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, judged: Judge
) -> None:
    model = load_model(str(folder))
    text = sentences(5).replace("Anna carried", f"Anna of {'X' * 600} carried").replace("Dirk", "Dirk" * 150)
    stub = Stub(asks_well)
    monkeypatch.setattr(liftlm.writing, "generate", stub)
    monkeypatch.setattr("liftlm.tasks.self_written._CONTEXT", 1)
    (asked,) = {
        len(
            render_prompt(
                model.tokenizer, [Turn(role, tuple(encode_text(model.tokenizer, part))) for role, part in turns]
            )
        )
        for request in make_requests(sentences(1))
        for turns in [list(zip(itertools.cycle(["user", "assistant"]), self_request(request), strict=False))]
    }
    model.window = asked + 150
    with arriving(config("self"), model=model, document=Document(title="x", text=text)) as tasks:
        found = tasks.all()
    assert [sentence.split()[0] for sentence in stub.calls[0][::2]] == ["Bert", "Carla", "Edda"]
    assert [text[task.start : task.end].split()[0] for task in found[::2]] == ["Bert", "Carla", "Edda"]
    model.window = 400
    with arriving(config("self"), model=model, document=Document(title="x", text=text)) as tasks:
        assert tasks.all() == [] and len(stub.calls) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_bare_model_writes_and_all_is_put_back(
    fails: bool, training: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(folder))
    probe = torch.arange(5, 45)[None]
    with torch.no_grad():
        bare = model.network(probe).logits
    attach_adapter(model, "x", config("self").adapter, 0)
    for parameter in model.adapters["x"].parameters().values():
        torch.nn.init.normal_(parameter)

    def look(model: Model) -> tuple[bool, Tensor]:
        with torch.no_grad():
            return model.network.training, model.network(probe).logits

    def reply(sentence: str) -> str:
        if fails:
            raise RuntimeError("out of breath")
        return asks_well(sentence)

    class Looks(Judge):
        def relevance(self, question: str, sentences: Sequence[str]) -> list[float]:
            stub.seen.append(look(model))
            return super().relevance(question, sentences)

    stub = Stub(reply, look)
    monkeypatch.setattr(liftlm.writing, "generate", stub)
    monkeypatch.setattr(liftlm.writing, "Ranker", Looks())
    with use_adapter(model, "x", training=True), arriving(config("self"), model=model) as tasks:
        model.network.train(training)
        with torch.no_grad():
            on = model.network(probe).logits
        if fails:
            with pytest.raises(RuntimeError, match="out of breath"):
                tasks.poll()
        else:
            assert tasks.poll()
        assert model.network.training == training
        assert all(parameter.requires_grad for parameter in model.adapters["x"].parameters().values())
        with torch.no_grad():
            assert torch.equal(model.network(probe).logits, on) and not torch.allclose(on, bare, atol=0.1)
    assert len(stub.seen) == (1 if fails else 1 + 24)
    assert all(not trained and torch.equal(logits, bare) for trained, logits in stub.seen)


@pytest.mark.parametrize(("family", "window"), [("llama", 256), ("gpt2", 256), ("gpt2", 1536)])
def test_a_real_model_that_writes_nonsense(family: str, window: int, tmp_path: Path) -> None:
    """Requests that leave no room for a reply are not asked: GPT-2 cannot see beyond its window at all."""
    model = load_model(str(save_model(tmp_path / "m", family, window=window)))
    document = Document(title="x", text=sentences(3))
    with arriving(config("self"), tmp_path, model=model, document=document) as tasks:
        assert tasks.all() == [] and tasks.finished and not model.network.training


def test_a_real_model_is_asked_and_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said to each request, of requests of different lengths, goes to its own sentence; and the judge is the ranker."""
    model = load_model(str(folder))
    replies: dict[str, list[str]] = {}
    generate = liftlm.writing.generate

    def listen(model: Model, prompts: Sequence[Prompt], settings: Any, seed: int) -> Iterator[Generated]:
        for said in generate(model, prompts, settings, seed):
            sentence = model.decode(prompts[said.index].tokens).rpartition("Sentence: ")[2].partition("\n")[0]
            replies.setdefault(sentence, []).append(said.text)
            yield said

    read: list[tuple[str, str]] = []

    def take(said: str, sentences: Sequence[Sentence], known: set[str], judge: Any, dropped: Any) -> None:
        read.append((sentences[0].text, said))
        (nats,) = judge("Who rang the bell?", [sentences[0].text])
        assert nats == Ranker(model, "x").relevance("Who rang the bell?", [sentences[0].text])[0]

    monkeypatch.setattr(liftlm.writing, "generate", listen)
    monkeypatch.setattr("liftlm.tasks.self_written._task", take)
    monkeypatch.setattr(liftlm.writing, "_QUESTION_TOKENS", 6)
    with arriving(config("self"), model=model, document=Document(title="x", text=sentences(4))) as tasks:
        assert tasks.all() == []
    found = split_into_sentences(sentences(4))
    assert [sentence for sentence, _ in read[:8]] == [s.text for s in found for _ in range(2)]
    assert all(said in replies[sentence] for sentence, said in read) and len({said for _, said in read}) > 4


# --- examples of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("show", ["passage", "retrieve", "truncate"])
def test_examples_do_not_depend_on_what_arrived_together(show: str, folder: Path) -> None:
    """Nor are two taken for alike that show different text (regression: rows with head and tail were packed as one)."""
    model = load_model(str(folder))
    model.window = 400
    settings = config("llm", "tasks.reading=0.6", f"tasks.show={show}", "tasks.passage_characters=150")
    tasks = write_extractive_tasks(TEXT, 3)
    together = with_text(model, DOCUMENT, tasks, settings)
    assert together == [e for task in tasks for e in with_text(model, DOCUMENT, [task], settings)]
    share = len(together) / len(tasks)
    assert 0.4 < share < 0.8 and len({len(e) for e in together}) > 1
    for example in together:
        assert example.group and len(example) <= 400
        alike = [other for other in together if other.group == example.group]
        assert all(other.shared == example.shared for other in alike)
        assert all(other.tokens[: other.shared] == example.tokens[: example.shared] for other in alike)
        shown = model.decode(list(example.tokens))
        if show == "passage":
            (task,) = [t for t in tasks if f"\nQuestion: {t.question.strip()}\n" in shown.replace("<|im_end|>", "\n")]
            assert TEXT[task.start : task.end] in shown.partition("\n\nPlease answer")[0] or len(example) == 400
    others = with_text(model, DOCUMENT, tasks, settings.model_copy(update={"seed": 1}))
    assert others != together and with_text(model, DOCUMENT, [], settings) == []


# --- all of it: absorbing while a server writes -----------------------------------------------------------------------

SMALL = ["adapter.rank=4", "training.batch_tokens=400", "training.checkpoint_seconds=0", "segments.segment_tokens=64"]
Tensors = dict[str, Tensor]


def absorbed(
    folder: Path,
    settings: LiftConfig,
    work: Path | None = None,
    tasks: Sequence[Task] | None = None,
    on_step: Callable[[StepMetrics], None] = lambda metrics: None,
    window: int = 2048,
) -> tuple[Any, Tensors]:
    model = load_model(str(folder))
    model.window = window
    adapter = absorb(DOCUMENT, model, settings, folder=work, tasks=tasks, on_step=on_step)
    return adapter, {key: tensor.clone() for key, tensor in model.adapters[adapter.id].tensors().items()}


def same(one: Tensors, other: Tensors) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def metrics(work: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_second", "memory_bytes", "seconds_left")
    return [{key: value for key, value in row.items() if key not in clock} for row in rows]


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, InterruptedWorkError), (signal.SIGTERM, TerminatedWorkError)]
)
def test_a_signal_need_not_wait_for_a_silent_server(
    number: int, error: type[InterruptedWorkError], folder: Path, tmp_path: Path
) -> None:
    recipe = [*SMALL, "training.checkpoint_seconds=1000", "tasks.mix=1", "tasks.llm.timeout_seconds=60"]
    work, heard = tmp_path / "work", list[tuple[int, float]]()
    timers: list[threading.Timer] = []

    def signal_soon(step: StepMetrics) -> None:
        """A second after the last step, when training waits for more tasks."""
        heard.append((step.step, time.monotonic()))
        for timer in timers:
            timer.cancel()
        timers.append(threading.Timer(1.0, os.kill, (os.getpid(), number)))
        timers[-1].start()

    with (
        FakeServer(failures=[""] * 6, always="timeout") as server,
        pytest.raises(error, match=r"Stopped after step \d+ of \d+; progress is saved\."),
    ):
        absorbed(folder, config("llm", *recipe, server=server), work, on_step=signal_soon)
    last, at = heard[-1]
    assert time.monotonic() - at < 10
    resumed: list[int] = []
    with FakeServer() as server:
        settings = config("llm", *recipe, server=server)
        adapter, continued = absorbed(folder, settings, work, on_step=lambda m: resumed.append(m.step))
    assert resumed[0] == last + 1 and adapter.tasks == 24
    whole = tmp_path / "whole"
    whole.mkdir()
    for name in ("tasks.jsonl", "replies.jsonl"):
        shutil.copy(work / name, whole / name)
    assert same(absorbed(folder, config("llm", *recipe), whole)[1], continued)


@pytest.mark.parametrize("show", ["passage", "truncate"])
def test_a_server_that_dies_midway_changes_nothing(show: str, folder: Path, tmp_path: Path) -> None:
    """What was written is trained on; a second run takes it up and ends as one that was never stopped.

    Tasks alone, so that the order of steps is that of arrival, whatever the timing. The uninterrupted run finds the same
    tasks in its folder, but all at once (regression: then examples with text were drawn and numbered in another way).
    """
    recipe = [*SMALL, "training.batch_tokens=900", "tasks.mix=1", "training.epochs=2", "tasks.reading=0.3"]
    recipe += [f"tasks.show={show}"]
    work, steps = tmp_path / "work", list[int]()
    with (
        FakeServer(dies_after=8) as server,
        pytest.raises(WriterUnreachableError, match="stopped writing after 8 of 12") as caught,
    ):
        absorbed(
            folder, config("llm", *recipe, server=server), work, on_step=lambda m: steps.append(m.step), window=512
        )
    assert "kept" in caught.value.next_step
    assert len(kept(work)) == 16 and len(steps) > 2 and len(metrics(work)) == len(steps)
    with FakeServer() as second:
        settings = config("llm", *recipe, server=second)
        adapter, resumed = absorbed(folder, settings, work, on_step=lambda m: steps.append(m.step), window=512)
        assert len(second.requests) == 4
    assert adapter.report.resumed_from is not None and adapter.report.resumed_from > 1
    assert adapter.tasks == 24 == len(kept(work)) and steps[-1] == adapter.report.steps

    whole = tmp_path / "whole"
    whole.mkdir()
    for name in ("tasks.jsonl", "replies.jsonl"):
        shutil.copy(work / name, whole / name)
    alone, expected = absorbed(
        folder, config("llm", *recipe), whole, window=512
    )  # with no server at all: everything is there
    assert alone.report.resumed_from is None and alone.report.epoch_losses == adapter.report.epoch_losses
    assert same(expected, resumed) and metrics(whole) == metrics(work) and kept(whole) == kept(work)
    if show == "passage":
        (whole / "tasks.jsonl").write_text("\n".join(reversed((work / "tasks.jsonl").read_text().splitlines())) + "\n")
        for old in whole.glob("checkpoint-*"):
            shutil.rmtree(old)
        other = absorbed(folder, config("llm", *recipe), whole, window=512)[1]
        assert not same(other, expected), "the order makes no difference"


def test_segments_and_tasks_are_learnt_while_a_slow_server_writes(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with FakeServer(delay_seconds=0.2, slots=1) as server:
        settings = config("llm", *SMALL, "training.epochs=2", "tasks.reading=0", server=server)
        adapter, _ = absorbed(folder, settings, tmp_path, on_step=lambda m: seen.append((m.epoch, server.answered)))
    assert adapter.tasks == 24 and adapter.segments > 5
    assert seen[0][1] < 12 and len({answered for _, answered in seen}) > 3, "training waited for all of them"
    assert [epoch for epoch, _ in seen] == sorted(epoch for epoch, _ in seen) and {e for e, _ in seen} == {1, 2}
    model = load_model(str(folder))
    prompts = sum(len(model.encode(task.answer)) for task in kept(tmp_path))
    assert adapter.report.tokens > 2 * (len(model.encode(TEXT)) + prompts)


@pytest.mark.parametrize("more", [[], ["tasks.mix=1"], ["tasks.first_epoch=1", "training.epochs=2"]])
def test_a_dead_server_is_said_before_any_step(more: list[str], folder: Path, tmp_path: Path) -> None:
    """Regression: segments were trained on first."""
    model = load_model(str(folder))
    with pytest.raises(WriterUnreachableError, match="cannot be reached") as caught:
        absorb(DOCUMENT, model, config("llm", *SMALL, *more), folder=tmp_path, on_step=lambda m: pytest.fail("a step"))
    assert "tasks.llm.base_url" in caught.value.next_step
    assert not model.adapters and not model.network.training
    assert {path.name for path in tmp_path.iterdir()} <= {"replies.jsonl"}


def test_after_a_failure_the_model_is_as_before(folder: Path) -> None:
    model = load_model(str(folder))
    probe = torch.arange(5, 45)[None]
    with torch.no_grad():
        before = model.network(probe).logits
    with FakeServer(dies_after=6) as server, pytest.raises(WriterUnreachableError):
        absorb(DOCUMENT, model, config("llm", *SMALL, server=server))
    assert not model.adapters and not model.network.training
    with torch.no_grad():
        assert torch.equal(model.network(probe).logits, before)


def test_a_teacher_has_all_tasks_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: with a writer that is slow, tasks.teacher_weight was passed over in silence."""
    taught: list[int] = []
    top = ModelClass.top_tokens
    monkeypatch.setattr(ModelClass, "top_tokens", lambda *all, **more: (taught.append(1), top(*all, **more))[1])
    recipe = [*SMALL, "tasks.teacher_weight=0.5", "tasks.reading=0", "training.epochs=1"]
    with FakeServer() as server:
        adapter, found = absorbed(folder, config("llm", *recipe, server=server), tmp_path)
    assert taught and adapter.tasks == 24
    _, expected = absorbed(folder, config("extractive", *recipe), tasks=kept(tmp_path))
    assert same(found, expected)


@pytest.mark.parametrize("writer", ["llm", "extractive"])
def test_segments_alone_need_no_writer(writer: str, folder: Path, tmp_path: Path) -> None:
    adapter, found = absorbed(folder, config(writer, *SMALL, "tasks.mix=0", "training.epochs=1"), tmp_path)
    plain, expected = absorbed(folder, config("none", *SMALL, "training.epochs=1"))
    assert adapter.tasks == 0 and same(found, expected) and adapter.report.steps == plain.report.steps
    assert adapter.notes == (), "said what nobody wrote"
    assert not (tmp_path / "tasks.jsonl").exists() and not (tmp_path / "teacher.safetensors").exists()


@torch.inference_mode()  # as in generating
def bare_logits(model: Any) -> float:
    return float(model.network(torch.arange(5, 45)[None]).logits.sum())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_is_not_disturbed_by_what_the_bare_model_writes(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, judged: Judge
) -> None:
    """Between steps its adapter is off and dropout too; the result is that of a run in which all was written before."""
    recipe = [*SMALL, f"adapter.kind={kind}", "adapter.dropout=0.1", "tasks.mix=1", "training.epochs=1"]
    recipe += ["training.gradient_checkpointing=true", "tasks.reading=0.5"]
    found, calls = [], []
    for together in (100, 2):
        _asked.clear()
        stub = Stub(asks_well, bare_logits)
        monkeypatch.setattr(liftlm.writing, "generate", stub)
        monkeypatch.setattr("liftlm.tasks.self_written._TOGETHER", together)
        found.append(absorbed(folder, config("self", *recipe))[1])
        calls.append(len(stub.calls))
        assert len(set(stub.seen)) == 1, "not the bare model"
    assert calls == [1, 6] and same(*found)


def test_the_benchmark_runs(tmp_path: Path) -> None:
    """On a tiny model; its figures mean nothing, but the two must have taken some time and been done at once."""
    script = Path(__file__).parent.parent / "benchmarks" / "pipeline.py"
    command = [sys.executable, "-W", "ignore", str(script), "--tiny", "--sentences", "12", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["sentences"], found["tasks"], found["rounds"]) == (12, 24, 4) and found["steps"] > 3
    (row,) = found["rows"]
    assert row["writing"] > 4 * row["delay"] > 0.1 and row["ratio"] == found["ratio"]
    assert row["ratio"] == pytest.approx(row["both"] / max(row["writing"], row["training"]))
    assert found["config"]["tasks"]["writer"] == "llm" and found["machine"]["device"] == "cpu"
