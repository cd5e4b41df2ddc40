"""The store of absorbed documents: one folder each, found by content, model and recipe, written whole or not at all.

    $LIFT_HOME/library/<id>/      entry.json, document.txt, adapter/ (a PEFT folder), metrics.jsonl, checksums.json
    $LIFT_HOME/unfinished/<id>/   checkpoints of work that was interrupted
    $LIFT_HOME/locks/<id>.lock    held by the process that is absorbing

Knows nothing of questions or answers.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from liftlm.absorbing import Adapter, absorb, adapter_id
from liftlm.adapters import load_adapter, use_adapter
from liftlm.config import LiftConfig, parse_config
from liftlm.devices import describe_machine
from liftlm.documents import Document
from liftlm.errors import DamagedEntryError, EntryNotFoundError, LibraryBusyError, UnknownModelError
from liftlm.models import Model, load_model
from liftlm.storage import new_folder, remove_drafts, seal_problems, write_errors
from liftlm.training import OnStep, TrainingReport

_FORMAT = 1
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """What the library says of one absorbed document, without loading it."""

    id: str
    folder: Path
    card: dict[str, Any]  # entry.json

    @property
    def title(self) -> str:
        return str(self.card["title"])

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def library_home() -> Path:
    """LIFT_HOME, or the user's data folder."""
    home = os.environ.get("LIFT_HOME")
    return Path(home).expanduser() if home else platformdirs.user_data_path("liftlm")


class Library:
    """Absorbed documents below one folder."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or library_home()

    # --- finding ----------------------------------------------------------------------------------------------------------

    def entries(self) -> tuple[list[Entry], list[str]]:
        """All readable entries, newest first, and the ids of unreadable ones."""
        found, damaged = [], []
        for folder in sorted(self._shelf.glob("*")) if self._shelf.is_dir() else []:
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            try:
                found.append(Entry(folder.name, folder, _read_card(folder)))
            except DamagedEntryError:
                damaged.append(folder.name)
        return sorted(found, key=lambda entry: str(entry.card["created"]), reverse=True), damaged

    def find(self, prefix: str) -> Entry:
        """The one entry whose id begins so. Raises EntryNotFoundError, DamagedEntryError."""
        ids = [folder.name for folder in self._shelf.glob(f"{prefix}*")] if prefix.isalnum() and self._shelf.is_dir() else []
        if len(ids) != 1:
            what = f"{len(ids)} entries begin with '{prefix}'" if ids else f"No entry of the library has the id '{prefix}'"
            raise EntryNotFoundError(f"{what}.", "`lift library list` shows all ids.")
        return Entry(ids[0], self._shelf / ids[0], _read_card(self._shelf / ids[0]))

    def has(self, document: Document, model: Model, config: LiftConfig) -> bool:
        return (self._shelf / adapter_id(document, model, config)).is_dir()

    def problems(self, entry_id: str) -> list[str]:
        """What is wrong with an entry's files, in words."""
        return seal_problems(self._shelf / entry_id)

    def open(self, entry_id: str, model: Model) -> Adapter:
        """Puts a stored adapter on the model's network (off). Every file is checked first.

        Raises DamagedEntryError, and UnknownModelError where the entry was made from other base weights.
        """
        folder = self._shelf / entry_id
        problems = seal_problems(folder)
        if problems:
            raise _damaged(entry_id, problems)
        card = _read_card(folder)
        if card["model"]["fingerprint"] != model.fingerprint:
            raise UnknownModelError(
                f"Entry {entry_id} was absorbed by {card['model']['name']}, not by {model.name}.",
                f"Use --model {card['model']['name']}.",
            )
        load_adapter(model, entry_id, folder / "adapter")
        report = card["report"] | {"epoch_losses": tuple(card["report"]["epoch_losses"])}
        return Adapter(
            id=entry_id,
            document=self.document(entry_id),
            document_tokens=card["document"]["tokens"],
            segments=card["document"]["segments"],
            config=parse_config(card["config"], f"entry {entry_id}"),
            report=TrainingReport(**report),
        )

    def document(self, entry_id: str) -> Document:
        """The text as it was absorbed."""
        card = _read_card(self._shelf / entry_id)
        text = (self._shelf / entry_id / "document.txt").read_bytes().decode("utf-8")
        return Document(title=card["title"], text=text, source=card["source"])

    # --- changing ---------------------------------------------------------------------------------------------------------

    def absorb_once(
        self, document: Document, model: Model, config: LiftConfig, *, on_step: OnStep = lambda metrics: None
    ) -> tuple[Adapter, bool]:
        """The stored adapter of this document, model and recipe, or a new one that is stored; and whether it is new.

        Raises LibraryBusyError where another process is at it, DamagedEntryError (a damaged entry is never used, nor silently
        replaced), and what `absorb` raises; after an interruption the next call continues.
        """
        from accelerate import PartialState

        entry_id = adapter_id(document, model, config)
        if (self._shelf / entry_id).is_dir():
            return self.open(entry_id, model), False
        main = PartialState(cpu=model.device.type == "cpu").is_main_process  # one process of several keeps the books
        folder = self.home / "unfinished" / entry_id
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._shelf.mkdir(parents=True, exist_ok=True)
        lock = self._lock(entry_id) if main else None
        try:
            if main and (self._shelf / entry_id).is_dir():  # finished by another process a moment ago
                return self.open(entry_id, model), False
            adapter = absorb(document, model, config, folder=folder, on_step=on_step)
            if main:
                self._store(adapter, model, folder)
            PartialState().wait_for_everyone()
            return adapter, True
        finally:
            if lock is not None:
                lock.release()

    def remove(self, entry_id: str) -> None:
        """Deletes an entry and any unfinished work on it."""
        lock = self._lock(entry_id)
        try:
            gone = self._shelf / f".{entry_id}.removing"
            with write_errors(self._shelf):
                if (self._shelf / entry_id).exists():
                    os.rename(self._shelf / entry_id, gone)  # from here on it is no entry, even if deleting is interrupted
            shutil.rmtree(gone, ignore_errors=True)
            shutil.rmtree(self.home / "unfinished" / entry_id, ignore_errors=True)
        finally:
            lock.release()

    def _store(self, adapter: Adapter, model: Model, work: Path) -> None:
        with use_adapter(model, None):
            attached = model.adapters[adapter.id]
            with new_folder(self._shelf / adapter.id) as draft:
                (draft / "adapter").mkdir()
                attached.write(draft / "adapter", attached.tensors())
                (draft / "document.txt").write_bytes(adapter.document.text.encode("utf-8"))
                (draft / "entry.json").write_text(json.dumps(_card(adapter, model), indent=1), encoding="utf-8")
                if (work / "metrics.jsonl").exists():
                    shutil.copy(work / "metrics.jsonl", draft / "metrics.jsonl")
        shutil.rmtree(work, ignore_errors=True)

    def _lock(self, entry_id: str) -> filelock.BaseFileLock:
        path = self.home / "locks" / f"{entry_id}.lock"
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(path)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                raise LibraryBusyError(
                    f"Another process is absorbing this document right now (entry {entry_id}).",
                    "Wait until it is done; the same command then answers at once.",
                ) from None
        remove_drafts(self._shelf / entry_id)
        return lock

    @property
    def _shelf(self) -> Path:
        return self.home / "library"


def export(entry: Entry, target: Path, *, merged: bool = False, model: Model | None = None) -> None:
    """Writes an entry's adapter alone (a PEFT folder; full weights: one safetensors file) or, merged, a whole model folder.

    merged needs the base model (loaded here when not given, in float32 so that merging does not round) and writes what
    transformers and vLLM load as any model. Raises DamagedEntryError, NoWritePermissionError, DiskFullError.
    """
    problems = seal_problems(entry.folder)
    if problems:
        raise _damaged(entry.id, problems)
    if not merged:
        with new_folder(target, sealed=False) as draft:
            shutil.copytree(entry.folder / "adapter", draft, dirs_exist_ok=True)
        return
    if model is None:
        settings = parse_config(entry.card["config"], entry.id).model
        model = load_model(entry.card["model"]["name"], settings.model_copy(update={"dtype": "float32", "window": None}))
    library = Library(entry.folder.parent.parent)
    library.open(entry.id, model)
    with use_adapter(model, entry.id), new_folder(target, sealed=False) as draft:
        network = model.network
        if model.peft is not None:
            network = model.peft.merge_and_unload(adapter_names=[entry.id]) if _is_lora(entry) else model.peft.unload()
        network.save_pretrained(draft)
        model.tokenizer.save_pretrained(draft)


def _is_lora(entry: Entry) -> bool:
    return (entry.folder / "adapter" / "adapter_config.json").is_file()


def _card(adapter: Adapter, model: Model) -> dict[str, Any]:
    document = adapter.document
    return {
        "format": _FORMAT,
        "id": adapter.id,
        "title": document.title,
        "source": document.source,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "document": {
            "id": document.id,
            "characters": len(document.text),
            "tokens": adapter.document_tokens,
            "segments": adapter.segments,
        },
        "model": {"name": model.name, "folder": str(model.folder), "fingerprint": model.fingerprint, "window": model.window},
        "config": adapter.config.model_dump(mode="json"),
        "report": dataclasses.asdict(adapter.report),
        "machine": describe_machine(model.device, model.dtype),
    }


def _read_card(folder: Path) -> dict[str, Any]:
    try:
        card: dict[str, Any] = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
        if card["format"] > _FORMAT:
            raise ValueError("written by a newer version")
        for key in ("title", "created", "model", "document", "config", "report"):
            card[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder.name, [f"entry.json: {error}"]) from error
    return card


def _damaged(entry_id: str, problems: list[str]) -> DamagedEntryError:
    return DamagedEntryError(
        f"Entry {entry_id} of the library is damaged and is not used: {'; '.join(problems[:3])}.",
        f"`lift library remove {entry_id}` deletes it; the document can then be absorbed again.",
    )
