"""The corpus of a pre-LIFT fine-tuning: checked once from beginning to end, then streamed document by document.

Never held whole: a first pass looks at every document and remembers counts and hashes only. Errors name file and line.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from liftlm.errors import BenchmarkDataError, CorpusError
from liftlm.evaluation.benchmark import Item
from liftlm.evaluation.corpora import Source, parse_source, read_items
from liftlm.pre_sft.leakage import KeptOut

_FEWEST_WORDS = 50  # of a document


@dataclass(frozen=True)
class Corpus:
    """What the first pass saw. questions: given ones, in all; a document without any gets its tasks from the writer."""

    sources: tuple[Source, ...]
    documents: int
    questions: int
    fingerprint: str  # of all titles and texts, in order
    titles: tuple[str, ...]
    ids: tuple[str, ...]  # hashes of the texts


def check_corpus(paths: Sequence[str], keep_out: Sequence[str] = ()) -> Corpus:
    """Reads everything once. Raises CorpusError: nothing there, unreadable, too short, twice the same, or to be kept out."""
    try:
        guard = KeptOut(item.document for path in keep_out for item in read_items(parse_source(path)))
        sources = tuple(parse_source(path) for path in paths)
        return _check(sources, guard)
    except BenchmarkDataError as error:
        raise CorpusError(error.message, error.next_step) from error


def _check(sources: tuple[Source, ...], guard: KeptOut) -> Corpus:
    digest, seen, titles, questions = hashlib.sha256(), dict[str, str](), [], 0
    for item in _stream(sources):
        document = item.document
        if len(document.text.split()) < _FEWEST_WORDS:
            raise CorpusError(
                f"'{document.title}' ({document.source}) has less than {_FEWEST_WORDS} words.",
                "Take it out: a corpus is of long documents.",
            )
        if document.id in seen:
            raise CorpusError(
                f"'{document.title}' ({document.source}) is in the corpus twice, first as '{seen[document.id]}'.",
                "Take one out: what is seen twice counts twice.",
            )
        leaks = guard.leaks(document)
        if leaks:
            raise CorpusError(
                f"The corpus holds what is to be kept out: {leaks[0]} ({document.source}).",
                "Take it out of the corpus, or choose other documents with PATH:N-M.",
            )
        seen[document.id] = document.title
        titles.append(document.title)
        questions += len(item.questions)
        digest.update(f"{document.id}:{document.title}:{len(item.questions)};".encode())
    if not titles:
        raise CorpusError("The corpus holds no document.", "Give files or folders of documents.")
    return Corpus(sources, len(titles), questions, digest.hexdigest(), tuple(titles), tuple(seen))


def stream_corpus(corpus: Corpus, skip: int = 0) -> Iterator[Item]:
    """The documents in order from number `skip` on, read as they are needed."""
    return itertools.islice(_stream(corpus.sources), skip, None)


def _stream(sources: Sequence[Source]) -> Iterator[Item]:
    for source in sources:
        yield from read_items(source)
