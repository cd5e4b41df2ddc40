"""Absorbing that is left in the middle of a step: what is learnt is the same bit for bit, and questions do not wait long."""

from __future__ import annotations

import collections
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import save_model
from liftlm import Document, absorb, load_config, load_model
from liftlm.absorbing import adapter_id
from liftlm.adapters import attach_adapter, remove_adapter, use_adapter
from liftlm.config import AdapterConfig
from liftlm.errors import InterruptedWorkError
from liftlm.pauses import pause, pausing, working_seconds
from liftlm.server.interruptions import Aside, pause_at_layers
from serving import QUICK

DOCUMENT = Document("Corriden", "The ferryman of Corriden rang the bell on 3 May, and nobody answered. " * 8)
CASES: dict[str, tuple[str, list[str]]] = {
    "lora": ("llama", ["adapter.dropout=0.1"]),
    "several rows a step": ("qwen3", ["training.batch_tokens=400", "training.micro_batch_tokens=100"]),
    "checkpointing": ("llama", ["training.gradient_checkpointing=true", "adapter.dropout=0.1"]),
    "dora": ("gemma2", ["adapter.dora=true"]),
    "pissa": ("gpt2", ["adapter.initialization=pissa"]),
    "gated-memory": ("llama", ["adapter.kind=gated-memory"]),
    "prefix": ("llama", ["adapter.kind=prefix"]),
    "full": ("llama-untied", ["adapter.kind=full", "training.learning_rate=0.0001"]),
    "full, bfloat16": ("llama", ["adapter.kind=full", "model.dtype=bfloat16", "training.learning_rate=0.0001"]),
    "teacher": ("llama", ["tasks.writer=extractive", "tasks.teacher_weight=0.5", "tasks.per_sentence=1"]),
    "self": ("llama", ["tasks.writer=self", "tasks.per_sentence=1", "tasks.requests=3"]),
}


class Disturbance:
    """In every pause, all that answering does to a network, and more."""

    def __init__(self, model: Any, entry: str) -> None:
        self.model, self.entry = model, entry
        self.aside = Aside(model, entry)
        self.expected: Any = None
        self.places: collections.Counter[str] = collections.Counter()
        named = any(name.endswith("q_proj") for name, _ in model.network.named_modules())
        self.other = AdapterConfig(rank=2, target_modules=("q_proj",) if named else "all-linear")
        attach_adapter(model, "other", self.other, 1)

    def __call__(self) -> None:
        attached = self.model.adapters.get(self.entry)
        parameters = attached.parameters().values() if attached else []
        self.places["with gradients" if any(p.grad is not None for p in parameters) else "without"] += 1
        with self.aside.set_aside(), use_adapter(self.model, None):
            torch.rand(3)
            logits = self.model.network(torch.tensor([[5, 6, 7, 8]])).logits
            self.expected = logits if self.expected is None else self.expected
            assert torch.equal(logits, self.expected)  # and the base model answers as it always does
            if sum(self.places.values()) % 7 == 0:  # it comes and goes
                remove_adapter(self.model, "other")
                attach_adapter(self.model, "other", self.other, 1)
            with use_adapter(self.model, "other"):
                self.model.network(torch.tensor([[5, 6, 7, 8]]))


def learn(folder: Path, settings: list[str], disturbed: bool, work: Path | None = None) -> tuple[dict[str, Any], Any]:
    config = load_config(None, [f"model.name={folder}", *QUICK, "training.epochs=2", *settings])
    model = load_model(str(folder), config.model)
    entry = adapter_id(DOCUMENT, model, config)
    disturbance = Disturbance(model, entry)
    if disturbed:
        with pausing(disturbance), pause_at_layers(model.network):
            absorb(DOCUMENT, model, config, folder=work)
    else:
        absorb(DOCUMENT, model, config, folder=work)
    return {name: tensor.clone() for name, tensor in model.adapters[entry].tensors().items()}, disturbance


@pytest.mark.parametrize("case", CASES)
def test_what_is_learnt_is_the_same_bit_for_bit(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    folder = save_model(tmp_path / "model", family, window=512 if "writer" in str(settings) else 256)
    plain, _ = learn(folder, settings, False)
    disturbed, disturbance = learn(folder, settings, True)
    assert disturbance.places["without"] > 8
    if case in ("several rows a step", "full", "lora"):  # in backward passes, too, or between two of them
        assert disturbance.places["with gradients"] > 8
    assert plain.keys() == disturbed.keys()
    assert [name for name in plain if not torch.equal(plain[name], disturbed[name])] == []


@pytest.mark.parametrize("at", [3, 9, 14, 22])
def test_leaving_in_the_middle_of_a_step_keeps_the_steps_before_it(tiny_folder: Path, tmp_path: Path, at: int) -> None:
    settings = ["training.epochs=4", "adapter.dropout=0.1"]
    plain, _ = learn(tiny_folder, settings, False)
    config = load_config(None, [f"model.name={tiny_folder}", *QUICK, *settings])
    model = load_model(str(tiny_folder), config.model)
    count = 0

    def leave() -> None:
        nonlocal count
        count += 1
        if count == at:
            raise InterruptedWorkError("The server is stopping.", "")

    with pytest.raises(InterruptedWorkError), pausing(leave), pause_at_layers(model.network):
        absorb(DOCUMENT, model, config, folder=tmp_path / "work")
    again, _ = learn(tiny_folder, settings, True, tmp_path / "work")
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.network.modules())


def test_pauses_are_this_threads_and_no_work() -> None:
    told: list[str] = []

    def rest() -> None:
        told.append(threading.current_thread().name)
        pause()  # not again
        time.sleep(0.05)

    began, worked = time.monotonic(), working_seconds()
    with pausing(rest):
        other = threading.Thread(target=pause)
        other.start()
        other.join()
        pause()
        with pausing(None):
            pause()
        pause()
    pause()
    assert told == [threading.current_thread().name] * 2
    passed, worked = time.monotonic() - began, working_seconds() - worked
    assert passed >= 0.1 and worked <= passed - 0.1
