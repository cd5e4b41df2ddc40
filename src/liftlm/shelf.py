"""What the library holds on disk: entries are found, checked and removed here, without loading PyTorch.

    $LIFT_HOME/library/<id>/      entry.json, document.txt, adapter/ (a PEFT folder), metrics.jsonl, checksums.json
    $LIFT_HOME/unfinished/<id>/   checkpoints of work that was interrupted
    $LIFT_HOME/locks/<id>.lock    held by the process that is absorbing

Knows nothing of models; `library.Library` adds what needs one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from liftlm.documents import Document
from liftlm.errors import DamagedEntryError, EntryNotFoundError, LibraryBusyError
from liftlm.storage import file_lock, remove_drafts, seal_problems, write_errors

FORMAT = 1  # of entry.json


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
        return folder_bytes(self.folder)


def library_home() -> Path:
    """LIFT_HOME, or the user's data folder."""
    home = os.environ.get("LIFT_HOME")
    return Path(home).expanduser().absolute() if home else platformdirs.user_data_path("liftlm")


def folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process may be at work there
            total += path.stat().st_size if path.is_file() else 0
    return total


class Shelf:
    """The entries below one folder."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or library_home()
        self.path = self.home / "library"

    # --- finding -----------------------------------------------------------------------------------------------------

    def entries(self) -> tuple[list[Entry], list[str]]:
        """All readable entries, newest first, and the ids of unreadable ones."""
        found, damaged = [], []
        for name in self.matching(""):
            try:
                found.append(Entry(name, self.path / name, read_card(self.path / name)))
            except DamagedEntryError:
                damaged.append(name)
        return sorted(found, key=lambda entry: str(entry.card["created"]), reverse=True), damaged

    def unfinished(self) -> list[str]:
        """The ids of documents whose absorbing was interrupted, or is going on in another process."""
        entries = self.matching("")
        return [name for name in _folder_names(self.home / "unfinished") if name not in entries]

    def matching(self, prefix: str) -> list[str]:
        """The ids of all entries, damaged ones included, that begin so."""
        return [name for name in _folder_names(self.path) if name.startswith(prefix)]

    def find_id(self, prefix: str, *, unfinished: bool = False) -> str:
        """The one id that begins so, of an entry in whatever state; with `unfinished`, of interrupted work too."""
        ids = [*self.matching(prefix), *(self.unfinished() if unfinished else [])] if prefix else []
        ids = [name for name in ids if name.startswith(prefix)]
        if not ids:
            raise _not_there(prefix)
        if len(ids) > 1:
            raise EntryNotFoundError(
                f"{len(ids)} entries of the library begin with '{prefix}'.", "Give more of the id; `lift library list`."
            )
        return ids[0]

    def find(self, prefix: str) -> Entry:
        """The one entry whose id begins so. Raises EntryNotFoundError, DamagedEntryError."""
        entry_id = self.find_id(prefix)
        return Entry(entry_id, self.path / entry_id, read_card(self.path / entry_id))

    def problems(self, entry_id: str) -> list[str]:
        """What is wrong with an entry's files, in words."""
        return seal_problems(self.folder(entry_id))

    def document(self, entry_id: str) -> Document:
        """The text as it was absorbed. Raises DamagedEntryError."""
        folder = self.folder(entry_id)
        card = read_card(folder)
        check_files(folder, "document.txt")
        text = (folder / "document.txt").read_bytes().decode("utf-8")
        return Document(title=card["title"], text=text, source=card["source"])

    def folder(self, entry_id: str) -> Path:
        """Where an entry is. Raises EntryNotFoundError, also for a path, which is no id."""
        if entry_id not in self.matching(""):
            raise _not_there(entry_id)
        return self.path / entry_id

    # --- changing ----------------------------------------------------------------------------------------------------

    def remove(self, entry_id: str) -> None:
        """Deletes an entry, damaged or not, and any unfinished work on it.

        Raises EntryNotFoundError, LibraryBusyError, NoWritePermissionError.
        """
        if entry_id not in (*self.matching(""), *self.unfinished()):
            raise _not_there(entry_id)
        with self.lock(entry_id):
            gone = self.path / f".{entry_id}.removing"
            shutil.rmtree(gone, ignore_errors=True)  # of an earlier attempt that was interrupted
            with write_errors(self.path):
                if (self.path / entry_id).exists():
                    (self.path / entry_id).rename(gone)  # from here on it is no entry, even if this is interrupted
            shutil.rmtree(gone, ignore_errors=True)
            shutil.rmtree(self.home / "unfinished" / entry_id, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, entry_id: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Within the block no other process changes this entry. The lock of a killed process is free.

        Where another process holds it: raises LibraryBusyError, or with `on_wait` calls that once and waits (Ctrl-C ends it).
        """

        def refuse() -> None:
            raise LibraryBusyError(
                f"Another process is absorbing this document right now (entry {entry_id}).",
                "Wait until it is done; the same command then answers at once.",
            )

        with file_lock(self.home / "locks" / f"{entry_id}.lock", on_wait or refuse):
            with write_errors(self.path):
                remove_drafts(self.path / entry_id)
            yield


def check_files(folder: Path, only: str | None = None) -> None:
    """Raises DamagedEntryError unless an entry's files, or the `only` one, are as they were written."""
    problems = seal_problems(folder, only)
    if problems:
        raise _damaged(folder.name, problems)


def read_card(folder: Path) -> dict[str, Any]:
    """entry.json, of which the caller may rely on everything. Raises DamagedEntryError."""
    check_files(folder, "entry.json")
    card: dict[str, Any] = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
    if card["format"] > FORMAT:
        raise _damaged(folder.name, ["it was written by a newer version of liftlm"])
    return card


def _folder_names(parent: Path) -> list[str]:
    """The ids that have a folder there."""
    if not parent.is_dir():
        return []
    with write_errors(parent):
        return sorted(path.name for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def _not_there(entry_id: str) -> EntryNotFoundError:
    return EntryNotFoundError(f"The library has no entry '{entry_id}'.", "`lift library list` shows all ids.")


def _damaged(entry_id: str, problems: list[str]) -> DamagedEntryError:
    return DamagedEntryError(
        f"Entry {entry_id} of the library is damaged and is not used: {'; '.join(problems[:3])}.",
        f"`lift library remove {entry_id}` deletes it; the document can then be absorbed again.",
    )
