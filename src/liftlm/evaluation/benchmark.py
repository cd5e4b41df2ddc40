"""What an evaluation asks: documents with questions, how a question is worded, and how one answer is scored.

A benchmark is one small class: data, prompt, score. Its header names dataset, metric and source. It knows nothing of
models: answers come in as texts, and everything that scoring needs is in the `Question`, which is written beside them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import liftlm.evaluation.metrics as scoring_rules
from liftlm.context import MARK
from liftlm.documents import Document
from liftlm.prompts import Wording, question_wording


@dataclass(frozen=True)
class Question:
    """A question about a document with its accepted answers. Plain data: it goes to predictions.jsonl as JSON."""

    id: str  # unique within its document
    question: str
    answers: tuple[str, ...]  # references; the likelihood of an answer is measured on the first
    evidence: tuple[str, ...] = ()  # sentences of the document, in its order; empty: there is no oracle
    kind: str = ""  # subtype, for tables and plots
    choices: tuple[str, ...] = ()  # of a multiple choice; answers[0] is one of them
    data: Mapping[str, Any] = field(default_factory=dict)  # what else scoring needs, as JSON


@dataclass(frozen=True)
class Item:
    """One document with all its questions: it is absorbed once for all of them."""

    document: Document
    questions: tuple[Question, ...]


class Benchmark:
    """Base of all benchmarks. `load` must be given; wording and score are those of question answering."""

    name: ClassVar[str]  # as on the command line
    dataset: ClassVar[str]  # public id
    source: ClassVar[str]  # where prompt and metric come from
    metrics: ClassVar[tuple[str, ...]] = ("token_f1", "rouge_l")  # what `score` gives, in the order of the table
    bert_score: ClassVar[bool] = False  # whether its authors report BERTScore, which is computed on demand only
    max_new_tokens: ClassVar[int] = 64
    middle: ClassVar[str] = MARK  # what stands where the middle of a text is cut out
    chat_template: ClassVar[bool] = True  # whether prompts go through the model's chat template

    def load(self, data: Path | None, *, limit: int | None = None, seed: int = 0) -> list[Item]:
        """The documents in the order of the data. data: a file, or a folder that holds it; None: the hub's dataset.

        limit: at most so many questions in all, drawn by `draw` with `seed`. Raises BenchmarkDataError.
        """
        raise NotImplementedError

    def wording(self, document: Document, question: Question) -> Wording:
        """The user's turn, with and without text of the document."""
        return question_wording(document.title, question.question)

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """Every one of `metrics`, 0 to 1, higher is better unless the metric's own definition says otherwise."""
        return {
            "token_f1": max(scoring_rules.token_f1(answer, reference) for reference in question.answers),
            "rouge_l": max(scoring_rules.rouge(answer, reference)["rouge_l"] for reference in question.answers),
        }

    def weight(self, question: Question, metric: str) -> float:
        """How much a question counts in the mean of a metric."""
        return 1.0


def draw(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """At most `limit` questions in all, drawn at random, spread evenly over the documents; orders are kept."""
    if limit is None:
        return list(items)
    chooser = random.Random(seed)
    queues = [chooser.sample(range(len(item.questions)), len(item.questions)) for item in items]
    taken: list[set[int]] = [set() for _ in items]
    turns = chooser.sample(
        range(len(items)), len(items)
    )  # with fewer questions than documents not always the first ones
    while limit > 0 and any(queues):
        for index in turns:
            if queues[index] and limit > 0:
                taken[index].add(queues[index].pop())
                limit -= 1
    return [
        Item(item.document, tuple(question for index, question in enumerate(item.questions) if index in kept))
        for item, kept in zip(items, taken, strict=True)
        if kept
    ]
