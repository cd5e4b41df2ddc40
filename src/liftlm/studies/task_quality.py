"""How good written tasks are, in numbers: faithful, answerable, various, spread over the document. One row a task, one a set."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence

import torch

from liftlm.adapters import use_adapter
from liftlm.documents import Document
from liftlm.examples import answer_example
from liftlm.models import Model
from liftlm.studies.study import Row
from liftlm.studies.tables import ORDERS
from liftlm.tasks import Task
from liftlm.tasks.filters import filter_tasks, task_statistics, words
from liftlm.tasks.sentences import split_into_sentences

CLASSES = ("factual", "causal", "temporal")
_TEMPORAL = re.compile(
    r"\b(?:when|before|after|first|earlier|earliest|later|latest|older|order|date|year|time|until|since|how long)\b"
)
_CAUSAL = re.compile(r"\b(?:why|because|cause[sd]?|reasons?|led to|result(?:s|ed)?|purpose|how come|in order to)\b")


def question_class(kind: str, question: str) -> str:
    """factual, causal or temporal, by the kind where it says so, else by the question's words."""
    text = question.casefold()
    if _CAUSAL.search(text):
        return "causal"
    if kind in ORDERS or kind in ("when", "first", "order", "next") or _TEMPORAL.search(text):
        return "temporal"
    return "factual"


def task_row(model: Model, document: Document, task: Task) -> Row:
    """faithful: the filters find the answer in the evidence; answerable: the evidence makes the base model likelier to give it.

    support: share of the answer's words that stand in the evidence; evidence_gain: nats a token.
    """
    evidence = document.text[task.start : task.end]
    dropped = filter_tasks([task], document.text)[1]
    own, told = set(words(evidence)), words(task.answer)
    gain = _evidence_gain(model, document, task, evidence)
    return {
        "kind": task.kind,
        "class": question_class(task.kind, task.question),
        "question": task.question,
        "answer": task.answer,
        "evidence": evidence,
        "objection": next(iter(dropped), ""),
        "faithful": float("unanswerable" not in dropped and "says nothing" not in dropped),
        "support": sum(word in own for word in told) / max(1, len(told)),
        "evidence_gain": gain,
        "answerable": None if gain is None else float(gain > 0),
    }


def set_row(tasks: Sequence[Task], document: Document) -> Row:
    """Of all tasks of one document: how many, how much of it they cover, how various they are (kind_entropy in bits)."""
    found = task_statistics(tasks, split_into_sentences(document.text))
    pairs = Counter(pair for task in tasks for pair in _pairs(words(task.question)))
    shares = [count / max(1, len(tasks)) for count in found.by_kind.values()]
    classes = Counter(question_class(task.kind, task.question) for task in tasks)
    return {
        "tasks": len(tasks),
        "covered": found.covered,
        "distinct_questions": found.distinct_questions / max(1, len(tasks)),
        "distinct_pairs": len(pairs) / max(1, sum(pairs.values())),
        "kind_entropy": -sum(share * math.log2(share) for share in shares if share),
        "question_words": found.question_words,
        "answer_words": found.answer_words,
        **{f"share_{name}": classes[name] / max(1, len(tasks)) for name in CLASSES},
    }


@torch.inference_mode()
def _evidence_gain(model: Model, document: Document, task: Task, evidence: str) -> float | None:
    """−NLL of the answer with the evidence in the window, less that without; None where it does not fit."""
    losses = []
    with use_adapter(model, None):
        for context in ((), model.encode(evidence)):
            example = answer_example(
                model.tokenizer, document.title, task.question, task.answer, model.window, list(context)
            )
            if example is None:
                return None
            ids = torch.tensor([example.tokens], device=model.device)
            labels = torch.tensor([example.labels], device=model.device)
            losses.append(float(model.loss_sum(ids, labels)) / example.targets)
    return losses[0] - losses[1]


def _pairs(found: Sequence[str]) -> list[tuple[str, str]]:
    return list(itertools.pairwise(found))
