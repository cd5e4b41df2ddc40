"""Many documents: what is missing and only that, from checkpoint to checkpoint, on any file system, with and without Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from conftest import save_model
from liftlm import Document, Library, load_config, load_model
from liftlm.absorbing import adapter_id
from liftlm.errors import InterruptedWorkError
from liftlm.homes import Home
from liftlm.many_documents import AbsorbingWorker, Order, Source, scratch_folder
from liftlm.shelf import Shelf
from test_cli import lift

SETTINGS = [
    "model.device=cpu",
    "model.dtype=float32",
    "model.threads=1",
    "tasks.writer=none",
    "segments.segment_tokens=64",
    "adapter.rank=4",
    "training.batch_tokens=128",
    "training.epochs=2",
    "training.learning_rate=5e-3",
    "training.checkpoint_seconds=0",
]
FLAGS = [part for setting in SETTINGS for part in ("--set", setting)]


def text(index: int) -> str:
    return f"Chronicle {index}. " + f"Oswin Tarrel the {index}th rang the bell on {index + 1} May {1743 + index}. " * (
        12 + index
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(3):
        path = tmp_path / "docs" / ("" if index else "below") / f"d{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(index))
    return tmp_path / "docs"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights(home: Path) -> dict[str, bytes]:
    """Of every entry, which must be whole."""
    found = {}
    for entry in (home / "library").glob("[!.]*"):
        assert Shelf(home).problems(entry.name) == []
        found[json.loads((entry / "entry.json").read_text())["source"]] = (
            entry / "adapter" / "adapter_model.safetensors"
        ).read_bytes()
    return found


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a server that speaks S3 (moto), over real HTTP."""
    pytest.importorskip("moto")
    s3fs = pytest.importorskip("s3fs")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    boto3.client("s3").create_bucket(Bucket="lib")
    s3fs.S3FileSystem.clear_instance_cache()
    yield "s3://lib/books"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


# --- through the command line -----------------------------------------------------------------------------------------


def test_a_folder_is_absorbed_and_the_same_command_does_what_is_missing(
    capsys: pytest.CaptureFixture[str], folder: Path, tiny_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["absorb", folder, "--model", tiny_folder, *FLAGS]
    first = lift(capsys, *command)
    assert first.code == 0, first.err
    assert [line.split("  ")[1] for line in first.out.splitlines()] == ["d1", "d2", "d0"]
    assert "3 absorbed, 0 were already, 0 failed." in first.err
    assert not list((home / "unfinished").glob("*"))

    opened: list[str] = []
    read = Source.read
    monkeypatch.setattr(Source, "read", lambda self: opened.append(self.url) or read(self))
    assert "0 absorbed, 3 were already" in lift(capsys, *command).err and not opened

    (folder / "d1.txt").write_text(text(7))  # another text; and one that is known under another name
    shutil.copy(folder / "d2.txt", folder / "d3.txt")
    third = lift(capsys, *command)
    assert "2 absorbed, 2 were already" in third.err
    assert sorted(Path(url).name for url in opened) == ["d1.txt", "d3.txt"]
    assert lift(capsys, "ask", folder / "d1.txt", "Who?", "--model", tiny_folder, *FLAGS).code == 0

    other = lift(capsys, *command, "--set", "adapter.rank=2")  # another recipe: all of them
    assert "4 absorbed, 0 were already" in other.err


def test_the_adapters_are_those_of_lift_absorb(
    capsys: pytest.CaptureFixture[str], folder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lift(capsys, "absorb", folder, "--library", tmp_path / "many", "--model", tiny_folder, *FLAGS).code == 0
    monkeypatch.setenv("LIFT_HOME", str(tmp_path / "single"))
    for path in folder.rglob("*.txt"):
        assert lift(capsys, "absorb", path, "--model", tiny_folder, *FLAGS).code == 0
    assert weights(tmp_path / "many") == weights(tmp_path / "single") and len(weights(tmp_path / "single")) == 3


def test_documents_that_cannot_be_absorbed_are_told(
    capsys: pytest.CaptureFixture[str], folder: Path, tiny_folder: Path, home: Path
) -> None:
    (folder / "blank.txt").write_text("  \n")
    (folder / "sound.mp3").write_bytes(b"ID3\x04\0\0\0\0" + bytes(range(256)))
    command = ["absorb", folder, "--model", tiny_folder, *FLAGS]
    result = lift(capsys, *command)
    assert result.code == 61 and len(result.out.splitlines()) == 3
    assert "2 documents could not be absorbed: blank.txt: " in result.err and "sound.mp3: " in result.err
    rows = Home(str(home)).failures()
    assert sorted(row["document"] for row in rows) == ["blank.txt", "sound.mp3"]
    assert {row["tries"] for row in rows} == {1}  # another try would end the same
    (folder / "blank.txt").write_text(text(9))
    (folder / "sound.mp3").unlink()
    again = lift(capsys, *command)
    assert again.code == 0 and "1 absorbed, 3 were already, 0 failed." in again.err


def test_what_does_not_go_together(
    capsys: pytest.CaptureFixture[str], folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    single = lift(capsys, "absorb", folder / "d1.txt", "--ray", "local")
    assert single.code == 2 and "go with a folder" in single.err
    titled = lift(capsys, "absorb", folder, "--title", "T")
    assert titled.code == 2 and "this is a folder" in titled.err
    unknown = lift(capsys, "absorb", folder, "--library", "nowhere://x", "--model", tiny_folder)
    assert unknown.code == 2 and "'nowhere://x' cannot be opened" in unknown.err
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        several = lift(capsys, "absorb", folder, "--model", tiny_folder)
        assert several.code == 2 and "a launcher started several" in several.err
    gone = lift(capsys, "absorb", "memory://not-there", "--library", tmp_path / "o", "--model", tiny_folder, *FLAGS)
    assert gone.code == 10 and "no folder 'memory://not-there'" in gone.err


# --- from machine to machine ------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """As a killed worker: nothing is cleaned up."""


def worker(model: Path, home: str, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> AbsorbingWorker:
    """One on a machine of its own."""
    monkeypatch.setattr("liftlm.many_documents.scratch_folder", lambda: tmp_path / name)
    return AbsorbingWorker(Order(load_config(None, [*SETTINGS, f"model.name={model}"]), home))


@pytest.mark.parametrize("kind", ["folder", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def test_another_machine_continues_bit_for_bit(
    kind: str, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    urls = {"folder": lambda: str(tmp_path / "home"), "memory": lambda: f"memory://{tmp_path.name}"}
    url = urls.get(kind, lambda: request.getfixturevalue("s3"))()
    document = Document(title="d", text=text(1), source="d1.txt")
    first = worker(tiny_folder, url, tmp_path, "first", monkeypatch)
    entry_id = adapter_id(document, first.model, first.config)

    def die(row: dict[str, Any]) -> None:
        if row["step"] >= 6:
            raise StoppedError

    monkeypatch.setattr("liftlm.many_documents._TELL_SECONDS", 0.0)
    assert first.work(document, die).error.startswith("StoppedError") and entry_id not in first.model.adapters
    home = Home(url)
    assert not home.has_entry(entry_id)
    second = worker(tiny_folder, url, tmp_path, "second", monkeypatch)
    steps: list[int] = []
    outcome = second.work(document, lambda row: steps.append(row["step"]))
    # the checkpoint of step 5 came after step 5 was told and was copied when step 6 ended
    assert outcome.result["resumed_from"] == 5 and steps[0] == 6 and outcome.result["new"], outcome
    assert home.entry_ids() == [entry_id] and not home._names("unfinished", entry_id)

    assert home.fetch_entry(entry_id, tmp_path / "fetched")
    alone = Library(tmp_path / "alone")
    model = load_model(str(tiny_folder), first.config.model)
    alone.absorb_once(document, model, first.config)
    own, made = (weights(tmp_path / name)["d1.txt"] for name in ("alone", "fetched"))
    assert own == made

    third = worker(tiny_folder, url, tmp_path, "third", monkeypatch)
    again = third.work(dataclasses.replace(document, source="elsewhere.txt"), lambda row: steps.append(0))
    assert (
        again.result == {"id": entry_id, "title": "d", "new": False, "seconds": again.result["seconds"]}
        and 0 not in steps
    )


def test_torn_copies_are_not_taken_for_whole(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://torn-{tmp_path.name}"
    home = Home(url)
    one = worker(tiny_folder, url, tmp_path, "one", monkeypatch)
    put = home._files.put_file

    def tear(source: str, place: str) -> None:
        if "checksums" in place and "/library/" in place:
            raise OSError("the line is cut")
        put(source, place)

    document = Document(title="d", text=text(2), source="d2.txt")
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", lambda self, source, place: tear(source, place))
        torn = one.work(document, lambda row: None)
        assert "the line is cut" in torn.error and torn.again
    entry_id = adapter_id(document, one.model, one.config)
    assert not home.has_entry(entry_id) and not home.fetch_entry(entry_id, tmp_path / "x")
    outcome = one.work(document, lambda row: None)
    assert outcome.result["new"] and home.fetch_entry(entry_id, tmp_path / "x")
    home._files.pipe_file(f"{home._root}/library/{entry_id}/document.txt", b"another")
    assert not home.fetch_entry(entry_id, tmp_path / "y") and not (tmp_path / "y" / "library" / entry_id).exists()


def test_a_store_that_does_not_answer_is_no_defect(
    capsys: pytest.CaptureFixture[str], folder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Object stores' packages have exceptions of their own, as here."""

    class NoCredentialsError(Exception):
        pass

    def refuse(self: object, *arguments: object, **named: object) -> object:
        raise NoCredentialsError("Unable to locate credentials\nand more")

    command = ["absorb", folder, "--library", f"memory://{tmp_path.name}", "--model", tiny_folder, *FLAGS]
    for name in ("ls", "put_file", "pipe_file", "exists"):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, name, refuse)
            result = lift(capsys, *command)
        assert result.code in (43, 61) and "Unable to locate credentials" in result.err, (name, result.err)
        assert "defect" not in result.err and "and more" not in result.err
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "info", refuse)
        unread = lift(capsys, "absorb", "memory://texts", *command[2:])
    assert unread.code == 43 and "'memory://texts' cannot be used" in unread.err
    assert lift(capsys, *command).code == 0


@pytest.mark.slow
def test_an_object_store(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    s3: str,
) -> None:
    """Documents from S3, adapters to S3: as on the disk; and what its own package says where it goes wrong."""
    Home(s3)._files.put(str(folder), "lib/docs", recursive=True)
    command = ["absorb", "s3://lib/docs", "--model", tiny_folder, *FLAGS, "--library"]
    first = lift(capsys, *command, s3)
    assert first.code == 0 and "3 absorbed, 0 were already, 0 failed." in first.err, first.err
    assert "0 absorbed, 3 were already" in lift(capsys, *command, s3).err
    home = Home(s3)
    assert all(home.fetch_entry(entry_id, tmp_path / "fetched") for entry_id in home.entry_ids())
    assert lift(capsys, "absorb", folder, "--model", tiny_folder, *FLAGS, "--library", tmp_path / "disk").code == 0
    fetched, disk = (sorted(weights(tmp_path / name).values()) for name in ("fetched", "disk"))
    assert fetched == disk and len(disk) == 3
    assert not home._names("unfinished") and not home.failures()

    nowhere = lift(capsys, *command, "s3://nowhere/books")
    assert nowhere.code == 43 and "There is no bucket 'nowhere'" in nowhere.err
    assert home._files.ls("") == ["lib"], "a mistyped bucket is not made"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    sys.modules["s3fs"].S3FileSystem.clear_instance_cache()
    closed = lift(capsys, *command, s3)
    assert closed.code == 43 and "127.0.0.1:9" in closed.err and "defect" not in closed.err, closed.err


def test_a_failed_worker_leaves_its_model_clean(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = worker(tiny_folder, str(tmp_path / "home"), tmp_path, "one", monkeypatch)

    def stop(row: dict[str, Any]) -> None:
        raise InterruptedWorkError("stop")

    found = one.work(Document(title="d", text=text(1)), stop)
    assert found.error and found.again and one.model.adapters == {}


def test_scratch_of_processes_that_are_gone_is_deleted(cache: Path) -> None:
    own = scratch_folder()
    assert own.name == f"{platform.node()}-{os.getpid()}"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = own.with_name(f"{platform.node()}-{gone.pid}")
    others = own.with_name(f"another.host-{gone.pid}")
    for folder in (own, left, others):
        (folder / "library").mkdir(parents=True)
    assert scratch_folder() == own
    assert own.exists() and others.exists() and not left.exists()


# --- Ray --------------------------------------------------------------------------------------------------------------


def start(folder: Path, model: Path, home: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "liftlm", "absorb", str(folder), "--library", str(home), "--model", str(model)]
    command += [*FLAGS, "--ray", "local", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(found: Callable[[], Any], running: subprocess.Popen[str], seconds: float = 150) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end and running.poll() is None:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError(running.communicate(timeout=60))


def ray_workers(running: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of its actors that hold a model and work."""
    found = psutil.Process(running.pid).children(recursive=True)
    return [process for process in found if any("_Actor.work" in part for part in process.cmdline())]


def test_scaling_benchmark_has_its_folder_before_it_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import scaling

    folder, seen = tmp_path / "new" / "folder", []

    def simulate(workers: int, *rest: object) -> dict[str, float]:
        seen.append(folder.is_dir())
        return {"workers": workers, "seconds_each": 0.0, "efficiency": 1.0, "documents_a_second": 1.0}

    monkeypatch.setattr(scaling, "simulate", simulate)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--out", str(folder), "--workers", "1", "--real", "0"])
    scaling.main()
    assert seen == [True, True] and (folder / "scaling.json").is_file() and (folder / "scaling.png").is_file()

    file = tmp_path / "file"
    file.write_text("")
    for wrong in (file, file / "below"):
        monkeypatch.setattr(sys, "argv", ["scaling.py", "--out", str(wrong)])
        with pytest.raises(SystemExit) as ended:
            scaling.main()
        assert ended.value.code == 2 and f"{wrong} cannot be written to" in capsys.readouterr().err
    assert len(seen) == 2


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Two workers, one core each, twelve documents, one killed midway: bit for bit what one process makes alone."""
    pytest.importorskip("ray")
    model, docs = save_model(tmp_path / "m"), tmp_path / "docs"
    docs.mkdir()
    for index in range(12):
        (docs / f"d{index:02}.txt").write_text(text(index + 16))
    assert lift(capsys, "absorb", docs, "--library", tmp_path / "alone", "--model", model, *FLAGS).code == 0

    running = start(docs, model, tmp_path / "ray", "--set", "cluster.workers=2")
    wait_for(lambda: len(list((tmp_path / "ray" / "documents").glob("*"))) >= 3, running)
    unfinished = tmp_path / "ray" / "unfinished"
    # both are in the midst of a document
    wait_for(lambda: len({path.parent for path in unfinished.glob("*/checkpoint-*/checksums.json")}) >= 2, running)
    victim = wait_for(lambda: ray_workers(running), running)[0]
    os.kill(victim.pid, signal.SIGKILL)
    out, err = running.communicate(timeout=240)
    assert running.returncode == 0, err
    assert len(out.splitlines()) == 12 and "12 absorbed, 0 were already, 0 failed." in err
    assert "1 workers were lost." in err
    rows = [json.loads(path.read_text()) for path in (tmp_path / "ray" / "documents").iterdir()]
    assert sorted(row["tries"] for row in rows) == [1] * 11 + [2]
    (again,) = (row for row in rows if row["tries"] == 2)
    assert not list((tmp_path / "ray" / "unfinished").glob("*"))
    alone, ray = weights(tmp_path / "alone"), weights(tmp_path / "ray")
    assert len(alone) == 12 and alone == ray
    assert 0 < again["resumed_from"] < again["steps"]
    record_property("resumed_from", again["resumed_from"])
    assert err.count("its document is given to another") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "said"), [(signal.SIGTERM, "Stopped by SIGTERM"), (signal.SIGINT, "Interrupted")])
def test_a_signal_ends_it_and_the_same_command_goes_on(number: int, said: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    model, docs = save_model(tmp_path / "m"), tmp_path / "docs"
    docs.mkdir()
    for index in range(4):
        (docs / f"d{index}.txt").write_text(text(index + 16))
    running = start(docs, model, tmp_path / "ray", "--set", "cluster.workers=1")
    wait_for(lambda: list((tmp_path / "ray" / "documents").glob("*")), running)
    workers = ray_workers(running)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 128 + number and said in err, (running.returncode, err)
    assert not psutil.wait_procs(workers, timeout=30)[1]
    again = start(docs, model, tmp_path / "ray", "--set", "cluster.workers=1")
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0 and 0 < len(out.splitlines()) <= 3 and "0 failed" in err, err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_the_cluster_is_made(number: int, code: int, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    running = start(folder, save_model(tmp_path / "m"), tmp_path / "ray", "--set", "cluster.workers=1")
    processes = wait_for(lambda: psutil.Process(running.pid).children(recursive=True), running)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == code and out == "" and "Traceback" not in err, (running.returncode, err)
    assert not psutil.wait_procs(processes, timeout=30)[1]


@pytest.mark.slow
def test_ray_says_what_is_wrong(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    absent = lift(capsys, "absorb", folder, "--ray", "127.0.0.1:1", "--model", tmp_path)
    assert absent.code == 60 and "There is no Ray cluster at '127.0.0.1:1'" in absent.err
    model = lift(capsys, "absorb", folder, "--ray", "local", "--set", "cluster.workers=1", "--model", tmp_path)
    assert model.code == 20 and "holds no model" in model.err
    large = lift(
        capsys, "absorb", folder, "--ray", "local", "--set", "cluster.cpus_per_worker=5000", "--model", tmp_path
    )
    assert large.code == 60 and "not enough for one worker" in large.err


@pytest.fixture
def ray_client() -> Iterator[str]:
    """A cluster of its own with a server for Ray's clients."""
    pytest.importorskip("ray")
    pytest.importorskip("grpc")
    with socket.socket() as first, socket.socket() as second:  # two free ports
        first.bind(("127.0.0.1", 0)), second.bind(("127.0.0.1", 0))
        port, client = first.getsockname()[1], second.getsockname()[1]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", f"--port={port}", "--num-cpus=1", "--block"]
    command += [f"--ray-client-server-port={client}", "--include-dashboard=false", "--node-ip-address=127.0.0.1"]
    scratch = tempfile.mkdtemp(prefix="r")  # short: the path of a socket may have 107 bytes
    command += [f"--temp-dir={scratch}"]
    head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield f"ray://127.0.0.1:{client}"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(timeout=60)
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.mark.slow
def test_a_cluster_that_is_reached_over_rays_client(
    capsys: pytest.CaptureFixture[str], folder: Path, tiny_folder: Path, tmp_path: Path, ray_client: str
) -> None:
    assert lift(capsys, "absorb", folder, "--library", tmp_path / "alone", "--model", tiny_folder, *FLAGS).code == 0
    host, port = ray_client.removeprefix("ray://").split(":")
    end = time.monotonic() + 90
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            break
        time.sleep(0.5)
    command = [sys.executable, "-m", "liftlm", "absorb", str(folder), "--library", str(tmp_path / "far")]
    command += ["--model", str(tiny_folder), *FLAGS, "--ray", ray_client]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=os.environ | {"RAY_AUTH_MODE": "disabled"}
    )
    assert done.returncode == 0 and "3 absorbed, 0 were already, 0 failed." in done.stderr, done.stderr
    assert weights(tmp_path / "alone") == weights(tmp_path / "far") and len(weights(tmp_path / "far")) == 3
