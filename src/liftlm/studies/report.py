"""report.md, report.html, figures.csv, verdict.json and plots/ of a study's folder, from its conclusion."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from liftlm.evaluation.blocks import Block, Heading, Paragraph, Picture, Table, Verbatim, to_html, to_markdown
from liftlm.storage import write_file
from liftlm.studies.drawing import draw
from liftlm.studies.study import Conclusion, Study


def write_report(folder: Path, study: Study, conclusion: Conclusion, card: Mapping[str, Any]) -> None:
    """Writes everything that a reader sees; rows.jsonl and study.json are there already."""
    write_file(folder / "figures.csv", to_csv(conclusion.figures))
    verdict = {"study": study.name, "claim": study.claim, **dataclasses.asdict(conclusion.verdict)}
    write_file(folder / "verdict.json", json.dumps(verdict | {"seeds": card["seeds"]}, indent=1) + "\n")
    pictures: list[Block] = []
    with contextlib.suppress(ImportError):  # without matplotlib there are none
        for drawing in conclusion.drawings:
            path = draw(folder, drawing)
            pictures.append(Picture(path, f"plots/{path.name}", drawing.caption))
    title = f"Study: {study.title}"
    blocks: list[Block] = [
        Heading(title, 1),
        Paragraph(f"Claim ({study.source}): {study.claim}"),
        Paragraph(f"Verdict: {conclusion.verdict.outcome}. {conclusion.verdict.sentence}"),
        *conclusion.blocks,
        *pictures,
        *_how(card, bool(conclusion.drawings) and not pictures),
    ]
    write_file(folder / "report.md", to_markdown(blocks))
    write_file(folder / "report.html", to_html(title, blocks))


def to_csv(figures: Sequence[Mapping[str, Any]]) -> str:
    """All columns that any row has, in the order in which they first occur."""
    columns = list(dict.fromkeys(name for row in figures for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(figures)
    return text.getvalue()


def _how(card: Mapping[str, Any], no_plots: bool) -> list[Block]:
    documents = [
        [each["title"], f"{each['tokens']:,}", f"{each['characters']:,}", str(each["questions"])]
        for each in card["documents"]
    ]
    text = (
        "In brackets: 95 % bootstrap intervals over questions, whose values for several seeds were averaged first. They say "
        "nothing about other documents than these. Seeds: " + ", ".join(map(str, card["seeds"])) + "."
    )
    if no_plots:
        text += " There are no plots: matplotlib is not installed."
    return [
        Heading("How it was made"),
        Paragraph(text),
        Table(["document", "tokens", "characters", "questions"], documents),
        Verbatim(card["command"], "Command"),
        Verbatim(yaml.safe_dump(card["config"], sort_keys=False, allow_unicode=True).rstrip(), "Settings"),
        Verbatim(yaml.safe_dump(card["machine"], sort_keys=False, allow_unicode=True).rstrip(), "Machine"),
    ]
