"""Prompts → texts: batches of similar length, a common beginning computed once, streamed or not.

Knows token ids only: nothing of documents, questions or adapters.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from liftlm.adapters import merge_adapter
from liftlm.batching import Batch, Network, Prefill, continuation
from liftlm.config import AnsweringConfig
from liftlm.decoding import Beginning
from liftlm.models import Model, quiet_transformers
from liftlm.prompts import answer_stops, common_beginning
from liftlm.sequences import Sampling
from liftlm.sequences import Sequence as Text

OnText = Callable[[str], None]
_WORTH_SHARING = 16  # tokens
_WORTH_MERGING = 256  # tokens to be written; merging takes as long as a fifth of a second's
_TOGETHER = 512  # tokens of prompts that are computed in one row


@dataclass(frozen=True)
class Prompt:
    """Token ids that wait to be continued. Prompts of one group (not None) are said to begin alike, with a long text."""

    tokens: list[int]
    group: Hashable = None


@dataclass(frozen=True)
class Generated:
    """A continuation. seconds: of what was computed for several, this one's equal share; ended: by the model itself, not by the
    limit; ids: its tokens, without an end token."""

    index: int  # of its prompt
    text: str
    tokens: int
    seconds: float
    ended: bool
    ids: tuple[int, ...] = ()


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    settings: AnsweringConfig,
    seed: int,
    on_text: OnText | None = None,
    merged: bool = True,
) -> Iterator[Generated]:
    """Continues every prompt, in batches, and yields each text when it ends: not in order. on_text streams a single one.

    The adapter that is on is merged into the weights meanwhile where much is to be written, unless `merged` is False; so none
    may be switched before the last text is there.
    """
    with _merged(model, len(prompts) * settings.max_new_tokens if merged else 0):
        network = Network(model)
        network.refresh()
        if not network.batches and len(prompts) > 1 and on_text is None:
            yield from _by_transformers(model, prompts, settings, seed)
            return
        groups: dict[Hashable, list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(prompt.group, []).append(index)
        for alike in groups.values():
            yield from _Group(model, network, prompts, alike, settings, seed, on_text).texts()


@contextlib.contextmanager
def _merged(model: Model, tokens: int) -> Iterator[None]:
    """What is laid out of the weights for decoding is put back too."""
    if tokens < _WORTH_MERGING or model.network.training:
        yield
        return
    laid = model.decoder
    try:
        with merge_adapter(model):
            yield
    finally:
        model.decoder = laid


class _Group:
    """Prompts that may begin alike, from the longest to the shortest; a new one begins when others have ended."""

    def __init__(
        self,
        model: Model,
        network: Network,
        prompts: Sequence[Prompt],
        indices: Sequence[int],
        settings: AnsweringConfig,
        seed: int,
        on_text: OnText | None,
    ) -> None:
        self._network, self._on_text = network, on_text
        stops = tuple(answer_stops(model.tokenizer))
        self._rows = {
            continuation(model, prompts[index].tokens, _sampling(settings, seed, index, stops, on_text is None)): index
            for index in indices
        }
        self._waiting = deque(sorted(self._rows, key=lambda row: -len(row.prompt)))
        self._room = settings.batch_tokens
        self._most = settings.max_new_tokens
        self._seconds = dict.fromkeys(self._rows, 0.0)
        self._beginning: Beginning | None = None
        self._together = len(indices) > 1 and network.packs(max(len(row.prompt) for row in self._rows))

    def texts(self) -> Iterator[Generated]:
        started = time.monotonic()
        if self._together:
            self._beginning = _share_beginning(self._network, list(self._waiting))
        self._count(started, list(self._rows))
        batch: Batch | None = None
        while self._waiting or batch is not None:
            started = time.monotonic()
            fresh = self._next(batch)
            if fresh:
                added = self._begin(fresh)
                self._count(started, fresh)
                if batch is None:
                    batch = added
                else:
                    batch.merge(added)
            else:
                assert batch is not None
                self._tell(batch.step())
                self._count(started, batch.rows)
            ended = [row for row in batch.rows if row.ending is not None]
            if 4 * len(ended) >= len(batch.rows):  # taking rows out copies what stays
                batch.drop(ended)
                for row in ended:
                    yield self._generated(row)
            if not batch.rows:
                batch = None

    def _next(self, batch: Batch | None) -> list[Text]:
        """Those that begin now: as many as there is room for, at most so many tokens as one row holds."""
        known = 0 if self._beginning is None else self._beginning.tokens
        taken = known
        if batch is not None:
            if not self._together:
                return []
            taken += sum(len(row.prompt) - known + self._most for row in batch.rows)
        chosen: list[Text] = []
        tokens = 0
        while self._waiting:
            length = len(self._waiting[0].prompt) - known
            full = taken + length + self._most > self._room or (chosen and tokens + length > _TOGETHER)
            if full and (chosen or batch is not None):
                break
            chosen.append(self._waiting.popleft())
            taken, tokens = taken + length + self._most, tokens + length
            if not self._together:
                break
        return chosen

    def _begin(self, rows: list[Text]) -> Batch:
        if self._together:
            return Batch.begin(self._network, rows, self._beginning)
        prefill = Prefill(self._network, rows[0])
        prefill.advance(len(rows[0].prompt))
        self._tell([prefill.first()])
        return Batch(self._network, prefill)

    def _tell(self, pieces: list[str]) -> None:
        for piece in pieces:
            if piece and self._on_text is not None:
                self._on_text(piece)

    def _count(self, started: float, rows: list[Text]) -> None:
        share = (time.monotonic() - started) / len(rows)
        for row in rows:
            self._seconds[row] += share

    def _generated(self, row: Text) -> Generated:
        return Generated(
            self._rows[row],
            row.text,
            len(row.tokens),
            self._seconds[row],
            ended=row.ending != "length",
            ids=tuple(row.tokens),
        )


def _sampling(settings: AnsweringConfig, seed: int, index: int, stops: tuple[str, ...], whole: bool) -> Sampling:
    return Sampling(
        settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=random.Random(f"{seed}/{index}").getrandbits(63),
        stop=stops,
        whole=whole,
    )


@torch.inference_mode()
def _share_beginning(network: Network, rows: list[Text]) -> Beginning | None:
    """What the prompts begin with alike, computed; one token of each is left."""
    if not network.shares:
        return None
    prompts = [row.prompt for row in rows]
    length = min(len(common_beginning(prompts)), min(len(prompt) for prompt in prompts) - 1)
    if length < _WORTH_SHARING:
        return None
    cache = network.new_cache()
    network.fill(rows[0].prompt[:length], cache)
    return Beginning(length, [(layer.keys, layer.values) for layer in cache.layers])


# --- networks that hold something else than keys and values of every token --------------------------------------------


def _by_transformers(
    model: Model, prompts: Sequence[Prompt], settings: AnsweringConfig, seed: int
) -> Iterator[Generated]:
    """In fixed batches, which end together: transformers knows what such networks hold."""
    for batch in _batches(prompts, settings.batch_tokens):
        started = time.monotonic()
        texts = _generate(model, [prompts[index].tokens for index in batch], settings, seed)
        seconds = (time.monotonic() - started) / len(batch)
        for index, (text, ids) in zip(batch, texts, strict=True):
            yield Generated(index, text, len(ids), seconds, len(ids) < settings.max_new_tokens, ids)


def _batches(prompts: Sequence[Prompt], batch_tokens: int) -> Iterator[list[int]]:
    """Prompts of similar length together, at most `batch_tokens` padded tokens at once (one prompt always)."""
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: (-len(prompts[index].tokens), index)):
        if batch and len(prompts[batch[0]].tokens) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def _generate(
    model: Model, prompts: list[list[int]], settings: AnsweringConfig, seed: int
) -> list[tuple[str, tuple[int, ...]]]:
    """(text, tokens) for each prompt. Padding stands on the left; it is masked, and positions do not count it."""
    tokenizer, device = model.tokenizer, model.device
    longest = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    stops = answer_stops(tokenizer)
    options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "pad_token_id": pad, "use_cache": True}
    if settings.temperature > 0:
        options |= {
            "do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k
        }  # fmt: skip
    else:
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if stops:
        options |= {"stop_strings": stops, "tokenizer": tokenizer}
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        output: Any = model.network.generate(input_ids=ids, attention_mask=mask, **options)  # type: ignore[operator]
    return [_finish(model, row[longest:].tolist(), stops) for row in output]


def _finish(model: Model, tokens: list[int], stops: Sequence[str]) -> tuple[str, tuple[int, ...]]:
    """The answer's text without padding, end tokens and stop texts; its tokens without the first two."""
    ends = model.network.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = set(ends if isinstance(ends, list) else [ends]) | {model.tokenizer.eos_token_id}
    count = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    text = model.decode(tokens[:count])
    for stop in stops:
        text = text.partition(stop)[0]
    return text.strip(), tuple(tokens[:count])
