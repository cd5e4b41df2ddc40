"""Finds a benchmark's evidence in its document, so that an oracle shows the document's own sentences in their order.

Published evidence is seldom verbatim: line ends were changed, citation marks dropped, accents lost, sentences joined
with "....". So a sentence is looked up as it is, then with any white space, then by its ASCII letters and digits alone;
one that is not found so is looked up piece by piece. What is still not found stays as the benchmark gives it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

_FEWEST = 20  # letters and digits; fewer would be found anywhere
_LETTER = re.compile(r"\[[^\[\]\n]{1,20}\]|([A-Za-z0-9])")  # [12], [es], [citation needed] are passed over
_PIECES = re.compile(r"\.{4,}|…|\n+|(?<=[.!?])\s+(?=[A-Z\"'(“])")
_CLOSING = ".!?\"')]”’"


class EvidenceFinder:
    """Looks up sentences in one document."""

    def __init__(self, text: str) -> None:
        self.text = text

    def find(self, sentences: Sequence[str]) -> tuple[str, ...]:
        """The document's own wording of them, in its order; one that is not there keeps its place behind the last found."""
        placed: list[tuple[int, str]] = []
        last = 0
        for sentence in filter(None, map(str.strip, sentences)):
            whole = self.locate(sentence)
            pieces = [sentence] if whole else [piece for piece in _PIECES.split(sentence) if re.search(r"\w", piece)]
            lost: list[str] = []
            for piece in pieces:
                span = self.locate(piece)
                if span is None:
                    lost.append(piece.strip())
                    continue
                if lost:
                    placed.append((last, " ".join(lost)))
                last, lost = span[0], []
                placed.append((last, self.text[last : self._with_closing(span[1])]))
            if lost:
                placed.append((last, " ".join(lost)))
        ordered = [text for _, text in sorted(placed, key=lambda pair: pair[0])]
        return tuple(dict.fromkeys(ordered))

    def locate(self, sentence: str) -> tuple[int, int] | None:
        """Start and end of its first occurrence, in characters."""
        sentence = sentence.strip()
        start = self.text.find(sentence)
        if start >= 0:
            return start, start + len(sentence)
        found = re.search(r"\s+".join(map(re.escape, sentence.split())), self.text)
        if found:
            return found.span()
        return self._locate_letters(sentence)

    @cached_property
    def _letters(self) -> tuple[str, list[int]]:
        return _letters_of(self.text)

    def _locate_letters(self, sentence: str) -> tuple[int, int] | None:
        wanted, _ = _letters_of(sentence)
        letters, positions = self._letters
        index = letters.find(wanted)
        if len(wanted) < _FEWEST or index < 0:
            return None
        return positions[index], self._with_closing(positions[index + len(wanted) - 1] + 1)

    def _with_closing(self, end: int) -> int:
        """Past the marks that close a sentence, which a piece of evidence may lack."""
        while end < len(self.text) and self.text[end] in _CLOSING:
            end += 1
        return end


def _letters_of(text: str) -> tuple[str, list[int]]:
    """ASCII letters (lower case) and digits, and where they stand."""
    found = [match for match in _LETTER.finditer(text) if match[1]]
    return "".join(match[1] for match in found).lower(), [match.start() for match in found]
