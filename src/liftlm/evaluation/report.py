"""report.md and report.html from the files of an evaluation folder.

Everything that is shown was computed by scoring; this only words and formats it. Knows no model.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from liftlm.errors import BenchmarkDataError
from liftlm.evaluation.blocks import Block, Fold, Heading, Paragraph, Picture, Table, Verbatim, to_html, to_markdown
from liftlm.evaluation.figures import NONE, format_number, format_score, format_value, label
from liftlm.evaluation.live import LiveScores as LiveScores
from liftlm.evaluation.live import live_table as live_table
from liftlm.evaluation.plots import draw_plots
from liftlm.evaluation.scoring import (
    COMPARED,
    CONTROL,
    Row,
    rank,
    read_json,
    read_predictions,
    read_rows,
)
from liftlm.storage import write_file

_SHOWN = 10  # questions in full


def write_report(folder: Path) -> None:
    """Writes report.md, report.html and plots/ of a scored folder. Raises BenchmarkDataError where it is not scored yet."""
    found = _read(folder)
    title = f"Evaluation: {found.details['benchmark']}"
    blocks = [
        Heading(title, 1),
        *_facts(found),
        *_main_table(found),
        *_differences(found),
        *_knowledge(found),
        *_reading(found),
        *_interference(found),
        *_groups(found, "kinds", "By kind of question", "kinds.png"),
        *_groups(found, "lengths", "By length of the document", "lengths.png"),
        *([Heading("Needles"), *found.picture("needles.png")] if "needles.png" in found.plots else []),
        *_absorbing(found),
        *_examples(found),
        *_settings(found),
    ]
    write_file(folder / "report.md", to_markdown(blocks))
    write_file(folder / "report.html", to_html(title, blocks))


@dataclass(frozen=True)
class _Found:
    """What the folder holds."""

    folder: Path
    run: Mapping[str, Any]
    rows: Sequence[Row]
    scores: Mapping[str, Mapping[str, Any]]
    details: Mapping[str, Any]
    absorbs: Sequence[Row]
    contexts: Mapping[str, str]
    plots: Mapping[str, str]

    def picture(self, name: str) -> list[Block]:
        path = self.folder / "plots" / name
        return [Picture(path, f"plots/{name}", self.plots[name])] if name in self.plots else []


def _read(folder: Path) -> _Found:
    scores, details = read_json(folder / "scores.json"), read_json(folder / "details.json")
    if not scores or not details:
        raise BenchmarkDataError(f"{folder} is not scored yet.", "Score its predictions first.")
    rows, _ = read_predictions(folder)
    absorbs = {(row["document_id"], row.get("adapter_id")): row for row in read_rows(folder, "absorbs")[0]}
    plots: dict[str, str] = {}
    with contextlib.suppress(ImportError):  # without matplotlib there are none, and the report says so
        plots = draw_plots(folder, scores, details, rows, _telling(scores, details))
    return _Found(
        folder=folder,
        run=read_json(folder / "run.json"),
        rows=rows,
        scores=scores,
        details=details,
        absorbs=[absorbs[key] for key in sorted(absorbs, key=str)],
        contexts={row["id"]: row["text"] for row in read_rows(folder, "contexts")[0]},
        plots=plots,
    )


def _telling(scores: Mapping[str, Mapping[str, Any]], details: Mapping[str, Any]) -> list[str]:
    """The few metrics that tables by group and plots show: the benchmark's first two, likelihood, what the judge says."""
    names = [*details["metrics"][:2], "answer_nll", "evidence_gap_closed", *(["judge"] if details["judge"] else [])]
    return [name for name in dict.fromkeys(names) if any(entry.get(name) is not None for entry in scores.values())]


# --- sections ---------------------------------------------------------------------------------------------------------


def _facts(found: _Found) -> list[Block]:
    run, details = found.run, found.details
    model = (run.get("config") or {}).get("model") or {}
    facts = [
        ("dataset", run.get("dataset")),
        ("source of prompts and metrics", run.get("source")),
        ("model", model.get("name")),
        ("window, tokens", model.get("window")),
        ("documents", len({row["document_id"] for row in found.rows})),
        ("questions", details["questions"]),
        ("limit", run.get("limit")),
        ("seed", run.get("seed")),
        ("judge", details["judge"] or "none: not judged"),
        ("encoder of BERTScore", details.get("encoder")),
    ]
    rows = [[name, str(value)] for name, value in facts if value is not None]
    lost = details["unreadable_lines"]
    if not found.plots and any(entry["n"] for entry in found.scores.values()):
        rows.append(["plots", "none: matplotlib is not installed"])
    warning = f"{lost} lines of the predictions could not be read and are missing here." if lost else ""
    return [Table(["", ""], rows), *([Paragraph(warning)] if warning else [])]


def _main_table(found: _Found) -> list[Block]:
    details, scores = found.details, found.scores
    kept = ["reading_kept"] if any(entry.get("reading_kept") is not None for entry in scores.values()) else []
    metrics = [*(name for name in details["metrics"] if name != "judge"), "evidence_gap_closed", *kept, "judge"]
    extra = ["n", "failed", "seconds a question", "peak memory, GB"]
    rows = []
    for method, entry in scores.items():
        costs = details["methods"][method]
        cells = [_cell(found, method, metric) for metric in metrics]
        seconds, memory = format_number(costs["seconds"], 2), format_number(costs["peak_memory_bytes"], 2, 1e9)
        rows.append([method, *cells, str(entry["n"]), str(entry["failed"]), seconds, memory])
    notes = (
        "Shares are in percent, answer NLL in nats a token; ↓: lower is better. In brackets: 95 % intervals of "
        f"{details['resamples']:,} resamples of the questions. Evidence gap closed: (NLL closed-book − NLL of the method) / "
        "(NLL closed-book − NLL oracle). Failed answers are counted, not scored."
    ) + (
        " Reading kept: token F1 of lift+oracle / oracle, one figure for all methods that use the adapter."
        if kept
        else ""
    )
    table = Table(["method", *map(label, metrics), *extra], rows)
    return [Heading("Scores"), table, Paragraph(notes), *found.picture("methods.png")]


def _cell(found: _Found, method: str, metric: str) -> str:
    entry, counts = found.scores[method], found.details["methods"][method]["counts"]
    if entry.get(metric) is None and entry["n"]:
        return "not judged" if metric == "judge" else found.details["unavailable"].get(metric, NONE)
    count = counts.get(metric, entry["n"])
    shown = format_score(metric, entry)
    return f"{shown} ({count} of {entry['n']} judged)" if metric == "judge" and count < entry["n"] else shown


def _differences(found: _Found) -> list[Block]:
    """Paired, question by question, as far as claims depend on them; all are in details.json."""
    paired = {(entry["a"], entry["b"], entry["metric"]): entry for entry in found.details["paired"]}
    metrics = [name for name in found.details["metrics"] if any(key[2] == name for key in paired)]
    rows = []
    for first, second in COMPARED:
        entries = [paired.get((first, second, metric)) for metric in metrics]
        if any(entries):
            rows.append([f"{first} − {second}", *(_difference(entry) for entry in entries)])
    if not rows:
        return []
    note = (
        "Means of the differences on the questions that both methods answered, with 95 % intervals and the p-value of a "
        "two-sided permutation test; many tests are made here, and some would show p < 0.05 by chance. All pairs of methods "
        "are in details.json."
    )
    return [Heading("Differences, question by question"), Table(["", *map(label, metrics)], rows), Paragraph(note)]


def _difference(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return NONE
    low, high = (format_value(entry["metric"], end, sign=True) for end in entry["interval"] or (None, None))
    shown, chance = format_value(entry["metric"], entry["difference"], sign=True), entry["p_value"]
    return f"{shown} [{low}, {high}] " + ("p < 0.001" if chance < 0.001 else f"p = {chance:.3f}")


def _knowledge(found: _Found) -> list[Block]:
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in found.details["knowledge"]:
        entries.setdefault((entry["a"], entry["b"]), {})[entry["metric"]] = entry
    if not entries:
        text = f"Not known: it is what lift gains over {CONTROL}, and both are needed. Without that control a gain may be format."
        return [Heading("Knowledge, against the control"), Paragraph(text)]
    text = (
        f"{CONTROL} absorbed another document with the same recipe. What lift gains over it is knowledge of the document; the "
        "rest is format. Beside text the other document's adapter sees the same text, or ranks it."
    )
    metrics = dict.fromkeys(entry["metric"] for entry in found.details["knowledge"])
    counts = [max(entry["n"] for entry in each.values()) for each in entries.values()]
    rows = [[label(metric), *(_difference(each.get(metric)) for each in entries.values())] for metric in metrics]
    pairs = [f"{first} − {second} (n = {count})" for (first, second), count in zip(entries, counts, strict=True)]
    table = Table(["", *pairs], rows)
    return [Heading("Knowledge, against the control"), Paragraph(text), table]


def _reading(found: _Found) -> list[Block]:
    rows = [
        [method, format_score("reading_kept", entry)]
        for method, entry in found.scores.items()
        if "reading_kept" in entry and entry["reading_kept"] is not None
    ]
    missing = "Not known: it needs the methods oracle and lift+oracle, and a benchmark with token F1."
    text = (
        "Token F1 with the evidence in the window, with the adapter / without it, in percent: whether absorbing costs the "
        "model its reading. One figure for all methods that use the adapter."
    )
    content: list[Block] = [Table(["method", "reading kept"], rows), Paragraph(text)] if rows else [Paragraph(missing)]
    return [Heading("Reading kept"), *content]


def _interference(found: _Found) -> list[Block]:
    """What absorbing does to what has nothing to do with the document."""
    rows = []
    for control in (False, True):
        own = [
            row["interference"]
            for row in found.absorbs
            if row.get("interference") and bool(row.get("control")) == control
        ]
        if own:
            asked = sum(each["general_questions"] for each in own)
            right = [sum(each[f"general_right_{when}"] for each in own) for when in ("before", "after")]
            texts = [statistics.fmean(each[f"unrelated_nll_{when}"] for each in own) for when in ("before", "after")]
            name = "absorbed as control" if control else "absorbed"
            shown = [f"{value:.3f}" for value in texts] + [f"{value} of {asked}" for value in right]
            rows.append([f"{name}: {len(own)} document{'s' * (len(own) != 1)}", *shown])
    if not rows:
        return [Heading("Interference"), Paragraph("Not measured.")]
    header = ["", "NLL of unrelated text ↓, before", "after", "general questions right, before", "after"]
    return [Heading("Interference"), Table(header, rows)]


def _groups(found: _Found, which: str, title: str, picture: str) -> list[Block]:
    groups = found.details[which]
    if not groups:
        return []
    methods = list(found.scores)
    blocks: list[Block] = [Heading(title)]
    for metric in _telling(found.scores, found.details):
        rows = [
            [
                name,
                str(group["questions"]),
                *(format_score(metric, group["methods"].get(method, {})) for method in methods),
            ]
            for name, group in groups.items()
        ]
        blocks += [Heading(label(metric), 3), Table(["", "questions", *methods], rows)]
    note = "All other metrics, and the differences between methods within each group, are in details.json."
    return [*blocks, Paragraph(note), *found.picture(picture)]


def _absorbing(found: _Found) -> list[Block]:
    if not found.absorbs:
        return []
    rows = []
    for row in found.absorbs:
        losses = " → ".join(f"{loss:.3f}" for loss in row.get("epoch_losses") or []) or NONE
        title = row.get("title") or row["document_id"]
        if row.get("control"):
            title += f" (control: absorbed “{row.get('absorbed_title', '')}”)"
        counts = [format_number(row.get(name), 0) for name in ("tokens", "tasks", "seconds", "tokens_per_second")]
        rows.append([title, *counts, format_number(row.get("peak_memory_bytes"), 2, 1e9), losses])
    header = ["document", "tokens", "tasks", "seconds", "tokens a second", "peak memory, GB", "loss by epoch"]
    # a document's adapter is another one's control
    made = {row.get("adapter_id") or number: row.get("seconds") or 0 for number, row in enumerate(found.absorbs)}
    text = f"{len(made):,} document{'s' * (len(made) != 1)} absorbed in {sum(made.values()):,.0f} seconds."
    return [Heading("Absorbing"), Paragraph(text), Fold("Every document", [Table(header, rows)])]


def _settings(found: _Found) -> list[Block]:
    run = found.run
    blocks: list[Block] = [Heading("How it was made")]
    if run.get("command"):
        command = run["command"] if isinstance(run["command"], str) else " ".join(map(str, run["command"]))
        blocks.append(Verbatim(command, "Command"))
    for key, name in (("config", "Resolved settings"), ("versions", "Versions"), ("machine", "Machine")):
        if run.get(key):
            blocks.append(Verbatim(yaml.safe_dump(run[key], sort_keys=False, allow_unicode=True).rstrip(), name))
    return blocks


# --- questions in full ------------------------------------------------------------------------------------------------


def _examples(found: _Found) -> list[Block]:
    """Questions drawn at random: everything that was asked, shown and answered."""
    by_question: dict[tuple[str, str], list[Row]] = {}
    for row in found.rows:
        by_question.setdefault((row["document_id"], row["question_id"]), []).append(row)
    seed = found.run.get("seed") or 0
    drawn = random.Random(seed).sample(sorted(by_question), min(_SHOWN, len(by_question)))
    blocks: list[Block] = [
        Heading(f"{len(drawn)} question{'s' * (len(drawn) != 1)} in full"),
        Paragraph(f"Drawn at random with seed {seed}, neither the best nor the worst."),
    ]
    for key in drawn:
        rows = sorted(by_question[key], key=lambda row: rank(row["method"]))
        first = rows[0]
        blocks += [
            Heading(f"{first.get('title') or first['document_id']}, question {first['question_id']}", 3),
            Verbatim(first.get("question") or "", f"Question ({first['kind']})" if first["kind"] else "Question"),
            Verbatim("\n".join(map(str, first["answers"])), "Expected"),
        ]
        if first.get("choices"):
            blocks.append(Verbatim("\n".join(map(str, first["choices"])), "Choices"))
        if first.get("evidence"):
            blocks.append(Verbatim("\n".join(map(str, first["evidence"])), "Evidence"))
        blocks += [block for row in rows for block in _answer(found, row)]
        blocks += _contexts(found, rows)
    return blocks


def _answer(found: _Found, row: Row) -> list[Block]:
    if row["error"]:
        return [Verbatim(str(row["error"]), f"{row['method']} failed")]
    scores = found.details["rows"].get(row["id"], {})
    names = [name for name in found.details["metrics"] if name in scores]
    facts = [f"{label(name)} {format_value(name, scores[name])}" for name in names]
    return [Verbatim(row["answer"], f"{row['method']} ({', '.join(facts)})" if facts else row["method"])]


def _contexts(found: _Found, rows: Iterable[Row]) -> list[Block]:
    """Each text that stood in a window, once, with the methods that had it."""
    users: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("context_id"):
            users.setdefault(row["context_id"], []).append(row)
    blocks: list[Block] = []
    for identity, sharing in users.items():
        names = ", ".join(row["method"] for row in sharing)
        text = found.contexts.get(identity, "(not in contexts.jsonl)")
        tokens = format_number(sharing[0].get("context_tokens"), 0)
        blocks.append(Fold(f"Text in the window of {names}: {tokens} tokens", [Verbatim(text)]))
    return blocks
