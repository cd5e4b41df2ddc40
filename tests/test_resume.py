"""Stopped anywhere, the same call ends with the same adapter, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import save_model
from liftlm import Document, LiftConfig, absorb, load_config, load_model
from liftlm.errors import InterruptedWorkError, TerminatedWorkError

DOCUMENT = Document(title="Corriden", text="The ferryman Oswin Tarrel rang the bell of Corriden on 3 May 1743. " * 14)
SETTINGS = [
    "segments.segment_tokens=64",
    "adapter.rank=4",
    "adapter.dropout=0.1",
    "training.epochs=3",
    "training.batch_tokens=128",
    "training.checkpoint_seconds=0",
]


def config(*more: str) -> LiftConfig:
    return load_config(None, [*SETTINGS, *more])


def run(
    folder: Path, work: Path | None, settings: LiftConfig, on_step: Any = lambda m: None
) -> dict[str, torch.Tensor]:
    model = load_model(str(folder))
    adapter = absorb(DOCUMENT, model, settings, folder=work, on_step=on_step)
    return {key: tensor.detach().clone() for key, tensor in model.adapters[adapter.id].tensors().items()}


def steps(work: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()]


class Crash(Exception):
    pass


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("at", [1, 4])
def test_a_crash_at_any_step_changes_nothing(kind: str, at: int, tiny_folder: Path, tmp_path: Path) -> None:
    settings = config(f"adapter.kind={kind}")
    whole = run(tiny_folder, None, settings)

    def crash(metrics: Any) -> None:
        if metrics.step == at:
            raise Crash

    work = tmp_path / "work"
    with pytest.raises(Crash):
        run(tiny_folder, work, settings, crash)
    heard: list[int] = []
    resumed = run(tiny_folder, work, settings, lambda metrics: heard.append(metrics.step))
    # the crash came before the checkpoint of its own step, so that step is taken again
    assert heard[0] == at and steps(work) == list(range(1, heard[-1] + 1))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, InterruptedWorkError), (signal.SIGTERM, TerminatedWorkError)]
)
def test_signals_stop_after_the_step_with_everything_saved(
    number: int, error: type[InterruptedWorkError], tiny_folder: Path, tmp_path: Path
) -> None:
    settings = config("training.checkpoint_seconds=1000")
    whole = run(tiny_folder, None, settings)
    before = signal.getsignal(number)

    def stop(metrics: Any) -> None:
        if metrics.step == 2:
            os.kill(os.getpid(), number)

    work = tmp_path / "work"
    with pytest.raises(error, match="Stopped after step 2 of") as caught:
        run(tiny_folder, work, settings, stop)
    assert "same command" in caught.value.next_step and signal.getsignal(number) is before
    heard: list[int] = []
    resumed = run(tiny_folder, work, settings, lambda metrics: heard.append(metrics.step))
    assert heard[0] == 3
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_damaged_or_foreign_checkpoint_is_not_continued(tiny_folder: Path, tmp_path: Path) -> None:
    def stop(metrics: Any) -> None:
        if metrics.step == 3:
            raise Crash

    work = tmp_path / "work"
    with pytest.raises(Crash):
        run(tiny_folder, work, config(), stop)
    heard: list[int] = []
    with pytest.raises(Crash):
        run(tiny_folder, work, config("seed=1"), lambda m: (heard.append(m.step), stop(m)))
    assert heard[0] == 1
    (weights,) = work.glob("checkpoint-*/weights.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    heard.clear()
    run(tiny_folder, work, config("seed=1"), lambda m: heard.append(m.step))
    assert heard[0] == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_killed_command_continues_to_the_same_file(number: int, code: int, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    text = tmp_path / "corriden.txt"
    text.write_text(DOCUMENT.text)
    settings = [*SETTINGS, "training.epochs=30"]
    command = [sys.executable, "-m", "liftlm", "absorb", str(text), "--model", str(folder)]
    command += [part for setting in settings for part in ("--set", setting)]

    def start(home: str) -> subprocess.Popen[str]:
        environment = os.environ | {"LIFT_HOME": str(tmp_path / home)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def adapter(home: str) -> str:
        (file,) = (tmp_path / home).glob("library/*/adapter/adapter_model.safetensors")
        return hashlib.sha256(file.read_bytes()).hexdigest()

    process = start("stopped")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "stopped").glob("unfinished/*/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, notes = process.communicate(timeout=60)
    assert process.returncode == code, notes
    if code > 0:
        assert "The same command continues" in notes and "Traceback" not in notes
    assert not list((tmp_path / "stopped").glob("library/*/entry.json"))
    again, whole = start("stopped"), start("whole")
    for process in (again, whole):
        _, notes = process.communicate(timeout=120)
        assert process.returncode == 0, notes
    (card,) = (tmp_path / "stopped").glob("library/*/entry.json")
    assert json.loads(card.read_text())["report"]["resumed_from"] >= 1
    assert adapter("stopped") == adapter("whole")
    assert not list((tmp_path / "stopped").glob("unfinished/*"))
