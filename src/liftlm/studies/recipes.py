"""Study: recipes of absorbing (any settings, by name), with the control: what is known, and is one's own text still read?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from liftlm.evaluation.blocks import Block, Heading, Paragraph
from liftlm.studies.arms import COSTS, NamedArmsStudy, costs_of
from liftlm.studies.bench import Bench
from liftlm.studies.drawing import bars
from liftlm.studies.intervals import Figure, Outcome, Verdict, difference, figure, groups, share_above
from liftlm.studies.questions import NEEDLE
from liftlm.studies.study import QUICK_SETTINGS, Arm, Conclusion, Drawing, Options, Row
from liftlm.studies.tables import contrasts, in_words, reading_kept, shown, tabulate, where

_METHODS = ("lift", "lift+oracle", "lift-other", "lift-other+oracle")
_NOT_WORSE = -0.05  # nats


class Recipes(NamedArmsStudy):
    """Budgets are what the settings say: `--set training.total_tokens=N` makes them equal for all arms and documents."""

    name = "recipes"
    title = "recipes of absorbing"
    claim = "Another recipe than the first knows more of the document, and reads it no worse."
    source = "this project's search of its default recipe"
    defaults: ClassVar[Mapping[str, Any]] = {"model.window": 2048}
    quick: ClassVar[Mapping[str, Any]] = QUICK_SETTINGS
    own_arms = "recipes.yaml"
    methods = _METHODS

    def measure(self, bench: Bench, index: int, seed: int) -> None:
        item = bench.items[index]
        bench.ask(Arm("base model", ("closed-book", "oracle"), once=True), seed, index)
        for arm in self.arms(bench, item, seed):
            key = {"what": "costs", "arm": arm.name, "seed": seed, "document_id": item.document.id}
            if not bench.has(**key):
                bench.add(key, costs_of(bench, arm, seed, index))
            bench.ask(arm, seed, index)

    def conclude(self, rows: Sequence[Row], options: Options, folder: Path) -> Conclusion:
        costs = [row for row in rows if row.get("what") == "costs"]
        answers = [row for row in rows if row.get("what") is None]
        arms = groups(costs, "arm")
        quality, figures = tabulate(
            [row | {"needle": row["kind"] == NEEDLE} for row in answers], ("arm", "method", "needle")
        )
        reading, kept = reading_kept(answers, arms)
        spent, more = tabulate(costs, ("arm",), COSTS)
        own = {
            f"{arm}: {first} − {second}": (where(arm=arm, method=first), where(arm=arm, method=second))
            for arm in arms
            for first, second in (("lift", "lift-other"), ("lift+oracle", "lift-other+oracle"))
            if any(row["method"] == second for row in answers)
        }
        known, controlled = contrasts(answers, own)
        pairs = {
            f"{arm} − {arms[0]}, {method}": (where(arm=arm, method=method), where(arm=arms[0], method=method))
            for arm in arms[1:]
            for method in ("lift", "lift+oracle")
        }
        compared, paired = contrasts(answers, pairs)
        text = (
            "lift-other: another document's adapter of the same recipe. lift+oracle: with the evidence in the window. "
            "reading kept: its token F1 / that of the base model with the evidence. "
            "needle: questions about sentences hidden in the text. unrelated rise: of the loss on unrelated text, relative."
        )
        blocks: list[Block] = [
            *(Heading("Answers"), quality, Heading("Reading kept"), reading, Heading("Against the control"), known),
            *(Heading(f"Against {arms[0] if arms else 'the first arm'}"), compared, Heading("Costs"), spent),
            Paragraph(text),
        ]
        series = {
            method: {arm: figure(answers, "likelihood", where(arm=arm, method=method)) for arm in arms}
            for method in groups(answers, "method")
            if "lift" in method
        }
        drawing = Drawing("arms", "Likelihood of the answers, by arm and method", bars(series, "nats a token"))
        return Conclusion(_verdict(answers, arms), [*figures, *more, *kept, *controlled, *paired], blocks, [drawing])


def _verdict(rows: Sequence[Row], arms: Sequence[str]) -> Verdict:
    """The arm that knows most without text, against the first: more than it, and reading the evidence no worse?"""
    if len(arms) < 2:
        return Verdict("not decidable at this size", "There is only one arm.")

    def against(arm: str, method: str) -> Figure:
        return difference(rows, "likelihood", where(arm=arm, method=method), where(arm=arms[0], method=method))

    best = max(arms[1:], key=lambda arm: against(arm, "lift").mean)
    knows, reads = against(best, "lift"), against(best, "lift+oracle")
    better, not_worse = share_above(knows, 0.0), share_above(reads, _NOT_WORSE)
    outcome: Outcome = better if better != "confirmed" else not_worse
    return Verdict(
        outcome,
        f"Of the other arms '{best}' knows most without text, against {arms[0]}: {in_words(better, knows, 'likelihood')}; "
        f"beside the evidence it gives {shown('likelihood', reads, sign=True)} (no worse by {-_NOT_WORSE}: {not_worse}).",
    )
