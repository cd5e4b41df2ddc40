"""Study: ways of holding a document (any settings, by name), compared at equal absorbing time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from liftlm.absorbing import absorb
from liftlm.adapters import remove_adapter
from liftlm.evaluation.blocks import Block, Heading, Paragraph
from liftlm.studies.arms import COSTS, NamedArmsStudy, costs_of
from liftlm.studies.bench import Bench, with_settings
from liftlm.studies.drawing import bars
from liftlm.studies.intervals import Figure, Outcome, Verdict, difference, figure, groups, share_above
from liftlm.studies.questions import NEEDLE
from liftlm.studies.study import QUICK_SETTINGS, Arm, Conclusion, Drawing, Options, Row
from liftlm.studies.tables import contrasts, in_words, reading_kept, shown, tabulate, where

_TRIAL_STEPS = 6  # in which an arm's pace is measured; the first is not counted
_METHODS = ("lift", "lift+icl", "lift+oracle")


class Adapters(NamedArmsStudy):
    """Each arm gets the first arm's absorbing time: as many tokens as its pace, tried first, allows beside the first one's.

    The ratio of two paces, on a CPU by the processor's time, not by the clock: what else a machine does must not favour an arm.
    """

    name = "adapters"
    title = "ways of holding a document"
    claim = "At equal absorbing time another adapter keeps reading text in the window better than LoRA, at no less memorisation."
    source = "2502.14644 v1–v3 says so of Gated Memory"
    defaults: ClassVar[Mapping[str, Any]] = {"model.window": 2048, "tasks.per_sentence": 1}
    quick: ClassVar[Mapping[str, Any]] = QUICK_SETTINGS
    own_arms = "adapters.yaml"
    methods = _METHODS
    alone: ClassVar[bool] = True

    def measure(self, bench: Bench, index: int, seed: int) -> None:
        item = bench.items[index]
        bench.ask(Arm("base model", ("closed-book", "icl", "oracle"), once=True), seed, index)
        tokens_at_pace: float | None = None
        for arm in self.arms(bench, item, seed):
            pace = _pace(bench, arm, seed, index)
            if tokens_at_pace is not None:
                settings = dict(arm.settings) | {"training.total_tokens": max(1, round(tokens_at_pace * pace))}
                arm = Arm(arm.name, arm.methods, settings)
            key = {"what": "costs", "arm": arm.name, "seed": seed, "document_id": item.document.id}
            if not bench.has(**key):
                bench.add(key, costs_of(bench, arm, seed, index) | {"pace": pace})
            tokens_at_pace = tokens_at_pace or bench.find(**key)["training_tokens"] / pace
            bench.ask(arm, seed, index)

    def conclude(self, rows: Sequence[Row], options: Options, folder: Path) -> Conclusion:
        costs = [row for row in rows if row.get("what") == "costs"]
        answers = [row for row in rows if row.get("what") is None]
        arms = groups(costs, "arm")
        quality, figures = tabulate(
            [row | {"needle": row["kind"] == NEEDLE} for row in answers], ("arm", "method", "needle")
        )
        spent, more = tabulate(costs, ("arm",), (*COSTS, "pace"))
        timed, times = tabulate(answers, ("arm", "method"), ("seconds",))
        reading, kept = reading_kept(answers, arms)
        pairs = {
            f"{arm} − {arms[0]}, {method}": (where(arm=arm, method=method), where(arm=arms[0], method=method))
            for arm in arms[1:]
            for method in _METHODS
        }
        compared, paired = contrasts(answers, pairs)
        text = (
            "reading kept: token F1 with the evidence in the window, with the adapter / without. unrelated_rise: rise of "
            "the loss on unrelated text, relative. pace: tokens a second of the processor's time (on a GPU: of the clock), in "
            "a trial. needle: questions about sentences hidden in the text."
        )
        blocks: list[Block] = [
            *(Heading("Answers"), quality, Heading("Reading kept"), reading),
            *(
                Heading("Costs"),
                spent,
                Heading("Seconds for an answer"),
                timed,
                Heading(f"Against {arms[0] if arms else 'the first arm'}"),
                compared,
                Paragraph(text),
            ),
        ]
        found = [*figures, *more, *times, *paired, *kept]
        series = {
            method: {arm: figure(answers, "likelihood", where(arm=arm, method=method)) for arm in arms}
            for method in _METHODS
        }
        drawing = Drawing("arms", "Likelihood of the answers, by arm and method", bars(series, "nats a token"))
        return Conclusion(_verdict(answers, arms), found, blocks, [drawing])


def _pace(bench: Bench, arm: Arm, seed: int, index: int) -> float:
    """Tokens a second of a few steps; measured once for an arm, seed and document."""
    document = bench.items[index].document
    key = {"what": "pace", "arm": arm.name, "seed": seed, "document_id": document.id}
    if not bench.has(**key):
        config = bench.settings(arm, seed)
        clock = time.process_time if bench.model.device.type == "cpu" else time.monotonic
        steps: list[tuple[int, float]] = []  # tokens, and when they were done
        budget = {
            "training.total_tokens": _TRIAL_STEPS * max(config.training.batch_tokens, config.segments.segment_tokens)
        }
        began = clock()
        adapter = absorb(
            document,
            bench.model,
            with_settings(config, budget),
            on_step=lambda metrics: steps.append((metrics.tokens, clock())),
        )
        remove_adapter(bench.model, adapter.id)
        since = steps[0][1] if len(steps) > 1 else began  # the first step warms up
        counted = steps[1:] or steps
        pace = sum(tokens for tokens, _ in counted) / max(counted[-1][1] - since, 1e-9)
        bench.add(key, {"pace": pace, "title": document.title, "unit": f"seed {seed}"})
    return float(bench.find(**key)["pace"])


def _verdict(rows: Sequence[Row], arms: Sequence[str]) -> Verdict:
    """The arm that reads best beside text, against the first: better there, and not worse without text?"""
    if len(arms) < 2:
        return Verdict("not decidable at this size", "There is only one arm.")
    first = arms[0]

    def against(arm: str, method: str) -> Figure:
        return difference(rows, "likelihood", where(arm=arm, method=method), where(arm=first, method=method))

    best = max(arms[1:], key=lambda arm: against(arm, "lift+icl").mean)
    reads, knows = against(best, "lift+icl"), against(best, "lift")
    better, not_worse = share_above(reads, 0.0), share_above(knows, -0.05)
    outcome: Outcome = better if better != "confirmed" else not_worse
    return Verdict(
        outcome,
        f"Of the other arms '{best}' reads best beside text, against {first}: {in_words(better, reads, 'likelihood')}; without "
        f"text it gives {shown('likelihood', knows, sign=True)} (no worse by 0.05: {not_worse}).",
    )
