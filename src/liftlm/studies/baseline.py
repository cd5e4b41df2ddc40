"""Study: in-context learning against LIFT with in-context learning, on timelines and comprehension (the first experiment)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from liftlm.evaluation.benchmark import Item
from liftlm.evaluation.blocks import Block, Heading, Paragraph
from liftlm.evaluation.loogle import COMPREHENSION
from liftlm.evaluation.scoring import CONTROL
from liftlm.studies.bench import Bench
from liftlm.studies.drawing import bars
from liftlm.studies.intervals import Verdict, difference, figure, groups, share_above, together
from liftlm.studies.study import QUICK_SETTINGS, Arm, Conclusion, Drawing, Options, Row, Study
from liftlm.studies.tables import ORDERS, contrasts, in_words, tabulate, where

_METHODS = ("lift", "lift+icl", "lift+oracle", "lift-other", "lift-other+icl", "lift-other+oracle")


class Baseline(Study):
    """The paper's table by kind of question, with a control (another document absorbed) and the evidence shown."""

    name = "baseline"
    title = "in-context learning against LIFT with in-context learning"
    claim = (
        "LIFT with truncated in-context learning beats truncated in-context learning on timeline reordering (22.3 → 26.5) and "
        "on comprehension and reasoning (40.9 → 44.8; LooGLE, Llama 3)."
    )
    source = "2412.13626, table of LooGLE's subtasks"
    defaults: ClassVar[Mapping[str, Any]] = {"model.window": 2048, "tasks.per_sentence": 1}
    quick: ClassVar[Mapping[str, Any]] = QUICK_SETTINGS

    def arms(self, bench: Bench, item: Item, seed: int) -> Iterator[Arm]:
        yield Arm("base model", ("closed-book", "icl", "oracle"), once=True)
        yield Arm("lift", with_control(bench, item, _METHODS))

    def conclude(self, rows: Sequence[Row], options: Options, folder: Path) -> Conclusion:
        table, figures = tabulate(rows, ("kind", "method"))
        pairs = {
            f"{kind}: {first} − {second}": (where(kind=kind, method=first), where(kind=kind, method=second))
            for kind in groups(rows, "kind")
            for first, second in (
                ("lift+icl", "icl"),
                ("lift", "closed-book"),
                ("lift", "lift-other"),
                ("lift+icl", "lift-other+icl"),
                ("lift+oracle", "oracle"),
                ("lift+oracle", "lift-other+oracle"),
            )
            if any(row["method"] == first for row in rows) and any(row["method"] == second for row in rows)
        }
        compared, more = contrasts(rows, pairs)
        outcomes, words = [], []
        for name, chosen in _parts(rows).items():
            gain = difference(chosen, "likelihood", where(method="lift+icl"), where(method="icl"))
            outcomes.append(share_above(gain, 0.0))
            words.append(f"on {name} LIFT + ICL − ICL is {in_words(outcomes[-1], gain, 'likelihood')}")
        text = "The verdict rests on the likelihood of the reference answers; answers themselves are in the table."
        blocks: list[Block] = [Heading("By kind and method"), table, Heading("Differences"), compared, Paragraph(text)]
        series = {
            method: {kind: figure(rows, "likelihood", where(kind=kind, method=method)) for kind in groups(rows, "kind")}
            for method in groups(rows, "method")
        }
        drawing = Drawing("methods", "Likelihood of the answers, by kind and method", bars(series, "nats a token"))
        sentence = "; ".join(words)
        verdict = Verdict(together(outcomes), f"{sentence[0].upper()}{sentence[1:]}.")
        return Conclusion(verdict, [*figures, *more], blocks, [drawing])


def _parts(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """What the claim has two sides of: timelines, and comprehension; all other questions where none is marked as such."""
    timelines = [row for row in rows if row["kind"] in ORDERS]
    understood = [row for row in rows if row["kind"] == COMPREHENSION]
    if understood:
        return {"timelines": timelines, COMPREHENSION: understood}
    return {"timelines": timelines, "other questions": [row for row in rows if row["kind"] not in ORDERS]}


def with_control(bench: Bench, item: Item, methods: tuple[str, ...]) -> tuple[str, ...]:
    """The methods, without the controls where there is no other document: the demonstration's chronicle stands in for it, except
    for itself."""
    from liftlm.demo import load_demo

    others = any(other.document.text != item.document.text for other in bench.items)
    if others or not load_demo()[0].text.startswith(item.document.text[:200]):
        return methods
    return tuple(method for method in methods if not method.startswith(CONTROL))
