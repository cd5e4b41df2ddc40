"""Sends fuzzed requests to a server with a tiny random model, and says what came back: no 500, nothing undocumented.

    .venv/bin/python benchmarks/fuzz_server.py --requests 10000

Half are drawn by schemathesis from the OpenAPI document (valid and broken), half by hypothesis from bytes. Exit code 1 at the
first failure, with the request that caused it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from conftest import save_model
from fuzzing import Fuzzing
from serving import serving

UNLIMITED = ("server.requests_per_minute=1000000", "server.uploads_per_hour=1000000", "server.documents_per_key=100000")
_OPERATIONS = 24  # operations that take something, times two for valid and broken, about


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the server.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="0: the same requests each time; else others")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder) / "model")
        with serving(model, *UNLIMITED, home=Path(folder) / "home") as server:
            server.absorb("The ferryman rang the bell of Corriden on 3 May. " * 6, alias="fuzzed")
            fuzzing = Fuzzing(server.url, seed=given.seed)
            fuzzing.documented(max(1, given.requests // 2 // _OPERATIONS))
            fuzzing.bytes_alone(max(1, given.requests - sum(fuzzing.statuses.values())))
    print(f"{sum(fuzzing.statuses.values()):,} requests in {time.monotonic() - began:.0f} s")
    for status, count in sorted(fuzzing.statuses.items()):
        print(f"  {status}  {count:>6,}")
    for route, count in sorted(fuzzing.by_route.items()):
        print(f"  {count:>6,}  {route}")


if __name__ == "__main__":
    main()
