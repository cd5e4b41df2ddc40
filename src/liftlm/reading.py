"""Text of the document in the window of a training example, as it will be there when questions are answered."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from liftlm.config import LiftConfig, RetrievalConfig
from liftlm.context import MARK, cut_out_middle
from liftlm.documents import Document
from liftlm.examples import Example, answer_example, make_task_examples
from liftlm.models import Model
from liftlm.prompts import question_prompt
from liftlm.retrieval import Retriever
from liftlm.tasks import Task
from liftlm.tasks.sentences import split_into_sentences

_MOST_OTHERS = 3  # sentences beside the evidence; answering shows up to one


@dataclass(frozen=True)
class Passage:
    """A run of whole sentences, as characters of the text, and the tasks whose evidence lies inside."""

    start: int
    end: int
    tasks: tuple[Task, ...]


def split_into_passages(text: str, tasks: Sequence[Task], characters: int) -> list[Passage]:
    """The document in runs of sentences of about so many characters; tasks whose evidence is in none are left out."""
    spans: list[tuple[int, int]] = []
    for sentence in split_into_sentences(text):
        if spans and sentence.end - spans[-1][0] <= characters:
            spans[-1] = (spans[-1][0], sentence.end)
        else:
            spans.append((sentence.start, sentence.end))
    inside: list[list[Task]] = [[] for _ in spans]
    place = 0
    for task in sorted(tasks, key=lambda task: task.start):
        while place < len(spans) and spans[place][1] <= task.start:
            place += 1
        if place < len(spans) and spans[place][0] <= task.start and task.end <= spans[place][1]:
            inside[place].append(task)
    return [Passage(*span, tuple(held)) for span, held in zip(spans, inside, strict=True)]


def with_head_and_tail(
    model: Model, document: Document, tasks: Sequence[Task], tokens: Sequence[int] | None = None
) -> list[Example]:
    """Contextualised training (2502.14644): the text that truncated in-context learning would show, before the question.

    tokens: the document's, where the caller has them.
    """
    bare = make_task_examples(tasks, model.tokenizer, document.title, model.window)
    if not bare:
        return []
    # what a question takes: its own prompt and answer, and the wording around the text, measured with one token of text
    frame = len(question_prompt(model.tokenizer, document.title, "?", [0]))
    room = model.window - max(len(example) for example in bare) - frame
    tokens = model.encode(document.text) if tokens is None else tokens
    context = cut_out_middle(tokens, room, model.encode(MARK)) if room > 0 else []
    group = f"head and tail {len(context)}"  # of another length where tasks that arrive later are longer
    return make_task_examples(tasks, model.tokenizer, document.title, model.window, context, group)


def with_text(
    model: Model,
    document: Document,
    tasks: Sequence[Task],
    config: LiftConfig,
    tokens: Sequence[int] | None = None,
    retriever: Retriever | None = None,
) -> list[Example]:
    """`tasks.reading` of the tasks, with text in the window as `tasks.show` says, and the task's own answer.

    passage: text around the evidence, whose place in it varies. retrieve: the evidence among up to three other sentences that
    BM25 finds for the question, parted as in answering. truncate: head and tail. tokens, retriever: the document's, where the
    caller has them.
    """
    settings, examples = config.tasks, []
    if settings.show == "retrieve" and retriever is None:
        retriever = Retriever(document.text, model.encode, RetrievalConfig())
    for task in tasks:
        draw = random.Random(f"{config.seed}/{task.start}/{task.question}")  # the same whatever arrives together
        if draw.random() >= settings.reading:
            continue
        if settings.show == "truncate":
            # each shows as much as its own length leaves room for, so that no beginning is shared
            shown = with_head_and_tail(model, document, [task], tokens)
            examples += [dataclasses.replace(example, group="passages", shared=0) for example in shown]
            continue
        if retriever is not None:
            context = _among_found(retriever, model.encode(MARK), task, draw)
        else:
            context = model.encode(_around(document.text, task, settings.passage_characters, draw))
        example = answer_example(model.tokenizer, document.title, task.question, task.answer, model.window, context)
        if example is not None:
            examples.append(dataclasses.replace(example, group="passages"))
    return examples


def _around(text: str, task: Task, characters: int, draw: random.Random) -> str:
    room = max(0, characters - (task.end - task.start))
    before = draw.randint(0, room)
    return text[max(0, task.start - before) : min(len(text), task.end + room - before)]


def _among_found(retriever: Retriever, mark: Sequence[int], task: Task, draw: random.Random) -> list[int]:
    held = [piece for piece in retriever.pieces if piece.start < task.end and task.start < piece.end]
    others = (piece for piece in retriever.ranked(task.question) if piece not in held)
    return retriever.join([*held, *itertools.islice(others, draw.randint(0, _MOST_OTHERS))], mark)
