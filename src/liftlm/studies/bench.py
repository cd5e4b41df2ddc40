"""Where a study works: one model, the documents, the folder; asks arms and keeps rows. Resumable row by row.

Predictions lie below arms/NAME-SEED as `lift evaluate` writes them; they are scored and added to rows.jsonl, from which
everything else is computed. Adapters lie below work/ until they were asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from liftlm.absorbing import Adapter
from liftlm.adapters import remove_adapter
from liftlm.config import LiftConfig, parse_config
from liftlm.evaluation.benchmark import Item
from liftlm.evaluation.predicting import Predictor
from liftlm.evaluation.scoring import CONTROL, read_predictions, read_rows
from liftlm.library import Library
from liftlm.models import Model
from liftlm.storage import append_json_line, canonical_json
from liftlm.studies.questions import StudyQuestions, score_row
from liftlm.studies.study import Arm, Options, Row
from liftlm.training import OnStep

_KEPT = (
    "question_id",
    "kind",
    "method",
    "answer",
    "seconds",
    "prompt_tokens",
    "context_tokens",
    "answer_tokens",
    "error",
)


class Bench:
    """One process's place of work. on_row hears every new row, on_step every training step."""

    def __init__(
        self,
        model: Model,
        config: LiftConfig,
        options: Options,
        items: list[Item],
        folder: Path,
        setup: str,
        part: tuple[int, int] = (0, 1),
        on_row: Any = lambda row: None,
        on_step: OnStep = lambda metrics: None,
    ) -> None:
        self.model, self.config, self.options, self.items, self.folder = model, config, options, items, folder
        self.on_step = on_step
        self._setup, self._part, self._on_row = setup, part, on_row
        self._needed_again = False  # adapters on disk
        self.library = Library(folder / "work" / str(part[0]))  # a process's own: it empties it
        self._rows = {row["id"]: row for row in read_rows(folder, "rows")[0] if row.get("setup") == setup}

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def has(self, **key: Any) -> bool:
        """Whether a row that `add` was given with this key is there."""
        return _id(key) in self._rows

    def find(self, **key: Any) -> Row:
        """That row."""
        return self._rows[_id(key)]

    def add(self, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """A measured row. key: what tells it from the others; values: the rest."""
        self._append({"id": _id(key), **key, **values})

    # --- absorbing and asking -----------------------------------------------------------------------------------------

    def settings(self, arm: Arm, seed: int) -> LiftConfig:
        """The study's settings with those of the arm."""
        return with_settings(self.config, dict(arm.settings) | {"seed": seed})

    def ask(self, arm: Arm, seed: int, index: int) -> None:
        """All methods of the arm on all questions of one document; what is there is not done again."""
        if arm.once and seed != self.options.seeds[0]:
            return
        place = self._place(arm, seed)
        place.mkdir(parents=True, exist_ok=True)
        config = self.settings(arm, seed)
        predictor = Predictor(
            self.model,
            config,
            StudyQuestions(),
            place,
            part=self._part,
            library=self.library,
            tasks=lambda document: arm.tasks,
            interference=False,
            on_step=self.on_step,
        )
        try:
            predictor.predict_document(self.items, index, arm.methods, predictor.done())
        finally:  # what an interrupted arm has predicted is there
            self._collect(arm, seed, index, place)
        # a control's adapter is that of another document, which is to be asked with it too
        self._needed_again |= any(method.startswith(CONTROL) for method in arm.methods)
        self._free()

    @contextlib.contextmanager
    def absorbed(self, arm: Arm, seed: int, index: int) -> Iterator[Adapter]:
        """The arm's adapter on the model, for a study that measures it itself."""
        config, document = self.settings(arm, seed), self.items[index].document
        tasks = None if arm.tasks is None else list(arm.tasks)
        adapter, _ = self.library.absorb_once(document, self.model, config, tasks=tasks, on_step=self.on_step)
        try:
            yield adapter
        finally:
            self._free(keep_files=True)

    def training_tokens(self, arm: Arm, seed: int, index: int) -> int | None:
        """What absorbing took with this arm, once it has been asked."""
        document = self.items[index].document.id
        own = [
            row["training_tokens"]
            for row in read_rows(self._place(arm, seed), "absorbs")[0]
            if row["document_id"] == document and not row["control"]
        ]
        return int(own[-1]) if own else None

    def _place(self, arm: Arm, seed: int) -> Path:
        name = re.sub(r"[^\w.+-]+", "-", arm.name)
        return self.folder / "arms" / f"{name}-seed{seed}"

    def _collect(self, arm: Arm, seed: int, index: int, place: Path) -> None:
        item = self.items[index]
        mine = {question.id for question in item.questions}
        costs = {(row["document_id"], row["control"]): row for row in read_rows(place, "absorbs")[0]}
        for row in read_predictions(place)[0]:
            key = {"arm": arm.name, "seed": seed, "prediction": row["id"]}
            wanted = (
                row["document_id"] == item.document.id and row["question_id"] in mine and row["method"] in arm.methods
            )
            before = self._rows.get(_id(key))
            if not wanted or (before is not None and (not before["error"] or row["error"])):
                continue
            cost = (
                costs.get((item.document.id, row["method"].startswith(CONTROL)), {}) if "lift" in row["method"] else {}
            )
            values = {name: row[name] for name in _KEPT} | {
                "document_id": item.document.id,
                "title": item.document.title,
                "domain": domain_of(item),
                "unit": row["question_id"],
                **{name: value for name, value in (row.get("data") or {}).items() if isinstance(value, str | int)},
                **arm.values,
                **({} if row["error"] else score_row(row)),
                "absorb_seconds": cost.get("seconds"),
                "training_tokens": cost.get("training_tokens"),
                "final_loss": (cost.get("epoch_losses") or [None])[-1],
            }
            self.add(key, values)

    def _free(self, keep_files: bool = False) -> None:
        """Adapters leave the network, and the disk unless they are kept: there may be hundreds."""
        for name in [name for name in self.model.adapters if name]:
            remove_adapter(self.model, name)
        if not (keep_files or self._needed_again or self.options.keep):
            shutil.rmtree(self.library.path, ignore_errors=True)

    def forget_adapters(self) -> None:
        """Frees what `absorbed`, and arms with controls, left on disk."""
        self._needed_again = False
        self._free()

    def _append(self, row: Row) -> None:
        row = {"setup": self._setup, **row}
        self._rows[row["id"]] = row
        part, parts = self._part
        path = self.folder / ("rows.jsonl" if parts == 1 else f"rows-{part}.jsonl")
        append_json_line(path, row)
        self._on_row(row)


def with_settings(config: LiftConfig, settings: Mapping[str, Any]) -> LiftConfig:
    """The config with dotted keys replaced and everything checked anew. Raises ConfigError."""
    tree = config.model_dump(mode="json")
    segments = tree["segments"]
    if any(key.startswith("segments.") for key in settings) and "segments.overlap_tokens" not in settings:
        del segments["overlap_tokens"]  # follows from the rest
    for key, value in settings.items():
        *branches, leaf = key.split(".")
        below = tree
        for branch in branches:
            below = below.setdefault(branch, {})
        below[leaf] = value
    return parse_config(tree, "the study's settings")


def domain_of(item: Item) -> str:
    """As named with --data, carried behind the document's source."""
    return item.document.source.partition("#domain=")[2]


def in_domain(item: Item, domain: str) -> Item:
    """The item with its domain noted; a document's id depends on its text only."""
    source = item.document.source.partition("#domain=")[0]
    return Item(dataclasses.replace(item.document, source=f"{source}#domain={domain}"), item.questions)


def _id(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(dict(key)).encode()).hexdigest()[:24]
