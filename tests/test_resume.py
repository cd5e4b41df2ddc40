"""Stopped anywhere, the same call ends with the same adapter, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import attention_that_runs, save_model
from liftlm import Document, LiftConfig, Model, absorb, load_config, load_model
from liftlm.checkpoints import append_row
from liftlm.errors import DiskFullError, InterruptedWorkError, TerminatedWorkError
from liftlm.storage import file_sha256
from liftlm.tasks import Task
from liftlm.tasks.extractive import write_extractive_tasks
from liftlm.training import StepMetrics, TrainingReport

DOCUMENT = Document(title="Corriden", text="The ferryman Oswin Tarrel rang the bell of Corriden on 3 May 1743. " * 14)
SETTINGS = [
    "tasks.writer=none",
    "segments.segment_tokens=64",
    "adapter.rank=4",
    "adapter.dropout=0.1",
    "training.epochs=3",
    "training.batch_tokens=128",
    "training.checkpoint_seconds=0",
]
OnStep = Callable[[StepMetrics], Any]
Tensors = dict[str, torch.Tensor]


def config(*more: str) -> LiftConfig:
    return load_config(None, [*SETTINGS, *more])


def run(
    folder: Path,
    work: Path | None,
    settings: LiftConfig,
    on_step: OnStep = lambda m: None,
    given: list[Task] | None = None,
) -> tuple[Tensors, TrainingReport]:
    """Absorbs in a freshly loaded model, as a new process would."""
    model = load_model(str(folder))
    adapter = absorb(DOCUMENT, model, settings, tasks=given, folder=work, on_step=on_step)
    tensors = {key: tensor.detach().clone() for key, tensor in model.adapters[adapter.id].tensors().items()}
    return tensors, adapter.report


def metrics(work: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what the clock and the system decide."""
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    machine = ("tokens_per_second", "memory_bytes", "seconds_left")
    return [{key: value for key, value in row.items() if key not in machine} for row in rows]


def same(one: Tensors, other: Tensors) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


class Crash(Exception):
    pass


def crash_at(step: int) -> OnStep:
    def on_step(metrics: StepMetrics) -> None:
        if metrics.step == step:
            raise Crash

    return on_step


def signal_at(step: int, *numbers: int) -> OnStep:
    def on_step(metrics: StepMetrics) -> None:
        if metrics.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    return on_step


@pytest.mark.parametrize("kind", ["lora", "full", "gated-memory", "prefix"])
def test_crashes_change_nothing(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    settings = config(f"adapter.kind={kind}", "adapter.prefix.tokens=8")
    whole, report = run(tiny_folder, tmp_path / "whole", settings)
    work, heard = tmp_path / "work", list[int]()
    assert report.steps > 8
    for at in (1, 4, report.steps):
        with pytest.raises(Crash):
            run(tiny_folder, work, settings, lambda m, at=at: (heard.append(m.step), crash_at(at)(m)))
    resumed, other = run(tiny_folder, work, settings, lambda m: heard.append(m.step))
    # each crash came before the checkpoint of its own step, so that step was taken again
    assert heard == [1, 1, 2, 3, 4, *range(4, report.steps + 1), report.steps]
    assert same(whole, resumed)
    assert metrics(work) == metrics(tmp_path / "whole")
    assert [row["step"] for row in metrics(work)] == list(range(1, report.steps + 1))
    assert other.epoch_losses == report.epoch_losses and other.tokens == report.tokens
    assert other.resumed_from == report.steps - 1 and report.resumed_from is None


@pytest.mark.parametrize(
    "given", [None, [Task("Who rang?", "Oswin Tarrel.", "who", 0, 66)] * 12], ids=["written", "given"]
)
def test_crashes_change_nothing_where_tasks_are_trained_on(
    given: list[Task] | None, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed tasks, some with text to read, in an order of their own each epoch; the base model is asked once only."""
    settings = config(
        *("tasks.writer=extractive", "tasks.per_sentence=2", "tasks.mix=0.8", "tasks.first_epoch=1"),
        *("tasks.reading=0.5", "tasks.passage_characters=80", "tasks.teacher_weight=0.3", "training.batch_tokens=350"),
    )
    whole, report = run(tiny_folder, tmp_path / "whole", settings, given=given)
    work, asked, top_tokens = tmp_path / "work", list[int](), Model.top_tokens

    def count(self: Model, *arguments: Any, **more: Any) -> Any:
        asked.append(1)
        return top_tokens(self, *arguments, **more)

    monkeypatch.setattr(Model, "top_tokens", count)
    with pytest.raises(Crash):
        run(tiny_folder, work, settings, crash_at(1), given)
    first = len(asked)
    heard: list[int] = []
    for at in (report.steps // 2, report.steps - 1):
        with pytest.raises(Crash):
            run(tiny_folder, work, settings, crash_at(at), given)
    resumed, again = run(tiny_folder, work, settings, lambda m: heard.append(m.step), given)
    assert len(asked) == first > 0, "the base model was asked again"
    assert again.resumed_from == report.steps - 2 and heard == [report.steps - 1, report.steps]
    assert same(whole, resumed)
    assert metrics(work) == metrics(tmp_path / "whole") and len(metrics(work)) == report.steps > 6
    assert again.epoch_losses == report.epoch_losses and again.tokens == report.tokens
    lines = (work / "tasks.jsonl").read_bytes()
    assert lines == (tmp_path / "whole" / "tasks.jsonl").read_bytes()
    assert lines.count(b"\n") == (len(given) if given else len(write_extractive_tasks(DOCUMENT.text, 2)))
    other, _ = run(tiny_folder, None, config(), given=[])
    assert not same(whole, other), "the tasks change nothing"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_crashes_change_nothing_in_sixteen_bits(dtype: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Among what is saved is float32 weights where the model has none, and the scale of float16's gradients."""
    settings = config("adapter.kind=full", f"model.dtype={dtype}")
    results = []
    for work in (tmp_path / "whole", tmp_path / "work"):
        model = load_model(str(tiny_folder), settings.model)
        with attention_that_runs():
            if work.name == "work":
                with pytest.raises(Crash):
                    absorb(DOCUMENT, model, settings, folder=work, on_step=crash_at(4))
            adapter = absorb(DOCUMENT, model, settings, folder=work)
        results.append({name: tensor.clone() for name, tensor in model.adapters[adapter.id].tensors().items()})
    assert same(*results) and metrics(tmp_path / "work") == metrics(tmp_path / "whole")


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "error", "code"),
    [
        ([signal.SIGINT], InterruptedWorkError, 130),
        ([signal.SIGTERM], TerminatedWorkError, 143),
        ([signal.SIGINT, signal.SIGTERM], InterruptedWorkError, 130),  # launchers send a SIGTERM after Ctrl-C
    ],
)
def test_signals_stop_after_the_step_with_everything_saved(
    numbers: list[int], error: type[InterruptedWorkError], code: int, tiny_folder: Path, tmp_path: Path
) -> None:
    settings = config("training.checkpoint_seconds=1000")
    whole, _ = run(tiny_folder, None, settings)
    before = [signal.getsignal(number) for number in numbers]
    work = tmp_path / "work"
    with pytest.raises(error, match=r"Stopped after step 2 of \d+; progress is saved\.") as caught:
        run(tiny_folder, work, settings, signal_at(2, *numbers))
    assert caught.type is error and caught.value.exit_code == code
    assert caught.value.next_step == "The same command continues from there."
    assert [signal.getsignal(number) for number in numbers] == before
    heard: list[int] = []
    resumed, report = run(tiny_folder, work, settings, lambda m: heard.append(m.step))
    assert heard[0] == 3 and report.resumed_from == 2
    assert same(whole, resumed)


def test_ctrl_c_in_the_last_step_is_not_lost(tiny_folder: Path, tmp_path: Path) -> None:
    whole, report = run(tiny_folder, None, config())
    with pytest.raises(InterruptedWorkError, match=f"step {report.steps} of {report.steps}"):
        run(tiny_folder, tmp_path / "work", config(), signal_at(report.steps, signal.SIGINT))
    resumed, again = run(tiny_folder, tmp_path / "work", config(), lambda m: pytest.fail("a step too many"))
    assert same(whole, resumed) and again.epoch_losses == report.epoch_losses


def test_a_second_ctrl_c_stops_at_once(tiny_folder: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, tmp_path / "work", config(), signal_at(3, signal.SIGINT, signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is before
    whole, _ = run(tiny_folder, None, config())
    resumed, report = run(tiny_folder, tmp_path / "work", config())
    assert report.resumed_from == 2 and same(whole, resumed)


def test_where_nothing_is_saved_no_continuation_is_promised(tiny_folder: Path) -> None:
    with pytest.raises(InterruptedWorkError, match="nothing was to be saved") as caught:
        run(tiny_folder, None, config(), signal_at(1, signal.SIGINT))
    assert "continues" not in caught.value.next_step


def test_a_thread_of_a_server_trains_without_touching_signals(tiny_folder: Path) -> None:
    whole, _ = run(tiny_folder, None, config())
    found: list[Tensors] = []
    handlers: set[Any] = set()

    def work() -> None:
        found.append(run(tiny_folder, None, config(), lambda m: handlers.add(signal.getsignal(signal.SIGINT)))[0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert same(whole, found[0]) and handlers == {signal.getsignal(signal.SIGINT)}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def interrupted(folder: Path, work: Path, at: int, *more: str) -> int:
    """Runs up to a crash in step `at`; the step at which it began."""
    heard: list[int] = []
    with pytest.raises(Crash):
        run(folder, work, config(*more), lambda m: (heard.append(m.step), crash_at(at)(m)))
    return heard[0]


@pytest.mark.parametrize("file", ["weights.safetensors", "moments.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_not_used(file: str, tiny_folder: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    interrupted(tiny_folder, work, 3)
    shutil.copytree(work / "checkpoint-0000002", tmp_path / "older")
    assert interrupted(tiny_folder, work, 6) == 3
    shutil.move(tmp_path / "older", work / "checkpoint-0000002")  # as when it is killed before it deletes that one
    damage(work / "checkpoint-0000005" / file)
    assert interrupted(tiny_folder, work, 5) == 3  # from the older one
    damage(work / "checkpoint-0000004" / file)
    heard: list[int] = []
    resumed, report = run(tiny_folder, work, config(), lambda m: heard.append(m.step))
    assert heard[0] == 1 and report.resumed_from is None  # there was no other
    whole, _ = run(tiny_folder, tmp_path / "whole", config())
    assert same(whole, resumed) and metrics(work) == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    "other", ["seed=1", "training.epochs=4", "adapter.rank=5", "training.micro_batch_tokens=64", "model.dtype=bfloat16"]
)
def test_a_checkpoint_of_another_run_is_not_continued(other: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Settings that change the numbers of a step; those that do not (how often to save) may change on the way."""
    work = tmp_path / "work"
    model = load_model(str(tiny_folder), config().model)
    with pytest.raises(Crash):
        absorb(DOCUMENT, model, config(), folder=work, on_step=crash_at(4))
    changed, heard = config(other), list[int]()
    model = load_model(str(tiny_folder), changed.model)
    adapter = absorb(DOCUMENT, model, changed, folder=work, on_step=lambda m: heard.append(m.step))
    assert heard[0] == 1 and adapter.report.resumed_from is None
    assert [row["step"] for row in metrics(work)] == list(range(1, adapter.report.steps + 1))


def test_how_often_to_save_may_change_on_the_way(tiny_folder: Path, tmp_path: Path) -> None:
    interrupted(tiny_folder, tmp_path / "work", 4)
    assert interrupted(tiny_folder, tmp_path / "work", 5, "training.checkpoint_seconds=1000") == 4


def test_what_a_killed_process_left_half_written_goes(tiny_folder: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    interrupted(tiny_folder, work, 4)
    (work / ".checkpoint-0000004.writing-1").mkdir()
    (work / ".checkpoint-0000004.writing-1" / "weights.safetensors").write_bytes(b"half")
    with (work / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    resumed, report = run(tiny_folder, work, config())
    whole, _ = run(tiny_folder, tmp_path / "whole", config())
    assert report.resumed_from == 3 and same(whole, resumed)
    assert metrics(work) == metrics(tmp_path / "whole")
    left = sorted(path.name for path in work.iterdir())
    assert left == [f"checkpoint-{report.steps - 1:07d}", "metrics.jsonl"]


def test_a_full_disk_leaves_the_checkpoint_before(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import liftlm.checkpoints

    save, calls = liftlm.checkpoints.save_file, []

    def full(tensors: Tensors, path: Path) -> None:
        calls.append(path)
        if len(calls) > 7:  # two files a step
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    monkeypatch.setattr(liftlm.checkpoints, "save_file", full)
    with pytest.raises(DiskFullError):
        run(tiny_folder, tmp_path / "work", config())
    monkeypatch.undo()
    whole, _ = run(tiny_folder, None, config())
    resumed, report = run(tiny_folder, tmp_path / "work", config())
    assert report.resumed_from == 3 and same(whole, resumed)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_full_disk_is_said_where_metrics_are_written() -> None:
    with pytest.raises(DiskFullError):
        append_row(Path("/dev/full"), {"loss": 1.0})


# --- real processes ---------------------------------------------------------------------------------------------------


def test_killed_commands_continue_to_the_same_file(tmp_path: Path) -> None:
    """kill -9, then Ctrl-C, then SIGTERM, each in the run that continues the one before; and one left alone."""
    folder, text = save_model(tmp_path / "m"), tmp_path / "corriden.txt"
    text.write_text(DOCUMENT.text)
    command = [sys.executable, "-m", "liftlm", "absorb", str(text), "--model", str(folder)]
    command += [part for setting in [*SETTINGS, "training.epochs=40"] for part in ("--set", setting)]

    def start(home: str) -> subprocess.Popen[str]:
        environment = os.environ | {"LIFT_HOME": str(tmp_path / home)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def steps_taken() -> int:
        files = list(tmp_path.glob("stopped/unfinished/*/metrics.jsonl"))
        return len(files[0].read_text().splitlines()) if files else 0

    alone, seen = start("whole"), 0
    for number, code in [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]:
        process, deadline = start("stopped"), time.monotonic() + 120
        while steps_taken() < seen + 5 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        _, notes = process.communicate(timeout=120)
        assert process.returncode == code, notes
        if code > 0:
            assert "progress is saved" in notes and "The same command continues" in notes and "Traceback" not in notes
        assert not list(tmp_path.glob("stopped/library/*/entry.json"))
        assert len(list(tmp_path.glob("stopped/unfinished/*/checkpoint-*"))) in (1, 2)
        seen = steps_taken()
    last = start("stopped")
    for process in (last, alone):
        _, notes = process.communicate(timeout=240)
        assert process.returncode == 0, notes

    def entry(home: str) -> Path:
        (card,) = (tmp_path / home).glob("library/*/entry.json")
        return card.parent

    report = json.loads((entry("stopped") / "entry.json").read_text())["report"]
    assert report["resumed_from"] >= seen > 10
    assert metrics(entry("stopped")) == metrics(entry("whole")) and len(metrics(entry("whole"))) == report["steps"]
    name = Path("adapter") / "adapter_model.safetensors"
    assert file_sha256(entry("stopped") / name) == file_sha256(entry("whole") / name)
    assert load_file(entry("whole") / name)
    assert not list(tmp_path.glob("stopped/unfinished/*"))
