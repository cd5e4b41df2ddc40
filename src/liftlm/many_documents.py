"""A folder of documents → a home of adapters: what each worker does, and what whoever gives out the documents does.

A worker trains in a scratch folder of its own machine and copies each checkpoint to the home, so that another worker, on any
machine, continues bit for bit. Entries are found by content, so nothing is absorbed twice, whatever was interrupted.
Knows nothing of Ray (`cluster`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import psutil

from liftlm.absorbing import adapter_id
from liftlm.adapters import remove_adapter, start_fingerprint
from liftlm.config import LiftConfig
from liftlm.documents import Document, load_document
from liftlm.errors import DocumentNotFoundError, StoreError
from liftlm.homes import Home, open_url
from liftlm.library import Library
from liftlm.models import Model, load_model
from liftlm.storage import canonical_json
from liftlm.training import StepMetrics
from liftlm.worklist import Crew, Event, Job, Outcome, Tally, Tell, outcome_of, work_off

_TELL_SECONDS = 1.0


@dataclass(frozen=True)
class Order:
    """What every worker is told at its start. home: URL; threads: of a worker, where `model.threads` says nothing."""

    config: LiftConfig
    home: str
    threads: int | None = None


@dataclass(frozen=True)
class Source:
    """A document that is still a file: its address, and its bytes where other machines cannot read that."""

    url: str
    content: bytes | None = None

    def read(self) -> Document:
        """Raises what `load_document` raises."""
        name = self.url.rpartition("/")[2]
        with tempfile.TemporaryDirectory(prefix="liftlm-") as folder:
            path = Path(folder) / name
            if self.content is not None:
                path.write_bytes(self.content)
            else:
                files, place = open_url(self.url)
                files.get_file(place, str(path))
            return load_document(path)


class AbsorbingWorker:
    """Holds the base model; absorbs what it is given (a `Source` or a `Document`) into the home."""

    def __init__(self, order: Order) -> None:
        model = order.config.model
        self.model = load_model(model.name, model.model_copy(update={"threads": model.threads or order.threads}))
        self.config, self.home = order.config, Home(order.home)
        self.library = Library(scratch_folder())

    def describe(self) -> str:
        return recipe_key(self.model, self.config)

    def work(self, payload: Source | Document, tell: Tell) -> Outcome:
        """result: id, title, whether it was absorbed now, and what training took. Never raises."""
        started = time.monotonic()
        try:
            document = payload.read() if isinstance(payload, Source) else payload
            entry_id = adapter_id(document, self.model, self.config)
            report = None if self.home.has_entry(entry_id) else self._absorb(document, entry_id, tell)
        except Exception as error:
            return outcome_of(error)
        row = {"id": entry_id, "title": document.title, "new": report is not None} | (report or {})
        return Outcome(row | {"seconds": time.monotonic() - started})

    def _absorb(self, document: Document, entry_id: str, tell: Tell) -> dict[str, Any]:
        self.home.fetch_unfinished(entry_id, self.library.home)
        watch = _Watch(self.home, self.library.home / "unfinished" / entry_id, tell)
        entry = self.library.path / entry_id
        try:
            adapter, _ = self.library.absorb_once(document, self.model, self.config, on_step=watch)
            self.home.store_entry(entry)
        finally:
            if entry_id in self.model.adapters:
                remove_adapter(self.model, entry_id)
            shutil.rmtree(entry, ignore_errors=True)
        self.home.drop_unfinished(entry_id)
        report = adapter.report
        return {
            "tokens": adapter.document_tokens,
            "steps": report.steps,
            "resumed_from": report.resumed_from,
            "training_seconds": report.seconds,
        }


class _Watch:
    """Hears of training steps: copies new checkpoints to the home, and tells how far it is."""

    def __init__(self, home: Home, work: Path, tell: Tell) -> None:
        self._home, self._work, self._tell = home, work, tell
        self._saved, self._told = max(work.glob("checkpoint-*"), default=None), 0.0

    def __call__(self, metrics: StepMetrics) -> None:
        newest = max(self._work.glob("checkpoint-*"), default=None)
        if newest != self._saved:  # written after the step before this one
            self._home.save_unfinished(self._work)
            self._saved = newest
        if time.monotonic() - self._told >= _TELL_SECONDS or metrics.step == metrics.steps:
            self._told = time.monotonic()
            self._tell(
                {"step": metrics.step, "steps": metrics.steps, "loss": metrics.loss, "left": metrics.seconds_left}
            )


def recipe_key(model: Model, config: LiftConfig) -> str:
    """What decides adapters besides the documents."""
    resolved = model.resolve(config)
    parts = [model.fingerprint, resolved.recipe(), start_fingerprint(resolved.adapter)]
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def scratch_folder() -> Path:
    """A folder for this process; those of this machine's processes that are gone are deleted."""
    parent, machine = platformdirs.user_cache_path("liftlm") / "workers", f"{platform.node()}-"  # homes may be shared
    with contextlib.suppress(OSError):
        for old in parent.iterdir():
            process = old.name.removeprefix(machine)
            if process != old.name and process.isdecimal() and not psutil.pid_exists(int(process)):
                shutil.rmtree(old, ignore_errors=True)
    return parent / f"{machine}{os.getpid()}"


# --- giving out the documents -----------------------------------------------------------------------------------------


def absorb_folder(
    folder: str,
    home: Home,
    crew: Crew,
    recipe: str,
    tries: int,
    on_end: Callable[[Job, Outcome], None],
    on_event: Callable[[Event, Tally], None],
) -> tuple[Tally, int]:
    """Has all documents below a folder (any URL) absorbed that are not yet, and notes each; also how many were done before.

    recipe: `recipe_key` of the workers. Raises DocumentNotFoundError for a folder that is not there.
    """
    done, skipped = home.done(), 0

    def missing() -> Iterator[Job]:
        nonlocal skipped
        for job in _documents(folder, recipe):
            if bytes.fromhex(job.key) in done:
                skipped += 1
            else:
                yield job

    def end(job: Job, outcome: Outcome) -> None:
        row = {"document": job.name, "recipe": recipe[:16], "tries": outcome.tries}
        if outcome.error:
            home.write_failure(job.key, row | {"error": outcome.error, "next_step": outcome.next_step})
        else:
            home.write_done(job.key, row | outcome.result)
        on_end(job, outcome)

    return work_off(crew, missing(), tries, end, on_event), skipped


def _documents(folder: str, recipe: str) -> Iterator[Job]:
    """Folder by folder; a file that changed is another document."""
    files, root = open_url(folder)
    root = root.rstrip("/")
    if not files.isdir(root):
        raise DocumentNotFoundError(f"There is no folder '{folder}'.", "Give a folder of documents, or its address.")
    local = Home(folder).folder is not None

    for parent, _, names in files.walk(root):
        inside = parent.rstrip("/").removeprefix(root).lstrip("/")
        if any(part.startswith(".") for part in inside.split("/")):
            continue
        for name in sorted(names):
            if name and not name.startswith("."):
                path = f"{parent.rstrip('/')}/{name}"
                shown = f"{inside}/{name}" if inside else name
                key = hashlib.sha256(f"{recipe}\0{shown}\0{_identity(files, path)}".encode()).hexdigest()[:32]
                yield Job(key, shown, lambda path=path: _source(files, path, local))  # type: ignore[misc]


def _identity(files: Any, path: str) -> str:
    """Of a file's content, without reading it: size and time, or what an object store says."""
    try:
        found = files.info(path)
    except (OSError, StoreError):
        return "unreadable"  # its worker will say why
    marks = ("size", "mtime", "ETag", "LastModified", "updated", "generation", "md5Hash", "content_md5", "created")
    return canonical_json(
        {mark: str(found[mark]) for mark in marks if mark in found and (mark != "created" or len(found) < 5)}
    )


def _source(files: Any, path: str, local: bool) -> Source:
    """With its bytes where the file is this machine's own."""
    if not local:
        return Source(files.unstrip_protocol(path))
    try:
        return Source(path, files.cat_file(path))
    except OSError:
        return Source(path)  # the worker meets the same failure and tells it
