"""Metrics and numbers as readers see them: names, percent or nats, intervals. Knows nothing of where they are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NONE = "–"
_LABELS = {
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "bleu_1": "BLEU-1",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "bert_f1": "BERTScore F1",
    "bert_precision": "BERTScore precision",
    "bert_recall": "BERTScore recall",
    "answer_nll": "answer NLL",
    "evidence_gap_closed": "evidence gap closed",
    "longbench_score": "LongBench score",
    "accuracy_normalized": "accuracy, length-normalised",
    "accuracy_generated": "accuracy, generated",
}


def label(metric: str) -> str:
    """A metric's name, with an arrow where lower is better."""
    return _LABELS.get(metric, metric.replace("_", " ")) + (" ↓" if is_raw(metric) else "")


def is_raw(metric: str) -> bool:
    """Nats and deviations, which have no upper end and are best at 0; all others are shares, shown in percent."""
    return metric == "answer_nll" or metric.endswith("_deviation")


def in_units(metric: str, value: float) -> float:
    """Nats as they are, shares in percent."""
    return value if is_raw(metric) else 100 * value


def format_value(metric: str, value: float | None, *, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    shown = f"{in_units(metric, value):+.{2 if is_raw(metric) else 1}f}"
    zero = not float(shown)
    return shown.lstrip("+-") if zero else shown if sign else shown.lstrip("+")


def format_score(metric: str, entry: Mapping[str, Any]) -> str:
    """Mean with interval: 26.1 [20.3, 31.5]."""
    interval = entry.get(f"{metric}_interval")
    shown = format_value(metric, entry.get(metric))
    return shown if interval is None else f"{shown} [{', '.join(format_value(metric, end) for end in interval)}]"


def format_number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return NONE if value is None else f"{value / scale:,.{digits}f}"
