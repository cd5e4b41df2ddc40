"""Documents of one set that stand in another: by title, and by runs of 13 words in common (as for GPT-3, arXiv 2005.14165).

Pure. One set is held as hashes of its runs, the other is read document by document.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from liftlm.documents import Document

RUN_WORDS = 13
MOST_SHARED = (
    0.01  # of a document's runs; boilerplate of contracts and licences has some in common without being the same
)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Leak:
    """A document that was to be kept out. shared: the share of its runs that stand in the other; by: "title" or "text"."""

    kept_out: str  # title
    other: str  # title
    by: str
    shared: float

    def __str__(self) -> str:
        if self.by == "title":
            return f"'{self.other}' has the title of a document that is kept out"
        return f"'{self.other}' shares {self.shared:.0%} of the text of '{self.kept_out}', which is kept out"


class KeptOut:
    """Documents that must not be trained on, or on which nothing may be evaluated."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self._titles: dict[str, str] = {}
        self._runs: dict[bytes, list[int]] = {}
        self._documents: list[tuple[str, int]] = []  # title, runs
        for number, document in enumerate(documents):
            runs = set(_runs(document.text))
            self._titles.setdefault(plain_title(document.title), document.title)
            self._documents.append((document.title, len(runs)))
            for run in runs:
                self._runs.setdefault(run, []).append(number)

    def leaks(self, document: Document, most_shared: float = MOST_SHARED) -> list[Leak]:
        """Why this document must not be used; nothing where it may. A text shorter than a run counts by its title alone."""
        found = []
        title = plain_title(document.title)
        if title in self._titles and title:
            found.append(Leak(self._titles[title], document.title, "title", 0.0))
        shared = [0] * len(self._documents)
        for run in set(_runs(document.text)):
            for number in self._runs.get(run, ()):
                shared[number] += 1
        for (name, runs), count in zip(self._documents, shared, strict=True):
            if runs and count / runs > most_shared:
                found.append(Leak(name, document.title, "text", count / runs))
        return found


def find_leaks(
    corpus: Iterable[Document], kept_out: Iterable[Document], most_shared: float = MOST_SHARED
) -> list[Leak]:
    """All leaks of `kept_out` in `corpus`."""
    guard = KeptOut(kept_out)
    return [leak for document in corpus for leak in guard.leaks(document, most_shared)]


def plain_title(title: str) -> str:
    """Its words: titles that differ in case, spaces or punctuation are one."""
    return " ".join(_WORD.findall(title.casefold().replace("_", " ")))


def _runs(text: str) -> Iterable[bytes]:
    words = [word.encode() for word in _WORD.findall(text.casefold())]
    for start in range(len(words) - RUN_WORDS + 1):
        yield hashlib.blake2b(b" ".join(words[start : start + RUN_WORDS]), digest_size=8).digest()
