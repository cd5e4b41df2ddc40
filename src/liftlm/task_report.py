"""`lift tasks`: writes a document's tasks as absorbing would, and says what they are like."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from liftlm.config import LiftConfig
from liftlm.display import note
from liftlm.documents import Document
from liftlm.errors import EmptyDocumentError
from liftlm.shelf import Shelf
from liftlm.storage import canonical_json
from liftlm.tasks import Task, write_tasks_file
from liftlm.tasks.filters import filter_tasks, task_statistics
from liftlm.tasks.sentences import split_into_sentences

if TYPE_CHECKING:
    from liftlm.models import Model

_NOTE_SECONDS = 10.0  # between two words on how far it got


def report_tasks(
    document: Document, config: LiftConfig, load_model: Callable[[], Model], out: Path | None, sample: int
) -> None:
    """Prints statistics and `sample` tasks drawn at random; `out` gets all of them as JSON lines.

    The model is loaded only for the `self` writer. What a language model has written outlives an interruption, among the
    library's unfinished work. Raises what the writer raises, EmptyDocumentError.
    """
    from liftlm.writing import ArrivingTasks

    model = load_model() if config.tasks.writer == "self" else None
    slow = config.tasks.writer in ("self", "llm")
    folder = Shelf().home / "unfinished" / _mark(document, model, config) if slow else None
    tasks: list[Task] = []
    shown = time.monotonic()
    with ArrivingTasks(document, model, config, folder, None) as arriving:
        while not arriving.finished:
            tasks += arriving.poll(wait=True)
            if time.monotonic() - shown >= _NOTE_SECONDS:
                shown = time.monotonic()
                note(f"{len(tasks):,} tasks")
        dropped, notes = arriving.dropped, arriving.notes
    tasks.sort(key=lambda task: (task.start, task.end))
    if not tasks and folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    if not tasks and dropped:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()))
        raise EmptyDocumentError(
            f"Of the {dropped.total():,} tasks written about '{document.title}' none is of use: {listed}.",
            "Use a model that follows instructions, or --set tasks.writer=extractive.",
        )
    if not tasks:
        raise EmptyDocumentError(f"'{document.title}' gave no tasks.", "It needs sentences of at least four words.")
    print(_statistics(document, tasks))
    for line in notes:
        print(line)
    for task in random.Random(config.seed).sample(tasks, min(sample, len(tasks))):
        print(f"\n[{task.kind}] {task.question}\n  → {task.answer}")
    if out is not None:
        write_tasks_file(out, tasks)
        note(f"{len(tasks):,} tasks in {out}. Edit them, and train on them with `lift absorb … --tasks {out}`.")
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _statistics(document: Document, tasks: list[Task]) -> str:
    sentences = split_into_sentences(document.text)
    found = task_statistics(tasks, sentences)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.by_kind.items())
    _, dropped = filter_tasks(tasks, document.text)
    faults = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()))
    return (
        f"{len(tasks):,} tasks about {len(sentences):,} sentences ({found.covered:.0%} covered): {kinds}.\n"
        f"Questions of {found.question_words:.1f} words and answers of {found.answer_words:.1f} on average; "
        f"{found.distinct_questions:,} questions differ. What the filters would object to: {faults or 'nothing'}."
    )


def _mark(document: Document, model: Model | None, config: LiftConfig) -> str:
    """What an interrupted call must have in common with this one for its tasks to be taken up."""
    parts = [document.id, config.recipe()["tasks"], config.seed, model.fingerprint if model is not None else ""]
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]
