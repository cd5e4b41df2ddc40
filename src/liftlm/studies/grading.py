"""The sheet of tasks that a person grades: written once as CSV, read back, compared with what the program thinks of them."""

from __future__ import annotations

import csv
import io
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

from liftlm.errors import BenchmarkDataError
from liftlm.storage import write_file
from liftlm.studies.study import Row

SHEET = "sheet.csv"
SAMPLED = 50
GRADES = ("faithful", "answerable", "useful")  # 1 or 0; 1 or 0; 1 to 5
_ALLOWED = {"faithful": {"0", "1"}, "answerable": {"0", "1"}, "useful": {"1", "2", "3", "4", "5"}}
_SHOWN = ("id", "title", "evidence", "question", "answer", "kind")
_HOW = "Write 1 or 0 for faithful and answerable, 1 to 5 for useful, or leave a cell empty."


def write_sheet(folder: Path, rows: Sequence[Row], seed: int) -> Path:
    """50 tasks drawn from `rows`, of each writer as many; a sheet that is there already is left alone, as somebody may be at it.

    In no order that tells the writers apart.
    """
    path = folder / SHEET
    if path.exists():
        return path
    draw = random.Random(f"{seed}/sheet")
    drawn = _alike(rows, draw)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_SHOWN, *GRADES, "note"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in drawn:
        # a cell that begins so would be run as a formula
        shown = {name: f"'{row[name]}" if str(row[name])[:1] in "=+-@" else row[name] for name in _SHOWN}
        writer.writerow(shown)
    write_file(path, text.getvalue())
    return path


def _alike(rows: Sequence[Row], draw: random.Random) -> list[Row]:
    """Of each writer in turn one, as long as there are any."""
    writers = list(dict.fromkeys(row.get("writer") for row in rows))
    own = {name: [row for row in rows if row.get("writer") == name] for name in writers}
    shuffled = [draw.sample(each, len(each)) for each in own.values()]
    drawn = [row for turn in itertools.zip_longest(*shuffled) for row in turn if row is not None][:SAMPLED]
    return draw.sample(drawn, len(drawn))


def read_sheet(path: Path, rows: Sequence[Row]) -> list[Row]:
    """The graded tasks of `rows`, with the person's grades as human_faithful, human_answerable, human_useful (0 to 1).

    Raises BenchmarkDataError, which names the line: another study's sheet, a grade that is none, nothing graded.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkDataError(
            f"The graded sheet {path} cannot be read: {error}.", "Give it with --graded."
        ) from error
    delimiter = ";" if text.partition("\n")[0].count(";") > text.partition("\n")[0].count(",") else ","
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    if not {"id", *GRADES} <= set(reader.fieldnames or ()):
        raise BenchmarkDataError(f"{path} lacks columns of a sheet.", f"Grade {SHEET} of the study's folder. {_HOW}")
    known = {row["id"]: row for row in rows}
    graded = []
    for number, line in enumerate(reader, 2):
        given = {name: (line.get(name) or "").strip() for name in GRADES}
        if not any(given.values()):
            continue
        if line["id"] not in known:
            raise BenchmarkDataError(f"Row {number} of {path} is no task of this study.", "Grade this folder's sheet.")
        for name, value in given.items():
            if value and value not in _ALLOWED[name]:
                raise BenchmarkDataError(f"Row {number} of {path}: {name} cannot be '{value[:20]}'.", _HOW)
        grades = {f"human_{name}": _share(name, value) for name, value in given.items() if value}
        graded.append(known[line["id"]] | grades)
    if not graded:
        raise BenchmarkDataError(f"Nothing is graded in {path}.", _HOW)
    return graded


def agreement(rows: Sequence[Row], name: str) -> list[Row]:
    """1 where the person and the program say the same of a task, else 0, as column `agreed`."""
    both = [row for row in rows if row.get(f"human_{name}") is not None and row.get(name) is not None]
    return [row | {"agreed": float(row[f"human_{name}"] == row[name])} for row in both]


def _share(name: str, value: str) -> float:
    return (int(value) - 1) / 4 if name == "useful" else float(value)
