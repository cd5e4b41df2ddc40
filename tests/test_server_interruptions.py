"""Absorbing that is left in the middle of a step: what is learnt is the same bit for bit, and questions do not wait long."""

from __future__ import annotations

import collections
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import attention_that_runs, save_model
from fake_server import FakeServer, json_reply
from liftlm import Document, absorb, load_config, load_model, writing
from liftlm.absorbing import adapter_id
from liftlm.adapters import attach_adapter, remove_adapter, use_adapter
from liftlm.config import AdapterConfig
from liftlm.errors import InterruptedWorkError
from liftlm.pauses import pause, pausing, working_seconds
from liftlm.server.interruptions import Aside, pause_at_layers
from serving import QUICK, Running, number_in, serving, wait_for

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
    with attention_that_runs():
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
        assert disturbance.places["with gradients"] > (8 if case == "several rows a step" else 3)
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


# --- questions meanwhile ----------------------------------------------------------------------------------------------


def ask(server: Running, model: str = "tiny-llama", tokens: int = 3) -> str:
    reply = server.client.post("/v1/completions", json={"model": model, "prompt": "The bell", "max_tokens": tokens})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def state(server: Running, document: str) -> tuple[str, int]:
    card = server.client.get(f"/v1/documents/{document}").json()
    return card["state"], card["job"]["step"]


@pytest.mark.parametrize("writer", ["llm", "self"])
def test_questions_are_answered_while_a_language_model_writes_tasks(
    tmp_path: Path, quick_asking: None, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    """A server is silent until it is let go, and so long the model itself writes on and on."""
    folder = save_model(tmp_path / "tiny-llama", window=4096)  # in which the request for tasks has room
    free, write = threading.Event(), writing._say

    def write_on(*given: Any) -> list[str]:
        while not free.is_set():
            write(*given)
        return write(*given)

    monkeypatch.setattr(writing, "_say", write_on)

    def reply(body: dict[str, Any]) -> str:
        assert free.wait(60)
        return json_reply(body)

    with FakeServer(reply=reply) as other:
        settings = [
            f"tasks.writer={writer}", "tasks.per_sentence=3", "tasks.mix=1", f"tasks.llm.base_url={other.url}",
            "tasks.llm.model=w", "tasks.requests=16",
        ]  # fmt: skip
        with serving(folder, *settings, home=tmp_path / "home") as server:
            alone = ask(server)
            document = server.client.post("/v1/documents", json={"text": DOCUMENT.text, "title": "Corriden"}).json()[
                "id"
            ]
            wait_for(lambda: state(server, document)[0] == "absorbing")
            assert [ask(server) for _ in range(3)] == [alone] * 3 != [""] * 3
            assert state(server, document) == ("absorbing", 0)
            free.set()
            server.wait(document)
            assert server.client.get(f"/v1/documents/{document}/tasks").json()["total"] > 0 or writer == "self"
            refused = {"text": "x y z", "settings": {"tasks": {"writer": "self" if writer == "llm" else "llm"}}}
            assert server.client.post("/v1/documents", json=refused).status_code == 422


def test_a_writing_server_that_is_not_there_is_named_to_the_operator_alone(
    tiny_folder: Path, tmp_path: Path, quick_asking: None, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeServer() as other:
        url = other.url
    settings = ["tasks.writer=llm", f"tasks.llm.base_url={url}", "tasks.llm.model=w", "tasks.llm.attempts=1"]
    with serving(tiny_folder, *settings, home=tmp_path / "home") as server:
        document = server.client.post("/v1/documents", json={"text": DOCUMENT.text}).json()["id"]
        wait_for(lambda: state(server, document)[0] == "failed")
        told = server.client.get(f"/v1/documents/{document}").json()["job"]["error"]
    assert "writes tasks" in told and url not in told and url in caplog.text


def test_stopping_and_cancelling_do_not_wait_for_the_step(tmp_path: Path) -> None:
    """A step of one long row on a wider model, which takes far longer than a piece of it."""
    folder = save_model(tmp_path / "model", window=4096, width=512)
    settings = ["segments.segment_tokens=4000", "training.batch_tokens=4000", "training.micro_batch_tokens=4000"]
    text = " ".join(f"The ferryman number {n} rang the bell." for n in range(1500))
    with serving(folder, *settings, home=tmp_path / "home") as server:
        document = server.client.post("/v1/documents", json={"text": text}).json()["id"]
        wait_for(lambda: state(server, document)[1] > 0)
        ask(server, "model")
        page = server.client.get("/metrics").text
        step = number_in(page, "liftlm_training_step_seconds_sum") / number_in(
            page, "liftlm_training_step_seconds_count"
        )
        piece = number_in(page, "liftlm_absorbing_piece_seconds_sum") / number_in(
            page, "liftlm_absorbing_piece_seconds_count"
        )
        assert piece < step / 2, (piece, step)
        server.client.post(f"/v1/documents/{document}/cancel")
        before = number_in(server.client.get("/metrics").text, "liftlm_training_step_seconds_count")
        wait_for(lambda: not (server.service.library.home / "unfinished" / document).exists())
        assert number_in(server.client.get("/metrics").text, "liftlm_training_step_seconds_count") <= before + 1
