"""Many servers behind one address: what a replica fetches, answers and lets go, and (slow) all of it through Ray Serve."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from conftest import save_model
from liftlm import Document, Library, answer, load_config, load_model
from liftlm.errors import EntryNotFoundError
from liftlm.many_documents import Order
from liftlm.server.replica import Call, Front, Head, Replica

SETTINGS = [
    *("model.dtype=float32", "model.device=cpu", "model.threads=1", "model.window=512", "tasks.writer=none"),
    *("segments.segment_tokens=128", "adapter.rank=4", "training.batch_tokens=512", "answering.max_new_tokens=8"),
]
QUESTION = "Who rang the bell?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("m") / "tiny", window=512)


@pytest.fixture(scope="module")
def absorbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A home with three entries, and what each answers here."""
    home, found = tmp_path_factory.mktemp("home"), {}
    config = load_config(None, [*SETTINGS, f"model.name={folder}"])
    model = load_model(config=config.model)
    for name in ("Oswin", "Mara", "Jonas"):
        document = Document(title=name, text=f"{name} rang the bell of the old town by the lake. " * 12)
        adapter, _ = Library(home).absorb_once(document, model, config)
        found[adapter.id] = answer(model, adapter, QUESTION, document=document, config=config).answer
    return home, found


def order(folder: Path, home: Path) -> Order:
    return Order(load_config(None, [*SETTINGS, f"model.name={folder}"]), str(home), 1)


def asked(entry: str, **more: Any) -> Call:
    body = {"model": entry, "messages": [{"role": "user", "content": QUESTION}]} | more
    headers = (("content-type", "application/json"), ("host", "elsewhere.example"))
    return Call("POST", "/v1/chat/completions", headers, json.dumps(body).encode())


async def whole(replica: Replica, call: Call) -> tuple[int, bytes]:
    head, body = None, b""
    async for piece in replica.answer(call):
        if isinstance(piece, Head):
            head = piece
        else:
            body += piece
    assert head is not None
    return head.status, body


def test_a_replica_answers_about_what_it_holds(
    folder: Path, absorbed: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liftlm.server.replica.scratch_folder", lambda: tmp_path / "scratch")
    home, answers = absorbed
    replica = Replica(order(folder, home))

    async def talk() -> None:
        for entry, expected in answers.items():
            assert (await whole(replica, asked(entry)))[0] == 404
            held = await replica.hold(entry)
            status, body = await whole(replica, asked(entry))
            assert status == 200, body
            assert json.loads(body)["choices"][0]["message"]["content"] == expected
            status, body = await whole(replica, asked(entry, stream=True))
            assert status == 200 and body.endswith(b"data: [DONE]\n\n")
            assert (tmp_path / "scratch" / "library" / entry).is_dir()
            del held
            assert not (tmp_path / "scratch" / "library" / entry).exists()
            assert (await whole(replica, asked(entry)))[0] == 404
        with pytest.raises(EntryNotFoundError):
            await replica.hold("0" * 16)
        assert (await whole(replica, asked(folder.name)))[0] == 200  # the base model
        again = await replica.hold(entry)  # what was let go can come back
        assert (await whole(replica, asked(entry)))[0] == 200
        del again

    asyncio.run(talk())
    replica._service.stop()


def test_a_front_knows_whose_entry_is_meant(folder: Path, absorbed: tuple[Path, dict[str, str]]) -> None:
    home, answers = absorbed
    front = Front(order(folder, home))
    for entry in answers:
        assert front.entry_of(asked(entry)) == entry
    for body in (
        b"",
        b"[1]",
        b'{"model": 5}',
        b'{"model": "smollm2"}',
        b"[" * 100_000,
        b'{"model": "../../etc/passwd"}',
    ):
        assert front.entry_of(Call("POST", "/v1/completions", (), body)) == ""

    async def ask(method: str, path: str) -> Any:
        return await front.answer(Call(method, path, (), b""))

    head, body = asyncio.run(ask("GET", "/v1/models"))
    assert head.status == 200
    assert {card["id"] for card in json.loads(body)["data"]} == {folder.name, *answers}
    assert asyncio.run(ask("POST", "/v1/chat/completions")) is None
    assert asyncio.run(ask("GET", "/readyz"))[0].status == 200
    head, body = asyncio.run(ask("POST", "/v1/documents"))
    assert head.status == 404 and "lift absorb FOLDER --ray" in json.loads(body)["error"]["message"]


@pytest.fixture
def address(
    folder: Path, absorbed: tuple[Path, dict[str, str]], tmp_path: Path
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`lift serve --ray local` with two replicas."""
    pytest.importorskip("ray")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "liftlm", "serve", "--ray", "local", "--port", str(port), "--model", str(folder)]
    command += ["--library", str(absorbed[0]), "--set", "cluster.workers=2", "--set", "cluster.adapters_per_replica=2"]
    command += [part for setting in SETTINGS for part in ("--set", setting)]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 150
    while True:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                break
        except httpx.HTTPError:
            pass
        if running.poll() is not None or time.monotonic() > end:
            running.kill()
            raise AssertionError(running.communicate())
        time.sleep(0.5)
    yield url, running
    if running.poll() is None:
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)


@pytest.mark.slow
def test_requests_go_where_the_adapter_is(
    address: tuple[str, subprocess.Popen[str]], absorbed: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    from openai import NotFoundError, OpenAI

    url, running = address
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    assert {model.id for model in client.models.list()} >= set(absorbed[1])
    message: Any = [{"role": "user", "content": QUESTION}]
    two = list(absorbed[1].items())[:2]
    for _ in range(6):
        for entry, expected in two:
            assert client.chat.completions.create(model=entry, messages=message).choices[0].message.content == expected
    held = [path.name for path in (tmp_path / "cache" / "liftlm" / "workers").glob("*/library/[!.]*")]
    assert sorted(held) == sorted(entry for entry, _ in two)  # each was fetched by one replica, twelve requests or not
    (entry, expected) = list(absorbed[1].items())[2]
    stream = client.chat.completions.create(model=entry, messages=message, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == expected
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="0" * 16, messages=message)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=90)
    assert running.returncode in (0, 130) and out == "", (out, err)


@pytest.mark.slow
def test_a_sigterm_ends_all_of_it(address: tuple[str, subprocess.Popen[str]]) -> None:
    url, running = address
    processes = psutil.Process(running.pid).children(recursive=True)
    assert len(processes) > 3  # Ray's own, two replicas and the front
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=90)
    said = {0: "Stopping.", 143: "Stopped by SIGTERM."}  # 143: before it had said that it listens
    assert said[running.returncode] in err and out == "" and "Traceback" not in err, (out, err)
    assert not psutil.wait_procs(processes, timeout=30)[1]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/readyz", timeout=5)
