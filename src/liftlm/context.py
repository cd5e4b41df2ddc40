"""Which part of a document goes into the window beside the question: token ids in, token ids out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from liftlm.config import AnsweringConfig
from liftlm.retrieval import Rerank, Retriever

MARK = "\n...\n"  # where text is left out


class WindowText:
    """A document as a context policy shows it; what is computed of it is computed once, and only if it is needed.

    encode: text → token ids, the model's. rerank: a better judge than BM25 of its best, for `retrieve`. recite: a question → what
    the model says by heart, for `recite`, which shows the best of that as if it were the document.
    """

    def __init__(
        self,
        text: str,
        encode: Callable[[str], list[int]],
        settings: AnsweringConfig,
        rerank: Rerank | None = None,
        recite: Callable[[str], Sequence[str]] = lambda question: (),
        middle: str = MARK,
    ) -> None:
        """middle: what stands where `truncate` cuts the middle out."""
        self._text, self._encode, self._settings, self._rerank = text, encode, settings, rerank
        self._recite, self._middle = recite, middle
        self._sources: dict[str, tuple[str, ...]] = {}

    def select(self, question: str, budget: int) -> list[int]:
        """At most `budget` token ids of the document, by the policy: none, truncate (`cut_out_middle`), retrieve or recite."""
        if self._settings.context == "none" or budget <= 0:
            return []
        if self._settings.context == "truncate":
            return cut_out_middle(self._tokens, budget, self._encode(self._middle) if self._middle else [])
        if self._settings.context == "recite":
            return self._best_recited(question, budget)
        selected = self._retriever.select(question, budget, self._mark, self._rerank)
        self._sources[question] = selected.sources
        return selected.tokens

    def _best_recited(self, question: str, budget: int) -> list[int]:
        """As many of the texts that are recited as `retrieval` says, by the judge's order alone (docs/results/recall.md)."""
        texts = list(self._recite(question))
        nats = self._rerank(question, texts) if self._rerank is not None and len(texts) > 1 else [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda index: -nats[index])
        count, margin = self._settings.retrieval.count, self._settings.retrieval.margin
        tokens: list[int] = []
        kept: list[str] = []
        for index in order[:count]:
            wider = [*tokens, *(self._mark if tokens else ()), *self._encode(texts[index])]
            if len(wider) > budget or (margin is not None and nats[index] < nats[order[0]] - margin):
                break
            tokens, kept = wider, [*kept, texts[index]]
        self._sources[question] = tuple(kept)
        return tokens

    def sources(self, question: str) -> tuple[str, ...]:
        """What `retrieve` or `recite` last found for a question, word for word, the best first; nothing with other policies."""
        return self._sources.get(question, ())

    @property
    def for_all(self) -> bool:
        """Whether the text is the same for all questions."""
        return self._settings.context in ("none", "truncate")

    @functools.cached_property
    def _tokens(self) -> list[int]:
        return self._encode(self._text)

    @functools.cached_property
    def _mark(self) -> list[int]:
        return self._encode(MARK)

    @functools.cached_property
    def _retriever(self) -> Retriever:
        return Retriever(self._text, self._encode, self._settings.retrieval)


def cut_out_middle(tokens: Sequence[int], budget: int, mark: Sequence[int]) -> list[int]:
    """All of it where it fits, else head and tail halves around `mark`: truncated in-context learning.

    As in the authors' LooGLE set-up: `ids[:max // 2 - len(mark)] + mark + ids[-max // 2:]`; here the mark's length is
    shared by both halves.
    """
    if len(tokens) <= budget:
        return list(tokens)
    kept = budget - len(mark)
    if kept < 2:
        return []
    tail = kept // 2
    return [*tokens[: kept - tail], *mark, *tokens[-tail:]]
