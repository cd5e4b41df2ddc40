"""The writer that uses the model itself, where there is no server: the model being trained, with the adapter off.

Asks for questions only, one at a time after a few examples, as small models manage that; their own answers are mostly
invented, so the answer is the sentence that the question is about. A question is kept where it makes that sentence likelier,
and names nothing that the document does not. Batches of sentences are written when more tasks are wanted. Knows the words of
the request; how the model goes on, and what it finds likely, are given to it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from liftlm.config import TasksConfig
from liftlm.tasks.filters import words
from liftlm.tasks.replies import Request, make_requests
from liftlm.tasks.sentences import Sentence, split_into_sentences
from liftlm.tasks.task import Task

# conversations, user and assistant by turns, the user last → what the model says next in each
Say = Callable[[Sequence[Sequence[str]]], Sequence[str]]
# a question and sentences → by how many nats the question makes each likelier as its answer
Judge = Callable[[str, Sequence[str]], Sequence[float]]

_CONTEXT = 300  # characters of the text before a sentence
_TOGETHER = 16  # runs of sentences written about at once
_ROUNDS = 2  # each sentence is asked about anew where a first round brought too few questions
_LEAST = 8.0  # nats; below, a question is mostly about nothing or about something else
_FEWEST_WORDS = 3  # of a question
_MARK = re.compile("[?？]")
_NAMES = re.compile(r"[A-Z][\w’'-]*|\d[\d.,]*")
_FORMS = ("who", "when", "where", "why", "how many", "how", "which", "what")

# text before, a sentence, a question
_EXAMPLES = (
    (
        "Two islands lie off the coast.",
        "The ferry between them was closed in 1962, after the bridge had been built.",
        "When did the ferry between the two islands stop running?",
    ),
    (
        "The lighthouse was built of granite.",
        "Marta Olsen, the harbour master, kept its keys in a tin box.",
        "Who looked after the keys of the lighthouse?",
    ),
    (
        "The winter of 1894 was the coldest anyone could remember.",
        "Because the river had frozen, the grain could not be brought to the mill.",
        "Why did the grain not reach the mill?",
    ),
    (
        "The valley is narrow.",
        "Nearly four hundred people live in it, most of them shepherds.",
        "What do most people in the valley do for a living?",
    ),
    (
        "The council met in the old school.",
        "Its members chose the site by the harbour, which was cheaper.",
        "How did the council come to choose the site by the harbour?",
    ),
)


def write_self_tasks(
    text: str,
    config: TasksConfig,
    seed: int,
    say: Say,
    judge: Judge,
    dropped: Counter[str],
    written: int = 0,
) -> Iterator[list[Task]]:
    """The tasks of one batch of sentences after the other, in the order of the text.

    dropped: counts what was not kept, by reason. written: where in the text the last sentence begins that an earlier run has
    tasks of; the batches before it are done.
    """
    requests = make_requests(text, config.sentences_together, config.requests, seed)
    sentences = split_into_sentences(text)
    known = set(words(text))
    for start in range(0, len(requests), _TOGETHER):
        batch = requests[start : start + _TOGETHER]
        if batch[-1].sentence.start < written:
            continue
        tasks: list[list[Task]] = [[] for _ in batch]
        for _ in range(_ROUNDS):
            wanting = [
                place for place, some in enumerate(tasks) for _ in range(max(0, config.per_sentence - len(some)))
            ]
            said = say([self_request(batch[place]) for place in wanting]) if wanting else []
            for place, question in zip(wanting, said, strict=True):
                run = batch[place].sentence
                inside = [sentence for sentence in sentences if run.start <= sentence.start < run.end]
                task = _task(question, inside, known, judge, dropped)
                if task is not None and all(task.question != other.question for other in tasks[place]):
                    tasks[place].append(task)
        yield [task for some in tasks for task in some]


def self_request(request: Request) -> list[str]:
    """The conversation so far: examples, and what is asked for now."""
    turns: list[str] = []
    for before, sentence, question in _EXAMPLES:
        turns += [_ask(before, sentence), question]
    return [*turns, _ask(" ".join(request.context.split())[-_CONTEXT:], request.sentence.text, request.sentences > 1)]


def _ask(before: str, text: str, several: bool = False) -> str:
    context = f"Text before: {before}\n" if before else ""
    label, what = ("Sentences", "one of the sentences") if several else ("Sentence", "the sentence")
    return f"{context}{label}: {text}\nWrite a question that {what} answers."


def _task(
    said: str, sentences: Sequence[Sentence], known: set[str], judge: Judge, dropped: Counter[str]
) -> Task | None:
    """What was said as a question that one of the sentences answers, if it is one."""
    question = " ".join(said.split())
    mark = _MARK.search(question)
    question = question[: mark.end()] if mark else ""
    if len(words(question)) < _FEWEST_WORDS:
        dropped["malformed"] += 1
        return None
    if not set(words(" ".join(_NAMES.findall(question)[1:]))) <= known:
        dropped["names what the document does not"] += 1
        return None
    nats = judge(question, [sentence.text for sentence in sentences])
    best = max(range(len(sentences)), key=lambda place: nats[place])
    if nats[best] < _LEAST:
        dropped["about something else"] += 1
        return None
    kind = next((form for form in _FORMS if re.search(rf"\b{form}\b", question.lower())), "self")
    return Task(question, sentences[best].text, kind, sentences[best].start, sentences[best].end)
