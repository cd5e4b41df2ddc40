"""Keys, owners, limits, hostile files, other sites' pages; nothing of a document or a question in logs or metrics."""

from __future__ import annotations

import concurrent.futures
import io
import json
import logging
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from liftlm.cli import app
from liftlm.documents import Document
from liftlm.errors import AddressError, EntryNotFoundError, LiftError, ServerBusyError, TooLargeError
from liftlm.server import uploads
from liftlm.server.keys import make_key
from liftlm.server.limits import Rate
from liftlm.server.uploads import read_upload
from liftlm.server_config import ServerConfig
from serving import PATIENCE, Running, serving, wait_for

TEXT = "The password of the vault of Corriden is seventeen silver marks. " * 8
SECRET = "zyzzyva"  # in no message of the program


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = ("server.upload_megabytes=1", "server.request_kilobytes=64", "server.document_tokens=3000")
    with serving(tiny_folder, *settings, home=tmp_path_factory.mktemp("home"), keys_required=True) as running:
        yield running


@pytest.fixture(scope="module")
def alice(server: Running) -> Iterator[httpx.Client]:
    yield from client_of(server, "alice")


@pytest.fixture(scope="module")
def bob(server: Running) -> Iterator[httpx.Client]:
    yield from client_of(server, "bob")


def client_of(server: Running, name: str) -> Iterator[httpx.Client]:
    _, key = make_key(server.service.store, name)
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=PATIENCE) as client:
        yield client


def chat(model: str, text: str = "Who?") -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}]}


# --- keys and owners --------------------------------------------------------------------------------------------------


def test_without_a_key_nothing_is_told(server: Running, alice: httpx.Client) -> None:
    routes = [("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/metrics")]
    routes += [
        ("GET", "/v1/documents"),
        ("POST", "/v1/documents"),
        ("DELETE", "/v1/documents/x"),
        ("GET", "/v1/documents/x/events"),
    ]
    key = alice.headers["authorization"]
    for method, route in routes:
        for given in (None, "Bearer", "Bearer wrong", key.replace("Bearer", "Basic"), key[:-1], f"{key}x"):
            headers = {} if given is None else {"authorization": given}
            reply = server.client.request(method, route, headers=headers)
            assert reply.status_code in (401, 400), (method, route, given)  # 400: there was no body to look at
            if reply.status_code == 401:
                assert reply.headers["www-authenticate"] == "Bearer"
    assert server.client.post("/v1/chat/completions", json=chat("tiny-llama")).status_code == 401
    assert server.client.get("/healthz").json() == {"status": "ok"} and server.client.get("/readyz").status_code == 200
    assert alice.get("/v1/models").status_code == 200


def test_keys_are_kept_as_hashes(server: Running, alice: httpx.Client) -> None:
    key = alice.headers["authorization"].removeprefix("Bearer ")
    for file in server.service.library.home.glob("server.sqlite*"):
        assert key.encode() not in file.read_bytes()
        assert file.stat().st_mode & 0o077 == 0


def test_each_key_sees_its_own_documents(server: Running, alice: httpx.Client, bob: httpx.Client) -> None:
    hers = server.absorb(TEXT, alice, title="Vault", alias="vault")["id"]
    for name in (hers, "vault"):
        for path in ("", "/events", "/losses", "/tasks"):
            assert bob.get(f"/v1/documents/{name}{path}").status_code == 404
        assert bob.delete(f"/v1/documents/{name}").status_code == 404
        assert bob.post(f"/v1/documents/{name}/cancel").status_code == 404
        assert bob.post("/v1/chat/completions", json=chat(name)).status_code == 404
        assert bob.post("/v1/completions", json={"model": name, "prompt": "The"}).status_code == 404
        assert bob.get(f"/v1/models/{name}").status_code == 404
    assert bob.get("/v1/documents").json()["data"] == [] and len(bob.get("/v1/models").json()["data"]) == 1
    # the same text of both is absorbed once, and each may name and delete it as if it were alone
    his = server.absorb(TEXT, bob, title="Vault", alias="vault")
    assert his["id"] == hers
    assert bob.delete("/v1/documents/vault").status_code == 200
    assert alice.post("/v1/chat/completions", json=chat("vault")).status_code == 200
    his = server.absorb(TEXT, bob, title="Bob's words for it")
    assert his["title"] == "Bob's words for it" and his["id"] != hers
    assert alice.delete("/v1/documents/vault").status_code == 200


def test_removing_the_last_key_lets_nobody_in(server: Running, tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, home=tmp_path / "home", keys_required=True) as other:
        key_id, key = make_key(other.service.store, "only")
        headers = {"authorization": f"Bearer {key}"}
        assert other.client.get("/v1/models", headers=headers).status_code == 200
        assert other.service.store.remove_key(key_id)
        assert other.client.get("/v1/models", headers=headers).status_code == 401
        assert other.client.get("/v1/models").status_code == 401


def test_documents_of_a_removed_key_are_kept_given_or_deleted(tiny_folder: Path, home: Path) -> None:
    with serving(tiny_folder, "server.document_epochs=1000", home=home, keys_required=True) as server:
        (alice_id, alice), (bob_id, bob) = (make_key(server.service.store, name) for name in ("alice", "bob"))

        def client(key: str) -> httpx.Client:
            return httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=PATIENCE)

        with client(alice) as hers, client(bob) as his:
            shared = server.absorb(TEXT, hers, title="Vault", alias="vault")["id"]
            own = server.absorb(f"Her own. {TEXT}", hers, title="Own", alias="own")["id"]
            server.absorb(TEXT, his, title="Vault")
            server.absorb(f"His. {TEXT}", his, title="His", alias="own")
            told = command("keys", "remove", alice_id)
            assert f"Removed {alice_id}" in told and "2 documents" in told and "--delete-documents" in told
            assert hers.get("/v1/documents").status_code == 401
            assert his.get(f"/v1/documents/{own}").status_code == 404
            listed = command("keys", "list")
            assert f"{alice_id}" in listed and "the key was removed" in listed and "2 documents  bob" in listed
            assert "now belong to" in command("keys", "give", alice_id, bob_id)
            assert alice_id not in command("keys", "list")
            cards = {card["id"]: card for card in his.get("/v1/documents").json()["data"]}
            assert len(cards) == 3 and cards[own]["alias"] is None and cards[shared]["alias"] is None
            assert his.post("/v1/chat/completions", json=chat(own)).status_code == 200
            assert "no key" in command("keys", "give", bob_id, "key-nobody", code=EntryNotFoundError.exit_code)
            # deleted with the key: also what is absorbed at the moment, and what waits
            for title in ("busy", "waits"):
                body = {"text": f"{title}. {TEXT}", "title": title, "settings": {"training": {"epochs": 900}}}
                busy = his.post("/v1/documents", json=body).json()["id"]
            told = command("keys", "remove", bob_id, "--delete-documents")
            assert "5 documents deleted" in told
        library = server.service.library
        wait_for(
            lambda: (
                not library.matching("") and not library.unfinished() and not server.service.store.in_state("deleting")
            )
        )
        assert server.service.store.state(busy) is None and not server.service.store.owners()
    assert "no key" in command("keys", "remove", alice_id, code=EntryNotFoundError.exit_code)


def command(*words: str, code: int = 0) -> str:
    """What `lift` says on both of its outputs."""
    done = CliRunner().invoke(app, words)
    assert (done.exit_code if not isinstance(done.exception, LiftError) else done.exception.exit_code) == code, (
        done.output
    )
    return str(done.exception) if isinstance(done.exception, LiftError) else done.output


def test_it_is_not_opened_to_others_without_a_key(tiny_folder: Path, home: Path) -> None:
    serve = ("serve", "--model", str(tiny_folder))
    told = command(*serve, "--port", "0", "--host", "0.0.0.0", code=AddressError.exit_code)
    assert "without a key" in told and "lift keys add" in told
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "Address already in use" in command(*serve, "--port", port, code=AddressError.exit_code)
    made = re.search(r"^lift-\S{40,}$", command("keys", "add", "me"), re.MULTILINE)
    assert made is not None
    listed = command("keys", "list")
    assert listed.count("\n") == 1 and listed.endswith("  me\n") and made[0] not in listed


# --- other sites ------------------------------------------------------------------------------------------------------


def test_pages_of_other_sites_and_other_names_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, home=tmp_path / "home", hosts=["my.lan"]) as server:
        own = server.url.removeprefix("http://")
        port = own.rpartition(":")[2]
        for headers, status in (
            ({"origin": "https://evil.example"}, 403),
            ({"origin": "null"}, 403),
            ({"origin": f"http://{own}"}, 200),
            ({"host": f"evil.example:{port}"}, 403),  # a name that was made to point here
            ({"host": f"my.lan:{port}"}, 200),
            ({"host": f"localhost:{port}"}, 200),
            ({"host": "[::1"}, 403),
        ):
            assert server.client.get("/v1/models", headers=headers).status_code == status, headers
        form = {"file": ("x.txt", b"from another site")}
        assert (
            server.client.post("/v1/documents", files=form, headers={"origin": "https://evil.example"}).status_code
            == 403
        )
        page = server.client.get("/")
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        assert page.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in page.headers


# --- sizes and rates --------------------------------------------------------------------------------------------------


def test_bodies_over_the_limit_are_not_read(alice: httpx.Client) -> None:
    large = b'{"a": "' + b"x" * 70_000 + b'"}'
    kind = {"content-type": "application/json"}
    assert alice.post("/v1/chat/completions", content=large, headers=kind).status_code == 413
    in_pieces = alice.post("/v1/chat/completions", content=iter([large[:40_000], large[40_000:]]), headers=kind)
    assert in_pieces.status_code == 413 and in_pieces.json()["error"]["type"] == "invalid_request_error"
    assert alice.post("/v1/documents", files={"file": ("a.txt", b"x" * 1_200_000)}).status_code == 413
    assert alice.post("/v1/documents", json={"text": "many words " * 20_000}).status_code == 413
    too_many = alice.post("/v1/documents", json={"text": "many words " * 2000})
    assert too_many.status_code == 413 and "3,000 tokens" in too_many.json()["error"]["message"]


def test_rates_are_each_owners_own(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(
        tiny_folder, "server.uploads_per_hour=2", "server.documents_per_key=1", home=tmp_path / "home"
    ) as server:
        assert server.client.post("/v1/documents", json={"text": "one text"}).status_code == 202
        assert server.client.post("/v1/documents", json={"text": "another text"}).status_code == 413
        refused = server.client.post("/v1/documents", json={"text": "a third"})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 1000
    now = 100.0
    monkeypatch.setattr("liftlm.server.limits.time", types.SimpleNamespace(monotonic=lambda: now))
    rate = Rate(3, 0.3, "a second")
    for _ in range(3):
        rate.take("alice")
    with pytest.raises(ServerBusyError):
        rate.take("alice")
    rate.take("bob")
    now += 0.15
    rate.take("alice")
    with pytest.raises(ServerBusyError):
        rate.take("alice")


# --- hostile files ----------------------------------------------------------------------------------------------------

SMALL = ServerConfig(reading_seconds=4, reading_megabytes=700, document_pages=3)


def zip_of(members: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return made.getvalue()


def pdf_of(pages: int) -> bytes:
    kids = " ".join(f"{n + 3} 0 R" for n in range(pages))
    objects = ["<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]/Count {pages}>>"]
    objects += ["<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>"] * pages
    body = "".join(f"{at} 0 obj{text}endobj\n" for at, text in enumerate(objects, 1))
    return f"%PDF-1.4\n{body}trailer<</Root 1 0 R>>\n%%EOF".encode()


def pdf_with(stream: bytes, extra: str) -> bytes:
    head = "%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    page = "3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R>>endobj\n"
    return (
        f"{head}{page}4 0 obj<</Length {len(stream)}{extra}>>stream\n".encode()
        + stream
        + b"\nendstream endobj\ntrailer<</Root 1 0 R>>\n"
    )


TYPES = b'<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"/>'


def entities() -> bytes:
    """A billion laughs."""
    lines = [b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "' + b"x" * 1000 + b'">']
    lines += [f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">'.encode() for n in range(9)]
    return b"".join([*lines, b"]><l>&j;</l>"])


def loop() -> bytes:
    catalog = b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
    return catalog + b"2 0 obj<</Type/Pages/Kids[2 0 R]>>endobj\ntrailer<</Root 1 0 R>>"


BOMBS: dict[str, Callable[[], bytes]] = {
    "large.docx": lambda: zip_of({"[Content_Types].xml": TYPES, "word/document.xml": b" " * 600_000_000}),
    "entities.docx": lambda: zip_of({"[Content_Types].xml": TYPES, "word/document.xml": entities()}),
    "layers.pdf": lambda: pdf_with(zlib.compress(b"BT (x) Tj ET " * 4_000_000), "/Filter/FlateDecode"),
    "twice.pdf": lambda: pdf_with(
        zlib.compress(zlib.compress(b"\0" * 800_000_000, 1), 9), "/Filter[/FlateDecode/FlateDecode]"
    ),
    "deep.pdf": lambda: b"%PDF-1.4\n1 0 obj" + b"[" * 2_000_000,
    "loop.pdf": loop,
    "deep.html": lambda: b"<html>" + b"<div>" * 300_000,
}


SLOW = ("layers.pdf", "deep.html")  # end by the time limit


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in BOMBS]
)
def test_a_hostile_file_costs_a_bounded_worker_and_ends_in_a_sentence(name: str) -> None:
    data = BOMBS[name]()
    began = time.monotonic()
    try:
        document = read_upload(data, name, None, SMALL)
    except LiftError as error:
        assert 400 <= error.http_status < 500, error
    else:
        assert len(document.text) < 100_000_000
    assert time.monotonic() - began < SMALL.reading_seconds + 30


def test_pages_are_counted_before_they_are_read() -> None:
    with pytest.raises(TooLargeError, match="more than 3 pages"):
        read_upload(pdf_of(4), "a.pdf", None, ServerConfig(document_pages=3))


def test_what_a_file_says_is_bounded_too() -> None:
    with pytest.raises(TooLargeError, match="more than 60 characters"):
        read_upload(b"Some text. " * 6, "a.txt", None, ServerConfig(document_tokens=3))
    chatty = [sys.executable, "-c", "while True: print('x' * 10**6)"]
    assert uploads._output(chatty, {}, Path("/"), 60, 10**6) == b""
    silent = [sys.executable, "-c", "import time; time.sleep(60)"]
    began = time.monotonic()
    assert uploads._output(silent, {}, Path("/"), 1, 10**6) == b"" and time.monotonic() - began < 30


def test_reading_files_keeps_nobody_else_waiting(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are uploaded: two are read at a time, and the others wait without a thread."""
    free = threading.Semaphore(0)
    reading = threading.Semaphore(0)

    def read(data: bytes, name: str, *given: Any) -> Document:
        reading.release()
        assert free.acquire(timeout=PATIENCE)
        return Document(name, data.decode())

    monkeypatch.setattr("liftlm.server.document_routes.read_upload", read)
    with serving(tiny_folder, home=tmp_path / "home") as server, concurrent.futures.ThreadPoolExecutor(50) as pool:
        files = [{"file": (f"{number}.txt", f"Text {number}. {TEXT}".encode())} for number in range(50)]
        post = server.client.post
        sent = [pool.submit(lambda file=file: post("/v1/documents", files=file)) for file in files]
        try:
            assert reading.acquire(timeout=PATIENCE) and reading.acquire(timeout=PATIENCE)
            assert server.client.post("/v1/chat/completions", json=chat("tiny-llama")).status_code == 200
            assert not reading.acquire(blocking=False) and not any(one.done() for one in sent)
        finally:
            free.release(50)
        assert {one.result().status_code for one in sent} == {202}


def test_the_worker_has_no_secrets_and_no_paths_of_clients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    seen: list[Any] = []
    real = subprocess.Popen

    def spy(command: list[str], **options: Any) -> Any:
        seen.append((command, options))
        return real(command, **options)

    monkeypatch.setattr(subprocess, "Popen", spy)
    document = read_upload(b"Some text.", "../../../etc/passwd\0/..\\my_notes.TXT", None, ServerConfig())
    ((command, options),) = seen
    assert SECRET not in str(options["env"])
    assert "passwd" not in str(command) and Path(command[3]).name == "upload.txt" and not Path(command[3]).exists()
    assert (document.title, document.source) == ("my notes", "my_notes.TXT")


# --- what is told to whom ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_content", [False, True])
def test_questions_and_documents_are_not_logged(
    tiny_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    log_content: bool,
) -> None:
    caplog.set_level(logging.DEBUG, "liftlm")
    caplog.set_level(logging.DEBUG, "uvicorn")
    with serving(tiny_folder, home=tmp_path / "home", log_content=log_content) as server:
        document = server.absorb(f"{SECRET} {TEXT}", title=f"The {SECRET}", alias=f"{SECRET}")
        for stream in (False, True):
            server.client.post(
                "/v1/chat/completions", json=chat(document["id"], f"Where is {SECRET}?") | {"stream": stream}
            )
        server.client.post("/v1/completions", json={"model": SECRET, "prompt": SECRET, "max_tokens": 2})
        server.client.post("/v1/chat/completions", json=chat(document["id"], SECRET * 200))  # too long
        server.client.post("/v1/chat/completions", json={"model": "x", "messages": SECRET})  # wrong
        server.client.get(f"/v1/documents?search={SECRET}")
        server.client.get(f"/{SECRET}")
        server.client.delete(f"/v1/documents/{SECRET}")
        metrics = server.client.get("/metrics").text
    logged = "\n".join(record.getMessage() for record in caplog.records if record.name != "httpx") + "".join(
        capfd.readouterr()
    )
    logged = "\n".join(line for line in logged.splitlines() if "httpcore" not in line and "HTTP Request" not in line)
    assert (SECRET in logged) == log_content
    assert SECRET not in metrics and document["id"] not in metrics
    assert "POST /v1/chat/completions 200" in logged


def test_a_defect_is_told_by_its_place_alone(
    tiny_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    with serving(tiny_folder, home=tmp_path / "home") as server:

        def fail(owner: str) -> None:
            raise ValueError(SECRET)

        monkeypatch.setattr(server.service, "documents", fail)
        reply = server.client.get("/v1/documents")
        assert reply.status_code == 500 and reply.json()["error"]["code"] == "defect"
        monkeypatch.setattr(server.service.engine._answers, "_join", fail)  # on the engine's thread
        assert server.client.post("/v1/chat/completions", json=chat("tiny-llama")).status_code == 500
        monkeypatch.undo()
        assert server.client.post("/v1/chat/completions", json=chat("tiny-llama")).status_code == 200  # it lives on
        assert SECRET not in reply.text + caplog.text + "".join(capfd.readouterr())
        assert "ValueError" in caplog.text and "test_server_safety" in caplog.text


def test_serving_closes_nobodys_log_handlers(tiny_folder: Path, tmp_path: Path) -> None:
    """absl's, which comes with rouge-score, closes the stream that it writes to: here pytest's."""

    class Handler(logging.Handler):
        closed = False

        def close(self) -> None:
            self.closed = True
            super().close()

    handler = Handler()
    with serving(tiny_folder, home=tmp_path / "home") as server:
        assert server.client.get("/readyz").status_code == 200
    assert not handler.closed


def test_one_bad_question_does_not_end_the_others(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, home=tmp_path / "home") as server:
        bodies = [chat("tiny-llama", "Who? " * (300 if number % 3 == 0 else 1)) for number in range(24)]
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            statuses = list(
                pool.map(lambda body: server.client.post("/v1/chat/completions", json=body).status_code, bodies)
            )
        assert statuses == [413 if number % 3 == 0 else 200 for number in range(24)]


def test_a_damaged_entry_is_an_error_of_its_questions_only(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, home=tmp_path / "home") as server:
        document = server.absorb(TEXT)["id"]
    weights = server.service.library.path / document / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    with serving(tiny_folder, home=tmp_path / "home") as server:
        reply = server.client.post("/v1/chat/completions", json=chat(document))
        assert reply.status_code == 500 and "damaged" in reply.json()["error"]["message"]
        assert server.client.post("/v1/chat/completions", json=chat("tiny-llama")).status_code == 200


def test_the_database_survives_a_torn_write_ahead_log(tiny_folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with serving(tiny_folder, home=home) as server:
        document = server.absorb(TEXT)["id"]
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in home.glob("server.sqlite*"):
            data = file.read_bytes()
            (copy / file.name).write_bytes(data[:-100] if file.name.endswith("-wal") else data)
    database = sqlite3.connect(copy / "server.sqlite")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert [row[0] for row in database.execute("SELECT id FROM entries")] in ([document], [])
    assert json.dumps(database.execute("PRAGMA journal_mode").fetchone()) == '["wal"]'
