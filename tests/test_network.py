"""Two hosts (network namespaces of this machine) as two Ray nodes; one is cut off midway, and comes back.

Needs Linux, root and `ip`. Nothing is sent anywhere but between the two namespaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import save_model
from test_cli import lift
from test_many_documents import FLAGS, text, wait_for, weights

HEAD, NODE = "10.213.77.1", "10.213.77.2"
PORT = 26379
# Ray takes a host for dead after about ten seconds of silence here, not a minute
PATIENCE = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_health_check_initial_delay_ms": "1000",
}
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "between-two-namespaces-only"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root and ip"
    ),
]


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


class Hosts:
    """`head` and `node`, each with a cable to the other."""

    def __init__(self, tag: str) -> None:
        self.head, self.node = f"lift-{tag}-h", f"lift-{tag}-n"
        self._cables = {self.head: f"h{tag}", self.node: f"n{tag}"}
        self._running: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Hosts:
        first, second = self._cables.values()
        for name in self._cables:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", first, "type", "veth", "peer", "name", second)
        for (name, cable), address in zip(self._cables.items(), (HEAD, NODE), strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
        return self

    def __exit__(self, *ended: object) -> None:
        for running in reversed(self._running):
            self.end(running)
        for name in self._cables:
            ip("netns", "del", name, check=False)

    def cut(self, name: str, *, off: bool) -> None:
        ip("-n", name, "link", "set", self._cables[name], "down" if off else "up")

    def run(self, name: str, *command: str, **variables: str) -> subprocess.Popen[str]:
        """In a session of its own, so that all of it can be ended."""
        running = subprocess.Popen(
            ["ip", "netns", "exec", name, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | PATIENCE | TOKEN | {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"} | variables,
            start_new_session=True,
        )
        self._running.append(running)
        return running

    def end(self, running: subprocess.Popen[str]) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(timeout=20)
                return


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    pytest.importorskip("ray")
    try:
        with Hosts(str(os.getpid() % 10000)) as made:
            yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr!r}")


def start_ray(hosts: Hosts, name: str) -> subprocess.Popen[str]:
    ray = str(Path(sys.executable).parent / "ray")
    own = HEAD if name == hosts.head else NODE
    head = ["--head", f"--port={PORT}", "--include-dashboard=false"]
    where = head if name == hosts.head else [f"--address={HEAD}:{PORT}"]
    return hosts.run(name, ray, "start", *where, f"--node-ip-address={own}", "--num-cpus=1", "--block")


def test_a_host_is_cut_off_and_comes_back(
    hosts: Hosts, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, docs = save_model(tmp_path / "m"), tmp_path / "docs"
    docs.mkdir()
    for index in range(12):
        (docs / f"d{index:02}.txt").write_text(text(index + 25))
    assert lift(capsys, "absorb", docs, "--library", tmp_path / "alone", "--model", model, *FLAGS).code == 0

    start_ray(hosts, hosts.head)
    time.sleep(12)
    away = start_ray(hosts, hosts.node)
    time.sleep(8)
    command = [sys.executable, "-m", "liftlm", "absorb", str(docs), "--library", str(tmp_path / "ray")]
    command += ["--model", str(model), *FLAGS, "--ray", f"{HEAD}:{PORT}", "--set", "cluster.workers=2"]
    running = hosts.run(hosts.head, *command)
    done = tmp_path / "ray" / "documents"
    wait_for(lambda: len(list(done.glob("*"))) >= 2, running)
    hosts.cut(hosts.node, off=True)
    before = len(list(done.glob("*")))
    wait_for(lambda: len(list(done.glob("*"))) >= before + 3, running)  # the other host goes on
    hosts.cut(hosts.node, off=False)
    hosts.end(away)  # Ray ends a node that was taken for dead; whoever runs the host starts it again
    start_ray(hosts, hosts.node)
    out, err = running.communicate(timeout=240)
    assert running.returncode == 0, err
    assert len(out.splitlines()) == 12 and "12 absorbed, 0 were already, 0 failed." in err
    rows = [json.loads(path.read_text()) for path in done.iterdir()]
    assert max(row["tries"] for row in rows) == 2, rows
    assert "its document is given to another" in err
    assert weights(tmp_path / "alone") == weights(tmp_path / "ray")
