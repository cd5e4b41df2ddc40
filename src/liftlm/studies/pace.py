"""The time to a document's first answer, with tasks written before training or while it goes on.

The writer is paced: it gives the extractive writer's tasks, each run of sentences after a pause, as a server of that speed
would. So the figure tells what the pipeline saves at a given speed of writing, without a server.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from liftlm.adapters import attach_adapter, remove_adapter
from liftlm.config import LiftConfig
from liftlm.documents import Document
from liftlm.examples import Example, make_examples, make_task_examples
from liftlm.models import Model
from liftlm.segments import split_into_segments
from liftlm.studies.costs import write_tokens
from liftlm.tasks.extractive import write_extractive_tasks
from liftlm.training import train

_NAME = "measured"
_SENTENCES = 8  # whose tasks come together


class PacedFeed:
    """Examples of tasks, a group of them each `pause` seconds, from the moment it is made."""

    def __init__(self, groups: Sequence[Sequence[Example]], pause: float) -> None:
        self._groups, self._pause, self._given = groups, pause, 0
        self._began = time.monotonic()
        self.expected = sum(map(len, groups))

    @property
    def finished(self) -> bool:
        return self._given == len(self._groups)

    def poll(self, wait: bool) -> list[Example]:
        if self.finished:
            return []
        ready = (
            min(len(self._groups), int((time.monotonic() - self._began) / self._pause))
            if self._pause
            else len(self._groups)
        )
        if ready <= self._given:
            if not wait:
                return []
            time.sleep(max(0.0, self._began + self._pause * (self._given + 1) - time.monotonic()))
            ready = self._given + 1
        found = [example for group in self._groups[self._given : ready] for example in group]
        self._given = ready
        return found


def first_token_seconds(model: Model, document: Document, config: LiftConfig, writing: float, pipeline: bool) -> float:
    """From the document to the first token of an answer, where writing all tasks takes `writing` seconds."""
    began = time.monotonic()
    segments = split_into_segments(
        model.encode(document.text), config.segments.segment_tokens, config.segments.overlap_tokens
    )
    examples = make_examples(segments, model.tokenizer)
    groups = _groups(model, document, config)
    attach_adapter(model, _NAME, config.adapter, config.seed)
    if pipeline:
        train(model, _NAME, examples, config, feed=PacedFeed(groups, writing / max(1, len(groups))))
    else:
        time.sleep(writing)
        train(model, _NAME, examples + [example for group in groups for example in group], config)
    write_tokens(model, model.encode(f'Please answer the question based on "{document.title}".'), 1)
    remove_adapter(model, _NAME)
    return time.monotonic() - began


def _groups(model: Model, document: Document, config: LiftConfig) -> list[list[Example]]:
    tasks = write_extractive_tasks(document.text, config.tasks.per_sentence, config.seed, config.tasks.answers)
    size = _SENTENCES * config.tasks.per_sentence
    made = [
        make_task_examples(tasks[start : start + size], model.tokenizer, document.title, model.window)
        for start in range(0, len(tasks), size)
    ]
    return [group for group in made if group]
