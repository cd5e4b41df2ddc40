"""Known failures are seen where they are made, and the user is told in sentences."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from conftest import save_model
from liftlm import Document, load_config, load_model
from liftlm.diagnosing import SIGNATURES, Symptoms, diagnose, judge_symptoms
from liftlm.library import Library
from liftlm.tasks import Task
from test_cli import lift

HEALTHY = Symptoms(
    text_before=3.0,
    text_after=2.0,
    trained_before=[4.0] * 8,
    trained_after=[2.0] * 8,
    held_out_before=[4.0] * 10,
    held_out_after=[2.5] * 10,
    unrelated_before=3.0,
    unrelated_after=3.1,
    recalled_before=[False] * 8,
    recalled_after=[True, True, *[False] * 6],
)
SICK = {
    "needles lost": {"recalled_after": [False] * 8},
    "irregular gains": {"held_out_after": [*[1.0] * 6, *[4.5] * 4]},
    "over-fitted to tasks": {"trained_after": [0.1] * 8, "held_out_after": [3.5] * 10},
    "forgetting": {"unrelated_after": 3.5},
    "known but not found": {"text_after": 0.1, "held_out_after": [3.9] * 10, "trained_before": [], "trained_after": []},
}


def seen(symptoms: Symptoms) -> set[str]:
    return {finding.signature for finding in judge_symptoms(symptoms) if finding.seen}


def test_a_healthy_adapter_shows_nothing() -> None:
    assert seen(HEALTHY) == set()
    assert [finding.signature for finding in judge_symptoms(HEALTHY)] == list(SIGNATURES)


@pytest.mark.parametrize("signature", SIGNATURES)
def test_each_failure_is_seen_alone(signature: str) -> None:
    assert seen(dataclasses.replace(HEALTHY, **SICK[signature])) == {signature}


def test_what_cannot_be_told_is_not_a_warning() -> None:
    empty = dataclasses.replace(
        HEALTHY,
        trained_before=[],
        trained_after=[],
        held_out_before=[],
        held_out_after=[],
        recalled_before=[],
        recalled_after=[],
    )
    assert {f.signature for f in judge_symptoms(empty) if f.seen is None} == set(SIGNATURES) - {"forgetting"}


def test_a_text_learnt_by_heart_from_segments_alone(tmp_path: Path) -> None:
    """The signature of our own trials, made for real: many epochs of segments, and no question finds them."""
    folder = save_model(tmp_path / "m", window=512)
    text = " ".join(
        f"On day {day} Mara {word} the bell of Orrin." for day, word in enumerate(["rang", "cast", "hid", "sold"] * 5)
    )
    settings = ["tasks.writer=none", "training.epochs=200", "training.learning_rate=5e-3", "adapter.kind=full"]
    config = load_config(None, [f"model.name={folder}", "model.dtype=float32", *settings])
    model = load_model(str(folder), config.model)
    adapter, _ = Library().absorb_once(Document("The bells", text), model, config)
    found = {finding.signature: finding for finding in diagnose(model, adapter, config)}
    assert found["known but not found"].figures["text_loss"] < 1.0
    assert found["over-fitted to tasks"].seen is None, "there were no tasks"


def test_answers_are_measured_as_if_each_stood_alone(tmp_path: Path) -> None:
    from liftlm.diagnosing import _task_nlls
    from liftlm.examples import answer_example

    model = load_model(str(save_model(tmp_path / "m", window=512)), load_config(None, ["model.dtype=float32"]).model)
    tasks = [Task(f"Who rang{' again' * n}?", "Mara" * (n + 1), "who", 0, 9) for n in range(11)]
    tasks.append(Task("word " * 600, "Mara", "who", 0, 9))  # fills the window
    found = _task_nlls(model, "The bells", tasks)
    assert math.isnan(found[-1])
    for task, loss in zip(tasks[:-1], found, strict=False):
        example = answer_example(model.tokenizer, "The bells", task.question, task.answer, model.window)
        assert example is not None
        with torch.no_grad():
            alone = model.loss_sum(torch.tensor([example.tokens]), torch.tensor([example.labels]))
        assert loss == pytest.approx(float(alone) / example.targets, rel=1e-4)


def test_ask_warns_in_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "m", window=512)
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"On day {day} Mara Quill rang {day + 2} bells by the lake." for day in range(1, 25)))
    command = ["ask", book, "Who rang?", "--model", folder, "--context", "none", "--set", "answering.max_new_tokens=4"]
    result = lift(capsys, *command, "--diagnose")
    assert result.code == 0 and "known failures seen" in result.err
    assert "Warning (needles lost): Without text in the window 0 of 8 details are recalled" in result.err
    assert "Warning" not in result.out
    plain = lift(capsys, *command)
    assert plain.out == result.out and "known failures" not in plain.err
    assert lift(capsys, *command, "--base", "--diagnose").code == 2
