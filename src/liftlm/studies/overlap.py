"""Study: how much must neighbouring segments overlap, at equal epochs and at equal tokens?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from liftlm.config import LiftConfig
from liftlm.evaluation.benchmark import Item
from liftlm.evaluation.blocks import Block, Heading, Paragraph
from liftlm.segments import split_into_segments
from liftlm.studies.bench import Bench
from liftlm.studies.drawing import lines
from liftlm.studies.intervals import Figure, Outcome, Select, Verdict, difference, figure, groups, share_above, together
from liftlm.studies.questions import order_questions
from liftlm.studies.study import QUICK_SETTINGS, Arm, Conclusion, Drawing, Options, Row, Study
from liftlm.studies.tables import ORDERS, contrasts, in_words, label, tabulate, telling, where

RATIOS = (0.0, 0.25, 0.375, 0.5, 0.75)
PAPER = 0.375
_MARGIN = {"likelihood": 0.05, "order_margin": 0.25}  # nats; less is no worse
_MADE = 12  # questions of order for each document
_CHARACTERS_A_TOKEN = 4


class Overlap(Study):
    """Segments only, so that nothing but the cut differs between the arms; the questions are asked without text."""

    name = "overlap"
    title = "overlap of segments"
    claim = (
        "Segments must overlap for the model to learn what follows what, and an overlap of 3/8 of a segment is enough."
    )
    source = "2412.13626, section 3.1"
    defaults: ClassVar[Mapping[str, Any]] = {
        "tasks.writer": "none",
        "training.epochs": 2,
        "segments.segment_tokens": 512,
    }
    quick: ClassVar[Mapping[str, Any]] = {**QUICK_SETTINGS, "tasks.writer": "none"}

    def prepare(self, item: Item, config: LiftConfig, options: Options) -> Item:
        reach = config.segments.segment_tokens * _CHARACTERS_A_TOKEN
        made = order_questions(item.document, 3 if options.quick else _MADE, config.seed, reach)
        return dataclasses.replace(item, questions=(*item.questions, *made))

    def arms(self, bench: Bench, item: Item, seed: int) -> Iterator[Arm]:
        length, epochs = bench.config.segments.segment_tokens, bench.config.training.epochs
        tokens = bench.model.encode(item.document.text)
        paper = split_into_segments(tokens, length, int(length * PAPER))
        budget = epochs * sum(len(segment.tokens) for segment in paper)
        yield Arm("base model", ("closed-book",), once=True)
        for ratio in RATIOS:
            cut = {"segments.segment_tokens": length, "segments.overlap_tokens": int(length * ratio)}
            values = {"ratio": ratio, "class": ""}
            yield Arm(f"{ratio:g} epochs", ("lift",), cut, values | {"equal": "epochs"})
            cut = cut | {"training.total_tokens": budget}
            yield Arm(f"{ratio:g} tokens", ("lift",), cut, values | {"equal": "tokens"})

    def conclude(self, rows: Sequence[Row], options: Options, folder: Path) -> Conclusion:
        rows = [row | {"class": "order" if row["kind"] in ORDERS else "fact"} for row in rows]
        table, figures = tabulate(rows, ("equal", "class", "domain", "ratio"))
        blocks: list[Block] = [Heading("By overlap"), table]
        outcomes: list[Outcome] = []
        words = []
        domains = groups(rows, "domain") if len(groups(rows, "domain")) > 1 else []
        orders = [row for row in rows if row["class"] == "order"]
        metric = telling(rows, order=True)
        for equal in ("epochs", "tokens"):
            compared, more = contrasts(rows, _pairs(rows, equal, domains))
            blocks += [Heading(f"Against no overlap, at equal {equal}"), compared]
            figures += more
            gain = difference(orders, metric, *_paper_and_none(equal))
            outcomes.append(share_above(gain, 0.0))
            words.append(f"at equal {equal} 3/8 against none gives {in_words(outcomes[-1], gain, metric)}")
            for kind in ("order", "fact"):
                blocks.append(Paragraph(_least(rows, equal, kind)))
                blocks += [Paragraph(_least(rows, equal, kind, domain)) for domain in domains]
        if domains:
            blocks += [Heading("By domain"), Paragraph(_by_domain(orders, metric, domains))]
        verdict = Verdict(together(outcomes), f"On questions of order {'; '.join(words)}.")
        return Conclusion(verdict, figures, blocks, _drawings(rows, domains))


def _pairs(rows: Sequence[Row], equal: str, domains: Sequence[str]) -> dict[str, tuple[Select, Select]]:
    """Every ratio against none, by class: over all documents, then in each domain that has such questions."""
    pairs = {}
    for kind in ("order", "fact"):
        inside = [domain for domain in domains if any(row["class"] == kind and row["domain"] == domain for row in rows)]
        for group, chosen in (("", {}), *((f", {_named(domain)}", {"domain": domain}) for domain in inside)):
            for ratio in RATIOS[1:]:
                same = {"equal": equal, "class": kind} | chosen
                name = f"{ratio:g} − 0, {kind}{group}, equal {equal}"
                pairs[name] = (where(ratio=ratio, **same), where(ratio=0.0, **same))
    return pairs


def _paper_and_none(equal: str) -> tuple[Select, Select]:
    return where(ratio=PAPER, equal=equal), where(ratio=0.0, equal=equal)


def _by_domain(orders: Sequence[Row], metric: str, domains: Sequence[str]) -> str:
    """A sentence: what the verdict asks of all documents, of each domain."""
    told = []
    for domain in domains:
        inside = [row for row in orders if row["domain"] == domain]
        gains = {equal: difference(inside, metric, *_paper_and_none(equal)) for equal in ("epochs", "tokens")}
        words = [
            f"{in_words(share_above(gain, 0.0), gain, metric)}, at equal {equal}"
            for equal, gain in gains.items()
            if gain.units
        ]
        told.append(f"{_named(domain)}: {'; '.join(words) or 'no questions'}")
    return f"The verdict is of all documents together; of each domain, 3/8 against none on questions of order. {'. '.join(told)}."


def _named(domain: str) -> str:
    return domain or "no domain"


def _least(rows: Sequence[Row], equal: str, kind: str, domain: str | None = None) -> str:
    """The least ratio that is not worse than the best: not shown worse, and shown not worse by more than a margin.

    domain: of its documents only.
    """
    asked = f"Equal {equal}, {kind} questions" + ("" if domain is None else f", {_named(domain)}")
    chosen = [
        row
        for row in rows
        if row.get("equal") == equal and row["class"] == kind and (domain is None or row["domain"] == domain)
    ]
    metric = telling(chosen, order=kind == "order")
    means = {ratio: figure(chosen, metric, where(ratio=ratio)) for ratio in RATIOS}
    known = {ratio: found.mean for ratio, found in means.items() if found.units}
    if not known:
        return f"{asked}: none."
    best = max(known, key=lambda ratio: known[ratio])
    tied: list[float] = []
    equivalent: list[float] = []
    for ratio in known:
        found = difference(chosen, metric, where(ratio=ratio), where(ratio=best))
        if ratio == best or found.high is None or found.high >= 0:
            tied.append(ratio)
        if ratio == best or (found.low is not None and found.low > -_MARGIN[metric]):
            equivalent.append(ratio)
    return (
        f"{asked}: the best mean has {best:g}. The least ratio that is not shown to be worse is "
        f"{min(tied):g}; the least that is shown to be no more than {_MARGIN[metric]:g} nats worse is {min(equivalent):g}."
    )


def _drawings(rows: Sequence[Row], domains: Sequence[str]) -> list[Drawing]:
    drawings = []
    for kind in ("order", "fact"):
        chosen = [row for row in rows if row["class"] == kind]
        every = {f"equal {equal}": _curve(chosen, kind, equal=equal) for equal in ("epochs", "tokens")}
        plots = {kind: (f"Questions of {kind}, by overlap", every)}
        if domains:
            each = {
                f"{_named(domain)}, equal {equal}": _curve(chosen, kind, equal=equal, domain=domain)
                for domain in groups(chosen, "domain")
                for equal in ("epochs", "tokens")
            }
            plots[f"{kind}-by-domain"] = (f"Questions of {kind}, by overlap and domain", each)
        axis = label(telling(chosen, order=kind == "order"))
        drawings += [
            Drawing(name, caption, lines(series, "overlap / segment", axis))
            for name, (caption, series) in plots.items()
        ]
    return drawings


def _curve(rows: Sequence[Row], kind: str, **of: str) -> list[tuple[float, Figure]]:
    metric = telling(rows, order=kind == "order")
    return [(ratio, figure(rows, metric, where(ratio=ratio, **of))) for ratio in RATIOS]
