"""Load on a real `lift serve`: many clients with questions about several documents while another is absorbed.

    .venv/bin/python benchmarks/serve_load.py --seconds 180

The same clients ask one after another first, then all at once (or one of these: --only), each time for so many seconds, while
a document is absorbed. Prints the median and 95th percentile of the time to the first token, tokens a second over all, failures,
steps of training, and how long absorbing kept the model before it gave way to questions.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

CHRONICLE = Path(__file__).parent.parent / "src" / "liftlm" / "demo" / "chronicle.md"
QUESTIONS = [
    "Who is it about?",
    "What happened first, and when?",
    "How many were there?",
    "Where did they go?",
    "What was decided?",
]
_PART = 1500  # characters of a document that is asked about


@dataclass
class Asked:
    """One answer: seconds to its first token and to its end, tokens, or what went wrong."""

    first: float = 0.0
    whole: float = 0.0
    tokens: int = 0
    failure: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Load a server.")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    parser.add_argument("--context", default="truncate", choices=["none", "truncate", "retrieve"])
    parser.add_argument("--only", default="both", choices=["sequential", "concurrent", "both"])
    parser.add_argument("--model", default=None)
    parser.add_argument("--window", type=int, default=2048)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, serve(Path(home), given) as (url, start_up):
        client = httpx.Client(base_url=url, timeout=600)
        print(f"start to ready: {start_up:.1f} s")
        text = CHRONICLE.read_text(encoding="utf-8")
        names = [absorb(client, text[at * _PART : (at + 1) * _PART], f"Part {at + 1}") for at in range(given.documents)]
        busy = upload(client, text, "The whole chronicle", {"training": {"epochs": 20}})
        while client.get(f"/v1/documents/{busy}").json()["job"]["step"] == 0:
            time.sleep(0.2)
        print("| | answers | failed | first token p50 | p95 | answer p50 | p95 | tokens/s | training steps |")
        print("|---|---|---|---|---|---|---|---|---|")
        sequential, concurrent = ("one after another", 1), (f"{given.clients} at once", given.clients)
        for name, clients in {"sequential": [sequential], "concurrent": [concurrent]}.get(
            given.only, [sequential, concurrent]
        ):
            before = steps(client)
            began = time.monotonic()
            answers = load(url, names, clients, given)
            print(row(name, answers, time.monotonic() - began, steps(client) - before), flush=True)
        page = client.get("/metrics").text
        waits = histogram(page, "liftlm_training_steps_waited")
        training = histogram(page, "liftlm_training_step_seconds")
        print(f"training steps before a question's first token: never over {longest(waits)}")
        print(f"a training step takes: never over {longest(training)} s")
        pieces = histogram(page, "liftlm_absorbing_piece_seconds")
        print(
            f"absorbing gave way to questions: {sum(n for _, n in pieces)} times, never later than after {longest(pieces)} s"
        )
        client.post(f"/v1/documents/{busy}/cancel")


@contextlib.contextmanager
def serve(home: Path, given: argparse.Namespace, *settings: str) -> Iterator[tuple[str, float]]:
    """A server of its own and the seconds from its start until it was ready."""
    command = [sys.executable, "-m", "liftlm", "serve", "--port", "0", "--window", str(given.window)]
    command += ["--set", f"answering.max_new_tokens={given.tokens}", "--set", "server.requests_per_minute=1000000"]
    command += itertools.chain.from_iterable(("--set", setting) for setting in settings)
    command += [] if given.model is None else ["--model", given.model]
    began = time.monotonic()
    running = subprocess.Popen(command, env=os.environ | {"LIFT_HOME": str(home)}, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stderr is not None
        line = running.stderr.readline()
        url = next(word for word in line.split() if word.startswith("http://"))
        threading.Thread(target=running.stderr.read, daemon=True).start()
        while httpx.get(f"{url}/readyz").status_code != 200:
            time.sleep(0.05)
        yield url, time.monotonic() - began
    finally:
        running.terminate()
        running.wait(60)


def upload(client: httpx.Client, text: str, title: str, settings: dict[str, object]) -> str:
    reply = client.post("/v1/documents", json={"text": text, "title": title, "settings": settings})
    reply.raise_for_status()
    return str(reply.json()["id"])


def absorb(client: httpx.Client, text: str, title: str) -> str:
    """A small document, absorbed in few steps: what it knows is not what is measured."""
    document = upload(client, text, title, {"tasks": {"writer": "none"}})
    while client.get(f"/v1/documents/{document}").json()["state"] != "ready":
        time.sleep(0.1)
    return document


def load(url: str, names: list[str], clients: int, given: argparse.Namespace) -> list[Asked]:
    """Each client asks again as soon as it has its answer."""
    end = time.monotonic() + given.seconds

    def ask_on(number: int) -> list[Asked]:
        answers = []
        with httpx.Client(base_url=url, timeout=600) as client:
            for count in itertools.count(number):
                if time.monotonic() >= end:
                    return answers
                body = {
                    "model": names[count % len(names)],
                    "messages": [{"role": "user", "content": QUESTIONS[count % len(QUESTIONS)]}],
                    "context": given.context,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                answers.append(ask(client, body))
        return answers

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return list(itertools.chain.from_iterable(pool.map(ask_on, range(clients))))


def ask(client: httpx.Client, body: dict[str, object]) -> Asked:
    answer, began = Asked(), time.monotonic()
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            reply.raise_for_status()
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    answer.failure = str(event["error"]["message"])
                elif event.get("usage"):
                    answer.tokens = event["usage"]["completion_tokens"]
                elif not answer.first:  # the reply begins when the first token is there
                    answer.first = time.monotonic() - began
    except httpx.HTTPError as error:
        answer.failure = str(error)
    answer.whole = time.monotonic() - began
    if not answer.tokens and not answer.failure:
        answer.failure = "no answer"
    return answer


def row(name: str, answers: list[Asked], seconds: float, steps: int) -> str:
    failed = [answer for answer in answers if answer.failure]
    good = [answer for answer in answers if not answer.failure]
    first, whole = [answer.first for answer in good], [answer.whole for answer in good]
    figures = [f"{percentile(values, part):.2f} s" for values in (first, whole) for part in (50, 95)]
    for answer in failed[:3]:
        print(f"failed: {answer.failure}", file=sys.stderr)
    speed = sum(answer.tokens for answer in good) / seconds
    return f"| {name} | {len(good)} | {len(failed)} | {' | '.join(figures)} | {speed:.1f} | {steps} |"


def percentile(values: list[float], part: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[part - 1] if len(values) > 1 else sum(values)


def steps(client: httpx.Client) -> int:
    return sum(count for _, count in histogram(client.get("/metrics").text, "liftlm_training_step_seconds"))


def histogram(page: str, name: str) -> list[tuple[str, int]]:
    """(upper bound, how many are in that bucket)."""
    rows = [line for line in page.splitlines() if line.startswith(f"{name}_bucket")]
    sums = [int(float(line.rpartition(" ")[2])) for line in rows]
    return [(line.split('"')[1], count - before) for line, count, before in zip(rows, sums, [0, *sums], strict=False)]


def longest(buckets: list[tuple[str, int]]) -> str:
    return next((bound for bound, count in reversed(buckets) if count), "0")


if __name__ == "__main__":
    main()
