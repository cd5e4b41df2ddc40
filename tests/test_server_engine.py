"""Adapters come and go within a budget and never stay on by mistake; the engine outlives what goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from liftlm import Document, load_config, load_model
from liftlm.adapters import use_adapter
from liftlm.errors import ConfigError, NotReadyError
from liftlm.library import Library
from liftlm.sequences import Sampling
from liftlm.server.answers import Answers, Asked, Ended, Failed, Piece
from liftlm.server.engine import Engine
from liftlm.server.metrics import Metrics
from liftlm.server.opened import OpenedEntries
from liftlm.server.prompting import text_prompt
from serving import QUICK


@pytest.fixture
def made(tiny_folder: Path) -> tuple[Any, Library, list[str], list[Any]]:
    """A model, a library with three entries, and a freshly loaded model."""
    config = load_config(
        None, [f"model.name={tiny_folder}", *QUICK, "training.learning_rate=0.02", "training.epochs=3"]
    )
    model, library = load_model(str(tiny_folder), config.model), Library()
    ids = [
        library.absorb_once(Document(name, f"{name} rang {name[::-1]}. " * 30), model, config)[0].id for name in "abc"
    ]
    return load_model(str(tiny_folder), config.model), library, ids, [config.server]


def ask(entry: str | None, told: list[Any], tokens: int = 6) -> Asked:
    return Asked(entry, 1.0, text_prompt("The bell of the", tokens), Sampling(tokens, answer=False), told.append)


def text(told: list[Any]) -> str:
    assert isinstance(told[-1], Ended), told
    return "".join(event.text for event in told if isinstance(event, Piece))


def test_adapters_come_and_go_and_are_never_mixed_up(made: Any) -> None:
    model, library, ids, (config,) = made
    answers: Any = None
    opened = OpenedEntries(model, library, 0, lambda entry: answers.uses(entry), lambda: answers.pause())
    answers = Answers(model, opened, config, Metrics())

    def answer(*entries: str | None) -> list[str]:
        told: list[list[Any]] = [[] for _ in entries]
        for entry, events in zip(entries, told, strict=True):
            answers.add(ask(entry, events))
        while answers.busy:
            answers.turn()
        return [text(events) for events in told]

    alone = {entry: answer(entry)[0] for entry in (*ids, None)}
    assert len(set(alone.values())) == 4
    assert len(model.adapters.keys() & set(ids)) == 1  # nothing more fits
    order = [ids[0], None, ids[1], ids[0], ids[2], None, ids[1], ids[1], ids[2], ids[0]] * 2
    assert answer(*order) == [alone[entry] for entry in order]
    assert opened.misses > 4 and len(model.adapters.keys() & set(ids)) == 1
    # one that is on when it is taken away, and opened again, is on again when it is asked
    (there,) = model.adapters.keys() & set(ids)
    answer(there)
    opened.forget(there)
    assert answer(there) == [alone[there]]
    answers.pause()
    with use_adapter(model, None):
        assert answer(None) == [alone[None]]


def test_a_cancelled_question_leaves_no_trace(made: Any) -> None:
    model, library, ids, (config,) = made
    answers: Any = None
    opened = OpenedEntries(model, library, 10**9, lambda entry: answers.uses(entry), lambda: answers.pause())
    answers = Answers(model, opened, config, Metrics())
    told: list[list[Any]] = [[], [], []]
    asked = [ask(ids[0], events, 40) for events in told]
    for one in asked:
        answers.add(one)
    asked[2].cancelled = True  # waits
    answers.turn()
    answers.turn()
    asked[0].cancelled = True  # is being answered
    while answers.busy:
        answers.turn()
    assert isinstance(told[1][-1], Ended) and not told[2]
    assert not isinstance(told[0][-1], Ended | Failed) and not answers.uses(ids[0])


def test_a_model_that_cannot_be_loaded_is_a_failure_and_not_a_wait(tmp_path: Path) -> None:
    def load() -> Any:
        raise ConfigError("No.", "")

    watch: Any = None
    engine = Engine(load, Library(tmp_path), load_config(None, []), Metrics(), watch)
    engine.start()
    assert engine.loaded.wait(10) and isinstance(engine.failure, ConfigError) and not engine.ready
    with pytest.raises(NotReadyError):
        engine.ask([])
    with pytest.raises(NotReadyError):
        engine.call(lambda model: None).result(1)
    engine.stop()
