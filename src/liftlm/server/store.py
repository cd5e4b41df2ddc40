"""What the server remembers: keys, documents and their jobs, in one SQLite file (write-ahead log, whole after a crash).

An entry is what is absorbed, once, whoever uploaded it; a document is an entry as one owner sees it. Adapters are in the
library. Knows no HTTP and no model.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from liftlm.documents import Document
from liftlm.errors import DiskFullError, InvalidRequestError
from liftlm.storage import write_errors

State = Literal["queued", "absorbing", "ready", "failed", "cancelled"]
LOCAL = "local"  # the owner where no keys are asked for

_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (id TEXT PRIMARY KEY, name TEXT NOT NULL, hash BLOB NOT NULL UNIQUE, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS entries (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, source TEXT NOT NULL, text_id TEXT NOT NULL, text TEXT, settings TEXT NOT NULL,
    tokens INTEGER NOT NULL, priority INTEGER NOT NULL, job TEXT NOT NULL, state TEXT NOT NULL,
    step INTEGER NOT NULL DEFAULT 0, steps INTEGER NOT NULL DEFAULT 0, loss REAL, speed REAL, seconds_left REAL,
    error TEXT, queued REAL NOT NULL, started REAL, finished REAL);
CREATE TABLE IF NOT EXISTS documents (
    owner TEXT NOT NULL, id TEXT NOT NULL REFERENCES entries(id), alias TEXT, cancelled INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL, PRIMARY KEY (owner, id));
CREATE UNIQUE INDEX IF NOT EXISTS aliases ON documents (owner, alias) WHERE alias IS NOT NULL;
CREATE INDEX IF NOT EXISTS by_entry ON documents (id);
"""
_COLUMNS = """d.id, d.alias, d.created, d.cancelled, e.title, e.source, e.text_id, e.settings, e.tokens, e.job, e.state,
    e.step, e.steps, e.loss, e.speed, e.seconds_left, e.error, e.queued, e.started, e.finished"""


@dataclass(frozen=True)
class Record:
    """A document as its owner sees it. Times are seconds since 1970."""

    id: str
    alias: str | None
    created: float
    title: str
    source: str
    text_id: str
    settings: dict[str, Any]
    tokens: int
    job: str
    state: State
    step: int
    steps: int
    loss: float | None
    speed: float | None  # tokens a second
    seconds_left: float | None
    error: str | None
    queued: float
    started: float | None
    finished: float | None


@dataclass(frozen=True)
class NewEntry:
    """What is to be absorbed."""

    id: str
    document: Document
    settings: dict[str, Any]
    tokens: int
    priority: int
    job: str


class Store:
    """Any thread may call; each call is one transaction. Raises DiskFullError, NoWritePermissionError."""

    def __init__(self, path: Path) -> None:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
            except sqlite3.OperationalError as error:
                raise PermissionError(13, str(error)) from error
            path.chmod(0o600)
        self._database.row_factory = sqlite3.Row
        self._lock = threading.RLock()
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")  # what was answered with 202 is on the disk
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _run(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            try:
                return self._database.execute(statement, values).fetchall()
            except sqlite3.OperationalError as error:
                if "full" in str(error):
                    raise DiskFullError("No space is left for the server's database.", "Free some space.") from error
                raise

    # --- documents of an owner ----------------------------------------------------------------------------------------

    def documents(self, owner: str) -> list[Record]:
        """Newest first."""
        rows = self._run(
            f"SELECT {_COLUMNS} FROM documents d JOIN entries e USING (id) WHERE d.owner = ? AND e.state != 'deleting' "
            "ORDER BY d.created DESC, d.id",
            owner,
        )
        return [_record(row) for row in rows]

    def find(self, owner: str, name: str) -> Record | None:
        """By id or alias."""
        rows = self._run(
            f"SELECT {_COLUMNS} FROM documents d JOIN entries e USING (id) "
            "WHERE d.owner = ? AND e.state != 'deleting' AND (d.id = ? OR d.alias = ?)",
            *(owner, name, name),
        )
        return _record(rows[0]) if rows else None

    def count(self, owner: str) -> int:
        return int(self._run("SELECT count(*) AS n FROM documents WHERE owner = ?", owner)[0]["n"])

    def same(self, owner: str, text_id: str, settings: dict[str, Any]) -> Record | None:
        """A document of that owner with the same text and settings, under whatever title."""
        wanted = json.dumps(settings, sort_keys=True)
        found = [record for record in self.documents(owner) if record.text_id == text_id]
        return next((r for r in found if json.dumps(r.settings, sort_keys=True) == wanted), None)

    def add(self, owner: str, new: NewEntry, alias: str | None) -> bool:
        """Gives the owner this document; whether it has to be queued. Raises InvalidRequestError for an alias that is taken."""
        now = time.time()
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            before = self._run("SELECT state FROM entries WHERE id = ?", new.id)
            again = not before or before[0]["state"] in ("failed", "cancelled", "deleting")
            settings = json.dumps(new.settings, sort_keys=True)
            document = (new.document.title, new.document.source, new.document.id, new.document.text)
            values = (*document, settings, new.tokens, new.priority, new.job, "queued", now)
            if not before:
                self._run(
                    "INSERT INTO entries (id, title, source, text_id, text, settings, tokens, priority, job, state, queued) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    *(new.id, *values),
                )
            elif again:
                self._run(
                    "UPDATE entries SET title = ?, source = ?, text_id = ?, text = ?, settings = ?, tokens = ?, priority = ?, "
                    "job = ?, state = ?, queued = ?, error = NULL, step = 0, loss = NULL, started = NULL, finished = NULL "
                    "WHERE id = ?",
                    *(*values, new.id),
                )
            try:
                self._run(
                    "INSERT INTO documents (owner, id, alias, created) VALUES (?, ?, ?, ?) ON CONFLICT (owner, id) "
                    "DO UPDATE SET cancelled = 0, alias = coalesce(excluded.alias, alias)",
                    *(owner, new.id, alias, now),
                )
            except sqlite3.IntegrityError as error:
                raise InvalidRequestError(
                    f"Another document has the alias '{alias}'.", "Choose another one.", parameter="alias"
                ) from error
            return again

    def adopt(self, entry_id: str, document: dict[str, Any], settings: dict[str, Any], created: float) -> None:
        """Lists an entry of the library that was absorbed elsewhere. document: title, source, text_id, tokens."""
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._run(
                "INSERT OR IGNORE INTO entries (id, title, source, text_id, settings, tokens, priority, job, state, queued, "
                "finished) VALUES (?, ?, ?, ?, ?, ?, 0, ?, 'ready', ?, ?)",
                *(entry_id, document["title"], document["source"], document["text_id"]),
                *(json.dumps(settings, sort_keys=True), document["tokens"], f"job-{entry_id}", created, created),
            )
            if not self._run("SELECT 1 FROM documents WHERE id = ?", entry_id):
                self._run("INSERT INTO documents (owner, id, created) VALUES (?, ?, ?)", *(LOCAL, entry_id, created))

    def remove(self, owner: str, entry_id: str) -> bool:
        """Takes the document from its owner; whether nobody else has it, so that the entry must go (state "deleting")."""
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._run("DELETE FROM documents WHERE owner = ? AND id = ?", owner, entry_id)
            if self._run("SELECT 1 FROM documents WHERE id = ?", entry_id):
                return False
            self._run("UPDATE entries SET state = 'deleting', text = NULL WHERE id = ?", entry_id)
            return True

    def cancel(self, owner: str, entry_id: str) -> bool:
        """Marks the document as cancelled; whether nobody else waits for it, so that the job must end."""
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._run("UPDATE documents SET cancelled = 1 WHERE owner = ? AND id = ?", owner, entry_id)
            return not self._run("SELECT 1 FROM documents WHERE id = ? AND NOT cancelled", entry_id)

    # --- entries ------------------------------------------------------------------------------------------------------

    def state(self, entry_id: str) -> str | None:
        rows = self._run("SELECT state FROM entries WHERE id = ?", entry_id)
        return str(rows[0]["state"]) if rows else None

    def in_state(self, *states: str) -> list[str]:
        """Ids of entries, in the order in which they are to be absorbed."""
        marks = ", ".join("?" * len(states))
        rows = self._run(f"SELECT id FROM entries WHERE state IN ({marks}) ORDER BY priority, queued, id", *states)
        return [str(row["id"]) for row in rows]

    def to_absorb(self, entry_id: str) -> tuple[Document, dict[str, Any], int] | None:
        """Document, settings and priority of an entry; None where its text is not kept (any more)."""
        rows = self._run("SELECT title, text, source, settings, priority FROM entries WHERE id = ?", entry_id)
        if not rows or rows[0]["text"] is None:
            return None
        row = rows[0]
        return Document(row["title"], row["text"], row["source"]), json.loads(row["settings"]), int(row["priority"])

    def update(self, entry_id: str, state: str, only: Iterable[str], **columns: Any) -> bool:
        """A new state and columns with it, where the state is one of `only`; whether it was.

        The text of a ready one is in the library.
        """
        if state == "ready":
            columns["text"] = None
        names = ["state", *columns]
        assert all(name.isidentifier() for name in names)
        changes = ", ".join(f"{name} = ?" for name in names)
        before = tuple(only)
        rows = self._run(
            f"UPDATE entries SET {changes} WHERE id = ? AND state IN ({', '.join('?' * len(before))}) RETURNING id",
            *(state, *columns.values(), entry_id, *before),
        )
        return bool(rows)

    def forget(self, entry_ids: Iterable[str], *, only: str | None = None) -> None:
        """Nothing is left of these; of those in the state `only`, where it is given: another thread may have changed it."""
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            for entry_id in entry_ids:
                if only is not None and self.state(entry_id) != only:
                    continue
                self._run("DELETE FROM documents WHERE id = ?", entry_id)
                self._run("DELETE FROM entries WHERE id = ?", entry_id)

    # --- keys ---------------------------------------------------------------------------------------------------------

    def all_keys(self) -> list[tuple[str, str, bytes, float]]:
        """(id, name, hash, created)."""
        rows = self._run("SELECT id, name, hash, created FROM keys ORDER BY created")
        return [(row["id"], row["name"], row["hash"], row["created"]) for row in rows]

    def add_key(self, key_id: str, name: str, digest: bytes) -> None:
        self._run(
            "INSERT INTO keys (id, name, hash, created) VALUES (?, ?, ?, ?)", *(key_id, name, digest, time.time())
        )

    def remove_key(self, key_id: str) -> bool:
        """Its documents stay: `owners` tells of them."""
        return bool(self._run("DELETE FROM keys WHERE id = ? RETURNING id", key_id))

    def owners(self) -> dict[str, int]:
        """How many documents each owner has, of those who have any: keys, keys that were removed, and LOCAL."""
        rows = self._run("SELECT owner, count(*) AS n FROM documents GROUP BY owner ORDER BY owner")
        return {row["owner"]: row["n"] for row in rows}

    def give(self, owner: str, other: str) -> int:
        """All documents of one owner to another one; how many. An alias that the other one uses already is dropped."""
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            count = self.count(owner)
            taken = "SELECT alias FROM documents WHERE owner = ? AND alias IS NOT NULL"
            self._run(f"UPDATE documents SET alias = NULL WHERE owner = ? AND alias IN ({taken})", owner, other)
            self._run("UPDATE OR IGNORE documents SET owner = ? WHERE owner = ?", other, owner)
            self._run("DELETE FROM documents WHERE owner = ?", owner)  # both had them
            return count


def _record(row: sqlite3.Row) -> Record:
    values = dict(row)
    if values.pop("cancelled"):
        values["state"] = "cancelled"
    values["settings"] = json.loads(values["settings"])
    return Record(**values)
