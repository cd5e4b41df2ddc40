"""Documents and questions → predictions.jsonl, by every method at the same window. Resumable row by row.

A document is absorbed once for all its questions and methods, into the library, and its neighbour in the benchmark is
absorbed as its control (`lift-other`, `lift-other+…`). Knows nothing of metrics: what it writes is scored later, without a model.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from liftlm.absorbing import Adapter
from liftlm.adapters import start_fingerprint, use_adapter
from liftlm.answering import window_text
from liftlm.config import AnsweringConfig, LiftConfig, RetrievalConfig
from liftlm.context import MARK, WindowText
from liftlm.demo import load_demo
from liftlm.devices import peak_memory, reset_peak_memory
from liftlm.documents import Document
from liftlm.errors import ConfigError, QuestionTooLongError
from liftlm.evaluation.benchmark import Benchmark, Item, Question
from liftlm.evaluation.interference import Interference, measure_interference
from liftlm.evaluation.scoring import read_predictions, read_rows
from liftlm.generating import generate
from liftlm.library import Library
from liftlm.likelihood import continuation_nlls
from liftlm.models import Model
from liftlm.prompts import encode_text
from liftlm.storage import append_json_line, canonical_json
from liftlm.tasks import Task
from liftlm.training import OnStep
from liftlm.windows import FilledWindow, fill_window

Row = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """What a method is: whose adapter is on, and which text stands in the window."""

    adapter: Literal["none", "own", "other"]
    text: Literal["none", "truncate", "full", "segments", "retrieve", "recite", "evidence"]


METHODS: dict[str, Way] = {
    "closed-book": Way("none", "none"),
    "icl": Way("none", "truncate"),
    "icl-full": Way("none", "full"),  # at the model's own limit, not at --window
    "rag": Way("none", "segments"),  # BM25 over segments, as many as fit
    "rag-sentences": Way("none", "retrieve"),  # as answering.retrieval says; the base model ranks
    "lift": Way("own", "none"),
    "lift+recite": Way("own", "recite"),  # the adapter recites, the base model judges; no text of the document
    "lift+icl": Way("own", "truncate"),
    "lift+rag": Way("own", "segments"),
    "lift+rag-sentences": Way("own", "retrieve"),  # the adapter ranks
    "oracle": Way("none", "evidence"),
    "lift+oracle": Way("own", "evidence"),  # for reading kept
    "lift-other": Way("other", "none"),  # the controls: with each text another document's adapter, which also ranks
    "lift-other+recite": Way("other", "recite"),
    "lift-other+icl": Way("other", "truncate"),
    "lift-other+rag": Way("other", "segments"),
    "lift-other+rag-sentences": Way("other", "retrieve"),
    "lift-other+oracle": Way("other", "evidence"),
}
_SEGMENTS = RetrievalConfig(unit="segment", count=None, rerank=0)


class Predictor:
    """Predicts what is missing in `folder`. on_row hears every new row, on_step every training step.

    on_wait hears of a document that another process is absorbing, for which this one then waits.
    """

    def __init__(
        self,
        model: Model,
        config: LiftConfig,
        benchmark: Benchmark,
        folder: Path,
        *,
        on_row: Callable[[Row], None] = lambda row: None,
        on_step: OnStep = lambda metrics: None,
        on_wait: Callable[[Document], None] = lambda document: None,
        part: tuple[int, int] = (0, 1),
        library: Library | None = None,
        tasks: Callable[[Document], Sequence[Task] | None] = lambda document: None,
        interference: bool = True,
    ) -> None:
        """library: default, the user's; tasks: given ones for a document; interference: whether it is measured."""
        self._model, self._config, self._benchmark, self._folder = model, config, benchmark, folder
        self._on_row, self._on_step, self._on_wait = on_row, on_step, on_wait
        self._part, self._parts = part
        self._library = library or Library()
        self._tasks, self._interference = tasks, interference
        self._before: Interference | None = None
        self._contexts = {row["id"] for row in read_rows(folder, "contexts")[0]}
        self._absorbed = {(row["document_id"], row["adapter_id"]) for row in read_rows(folder, "absorbs")[0]}

    def predict(self, items: Sequence[Item], methods: Sequence[str]) -> None:
        """This process's share of the documents (every `parts`-th).

        Raises ConfigError for unknown methods and a control without another document, and what absorbing raises; a question
        that fails for itself becomes a row with an error, tried again next time.
        """
        check_methods(methods)
        if any(METHODS[method].adapter == "other" for method in methods):
            for index in range(self._part, len(items), self._parts):
                control_of(items, index)
        done = self.done()
        for index in range(self._part, len(items), self._parts):
            self.predict_document(items, index, methods, done)

    def done(self) -> set[str]:
        """Ids of the rows that are there already."""
        return {row["id"] for row in read_predictions(self._folder)[0] if not row["error"]}

    def known(self, items: Sequence[Item], methods: Sequence[str]) -> list[Row]:
        """The answers of this process's share that are there already."""
        there = {row["id"]: row for row in read_predictions(self._folder)[0] if not row["error"]}
        return [
            there[row_id]
            for index in range(self._part, len(items), self._parts)
            for method in methods
            for _, row_id in self._asked(items, index, method)
            if row_id in there
        ]

    def _asked(self, items: Sequence[Item], index: int, method: str) -> list[tuple[Question, str]]:
        """Questions about a document that a method can be asked, with the ids of their rows."""
        item, way = items[index], METHODS[method]
        absorbed = _absorbed_by(way, items, index)
        asked = [question for question in item.questions if question.evidence or way.text != "evidence"]
        return [(question, self._row_id(item, question, method, absorbed)) for question in asked]

    def predict_document(self, items: Sequence[Item], index: int, methods: Sequence[str], done: set[str]) -> None:
        """What is missing of one document; the others are there for the control."""
        item = items[index]
        for method in methods:
            missing = [question for question, row_id in self._asked(items, index, method) if row_id not in done]
            if missing:
                way = METHODS[method]
                absorbed = _absorbed_by(way, items, index)
                adapter = None if absorbed is None else self._adapter(item.document, absorbed, way)
                for row in self._answer(item, missing, method, adapter):
                    self._append("predictions", row)
                    self._on_row(row)

    # --- absorbing ----------------------------------------------------------------------------------------------------

    def _adapter(self, document: Document, absorbed: Document, way: Way) -> Adapter:
        tasks = self._tasks(absorbed)
        reset_peak_memory(self._model.device)
        adapter, _ = self._library.absorb_once(
            *(absorbed, self._model, self._config),
            tasks=tasks,
            on_step=self._on_step,
            on_wait=lambda: self._on_wait(absorbed),
        )
        if (document.id, adapter.id) not in self._absorbed:
            self._absorbed.add((document.id, adapter.id))
            self._append("absorbs", self._absorb_row(document, adapter, way))
        return adapter

    def _absorb_row(self, document: Document, adapter: Adapter, way: Way) -> Row:
        interference = None
        if way.adapter == "own" and self._interference:
            if self._before is None:
                self._before = measure_interference(self._model, None, self._config)
            after = measure_interference(self._model, adapter.id, self._config)
            interference = {
                "unrelated_nll_before": self._before.unrelated_nll,
                "unrelated_nll_after": after.unrelated_nll,
                "general_right_before": self._before.general_right,
                "general_right_after": after.general_right,
                "general_questions": after.general_questions,
            }
        report = adapter.report
        return {
            "document_id": document.id,
            "title": document.title,
            "adapter_id": adapter.id,
            "absorbed_title": adapter.document.title,
            "control": way.adapter == "other",
            "tokens": adapter.document_tokens,
            "tasks": adapter.tasks,
            "steps": report.steps,
            "training_tokens": report.tokens,
            "seconds": report.seconds,
            "tokens_per_second": report.tokens_per_second,
            "peak_memory_bytes": report.peak_memory_bytes,
            "epoch_losses": list(report.epoch_losses),
            "interference": interference,
        }

    # --- answering ----------------------------------------------------------------------------------------------------

    def _answer(self, item: Item, questions: Sequence[Question], method: str, adapter: Adapter | None) -> Iterator[Row]:
        way = METHODS[method]
        model = self._model if way.text != "full" else _at_full_window(self._model)
        settings = self._config.answering.model_copy(update={"max_new_tokens": self._benchmark.max_new_tokens})
        text = self._text(model, item.document, settings, way, adapter)
        strength = 1.0 if way.text == "none" else settings.strength_with_text
        filled: list[tuple[Question, FilledWindow, float]] = []
        reset_peak_memory(model.device)  # or methods that are asked after absorbing would show what absorbing took
        for question in questions:
            started = time.monotonic()
            try:
                window = self._fill(model, item, question, way, text, settings)
            except (QuestionTooLongError, _DoesNotFitError) as error:
                yield self._row(item, question, method, adapter) | {"error": str(error)}
                continue
            filled.append((question, window, time.monotonic() - started))
        with use_adapter(model, adapter.id if adapter else None, strength=strength):
            for generated in generate(model, [window for _, window, _ in filled], settings, self._config.seed):
                question, window, seconds = filled[generated.index]
                row = self._row(item, question, method, adapter) | self._likelihoods(model, question, window)
                yield row | {
                    "answer": generated.text,
                    "prompt_tokens": len(window.tokens),
                    "context_tokens": len(window.context),
                    "answer_tokens": generated.tokens,
                    "seconds": generated.seconds + seconds,
                    "peak_memory_bytes": peak_memory(model.device),
                    "context_id": self._keep_context(model, window),
                }

    def _text(
        self, model: Model, document: Document, settings: AnsweringConfig, way: Way, adapter: Adapter | None
    ) -> WindowText:
        if way.text == "segments":
            settings = settings.model_copy(update={"context": "retrieve", "retrieval": _SEGMENTS})
        else:
            context = way.text if way.text in ("none", "retrieve", "recite") else "truncate"
            settings = settings.model_copy(update={"context": context})
        return window_text(model, adapter, document, settings, self._benchmark.middle)

    def _fill(
        self, model: Model, item: Item, question: Question, way: Way, text: WindowText, settings: AnsweringConfig
    ) -> FilledWindow:
        def choose(budget: int) -> Sequence[int]:
            if way.text == "evidence":
                return encode_text(model.tokenizer, "\n".join(question.evidence))[:budget]
            chosen = text.select(question.question, budget)
            if way.text == "full" and len(chosen) < len(model.encode(item.document.text)):
                raise _DoesNotFitError(f"The document is longer than the model's limit of {model.window} tokens.")
            return chosen

        return fill_window(
            model,
            [self._benchmark.wording(item.document, question)],
            [],
            choose,
            settings.max_new_tokens,
            text.for_all and way.text != "evidence",
            chat=self._benchmark.chat_template,
        )

    def _likelihoods(self, model: Model, question: Question, window: FilledWindow) -> Row:
        """Of the first reference, and of every choice, as answers to this very prompt; cut at the window's end."""
        room = model.window - len(window.tokens)
        texts = [question.answers[0], *question.choices]
        tokens = [encode_text(model.tokenizer, text.strip())[:room] or [model.tokenizer.eos_token_id] for text in texts]
        sums = continuation_nlls(model, window.tokens, tokens)
        return {
            "answer_nll": sums[0] / len(tokens[0]),
            "answer_nll_tokens": len(tokens[0]),
            "choice_nlls": [[total, len(ids)] for total, ids in zip(sums[1:], tokens[1:], strict=True)],
        }

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _row_id(self, item: Item, question: Question, method: str, absorbed: Document | None) -> str:
        apart = {"batch_tokens", "context"} | (set() if METHODS[method].text == "recite" else {"recitation"})
        answering = self._config.answering.model_dump(mode="json", exclude=apart)
        parts = {
            "benchmark": self._benchmark.name,
            "document": [item.document.id, item.document.title],
            "question": dataclasses.asdict(question),
            "method": method,
            "answering": answering | {"max_new_tokens": self._benchmark.max_new_tokens},
            "recipe": None if METHODS[method].adapter == "none" else self._recipe(item),
            "model": self._model.fingerprint,
            "window": self._model.window,
        }
        if METHODS[method].text == "truncate" and self._benchmark.middle != MARK:
            parts["middle"] = self._benchmark.middle
        if absorbed is not None and METHODS[method].adapter == "other":
            parts["control"] = [absorbed.id, absorbed.title]  # which depends on what else is evaluated
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:24]

    def _recipe(self, item: Item) -> Row:
        """What decides the adapter besides model and document; as it was before there were given tasks and starts."""
        tasks, config = self._tasks(item.document), self._model.resolve(self._config)
        recipe = config.recipe(tasks_given=tasks is not None)
        if tasks is not None:
            recipe["given"] = [dataclasses.asdict(task) for task in tasks]
        if (start := start_fingerprint(config.adapter)) is not None:
            recipe["start"] = start
        return recipe

    def _row(self, item: Item, question: Question, method: str, adapter: Adapter | None) -> Row:
        given = dataclasses.asdict(question)
        return {
            "id": self._row_id(item, question, method, adapter.document if adapter else None),
            "document_id": item.document.id,
            "title": item.document.title,
            "document_tokens": len(self._model.encode(item.document.text)),
            "question_id": given.pop("id"),
            **given,
            "method": method,
            "answer": "",
            "answer_nll": None,
            "answer_nll_tokens": 0,
            "choice_nlls": [],
            "prompt_tokens": 0,
            "context_tokens": 0,
            "answer_tokens": 0,
            "seconds": 0.0,
            "peak_memory_bytes": 0,
            "context_id": None,
            "error": None,
        }

    def _keep_context(self, model: Model, window: FilledWindow) -> str | None:
        if not window.context:
            return None
        text = model.decode(list(window.context))
        identity = hashlib.sha256(text.encode()).hexdigest()[:24]
        if identity not in self._contexts:
            self._contexts.add(identity)
            self._append("contexts", {"id": identity, "text": text})
        return identity

    def _append(self, stem: str, row: Row) -> None:
        path = self._folder / (f"{stem}.jsonl" if self._parts == 1 else f"{stem}-{self._part}.jsonl")
        append_json_line(path, row)


class _DoesNotFitError(Exception):
    """A document that is to be in the window whole, and is longer."""


def check_methods(methods: Sequence[str]) -> None:
    """Raises ConfigError."""
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ConfigError(
            f"There is no method '{unknown[0]}'." if unknown else "No method was given.",
            f"Choose from {', '.join(METHODS)}.",
        )


def control_of(items: Sequence[Item], index: int) -> Document:
    """The next document of the benchmark that has another text and holds none of this item's evidence; else the demo's chronicle.

    With its evidence (a needle that is hidden in every haystack) the control would know what is asked. Raises ConfigError where
    the chronicle is no other document either.
    """
    own = items[index].document
    own_text = _plain(own.text)
    evidence = {_plain(sentence) for question in items[index].questions for sentence in question.evidence} - {""}

    def knows(other: Document) -> bool:
        text = _plain(other.text)
        return text == own_text or any(sentence in text for sentence in evidence)

    chronicle = load_demo()[0]
    following = (items[(index + step) % len(items)].document for step in range(1, len(items)))
    control = next((other for other in [*following, chronicle] if not knows(other)), None)
    if control is None:
        raise ConfigError(
            f"The controls lift-other… have no other document to absorb than '{own.title}', which is to be answered about.",
            "Leave lift-other… out of --methods, or evaluate at least two documents.",
        )
    return control


def _absorbed_by(way: Way, items: Sequence[Item], index: int) -> Document | None:
    """The document whose adapter is on where `way` is asked about that item."""
    if way.adapter == "none":
        return None
    return items[index].document if way.adapter == "own" else control_of(items, index)


@functools.lru_cache(maxsize=64)
def _plain(text: str) -> str:
    return " ".join(text.split())


def _at_full_window(model: Model) -> Model:
    config: Any = model.network.config.get_text_config()
    return dataclasses.replace(model, window=getattr(config, "max_position_embeddings", None) or model.window)
