"""The writer that asks a language model on any OpenAI-compatible server, sentence by sentence, many at once.

Streams each sentence's tasks as its reply arrives, so that training can start with the first. Finished sentences are kept in a
file of JSON lines; a second run asks only for what is missing. Knows nothing of training, nor of which tasks are good.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from liftlm.config import TasksConfig
from liftlm.errors import WriterUnreachableError
from liftlm.storage import canonical_json, write_errors
from liftlm.tasks.asking import AskingError, Reply, Server
from liftlm.tasks.replies import PROMPT_VERSION, Pair, Request, make_requests
from liftlm.tasks.stream import Emit, TaskStream
from liftlm.tasks.task import Task

_AHEAD = 256  # sentences written but not yet read by the trainer; then the writer waits
_SILENCE = 8  # sentences that fail one after the other, at least, before the server counts as gone


@dataclass(frozen=True)
class WriterReport:
    """What writing took so far. Tokens are the server's own count, or a quarter of the characters where it gives none."""

    sentences: int  # that can be asked about
    cached: int  # written by an earlier run
    written: int  # by this run
    failed: int  # in this run, after all attempts
    unasked: int  # as yet, or for good where the budget is reached
    tasks: int  # cached and written, before any filter
    requests: int  # all with retries
    retries: int
    prompt_tokens: int
    completion_tokens: int
    budget_reached: bool
    not_supported: tuple[str, ...]  # options the server rejected: response_format, temperature
    last_failure: str  # goes on from "The server …", or ""


@dataclass
class _Run:
    """One stream's state."""

    server: Server
    todo: Iterator[int] = field(default_factory=lambda: iter(()))  # sentences not yet asked about
    file: BinaryIO | None = None  # the cache, open for appending
    cached: int = 0
    written: int = 0
    failed: int = 0
    tasks: int = 0
    spent_before: int = 0  # tokens of earlier runs
    in_a_row: int = 0  # failures that the server seems to be the reason of, since its last success
    last_failure: AskingError | None = None


class LlmWriter:
    """Writes the tasks of one document; `cache` is the file that keeps them.

    Raises ConfigError where the settings name no server, no model or no possible key.
    """

    def __init__(self, text: str, config: TasksConfig, cache: Path, seed: int = 0) -> None:
        self._config, self._cache = config, cache
        self._requests = make_requests(text, config.sentences_together, config.requests, seed)
        self._keys = [_key(request, config) for request in self._requests]
        # asked about in no particular order: what arrives last is trained on with the lowest learning rate, and that should
        # not always be the document's end, nor should a budget leave out all of it
        self._order = random.Random(seed).sample(range(len(self._keys)), len(self._keys))
        self._run = _Run(Server(config.llm))

    @property
    def report(self) -> WriterReport:
        """The state of affairs of the latest stream; may be read at any time."""
        run, server = self._run, self._run.server
        return WriterReport(
            sentences=len(self._keys),
            cached=run.cached,
            written=run.written,
            failed=run.failed,
            unasked=len(self._keys) - run.cached - run.written - run.failed,
            tasks=run.tasks,
            requests=server.requests,
            retries=server.retries,
            prompt_tokens=server.prompt_tokens,
            completion_tokens=server.completion_tokens,
            budget_reached=self._budget_reached(),
            not_supported=tuple(sorted({"response_format", "temperature"} - server.options)),
            last_failure=run.last_failure.reason if run.last_failure else "",
        )

    def stream(self) -> TaskStream:
        """The tasks of one sentence after the other, in the order in which they are finished; work starts at once.

        Raises, where it is read: WriterUnreachableError, before the first tasks where the server is of no use and later where
        it stops answering; DiskFullError, NoWritePermissionError. A failing sentence is counted in `report`, and so is what the
        budget (`tasks.llm.budget_tokens`, in which earlier runs count) left unasked.
        """
        self._run = _Run(Server(self._config.llm))
        return TaskStream(self._write, _AHEAD)

    async def _write(self, emit: Emit) -> None:
        run = self._run
        with _append_to(self._cache) as run.file:
            done = _read_cache(self._cache)
            cached = {index: done[key] for index, key in enumerate(self._keys) if key in done}
            run.todo = iter([index for index in self._order if index not in cached])
            run.cached, run.tasks = len(cached), sum(len(reply.pairs) for reply in cached.values())
            run.spent_before = sum(reply.tokens for reply in cached.values())
            if len(cached) == len(self._keys) or self._budget_reached():
                await self._emit_all(cached, emit)  # no server is needed
                return
            try:
                async with run.server:
                    await self._ask(cached, emit)
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
        failure = None if self._budget_reached() else run.last_failure
        # absent: it died so late that too few sentences were left for the workers to notice
        if failure is not None and ((run.in_a_row and failure.absent) or not (run.written or run.cached)):
            raise self._given_up(failure)

    async def _ask(self, cached: dict[int, Reply], emit: Emit) -> None:
        """Everything once the server is open: one request alone, then what is there already and `concurrency` workers."""
        await self._probe(emit)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._emit_all(cached, emit))
            for _ in range(min(self._config.llm.concurrency, len(self._keys) - len(cached))):
                group.create_task(self._work(emit))

    async def _probe(self, emit: Emit) -> None:
        """Asks about one sentence alone: a server that is not there, or a wrong key, shows before anything else starts."""
        index = self._next()
        failure = None if index is None else await self._one(index, emit)
        if failure is not None and failure.gone:
            raise WriterUnreachableError(f"The server at {self._run.server.url} {failure.reason}.", failure.next_step)

    async def _work(self, emit: Emit) -> None:
        """One of `concurrency` workers: sentence after sentence, as long as there are any."""
        while (index := self._next()) is not None:
            failure = await self._one(index, emit)
            if failure is not None and self._run.in_a_row >= max(_SILENCE, self._config.llm.concurrency):
                raise self._given_up(failure)

    async def _one(self, index: int, emit: Emit) -> AskingError | None:
        """Writes one sentence's tasks; returns why it could not."""
        run = self._run
        try:
            reply = await run.server.ask(self._requests[index], self._config.per_sentence, self._config.answers)
        except AskingError as failure:
            run.failed += 1
            run.last_failure = failure
            if failure.gone or not (run.written or run.cached):
                run.in_a_row += 1
            return failure
        self._store(index, reply)
        run.written += 1
        run.tasks += len(reply.pairs)
        run.in_a_row = 0
        await self._emit_all({index: reply}, emit)
        return None

    async def _emit_all(self, replies: dict[int, Reply], emit: Emit) -> None:
        for index, reply in replies.items():
            sentence = self._requests[index].sentence
            tasks = [
                Task(pair.question, pair.answer, pair.kind or "llm", sentence.start, sentence.end)
                for pair in reply.pairs
            ]
            if tasks:
                await emit(tasks)

    def _next(self) -> int | None:
        return None if self._budget_reached() else next(self._run.todo, None)

    def _budget_reached(self) -> bool:
        run, budget = self._run, self._config.llm.budget_tokens
        spent = run.spent_before + run.server.prompt_tokens + run.server.completion_tokens
        return budget is not None and spent >= budget

    def _given_up(self, failure: AskingError) -> WriterUnreachableError:
        run, url = self._run, self._run.server.url
        finished = run.cached + run.written
        if not finished:
            return WriterUnreachableError(
                f"None of the {run.failed} sentences asked about could be written: the server at {url} {failure.reason}.",
                failure.next_step,
            )
        return WriterUnreachableError(
            f"The server at {url} stopped writing after {finished} of {len(self._keys)} sentences: it {failure.reason}.",
            "What was written is kept, and the same command goes on from there.",
        )

    def _store(self, index: int, reply: Reply) -> None:
        """Appends a finished sentence to the cache; what is there survives this process."""
        assert self._run.file is not None, "not opened"
        row = {
            "key": self._keys[index],
            "pairs": [[pair.question, pair.answer, pair.kind] for pair in reply.pairs],
            "tokens": [reply.prompt_tokens, reply.completion_tokens],
        }
        with write_errors(self._cache):
            self._run.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self._run.file.flush()


# --- cache ------------------------------------------------------------------------------------------------------------


def _key(request: Request, config: TasksConfig) -> str:
    """What a sentence's tasks depend on, and so what makes them worth keeping."""
    parts: dict[str, object] = {
        "sentence": request.sentence.text,
        "context": request.context,
        "per_sentence": config.per_sentence,
        "model": config.llm.model,
        "temperature": config.llm.temperature,
        "prompt": PROMPT_VERSION,
    }
    if request.sentences > 1:
        parts["sentences"] = request.sentences  # worded otherwise
    if config.answers != "auto":
        parts["answers"] = config.answers
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


@contextlib.contextmanager
def _append_to(path: Path) -> Iterator[BinaryIO]:
    """The cache, open for whole lines: one that a killed process tore stays a line of its own."""
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        file = path.open("ab")
        if torn:
            file.write(b"\n")
    try:
        yield file
    finally:
        with write_errors(path):
            file.close()


def _read_cache(path: Path) -> dict[str, Reply]:
    """Finished sentences by key. What cannot be read is asked for anew."""
    done: dict[str, Reply] = {}
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            row = json.loads(line)
            pairs = tuple(Pair(str(question), str(answer), str(kind)) for question, answer, kind in row["pairs"])
            prompt, completion = row["tokens"]
            done[str(row["key"])] = Reply(pairs, int(prompt), int(completion))
    return done
