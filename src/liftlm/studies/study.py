"""What a study is: a claim, arms to compare, and a conclusion drawn from rows. Knows no model.

An arm is a named set of overrides of the settings, so a new way of absorbing needs no new code here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from liftlm.config import LiftConfig
from liftlm.evaluation.benchmark import Item
from liftlm.evaluation.blocks import Block
from liftlm.studies.intervals import Verdict
from liftlm.tasks import Task

if TYPE_CHECKING:
    from liftlm.studies.bench import Bench

Row = dict[str, Any]
QUICK_SETTINGS: Mapping[str, Any] = {
    "segments.segment_tokens": 128,
    "tasks.per_sentence": 1,
    "training.epochs": 1,
    "training.batch_tokens": 1024,
    "adapter.rank": 4,
    "adapter.alpha": 8.0,
    "answering.max_new_tokens": 16,
}


@dataclass(frozen=True)
class Arm:
    """One thing that is compared: settings (dotted keys) over the study's own, and how it is asked."""

    name: str
    methods: tuple[str, ...]  # of `lift evaluate`
    settings: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)  # what tables and plots sort by; goes into every row
    tasks: tuple[Task, ...] | None = None  # given ones, instead of written ones
    once: bool = False  # nothing in it depends on the seed: it runs for the first seed only


@dataclass(frozen=True)
class Options:
    """How much of a study is run, and on what."""

    sources: tuple[tuple[str, str], ...] = ()  # (domain or "", PATH[:N[-M]]); none: the demonstration's chronicle
    seeds: tuple[int, ...] = (0,)
    quick: bool = False
    documents: int | None = None  # at most so many of each source
    questions: int | None = None  # at most so many of each document, drawn
    characters: int | None = None  # of each document, from its beginning
    jobs: int = 1
    keep: bool = False  # adapters, after they were asked
    arms: Path | None = None  # YAML, name → settings; only `adapters` and `recipes` take it
    lengths: tuple[int, ...] = ()  # tokens; only `efficiency` takes them
    graded: Path | None = None  # the sheet that a person filled in; only `tasks` takes it
    writers: tuple[str, ...] = ()  # beside the extractive; none: that of tasks.writer; only `tasks` takes them


@dataclass(frozen=True)
class Drawing:
    """A plot to be drawn into plots/NAME.png: bars or lines with intervals."""

    name: str
    caption: str
    draw: Any  # (matplotlib Axes) -> None


@dataclass(frozen=True)
class Conclusion:
    """What a study found. figures: rows of figures.csv, each with its interval, n and seeds."""

    verdict: Verdict
    figures: Sequence[Row]
    blocks: Sequence[Block]
    drawings: Sequence[Drawing] = ()


class Study:
    """Base of all studies. A study gives its arms (or measures for itself) and concludes."""

    name: ClassVar[str]  # as on the command line
    title: ClassVar[str]
    claim: ClassVar[str]  # the paper's, in one sentence
    source: ClassVar[str]  # where the claim stands
    defaults: ClassVar[Mapping[str, Any]] = {}  # settings of this study, below the user's
    quick: ClassVar[Mapping[str, Any]] = {}  # settings of --quick, above the user's
    needs_questions: ClassVar[bool] = True  # documents without any are left out
    alone: ClassVar[bool] = False  # it measures time or memory: never documents in parallel

    def check(self, item: Item, config: LiftConfig) -> None:
        """Raises ConfigError where a document must not be studied. It is whole: `prepare` gets it cut."""

    def prepare(self, item: Item, config: LiftConfig, options: Options) -> Item:
        """The document with the questions that this study asks; default: those that it has."""
        return item

    def named_arms(self, options: Options) -> dict[str, dict[str, Any]]:
        """Of studies whose arms are read from a file: name → settings, as JSON. Rows go by the name."""
        return {}

    def arms(self, bench: Bench, item: Item, seed: int) -> Iterator[Arm]:
        """Made one after the other: a later one may depend on what an earlier one took."""
        raise NotImplementedError

    def measure(self, bench: Bench, index: int, seed: int) -> None:
        """All rows of one document and seed that are not there yet."""
        for arm in self.arms(bench, bench.items[index], seed):
            bench.ask(arm, seed, index)

    def conclude(self, rows: Sequence[Row], options: Options, folder: Path) -> Conclusion:
        raise NotImplementedError
