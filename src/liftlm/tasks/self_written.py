"""The writer that uses the model itself, where there is no server: the model being trained, with the adapter off.

Asks for plain lines instead of JSON, as small models manage those. Batches of sentences are written when more tasks are wanted.
Knows the words of the request; how a prompt is continued is given to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from liftlm.config import TasksConfig
from liftlm.tasks.replies import Request, make_requests, read_reply
from liftlm.tasks.task import Task

# requests → what the model continued each with
Continue = Callable[[Sequence[str]], Sequence[str]]
_CONTEXT = 400  # characters of the text before a sentence
_TOGETHER = 16  # sentences written about at once


def write_self_tasks(
    text: str, config: TasksConfig, seed: int, continue_all: Continue, written: int = 0
) -> Iterator[list[Task]]:
    """The tasks of one batch of sentences after the other, in the order of the text. Unreadable replies give none.

    written: where in the text the last sentence begins that an earlier run has tasks of; the batches before it are done.
    """
    requests = make_requests(text, config.sentences_together, config.requests, seed)
    for start in range(0, len(requests), _TOGETHER):
        batch = requests[start : start + _TOGETHER]
        if batch[-1].sentence.start < written:
            continue
        replies = continue_all([self_request(request, config.per_sentence) for request in batch])
        yield [
            Task(pair.question, pair.answer, pair.kind or "self", request.sentence.start, request.sentence.end)
            for request, reply in zip(batch, replies, strict=True)
            for pair in read_reply(f"Question: {reply}", config.per_sentence) or []
        ]


def self_request(request: Request, count: int) -> str:
    """The user's words; the reply is begun with "Question:", which a small model then keeps to."""
    before = " ".join(request.context.split())[-_CONTEXT:]
    return (
        (f"Text before: …{before}\n\n" if before else "")
        + f"Sentence: {request.sentence.text}\n\n"
        + f"Write {count} different short questions that this sentence answers, each followed by its short answer in the "
        + "sentence's own words, like this:\nQuestion: …\nAnswer: …"
    )
