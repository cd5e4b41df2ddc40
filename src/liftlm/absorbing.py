"""Document → adapter: the whole of LIFT in one function. Read this first."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liftlm.adapters import attach_adapter, remove_adapter, start_fingerprint
from liftlm.config import LiftConfig, RetrievalConfig
from liftlm.devices import join_processes
from liftlm.distilling import task_examples
from liftlm.documents import Document
from liftlm.drift import check_drift, write_drift_texts
from liftlm.errors import ConfigError, EmptyDocumentError
from liftlm.examples import Example, make_examples, make_task_examples
from liftlm.examples_on_disk import keep_on_disk
from liftlm.models import Model
from liftlm.reading import with_text
from liftlm.retrieval import Retriever
from liftlm.rows import SoftTargets
from liftlm.segments import split_into_segments
from liftlm.storage import canonical_json
from liftlm.tasks import Task
from liftlm.tasks.extractive import WRITER_VERSION
from liftlm.training import OnStep, TrainingReport, train
from liftlm.writing import ArrivingTasks

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Adapter:
    """An absorbed document: the weights live on the model's network (or in the library) under `id`."""

    id: str
    document: Document
    document_tokens: int
    segments: int
    tasks: int
    config: LiftConfig  # resolved
    report: TrainingReport
    notes: tuple[str, ...] = ()  # of writing the tasks, in sentences; nothing where the library had it


def absorb(
    document: Document,
    model: Model,
    config: LiftConfig | None = None,
    *,
    tasks: Sequence[Task] | None = None,
    folder: Path | None = None,
    on_step: OnStep = lambda metrics: None,
) -> Adapter:
    """Fine-tunes a fresh adapter on overlapping segments of the document and on questions about it (LIFT, section 3).

    tasks: given ones, instead of those that `config.tasks.writer` would write.

    With a folder, checkpoints, tasks.jsonl and metrics.jsonl go there and an interrupted call continues where it stopped;
    without one nothing is written. `Library.absorb_once` does this and keeps the result. Raises what `train` and the
    writer raise, and EmptyDocumentError.
    """
    config = model.resolve(config or LiftConfig())
    check_drift(model, config)
    name = adapter_id(document, model, config, tasks)
    # 1. the document, in pieces that fit the window and overlap, so that what follows what is learnt too
    tokens = model.encode(document.text)
    segments = split_into_segments(tokens, config.segments.segment_tokens, config.segments.overlap_tokens)
    # 2. questions that the document answers; a language model may write them while training goes on
    with ArrivingTasks(document, model, config, folder, tasks) as arriving:
        # 3. both, with labels
        lessons = _make_lessons(model, document, tokens, config, arriving, folder)
        examples = keep_on_disk(itertools.chain(make_examples(segments, model.tokenizer), lessons.examples), folder)
        lessons.examples.clear()
        if not examples:
            raise EmptyDocumentError(
                f"'{document.title}' is a single token; there is nothing to learn.", "Give a longer document."
            )
        drift = write_drift_texts(model, config, folder and folder / "drift.safetensors")
        # 4. the weights that may change
        attach_adapter(model, name, config.adapter, config.seed, tokens)
        # 5. learn
        try:
            report = train(
                model,
                name,
                examples,
                config,
                feed=lessons.feed,
                soft=lessons.soft,
                drift=drift,
                folder=folder,
                on_step=on_step,
            )
        except BaseException:
            remove_adapter(model, name)  # nobody may take a half-trained one for the real one
            raise
        count = arriving.count if lessons.feed is not None else lessons.tasks
        return Adapter(name, document, len(tokens), len(segments), count, config, report, tuple(arriving.notes))


@dataclass(frozen=True)
class _Lessons:
    """What tasks bring to training: examples at once, or a feed of them."""

    examples: list[Example]
    tasks: int = 0
    soft: SoftTargets | None = None
    feed: _Feed | None = None


def _make_lessons(
    model: Model,
    document: Document,
    tokens: Sequence[int],
    config: LiftConfig,
    arriving: ArrivingTasks,
    folder: Path | None,
) -> _Lessons:
    """A feed where a language model writes, so that training need not wait. A teacher needs all tasks at once."""
    if config.tasks.mix == 0:
        return _Lessons([])
    if model.tensor_parallel and config.tasks.writer == "self":
        raise ConfigError(
            "A model that is divided over processes cannot write tasks.", "Use --set tasks.writer=extractive."
        )
    together = join_processes(model.device)
    if arriving.slow and together.num_processes == 1 and not config.tasks.teacher_weight:
        arriving.begin()
        return _Lessons([], feed=_Feed(model, document, tokens, config, arriving))
    written = _for_all_processes(arriving.all, together)
    cache = folder and folder / "teacher.safetensors"
    examples, soft = task_examples(model, document, written, config, cache)
    return _Lessons(examples, len(written), soft)


class _Feed:
    """Examples made of tasks as they arrive."""

    def __init__(
        self,
        model: Model,
        document: Document,
        tokens: Sequence[int],
        config: LiftConfig,
        arriving: ArrivingTasks,
    ) -> None:
        self._model, self._document, self._tokens = model, document, tokens
        self._config, self._arriving = config, arriving
        by_question = config.tasks.show == "retrieve"
        self._retriever = Retriever(document.text, model.encode, RetrievalConfig()) if by_question else None
        self.expected = round(arriving.expected * (1 + config.tasks.reading))

    @property
    def finished(self) -> bool:
        return self._arriving.finished

    def poll(self, wait: bool) -> list[Example]:
        model = self._model
        examples: list[Example] = []
        for task in self._arriving.poll(wait):  # one by one: a resumed run gets many at once and must number them alike
            examples += make_task_examples([task], model.tokenizer, self._document.title, model.window)
            examples += with_text(model, self._document, [task], self._config, self._tokens, self._retriever)
        return examples


def _for_all_processes(write: Callable[[], list[Task]], together: Accelerator) -> list[Task]:
    """One process writes, and all train on the same."""
    from accelerate.utils import broadcast_object_list

    written = [write() if together.is_main_process else []]
    if together.num_processes > 1:
        broadcast_object_list(written)
    return written[0]


def adapter_id(document: Document, model: Model, config: LiftConfig, tasks: Sequence[Task] | None = None) -> str:
    """What decides an adapter's content, hashed: text, title, base weights, recipe, start and tasks if given. 16 hex digits."""
    recipe = model.resolve(config).recipe(tasks_given=tasks is not None)
    parts: dict[str, Any] = {
        "text": document.id, "title": document.title, "model": model.fingerprint, "recipe": recipe
    }  # fmt: skip
    if (start := start_fingerprint(config.adapter)) is not None:
        parts["start"] = start
    if tasks is None and config.tasks.writer == "extractive":
        parts["writer"] = WRITER_VERSION
    if tasks is not None:
        parts["tasks"] = [dataclasses.asdict(task) for task in tasks]
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]
