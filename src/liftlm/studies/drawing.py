"""Plots of studies: means with intervals as bars or as lines over a number. matplotlib is loaded only here, when it is needed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from liftlm.storage import write_errors
from liftlm.studies.intervals import Figure
from liftlm.studies.study import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 110
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8c8c")
_DASHES = ((2, 1.5), (6, 2.5))  # of the fits of one series, in turn: lengths of strokes and of gaps
_STEPS = 100  # points of a fit that is drawn


@dataclass(frozen=True)
class Fit:
    """A formula that was fitted to the points of a series; drawn dashed in its colour, as far as the points reach."""

    name: str
    series: str
    value: Callable[[float], float]


def draw(folder: Path, drawing: Drawing) -> Path:
    """Writes plots/NAME.png. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7.5, 4.2), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(canvas)
    drawing.draw(canvas.add_subplot())
    path = folder / "plots" / f"{drawing.name}.png"
    with write_errors(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, format="png", metadata={"Software": None})
    return path


def bars(series: Mapping[str, Mapping[str, Figure]], title: str) -> Callable[[Axes], None]:
    """series: what a colour stands for → label of a bar → its figure. Horizontal bars, grouped by label."""

    def paint(axes: Axes) -> None:
        labels = list(dict.fromkeys(name for found in series.values() for name in found))
        height = 0.8 / max(1, len(series))
        for number, (name, found) in enumerate(series.items()):
            places = [labels.index(key) - 0.4 + height * (number + 0.5) for key in found]
            means = [each.mean for each in found.values()]
            errors = [_error(each) for each in found.values()]
            axes.barh(
                places,
                means,
                height,
                label=_plain(name),
                color=_COLOURS[number % len(_COLOURS)],
                xerr=[[low for low, _ in errors], [high for _, high in errors]],
                error_kw={"elinewidth": 1, "capsize": 2},
            )
        axes.set_yticks(range(len(labels)), [_plain(label) for label in labels], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_xlabel(_plain(title))
        axes.grid(axis="x", alpha=0.3)
        if len(series) > 1:
            axes.legend(fontsize=8)

    return paint


def lines(
    series: Mapping[str, Sequence[tuple[float, Figure]]],
    x: str,
    y: str,
    *,
    log: bool = False,
    fits: Sequence[Fit] = (),
) -> Callable[[Axes], None]:
    """series: name → (x, figure) points with intervals, joined where there are no fits. log: both axes."""

    def paint(axes: Axes) -> None:
        for number, (name, points) in enumerate(series.items()):
            known = [(at, each) for at, each in points if each.units]
            errors = [_error(each) for _, each in known]
            fitted = [fit for fit in fits if fit.series == name and known]
            axes.errorbar(
                [at for at, _ in known],
                [each.mean for _, each in known],
                [[low for low, _ in errors], [high for _, high in errors]],
                fmt="o" if fitted else "o-",  # a line through the points would hide a good fit
                capsize=2,
                markersize=4,
                color=_COLOURS[number % len(_COLOURS)],
                label=_plain(name),
            )
            for turn, fit in enumerate(fitted):
                places = _between(min(at for at, _ in known), max(at for at, _ in known), log)
                values = [fit.value(at) for at in places]
                axes.plot(
                    places,
                    [math.nan if log and value <= 0 else value for value in values],  # no place on such an axis
                    linestyle=(0, _DASHES[turn % len(_DASHES)]),
                    linewidth=1.2,
                    color=_COLOURS[number % len(_COLOURS)],
                    label=_plain(fit.name),
                )
        if log:
            axes.set_xscale("log")
            axes.set_yscale("log")
        axes.set_xlabel(_plain(x))
        axes.set_ylabel(_plain(y))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)

    return paint


def _between(first: float, last: float, log: bool) -> list[float]:
    """Places from the first to the last, evenly as the axis shows them."""
    shares = [step / _STEPS for step in range(_STEPS + 1)]
    if log:
        return [first * (last / first) ** share for share in shares]
    return [first + (last - first) * share for share in shares]


def _error(figure: Figure) -> tuple[float, float]:
    """How far the interval reaches below and above the mean."""
    if figure.low is None or figure.high is None:
        return 0.0, 0.0
    return max(0.0, figure.mean - figure.low), max(0.0, figure.high - figure.mean)


def _plain(text: str) -> str:
    """matplotlib takes what stands between two dollars for mathematics."""
    return text.replace("$", r"\$")
