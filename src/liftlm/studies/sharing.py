"""A study shared out over workers: one document and seed at a time, as `evaluation.sharing` does it. Knows nothing of Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from liftlm.config import LiftConfig
from liftlm.evaluation.benchmark import Item
from liftlm.evaluation.sharing import Lines, as_told, lines_about, lines_added
from liftlm.models import load_model
from liftlm.studies.bench import Bench
from liftlm.studies.registry import make_study
from liftlm.studies.study import Options
from liftlm.worklist import Job, Outcome, Tell, outcome_of


@dataclass(frozen=True)
class StudyOrder:
    """config: with the study's window; setup: as in the study's card; threads: where `model.threads` says nothing."""

    study: str
    config: LiftConfig
    options: Options
    items: tuple[Item, ...]
    setup: str
    threads: int


@dataclass(frozen=True)
class Measured:
    """What is to be measured: an item with a seed; known: what the study's folder has of it."""

    index: int
    seed: int
    known: Lines


class StudyingWorker:
    """Holds the base model; measures."""

    def __init__(self, order: StudyOrder) -> None:
        model = order.config.model
        self._order = order
        self._model = load_model(model.name, model.model_copy(update={"threads": model.threads or order.threads}))
        self._study = make_study(order.study)

    def describe(self) -> str:
        return self._model.fingerprint

    def work(self, payload: Measured, tell: Tell) -> Outcome:
        """result: the lines to add to the study's folder."""
        order = self._order
        try:
            with lines_added(payload.known) as (folder, added):
                bench = Bench(
                    *(self._model, self._model.resolve(order.config), order.options, list(order.items), folder),
                    order.setup,
                    on_step=lambda metrics: tell(as_told(metrics)),
                )
                self._study.measure(bench, payload.index, payload.seed)
                return Outcome(added())
        except Exception as error:
            return outcome_of(error)


def study_jobs(order: StudyOrder, folder: Path) -> Iterator[Job]:
    """Every document with every seed."""
    for index, item in enumerate(order.items):
        for seed in order.options.seeds:

            def payload(index: int = index, seed: int = seed, document_id: str = item.document.id) -> Measured:
                return Measured(index, seed, lines_about(folder, document_id))

            key = hashlib.sha256(f"{item.document.id} {seed}".encode()).hexdigest()
            yield Job(key, f"{item.document.title}, seed {seed}", payload)
