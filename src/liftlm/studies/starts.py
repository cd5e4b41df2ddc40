"""Study: what a pre-LIFT fine-tuned start is worth after 1, 2 and 4 epochs, on documents that it never saw."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from liftlm.adapters import find_start
from liftlm.config import LiftConfig
from liftlm.errors import ConfigError
from liftlm.evaluation.benchmark import Item
from liftlm.evaluation.blocks import Block, Heading, Paragraph
from liftlm.pre_sft.leakage import plain_title
from liftlm.pre_sft.running import CARD
from liftlm.studies.bench import Bench
from liftlm.studies.drawing import lines
from liftlm.studies.intervals import Verdict, difference, figure, share_above, together
from liftlm.studies.study import QUICK_SETTINGS, Arm, Conclusion, Drawing, Options, Row, Study
from liftlm.studies.tables import contrasts, in_words, shown, tabulate, where

EPOCHS = (1, 2, 4)
_METHODS = ("lift", "lift+icl")
_AS_LIFT = {"closed-book": "lift", "icl": "lift+icl"}  # what the base model's answers are after 0 epochs
_NOTHING = {"training.total_tokens": 1, "training.learning_rate": 1e-12}  # one step that changes nothing


class Starts(Study):
    """Needs --set adapter.start=FOLDER, of `lift pre-sft`. Documents with a title or the text of its corpus's are refused.

    After 0 epochs the start is asked as it is: what it gains there is practice in answering, not knowledge of the document.
    """

    name = "pre-sft"
    title = "absorbing from a pre-LIFT fine-tuned start"
    claim = (
        "A model that was fine-tuned to being LIFTed knows a new document better after absorbing it for as many epochs."
    )
    source = "2412.13626, section 3.3 (timeline sorting: 21.0 → 23.5 on LooGLE)"
    defaults: ClassVar[Mapping[str, Any]] = {"model.window": 2048, "tasks.per_sentence": 1}
    quick: ClassVar[Mapping[str, Any]] = QUICK_SETTINGS

    def check(self, item: Item, config: LiftConfig) -> None:
        if config.adapter.start is None:
            raise ConfigError(
                "The study pre-sft compares with and without a start.", "Give it: --set adapter.start=FOLDER."
            )
        card = find_start(config.adapter).parent / CARD
        if not card.is_file():
            return
        corpus = json.loads(card.read_text(encoding="utf-8"))["corpus"]
        document, title = item.document, plain_title(item.document.title)
        if document.id in corpus.get("ids", ()) or (title and title in map(plain_title, corpus["titles"])):
            raise ConfigError(f"The start was trained on '{document.title}'.", "Evaluate on other documents.")

    def arms(self, bench: Bench, item: Item, seed: int) -> Iterator[Arm]:
        yield Arm("base model", ("closed-book", "icl"), {"adapter.start": None}, once=True)
        yield Arm("with 0", _METHODS, _NOTHING, {"start": "with", "epochs": 0})
        for epochs in EPOCHS[:1] if bench.options.quick else EPOCHS:
            for begun, settings in (("without", {"adapter.start": None}), ("with", {})):
                values = {"start": begun, "epochs": epochs}
                yield Arm(f"{begun} {epochs}", _METHODS, settings | {"training.epochs": epochs}, values)

    def conclude(self, rows: Sequence[Row], options: Options, folder: Path) -> Conclusion:
        rows = [
            row | {"start": "without", "epochs": 0, "method": _AS_LIFT[row["method"]]}
            if row["arm"] == "base model"
            else row
            for row in rows
        ]
        table, figures = tabulate(rows, ("epochs", "start", "method"))
        pairs = {
            f"with − without, {epochs} epochs, {method}": (
                where(start="with", epochs=epochs, method=method),
                where(start="without", epochs=epochs, method=method),
            )
            for method in _METHODS
            for epochs in (0, *EPOCHS)
        }
        compared, more = contrasts(rows, pairs)
        text = "0 epochs: nothing was absorbed. What the start gains there is practice in answering, not knowledge."
        blocks: list[Block] = [Heading("By epochs"), table, Heading("Differences"), compared, Paragraph(text)]
        outcomes, words = [], []
        for epochs in (0, *EPOCHS):
            gain = difference(rows, "likelihood", *pairs[f"with − without, {epochs} epochs, lift"])
            if gain.units and epochs:
                outcomes.append(share_above(gain, 0.0))
                words.append(f"after {epochs}: {in_words(outcomes[-1], gain, 'likelihood')}")
            elif gain.units:
                words.append(f"nothing absorbed: {shown('likelihood', gain, sign=True)}")
        series = {
            f"{begun} the start, {method}": [
                (float(n), figure(rows, "likelihood", where(start=begun, epochs=n, method=method)))
                for n in (0, *EPOCHS)
            ]
            for begun in ("with", "without")
            for method in _METHODS
        }
        drawing = Drawing("epochs", "Likelihood of the answers by epochs", lines(series, "epochs", "nats a token"))
        verdict = Verdict(together(outcomes), f"With the start against without, no text, {'; '.join(words)}.")
        return Conclusion(verdict, [*figures, *more], blocks, [drawing])
