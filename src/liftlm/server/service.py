"""The server without HTTP: documents of owners, their jobs, and the engine that does the work.

What it promises: an upload that was accepted is absorbed, also after `kill -9`; what is listed is there; one owner never sees
another's documents. Knows no routes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import json
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from liftlm.absorbing import adapter_id
from liftlm.config import LiftConfig, parse_config
from liftlm.documents import Document
from liftlm.errors import (
    ConfigError,
    EntryNotFoundError,
    InvalidRequestError,
    LibraryBusyError,
    LiftError,
    NotReadyError,
    TooLargeError,
    WrongStateError,
)
from liftlm.library import Library
from liftlm.models import Model, load_model
from liftlm.prompts import answer_stops
from liftlm.server.engine import Engine, Job
from liftlm.server.jobs import Jobs
from liftlm.server.limits import Rate
from liftlm.server.metrics import Metrics
from liftlm.server.store import LOCAL, NewEntry, Record, Store
from liftlm.server.uploads import CHARACTERS_A_TOKEN
from liftlm.shelf import Entry
from liftlm.writing import TASKS_FILE

log = logging.getLogger("liftlm.server")
_LOOK_SECONDS = 2.0  # between two looks for entries that the command line added
_GROUPS = ("segments", "tasks", "adapter", "training", "seed")  # what a client may set


@dataclasses.dataclass(frozen=True)
class Upload:
    """A document as a client gives it. settings: groups of the config tree."""

    document: Document
    alias: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    priority: int = 0


class _Reader:
    """A tokenizer of its own, as two threads must not use one at once."""

    def __init__(self, model: Model) -> None:
        self.model, self.lock = dataclasses.replace(model, tokenizer=copy.deepcopy(model.tokenizer)), threading.Lock()


class Service:
    """config: the operator's settings; keys_required: whether nobody is served without a key."""

    def __init__(self, config: LiftConfig, *, home: Path | None = None, keys_required: bool = False) -> None:
        self.config, self.library, self.metrics = config, Library(home), Metrics()
        self.store = Store(self.library.home / "server.sqlite")
        self.keys_required = keys_required or bool(self.store.all_keys())
        self.jobs = Jobs(self.store, self._discard_work)
        self.engine = Engine(self._load, self.library, config, self.metrics, self.jobs)
        self.questions = Rate(config.server.requests_per_minute, 60, "requests a minute")
        self.uploads = Rate(config.server.uploads_per_hour, 3600, "uploads an hour")
        self.started = time.time()
        self.answer_stops: tuple[str, ...] = ()  # texts that end an answer of this model
        self._readers: tuple[_Reader, _Reader] | None = (
            None  # of uploads, which takes seconds for a long one, and of replies
        )
        self._looked = 0.0
        self._ready = threading.Event()

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self, on_failure: Callable[[BaseException], None] = lambda error: None) -> None:
        """Loads the model and takes up what was left undone; both while requests may already come."""
        self.engine.start()

        def begin() -> None:
            self.engine.loaded.wait()
            try:
                if self.engine.failure is not None:
                    raise self.engine.failure
                self._take_up()
                self._ready.set()
            except BaseException as error:
                on_failure(error)

        threading.Thread(target=begin, name="liftlm-start", daemon=True).start()

    def stop(self) -> None:
        self.engine.stop()
        self.store.close()

    @property
    def ready(self) -> bool:
        return self._ready.is_set() and self.engine.ready

    def wait_until_ready(self, seconds: float) -> bool:
        return self._ready.wait(seconds)

    def _load(self) -> Model:
        model = load_model(self.config.model.name, self.config.model)
        self._readers = (_Reader(model), _Reader(model))
        self.answer_stops = tuple(answer_stops(model.tokenizer))
        return model

    @contextlib.contextmanager
    def _tokenizer(self, *, of_replies: bool = False) -> Iterator[Model]:
        """The model's tokenizer and identity, for other threads than the engine's."""
        if self._readers is None or not self.ready:
            raise NotReadyError("The model is still being loaded.", "Try again in a few seconds.")
        reader = self._readers[of_replies]
        with reader.lock:
            yield reader.model

    @property
    def base_name(self) -> str:
        """What clients call the base model; never a path of this machine."""
        return (
            Path(self.config.model.name).name if Path(self.config.model.name).is_absolute() else self.config.model.name
        )

    def decode(self, tokens: list[int]) -> str:
        with self._tokenizer(of_replies=True) as reader:
            return str(reader.decode(tokens))

    def token_texts(self, tokens: list[int]) -> list[str]:
        """Each token alone; one that is no whole character as the tokenizer's own name for it."""
        with self._tokenizer(of_replies=True) as reader:
            tokenizer: Any = reader.tokenizer
            texts = [str(tokenizer.decode([token])) for token in tokens]
            names = tokenizer.convert_ids_to_tokens(tokens)
        return [str(name) if "\ufffd" in text else text for text, name in zip(texts, names, strict=True)]

    # --- documents ----------------------------------------------------------------------------------------------------

    def upload(self, owner: str, given: Upload) -> Record:
        """Queues a document, unless the owner has it already. Raises TooLargeError, InvalidRequestError, ConfigError."""
        document, limits = given.document, self.config.server
        config, settings = self._settings(given.settings)
        if len(document.text) > limits.document_tokens * CHARACTERS_A_TOKEN:
            raise _too_long(limits.document_tokens)
        with self._tokenizer() as reader:
            tokens = len(reader.encode(document.text))
            entry_id = adapter_id(document, reader, config)
        if tokens > limits.document_tokens:
            raise _too_long(limits.document_tokens)
        known = self.store.same(owner, document.id, settings)
        if known is not None:
            if known.alias is not None and given.alias not in (None, known.alias):
                raise InvalidRequestError(
                    f"This document is here already, as '{known.alias}'.", "Delete it first.", parameter="alias"
                )
            entry_id, document = known.id, Document(known.title, document.text, known.source)
        elif self.store.count(owner) >= limits.documents_per_key:
            raise TooLargeError(f"You have {limits.documents_per_key} documents already.", "Delete some first.")
        if given.alias is not None:
            self._check_alias(given.alias)
        if not self._stored(entry_id):  # its files were taken away: it is absorbed again
            self.store.forget([entry_id], only="ready")
        job = f"job-{secrets.token_hex(8)}"
        new = NewEntry(entry_id, document, settings, tokens, given.priority, job)
        if self.store.add(owner, new, given.alias):
            self.engine.absorb(Job(entry_id, document, config, given.priority))
        return self.get(owner, entry_id)

    def documents(self, owner: str) -> list[Record]:
        """Newest first; only what is there."""
        self._look(owner)
        records = self.store.documents(owner)
        gone = [record.id for record in records if record.state == "ready" and not self._stored(record.id)]
        self.store.forget(gone, only="ready")
        return [record for record in records if record.id not in gone]

    def get(self, owner: str, name: str) -> Record:
        """By id or alias. Raises EntryNotFoundError, also for another owner's."""
        record = self.store.find(owner, name)
        if record is None:
            self._look(owner)
            record = self.store.find(owner, name)
        if record is not None and record.state == "ready" and not self._stored(record.id):
            self.store.forget([record.id], only="ready")
            record = None
        if record is None:
            raise EntryNotFoundError(f"There is no document '{name[:200]}'.", "`GET /v1/documents` lists yours.")
        return record

    def cancel(self, owner: str, name: str) -> Record:
        """Ends a job that waits or runs. Raises WrongStateError for others."""
        record = self.get(owner, name)
        if record.state not in ("queued", "absorbing"):
            raise WrongStateError(f"The document is {record.state}; there is nothing to cancel.", "")
        if self.store.cancel(owner, record.id):
            self.store.update(record.id, "cancelled", ("queued", "absorbing"), finished=time.time())
            self.engine.cancel(record.id)
        self.jobs.changed(record.id)
        return self.get(owner, record.id)

    def delete(self, owner: str, name: str) -> str:
        """Takes the document away; its files and memory follow at the engine's next step. Returns its id."""
        record = self.get(owner, name)
        if self.store.remove(owner, record.id):
            self.engine.cancel(record.id)
            self._clean_up(record.id)
        self.jobs.changed(record.id)
        return record.id

    def ready_entry(self, owner: str, name: str) -> str:
        """The id of a document that can be asked. Raises EntryNotFoundError, WrongStateError."""
        record = self.get(owner, name)
        if record.state != "ready":
            done = f" ({record.step / record.steps:.0%})" if record.state == "absorbing" and record.steps else ""
            raise WrongStateError(
                f"The document '{name}' is {record.state}{done} and cannot be asked yet.",
                "Its events tell when it is ready.",
            )
        return record.id

    def losses(self, record: Record) -> list[dict[str, Any]]:
        """Step and loss of every step so far."""
        path = self._folder(record) / "metrics.jsonl"
        with contextlib.suppress(OSError):
            return [
                json.loads(line)
                for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
                if line.endswith("\n")
            ]
        return []

    def tasks(self, record: Record) -> tuple[list[dict[str, Any]], str]:
        """The tasks that were written from a document, and its text."""
        path = self._folder(record) / TASKS_FILE
        rows: list[dict[str, Any]] = []
        with contextlib.suppress(OSError):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return rows, self.library.document(record.id).text if record.state == "ready" else ""

    def take_in(self, entry_id: str) -> None:
        """Lists an entry that was put into the library a moment ago. Raises NotReadyError, DamagedEntryError."""
        self._adopt(self.library.find(entry_id))

    def let_go(self, entry_id: str) -> None:
        """Frees the memory and the files of an entry that is kept elsewhere; nobody may be asking it."""
        self.store.forget([entry_id])
        self.engine.forget(entry_id)
        shutil.rmtree(self.library.path / entry_id, ignore_errors=True)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _folder(self, record: Record) -> Path:
        place = "library" if self._stored(record.id) else "unfinished"
        return self.library.home / place / record.id

    def _stored(self, entry_id: str) -> bool:
        return (self.library.path / entry_id).is_dir()

    def _check_alias(self, alias: str) -> None:
        if alias == self.base_name or (len(alias) == 16 and not set(alias) - set("0123456789abcdef")):
            raise InvalidRequestError(f"'{alias}' cannot be an alias.", "Choose another one.", parameter="alias")

    def _settings(self, given: dict[str, Any]) -> tuple[LiftConfig, dict[str, Any]]:
        """The operator's recipe with what the client changes, and the changes as they are compared."""
        tree = self.config.model_dump(mode="json")
        for group, values in given.items():
            if group not in _GROUPS or (group != "seed" and not isinstance(values, dict)):
                raise ConfigError(
                    f"'{group[:50]}' cannot be set for a document.", f"Groups of settings are {', '.join(_GROUPS)}."
                )
            if group == "segments":
                tree[group] = {k: v for k, v in tree[group].items() if k == "segment_tokens"}
            tree[group] = values if group == "seed" else tree[group] | values
        config = parse_config(tree, "the document's settings")
        writers = {
            "extractive",
            "none",
            self.config.tasks.writer,
        }  # another server's address, or its bill, is no client's matter
        if config.tasks.writer not in writers or config.tasks.llm != self.config.tasks.llm:
            raise ConfigError(f"Tasks of this server's documents are written by {' or '.join(sorted(writers))}.", "")
        if config.adapter.kind != self.config.adapter.kind or config.adapter.rank > max(256, self.config.adapter.rank):
            raise ConfigError("Another kind of adapter, or a rank over 256, is not for clients to set.", "")
        if config.training.epochs > self.config.server.document_epochs or config.tasks.per_sentence > 20:
            most = self.config.server.document_epochs
            raise ConfigError(f"More than {most} epochs, or 20 tasks a sentence, are not for clients to set.", "")
        if config.training.total_tokens != self.config.training.total_tokens:
            raise ConfigError("training.total_tokens is not for clients to set.", "Set training.epochs.")
        return config, given

    def _look(self, owner: str) -> None:
        """Lists what `lift absorb` put into the library, where there are no keys that would decide whose it is."""
        if owner != LOCAL or time.monotonic() - self._looked < _LOOK_SECONDS or not self.ready:
            return
        self._looked = time.monotonic()
        for entry in self.library.entries()[0]:
            self._adopt(entry)

    def _adopt(self, entry: Entry) -> None:
        with self._tokenizer() as reader:
            config, fingerprint = reader.resolve(self.config), reader.fingerprint
        if entry.card["model"]["fingerprint"] == fingerprint and self.store.state(entry.id) is None:
            self.store.adopt(entry.id, *_adopted(entry, config))

    def _take_up(self) -> None:
        """After a start: deletes what was being deleted, forgets what is gone, queues what is not absorbed."""
        for entry_id in self.store.in_state("deleting"):
            self._clean_up(entry_id)
        self.store.forget([entry_id for entry_id in self.store.in_state("ready") if not self._stored(entry_id)])
        for entry_id in self.store.in_state("queued", "absorbing"):
            kept = self.store.to_absorb(entry_id)
            if kept is None:
                self.store.forget([entry_id])
                continue
            document, settings, priority = kept
            self.store.update(entry_id, "queued", ("absorbing",))
            try:
                self.engine.absorb(Job(entry_id, document, self._settings(settings)[0], priority))
            except LiftError as error:  # the operator's settings have changed
                self.jobs.failed(entry_id, error)
        log.info("ready: %s, %d documents in the library", self.base_name, len(self.library.matching("")))

    def _clean_up(self, entry_id: str) -> None:
        self.engine.forget(entry_id)
        self.engine.call(lambda model: self._remove_files(entry_id))

    def _remove_files(self, entry_id: str) -> None:
        if self.store.state(entry_id) != "deleting":  # it was uploaded again
            return
        try:
            with contextlib.suppress(EntryNotFoundError):
                self.library.remove(entry_id)
            self.store.forget([entry_id], only="deleting")  # it may have been uploaded again meanwhile
        except LibraryBusyError:
            pass  # it is being absorbed, which ends at its next step; then this is done again
        except LiftError as error:  # it is tried again at the next start
            log.error("deleting %s failed: %s", entry_id, type(error).__name__)

    def _discard_work(self, entry_id: str) -> None:
        shutil.rmtree(self.library.home / "unfinished" / entry_id, ignore_errors=True)
        if self.store.state(entry_id) == "deleting":
            self._remove_files(entry_id)


def _adopted(entry: Entry, config: LiftConfig) -> tuple[dict[str, Any], dict[str, Any], float]:
    """document, settings and time of an entry, as `Store.adopt` takes them."""
    card = entry.card
    text = card["document"]
    document = {"title": entry.title, "source": card["source"], "text_id": text["id"], "tokens": text["tokens"]}
    given = card["config"]
    same = parse_config(given, f"entry {entry.id}").recipe() == config.recipe()
    settings = {} if same else {group: given[group] for group in _GROUPS}
    return document, settings, datetime.datetime.fromisoformat(card["created"]).timestamp()


def _too_long(most: int) -> TooLargeError:
    return TooLargeError(f"The document has more than {most:,} tokens.", "Upload it in parts.")
