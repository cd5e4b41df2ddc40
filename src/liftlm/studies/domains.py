"""Study: does LIFT help in every domain: papers, contracts, source code, stories; short and long windows?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from liftlm.evaluation.benchmark import Item
from liftlm.evaluation.blocks import Block, Heading, Paragraph
from liftlm.studies.baseline import with_control
from liftlm.studies.bench import Bench
from liftlm.studies.drawing import bars
from liftlm.studies.intervals import Verdict, difference, figure, groups, share_above, together
from liftlm.studies.study import QUICK_SETTINGS, Arm, Conclusion, Drawing, Options, Row, Study
from liftlm.studies.tables import contrasts, in_words, tabulate, where

_METHODS = ("lift", "lift+icl", "lift-other", "lift-other+icl")


class Domains(Study):
    """Sources bear their domain: --data science=PAPERS.jsonl --data code=MODULE.py. Of Python files their functions are asked."""

    name = "domains"
    title = "domains"
    claim = "LIFT improves on reading a short context whatever the domain: scientific, legal, source code, narrative."
    source = "the third check of this project's plan; 2412.13626 reports narrative and encyclopaedic texts"
    defaults: ClassVar[Mapping[str, Any]] = {"model.window": 2048, "tasks.per_sentence": 1}
    quick: ClassVar[Mapping[str, Any]] = QUICK_SETTINGS

    def arms(self, bench: Bench, item: Item, seed: int) -> Iterator[Arm]:
        yield Arm("base model", ("closed-book", "icl", "icl-full"), once=True)
        yield Arm("lift", with_control(bench, item, _METHODS))

    def conclude(self, rows: Sequence[Row], options: Options, folder: Path) -> Conclusion:
        rows = [row | {"domain": row.get("domain") or "unnamed"} for row in rows]
        domains = groups(rows, "domain")
        table, figures = tabulate(rows, ("domain", "method"))
        pairs = {
            f"{domain}: {first} − {second}": (
                where(domain=domain, method=first),
                where(domain=domain, method=second),
            )
            for domain in domains
            for first, second in (
                ("lift+icl", "icl"),
                ("lift", "closed-book"),
                ("lift", "lift-other"),
                ("lift+icl", "lift-other+icl"),
                ("lift+icl", "icl-full"),
            )
            if any(row["method"] == second and not row["error"] for row in rows)
        }
        compared, more = contrasts(rows, pairs)
        outcomes, words = [], []
        for domain in domains:
            chosen = [row for row in rows if row["domain"] == domain]
            gain = difference(chosen, "likelihood", where(method="lift+icl"), where(method="icl"))
            outcomes.append(share_above(gain, 0.0))
            words.append(f"{domain}: {in_words(outcomes[-1], gain, 'likelihood')}")
        too_long = sum(bool(row["error"]) for row in rows if row["method"] == "icl-full")
        text = "icl-full is long-context reading at the model's own limit"
        text += f"; {too_long} questions are about documents longer than that." if too_long else "."
        blocks: list[Block] = [
            Heading("By domain and method"),
            table,
            Heading("Differences"),
            compared,
            Paragraph(text),
        ]
        series = {
            method: {name: figure(rows, "likelihood", where(domain=name, method=method)) for name in domains}
            for method in groups(rows, "method")
        }
        drawing = Drawing("domains", "Likelihood of the answers, by domain and method", bars(series, "nats a token"))
        verdict = Verdict(together(outcomes), f"LIFT + ICL − ICL, {'; '.join(words)}.")
        return Conclusion(verdict, [*figures, *more], blocks, [drawing])
