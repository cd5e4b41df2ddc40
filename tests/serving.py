"""A real server for tests: uvicorn on a free port, in this process, with a tiny model and a library of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from liftlm import load_config

PATIENCE = 180  # seconds; nothing takes that long, but a loaded machine may stand still for many
QUICK = (
    "training.batch_tokens=256",
    "training.micro_batch_tokens=256",
    "segments.segment_tokens=64",
    "segments.overlap_tokens=16",
    "adapter.rank=4",
    "tasks.writer=none",
    "answering.max_new_tokens=12",
    "model.threads=1",
    "model.dtype=float32",  # in which an answer does not depend on what else is in its batch
)


class Running:
    """url, the service behind it, and a client without a key."""

    def __init__(self, url: str, service: Any) -> None:
        self.url, self.service = url, service
        self.client = httpx.Client(base_url=url, timeout=PATIENCE)

    def absorb(self, text: str, client: httpx.Client | None = None, **fields: Any) -> dict[str, Any]:
        """Uploads text and waits until it is ready."""
        client = client or self.client
        reply = client.post("/v1/documents", json={"text": text, **fields})
        assert reply.status_code == 202, reply.text
        return self.wait(reply.json()["id"], client)

    def wait(self, document: str, client: httpx.Client | None = None, state: str = "ready") -> dict[str, Any]:
        client = client or self.client
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            card: dict[str, Any] = client.get(f"/v1/documents/{document}").json()
            if card.get("state") == state:
                return card
            assert card.get("state") not in ("failed", "cancelled"), card
            time.sleep(0.02)
        raise AssertionError(f"{document} did not become {state}")


@contextmanager
def serving(
    model: Path, *settings: str, hosts: Sequence[str] = (), log_content: bool = False, **options: Any
) -> Iterator[Running]:
    import uvicorn

    from liftlm.server.app import make_app
    from liftlm.server.service import Service

    service = Service(load_config(None, [f"model.name={model}", *QUICK, *settings]), **options)
    app = make_app(service, hosts=hosts, log_content=log_content)
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    )
    app.state.stopping = lambda: server.should_exit
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    assert service.wait_until_ready(PATIENCE)
    port = server.servers[0].sockets[0].getsockname()[1]
    running = Running(f"http://127.0.0.1:{port}", service)
    try:
        yield running
    finally:
        running.client.close()
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def wait_for(done: Any, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def number_in(page: str, name: str) -> float:
    return next((float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(f"{name} ")), 0.0)


def histogram(page: str, name: str) -> list[tuple[float, int]]:
    """(upper bound in seconds, how many are in that bucket)."""
    rows = [line for line in page.splitlines() if line.startswith(f"{name}_bucket")]
    bounds = [float(line.split('"')[1]) for line in rows]
    sums = [int(float(line.rpartition(" ")[2])) for line in rows]
    return [(bound, count - before) for bound, count, before in zip(bounds, sums, [0, *sums], strict=False)]
