"""Requests drawn by schemathesis from the server's own OpenAPI document, valid and broken, and by hypothesis from bytes alone.

For tests/test_server_fuzz.py (a few) and benchmarks/fuzz_server.py (ten thousand).
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

HEADERS = {"authorization": "Bearer x", "connection": "keep-alive"}
_ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/documents"]
_WORDS = [
    b"model",
    b"messages",
    b"prompt",
    b"text",
    b"stream",
    b"max_tokens",
    b"role",
    b"user",
    b"content",
    b"fuzzed",
    b"true",
    b"null",
]
_BITS = st.one_of(
    st.sampled_from([f'"{word.decode()}"'.encode() for word in _WORDS]),
    st.sampled_from([*b'{}[]:,"0-e.']).map(lambda byte: bytes([byte])),
    st.sampled_from([b"\\ud800", b"\\u0000", b"1e999", b"-1", b"NaN", b"\xff", b"\xf0\x9f\x8f\xb0", b"9" * 40]),
    st.binary(max_size=8),
)


class Fuzzing:
    """Counts what came back. A status of 500 or more, save 503 and 507, or a reply not as documented, is a failure."""

    def __init__(self, url: str, *, seed: int = 0) -> None:
        self.url, self.seed = url, seed
        self.statuses: collections.Counter[int] = collections.Counter()
        self.by_route: collections.Counter[str] = collections.Counter()

    def documented(self, each: int) -> None:
        """Of every operation and kind of data (valid, broken), `each` requests."""
        import schemathesis
        from schemathesis import GenerationMode
        from schemathesis.specs.openapi import checks

        schema = schemathesis.openapi.from_url(f"{self.url}/openapi.json")
        chosen = [
            checks.status_code_conformance,
            checks.content_type_conformance,
            checks.response_schema_conformance,
        ]
        for found in schema.get_all_operations():
            operation: Any = found.ok()
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                strategy = operation.as_strategy(generation_mode=mode)

                def ask(case: Any) -> None:
                    _tame(case)
                    reply = case.call(headers=HEADERS, timeout=180)
                    self._count(case.operation.label, reply.status_code, reply.text)
                    case.validate_response(reply, checks=chosen)

                with contextlib.suppress(Unsatisfiable):  # what takes nothing cannot be given broken data
                    self._run(strategy, each, ask)

    def bytes_alone(self, count: int) -> None:
        """Bodies that look like JSON here and there, under any content type; paths and queries of any characters."""
        kinds = st.sampled_from(
            ["application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain", ""]
        )
        body = st.lists(_BITS, max_size=30).map(b"".join)
        form = body.map(
            lambda part: b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n' + part + b"\r\n--x--\r\n"
        )
        path = st.binary(max_size=12).map(lambda part: f"/v1/documents/{quote(part, safe='/?&=')}")
        requests = st.one_of(
            st.tuples(st.just("POST"), st.sampled_from(_ROUTES), body | form, kinds),
            st.tuples(st.sampled_from(["GET", "DELETE", "PUT", "PATCH", "OPTIONS"]), path, st.just(b""), kinds),
        )
        with httpx.Client(base_url=self.url, timeout=180, headers=HEADERS) as client:

            def ask(request: tuple[str, str, bytes, str]) -> None:
                method, route, content, kind = request
                reply = client.request(method, route, content=content, headers={"content-type": kind} if kind else {})
                self._count("bytes", reply.status_code, reply.text)

            self._run(requests, count, ask)

    def _count(self, route: str, status: int, text: str) -> None:
        self.statuses[status] += 1
        self.by_route[route] += 1
        assert status < 500 or status in (503, 507), text

    def _run(self, strategy: Any, count: int, ask: Callable[[Any], None]) -> None:
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=self.seed == 0,
        )
        @given(strategy)
        def run(case: Any) -> None:
            ask(case)

        run()


def _tame(case: Any) -> None:
    """A model and a document that are there, so that more than "not found" is met; and few tokens, so that it ends."""
    places = case.path_parameters
    for name in ("document", "model"):
        if places and name in places and case.method != "DELETE" and len(str(places[name])) % 2:
            places[name] = "fuzzed"
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and len(body["model"]) % 4:
        body["model"] = "fuzzed"
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(name), int) and not isinstance(body[name], bool) and body[name] > 8:
            body[name] = body[name] % 8 + 1
