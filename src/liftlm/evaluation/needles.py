"""Needle in a haystack: sentences hidden in a long text, asked about in words that need not be theirs.

Dataset: the user's own text (--data FILE, for example a book), cut to each length. Metric: `recalled`, 1 where every keyword
of the needle is in the answer, and the share of keywords. Source: gkamradt/LLMTest_NeedleInAHaystack (the San Francisco needle
and the insertion at the end of a sentence); the other needles are our own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from liftlm.documents import Document, load_document
from liftlm.errors import BenchmarkDataError, ConfigError
from liftlm.evaluation import metrics
from liftlm.evaluation.benchmark import Benchmark, Item, Question, draw
from liftlm.tasks.sentences import split_into_sentences

_CHARACTERS = 4.2  # of English text in a token of common tokenizers; a length is this many characters
_LONGEST_SENTENCE = 1000  # characters
_TITLE = "the text"


@dataclass(frozen=True)
class Needle:
    """A sentence, ways to ask for it, what an answer must hold, and sentences that look like it and say something else."""

    name: str
    sentence: str
    questions: tuple[str, ...]
    keywords: tuple[str, ...]
    distractors: tuple[str, ...]


def load_needles() -> list[Needle]:
    """Those that come with the program."""
    rows = json.loads((resources.files("liftlm.evaluation") / "needles.json").read_text(encoding="utf-8"))
    return [
        Needle(row["name"], row["sentence"], tuple(row["questions"]), tuple(row["keywords"]), tuple(row["distractors"]))
        for row in rows
    ]


class Needles(Benchmark):
    """lengths in tokens (about: 4.2 characters each), depths from 0 (beginning) to 1 (end).

    together: all needles in one haystack at different depths, each asked for; every needle comes to every depth of the grid
    once where the grid has as many depths as there are needles. texts: with `together` the first so many haystacks of a length
    only; two of them have one of three needles at each of six depths. distractors: look-alikes of the needle are hidden
    too, anywhere.
    """

    name = "needle"
    dataset = "needles of our own and the San Francisco one, in the text given with --data"
    source = "github.com/gkamradt/LLMTest_NeedleInAHaystack"
    metrics = ("recalled", "keyword_recall", "token_f1", "rouge_l")
    max_new_tokens = 48

    def __init__(
        self,
        lengths: Sequence[int] = (4000,),
        depths: Sequence[float] = (0.1, 0.5, 0.9),
        needles: Sequence[str] = (),
        together: bool = False,
        distractors: bool = False,
        texts: int | None = None,
    ) -> None:
        known = {needle.name: needle for needle in load_needles()}
        unknown = [name for name in needles if name not in known]
        if unknown:
            raise ConfigError(f"There is no needle '{unknown[0]}'.", f"Choose from {', '.join(known)}.")
        if any(not 0 <= depth <= 1 for depth in depths) or any(length < 100 for length in lengths):
            raise ConfigError("Depths go from 0 to 1, lengths from 100 tokens.", "Correct --depths or --lengths.")
        if texts is not None and not together:
            raise ConfigError("--texts goes with --together.", "Without it, give fewer --depths or --needles.")
        self.lengths, self.depths, self.texts = tuple(lengths), tuple(depths), texts
        self.needles = [known[name] for name in needles or known]
        self.together, self.distractors = together, distractors

    def load(self, data: Path | None, *, limit: int | None = None, seed: int = 0) -> list[Item]:
        if data is None:
            raise BenchmarkDataError("The haystack is missing.", "Give a long text with --data FILE.")
        text = load_document(str(data)).text
        items = []
        for length in self.lengths:
            if len(text) < length * _CHARACTERS:
                raise BenchmarkDataError(
                    f"{data} has about {len(text) / _CHARACTERS:,.0f} tokens, fewer than {length:,}.",
                    "Give a longer text.",
                )
            cut = cut_at_a_sentence(text, round(length * _CHARACTERS))
            for index in range(len(self.depths))[: self.texts]:
                groups = [self.needles] if self.together else [[needle] for needle in self.needles]
                items += [self._item(cut, length, self._placed(index, group), seed) for group in groups]
        return draw(items, limit, seed)

    def _placed(self, index: int, needles: Sequence[Needle]) -> list[tuple[float, Needle]]:
        """The first at the grid's depth `index`, the others as far from it and each other as may be."""
        depths, count = self.depths, len(needles)
        if len(depths) >= count:
            step = len(depths) // count
            return [(depths[(index + step * n) % len(depths)], needle) for n, needle in enumerate(needles)]
        return [
            (round((depths[index] + n / count) % 1, 2) if n else depths[index], needle)
            for n, needle in enumerate(needles)
        ]

    def _item(self, text: str, length: int, placed: Sequence[tuple[float, Needle]], seed: int) -> Item:
        depth, first = placed[0]
        chooser = random.Random(f"{seed}/{length}/{depth}/{first.name}")
        hidden = [(place, needle.sentence) for place, needle in placed]
        if self.distractors:
            hidden += [(chooser.random(), look) for _, needle in placed for look in needle.distractors]
        document = Document(title=_TITLE, text=hide(text, hidden), source=f"needle {length} {depth}")
        return Item(document, tuple(self._questions(placed, length)))

    def _questions(self, placed: Sequence[tuple[float, Needle]], length: int) -> list[Question]:
        return [
            Question(
                id=f"{needle.name}/{number}",
                question=asked,
                answers=(needle.sentence,),
                evidence=(needle.sentence,),
                kind=f"phrasing {number + 1}",
                data={"length": length, "depth": depth, "needle": needle.name, "keywords": list(needle.keywords)},
            )
            for depth, needle in placed
            for number, asked in enumerate(needle.questions)
        ]

    def score(self, question: Question, answer: str) -> dict[str, float]:
        share = metrics.keyword_recall(answer, question.data["keywords"])
        return {"recalled": float(share == 1), "keyword_recall": share} | super().score(question, answer)


def cut_at_a_sentence(text: str, characters: int) -> str:
    """The text's first `characters`, less the sentence that they break off."""
    if len(text) <= characters:
        return text
    ends = [sentence.end for sentence in split_into_sentences(text[: characters + _LONGEST_SENTENCE])]
    return text[: max((end for end in ends if end <= characters), default=characters)]


def hide(text: str, sentences: Sequence[tuple[float, str]]) -> str:
    """Each (depth, sentence) after the end of a sentence of the text nearest to that share of it, 0 at its very beginning."""
    ends = [0, *(sentence.end for sentence in split_into_sentences(text))]
    places: list[tuple[int, int, str]] = [
        (min(ends, key=lambda end: abs(end - depth * len(text))), number, sentence)
        for number, (depth, sentence) in enumerate(sentences)
    ]
    for place, _, sentence in sorted(places, reverse=True):
        before, after = text[:place], text[place:]
        text = f"{before}{' ' if before else ''}{sentence}{'' if after[:1].isspace() else ' '}{after}"
    return text
