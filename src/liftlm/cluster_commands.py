"""What `--ray` means for commands: documents absorbed into one home, evaluations and studies, by a cluster's workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liftlm.display import CrewDisplay, note
from liftlm.errors import ConfigError, DocumentsFailedError, InterruptedWorkError

if TYPE_CHECKING:
    from collections.abc import Callable

    from liftlm.cluster import RayCrew
    from liftlm.config import LiftConfig
    from liftlm.evaluation.sharing import EvaluationOrder
    from liftlm.studies.sharing import StudyOrder
    from liftlm.worklist import CrewOfOne, Job, Outcome, Worker


def is_folder(name: str) -> bool:
    """A folder of this machine, or an address that fsspec opens (but no web address: those are documents to download)."""
    try:
        local = name != "-" and Path(name).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):  # a name that is no path
        local = False
    return local or ("://" in name and not name.lower().startswith(("http://", "https://", "ftp://", "file://")))


def absorb_many(folder: str, config: LiftConfig, address: str | None, library: str | None) -> None:
    """Absorbs what is missing and prints `id  title` of each; raises DocumentsFailedError where some could not be."""
    from liftlm.homes import Home
    from liftlm.many_documents import AbsorbingWorker, Order, absorb_folder
    from liftlm.shelf import library_home

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "A folder is absorbed by single processes, and a launcher started several.", "Use --ray, or one document."
        )
    home = Home(library or str(library_home()))
    order = Order(config, home.url, threads=config.cluster.cpus_per_worker if address else None)

    answers = sys.stdout  # a cluster's own messages go elsewhere

    def ended(job: Job, outcome: Outcome) -> None:
        if outcome.error:
            note(f"{job.name} failed: {outcome.error} {outcome.next_step}")
        else:
            print(f"{outcome.result['id']}  {outcome.result['title']}", file=answers, flush=True)

    with CrewDisplay() as display, hired(address, config, AbsorbingWorker, order, display) as crew:
        recipe = crew.describe()
        tally, before = absorb_folder(
            str(Path(folder).expanduser().absolute()) if "://" not in folder else folder,
            *(home, crew, recipe, config.cluster.tries, ended, display.event),
        )
    lost = f" {tally.deaths} workers were lost." if tally.deaths else ""
    note(f"{tally.done} absorbed, {before} were already, {tally.failed} failed. They are in {home.url}.{lost}")
    if tally.failed:
        raise DocumentsFailedError(
            f"{tally.failed} documents could not be absorbed: {'; '.join(tally.failures)}",
            "Mend them; the same command tries only what is missing.",
        )


def evaluate_shared(
    address: str,
    library: str | None,
    order: EvaluationOrder,
    folder: Path,
    on_row: Callable[[dict[str, Any]], None],
) -> None:
    """Has an evaluation's missing rows predicted by a cluster; on_row hears of predictions."""
    from liftlm.evaluation.sharing import EvaluatingWorker, EvaluationOrder, evaluation_jobs
    from liftlm.shelf import library_home

    assert isinstance(order, EvaluationOrder)
    order = replace(order, home=library or str(library_home()), threads=order.config.cluster.cpus_per_worker)
    _share(address, order.config, EvaluatingWorker, order, evaluation_jobs(order, folder), folder, on_row)


def study_shared(address: str, order: StudyOrder, folder: Path) -> None:
    """Has a study's missing rows measured by a cluster."""
    from liftlm.studies.sharing import StudyingWorker, study_jobs

    _share(address, order.config, StudyingWorker, order, study_jobs(order, folder), folder, lambda row: None)


def _share(
    address: str,
    config: LiftConfig,
    make_worker: Callable[[Any], Worker],
    order: Any,
    jobs: Iterator[Job],
    folder: Path,
    on_row: Callable[[dict[str, Any]], None],
) -> None:
    """Outcomes are lines for the folder's files. Raises DocumentsFailedError where some could not be had."""
    from liftlm.evaluation.sharing import add_lines
    from liftlm.worklist import work_off

    def ended(job: Job, outcome: Outcome) -> None:
        if outcome.error:
            note(f"{job.name} failed: {outcome.error} {outcome.next_step}")
        elif "id" not in outcome.result:  # else a document was absorbed
            for path, row in add_lines(folder, outcome.result):
                if path.startswith("predictions"):
                    on_row(row)

    with CrewDisplay() as display, hired(address, config, make_worker, order, display) as crew:
        crew.describe()
        tally = work_off(crew, jobs, config.cluster.tries, ended, display.event)
    if tally.failed:
        raise DocumentsFailedError(
            f"{tally.failed} parts of the work failed: {'; '.join(tally.failures)}",
            "What is done is kept; the same command tries only what is missing.",
        )


@contextmanager
def hired(
    address: str | None, config: LiftConfig, make_worker: Callable[[Any], Worker], order: Any, display: CrewDisplay
) -> Iterator[RayCrew | CrewOfOne]:
    """Workers of a cluster, or this process. Ctrl-C lets them go; their checkpoints stay."""
    try:
        if address is None:
            from liftlm.worklist import CrewOfOne

            yield CrewOfOne(make_worker(order), display.tell)
            return
        check_ray()
        from liftlm.cluster import RayCrew

        with RayCrew(address, config.cluster, make_worker, order, display.tell) as crew:
            yield crew
    except KeyboardInterrupt:
        raise InterruptedWorkError("Interrupted; what is done is kept.", "The same command continues.") from None


def check_ray() -> None:
    """Raises ConfigError."""
    if find_spec("ray") is None:
        raise ConfigError("--ray needs Ray, which is not installed.", "pip install 'liftlm[cluster]'")
