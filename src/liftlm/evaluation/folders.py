"""Two evaluations of the same questions, compared question by question: another recipe, model or version.

Reads what was scored; needs no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from liftlm.errors import ConfigError
from liftlm.evaluation.benchmark import Benchmark
from liftlm.evaluation.comparing import compare, round_off, weighted_means
from liftlm.evaluation.scoring import Row, read_json, read_predictions, tabulate

_KEPT = ("metric", "n", "difference", "interval", "p_value")  # of `compare`
_OTHER = "\0"  # behind the names of the other folder's methods


def compare_folders(folder: Path, other: Path, benchmark: Benchmark) -> list[dict[str, Any]]:
    """folder − other for each method and metric that both have, on the questions that both answered: entries of
    `comparing.compare` with the two means, `here` and `there`.

    Questions are the same where document, words and expected answers are. What a judge or an encoder said is compared where both
    folders have the same one. Raises ConfigError where a folder is not scored, is another benchmark's, or nothing is shared.
    """
    check_comparable(folder, other)
    (rows, found, judges), (more, other_found, other_judges) = _read(folder, ""), _read(other, _OTHER)
    known = [_asked(row) for row in rows]
    more = [row for row in more if _asked(row) in known]
    found |= other_found
    metrics = tuple(dict.fromkeys(name for values in found.values() for name in values))
    metrics = tuple(name for name in metrics if judges.get(name) == other_judges.get(name))
    table = tabulate(benchmark, [*rows, *more], found, metrics)
    methods = [method for method in table.values if method + _OTHER in table.values]
    everything = np.ones(len(table.questions), dtype=bool)
    entries = []
    for method in methods:
        for entry in compare(table, method, method + _OTHER, everything):
            at = metrics.index(entry["metric"])
            pair = np.stack([table.column(name, entry["metric"]) for name in (method, method + _OTHER)], axis=1)
            both = np.isfinite(pair).all(axis=1)
            (here, there), _ = weighted_means(pair[both], table.weights[both][:, [at, at]])
            means = {"here": round_off(float(here)), "there": round_off(float(there))}
            entries.append({"method": method, **means, **{key: entry[key] for key in _KEPT}})
    if not entries:
        raise ConfigError(
            f"{folder} and {other} have no question and method in common.",
            "Evaluate the same data by the same methods.",
        )
    return entries


def check_comparable(folder: Path, other: Path) -> None:
    """Before anything is scored. Raises ConfigError."""
    if folder.resolve() == other.resolve():
        raise ConfigError(f"{folder} is compared with itself.", "Give another folder to --against.")
    names = [read_json(path / "run.json").get("benchmark") for path in (folder, other)]
    if not isinstance(read_json(other / "details.json").get("rows"), dict):
        raise ConfigError(f"{other} holds no scores.", f"First: lift score {other}")
    if names[0] != names[1]:
        raise ConfigError(f"{other} holds an evaluation of {names[1]}, not of {names[0]}.", "Give another folder.")


def comparison_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| method | metric | n | here | there | difference | 95 % interval | p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        low, high = entry["interval"] or (float("nan"), float("nan"))
        lines.append(
            f"| {entry['method']} | {entry['metric']} | {entry['n']} | {entry['here']:.3f} | {entry['there']:.3f} "
            f"| {entry['difference']:+.3f} | [{low:+.3f}, {high:+.3f}] | {entry['p_value']:.3f} |"
        )
    return "\n".join(lines)


def _read(folder: Path, mark: str) -> tuple[list[Row], dict[str, dict[str, float]], dict[str, Any]]:
    """Rows, their scores by id (both told apart by the mark), and who said what a judge and an encoder have to say."""
    details = read_json(folder / "details.json")
    scores = details.get("rows")
    if not isinstance(scores, dict) or not all(isinstance(values, dict) for values in scores.values()):
        raise ConfigError(f"{folder} holds no scores.", f"First: lift score {folder}")
    rows, _ = read_predictions(folder)
    marked: list[Row] = [row | {"id": row["id"] + mark, "method": row["method"] + mark} for row in rows]
    judges = {"judge": details.get("judge"), "bert_f1": details.get("encoder")}
    return marked, {identity + mark: values for identity, values in scores.items()}, judges


def _asked(row: Row) -> tuple[Any, ...]:
    return row["document_id"], row["question_id"], row["question"], row["answers"]
