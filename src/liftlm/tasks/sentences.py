"""A document's sentences, with the paragraph and heading they stand under. Pure: text in, spans out.

sentencex finds the boundaries; what is added here is what documents bring along: headings, lists, fragments of a word
or two, and sentences so long that no answer should be as long.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import sentencex

from liftlm.tasks.scripts import word_count

_LONGEST = 60  # words of one sentence; longer ones are parted at a clause
_SHORTEST = 4  # words; shorter ones are joined to the sentence before
_BLOCK = re.compile(r"(?:[^\n]|\n(?![^\S\n]*\n))+")  # parted by blank lines
_DIGIT_AFTER_STOP = re.compile(r"(?<=[。！？])(?=\d)")  # sentencex takes it for a decimal
_MARKS = re.compile(r"\s*(?:[-*+•>]\s+|\d+[.)]\s+|#+\s*)*")
_ITEM = re.compile(r"[^\S\n]*(?:[-*+•]|\d+[.)])[^\S\n]")
_UNDERLINE = re.compile(r"\n[^\S\n]*(?:=+|-{3,})$")


@dataclass(frozen=True)
class Sentence:
    """start, end: characters of the document's text, without white space around."""

    start: int
    end: int
    paragraph: int
    heading: str  # that it stands under, or ""
    text: str  # white space made single blanks


def split_into_sentences(text: str, language: str = "en") -> list[Sentence]:
    """All sentences in order; together they cover every word of the document but headings and list marks."""
    sentences: list[Sentence] = []
    heading, paragraph = "", 0
    for block in _BLOCK.finditer(text):
        if _is_heading(block.group().strip()):
            heading = _plain(_MARKS.sub("", _UNDERLINE.sub("", block.group().strip()), count=1)).strip("*_= ")
            continue
        paragraph += 1
        for start, end in _spans(text, *block.span(), language):
            if not re.search(r"\w", text[start:end]):
                continue
            short = sentences and sentences[-1].paragraph == paragraph and _words(text, start, end) < _SHORTEST
            if short and _words(text, sentences[-1].start, end) <= _LONGEST:
                start = sentences.pop().start
            sentences.append(Sentence(start, end, paragraph, heading, _plain(text[start:end])))
    return sentences


def _is_heading(block: str) -> bool:
    """A Markdown heading, or a lone short line without the end of a sentence (of any script)."""
    line = _UNDERLINE.sub("", block)
    if not line or "\n" in line or re.match(r"[-*+•>]\s", line):
        return False
    if line.startswith("#") or line != block:
        return True
    ended = unicodedata.category(line[-1]) in ("Po", "Pe", "Pf", "Pi") and line[-1] not in "*#&%@/\\"  # ** is bold
    return len(line.split()) <= 8 and len(line) <= 100 and not ended


def _spans(text: str, start: int, end: int, language: str) -> Iterator[tuple[int, int]]:
    """The sentences of a block, none too long; each item of a list is by itself."""
    lines = [start, *(found.end() for found in re.compile(r"\n").finditer(text, start, end)), end]
    marked = [line for line in lines if _ITEM.match(text, line, end)]
    is_list = bool(marked) and not text[start : marked[0]].strip()
    cuts = [start, *(marked[1:] if is_list else ()), end]
    for item_start, item_end in itertools.pairwise(cuts):
        for boundary in sentencex.get_sentence_boundaries(language, text[item_start:item_end]):
            first, last = item_start + boundary["start_index"], item_start + boundary["end_index"]
            mark = _MARKS.match(text, first, last)
            first = mark.end() if mark is not None else first
            for cut in [*(found.start() for found in _DIGIT_AFTER_STOP.finditer(text, first, last)), last]:
                yield from _clauses(text, first, cut)
                first = cut


def _clauses(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The span without white space around, or the halves (and their halves) of one that is too long, parted after
    ; : , or a blank, if possible near the middle."""
    while end > start and text[end - 1].isspace():
        end -= 1
    if _words(text, start, end) <= _LONGEST:
        return [(start, end)]
    middle, near = (start + end) / 2, (end - start) / 4
    for mark, reach in ((r"[;:]\s+|[；：]", near), (r",\s+|[，、]", near), (r"\s+", end - start)):
        cuts = [found.end() for found in re.compile(mark).finditer(text, start, end)]
        cut = min(cuts, key=lambda at: abs(at - middle), default=end)
        if cut < end and abs(cut - middle) < reach:
            return _clauses(text, start, cut) + _clauses(text, cut, end)
    return [(start, end)]


def _words(text: str, start: int, end: int) -> int:
    return word_count(text[start:end])


def _plain(text: str) -> str:
    return " ".join(text.split())
