"""Kills `lift serve` with the embedded model while it absorbs and answers, starts it again, and looks what is lost.

    .venv/bin/python benchmarks/serve_kill.py

SIGKILL comes `--kills` times while one document is absorbed (after a checkpoint), another one waits, and answers are being
streamed. After each start: all documents are listed, the ready one answers word for word as before, the others go on. At the end
the interrupted document's adapter is compared, bit for bit, with that of a server that was never killed. Exit code 1 where
anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file
from serve_load import CHRONICLE, upload

QUESTION = "Who is it about?"
STREAMS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a server.")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--characters", type=int, default=6000, help="of the document in whose absorbing it is killed")
    parser.add_argument("--segment-tokens", type=int, default=512)
    parser.add_argument("--model", default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        killed = trial(Path(folder) / "killed", given, given.kills)
        whole = trial(Path(folder) / "whole", given, 0)
        same = killed.keys() == whole.keys() and all(torch.equal(killed[name], whole[name]) for name in whole)
    check(same, f"the adapter is that of a server that was never killed, bit for bit ({len(whole)} tensors)")


def trial(home: Path, given: argparse.Namespace, kills: int) -> dict[str, torch.Tensor]:
    """One library's life; returns the weights of the document that was being absorbed."""
    text = CHRONICLE.read_text(encoding="utf-8")
    running, client = start(home, given)
    try:
        ready = upload(client, text[:1500], "Ready", {"tasks": {"writer": "none"}})
        wait_for(lambda: job(client, ready)["state"] == "ready")
        before = ask(client, ready)
        gone = upload(client, "To be deleted. " * 20, "Gone", {"tasks": {"writer": "none"}})
        wait_for(lambda: job(client, gone)["state"] == "ready")
        client.delete(f"/v1/documents/{gone}").raise_for_status()
        busy = upload(client, text[: given.characters], "Busy", {})
        waits = upload(client, text[-1500:], "Waits", {"tasks": {"writer": "none"}})
        for number in range(kills):
            kill_in_the_middle(running, client, home, ready, busy)
            running, client = restart(home, given, (ready, busy, waits))
            check(ask(client, ready) == before, f"kill {number + 1}: the ready document answers as before")
        for document in (busy, waits):
            wait_for(lambda document=document: job(client, document)["state"] == "ready")
        steps = [row["step"] for row in client.get(f"/v1/documents/{busy}/losses").json()["data"]]
        check(
            steps == list(range(1, job(client, busy)["steps"] + 1)), f"every one of {len(steps)} steps was taken once"
        )
        stop(running)
    finally:
        running.kill()
    return load_file(home / "library" / busy / "adapter" / "adapter_model.safetensors")


def kill_in_the_middle(running: subprocess.Popen[str], client: httpx.Client, home: Path, ready: str, busy: str) -> None:
    """After a checkpoint and some more of the document, with answers under way."""
    kept = checkpoints(home, busy)
    wait_for(lambda: checkpoints(home, busy) - kept)
    told = threading.Semaphore(0)

    def stream() -> None:
        body = {"model": ready, "prompt": "The", "max_tokens": 1500, "stream": True}
        with contextlib.suppress(httpx.HTTPError), client.stream("POST", "/v1/completions", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    told.release()

    streams = [threading.Thread(target=stream) for _ in range(STREAMS)]
    for one in streams:
        one.start()
    for _ in range(5 * STREAMS):
        assert told.acquire(timeout=120)
    at = job(client, busy)
    check(
        at["state"] == "absorbing",
        f"killed at step {at['step']} of {at['steps']}, while {STREAMS} answers were streamed",
    )
    running.send_signal(signal.SIGKILL)
    running.wait()
    for one in streams:
        one.join(60)


def restart(
    home: Path, given: argparse.Namespace, documents: tuple[str, ...]
) -> tuple[subprocess.Popen[str], httpx.Client]:
    began = time.monotonic()
    running, client = start(home, given)
    listed = {card["id"]: card["state"] for card in client.get("/v1/documents").json()["data"]}
    check(
        set(listed) == set(documents),
        f"ready again after {time.monotonic() - began:.1f} s; nothing is lost, nothing is back",
    )
    return running, client


def start(home: Path, given: argparse.Namespace) -> tuple[subprocess.Popen[str], httpx.Client]:
    """`lift serve` as its users start it, ready; with a checkpoint after every step."""
    command = [sys.executable, "-m", "liftlm", "serve", "--port", "0", "--window", "2048"]
    for setting in (
        "training.checkpoint_seconds=0", f"segments.segment_tokens={given.segment_tokens}", "answering.max_new_tokens=32"
    ):  # fmt: skip
        command += ["--set", setting]
    command += [] if given.model is None else ["--model", given.model]
    running = subprocess.Popen(command, env=os.environ | {"LIFT_HOME": str(home)}, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    url = next(word for word in running.stderr.readline().split() if word.startswith("http://"))
    threading.Thread(target=running.stderr.read, daemon=True).start()
    client = httpx.Client(base_url=url, timeout=600)
    wait_for(lambda: client.get("/readyz").status_code == 200)
    return running, client


def stop(running: subprocess.Popen[str]) -> None:
    began = time.monotonic()
    running.terminate()
    running.wait(60)
    print(f"stopped by SIGTERM in {time.monotonic() - began:.1f} s")


def checkpoints(home: Path, document: str) -> set[str]:
    return {path.name for path in (home / "unfinished" / document).glob("checkpoint-*")}


def ask(client: httpx.Client, document: str) -> str:
    body = {"model": document, "messages": [{"role": "user", "content": QUESTION}], "context": "none"}
    reply = client.post("/v1/chat/completions", json=body)
    reply.raise_for_status()
    return str(reply.json()["choices"][0]["message"]["content"])


def job(client: httpx.Client, document: str) -> dict[str, Any]:
    reply = client.get(f"/v1/documents/{document}")
    reply.raise_for_status()
    card: dict[str, Any] = reply.json()["job"]
    assert card["state"] not in ("failed", "cancelled"), card
    return card


def wait_for(done: Callable[[], Any], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def check(right: bool, what: str) -> None:
    print(f"{'ok' if right else 'WRONG'}: {what}", flush=True)
    if not right:
        sys.exit(1)


if __name__ == "__main__":
    main()
