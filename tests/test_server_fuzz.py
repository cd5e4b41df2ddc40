"""Fuzzed requests: the server never fails, and answers as its OpenAPI document says. benchmarks/fuzz_server.py sends 10,000."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzzing import Fuzzing
from serving import serving

TEXT = "The ferryman rang the bell of Corriden on 3 May. " * 6
UNLIMITED = ("server.requests_per_minute=1000000", "server.uploads_per_hour=1000000", "server.documents_per_key=100000")


@pytest.mark.parametrize(("each", "count"), [(6, 80), pytest.param(300, 2500, marks=pytest.mark.slow)])
def test_fuzzed_requests(tiny_folder: Path, tmp_path: Path, each: int, count: int) -> None:
    pytest.importorskip("schemathesis")
    with serving(tiny_folder, *UNLIMITED, home=tmp_path / "home") as server:
        server.absorb(TEXT, alias="fuzzed")
        fuzzing = Fuzzing(server.url)
        fuzzing.documented(each)
        fuzzing.bytes_alone(count)
        assert {200, 202, 400, 404, 405} <= set(fuzzing.statuses), fuzzing.statuses
        assert len(fuzzing.by_route) >= 14, fuzzing.by_route
        reply = {"model": "fuzzed", "messages": [{"role": "user", "content": "Who?"}]}
        assert server.client.post("/v1/chat/completions", json=reply).status_code == 200  # still there
