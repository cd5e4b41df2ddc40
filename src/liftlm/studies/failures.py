"""Study: how often the known failures of absorbing are seen, by recipe. The cheap part is `lift ask --diagnose`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from liftlm.adapters import use_adapter
from liftlm.diagnosing import SIGNATURES, judge_symptoms, measure_symptoms
from liftlm.documents import Document
from liftlm.evaluation.benchmark import Item
from liftlm.evaluation.blocks import Block, Heading, Paragraph, Table
from liftlm.evaluation.metrics import keyword_recall
from liftlm.evaluation.needles import load_needles
from liftlm.generating import Prompt, generate
from liftlm.prompts import question_prompt
from liftlm.studies.bench import Bench, domain_of
from liftlm.studies.drawing import bars
from liftlm.studies.intervals import DECIDABLE, Figure, Outcome, Verdict, figure, groups
from liftlm.studies.questions import with_needles
from liftlm.studies.study import QUICK_SETTINGS, Arm, Conclusion, Drawing, Options, Row, Study
from liftlm.studies.tables import tabulate, where

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "segments only": {"tasks.writer": "none"},
    "segments only, 8 epochs": {"tasks.writer": "none", "training.epochs": 8},
    "tasks only, 4 epochs": {"tasks.mix": 1.0, "training.epochs": 4, "tasks.per_sentence": 1},
}
_OFTEN = 0.5  # share of the runs in which a signature is seen
_LOSSES = ("trained_before", "trained_after", "held_out_before", "held_out_after")  # of answers to tasks
_MEASURED = (
    *("text_before", "text_after", *_LOSSES, "trained_gain", "held_out_gain"),
    *("worse", "rise", "recalled", "recalled_before", "needle_recalled"),
)


class Failures(Study):
    """Every recipe on every document, with needles hidden in it; each run is diagnosed with all of its figures kept."""

    name = "failures"
    title = "failures of absorbing"
    claim = (
        "LIFT alone loses needles, gains irregularly and over-fits to its tasks; and a text can be known by heart and yet not "
        "be found by any question."
    )
    source = "2412.13626, limitations; the last one is from this project's trials"
    defaults: ClassVar[Mapping[str, Any]] = {"model.window": 2048, "tasks.per_sentence": 1}
    quick: ClassVar[Mapping[str, Any]] = {**QUICK_SETTINGS, "tasks.per_sentence": 2}
    needs_questions: ClassVar[bool] = False

    def prepare(self, item: Item, config: Any, options: Options) -> Item:
        """The document with one needle at each of three depths."""
        return with_needles(Item(item.document, ()))

    def arms(self, bench: Bench, item: Item, seed: int) -> Iterator[Arm]:
        names = list(RECIPES)[:2] if bench.options.quick else list(RECIPES)
        for name in names:
            yield Arm(name, ("lift",), RECIPES[name])

    def measure(self, bench: Bench, index: int, seed: int) -> None:
        document = bench.items[index].document
        for arm in self.arms(bench, bench.items[index], seed):
            key = {"arm": arm.name, "seed": seed, "document_id": document.id}
            if bench.has(**key):
                continue
            with bench.absorbed(arm, seed, index) as adapter:
                symptoms = measure_symptoms(bench.model, adapter, bench.settings(arm, seed))
                needles = _needles_recalled(bench, adapter.id, document)
            findings = judge_symptoms(symptoms)
            values: Row = {name: value for each in findings for name, value in each.figures.items()}
            values |= {f"seen: {each.signature}": _seen(each.seen) for each in findings}
            values |= {name: _mean(getattr(symptoms, name)) for name in _LOSSES}
            values |= {
                "text_before": symptoms.text_before,
                "text_after": symptoms.text_after,
                "recalled": values.pop("after", None),
                "recalled_before": values.pop("before", None),
                "needle_recalled": sum(needles) / len(needles),
                "needles": needles,
            }
            about = {"title": document.title, "domain": domain_of(bench.items[index]), "unit": f"seed {seed}"}
            bench.add(key, about | values)
            bench.forget_adapters()

    def conclude(self, rows: Sequence[Row], options: Options, folder: Path) -> Conclusion:
        names = [f"seen: {signature}" for signature in SIGNATURES]
        recipes = groups(rows, "arm")
        lines, figures = [], []
        for recipe in recipes:
            found = {name: figure(rows, name, where(arm=recipe)) for name in names}
            lines.append([recipe, *(f"{each.shown(0, 100)} % of {each.units}" for each in found.values())])
            figures += [{"recipe": recipe, "metric": name} | each.row() for name, each in found.items() if each.units]
        measured, more = tabulate(rows, ("arm",), [name for name in _MEASURED if any(name in row for row in rows)])
        text = (
            "Losses (before and after) and gains in nats a token: of the text, of answers to tasks that were trained on and to "
            "held-out ones. recalled: share of the document's own details, needle_recalled: of three hidden sentences, that a "
            "greedy answer without text names. worse: share of new questions whose answers became less likely. rise: relative "
            "rise of the loss on unrelated text. A unit is a document and seed."
        )
        blocks: list[Block] = [
            Heading("Share of the runs in which each signature is seen"),
            Table(["recipe", *SIGNATURES], lines),
            Heading("Figures"),
            measured,
            Paragraph(text),
        ]
        series = {recipe: {s: figure(rows, f"seen: {s}", where(arm=recipe)) for s in SIGNATURES} for recipe in recipes}
        drawing = Drawing("signatures", "Share of the runs that show each signature", bars(series, "share of runs"))
        return Conclusion(_verdict(rows, recipes), [*figures, *more], blocks, [drawing])


def _verdict(rows: Sequence[Row], recipes: Sequence[str]) -> Verdict:
    """Each signature must be seen in more than half of the runs of some recipe; the sentence says which are."""
    words, outcomes = [], []
    for signature in SIGNATURES:
        shares = {recipe: figure(rows, f"seen: {signature}", where(arm=recipe)) for recipe in recipes}
        known = {recipe: each for recipe, each in shares.items() if each.units}
        if signature == "forgetting":  # reported, but no part of the claim
            continue
        if not known:
            words.append(f"{signature}: not measured")
            continue
        worst = max(known, key=lambda recipe: known[recipe].mean)
        outcomes.append(_often(known[worst], all(each.units >= DECIDABLE for each in known.values())))
        words.append(f"{signature}: {known[worst].mean:.0%} of {known[worst].units} runs of '{worst}' ({outcomes[-1]})")
    outcome: Outcome = "not decidable at this size"
    if outcomes and all(each == "seen" for each in outcomes):
        outcome = "confirmed"
    elif "not seen" in outcomes:
        outcome = "not confirmed"
    return Verdict(outcome, f"Where each is most frequent: {'; '.join(words)}.")


def _often(found: Figure, enough: bool) -> str:
    if found.low is None or found.high is None or not enough:
        return "too few runs"
    return "seen" if found.low >= _OFTEN else "not seen" if found.high < _OFTEN else "unclear"


def _seen(seen: bool | None) -> float | None:
    return None if seen is None else float(seen)


def _mean(losses: Sequence[float]) -> float | None:
    """Over the tasks whose answer has a loss; none where nothing was trained on."""
    known = [loss for loss in losses if math.isfinite(loss)]
    return statistics.fmean(known) if known else None


def _needles_recalled(bench: Bench, adapter: str, document: Document) -> list[float]:
    """Of each hidden sentence, whether the answer to its first question has all the key words."""
    tokenizer, needles = bench.model.tokenizer, load_needles()[:3]
    prompts = [Prompt(question_prompt(tokenizer, document.title, needle.questions[0])) for needle in needles]
    with use_adapter(bench.model, adapter):
        said = {text.index: text.text for text in generate(bench.model, prompts, bench.config.answering, 0)}
    return [float(keyword_recall(said[i], needles[i].keywords) == 1) for i in range(len(prompts))]
