"""All benchmarks by name."""

from __future__ import annotations

import difflib
import functools
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


def make_benchmark(name: str, **options: Any) -> Benchmark:
    """options: of the class, such as a needle's depths. Raises ConfigError for an unknown name, or options it has not."""
    known = benchmark_classes()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.4)
        raise ConfigError(f"There is no benchmark '{name}'.", f"Choose {' or '.join(near or sorted(known))}.")
    if options and known[name] is not Needles:
        raise ConfigError(f"{name} has no {next(iter(options))}.", "Only the benchmark needle has.")
    return known[name](**options)
