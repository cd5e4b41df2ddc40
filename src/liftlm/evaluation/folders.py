"""Two evaluations of the same questions, compared question by question: another recipe, model or version.

Reads what was scored; needs no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from liftlm.errors import ConfigError
from liftlm.evaluation.benchmark import Benchmark
from liftlm.evaluation.comparing import compare, mean_of
from liftlm.evaluation.scoring import Row, read_predictions, tabulate

_OTHER = "\0"  # behind the names of the other folder's methods


def compare_folders(folder: Path, other: Path, benchmark: Benchmark) -> list[dict[str, Any]]:
    """folder − other for each method and metric that both have, on the questions that both answered: entries of
    `comparing.compare` with the two means, `here` and `there`.

    Questions are the same where document and question are. Raises ConfigError where a folder is not scored or nothing is shared.
    """
    rows, found = _read(folder, "")
    more, other_found = _read(other, _OTHER)
    found |= other_found
    metrics = tuple(dict.fromkeys(name for values in found.values() for name in values))
    table = tabulate(benchmark, [*rows, *more], found, metrics)
    methods = [method for method in table.values if method + _OTHER in table.values]
    everything = np.ones(len(table.questions), dtype=bool)
    entries = []
    for method in methods:
        both = table.scored[method] & table.scored[method + _OTHER]
        for entry in compare(table, method, method + _OTHER, everything):
            here, there = (table.column(name, entry["metric"]) for name in (method, method + _OTHER))
            known = both & np.isfinite(here) & np.isfinite(there)
            means = {"here": mean_of(here[known]), "there": mean_of(there[known])}
            entries.append({"method": method, **means, **{key: entry[key] for key in _KEPT}})
    if not entries:
        raise ConfigError(
            f"{folder} and {other} have no question and method in common.",
            "Evaluate the same data by the same methods.",
        )
    return entries


_KEPT = ("metric", "n", "difference", "interval", "p_value")


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


def _read(folder: Path, mark: str) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """Rows and their scores by id, both told apart by the mark."""
    try:
        scores = json.loads((folder / "details.json").read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder} holds no scores.", f"First: lift score {folder}") from None
    rows, _ = read_predictions(folder)
    marked: list[Row] = [row | {"id": row["id"] + mark, "method": row["method"] + mark} for row in rows]
    return marked, {identity + mark: values for identity, values in scores.items()}
