"""Which pieces of a document speak of a question: BM25 over its sentences or segments (bm25s), and a model that judges the best.

Pure but for the tokenizer it is given: text in, token ids of the best pieces out, in the document's order.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from liftlm.config import RetrievalConfig
from liftlm.tasks.scripts import HANGUL, UNSPACED
from liftlm.tasks.sentences import split_into_sentences

# scripts without spaces between words count by character
_WORDS = re.compile(rf"[{UNSPACED}{HANGUL}]|[^\W{UNSPACED}{HANGUL}]+")
Encode = Callable[[str], list[int]]
_NATS_A_POINT = 6.0  # what a point of BM25 counts beside the model's log-likelihoods; docs/results/ranking.md


@dataclass(frozen=True)
class Piece:
    """A run of the document's text, by its characters."""

    start: int
    end: int
    core: tuple[int, int] = (0, 0)  # without neighbours


@dataclass(frozen=True)
class Selection:
    """What is shown for a question: token ids in the document's order; its pieces without neighbours, the best first."""

    tokens: list[int]
    sources: tuple[str, ...]


Rerank = Callable[[str, list[str]], Sequence[float]]  # a question and texts → how relevant each is, in nats


class Retriever:
    """An index of one document; made once, asked often.

    encode: text → token ids, the model's.
    """

    def __init__(self, text: str, encode: Encode, settings: RetrievalConfig) -> None:
        self._text, self._encode, self._settings = text, encode, settings
        self.pieces = _sentences(text, settings.neighbours) if settings.unit == "sentence" else self._segments()
        words = [_terms(text[piece.start : piece.end]) for piece in self.pieces]
        self._index = None
        if any(words):
            import bm25s

            logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every index it builds
            self._index = bm25s.BM25()
            self._index.index(words, show_progress=False)

    def ranked(self, question: str) -> list[Piece]:
        """All pieces, the most relevant first; those that share no word with the question last, as they stand in the text."""
        return [self.pieces[index] for index, _ in self._scored(question)]

    def reranked(self, question: str, rerank: Rerank | None) -> list[Piece]:
        """BM25's order, in which the first `settings.rerank` pieces are put into the order of both judgements together."""
        return [self.pieces[index] for index, _ in self._judged(question, rerank)]

    def _judged(self, question: str, rerank: Rerank | None) -> list[tuple[int, float]]:
        """Places in `pieces` with their scores in nats, the highest first; behind those that the model judged, BM25's order."""
        scored = [(index, _NATS_A_POINT * points) for index, points in self._scored(question)]
        count = min(self._settings.rerank, len(scored))
        if rerank is None or count < 2:
            return scored
        best = scored[:count]
        nats = rerank(question, [self._text[slice(*self.pieces[index].core)] for index, _ in best])
        both = [(index, by_words + given) for (index, by_words), given in zip(best, nats, strict=True)]
        lowest = min(score for _, score in both)
        behind = [(index, min(lowest, score)) for index, score in scored[count:]]
        return sorted(both, key=lambda pair: -pair[1]) + behind

    def _scored(self, question: str) -> list[tuple[int, float]]:
        """Places in `pieces` with BM25's scores, the highest first."""
        terms = _terms(question)
        if self._index is None or not terms:
            return [(index, 0.0) for index in range(len(self.pieces))]
        scores = self._index.get_scores(terms)
        return sorted(((index, float(score)) for index, score in enumerate(scores)), key=lambda pair: -pair[1])

    def select(self, question: str, budget: int, mark: Sequence[int], rerank: Rerank | None = None) -> Selection:
        """The `count` best pieces that fit `budget` tokens, with `mark` where text is left out between them.

        Of these only such as are at most `margin` nats behind the first: where that one is clearly the best, the others disturb.
        """
        kept: list[Piece] = []
        tokens: list[int] = []
        count, margin, least = self._settings.count, self._settings.margin, -math.inf
        for index, score in self._judged(question, rerank):
            if (count is not None and len(kept) >= count) or score < least:
                break
            wider = self.join([*kept, self.pieces[index]], mark)
            if len(wider) <= budget:
                if not kept and count is not None and margin is not None:
                    least = score - margin
                kept.append(self.pieces[index])
                tokens = wider
            elif count is None:
                break  # as many as fit: the next ones are worse, not shorter
        return Selection(tokens, tuple(" ".join(self._text[slice(*piece.core)].split()) for piece in kept))

    def join(self, pieces: Sequence[Piece], mark: Sequence[int]) -> list[int]:
        """Token ids of the pieces in the document's order, `mark` between those that do not follow each other."""
        tokens: list[int] = []
        for piece in self._merge(pieces):
            tokens += [*(mark if tokens else ()), *self._encode(self._text[piece.start : piece.end])]
        return tokens

    def _merge(self, pieces: Sequence[Piece]) -> list[Piece]:
        """In the document's order, those with nothing but white space between them as one."""
        merged: list[Piece] = []
        for piece in sorted(pieces, key=lambda piece: (piece.start, piece.end)):
            if merged and not self._text[merged[-1].end : piece.start].strip():
                merged[-1] = Piece(merged[-1].start, max(merged[-1].end, piece.end))
            else:
                merged.append(piece)
        return merged

    def _segments(self) -> list[Piece]:
        """Runs of about `segment_tokens` tokens that end with a sentence where they can."""
        pieces: list[Piece] = []
        used = 0
        for sentence in _sentences(self._text, 0):
            cost = len(self._encode(self._text[sentence.start : sentence.end]))
            if pieces and used + cost <= self._settings.segment_tokens:
                pieces[-1] = Piece(pieces[-1].start, sentence.end, (pieces[-1].start, sentence.end))
                used += cost
            else:
                pieces.append(sentence)
                used = cost
        return pieces


def _sentences(text: str, neighbours: int) -> list[Piece]:
    """Every sentence with so many before and after it; text without any is one piece."""
    spans = [(sentence.start, sentence.end) for sentence in split_into_sentences(text)] or [(0, len(text))]
    last = len(spans) - 1
    return [
        Piece(spans[max(0, index - neighbours)][0], spans[min(last, index + neighbours)][1], spans[index])
        for index in range(len(spans))
    ]


def _terms(text: str) -> list[str]:
    """Words in lower case without English endings (Snowball), so that "founded" finds "founder"'s sentence."""
    import Stemmer

    words: list[str] = Stemmer.Stemmer("english").stemWords(_WORDS.findall(text.lower()))
    return words
