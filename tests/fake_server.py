"""A real HTTP server that speaks as much of the OpenAI protocol as the llm writer needs, at a speed and with failures to order.

For tests and benchmarks; nothing here is imported by the program. It finds the sentence and the number of pairs in the prompt and
answers with as many questions, made from the sentence's own words.

    with FakeServer(delay_seconds=0.1, slots=4, failures=["429", "500"]) as server:
        ... base_url=server.url ...
        print(server.most_in_flight, len(server.requests))
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

PROMPT_TOKENS, COMPLETION_TOKENS = 100, 20  # of every exchange


def sentence_of(body: dict[str, Any]) -> str:
    """The sentence, or run of sentences, that a request is about."""
    found = re.search(r"^Sentences?:\n(.+)$", body["messages"][-1]["content"], re.M)
    assert found, body
    return found[1]


def count_of(body: dict[str, Any]) -> int:
    """How many pairs a request asks for."""
    found = re.search(r"Write (\d+) ", body["messages"][-1]["content"])
    assert found, body
    return int(found[1])


def make_pairs(body: dict[str, Any]) -> list[dict[str, str]]:
    """Pairs that pass the filters: each asks with two words of the sentence and answers with the sentence."""
    words = sentence_of(body).strip(".").split()
    return [
        {
            "kind": "fact",
            "question": f"What is told of {words[n % len(words)]} as number {n} beside {words[-1]}?",
            "answer": sentence_of(body),
        }
        for n in range(count_of(body))
    ]


def json_reply(body: dict[str, Any]) -> str:
    return json.dumps({"tasks": make_pairs(body)})


class FakeServer:
    """failures: what befalls the first requests, one each, in the order of their arrival ("" = nothing):

    a status ("500", "429", "429:2" with Retry-After, "429:date"), "timeout", "drip" (a reply without end), "reset" (the
    connection breaks), "not json" (the body), "prose" (content without questions), "no choices", "html". `always`
    befalls all others. `rejects` names options that get a 400.
    """

    def __init__(
        self,
        *,
        delay_seconds: float = 0.0,
        slots: int | None = None,  # requests worked on at once, as on a real machine; more wait
        failures: Iterable[str] = (),
        always: str = "",
        rejects: Iterable[str] = (),
        dies_after: int | None = None,  # requests; then nothing listens any more
        key: str | None = None,  # required, if given
        reply: Callable[[dict[str, Any]], str] = json_reply,
        usage: bool = True,
    ) -> None:
        self.delay_seconds, self.reply, self.usage = delay_seconds, reply, usage
        self.failures, self.always, self.rejects = list(failures), always, list(rejects)
        self.dies_after, self.key = dies_after, key
        self.requests: list[dict[str, Any]] = []  # bodies, in the order of their arrival
        self.begun: list[dict[str, Any]] = []  # bodies, in the order in which they got one of the slots
        self.times: list[float] = []  # of their arrival
        self.keys: set[str] = set()
        self.in_flight = self.most_in_flight = self.answered = self.broken_off = 0
        self.dead = False
        self.lock = threading.Lock()
        self._slots = threading.Semaphore(slots or 10_000)
        self._stopped = threading.Event()
        self._server = _Listener(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.die()
        self._thread.join(5)

    def die(self) -> None:
        """As if the process were killed: open connections break, new ones are refused."""
        self.dead = True
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    # --- one request --------------------------------------------------------------------------------------------------

    def handle(self, handler: _Handler, body: dict[str, Any], key: str) -> None:
        with self.lock:
            number = len(self.requests)
            if self.dies_after is not None and number >= self.dies_after:
                self.dead = True
            if self.dead:
                handler.break_off()
                threading.Thread(target=self.die, daemon=True).start()
                return
            self.requests.append(body)
            self.times.append(time.monotonic())
            self.keys.add(key)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            failure = self.failures[number] if number < len(self.failures) else self.always
        try:
            self._answer(handler, body, key, failure)
        except OSError:  # the client has gone
            self.broken_off += 1
        finally:
            with self.lock:
                self.in_flight -= 1

    def _answer(self, handler: _Handler, body: dict[str, Any], key: str, failure: str) -> None:
        with self._slots:
            with self.lock:
                self.begun.append(body)
            self._stopped.wait(self.delay_seconds)
        rejected = [option for option in self.rejects if option in body]
        if self.key is not None and key != self.key:
            handler.send(401, {"error": {"message": f"Incorrect API key provided: {key}."}})
        elif rejected:
            handler.send(
                400, {"error": {"message": f"Unknown parameter: '{rejected[0]}'.", "type": "invalid_request_error"}}
            )
        elif failure == "timeout":
            self._stopped.wait(60)
            handler.break_off()
        elif failure == "drip":
            handler.drip(self._stopped)
        elif failure == "reset" or self.dead:
            handler.break_off()
        elif failure == "not json":
            handler.send_bytes(200, b'{"choices": [{"mess', "application/json")
        elif failure == "html":
            handler.send_bytes(200, b"<html><body>Welcome!</body></html>", "text/html")
        elif failure == "no choices":
            handler.send(200, {"error": {"message": "the provider is busy"}})
        elif failure and failure != "prose":
            status, _, wait = failure.partition(":")
            wait = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2)) if wait == "date" else wait
            handler.send(int(status), {"error": {"message": f"failing with {status} to order"}}, retry_after=wait)
        else:
            content = "I would rather talk about the weather." if failure else self.reply(body)
            self._complete(handler, body, content)

    def _complete(self, handler: _Handler, body: dict[str, Any], content: str) -> None:
        message = {"role": "assistant", "content": content}
        completion: dict[str, Any] = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        }
        if self.usage:
            total = PROMPT_TOKENS + COMPLETION_TOKENS
            completion["usage"] = {
                "prompt_tokens": PROMPT_TOKENS,
                "completion_tokens": COMPLETION_TOKENS,
                "total_tokens": total,
            }
        with self.lock:  # before the client can have read it and look at the count
            self.answered += 1
        handler.send(200, completion)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every small answer waits 40 ms

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/chat/completions":
            self.fake.handle(self, body, self.headers.get("Authorization", "").removeprefix("Bearer "))
        else:
            self.send(404, {"error": {"message": f"no such path: {self.path}"}})

    def send(self, status: int, value: dict[str, Any], retry_after: str = "") -> None:
        self.send_bytes(status, json.dumps(value).encode(), "application/json", retry_after)

    def send_bytes(self, status: int, content: bytes, kind: str, retry_after: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(content)

    def drip(self, stopped: threading.Event) -> None:
        """A reply that never ends, with a byte now and then."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000")
        self.end_headers()
        while not stopped.wait(0.05):
            self.wfile.write(b" ")

    def break_off(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *arguments: Any) -> None:
        """Silent."""
