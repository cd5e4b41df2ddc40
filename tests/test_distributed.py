"""Two processes on CPU (gloo) make the adapter of one, at equal global batch, to rounding."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from conftest import save_model

TEXT = "The ferryman Oswin Tarrel rang the bell of Corriden on 3 May 1743. " * 20
SETTINGS = [
    "segments.segment_tokens=64",
    "adapter.rank=4",
    "training.epochs=2",
    "training.batch_tokens=200",
    "training.learning_rate=5e-3",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def absorb(tmp_path: Path, home: str, processes: int, *more: str) -> tuple[dict[str, torch.Tensor], str]:
    text = tmp_path / "corriden.txt"
    text.write_text(TEXT)
    program = ["liftlm", "absorb", str(text), "--model", str(tmp_path / "m")]
    program += [part for setting in [*SETTINGS, *more] for part in ("--set", setting)]
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()), "-m"]
    command = [sys.executable, "-m", *(launcher if processes > 1 else []), *program]
    result = subprocess.run(
        command,
        env=os.environ | {"LIFT_HOME": str(tmp_path / home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / home).glob("library/*/adapter/adapter_model.safetensors")
    return load_file(file), result.stderr


def test_two_processes_make_the_adapter_of_one(tmp_path: Path) -> None:
    save_model(tmp_path / "m")
    one, _ = absorb(tmp_path, "one", 1)
    two, notes = absorb(tmp_path, "two", 2)
    assert notes.count("Absorbed ") == 1  # one process keeps the books
    other, _ = absorb(tmp_path, "other", 1, "seed=1")

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        difference = sum(float((a[key] - b[key]).square().sum()) for key in a)
        return (difference / sum(float(a[key].square().sum()) for key in a)) ** 0.5

    assert distance(one, two) < 1e-3
    assert distance(one, other) > 0.1  # a different run is far away
    _, again = absorb(tmp_path, "two", 2)
    assert "From the library" in again
