"""Questions → answers, a turn at a time: waiting, prompt, running batch, told. The engine says when a turn may be taken.

Knows the model and its adapters; nothing of threads, HTTP, or of absorbing.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from liftlm.adapters import use_adapter
from liftlm.batching import Batch, Network, Prefill, continuation
from liftlm.errors import LiftError
from liftlm.models import Model
from liftlm.sequences import Choice, Ending, Sampling, Sequence
from liftlm.server.metrics import Metrics
from liftlm.server.opened import Opened, OpenedEntries
from liftlm.server.prefixes import PrefixCache
from liftlm.server_config import ServerConfig

_STEPS = 8  # tokens of one document's batch before another's turn, or a prompt's
_STALL_SECONDS = 1.0  # that running answers may wait for prompts: batches are worth filling first


@dataclass(frozen=True)
class Began:
    """The prompt is computed."""

    prompt: tuple[int, ...]
    choices: tuple[Choice, ...]  # of the prompt, where they were wanted


@dataclass(frozen=True)
class Piece:
    """Text that is certain, perhaps none yet; and the tokens behind it, where they were wanted."""

    text: str
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Ended:
    """All is told."""

    ending: Ending
    prompt_tokens: int
    tokens: int
    cached_tokens: int  # of the prompt, known from earlier ones


@dataclass(frozen=True)
class Failed:
    """An answer that will not come."""

    error: BaseException


Told = Began | Piece | Ended | Failed
Group = tuple[str | None, float]  # an entry's id, or None for the base model; how much of its adapter acts


@dataclass(eq=False)
class Asked:
    """One text to be continued. build: its prompt, made by the engine's thread; tell: hears what becomes of it, there."""

    entry: str | None
    strength: float
    build: Callable[[Model, Opened | None], list[int]]
    sampling: Sampling
    tell: Callable[[Told], None]
    priority: int = 0  # lower ones first
    cancelled: bool = False
    queued: float = field(default_factory=time.monotonic)
    told_first: float | None = None  # when its first token was there
    cached: int = 0  # tokens of its prompt
    steps_waited: int = 0  # training steps before its first token
    sequence: Sequence | None = None
    prefill: Prefill | None = None
    shown: int = 0  # choices told

    @property
    def group(self) -> Group:
        return self.entry, self.strength


class Answers:
    """All questions that wait or are being answered. One thread calls everything but `waiting`."""

    def __init__(self, model: Model, opened: OpenedEntries, config: ServerConfig, metrics: Metrics) -> None:
        self._model, self._opened, self._config, self._metrics = model, opened, config, metrics
        self._network = Network(model)
        self.prefixes = PrefixCache(self._network, config.prefix_megabytes * 2**20)
        self._order = itertools.count()
        self._waiting: list[tuple[int, int, Asked]] = []
        self._next: Asked | None = None  # whose prompt is being computed
        self._stepped = 0.0  # when a batch last went on
        self._batches: dict[Group, list[Batch]] = {}
        self._asked: dict[Sequence, Asked] = {}  # of the rows of all batches
        self._turns: deque[Group] = deque()
        self._on: tuple[Group, contextlib.ExitStack] | None = None

    @property
    def waiting(self) -> int:
        return len(self._waiting) + (self._next is not None)

    @property
    def running(self) -> int:
        return len(self._asked)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._next or self._asked)

    def uses(self, entry_id: str) -> bool:
        """Whether an answer is being made with that entry."""
        asked = [*self._asked.values(), *([self._next] if self._next else [])]
        return any(one.entry == entry_id for one in asked)

    def add(self, asked: Asked) -> None:
        heapq.heappush(self._waiting, (asked.priority, next(self._order), asked))

    @property
    def _unanswered(self) -> list[Asked]:
        """Those without a first token."""
        return [*(one for *_, one in self._waiting), *([self._next] if self._next else [])]

    def unanswered_since(self, moment: float) -> bool:
        """Whether a question that was there at that moment has not got its first token."""
        return any(one.queued <= moment and not one.cancelled for one in self._unanswered)

    def trained(self) -> None:
        """A training step was taken, for which all who are here had to wait."""
        for asked in self._unanswered:
            asked.steps_waited += 1

    def turn(self) -> None:
        """Some work: a piece of a prompt is computed, or a batch goes on by a few tokens."""
        self._drop_cancelled()
        if self._next is None and self._waiting and len(self._asked) < self._config.batch_rows:
            self._next = heapq.heappop(self._waiting)[2]
            self._metrics.question_wait.observe(time.monotonic() - self._next.queued)
            self._guard([self._next], functools.partial(self._begin, self._next))
        asked = self._next
        blocked = asked is None or not self._has_room(asked)
        if asked is not None and not blocked:
            self._guard([asked], functools.partial(self._advance_prompt, asked))
        if blocked or time.monotonic() - self._stepped >= _STALL_SECONDS:
            self._advance_batches()

    def _advance_batches(self) -> None:
        for _ in range(len(self._turns)):
            group = self._turns.popleft()
            if group in self._batches:
                self._turns.append(group)
                rows = [self._asked[row] for batch in self._batches[group] for row in batch.rows]
                self._guard(rows, functools.partial(self._advance_group, group))
                break
        self._stepped = time.monotonic()

    def pause(self) -> None:
        """Takes the adapter off that was left on between turns."""
        if self._on is not None:
            stack = self._on[1]
            self._on = None
            stack.close()

    def fail(self, error: LiftError, entry_id: str | None = None) -> None:
        """Ends all questions, or those of one entry, with an error."""
        everyone = [*self._unanswered, *self._asked.values()]
        for asked in everyone:
            if entry_id is None or asked.entry == entry_id:
                asked.cancelled = True
                asked.tell(Failed(error))
        self._drop_cancelled()

    # --- one turn -----------------------------------------------------------------------------------------------------

    def _has_room(self, asked: Asked) -> bool:
        """Whether its tokens fit beside those of the answers that are being written."""
        taken = sum(len(row.prompt) + row.sampling.max_tokens for row in (asked.sequence, *self._asked) if row)
        return not self._asked or taken <= self._config.batch_tokens

    def _begin(self, asked: Asked) -> None:
        """Its prompt as tokens, and what is known of it already: the one before may have begun alike."""
        opened = None if asked.entry is None else self._opened.get(asked.entry)
        prompt = asked.build(self._model, opened)
        asked.sequence = continuation(self._model, prompt, asked.sampling)
        cache = None
        if not asked.sampling.echo:
            cache, asked.cached = self.prefixes.find(asked.group, prompt)
        asked.prefill = Prefill(self._network, asked.sequence, cache, asked.cached)

    def _advance_prompt(self, asked: Asked) -> None:
        prefill = asked.prefill
        assert prefill is not None
        self._switch(asked.group)
        prefill.advance(self._config.prefill_tokens)
        if not prefill.done:
            return
        self._next = asked.prefill = None
        if not asked.sampling.echo:
            self.prefixes.keep(asked.group, prefill.sequence.prompt, prefill.cache)
        asked.tell(Began(tuple(prefill.sequence.prompt), tuple(prefill.choices)))
        text = prefill.first() if prefill.sequence.ending is None else ""
        asked.told_first = time.monotonic()
        self._metrics.first_token.observe(asked.told_first - asked.queued)
        self._metrics.steps_waited.observe(asked.steps_waited)
        self._tell(asked, text)
        if prefill.sequence.ending is None:
            self._join(asked, prefill)

    def _join(self, asked: Asked, prefill: Prefill) -> None:
        batches = self._batches.setdefault(asked.group, [])
        if asked.group not in self._turns:
            self._turns.append(asked.group)
        self._asked[prefill.sequence] = asked
        if batches and batches[0].joins and self._network.joins(prefill.cache):
            batches[0].join(prefill)
        else:
            batches.append(Batch(self._network, prefill))

    def _advance_group(self, group: Group) -> None:
        self._switch(group)
        for _ in range(_STEPS):
            for batch in self._batches[group]:
                self._metrics.batch_rows.observe(len(batch.rows))
                for row, text in zip(batch.rows, batch.step(), strict=True):
                    self._tell(self._asked[row], text)
                self._drop(batch, [row for row in batch.rows if row.ending is not None])
            self._tidy(group)
            if group not in self._batches:
                return

    def _tell(self, asked: Asked, text: str) -> None:
        sequence = asked.sequence
        assert sequence is not None
        choices = tuple(sequence.choices[asked.shown :])
        asked.shown += len(choices)
        if text or choices:
            asked.tell(Piece(text, choices))
        if sequence.ending is not None:
            count = len(sequence.tokens)
            self._metrics.answered(count, time.monotonic() - (asked.told_first or asked.queued))
            asked.tell(Ended(sequence.ending, len(sequence.prompt), count, asked.cached))

    def _drop(self, batch: Batch, rows: list[Sequence]) -> None:
        batch.drop(rows)
        for row in rows:
            del self._asked[row]

    def _tidy(self, group: Group) -> None:
        self._batches[group] = [batch for batch in self._batches[group] if batch.rows]
        if not self._batches[group]:
            del self._batches[group]
            self._opened.trim()

    def _drop_cancelled(self) -> None:
        """Those whose client has gone free their places."""
        if any(one.cancelled for *_, one in self._waiting):
            self._waiting = [entry for entry in self._waiting if not entry[2].cancelled]
            heapq.heapify(self._waiting)
        if self._next is not None and self._next.cancelled:
            self._next = None
        for group, batches in list(self._batches.items()):
            for batch in batches:
                gone = [row for row in batch.rows if self._asked[row].cancelled]
                if gone:
                    self._drop(batch, gone)
            self._tidy(group)

    def _switch(self, group: Group) -> None:
        if self._on is not None and self._on[0] == group:
            return
        self.pause()
        stack = contextlib.ExitStack()
        stack.enter_context(use_adapter(self._model, group[0], strength=group[1]))
        self._on = (group, stack)
        self._network.refresh()

    def _guard(self, concerned: list[Asked], work: Callable[[], None]) -> None:
        """What goes wrong for some is their failure and not the server's end."""
        try:
            work()
        except Exception as error:
            for asked in concerned:
                if not asked.cancelled:
                    asked.cancelled = True
                    asked.tell(Failed(error))
            self._drop_cancelled()
