"""Pictures of an evaluation's scores as PNG files: by method, by kind of question, by length, and the needles' heat maps.

Takes scores.json and details.json as they are; matplotlib is loaded only here, when something is drawn.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liftlm.evaluation.figures import in_units, label
from liftlm.evaluation.scoring import CONTROL, Row, rank
from liftlm.storage import write_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Methods = Mapping[str, Mapping[str, Any]]
_DPI = 110
_PANELS = 3  # side by side
_COLOURS = {  # a control has its method's, paler
    "closed-book": "#8c8c8c",
    "icl": "#e69f00",
    "icl-full": "#b8860b",
    "rag": "#56b4e9",
    "rag-sentences": "#2a7fb8",
    "lift": "#d55e00",
    "lift+icl": "#cc79a7",
    "lift+rag": "#0072b2",
    "lift+rag-sentences": "#00428a",
    "oracle": "#009e73",
    "lift+oracle": "#000000",
}
_PALER = "66"  # opacity


def draw_plots(
    folder: Path, scores: Methods, details: Mapping[str, Any], rows: Iterable[Row], metrics: Sequence[str]
) -> dict[str, str]:
    """Writes what can be drawn into folder/plots: file name → caption. metrics: the most telling first."""
    there = [metric for metric in metrics if any(entry.get(metric) is not None for entry in scores.values())]
    drawn: dict[str, str] = {}
    if there:
        _save(_by_method(scores, there), folder, "methods.png")
        drawn["methods.png"] = "Every method's means, with 95 % intervals"
        if len(details["kinds"]) > 1:
            _save(_by_kind(details["kinds"], there[0]), folder, "kinds.png")
            drawn["kinds.png"] = f"{label(there[0])} by kind of question, with 95 % intervals"
        if len(details["lengths"]) > 1:
            _save(_by_length(details["lengths"], there), folder, "lengths.png")
            drawn["lengths.png"] = "By length of the document, with 95 % intervals"
    metric = needle_metric(details["metrics"])
    cells = _cells(rows, details["rows"], metric)
    if cells:
        _save(_heat_maps(cells, metric), folder, "needles.png")
        drawn["needles.png"] = "Needles found, by length of the text and depth of the needle"
    return drawn


def needle_metric(metrics: Sequence[str]) -> str:
    """What says whether a needle was found: a recall, where there is one."""
    return next((metric for metric in metrics if "recall" in metric), metrics[0])


# --- means ------------------------------------------------------------------------------------------------------------


def _by_method(scores: Methods, metrics: Sequence[str]) -> Figure:
    figure, panels = _figure(len(metrics), (4.0, 0.8 + 0.3 * len(scores)))
    for metric, axes in zip(metrics, panels, strict=True):
        for place, (method, entry) in enumerate(scores.items()):
            _bar(axes, entry, metric, place, 0.7, _colour(method))
        axes.set_yticks(range(len(scores)), [_plain(method) for method in scores])
        axes.invert_yaxis()
        axes.set_title(_plain(label(metric)), fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    return figure


def _by_kind(groups: Mapping[str, Any], metric: str) -> Figure:
    methods = _methods_of(groups)
    figure, (axes,) = _figure(1, (8.0, 1.2 + 0.18 * len(groups) * (len(methods) + 1)))
    height = 0.85 / max(1, len(methods))
    for number, method in enumerate(methods):
        for place, group in enumerate(groups.values()):
            at = place - 0.425 + height * (number + 0.5)
            _bar(axes, group["methods"].get(method, {}), metric, at, height, _colour(method))
    names = [f"{_plain(name)}\n({group['questions']})" for name, group in groups.items()]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(_plain(label(metric)))
    axes.grid(axis="x", alpha=0.3)
    _legend(figure, methods)
    return figure


def _by_length(groups: Mapping[str, Any], metrics: Sequence[str]) -> Figure:
    methods = _methods_of(groups)
    figure, panels = _figure(len(metrics), (4.0, 3.6))
    for metric, axes in zip(metrics, panels, strict=True):
        for number, method in enumerate(methods):
            shift = 0.05 * (number - (len(methods) - 1) / 2)  # or intervals would lie on each other
            entries = [group["methods"].get(method, {}) for group in groups.values()]
            points = [(place, entry) for place, entry in enumerate(entries) if entry.get(metric) is not None]
            places, values = (
                [place + shift for place, _ in points],
                [in_units(metric, entry[metric]) for _, entry in points],
            )
            errors = [_error(entry, metric) for _, entry in points]
            lows, highs = [low for low, _ in errors], [high for _, high in errors]
            axes.errorbar(places, values, [lows, highs], fmt="o-", capsize=2, markersize=4, color=_colour(method))
        names = [f"{_short(name)}\n({group['questions']})" for name, group in groups.items()]
        axes.set_xticks(range(len(names)), names, fontsize=7)
        axes.set_title(_plain(label(metric)), fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    _legend(figure, methods)
    return figure


def _short(length: str) -> str:
    """up to 1,500 tokens → ≤ 1.5k."""
    sign = "≤" if length.startswith("up to") else ">"
    return f"{sign} {_thousands(int(''.join(filter(str.isdecimal, length))))}"


def _bar(axes: Axes, entry: Mapping[str, Any], metric: str, place: float, height: float, colour: str) -> None:
    value = entry.get(metric)
    if value is not None:
        low, high = _error(entry, metric)
        axes.barh(
            place,
            in_units(metric, value),
            height,
            color=colour,
            xerr=[[low], [high]],
            error_kw={"elinewidth": 1, "capsize": 2},
        )


def _error(entry: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """How far the interval reaches below and above the mean."""
    interval, value = entry.get(f"{metric}_interval"), entry[metric]
    if not interval:
        return 0.0, 0.0
    return in_units(metric, max(0.0, value - interval[0])), in_units(metric, max(0.0, interval[1] - value))


# --- needles ----------------------------------------------------------------------------------------------------------

Cells = dict[str, dict[tuple[float, float], list[float]]]  # method → (length, depth) → scores


def _cells(rows: Iterable[Row], scores: Mapping[str, Mapping[str, float]], metric: str) -> Cells:
    cells: Cells = defaultdict(lambda: defaultdict(list))
    for row in rows:
        data = row.get("data") or {}
        length, depth = data.get("length"), data.get("depth")
        value = scores.get(row["id"], {}).get(metric)
        if value is not None and isinstance(length, int | float) and isinstance(depth, int | float):
            cells[row["method"]][length, depth].append(value)
    return cells


def _heat_maps(cells: Cells, metric: str) -> Figure:
    lengths = sorted({length for found in cells.values() for length, _ in found})
    depths = sorted({depth for found in cells.values() for _, depth in found})
    methods = sorted(cells, key=rank)
    figure, panels = _figure(len(methods), (1.6 + 0.5 * len(lengths), 1.2 + 0.35 * len(depths)))
    image = None
    for method, axes in zip(methods, panels, strict=True):
        found = cells[method]
        means = [
            [100 * _mean(found[length, depth]) if (length, depth) in found else math.nan for length in lengths]
            for depth in depths
        ]
        axes.set_facecolor("#dddddd")  # of what was not asked
        image = axes.imshow(means, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        for y, line in enumerate(means):
            for x, value in enumerate(line):
                if math.isfinite(value):
                    colour = "black" if 15 < value < 85 else "white"
                    axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(lengths)), [_thousands(length) for length in lengths], fontsize=7)
        share = 100 if max(depths) <= 1 else 1
        axes.set_yticks(range(len(depths)), [f"{share * depth:.0f} %" for depth in depths], fontsize=7)
        axes.set_xlabel("tokens", fontsize=8)
        axes.set_ylabel("depth", fontsize=8)
        axes.set_title(_plain(method), fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=panels, label=_plain(label(metric)))
    return figure


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _thousands(tokens: float) -> str:
    return f"{tokens / 1000:.3g}k" if tokens >= 1000 else f"{tokens:g}"


# --- figures ----------------------------------------------------------------------------------------------------------


def _figure(panels: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels of one size (inches)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(panels, _PANELS)
    down = -(-panels // across)
    figure = Figure(figsize=(size[0] * across, size[1] * down), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(down, across, number + 1) for number in range(panels)]
    return figure, axes


def _legend(figure: Figure, methods: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=_colour(method), label=_plain(method)) for method in methods]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8)


def _save(figure: Figure, folder: Path, name: str) -> None:
    with write_errors(folder / "plots" / name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "plots" / name, format="png", metadata={"Software": None})


def _methods_of(groups: Mapping[str, Any]) -> list[str]:
    return sorted({method for group in groups.values() for method in group["methods"]}, key=rank)


def _colour(method: str) -> str:
    if method.startswith(CONTROL):
        return _COLOURS.get(method.replace(CONTROL, "lift", 1), "#666666") + _PALER
    return _COLOURS.get(method, "#666666")


def _plain(text: str) -> str:
    """matplotlib takes what stands between two dollars for mathematics."""
    return text.replace("$", r"\$")
