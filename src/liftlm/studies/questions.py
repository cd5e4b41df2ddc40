"""The questions that studies ask: those that a document came with, orders of its own sentences, and facts of source code.

One benchmark for all, so that `lift evaluate`'s predictor, likelihoods and methods serve every study. All metrics of a row
are better the higher they are. Made questions are stated as such by their kind.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from liftlm.documents import Document
from liftlm.evaluation import metrics, timeline
from liftlm.evaluation.benchmark import Benchmark, Item, Question
from liftlm.evaluation.corpora import LISTED
from liftlm.evaluation.multiple_choice import choice_accuracy, choice_wording
from liftlm.evaluation.needles import hide, load_needles
from liftlm.evaluation.scoring import choice_scores, question_of
from liftlm.prompts import Wording, question_wording
from liftlm.tasks.sentences import split_into_sentences

ORDER = "order in the text"  # made: sentences to be put into the order of the text
NEEDLE = "needle"  # made: a sentence that was hidden in the text
CODE = "code"  # made: what a function takes, raises, does
_EVENTS, _WRONG_ORDERS = 3, 5
_EVENT_CHARACTERS = (24, 160)


class StudyQuestions(Benchmark):
    """Token F1 for all; for orders also the coordinate score; for listed options accuracy."""

    name = "study"
    dataset = "given with --data"
    source = "the questions' own"
    metrics = ("token_f1",)
    max_new_tokens = 48

    def load(self, data: Path | None, *, limit: int | None = None, seed: int = 0) -> list[Item]:
        raise NotImplementedError("studies bring their items")

    def wording(self, document: Document, question: Question) -> Wording:
        if question.data.get(LISTED):
            return choice_wording(document, question)
        return question_wording(document.title, question.question)

    def score(self, question: Question, answer: str) -> dict[str, float]:
        scores = {"token_f1": max(metrics.token_f1(answer, reference) for reference in question.answers)}
        events = timeline.parse_events(question.question)
        labels = re.findall(r"\w+", question.answers[0])
        if events and sorted(labels) == sorted(events):
            given = timeline.parse_order(answer, labels, events)
            scores["coordinate_score"] = timeline.coordinate_score(given, labels)
        if keywords := question.data.get("keywords"):
            scores["recalled"] = float(metrics.keyword_recall(answer, keywords) == 1)
        if question.data.get(LISTED):
            scores["accuracy_generated"] = choice_accuracy(question, answer)
        return scores


def score_row(row: Mapping[str, Any]) -> dict[str, float]:
    """Every metric of a predicted row, the higher the better: likelihood is −NLL of the answer in nats a token.

    order_margin: by how many nats the right choice is likelier than the mean of the wrong ones.
    """
    question = question_of(row)
    scores = StudyQuestions().score(question, row["answer"]) | choice_scores(row)
    if row.get("answer_nll") is not None:
        scores["likelihood"] = -float(row["answer_nll"])
    sums = [pair[0] for pair in row.get("choice_nlls") or []]
    if question.choices and len(sums) == len(question.choices) and question.answers[0] in question.choices:
        right = sums.pop(question.choices.index(question.answers[0]))
        scores["order_margin"] = sum(sums) / len(sums) - right
    return scores


def with_needles(item: Item, count: int = 3) -> Item:
    """The document with sentences hidden at even depths, and a question about each."""
    needles = load_needles()[:count]
    places = [(number + 0.5) / count for number in range(count)]
    text = hide(item.document.text, [(place, n.sentence) for place, n in zip(places, needles, strict=True)])
    asked = [
        Question(
            f"needle-{n.name}",
            n.questions[0],
            (n.sentence,),
            (n.sentence,),
            NEEDLE,
            data={"keywords": list(n.keywords)},
        )
        for n in needles
    ]
    return Item(dataclasses.replace(item.document, text=text), (*item.questions, *asked))


# --- orders -----------------------------------------------------------------------------------------------------------


def order_questions(document: Document, count: int, seed: int, reach: int) -> list[Question]:
    """Sentences that stand up to `reach` characters apart, shuffled; the choices are the right order and wrong ones.

    Spread over the document, so that some groups lie inside a segment and others across the borders of several.
    """
    draw = random.Random(f"{seed}/order/{document.id}")
    sentences = [
        sentence
        for sentence in split_into_sentences(document.text)
        if _EVENT_CHARACTERS[0] <= len(sentence.text) <= _EVENT_CHARACTERS[1] and "\n" not in sentence.text
    ]
    questions: list[Question] = []
    for number in range(count):
        at = len(sentences) * number // max(1, count)
        chosen = sentences[at : at + 1]
        while chosen and len(chosen) < _EVENTS:
            last = chosen[-1].end
            near = [s for s in sentences if last + 1 < s.start <= last + reach]
            if not near:
                break
            chosen.append(draw.choice(near))
        if len(chosen) == _EVENTS:
            questions.append(_order_question([sentence.text for sentence in chosen], draw, str(number)))
    return questions


def _order_question(events: Sequence[str], draw: random.Random, number: str) -> Question:
    shown = list(range(len(events)))
    while shown == sorted(shown):
        draw.shuffle(shown)
    lines = "\n".join(f"{label}. {events[place]}" for label, place in enumerate(shown, 1))
    right = tuple(shown.index(place) + 1 for place in range(len(events)))
    wrong = [order for order in itertools.permutations(right) if order != right]
    wrong = draw.sample(wrong, min(_WRONG_ORDERS, len(wrong)))
    orders = tuple(", ".join(map(str, order)) for order in [right, *wrong])
    asked = f"In which order does the text tell this? Answer with the numbers.\n{lines}"
    return Question(f"order-{number}", asked, orders[:1], tuple(events), ORDER, orders)


# --- source code ------------------------------------------------------------------------------------------------------


def code_questions(document: Document) -> list[Question]:
    """Facts that the syntax tree states: what a function does (its docstring), its default values, what it raises."""
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    questions = [
        question
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        for question in _of_definition(node, document.text)
    ]
    seen: set[str] = set()
    unique = [q for q in questions if not (q.question in seen or seen.add(q.question))]  # type: ignore[func-returns-value]
    random.Random(f"code/{document.id}").shuffle(unique)
    return unique


def _of_definition(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, text: str) -> Iterator[Question]:
    what = "class" if isinstance(node, ast.ClassDef) else "function"
    line = text.splitlines()[node.lineno - 1].strip()
    told = (ast.get_docstring(node, clean=False) or "").strip().split("\n\n")[0].strip()
    if told and len(told) < 200:
        yield _code(f"What does the {what} {node.name} do?", " ".join(told.split()), (line, told), node, "purpose")
    if isinstance(node, ast.ClassDef):
        return
    named = [*node.args.posonlyargs, *node.args.args]
    pairs = list(zip(named[len(named) - len(node.args.defaults) :], node.args.defaults, strict=True))
    pairs += [
        (name, value)
        for name, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        if value is not None
    ]
    for argument, value in pairs:
        asked = f"What is the default value of the argument {argument.arg} of the function {node.name}?"
        yield _code(asked, ast.unparse(value), (line,), node, argument.arg)
    raised = {each.exc.func.id for each in ast.walk(node) if isinstance(each, ast.Raise) and _is_named(each.exc)}  # type: ignore[union-attr]
    if len(raised) == 1:
        (name,) = raised
        yield _code(f"Which exception does the function {node.name} raise?", name, (line,), node, "raises")


def _is_named(raised: ast.expr | None) -> bool:
    return isinstance(raised, ast.Call) and isinstance(raised.func, ast.Name)


def _code(asked: str, answer: str, evidence: tuple[str, ...], node: Any, about: str) -> Question:
    return Question(f"code-{node.lineno}-{about}", asked, (answer,), evidence, CODE)
