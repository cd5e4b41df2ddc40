"""Several processes on CPU (gloo) make the adapter of one, at equal global batch, to rounding: DDP and, sharded, FSDP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import save_model
from liftlm import Document, LiftConfig, load_config, load_model
from liftlm.adapters import attach_adapter
from liftlm.distilling import task_examples
from liftlm.errors import ConfigError
from liftlm.examples import make_examples, plan_training, split_step
from liftlm.library import Library
from liftlm.segments import split_into_segments
from liftlm.tasks.extractive import write_extractive_tasks

TEXT = "The ferryman Oswin Tarrel rang the bell of Corriden on 3 May 1743. " * 21
SETTINGS = [
    "model.device=cpu",
    "model.dtype=float32",
    "tasks.writer=none",
    "segments.segment_tokens=64",
    "adapter.rank=4",
    "training.epochs=2",
    "training.batch_tokens=270",
    "training.micro_batch_tokens=64",  # so that each process adds up several
    "training.learning_rate=5e-3",
]
# One of the processes, as `python -m liftlm` would be; it can also be told to behave as below. accelerate never shards
# on CPUs, so a process that is to do it must say it had GPUs; all that follows is as on GPUs, with gloo between.
WORKER = """
import os, signal, sys
from accelerate import PartialState
from accelerate.utils import DistributedType
import liftlm.drift
import liftlm.training
from liftlm.cli import main

sharded, stop_at = os.environ["TEST_SHARDED"] == "yes", int(os.environ["TEST_STOP_AT"])
tensor = any("model.parallel=tensor" in argument for argument in sys.argv)
PartialState(cpu=True)
if PartialState().process_index:
    liftlm.drift._write = None  # the first process writes for all
if sharded:
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
take_step = liftlm.training._Run.step

def step(run, *chosen):
    kinds = {type(p).__name__ for p in run.parameters.values()}
    assert kinds == ({"DTensor", "Parameter"} if tensor else {"DTensor"} if sharded else {"Parameter"})
    metrics = take_step(run, *chosen)
    if metrics.step == stop_at and PartialState().process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)  # only one of the processes hears of it
    return metrics

liftlm.training._Run.step = step
main()
"""
# questions beside the segments, some of them shown with text, whose soft targets both processes ask the base model for,
# and a penalty on drifting
TASKS = ("tasks.writer=extractive", "tasks.per_sentence=1", "tasks.passage_characters=80", "tasks.reading=0.5")
TASKS += ("training.drift_weight=0.5",)
DDP = ["--multi_gpu"]  # on a machine without GPUs: gloo; `--cpu` alone starts a single process
FSDP = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corriden.txt").write_text(TEXT)
    (tmp_path / "worker.py").write_text(WORKER)
    return save_model(tmp_path / "m")


def config(*more: str) -> LiftConfig:
    return load_config(None, [*SETTINGS, *more])


def launch(folder: Path, home: str, kind: list[str], *more: str, stop_at: int = 0) -> subprocess.CompletedProcess[str]:
    """`lift absorb` in two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", *kind, "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    command += [str(folder.parent / "worker.py"), "absorb", str(folder.parent / "corriden.txt"), "--model", str(folder)]
    command += [part for setting in [*SETTINGS, *more] for part in ("--set", setting)]
    told = {"TEST_SHARDED": "yes" if kind == FSDP else "no", "TEST_STOP_AT": str(stop_at)}
    environment = os.environ | told | {"LIFT_HOME": str(folder.parent / home), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def stored(folder: Path, home: str) -> Tensors:
    """The adapter of the one entry that a launch must have made, and made with two processes."""
    (entry,) = (folder.parent / home / "library").glob("[!.]*")
    assert json.loads((entry / "entry.json").read_text())["report"]["processes"] == 2
    assert Library(folder.parent / home).problems(entry.name) == []
    assert not list((folder.parent / home).glob("unfinished/*"))
    (file,) = (entry / "adapter").glob("*.safetensors")
    return load_file(file)


def alone(folder: Path, settings: LiftConfig, *, trained: bool = True) -> Tensors:
    """The adapter that this process makes, or with which it begins."""
    model = load_model(str(folder), settings.model)
    if trained:
        document = Document(title="corriden", text=TEXT)
        adapter, _ = Library(folder.parent / f"alone-{settings.seed}").absorb_once(document, model, settings)
        return dict(model.adapters[adapter.id].tensors())
    attach_adapter(model, "x", settings.adapter, settings.seed)
    return dict(model.adapters["x"].tensors())


def apart(one: Tensors, other: Tensors) -> float:
    assert set(one) == set(other)
    return float(sum((one[name].double() - other[name].double()).square().sum() for name in one)) ** 0.5


def test_two_processes_make_the_adapter_of_one(folder: Path) -> None:
    settings = config(*TASKS)
    result = launch(folder, "two", DDP, *TASKS)
    assert result.returncode == 0, result.stderr
    one, two = alone(folder, settings), stored(folder, "two")
    moved = apart(one, alone(folder, settings, trained=False))
    assert apart(one, two) < 1e-4 * moved
    assert apart(one, alone(folder, config(*TASKS, "seed=1"))) > 0.5 * moved  # a different run is far away
    assert len(result.stdout.splitlines()) == 1 and result.stderr.count("Absorbed ") == 1  # one keeps the books

    # the steps were of all kinds: several micro-batches a process, and one with nothing to do for the second
    model = load_model(str(folder), settings.model)
    rows = make_examples(split_into_segments(model.encode(TEXT), 64, 24), model.tokenizer)
    document = Document(title="corriden", text=TEXT)
    tasks = write_extractive_tasks(TEXT, 1, settings.seed)
    rows += task_examples(model, document, tasks, model.resolve(settings))[0]
    steps = [step for _, step in plan_training(rows, model.resolve(settings))]
    counts = {len([part for part in split_step(step, rows, 64, 2) if part]) for step in steps}
    assert 1 in counts and max(counts) > 2
    assert {(row.group[:7], row.soft is not None) for row in rows} >= {("", False), ("tasks", False), ("passage", True)}

    again = launch(folder, "two", DDP, *TASKS, stop_at=1)  # at once from the library: no step is taken
    assert again.returncode == 0 and "From the library" in again.stderr, again.stderr
    assert apart(two, stored(folder, "two")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("launcher", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_processes_stop_together_and_continue_together(launcher: list[str], kind: str, folder: Path) -> None:
    """Also the proof that sharded training gives the adapter of one process."""
    more = (f"adapter.kind={kind}", "training.checkpoint_seconds=1000", "training.drift_weight=0.5")
    stopped = launch(folder, "stopped", launcher, *more, stop_at=3)
    assert stopped.returncode != 0
    assert "Stopped after step 3 of 12; progress is saved." in stopped.stderr, stopped.stderr
    assert [path.name for path in folder.parent.glob("stopped/unfinished/*/checkpoint-*")] == ["checkpoint-0000003"]
    for home in ("stopped", "whole"):
        result = launch(folder, home, launcher, *more)
        assert result.returncode == 0, result.stderr
    whole, continued = stored(folder, "whole"), stored(folder, "stopped")
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    one = alone(folder, config(*more))
    moved = apart(one, alone(folder, config(*more), trained=False))
    assert moved > 0.1 and apart(one, whole) < 1e-4 * moved


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_divided_over_processes_makes_the_adapter_of_one(family: str, folder: Path, tmp_path: Path) -> None:
    """transformers' tensor parallel plan: the same losses, the same adapter, stopped and continued."""
    model = save_model(tmp_path / family, family) if family != "llama" else folder
    tensor = ("model.parallel=tensor", "training.checkpoint_seconds=1000", f"model.name={model}")
    stopped = launch(model, "divided", DDP, *tensor, stop_at=3)
    assert stopped.returncode != 0 and "Stopped after step 3 of 12" in stopped.stderr, stopped.stderr
    result = launch(model, "divided", DDP, *tensor)
    assert result.returncode == 0, result.stderr
    one, two = alone(model, config()), stored(model, "divided")
    moved = apart(one, alone(model, config(), trained=False))
    assert moved > 0.1 and apart(one, two) < 1e-4 * moved
    rows = [
        [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        for name in ("alone-0", "divided")
        for path in (model.parent / name).glob("library/*/metrics.jsonl")
    ]
    assert len(rows) == 2 and len(rows[0]) == 12
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)


def test_a_divided_model_needs_processes(folder: Path) -> None:
    with pytest.raises(ConfigError, match="this is one"):
        load_model(str(folder), config("model.parallel=tensor").model)
