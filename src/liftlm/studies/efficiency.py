"""Study: seconds and memory of reading in context against absorbing, by length; the first answer; long answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from liftlm.documents import Document
from liftlm.evaluation.blocks import Block, Heading, Paragraph, Table
from liftlm.evaluation.resampling import RESAMPLES
from liftlm.studies.bench import Bench, with_settings
from liftlm.studies.costs import measure_alone, text_of_length, write_tokens
from liftlm.studies.drawing import Fit, lines
from liftlm.studies.growth import Growth, cost_at, fit_growth
from liftlm.studies.intervals import Outcome, Verdict, figure, groups, together
from liftlm.studies.pace import first_token_seconds
from liftlm.studies.study import QUICK_SETTINGS, Conclusion, Drawing, Options, Row, Study
from liftlm.studies.tables import where

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_QUICK_LENGTHS = (64, 128, 256, 512)
_OUTPUTS, _QUICK_OUTPUTS = (16, 64, 256), (4, 8, 16)
_FIRST = (1024, 2048, 4096)  # tokens of the documents whose first answer is timed
_LONGEST_POINT = 900.0  # seconds; a point that is predicted to take longer is left out, and said so
_BEND = 0.1  # share of the growth that may be quadratic in what is called linear
KINDS = {"read": "in context", "absorb": "LIFT"}
Fits = dict[tuple[str, str], Growth | None]  # by kind and metric


class Efficiency(Study):
    """Costs do not depend on what the text says: one document is repeated to each length. Segments only, unless set otherwise.

    Reading past the model's own limit is timed too, as the paper did (its prompts were 128k empty tokens), and marked.
    """

    name = "efficiency"
    title = "time and memory"
    claim = (
        "Reading in context takes quadratic time and ever more memory; LIFT takes linear time and, beyond the model, the same "
        "memory at any length."
    )
    source = "2412.13626, efficiency; 2502.14644 v4, time to first token"
    defaults: ClassVar[Mapping[str, Any]] = {
        "tasks.writer": "none",
        "tasks.per_sentence": 1,
        "segments.segment_tokens": 1024,
    }
    quick: ClassVar[Mapping[str, Any]] = {**QUICK_SETTINGS, "tasks.writer": "none"}
    alone: ClassVar[bool] = True
    needs_questions: ClassVar[bool] = False

    def measure(self, bench: Bench, index: int, seed: int) -> None:
        if index:
            return  # what the text says makes no difference
        text = bench.items[0].document.text
        lengths = bench.options.lengths or (_QUICK_LENGTHS if bench.options.quick else LENGTHS)
        for kind in KINDS:
            for tokens in lengths:
                self._point(bench, kind, seed, text, tokens)
        outputs = _QUICK_OUTPUTS if bench.options.quick else _OUTPUTS
        window = min(bench.model.window, max(lengths)) - max(outputs)
        for kind, tokens in (("in context", window), ("LIFT", 48)):
            for count in outputs:
                key = {"what": "write", "kind": kind, "tokens": count, "seed": seed}
                if not bench.has(**key):
                    ids = text_of_length(bench.model, text, tokens)
                    write_tokens(bench.model, ids[:32], 1)  # or the first one pays for starting
                    found = {"seconds": write_tokens(bench.model, ids, count), "stopped": None}
                    bench.add(key, found | {"unit": f"{kind}-{count}", "prompt_tokens": tokens})
        for tokens in lengths[:2] if bench.options.quick else [each for each in _FIRST if each <= max(lengths)]:
            self._first(bench, seed, text, tokens)

    def _point(self, bench: Bench, kind: str, seed: int, text: str, tokens: int) -> None:
        key = {"what": kind, "tokens": tokens, "seed": seed}
        if bench.has(**key):
            return
        predicted = _predicted(bench.rows, kind, seed, tokens)
        beyond = kind == "read" and tokens > _limit(bench)
        if predicted > _LONGEST_POINT:
            found: Row = {"seconds": None, "memory_bytes": None, "stopped": f"would take about {predicted:,.0f} s"}
        else:
            found = measure_alone(kind, with_settings(bench.config, {"seed": seed}), text, tokens)
        bench.add(key, found | {"unit": f"{kind}-{tokens}", "beyond": beyond, "limit": _limit(bench)})

    def _first(self, bench: Bench, seed: int, text: str, tokens: int) -> None:
        config = with_settings(bench.config, {"tasks.writer": "extractive", "seed": seed})
        document = Document("the text", bench.model.decode(text_of_length(bench.model, text, tokens)))
        writing: float | None = None
        for way in ("no wait", "without", "with"):
            key = {"what": "first", "way": way, "tokens": tokens, "seed": seed}
            if not bench.has(**key):
                seconds = first_token_seconds(bench.model, document, config, writing or 0.0, way == "with")
                bench.add(key, {"seconds": seconds, "writing": writing or 0.0, "unit": f"{way}-{tokens}"})
            if way == "no wait":  # writing is to take as long as training, where a pipeline saves the most
                writing = float(bench.find(**key)["seconds"])

    def conclude(self, rows: Sequence[Row], options: Options, folder: Path) -> Conclusion:
        figures = _figures(rows)
        blocks: list[Block] = [Heading("By length"), *_by_length(rows), Heading("Growth")]
        fits: Fits = {}
        for kind in KINDS:
            points = [row for row in rows if row["what"] == kind and row["seconds"] is not None]
            for metric in ("seconds", "memory_bytes"):
                fits[kind, metric] = fit_growth([row["tokens"] for row in points], [row[metric] for row in points])
        table = [[KINDS[kind], metric, *_growth_cells(fit)] for (kind, metric), fit in fits.items()]
        header = ["", "cost", "better fit", "quadratic share at the longest", "exponent", "points"]
        blocks += [Table(header, table), *_crossing(rows, fits), *_first_answers(rows), *_long_answers(rows)]
        figures += _growth_figures(fits, " ".join(map(str, options.seeds)))
        return Conclusion(_verdict(fits), figures, blocks, _drawings(rows, fits))


def _limit(bench: Bench) -> int:
    config: Any = bench.model.network.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or bench.model.window)


def _predicted(rows: Sequence[Row], kind: str, seed: int, tokens: int) -> float:
    """Seconds, from the longest point so far: reading may grow quadratically, absorbing linearly. Infinite after a failure."""
    before = [row for row in rows if row.get("what") == kind and row["seed"] == seed and row["tokens"] < tokens]
    if not before:
        return 0.0
    last = max(before, key=lambda row: int(row["tokens"]))
    if last["seconds"] is None:
        return float("inf")
    return float(last["seconds"] * (tokens / last["tokens"]) ** (2 if kind == "read" else 1))


def _lengths(rows: Sequence[Row], kind: str) -> list[int]:
    return sorted({int(row["tokens"]) for row in rows if row["what"] == kind and row["seconds"] is not None})


def _figures(rows: Sequence[Row]) -> list[dict[str, Any]]:
    found = []
    for what in groups(rows, "what"):
        for tokens in sorted({row["tokens"] for row in rows if row["what"] == what}):
            for side in ("kind", "way"):
                for name in groups([row for row in rows if row["what"] == what], side) or (
                    [""] if side == "kind" else []
                ):
                    chosen = [
                        r for r in rows if r["what"] == what and r["tokens"] == tokens and r.get(side, "") == name
                    ]
                    for metric in ("seconds", "memory_bytes"):
                        each = figure(_apart(chosen), metric)
                        if each.units:
                            found.append({"what": what, side: name, "tokens": tokens, "metric": metric} | each.row())
    return found


def _apart(rows: Sequence[Row]) -> list[Row]:
    """Repeats are units of their own here: what is resampled are measurements."""
    return [row | {"unit": f"{row['unit']}/{row['seed']}"} for row in rows]


def _by_length(rows: Sequence[Row]) -> list[Block]:
    lengths = sorted({row["tokens"] for row in rows if row["what"] in KINDS})
    table = []
    for tokens in lengths:
        cells = [f"{tokens:,}"]
        for kind in KINDS:
            chosen = _apart([row for row in rows if row["what"] == kind and row["tokens"] == tokens])
            seconds, memory = figure(chosen, "seconds"), figure(chosen, "memory_bytes")
            cells += [seconds.shown(2), memory.shown(2, 1e-9)]
        table.append(cells)
    header = ["tokens", *(f"{name}: {unit}" for name in KINDS.values() for unit in ("seconds", "GB"))]
    told = []
    for kind, name in KINDS.items():
        stopped = [row for row in rows if row["what"] == kind and row["stopped"]]
        if stopped:
            first = min(stopped, key=lambda row: int(row["tokens"]))
            told.append(f"{name}: stops at {first['tokens']:,} tokens ({first['stopped']}).")
        elif _lengths(rows, kind):
            told.append(f"{name}: measured up to {max(_lengths(rows, kind)):,} tokens.")
        beyond = [row for row in rows if row["what"] == kind and row["beyond"] and row["seconds"] is not None]
        if beyond:
            told.append(
                f"Beyond {beyond[0]['limit']:,} tokens reading is past the model's own limit: a cost, and no answer."
            )
    text = " ".join(told) + " A repeat for each seed; GB beyond the loaded model."
    return [Table(header, table), Paragraph(text)]


def _growth_cells(fit: Growth | None) -> list[str]:
    if fit is None:
        return ["–", "–", "–", "too few lengths"]
    bend, exponent = _shown(fit.bend, fit.bend_interval), _shown(fit.exponent, fit.exponent_interval)
    return [fit.better, bend, exponent, str(fit.points)]


def _shown(mean: float, interval: tuple[float, float] | None) -> str:
    return f"{mean:.2f}" if interval is None else f"{mean:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _growth_figures(fits: Fits, seeds: str) -> list[dict[str, Any]]:
    """The exponent and the share of the quadratic term of every fit, as rows of figures.csv."""
    found = []
    for (kind, metric), fit in fits.items():
        if fit is None:
            continue
        for name, mean, interval in (
            ("exponent", fit.exponent, fit.exponent_interval),
            ("quadratic share", fit.bend, fit.bend_interval),
        ):
            low, high = interval or ("", "")
            row = {"what": kind, "metric": f"{metric} {name}", "mean": mean, "low": low, "high": high}
            found.append(row | {"units": fit.points, "seeds": seeds, "resamples": RESAMPLES})
    return found


def _drawings(rows: Sequence[Row], fits: Fits) -> list[Drawing]:
    """Seconds and memory by length: the means with intervals over repeats, and both fits of each, dashed."""
    apart, drawings = _apart(rows), []
    for metric, unit in (("seconds", "seconds"), ("memory_bytes", "bytes beyond the model")):
        series = {
            name: [(float(n), figure(apart, metric, where(what=kind, tokens=n))) for n in _lengths(rows, kind)]
            for kind, name in KINDS.items()
        }
        fitted = [
            Fit(f"{KINDS[kind]}, {shape} fit", KINDS[kind], partial(cost_at, coefficients))
            for (kind, of), fit in fits.items()
            if of == metric and fit is not None
            for shape, coefficients in (("linear", fit.line), ("quadratic", fit.parabola))
        ]
        draw = lines(series, "tokens of the document", unit, log=True, fits=fitted)
        drawings.append(Drawing(metric, f"{unit.capitalize()} by length; dashed: linear and quadratic fits", draw))
    return drawings


def _crossing(rows: Sequence[Row], fits: Fits) -> list[Block]:
    """The length from which absorbing is quicker than reading once: between measured lengths, else beyond them by the fits."""
    took = {
        kind: {n: figure(rows, "seconds", where(what=kind, tokens=n)).mean for n in _lengths(rows, kind)}
        for kind in KINDS
    }
    both = sorted(set(took["read"]) & set(took["absorb"]))
    ahead = [took["read"][n] / took["absorb"][n] for n in both]  # above 1 where absorbing is quicker
    last = max((index for index, ratio in enumerate(ahead) if ratio <= 1), default=-1)
    if not both:
        return []
    if last == -1:
        return [Paragraph(f"Absorbing is quicker than reading once from the shortest length on ({both[0]:,} tokens).")]
    if last + 1 < len(both):
        low, high = math.log(ahead[last]), math.log(ahead[last + 1])
        n = both[last] * (both[last + 1] / both[last]) ** (-low / (high - low))
        return [
            Paragraph(
                f"Absorbing is quicker than reading once from about {n:,.0f} tokens on (between measured lengths)."
            )
        ]
    read, learn = fits["read", "seconds"], fits["absorb", "seconds"]
    if read is None or learn is None:
        return []
    for step in range(1, 60):
        n = both[-1] * 2.0 ** (step / 2)
        reading, absorbing = (cost_at((a, b, max(0.0, c)), n) for a, b, c in (read.parabola, learn.parabola))
        if reading > absorbing > 0:
            text = f"By the fits absorbing is quicker than reading once from about {n:,.0f} tokens on; this is extrapolation."
            return [Paragraph(text)]
    return [Paragraph("By the fits absorbing is never quicker than reading once.")]


def _first_answers(rows: Sequence[Row]) -> list[Block]:
    first = [row for row in rows if row["what"] == "first"]
    table = []
    for tokens in sorted({row["tokens"] for row in first}):
        cells = [f"{tokens:,}"]
        for way in ("without", "with"):
            cells.append(figure(_apart(first), "seconds", where(way=way, tokens=tokens)).shown(1))
        cells.append(figure(_apart(first), "writing", where(way="with", tokens=tokens)).shown(1))
        table.append(cells)
    text = (
        "Seconds from the document to the first token of an answer. Tasks come from a paced writer that takes as long as "
        "training alone: a stand-in for a server of that speed."
    )
    header = ["tokens", "tasks first, then training", "both at once (pipeline)", "writing takes"]
    return [Heading("Time to first token"), Table(header, table), Paragraph(text)] if table else []


def _long_answers(rows: Sequence[Row]) -> list[Block]:
    written = [row for row in rows if row["what"] == "write" and row["seconds"] is not None]
    table = [
        [
            str(count),
            *(figure(_apart(written), "seconds", where(kind=k, tokens=count)).shown(2) for k in KINDS.values()),
        ]
        for count in sorted({row["tokens"] for row in written})
    ]
    prompts = {row["kind"]: row["prompt_tokens"] for row in written}
    text = "Seconds to read the prompt and write the answer: in context after " + " tokens, with LIFT after ".join(
        f"{prompts[kind]:,}" for kind in KINDS.values() if kind in prompts
    )
    header = ["tokens of the answer", *KINDS.values()]
    return [Heading("Long answers"), Table(header, table), Paragraph(f"{text} tokens.")] if table else []


def _verdict(fits: Fits) -> Verdict:
    """Quadratic: the bend's interval is above 0. Linear: it is below a tenth. Memory: the exponent is above 0.5, below 0.2."""
    rules = (
        ("reading time is quadratic", fits["read", "seconds"], "bend", 0.0, None),
        ("absorbing time is linear", fits["absorb", "seconds"], "bend", None, _BEND),
        ("memory of reading grows", fits["read", "memory_bytes"], "exponent", 0.5, None),
        ("memory of absorbing does not", fits["absorb", "memory_bytes"], "exponent", None, 0.2),
    )
    outcomes: list[Outcome] = []
    words = []
    for name, fit, what, above, below in rules:
        interval = None if fit is None else fit.bend_interval if what == "bend" else fit.exponent_interval
        outcome: Outcome = "not decidable at this size"
        if interval is not None and above is not None:
            outcome = "confirmed" if interval[0] > above else "not confirmed" if interval[1] <= above else outcome
        elif interval is not None and below is not None:
            outcome = "confirmed" if interval[1] < below else "not confirmed" if interval[0] >= below else outcome
        outcomes.append(outcome)
        words.append(f"{name}: {outcome}")
    return Verdict(together(outcomes), f"{'; '.join(words)}.".capitalize())
