"""From the files of an evaluation folder to scores.json and details.json: nothing here needs a model.

Every answer is scored, means get bootstrap intervals, and methods are compared on the questions they share. The same predictions
give the same files, byte for byte, in whatever order and by however many processes they were written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from liftlm.errors import BenchmarkDataError
from liftlm.evaluation.benchmark import Benchmark, Question
from liftlm.evaluation.comparing import (
    Mask,
    Table,
    compare,
    compare_all,
    divide,
    interval_of,
    mean_of,
    round_off,
    weighted_means,
)
from liftlm.evaluation.encoder_score import EncoderScores
from liftlm.evaluation.judge import Judge, judge_rows, read_verdicts
from liftlm.evaluation.resampling import RESAMPLES, Floats, resampled_means
from liftlm.storage import write_file

Row = dict[str, Any]
EncoderScorer = Callable[[Sequence[str], Sequence[Sequence[str]]], EncoderScores]

CONTROL = "lift-other"
BESIDE = ("icl", "rag", "rag-sentences", "oracle")  # texts beside which the adapter acts
METHODS = (
    *("closed-book", "icl", "icl-full", "rag", "rag-sentences", CONTROL, "lift", f"{CONTROL}+recite", "lift+recite"),
    *(f"{adapter}+{text}" for text in BESIDE[:3] for adapter in (CONTROL, "lift")),
    *("oracle", f"{CONTROL}+oracle", "lift+oracle"),
)  # from knowing little to knowing much; differences are later − earlier
CONTROLLED = (
    ("lift", CONTROL),
    ("lift+recite", f"{CONTROL}+recite"),
    *((f"lift+{text}", f"{CONTROL}+{text}") for text in BESIDE),
)
COMPARED = (  # what the program claims, and what the claims are measured against
    *CONTROLLED,
    *(("lift", "closed-book"), ("lift", "icl"), ("lift+recite", "lift"), ("lift+recite", "icl")),
    *((f"lift+{text}", text) for text in BESIDE),
    *(("rag", "icl"), ("rag-sentences", "icl"), ("oracle", "lift+rag"), ("oracle", "lift+rag-sentences")),
)
_RATED = ("loogle-summarization", "longbench/gov_report", "longbench/multi_news", "longbench/qmsum", "longbench/samsum")
_LENGTHS = (1500, 3000, 6000, 12_000, 24_000, 48_000, 96_000)  # tokens; between the round lengths that texts are cut to


@dataclass(frozen=True)
class Scores:
    """methods: as in scores.json; details: as in details.json."""

    methods: dict[str, dict[str, Any]]
    details: dict[str, Any]


def score_folder(
    folder: Path, benchmark: Benchmark, judge: Judge | None = None, encoder: EncoderScorer | None = None
) -> Scores:
    """Writes scores.json and details.json; with `judge`, first has it judge what it has not judged yet.

    Without one, verdicts that the folder already holds count. encoder: BERTScore of (answers, their references), which needs
    a model and so is left out unless it is given. Raises BenchmarkDataError where there are no predictions, and
    JudgeUnreachableError.
    """
    rows, unreadable = read_predictions(folder)
    if not rows:
        raise BenchmarkDataError(f"There are no predictions in {folder}.", "`lift evaluate` writes them.")
    rate = benchmark.name in _RATED
    answered = [row for row in rows if not row["error"]]
    if judge is not None:
        judge_rows(answered, judge, folder / "judgements.jsonl", rate=rate)
    judged_by, verdicts = read_verdicts(folder, answered, judge.model if judge else None, rate=rate)
    found = {row["id"]: _score_row(row, benchmark) for row in answered}
    for identity, verdict in verdicts.items():
        found[identity]["judge"] = verdict
    encoded = encoder([row["answer"] for row in answered], [row["answers"] for row in answered]) if encoder else None
    for row, values in zip(answered, encoded.rows if encoded else (), strict=encoded is not None):
        found[row["id"]] |= values
    table = tabulate(benchmark, rows, found, _metric_names(benchmark, rows, encoded.rows if encoded else ()))
    everything = np.ones(len(table.questions), dtype=bool)
    scores = Scores(
        {method: _score_method(table, method, everything) for method in table.values},
        {
            "benchmark": benchmark.name,
            "metrics": list(table.metrics),
            "unavailable": _unavailable(table),
            "judge": judged_by,
            "encoder": encoded.encoder if encoded else None,
            "questions": len(table.questions),
            "unreadable_lines": unreadable,
            "resamples": RESAMPLES,
            "methods": {method: _costs(rows, table, method) for method in table.values},
            "knowledge": [entry for pair in CONTROLLED for entry in compare(table, *pair, everything)],
            "paired": compare_all(table, everything),
            "kinds": _by_kind(table),
            "lengths": _by_length(table),
            "rows": {
                identity: {name: round_off(value) for name, value in found[identity].items()}
                for identity in sorted(found)
            },
        },
    )
    write_file(folder / "scores.json", _json(scores.methods))
    write_file(folder / "details.json", _json(scores.details))
    return scores


# --- rows -------------------------------------------------------------------------------------------------------------


def read_rows(folder: Path, stem: str) -> tuple[list[Row], int]:
    """The JSON objects of all files `stem*.jsonl` in the order of their names, and how many lines could not be read.

    A last line without line break that is no JSON does not count as one: its writer was killed.
    """
    rows: list[Row] = []
    unreadable = 0
    for path in sorted(folder.glob(f"{stem}*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                unreadable += number < len(lines)
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows, unreadable


def read_json(path: Path) -> dict[str, Any]:
    """An object that the folder holds, empty where there is none. Raises BenchmarkDataError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BenchmarkDataError(f"{path} cannot be read: {error}.", "Write it anew, or restore it.") from error
    return value if isinstance(value, dict) else {}


def read_predictions(folder: Path) -> tuple[list[Row], int]:
    """One row a (document, question, method), sorted, and the number of unreadable lines. Of several rows the last counts.

    But a failure never counts where there is an answer: with several files, the last need not be the latest.
    """
    found, unreadable = read_rows(folder, "predictions")
    latest: dict[str, Row] = {}
    for given in found:
        if {"id", "document_id", "question_id", "method", "answers", "answer"} <= given.keys():
            row: Row = {"error": None, "kind": "", "document_tokens": 0} | given
            before = latest.get(row["id"])
            if before is None or not row["error"] or before["error"]:
                latest.pop(row["id"], None)  # so that it moves to the end
                latest[row["id"]] = row
    single = {(row["document_id"], row["question_id"], row["method"]): row for row in latest.values()}
    return [single[key] for key in sorted(single, key=lambda key: (key[:2], rank(key[2])))], unreadable


def question_of(row: Mapping[str, Any]) -> Question:
    """The question as the benchmark gave it."""
    return Question(
        id=row["question_id"],
        question=row.get("question", ""),
        answers=tuple(row["answers"]),
        evidence=tuple(row.get("evidence") or ()),
        kind=row["kind"],
        choices=tuple(row.get("choices") or ()),
        data=row.get("data") or {},
    )


def choice_scores(row: Mapping[str, Any]) -> dict[str, float]:
    """Whether the likeliest choice is the right one: by the likelihood of the whole, and by that of a token."""
    choices, likelihoods = row.get("choices") or [], row.get("choice_nlls") or []
    if not choices or len(choices) != len(likelihoods) or row["answers"][0] not in choices:
        return {}
    sums = [_number(pair[0]) for pair in likelihoods]
    if not all(math.isfinite(value) for value in sums):
        return {}
    each = [value / max(1, pair[1]) for value, pair in zip(sums, likelihoods, strict=True)]
    right = choices.index(row["answers"][0])
    return {
        "accuracy": float(sums.index(min(sums)) == right),
        "accuracy_normalized": float(each.index(min(each)) == right),
    }


def _score_row(row: Row, benchmark: Benchmark) -> dict[str, float]:
    values = {name: _number(value) for name, value in benchmark.score(question_of(row), row["answer"]).items()}
    values |= choice_scores(row) | {"answer_nll": _number(row.get("answer_nll"))}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _metric_names(benchmark: Benchmark, rows: Iterable[Row], encoded: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    by_choice = ("accuracy", "accuracy_normalized") if any(row.get("choice_nlls") for row in rows) else ()
    by_encoder = encoded[0] if encoded else ("bert_f1",) if benchmark.bert_score else ()
    return tuple(dict.fromkeys((*by_choice, *benchmark.metrics, *by_encoder, "answer_nll", "judge")))


# --- the table --------------------------------------------------------------------------------------------------------


def tabulate(
    benchmark: Benchmark, rows: Sequence[Row], found: Mapping[str, Mapping[str, float]], metrics: tuple[str, ...]
) -> Table:
    """found: scores by the rows' ids."""
    about = {(row["document_id"], row["question_id"]): row for row in rows}
    place = {key: index for index, key in enumerate(sorted(about))}
    methods = sorted({row["method"] for row in rows}, key=rank)
    table = Table(
        metrics,
        tuple(place),
        tuple(about[key]["kind"] for key in place),
        tuple(about[key]["document_tokens"] for key in place),
        np.array(
            [[benchmark.weight(question_of(about[key]), metric) for metric in metrics] for key in place], dtype=float
        ),
        {method: np.full((len(place), len(metrics)), np.nan) for method in methods},
        {method: np.zeros(len(place), dtype=bool) for method in methods},
        {method: np.zeros(len(place), dtype=bool) for method in methods},
    )
    for row in rows:
        index = place[row["document_id"], row["question_id"]]
        (table.failed if row["error"] else table.scored)[row["method"]][index] = True
        scores = found.get(row["id"], {})
        table.values[row["method"]][index] = [scores.get(metric, np.nan) for metric in metrics]
    return table


def rank(method: str) -> tuple[int, str]:
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


def _score_method(table: Table, method: str, chosen: Mask) -> dict[str, Any]:
    """The entry of scores.json, from the chosen questions."""
    scored = chosen & table.scored[method]
    means, samples = weighted_means(table.values[method][scored], table.weights[scored])
    entry: dict[str, Any] = {}
    for index, metric in enumerate(table.metrics):
        entry |= _entry(metric, float(means[index]), samples[:, index])
    entry |= _entry("evidence_gap_closed", *_gap_closed(table, method, chosen))
    if method.startswith("lift") and not method.startswith(CONTROL):
        entry |= _entry("reading_kept", *_reading_kept(table, chosen))
    return entry | {"n": int(scored.sum()), "failed": int((chosen & table.failed[method]).sum())}


def _entry(name: str, value: float, samples: Floats) -> dict[str, Any]:
    known = math.isfinite(value)
    return {name: round_off(value) if known else None, f"{name}_interval": interval_of(samples) if known else None}


def _gap_closed(table: Table, method: str, chosen: Mask) -> tuple[float, Floats]:
    """(closed-book − method) / (closed-book − oracle) in nats a token."""

    def formula(means: Floats) -> Floats:
        return divide(means[:, 0] - means[:, 1], means[:, 0] - means[:, 2])

    columns = [table.column(name, "answer_nll") for name in ("closed-book", method, "oracle")]
    return _of_means(columns, chosen, formula)


def _reading_kept(table: Table, chosen: Mask) -> tuple[float, Floats]:
    """Token F1 with the evidence in the window: with the adapter / without."""

    def formula(means: Floats) -> Floats:
        return divide(means[:, 0], means[:, 1])

    return _of_means([table.column(name, "token_f1") for name in ("lift+oracle", "oracle")], chosen, formula)


def _of_means(columns: list[Floats], chosen: Mask, formula: Callable[[Floats], Floats]) -> tuple[float, Floats]:
    """A formula of means over the questions that all columns have, and of the same in each resample of these questions."""
    common = np.stack(columns, axis=1)
    common = common[chosen & np.isfinite(common).all(axis=1)]
    if not len(common):
        return math.nan, np.empty(0)
    values = formula(np.concatenate([common.mean(axis=0, keepdims=True), resampled_means(common)]))
    return float(values[0]), values[1:]


def _costs(rows: Iterable[Row], table: Table, method: str) -> dict[str, Any]:
    """What is not a score: how many values each mean is of, and what answering took."""
    own = [row for row in rows if row["method"] == method and not row["error"]]
    counts = np.isfinite(table.values[method]).sum(axis=0)
    result: dict[str, Any] = {
        "counts": {metric: int(count) for metric, count in zip(table.metrics, counts, strict=True)},
        "failed": int(table.failed[method].sum()),
    }
    for name in ("seconds", "prompt_tokens", "context_tokens", "answer_tokens"):
        values = np.array([_number(row.get(name)) for row in own])
        mean = mean_of(values)
        result[name] = round_off(mean) if math.isfinite(mean) else None
    memory = [row["peak_memory_bytes"] for row in own if row.get("peak_memory_bytes")]
    return result | {"peak_memory_bytes": max(memory, default=None)}


def _unavailable(table: Table) -> dict[str, str]:
    """Metrics of the benchmark that are not there, and why."""
    reasons = {"meteor": "no WordNet here", "bert_f1": "not computed (--bert-score)"}
    there = {name for name in reasons for method in table.values if np.isfinite(table.column(method, name)).any()}
    answered = any(mask.any() for mask in table.scored.values())
    return {name: why for name, why in reasons.items() if name in table.metrics and answered and name not in there}


# --- groups -----------------------------------------------------------------------------------------------------------


def _by_group(table: Table, names: Sequence[str]) -> dict[str, Any]:
    """The same scores for each group of questions; of the differences those that claims depend on."""
    result = {}
    for name in dict.fromkeys(names):
        chosen = np.array([other == name for other in names])
        result[name] = {
            "questions": int(chosen.sum()),
            "methods": {method: _score_method(table, method, chosen) for method in table.values},
            "paired": [entry for pair in COMPARED for entry in compare(table, *pair, chosen)],
        }
    return result


def _by_kind(table: Table) -> dict[str, Any]:
    if not any(table.kinds):
        return {}
    return dict(sorted(_by_group(table, [kind or "other" for kind in table.kinds]).items()))


def _by_length(table: Table) -> dict[str, Any]:
    bounds = [next((bound for bound in _LENGTHS if tokens <= bound), None) for tokens in table.tokens]
    names = {bound: f"up to {bound:,} tokens" for bound in _LENGTHS} | {None: f"over {_LENGTHS[-1]:,} tokens"}
    groups = _by_group(table, [names[bound] for bound in bounds])
    return {name: groups[name] for name in names.values() if name in groups}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
