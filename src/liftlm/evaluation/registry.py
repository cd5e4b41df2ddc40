"""All benchmarks by name."""

from __future__ import annotations

import difflib
import functools
import inspect
from typing import Any

from liftlm.errors import ConfigError
from liftlm.evaluation.benchmark import Benchmark
from liftlm.evaluation.longbench import longbench_tasks
from liftlm.evaluation.loogle import Cloze, LongQA, ShortQA, Summarization
from liftlm.evaluation.multiple_choice import LongHealth, QuALITY
from liftlm.evaluation.needles import Needles
from liftlm.evaluation.own_questions import OwnQuestions


@functools.cache
def benchmark_classes() -> dict[str, type[Benchmark]]:
    """Name on the command line → class."""
    fixed: list[type[Benchmark]] = [ShortQA, LongQA, Cloze, Summarization, QuALITY, LongHealth, Needles, OwnQuestions]
    return {kind.name: kind for kind in [*fixed, *longbench_tasks().values()]}


def benchmark_names() -> list[str]:
    """As on the command line."""
    return sorted(benchmark_classes())


def make_benchmark(name: str, **options: Any) -> Benchmark:
    """options: of the class, such as a needle's depths. Raises ConfigError for an unknown name or option."""
    known = benchmark_classes()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.4)
        raise ConfigError(f"There is no benchmark '{name}'.", f"Choose {' or '.join(near or sorted(known))}.")
    unknown = [option for option in options if option not in inspect.signature(known[name]).parameters]
    if unknown:
        having = [other for other, kind in known.items() if unknown[0] in inspect.signature(kind).parameters]
        raise ConfigError(f"{name} has no {unknown[0]}.", f"Only {' and '.join(having)} has." if having else "")
    return known[name](**options)
