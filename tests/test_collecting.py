"""The collector of garbage waits for the command line's libraries only, and then works as ever."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from liftlm import collecting, load_model


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threshold = gc.get_threshold()
    yield
    collecting._usual = None
    gc.unfreeze()
    gc.set_threshold(*threshold)


def test_a_loaded_model_ends_the_waiting(tiny_folder: Path) -> None:
    usual = gc.get_threshold()
    collecting.collect_rarely()
    collecting.collect_rarely()
    assert gc.isenabled() and gc.get_threshold() > usual
    load_model(str(tiny_folder))
    assert gc.get_threshold() == usual and gc.get_freeze_count() > 1000


def test_a_program_that_uses_the_library_has_its_collector_for_itself(tiny_folder: Path) -> None:
    usual = gc.get_threshold()
    load_model(str(tiny_folder))
    assert gc.get_threshold() == usual and gc.get_freeze_count() == 0


def test_what_comes_after_is_collected(tiny_folder: Path) -> None:
    collecting.collect_rarely()
    load_model(str(tiny_folder))
    ring: list[object] = []
    ring.append(ring)
    del ring
    assert gc.collect() >= 1
