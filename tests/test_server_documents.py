"""Documents over HTTP: upload, follow, ask, cancel, delete; the right one answers, soon; crashes lose nothing."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from liftlm import Document, absorb, answer, load_config, load_model
from liftlm.library import Library
from liftlm.server.answers import Answers, Asked
from serving import PATIENCE, QUICK, Running, histogram, number_in, serving, wait_for

NAMES = ["Corriden", "Velm", "Astaria", "Dunholt", "Mirren", "Ostrava", "Quill", "Tarn"]
LONG = "training.epochs=400"  # far longer than any test


def text_of(name: str, times: int = 10) -> str:
    return f"The ferryman of {name} rang {len(name)} bells of {name} for {name[::-1]}. " * times


def question(model: str, text: str = "Who rang?", **options: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **options}


def content(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tiny_folder, "server.document_epochs=1000", home=tmp_path_factory.mktemp("home")) as running:
        yield running


# --- upload, follow, delete -------------------------------------------------------------------------------------------


def test_from_upload_to_answer_to_deletion(server: Running) -> None:
    client = server.client
    reply = client.post(
        "/v1/documents",
        files={"file": ("../../etc/the_bells.md", f"# Bells\n\n{text_of('Corriden')}".encode())},
        data={
            "alias": "bells",
            "settings": json.dumps({"training": {"epochs": 2}, "segments": {"segment_tokens": 48}}),
        },
    )
    assert reply.status_code == 202
    card = reply.json()
    assert (card["title"], card["alias"], card["file_name"]) == ("Bells", "bells", "the_bells.md")
    assert card["job"]["id"].startswith("job-") and card["state"] in ("queued", "absorbing", "ready")
    events = list(read_events(client, card["id"]))
    assert [name for name, _ in events] == ["document"] * len(events)
    last = events[-1][1]
    assert last["state"] == "ready" and last["job"]["progress"] == 1.0 and last["job"]["loss"] > 0
    entry = server.service.library.find(card["id"]).card["config"]
    assert (entry["training"]["epochs"], entry["segments"]["segment_tokens"]) == (2, 48)
    losses = client.get("/v1/documents/bells/losses").json()["data"]
    assert [row["step"] for row in losses] == list(range(1, last["job"]["steps"] + 1))
    assert content(client.post("/v1/chat/completions", json=question("bells")))
    assert [card["id"]] == [found["id"] for found in client.get("/v1/documents?search=bell").json()["data"]]
    assert client.get("/v1/documents?search=nothing").json()["data"] == []
    assert client.delete("/v1/documents/bells").json() == {"id": card["id"], "object": "document", "deleted": True}
    for path in ("", "/events", "/losses", "/tasks"):
        assert client.get(f"/v1/documents/bells{path}").status_code == 404
    assert client.delete("/v1/documents/bells").status_code == 404
    assert client.post("/v1/chat/completions", json=question("bells")).status_code == 404
    wait_for(lambda: not (server.service.library.path / card["id"]).exists())
    assert card["id"] not in server.service.engine.model.adapters


def test_the_same_content_is_one_document(server: Running) -> None:
    first = server.absorb(text_of("Velm"), title="Velm")
    again = server.client.post("/v1/documents", json={"text": text_of("Velm"), "title": "Another title"})
    assert (again.status_code, again.json()["id"], again.json()["title"]) == (202, first["id"], "Velm")
    assert again.json()["state"] == "ready" and again.json()["job"] == first["job"]
    file = server.client.post("/v1/documents", files={"file": ("velm.txt", text_of("Velm").encode())})
    assert file.json()["id"] == first["id"]
    other = server.absorb(text_of("Velm"), title="Velm", settings={"seed": 3})
    assert other["id"] != first["id"]


def test_tasks_can_be_looked_through(server: Running) -> None:
    card = server.absorb(text_of("Tarn", 3), title="Tarn", settings={"tasks": {"writer": "extractive"}})
    whole = server.client.get(f"/v1/documents/{card['id']}/tasks?limit=200").json()
    assert whole["total"] == len(whole["data"]) > 3
    assert all(row["question"] and row["answer"] and "ferryman" in row["evidence"] for row in whole["data"])
    part = server.client.get(f"/v1/documents/{card['id']}/tasks?limit=2&offset=1").json()
    assert (part["total"], part["data"]) == (whole["total"], whole["data"][1:3])
    assert server.client.get(f"/v1/documents/{card['id']}/tasks?search=zebra").json() == {
        "object": "list",
        "total": 0,
        "data": [],
    }


def test_uploaded_again_while_it_is_being_deleted(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_folder, home=tmp_path / "home") as server:
        document = server.absorb(text_of("Corriden"))["id"]
        library, sent = server.service.library, []
        remove = library.remove

        def in_the_midst(entry_id: str) -> None:
            remove(entry_id)
            sent.append(server.client.post("/v1/documents", json={"text": text_of("Corriden")}).json()["id"])

        monkeypatch.setattr(library, "remove", in_the_midst)
        assert server.client.delete(f"/v1/documents/{document}").status_code == 200
        assert server.wait(document)["state"] == "ready"
        assert sent == [document] and library.problems(document) == []


def test_uploaded_again_after_its_files_were_taken_away(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, home=tmp_path / "home") as server:
        document = server.absorb(text_of("Corriden"))["id"]
        server.service.library.remove(document)
        assert server.absorb(text_of("Corriden"))["id"] == document
        assert server.client.get(f"/v1/documents/{document}").json()["state"] == "ready"


def test_cancelling_ends_the_job_and_it_can_begin_again(server: Running) -> None:
    reply = server.client.post(
        "/v1/documents", json={"text": text_of("Quill"), "settings": {"training": {"epochs": 900}}}
    )
    waiting = server.client.post("/v1/documents", json={"text": text_of("Mirren"), "title": "waits"}).json()["id"]
    document = reply.json()["id"]
    for name in (waiting, document):
        assert server.client.post(f"/v1/documents/{name}/cancel").json()["state"] == "cancelled"
        assert server.client.post(f"/v1/documents/{name}/cancel").status_code == 409
    asked = server.client.post("/v1/chat/completions", json=question(document))
    assert asked.status_code == 409 and "cancelled" in asked.json()["error"]["message"]
    wait_for(lambda: not (server.service.library.home / "unfinished" / document).exists())
    assert server.absorb(text_of("Mirren"), title="waits")["id"] == waiting
    server.client.delete(f"/v1/documents/{document}")


def test_what_a_client_may_not_set(server: Running) -> None:
    for settings in (
        {"tasks": {"writer": "llm"}}, {"tasks": {"llm": {"base_url": "http://10.0.0.1"}}}, {"model": {"name": "/etc"}},
        {"training": {"epochs": 10**6}}, {"training": {"total_tokens": 10**15}},
        {"adapter": {"kind": "full"}}, {"adapter": {"rank": 10**6}},
        {"server": {"queue_length": 1}}, {"answering": {}}, {"training": 3}, {"seed": "x"}, {"training": {"nothing": 1}},
    ):  # fmt: skip
        reply = server.client.post("/v1/documents", json={"text": "some text", "settings": settings})
        assert reply.status_code == 422, (settings, reply.text)
    for wrong in (
        {"alias": "A"},
        {"alias": "tiny-llama"},
        {"alias": "0123456789abcdef"},
        {"title": ""},
        {"what": 1},
        {"text": ""},
    ):
        assert server.client.post("/v1/documents", json={"text": "some text"} | wrong).status_code == 400, wrong
    server.absorb("some text for an alias", alias="taken")
    assert server.client.post("/v1/documents", json={"text": "other", "alias": "taken"}).status_code == 400
    assert server.client.post("/v1/documents", json={"text": " \n "}).status_code == 422
    assert server.client.post("/v1/documents", content=b"x", headers={"content-type": "text/plain"}).status_code == 400


def test_what_the_command_line_absorbed_is_there(server: Running, tiny_folder: Path) -> None:
    config = load_config(None, [f"model.name={tiny_folder}", *QUICK])
    adapter, _ = Library(server.service.library.home).absorb_once(
        Document("From outside", text_of("Dunholt")), load_model(str(tiny_folder), config.model), config
    )
    server.service._looked = 0.0
    card = server.client.get(f"/v1/documents/{adapter.id}").json()
    assert (card["title"], card["state"]) == ("From outside", "ready")
    assert content(server.client.post("/v1/chat/completions", json=question(adapter.id)))
    again = server.client.post("/v1/documents", json={"text": text_of("Dunholt"), "title": "x"}).json()
    assert (again["id"], again["state"]) == (adapter.id, "ready")
    Library(server.service.library.home).remove(adapter.id)  # nothing is listed that is not there
    assert adapter.id not in [found["id"] for found in server.client.get("/v1/documents").json()["data"]]


# --- many at once -----------------------------------------------------------------------------------------------------


def test_eight_documents_two_hundred_questions_each_from_the_right_one(tiny_folder: Path, tmp_path: Path) -> None:
    """Room for one adapter more than those in use, so that they come and go; streams and whole answers, long and short, mixed."""
    config = load_config(None, [f"model.name={tiny_folder}", *QUICK])
    training = "training.learning_rate=0.01", "training.epochs=3"  # so that the adapters differ in every answer
    home = tmp_path / "home"
    with serving(tiny_folder, *training, "server.adapter_megabytes=0", home=home) as server:
        ids = {name: server.absorb(text_of(name), title=name)["id"] for name in NAMES}
        model, library = load_model(str(tiny_folder), config.model), Library(home)
        adapters = {name: library.open(entry, model) for name, entry in ids.items()}
        draw = random.Random(0)
        asked = [
            (
                name,
                f"Who rang {number // 8 % 2}?",
                ["none", "truncate", "retrieve"][number // 8 % 3],
                [3, 12][number // 24 % 2],
            )
            for number, name in enumerate(itertools.islice(itertools.cycle(NAMES), 200))
        ]
        draw.shuffle(asked)

        def alone(name: str, text: str, context: str, tokens: int) -> str:
            changed = [f"answering.context={context}", f"answering.max_new_tokens={tokens}"]
            settings = load_config(None, [f"model.name={tiny_folder}", *QUICK, *changed])
            return answer(model, adapters[name], text, config=settings).answer

        def over_http(one: tuple[str, str, str, int]) -> str:
            name, text, context, tokens = one
            body = question(ids[name], text, context=context, max_tokens=tokens, stream=tokens == 3)
            reply = server.client.post("/v1/chat/completions", json=body)
            if tokens != 3:
                return content(reply)
            rows = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
            return "".join(row["choices"][0]["delta"].get("content", "") for row in rows)

        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            given = list(pool.map(over_http, asked))
        expected = {one: alone(*one) for one in sorted(set(asked))}
        wrong = [one for one, text in zip(asked, given, strict=True) if text != expected[one]]
        assert wrong == []
        answers = {name: expected[next(one for one in expected if one[0] == name and one[3] == 12)] for name in NAMES}
        assert len(set(answers.values())) > 6  # the test could not tell adapters apart otherwise
        metrics = server.client.get("/metrics").text
        assert number_in(metrics, 'liftlm_batch_rows_bucket{le="1.0"}') < number_in(metrics, "liftlm_batch_rows_count")
        assert number_in(metrics, 'liftlm_cache_lookups_total{cache="adapter",result="miss"}') > 8


def test_questions_are_answered_while_a_document_is_absorbed(tiny_folder: Path, tmp_path: Path) -> None:
    """Between two steps: also the first of those who never stop asking; and training goes on."""
    with serving(tiny_folder, "server.document_epochs=1000", home=tmp_path / "home") as server:
        ready = server.absorb(text_of("Velm"))["id"]
        alone = content(server.client.post("/v1/chat/completions", json=question(ready)))
        busy = server.client.post(
            "/v1/documents", json={"text": text_of("Tarn", 20), "settings": {"training": {"epochs": 400}}}
        ).json()["id"]
        wait_for(lambda: server.client.get(f"/v1/documents/{busy}").json()["job"]["step"] > 0)
        stop = threading.Event()

        def client() -> list[str]:
            texts = []
            while not stop.is_set():
                texts.append(content(server.client.post("/v1/chat/completions", json=question(ready))))
            return texts

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            clients = [pool.submit(client) for _ in range(6)]
            before = steps(server)
            wait_for(
                lambda: steps(server) >= before + 5 and answers(server) > 20
            )  # neither keeps the other from going on
            stop.set()
            texts = [text for one in clients for text in one.result()]
        assert set(texts) == {alone}
        page = server.client.get("/metrics").text
        assert max(many for many, count in histogram(page, "liftlm_training_steps_waited") if count) <= 1
        assert server.client.get(f"/v1/documents/{busy}").json()["state"] == "absorbing"
        server.client.delete(f"/v1/documents/{busy}")


def test_answering_between_steps_does_not_change_what_is_learnt(tiny_folder: Path, tmp_path: Path) -> None:
    config = load_config(None, [f"model.name={tiny_folder}", *QUICK, "training.epochs=12", "adapter.dropout=0.1"])
    model = load_model(str(tiny_folder), config.model)
    expected = absorb(Document("Astaria", text_of("Astaria"), "text"), model, config)
    tensors = model.adapters[expected.id].tensors()
    with serving(tiny_folder, "training.epochs=12", "adapter.dropout=0.1", home=tmp_path / "home") as server:
        other = server.absorb(text_of("Velm"), settings={"training": {"epochs": 1}})["id"]
        reply = server.client.post("/v1/documents", json={"text": text_of("Astaria"), "title": "Astaria"})
        entry = reply.json()["id"]
        assert entry == expected.id
        while server.client.get(f"/v1/documents/{entry}").json()["state"] != "ready":
            content(server.client.post("/v1/chat/completions", json=question(other, temperature=1.0)))
        stored = load_file(server.service.library.path / entry / "adapter" / "adapter_model.safetensors")
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name]) for name in stored)


def test_a_full_queue_refuses_and_says_when(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, "server.queue_length=3", "server.batch_rows=1", home=tmp_path / "home") as server:
        long = question("tiny-llama", max_tokens=200)
        with concurrent.futures.ThreadPoolExecutor(30) as pool:
            replies = list(pool.map(lambda _: server.client.post("/v1/chat/completions", json=long), range(30)))
        refused = [reply for reply in replies if reply.status_code == 429]
        assert refused and all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
        assert {reply.status_code for reply in replies} == {200, 429}
        content(server.client.post("/v1/chat/completions", json=question("tiny-llama")))  # and then it is free again
        too_many = server.client.post("/v1/completions", json={"model": "tiny-llama", "prompt": ["a"] * 4})
        assert too_many.status_code == 429


def test_the_urgent_come_first(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tiny_folder, "server.batch_rows=1", home=tmp_path / "home") as server:
        begun: list[int] = []
        begin = Answers._begin

        def noted(answers: Answers, asked: Asked) -> None:
            begun.append(asked.priority)
            begin(answers, asked)

        monkeypatch.setattr(Answers, "_begin", noted)

        def one(priority: str) -> str:
            body = question("tiny-llama", priority=priority, max_tokens=3)
            return content(server.client.post("/v1/chat/completions", json=body))

        engine, free = server.service.engine, threading.Event()
        engine.call(lambda model: free.wait(PATIENCE))  # until all wait
        with concurrent.futures.ThreadPoolExecutor(9) as pool:
            sent = [
                pool.submit(one, priority) for priority in ("normal", "low", "low", "low", "normal", "high", "high")
            ]
            wait_for(lambda: len(engine._queues.asked) == 7)
            free.set()
            for reply in sent:
                reply.result()
        assert begun == [-1, -1, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_place(tiny_folder: Path, tmp_path: Path, stream: bool) -> None:
    model = save_wide(tmp_path)
    with serving(model, "server.batch_rows=1", home=tmp_path / "home") as server:
        body = question(model.name, max_tokens=8000, stream=stream)
        with httpx.Client(base_url=server.url, timeout=PATIENCE if stream else 0.5) as impatient:
            if stream:
                with impatient.stream("POST", "/v1/chat/completions", json=body) as reply:
                    next(reply.iter_bytes())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    impatient.post("/v1/chat/completions", json=body)
        content(server.client.post("/v1/chat/completions", json=question(model.name, max_tokens=1)))
        # one place: had it not been freed, the answer would have come after the other one's 8,000 tokens
        assert number_in(server.client.get("/metrics").text, "liftlm_answer_tokens_total") <= 1
        wait_for(lambda: number_in(server.client.get("/metrics").text, "liftlm_running_answers") == 0)


def save_wide(folder: Path) -> Path:
    from conftest import save_model

    return save_model(folder / "endless", window=8192, seed=3)


# --- crashes ----------------------------------------------------------------------------------------------------------


def test_kill_in_the_middle_of_absorbing_and_answering_loses_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    settings = ("training.checkpoint_seconds=0.1", "server.document_epochs=1000")
    with process(tiny_folder, home, *settings) as (running, client):
        ready = upload(client, text_of("Corriden"), title="Corriden", alias="corriden")
        follow(client, ready, "ready")
        before = content(client.post("/v1/chat/completions", json=question("corriden")))
        gone = upload(client, text_of("Quill"))
        follow(client, gone, "ready")
        client.delete(f"/v1/documents/{gone}")
        busy = upload(client, text_of("Tarn", 20), settings={"training": {"epochs": 30}})
        queued = upload(client, text_of("Velm"))
        wait_for(lambda: list((home / "unfinished" / busy).glob("checkpoint-*")))
        body = question("corriden", max_tokens=200, stream=True)
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            next(reply.iter_bytes())
            running.send_signal(signal.SIGKILL)
            running.wait()
    with process(tiny_folder, home, *settings) as (running, client):
        listed = {card["id"]: card["state"] for card in client.get("/v1/documents").json()["data"]}
        assert set(listed) == {ready, busy, queued} and listed[ready] == "ready"
        assert content(client.post("/v1/chat/completions", json=question("corriden"))) == before
        follow(client, busy, "ready")
        follow(client, queued, "ready")
        card = json.loads((home / "library" / busy / "entry.json").read_text())
        assert card["report"]["resumed_from"] > 0
        steps_taken = [row["step"] for row in client.get(f"/v1/documents/{busy}/losses").json()["data"]]
        assert steps_taken == list(range(1, card["report"]["steps"] + 1))
        running.send_signal(signal.SIGTERM)  # and a polite end
        assert running.wait(PATIENCE) in (0, -signal.SIGTERM, 143)


class process:
    """`lift serve` as its users start it, on a free port."""

    def __init__(self, model: Path, home: Path, *settings: str) -> None:
        options = itertools.chain.from_iterable(("--set", setting) for setting in (*QUICK, *settings))
        command = [sys.executable, "-m", "liftlm", "serve", "--port", "0", "--model", str(model), *options]
        environment = os.environ | {"LIFT_HOME": str(home)}
        self._running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> tuple[subprocess.Popen[str], httpx.Client]:
        assert self._running.stderr is not None
        line = self._running.stderr.readline()
        assert "http://127.0.0.1:" in line, line + self._running.stderr.read()
        threading.Thread(target=self._running.stderr.read, daemon=True).start()
        self._client = httpx.Client(base_url=line.split(" ")[2], timeout=PATIENCE)
        wait_for(lambda: self._client.get("/readyz").status_code == 200)
        return self._running, self._client

    def __exit__(self, *error: object) -> None:
        self._client.close()
        self._running.kill()
        self._running.wait()


def upload(client: httpx.Client, text: str, **fields: Any) -> str:
    reply = client.post("/v1/documents", json={"text": text, **fields})
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


def follow(client: httpx.Client, document: str, state: str) -> None:
    *_, (_, last) = read_events(client, document)
    assert last["state"] == state, last


def read_events(client: httpx.Client, document: str) -> Iterator[tuple[str, Any]]:
    with client.stream("GET", f"/v1/documents/{document}/events") as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in reply.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield name, json.loads(line[6:])


def answers(server: Running) -> int:
    return int(number_in(server.client.get("/metrics").text, "liftlm_time_to_first_token_seconds_count"))


def steps(server: Running) -> int:
    return int(number_in(server.client.get("/metrics").text, "liftlm_training_step_seconds_count"))
