"""The store of absorbed documents: found by content, model and recipe, written whole or not at all.

`shelf.py` says what lies where on disk. Knows nothing of questions or answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from liftlm.absorbing import Adapter, absorb, adapter_id
from liftlm.adapters import load_adapter, use_adapter
from liftlm.config import LiftConfig, parse_config
from liftlm.devices import describe_machine
from liftlm.documents import Document
from liftlm.errors import UnknownModelError
from liftlm.models import Model
from liftlm.shelf import FORMAT, Shelf, check_files, read_card
from liftlm.storage import new_folder, write_errors
from liftlm.tasks import Task
from liftlm.training import OnStep, TrainingReport
from liftlm.writing import TASKS_FILE


class Library(Shelf):
    """Absorbed documents below one folder (default: LIFT_HOME, else the user's data folder)."""

    def has(self, document: Document, model: Model, config: LiftConfig, tasks: Sequence[Task] | None = None) -> bool:
        return (self.path / adapter_id(document, model, config, tasks)).is_dir()

    def open(self, entry_id: str, model: Model) -> Adapter:
        """Puts a stored adapter on the model's network (off). Every file is checked first.

        Raises DamagedEntryError, and UnknownModelError where the entry was made from other base weights.
        """
        folder = self.folder(entry_id)
        check_files(folder)
        card = read_card(folder)
        if card["model"]["fingerprint"] != model.fingerprint:
            raise _other_model(entry_id, str(card["model"]["name"]), model.name)
        load_adapter(model, entry_id, folder / "adapter")
        report = card["report"] | {"epoch_losses": tuple(card["report"]["epoch_losses"])}
        return Adapter(
            id=entry_id,
            document=self.document(entry_id),
            document_tokens=card["document"]["tokens"],
            segments=card["document"]["segments"],
            tasks=card["document"].get("tasks", 0),  # written before there were any
            config=parse_config(card["config"], f"entry {entry_id}"),
            report=TrainingReport(**report),
        )

    def absorb_once(
        self,
        document: Document,
        model: Model,
        config: LiftConfig,
        *,
        tasks: Sequence[Task] | None = None,
        on_step: OnStep = lambda metrics: None,
        on_wait: Callable[[], None] | None = None,
    ) -> tuple[Adapter, bool]:
        """The stored adapter of this document, model and recipe, or a new one that is stored; and whether it is new.

        Raises LibraryBusyError where another process is at it (with `on_wait`, calls that and waits for the entry),
        DamagedEntryError (a damaged entry is never used, nor silently replaced), and what `absorb` raises; after an interruption
        the next call continues.
        """
        from accelerate import PartialState

        entry_id = adapter_id(document, model, config, tasks)
        if (self.path / entry_id).is_dir():
            return self.open(entry_id, model), False
        main = PartialState(cpu=model.device.type == "cpu").is_main_process  # one process of several keeps the books
        work = self.home / "unfinished" / entry_id
        with self.lock(entry_id, on_wait) if main else contextlib.nullcontext():
            try:
                if _main_says((self.path / entry_id).is_dir()):  # finished by another program a moment ago
                    return self.open(entry_id, model), False
                with write_errors(work):
                    work.mkdir(parents=True, exist_ok=True)
                    self.path.mkdir(parents=True, exist_ok=True)
                adapter = absorb(document, model, config, tasks=tasks, folder=work, on_step=on_step)
                with use_adapter(model, None):
                    tensors = model.adapters[adapter.id].tensors()  # which all processes put together
                    if main:
                        self._store(adapter, model, work, tensors)
                PartialState().wait_for_everyone()
                return adapter, True
            finally:
                with contextlib.suppress(OSError):
                    work.rmdir()  # where it failed before there was anything to keep

    def _store(self, adapter: Adapter, model: Model, work: Path, tensors: dict[str, Tensor]) -> None:
        with new_folder(self.path / adapter.id) as draft:
            (draft / "adapter").mkdir()
            model.adapters[adapter.id].write(draft / "adapter", tensors)
            (draft / "document.txt").write_bytes(adapter.document.text.encode("utf-8"))
            (draft / "entry.json").write_text(json.dumps(_card(adapter, model), indent=1), encoding="utf-8")
            for kept in ("metrics.jsonl", TASKS_FILE):
                if (work / kept).exists():
                    shutil.copy(work / kept, draft / kept)
        shutil.rmtree(work, ignore_errors=True)


def _main_says(flag: bool) -> bool:
    """What the main process of several sees: they must all go the same way, or they wait for each other."""
    from accelerate.utils import broadcast_object_list

    said = [flag]
    broadcast_object_list(said)  # nothing to do for a process alone
    return said[0]


def _card(adapter: Adapter, model: Model) -> dict[str, Any]:
    document = adapter.document
    return {
        "format": FORMAT,
        "id": adapter.id,
        "title": document.title,
        "source": document.source,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "document": {
            "id": document.id,
            "characters": len(document.text),
            "tokens": adapter.document_tokens,
            "segments": adapter.segments,
            "tasks": adapter.tasks,
        },
        "model": {
            "name": model.name,
            "folder": str(model.folder),
            "fingerprint": model.fingerprint,
            "window": model.window,
        },
        "config": adapter.config.model_dump(mode="json"),
        "report": dataclasses.asdict(adapter.report),
        "machine": describe_machine(model.device, model.dtype),
    }


def _other_model(entry_id: str, made_by: str, given: str) -> UnknownModelError:
    if made_by == given:
        return UnknownModelError(
            f"Entry {entry_id} was absorbed by {made_by} when that model had other weights.",
            "Absorb the document again, or bring the earlier weights back.",
        )
    return UnknownModelError(f"Entry {entry_id} was absorbed by {made_by}, not by {given}.", f"Use --model {made_by}.")
