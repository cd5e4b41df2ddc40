"""Runs a study: documents in, a folder out. The same command again continues; with all rows there it only concludes anew.

With several jobs the documents are shared out over processes, each with a model of its own. Knows no single study.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from liftlm.config import LiftConfig
from liftlm.demo import load_demo
from liftlm.devices import describe_machine
from liftlm.display import TrainingDisplay, console, note
from liftlm.errors import BenchmarkDataError, ConfigError
from liftlm.evaluation.benchmark import Item, Question
from liftlm.evaluation.corpora import cut_item, numbered, parse_source, read_items
from liftlm.evaluation.scoring import read_rows
from liftlm.models import Model, load_model
from liftlm.storage import canonical_json, write_errors, write_file
from liftlm.studies.bench import Bench, in_domain, with_settings
from liftlm.studies.questions import code_questions
from liftlm.studies.registry import make_study
from liftlm.studies.report import write_report
from liftlm.studies.sharing import StudyOrder
from liftlm.studies.study import Conclusion, Options, Row, Study

CARD = "study.json"
_CORES_A_JOB = 4  # fewer make a job slower than it gains


@dataclass(frozen=True)
class Run:
    """What a study's folder is about."""

    study: Study
    config: LiftConfig
    options: Options
    folder: Path
    command: str


Share = Callable[[StudyOrder, Path], None]


def run_study(
    study: Study,
    folder: Path,
    config: LiftConfig,
    options: Options,
    command: str = "",
    model: Model | None = None,
    share: Share | None = None,
) -> Conclusion:
    """Measures what is missing and writes the report; returns what it says. model: one that is loaded already.

    share: has the order done by others, who add their rows to the folder; instead of processes of this machine.

    Raises ConfigError (another study's folder), BenchmarkDataError (bad data), and what absorbing raises.
    """
    if options.quick:
        config = with_settings(config, study.quick)
    run = Run(study, config, options, folder, command)
    items = load_items(study, config, options)
    _check_folder(run)
    jobs = 1 if study.alone else min(options.jobs or _spare_jobs(), len(items))
    loaded = model or _load(study, config)
    setup = _setup(run, loaded)
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / CARD, json.dumps(_card(run, loaded, items, setup), indent=1, ensure_ascii=False) + "\n")
    if share is not None and not study.alone:
        window = config.model.model_copy(update={"window": loaded.window})
        threads = config.cluster.cpus_per_worker
        shared = config.model_copy(update={"model": window})
        share(StudyOrder(study.name, shared, options, tuple(items), setup, threads), folder)
    elif jobs > 1:
        _in_parallel(run, jobs, setup)
    else:
        _measure(run, loaded, items, setup, (0, 1))
    rows = read_current(folder, setup, items, options.seeds)
    conclusion = study.conclude(rows, options, folder)
    write_report(folder, study, conclusion, json.loads((folder / CARD).read_text(encoding="utf-8")))
    return conclusion


def _load(study: Study, config: LiftConfig, threads: int | None = None) -> Model:
    """The model; the study's own default window is made smaller where the model's limit is."""
    settings = config.model.model_copy(update={"threads": config.model.threads or threads})
    try:
        return load_model(config.model.name, settings, notify=note)
    except ConfigError:
        if config.model.window is None or config.model.window != study.defaults.get("model.window"):
            raise
        return load_model(config.model.name, settings.model_copy(update={"window": None}), notify=note)


def load_items(study: Study, config: LiftConfig, options: Options) -> list[Item]:
    """The documents with the questions of this study. Raises BenchmarkDataError where there is none, and what it refuses."""
    found: list[Item] = []
    if not options.sources:
        found.append(_demo_item())
    for domain, text in options.sources:
        items = itertools.islice(read_items(parse_source(text)), options.documents)
        found += [in_domain(_with_facts_of_code(item), domain) for item in items]
    unique: dict[str, Item] = {}
    for item in found:  # a text given twice is one document, with the questions of both
        known = unique.get(item.document.id)
        unique[item.document.id] = (
            item if known is None else numbered(Item(known.document, known.questions + item.questions))
        )
    chosen = []
    for item in unique.values():
        study.check(item, config)
        cut = cut_item(item, _characters(options))
        prepared = study.prepare(cut, config, options)
        chosen.append(dataclasses.replace(prepared, questions=_drawn(prepared.questions, options, config.seed)))
    chosen = [item for item in chosen if item.questions or not study.needs_questions]
    if not chosen:
        raise BenchmarkDataError(
            "No document has questions that this study could ask.",
            "Give data with questions, more --characters, or other documents.",
        )
    return chosen


def read_current(folder: Path, setup: str, items: Sequence[Item], seeds: Sequence[int]) -> list[Row]:
    """The rows of this setup, these documents and seeds; of several with one id the last."""
    documents = {item.document.id for item in items}
    rows = {row["id"]: row for row in read_rows(folder, "rows")[0] if row.get("setup") == setup}
    return [
        row
        for row in rows.values()
        if row.get("document_id", None) in {None, *documents} and row.get("seed") in {None, *seeds}
    ]


def _demo_item() -> Item:
    document, rows = load_demo()
    questions = tuple(
        Question(row["id"], row["question"], (row["answer"],), tuple(row["evidence"]), row["kind"]) for row in rows
    )
    return in_domain(Item(document, questions), "narrative")


def _with_facts_of_code(item: Item) -> Item:
    """Python source that came without questions gets those that its syntax tree answers; before it is cut, or it has none."""
    if item.questions or not item.document.source.endswith(".py"):
        return item
    return dataclasses.replace(item, questions=tuple(code_questions(item.document)))


def _characters(options: Options) -> int | None:
    return min(options.characters or 3000, 3000) if options.quick else options.characters


def _drawn(questions: Sequence[Question], options: Options, seed: int) -> tuple[Question, ...]:
    """At most so many in all, of each kind (or class, where the study tells classes) as many, in their order."""
    most = min(options.questions or 6, 6) if options.quick else options.questions
    if most is None or len(questions) <= most:
        return tuple(questions)
    kinds: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        kinds.setdefault(str(question.data.get("class", question.kind)), []).append(index)
    draw, kept = random.Random(seed), set[int]()
    queues = [draw.sample(found, len(found)) for found in kinds.values()]
    while len(kept) < most and any(queues):
        for queue in queues:
            if queue and len(kept) < most:
                kept.add(queue.pop())
    return tuple(question for index, question in enumerate(questions) if index in kept)


# --- processes --------------------------------------------------------------------------------------------------------


def _measure(run: Run, model: Model, items: list[Item], setup: str, part: tuple[int, int]) -> None:
    seen = 0

    def on_row(row: Row) -> None:
        nonlocal seen
        seen += 1
        if seen % 25 == 0:
            note(f"{run.study.name}: {seen} new rows.")

    with TrainingDisplay(f"Study {run.study.name}") as display:
        config = model.resolve(run.config)
        bench = Bench(model, config, run.options, items, run.folder, setup, part, on_row, display)
        for index in range(part[0], len(items), part[1]):
            for seed in run.options.seeds:
                run.study.measure(bench, index, seed)
        bench.forget_adapters()


def _in_parallel(run: Run, jobs: int, setup: str) -> None:
    """Fresh processes: a forked one may not use torch's threads."""
    note(f"{jobs} processes share the documents.")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = [
            pool.submit(_work, run.study.name, run.config, run.options, run.folder, setup, (part, jobs), threads)
            for part in range(jobs)
        ]
        for part in parts:
            part.result()  # raises what the process raised


def _work(
    name: str, config: LiftConfig, options: Options, folder: Path, setup: str, part: tuple[int, int], threads: int
) -> None:
    console.quiet = part[0] > 0
    study = make_study(name)
    model = _load(study, config, threads)
    run = Run(study, config, options, folder, "")
    _measure(run, model, load_items(study, config, options), setup, part)


def _spare_jobs() -> int:
    return max(1, (psutil.cpu_count(logical=False) or 1) // _CORES_A_JOB)


# --- the folder -------------------------------------------------------------------------------------------------------


def _check_folder(run: Run) -> None:
    path = run.folder / CARD
    if not path.is_file():
        return
    there = _stored_card(run.folder)
    if there.get("study") != run.study.name:
        name = there.get("study", "something else")
        raise ConfigError(f"{run.folder} holds the study '{name}'.", "Give --out another folder.")
    stored = there.get("arms") or {}
    for name, settings in run.study.named_arms(run.options).items():
        if stored.get(name, settings) != settings:
            raise ConfigError(
                f"The arm '{name}' has other settings than the rows in {run.folder}.",
                "Give it another name, or --out another folder.",
            )


def _stored_card(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _setup(run: Run, model: Model) -> str:
    """Rows of other settings are left in the folder, and not counted."""
    config = model.resolve(run.config).model_dump(mode="json", exclude={"seed"})
    parts = {"study": run.study.name, "config": config, "quick": run.options.quick, "model": model.fingerprint}
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]


def _card(run: Run, model: Model, items: Sequence[Item], setup: str) -> dict[str, Any]:
    options = dataclasses.asdict(run.options)
    return {
        "study": run.study.name,
        "setup": setup,
        "command": run.command,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
        "seeds": list(run.options.seeds),
        "arms": (_stored_card(run.folder).get("arms") or {}) | run.study.named_arms(run.options),
        "documents": [
            {
                "id": item.document.id,
                "title": item.document.title,
                "characters": len(item.document.text),
                "tokens": len(model.encode(item.document.text)),
                "questions": len(item.questions),
            }
            for item in items
        ],
        "config": model.resolve(run.config).model_dump(mode="json"),
        "machine": describe_machine(model.device, model.dtype),
    }


__all__ = ["CARD", "Run", "load_items", "read_current", "run_study"]
