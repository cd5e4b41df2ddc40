"""An evaluation shared out over workers: each document is absorbed once, then asked, wherever there is a free worker.

A worker writes into a folder of its own, beginning with what the evaluation has of the document; the lines that it adds go
back with its outcome, and only whoever gives out the documents writes into the evaluation's folder. Knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from liftlm.absorbing import adapter_id
from liftlm.adapters import remove_adapter
from liftlm.documents import Document
from liftlm.evaluation.benchmark import Benchmark, Item
from liftlm.evaluation.predicting import METHODS, Predictor, control_of
from liftlm.many_documents import AbsorbingWorker, Order
from liftlm.storage import append_json_line
from liftlm.training import StepMetrics
from liftlm.worklist import Job, Outcome, Tell, outcome_of

Lines = dict[str, list[str]]  # path below a folder → its lines


@dataclasses.dataclass(frozen=True)
class EvaluationOrder(Order):
    """items: all of the benchmark, for controls come from among them."""

    benchmark: Benchmark | None = None
    items: tuple[Item, ...] = ()
    methods: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """absorb: one document, given; ask: all that is missing about the item of that number. known: what is there of it."""

    kind: Literal["absorb", "ask"]
    index: int = 0
    document: Document | None = None
    known: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)


class EvaluatingWorker(AbsorbingWorker):
    """Absorbs documents into the home, and answers about them with adapters from there."""

    def __init__(self, order: EvaluationOrder) -> None:
        super().__init__(order)
        self._order = order

    def work(self, payload: Part, tell: Tell) -> Outcome:  # type: ignore[override]
        """result of `ask`: the lines to add to the evaluation's folder."""
        if payload.kind == "absorb":
            assert payload.document is not None
            return super().work(payload.document, tell)
        try:
            with lines_added(payload.known) as (folder, added):
                self._ask(payload.index, folder, tell)
                return Outcome(added())
        except Exception as error:
            return outcome_of(error)

    def _ask(self, index: int, folder: Path, tell: Tell) -> None:
        order, items = self._order, self._order.items
        assert order.benchmark is not None
        used = [adapter_id(document, self.model, self.config) for document in needed(items, [index], order.methods)]
        for entry_id in used:
            self.home.fetch_entry(entry_id, self.library.home)
        try:
            predictor = Predictor(
                *(self.model, self.config, order.benchmark, folder),
                library=self.library,
                on_step=lambda metrics: tell(as_told(metrics)),
            )
            predictor.predict_document(items, index, order.methods, predictor.done())
            for entry_id in used:  # those whose absorbing was not over when this began
                if (self.library.path / entry_id).exists() and not self.home.has_entry(entry_id):
                    self.home.store_entry(self.library.path / entry_id)
        finally:
            for entry_id in used:
                if entry_id in self.model.adapters:
                    remove_adapter(self.model, entry_id)
                shutil.rmtree(self.library.path / entry_id, ignore_errors=True)


def evaluation_jobs(order: EvaluationOrder, folder: Path) -> Iterator[Job]:
    """First all documents that must be absorbed, then the questions about each."""
    everything = range(len(order.items))
    for document in needed(order.items, everything, order.methods):
        part = Part("absorb", document=document)
        yield Job(f"absorb {document.id} {document.title}", document.title, lambda part=part: part)  # type: ignore[misc]
    for index in everything:
        document = order.items[index].document

        def ask(index: int = index, document: Document = document) -> Part:
            return Part("ask", index, known=lines_about(folder, document.id))

        yield Job(f"ask {index}", f"questions about {document.title}", ask)


def needed(items: Sequence[Item], indices: Sequence[int], methods: Sequence[str]) -> list[Document]:
    """The documents whose adapters these methods use, each once."""
    kinds = {METHODS[method].adapter for method in methods}
    found: dict[tuple[str, str], Document] = {}
    for index in indices:
        own = [items[index].document] if "own" in kinds else []
        for document in [*own, *([control_of(items, index)] if "other" in kinds else [])]:
            found.setdefault((document.id, document.title), document)
    return list(found.values())


# --- lines of a folder ------------------------------------------------------------------------------------------------


def lines_about(folder: Path, document_id: str) -> Lines:
    """What a folder's files of JSON lines have of a document, and of none in particular."""
    found: Lines = {}
    for path in sorted(folder.rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # torn by a killed process
                row = json.loads(line)
                if isinstance(row, dict) and row.get("document_id") == document_id:
                    found.setdefault(path.relative_to(folder).as_posix(), []).append(line)
    return found


@contextlib.contextmanager
def lines_added(known: Mapping[str, list[str]]) -> Iterator[tuple[Path, Callable[[], Lines]]]:
    """A folder for a while that begins with these lines; and a function that gives those that came to them."""
    with tempfile.TemporaryDirectory(prefix="liftlm-") as name:
        folder = Path(name)
        for path, lines in known.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

        def added() -> Lines:
            found: Lines = {}
            for path in sorted(folder.rglob("*.jsonl")):
                relative = path.relative_to(folder).as_posix()
                lines = path.read_text(encoding="utf-8").splitlines()[len(known.get(relative, [])) :]
                if lines and not relative.startswith(_NOT_ROWS):
                    found[relative] = lines
            return found

        yield folder, added


_NOT_ROWS = ("work/",)  # of adapters in the making


def add_lines(folder: Path, lines: Lines) -> Iterator[tuple[str, dict[str, Any]]]:
    """Adds them to a folder's files; gives each file's path and row."""
    for path, texts in lines.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        for text in texts:
            row = json.loads(text)
            append_json_line(folder / path, row)
            yield path, row


def as_told(metrics: StepMetrics) -> dict[str, Any]:
    return {"step": metrics.step, "steps": metrics.steps, "loss": metrics.loss, "left": metrics.seconds_left}


__all__ = [
    "EvaluatingWorker",
    "EvaluationOrder",
    "Part",
    "add_lines",
    "evaluation_jobs",
    "lines_about",
    "lines_added",
    "needed",
]
