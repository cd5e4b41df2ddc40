"""Runs the configured writer: tasks as they arrive, filtered, kept as JSON lines beside the adapter. Resumable.

The order in which tasks arrived is the order of the file, and so of the training steps that use them. Knows nothing of training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from liftlm.adapters import use_adapter
from liftlm.config import AnsweringConfig, LiftConfig
from liftlm.documents import Document
from liftlm.generating import Prompt, generate
from liftlm.likelihood import Ranker
from liftlm.models import Model
from liftlm.pauses import pause
from liftlm.prompts import Turn, encode_text, render_prompt
from liftlm.storage import write_errors
from liftlm.tasks import Task, write_tasks_file
from liftlm.tasks.extractive import write_extractive_tasks
from liftlm.tasks.filters import filter_tasks
from liftlm.tasks.llm import LlmWriter, WriterReport
from liftlm.tasks.self_written import write_self_tasks
from liftlm.tasks.sentences import split_into_sentences
from liftlm.tasks.stream import TaskStream

TASKS_FILE = "tasks.jsonl"
_REPLIES_FILE = "replies.jsonl"  # the llm writer's own cache
_LOOK_SECONDS = 0.1  # between two pauses while a server is waited for
_QUESTION_TOKENS = 32  # that the self writer may take


class ArrivingTasks:
    """Tasks as a writer finishes them. What an earlier, interrupted run received comes first, in the same order."""

    def __init__(
        self,
        document: Document,
        model: Model | None,
        config: LiftConfig,
        folder: Path | None,
        given: Sequence[Task] | None,
    ) -> None:
        self._text, self._title = document.text, document.title
        self._model, self._config, self._folder, self._given = model, config, folder, given
        self.dropped: Counter[str] = Counter()  # by the filters' reasons
        # whether a language model writes them, so that training should not wait for all, and their worth is to be seen
        self.slow = given is None and config.tasks.writer in ("self", "llm")
        self._path = None if folder is None else folder / TASKS_FILE
        self._before = self._read() if self.slow else []  # the others have everything at once
        self._known = {(task.question, task.start) for task in self._before}
        self._reached = max((task.start for task in self._before), default=0)  # characters of the text
        self._asked: set[object] = set()  # the filters' marks of what was kept
        filter_tasks(self._before, self._text, self._asked)
        self.count = len(self._before)
        self._ended = False
        self._llm: LlmWriter | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None  # for replies that nobody keeps
        self._source: Iterator[list[Task]] | None = None  # once something is asked of it

    @property
    def report(self) -> WriterReport | None:
        """What the server took; None for the other writers."""
        return None if self._llm is None else self._llm.report

    @property
    def notes(self) -> list[str]:
        """What the filters dropped and what the server took, in sentences; nothing where neither was needed."""
        if not self.slow or self._source is None:
            return []
        listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.dropped.items()))
        notes = [f"Filtered out: {listed or 'none'}."]
        if (server := self.report) is not None:
            notes.append(
                f"Server: {server.requests:,} requests ({server.retries:,} repeated), {server.prompt_tokens:,} prompt and "
                f"{server.completion_tokens:,} answer tokens; {server.failed:,} of {server.sentences:,} sentences failed"
                + (", the budget is used up." if server.budget_reached else ".")
            )
        return notes

    @property
    def finished(self) -> bool:
        """Nothing more will come."""
        return self._ended and not self._before

    def begin(self) -> None:
        """Starts the writer and waits for the first new tasks: a server that is not there shows before anything else is done."""
        self._before += self._receive(wait=True)

    def poll(self, wait: bool = False) -> list[Task]:
        """What has arrived; with `wait`, something, unless nothing more will come. Raises what the writer raises."""
        if self._before:
            tasks, self._before = self._before, []
            return tasks
        return self._receive(wait)

    def _receive(self, wait: bool) -> list[Task]:
        while not self._ended:
            arrived = self._next(wait)
            if arrived is None:
                return []
            fresh = [task for task in arrived if (task.question, task.start) not in self._known]
            kept = fresh
            if self.slow:
                kept, dropped = filter_tasks(fresh, self._text, self._asked)
                self.dropped.update(dropped)
            if kept:
                self._append(kept)
                self.count += len(kept)
                return kept
            if not wait:
                return []
        return []

    @property
    def expected(self) -> int:
        """How many tasks there will be, from above."""
        settings = self._config.tasks
        runs = -(-len(split_into_sentences(self._text)) // settings.sentences_together)
        return (settings.requests or runs) * settings.per_sentence

    def all(self) -> list[Task]:
        """Everything, once it is there."""
        tasks: list[Task] = []
        while not self.finished:
            tasks += self.poll(wait=True)
        return tasks

    def __enter__(self) -> ArrivingTasks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        if isinstance(self._source, TaskStream):
            self._source.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _open(self) -> Iterator[list[Task]]:
        config, settings = self._config, self._config.tasks
        if self._given is not None:
            return iter([list(self._given)])
        if settings.writer == "none":
            return iter([])
        if settings.writer == "extractive":
            return iter([write_extractive_tasks(self._text, settings.per_sentence, config.seed, settings.answers)])
        if settings.writer == "self":
            model = self._model
            assert model is not None, "the model writes"
            ranker = Ranker(model, self._title)

            def judge(question: str, sentences: Sequence[str]) -> list[float]:
                with _bare(model):
                    return ranker.relevance(question, sentences)

            def say(conversations: Sequence[Sequence[str]]) -> list[str]:
                return _say(model, conversations, config.seed)

            return write_self_tasks(self._text, settings, config.seed, say, judge, self.dropped, self._reached)
        folder = self._folder
        if folder is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="liftlm-")
            folder = Path(self._scratch.name)
        self._llm = LlmWriter(self._text, settings, folder / _REPLIES_FILE, config.seed)
        return self._llm.stream()

    def _next(self, wait: bool) -> list[Task] | None:
        """None where nothing is there yet. Other writers than `llm` work only when they are waited for, or first."""
        if self._source is None:
            self._source = self._open()
        if isinstance(self._source, TaskStream):
            while True:
                tasks = self._source.poll(_LOOK_SECONDS if wait else 0.0)
                self._ended = self._source.finished
                if not wait or tasks is not None or self._ended:
                    return tasks
                pause()
        if not wait and self.count and self.slow:
            return None
        tasks = next(self._source, None)
        self._ended = tasks is None
        return tasks

    def _read(self) -> list[Task]:
        """Whole lines only: a line that a killed process left torn is written again."""
        if self._path is None or not self._path.is_file():
            return []
        tasks = []
        whole = 0
        content = self._path.read_bytes()
        for line in content.splitlines(keepends=True):
            try:
                if not line.endswith(b"\n"):
                    break
                tasks.append(Task(**json.loads(line)))
            except (ValueError, TypeError):
                break
            whole += len(line)
        if whole < len(content):
            with write_errors(self._path), self._path.open("r+b") as file:
                file.truncate(whole)
        return tasks

    def _append(self, tasks: Sequence[Task]) -> None:
        if self._path is None:
            return
        if not self.slow:
            write_tasks_file(self._path, tasks)
            return
        lines = "".join(json.dumps(dataclasses.asdict(task), ensure_ascii=False) + "\n" for task in tasks)
        with write_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(lines.encode())


def _say(model: Model, conversations: Sequence[Sequence[str]], seed: int) -> list[str]:
    """What the bare model says next in each; nothing where the window has no room for it."""

    def prompt(conversation: Sequence[str]) -> list[int]:
        turns = [
            Turn("assistant" if place % 2 else "user", tuple(encode_text(model.tokenizer, text)))
            for place, text in enumerate(conversation)
        ]
        return render_prompt(model.tokenizer, turns)

    tokens = [prompt(conversation) for conversation in conversations]
    fitting = [index for index, prompt in enumerate(tokens) if len(prompt) + _QUESTION_TOKENS <= model.window]
    said = [""] * len(conversations)
    if not fitting:
        return said
    settings = AnsweringConfig(max_new_tokens=_QUESTION_TOKENS, temperature=0.7, top_p=0.95)
    with _bare(model):
        for text in generate(model, [Prompt(tokens[index], "self") for index in fitting], settings, seed):
            said[fitting[text.index]] = text.text
    return said


@contextlib.contextmanager
def _bare(model: Model) -> Iterator[None]:
    """The model without any adapter, not in training."""
    training = model.network.training
    with use_adapter(model, None):
        model.network.eval()
        try:
            yield
        finally:
            model.network.train(training)
