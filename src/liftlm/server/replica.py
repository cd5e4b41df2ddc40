"""One of many servers behind one address: answers about entries of a home, which it fetches when they are first asked for.

A `Replica` is the whole server (`app`) without a port; a `Front` stands where the port is and says whose entry a request is
about, so that it can be sent to a replica that has it. Both know nothing of Ray, which sends (`cluster`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liftlm.config import LiftConfig
from liftlm.errors import EntryNotFoundError, NotReadyError
from liftlm.homes import Home
from liftlm.many_documents import Order, scratch_folder
from liftlm.server.app import make_app
from liftlm.server.protocol import ModelCard, ModelList
from liftlm.server.replies import error_reply
from liftlm.server.service import Service

_ID = re.compile(r"[0-9a-f]{16}")
_ANSWERED = ("/v1/chat/completions", "/v1/completions")
_LOAD_SECONDS = 600.0


@dataclass(frozen=True)
class Call:
    """A request as it goes from the front to a replica. headers: lower case names."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True)
class Head:
    """Of a reply; pieces of its body follow."""

    status: int
    headers: tuple[tuple[str, str], ...]


class Replica:
    """Loads the model when it is made. Raises what loading raises."""

    def __init__(self, order: Order) -> None:
        logging.getLogger("liftlm.server").setLevel(logging.WARNING)
        model = order.config.model
        threads = {"model": model.model_copy(update={"threads": model.threads or order.threads})}
        self._home = Home(order.home)
        self._service = Service(order.config.model_copy(update=threads), home=scratch_folder())
        self._app = make_app(self._service)
        failures: list[BaseException] = []
        self._service.start(failures.append)
        began = time.monotonic()
        while not self._service.wait_until_ready(0.2):
            if failures:
                raise failures[0]
            if time.monotonic() - began > _LOAD_SECONDS:
                raise NotReadyError("The model was not loaded in time.", "Look at the replica's log.")

    async def hold(self, entry_id: str) -> Held:
        """Has an entry ready. Raises EntryNotFoundError for one that the home does not have."""
        if not await asyncio.to_thread(self._home.fetch_entry, entry_id, self._service.library.home):
            raise EntryNotFoundError(f"There is no document '{entry_id}'.", "`GET /v1/models` lists all.")
        await asyncio.to_thread(self._service.take_in, entry_id)
        return Held(self._service, entry_id)

    async def answer(self, call: Call) -> AsyncIterator[Head | bytes]:
        """The head of the reply, then its body, piece by piece."""
        pieces: asyncio.Queue[Head | bytes | None] = asyncio.Queue()
        received = False

        async def receive() -> dict[str, Any]:
            nonlocal received
            if received:  # asked for again by who wants to know whether the client is still there
                await asyncio.Event().wait()
            received = True
            return {"type": "http.request", "body": call.body, "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = tuple((name.decode(), value.decode()) for name, value in message["headers"])
                await pieces.put(Head(message["status"], headers))
            elif message.get("body"):
                await pieces.put(message["body"])

        async def run() -> None:
            try:
                await self._app(_scope(call), receive, send)
            finally:
                await pieces.put(None)

        task = asyncio.create_task(run())
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
        finally:
            task.cancel()  # the client went, and its places in the batch are free


class Held:
    """An entry that a replica has; let go when it is forgotten."""

    def __init__(self, service: Service, entry_id: str) -> None:
        self._service, self._entry_id = service, entry_id

    def __del__(self) -> None:
        self._service.let_go(self._entry_id)


class Front:
    """What is decided before a replica is chosen, without a model."""

    def __init__(self, order: Order) -> None:
        self._home, self._config = Home(order.home), order.config
        self._started = int(time.time())

    def entry_of(self, call: Call) -> str:
        """The entry a request is about; empty for none, which any replica answers."""
        try:
            name = json.loads(call.body)["model"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return ""
        return name if isinstance(name, str) and _ID.fullmatch(name) else ""

    async def answer(self, call: Call) -> tuple[Head, bytes] | None:
        """What needs no replica; None for questions."""
        if call.method == "POST" and call.path in _ANSWERED:
            return None
        if call.method == "GET" and call.path == "/v1/models":
            return _reply((await asyncio.to_thread(self._models)).model_dump())
        if call.method == "GET" and call.path in ("/healthz", "/readyz"):
            return _reply({"status": "ready"})
        gone = EntryNotFoundError(
            f"{call.method} {call.path} is not served over Ray.",
            "Documents are absorbed by `lift absorb FOLDER --ray`.",
        )
        reply = error_reply(gone)
        return Head(reply.status_code, (("content-type", "application/json"),)), bytes(reply.body)

    def _models(self) -> ModelList:
        names = [base_name(self._config), *self._home.entry_ids()]
        owners = ["liftlm", *["you"] * (len(names) - 1)]
        return ModelList(
            data=[ModelCard(id=name, created=self._started, owned_by=o) for name, o in zip(names, owners, strict=True)]
        )


def base_name(config: LiftConfig) -> str:
    """What clients call the base model; never a path of this machine."""
    name = config.model.name
    return Path(name).name if Path(name).is_absolute() else name


def _reply(value: dict[str, Any]) -> tuple[Head, bytes]:
    return Head(200, (("content-type", "application/json"),)), json.dumps(value).encode()


def _scope(call: Call) -> dict[str, Any]:
    """ASGI's; to the app it is a request to this machine, since only that is served without keys."""
    headers = [(name, value) for name, value in call.headers if name not in ("host", "origin")]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1"), *((name.encode(), value.encode()) for name, value in headers)],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
