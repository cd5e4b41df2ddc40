"""`lift evaluate` and `lift score`: a benchmark by several methods → a folder with predictions, scores, plots and a report."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liftlm.arguments import (
    ConfigOption,
    LibraryOption,
    ModelOption,
    RayOption,
    SetOption,
    WindowOption,
    read_config,
    refuse_divided,
)
from liftlm.cluster_commands import evaluate_shared
from liftlm.display import TrainingDisplay, console, note
from liftlm.errors import ConfigError

if TYPE_CHECKING:
    from liftlm.config import LiftConfig
    from liftlm.evaluation.benchmark import Benchmark
    from liftlm.models import Model

_METHODS = (
    "closed-book,icl,rag,rag-sentences,lift,lift+icl,lift+rag-sentences,oracle,lift+oracle,"
    "lift-other,lift-other+icl,lift-other+rag-sentences"
)
_RUN, _LOCK = "run.json", "scoring.lock"
_TABLE_SECONDS = 120.0
_ANOTHER, _UNKNOWN = "Give another --out, or delete that folder.", "not said"
JudgeUrlOption = Annotated[
    str | None, typer.Option("--judge-url", help="An OpenAI-compatible server that judges the answers.")
]
JudgeModelOption = Annotated[str | None, typer.Option("--judge-model", help="The model there.")]
BertScoreOption = Annotated[bool, typer.Option("--bert-score", help="Also BERTScore (loads an encoder).")]


def evaluate(
    benchmark: Annotated[str, typer.Argument(metavar="BENCHMARK", help="Its name; a wrong one lists them.")],
    out: Annotated[Path, typer.Option("--out", help="The folder of the evaluation; the same again resumes.")],
    data: Annotated[Path | None, typer.Option("--data", help="Its file or folder; default: from the hub.")] = None,
    methods: Annotated[str, typer.Option("--methods", help="Comma-separated.")] = _METHODS,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many questions, drawn.")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of the draw, training and sampling; stands for --set seed=.")
    ] = None,
    lengths: Annotated[str, typer.Option("--lengths", help="needle: tokens, comma-separated.")] = "",
    depths: Annotated[str, typer.Option("--depths", help="needle: 0 to 1, comma-separated.")] = "",
    needles: Annotated[str, typer.Option("--needles", help="needle: names, comma-separated.")] = "",
    together: Annotated[bool, typer.Option("--together", help="needle: all needles in one text.")] = False,
    distractors: Annotated[bool, typer.Option("--distractors", help="needle: hide look-alikes too.")] = False,
    texts: Annotated[int | None, typer.Option("--texts", min=1, help="needle, --together: haystacks a length.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1)] = None,
    model: ModelOption = None,
    window: WindowOption = None,
    judge_url: JudgeUrlOption = None,
    judge_model: JudgeModelOption = None,
    bert_score: BertScoreOption = False,
    ray: RayOption = None,
    library: LibraryOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Answer a benchmark's questions by several methods, score them, and write a report."""
    _check_installed()
    _check_judge(judge_url, judge_model)
    from liftlm.evaluation.registry import make_benchmark

    resolved = read_config(config, settings, model=model, window=window, seed=seed)
    refuse_divided(resolved)
    options = {
        "lengths": [_number(text, int) for text in _listed(lengths)],
        "depths": [_number(text, float) for text in _listed(depths)],
        "needles": _listed(needles),
        "together": together,
        "distractors": distractors,
        "texts": texts,
    }
    chosen = make_benchmark(benchmark, **{name: value for name, value in options.items() if value})
    if max_new_tokens is not None:
        chosen.max_new_tokens = max_new_tokens  # type: ignore[misc]
    if library is not None and ray is None:
        raise ConfigError("--library goes with --ray.", "Leave it out, or set LIFT_HOME.")
    run = _Run(chosen, resolved, out, tuple(dict.fromkeys(_listed(methods))), limit)
    if _predict(run, data, ray, library) > 1:
        note("This process has done its share and scores what is there; the one that ends last scores all.")
    _score(chosen, out, judge_url, judge_model, bert_score)


def score(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An evaluation's folder.")],
    judge_url: JudgeUrlOption = None,
    judge_model: JudgeModelOption = None,
    bert_score: BertScoreOption = False,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="OTHER", help="Another folder to compare with, question by question."),
    ] = None,
) -> None:
    """Score an evaluation's predictions anew and write the report; needs no model."""
    _check_installed()
    _check_judge(judge_url, judge_model)
    from liftlm.evaluation.folders import check_comparable, compare_folders, comparison_table
    from liftlm.evaluation.registry import make_benchmark

    try:
        name = json.loads((folder / _RUN).read_text(encoding="utf-8"))["benchmark"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{folder} is no folder of an evaluation.", "`lift evaluate … --out FOLDER` makes one."
        ) from None
    if against is not None:
        check_comparable(folder, against)
    _score(make_benchmark(name), folder, judge_url, judge_model, bert_score)
    if against is not None:
        print(comparison_table(compare_folders(folder, against, make_benchmark(name))))


@dataclass(frozen=True)
class _Run:
    """What is evaluated."""

    benchmark: Benchmark
    config: LiftConfig
    out: Path
    methods: tuple[str, ...]
    limit: int | None


def _predict(run: _Run, data: Path | None, ray: str | None, library: str | None) -> int:
    """Predicts what is missing of this process's share; how many processes there are."""
    from liftlm.devices import leave_processes
    from liftlm.evaluation.predicting import Predictor, check_methods
    from liftlm.models import load_model
    from liftlm.storage import write_errors, write_file

    benchmark, config, out = run.benchmark, run.config, run.out
    check_methods(run.methods)
    held = _held(out)
    if held.get("benchmark", benchmark.name) != benchmark.name:
        raise ConfigError(f"{out} holds an evaluation of {held['benchmark']}, not of {benchmark.name}.", _ANOTHER)
    items = benchmark.load(data, limit=run.limit, seed=config.seed)
    questions = sum(len(item.questions) for item in items)
    note(f"{benchmark.name}: {len(items)} documents, {questions} questions, {len(run.methods)} methods.")
    with write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    loaded = load_model(config.model.name, config.model, notify=note)
    if held:
        _refuse_other_settings(out, held.get("settings") or {}, _settings(run, loaded))
    part, parts = leave_processes()
    if part == 0:
        write_file(out / _RUN, json.dumps(_describe(run, loaded), indent=1))
    scores = _ScoresSoFar(benchmark, sum(len(item.questions) for item in items[part::parts]))
    display = TrainingDisplay("Absorbing", below=scores.live.table)
    scores.display = display if ray is None else None  # a cluster's workers have a display of their own
    predictor = Predictor(
        *(loaded, config, benchmark, out),
        on_row=scores.hear,
        on_step=display,
        on_wait=lambda document: note(f"Another process is absorbing {document.title}; waiting until it is done."),
        part=(part, parts),
    )
    with scores, display:
        for row in predictor.known(items, run.methods):
            scores.live.add(row)
        if ray is None:
            predictor.predict(items, run.methods)
        else:
            from liftlm.evaluation.sharing import EvaluationOrder

            order = EvaluationOrder(config, "", benchmark=benchmark, items=tuple(items), methods=run.methods)
            evaluate_shared(ray, library, order, out, scores.hear)
    return parts


class _ScoresSoFar:
    """Running means: always in sight on a terminal, elsewhere printed every few minutes; and when the predictions end, anyhow."""

    def __init__(self, benchmark: Benchmark, questions: int) -> None:
        from liftlm.evaluation.report import LiveScores

        self.live = LiveScores(benchmark, questions)
        self.display: TrainingDisplay | None = None  # shows the table where there is a terminal
        self._shown_at = time.monotonic()

    def hear(self, row: dict[str, Any]) -> None:
        """Of a row that was predicted just now."""
        self.live.add(row)
        if self.display is not None and console.is_terminal:
            self.display.draw()
        elif time.monotonic() - self._shown_at >= _TABLE_SECONDS:
            self._show()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self.live.rows:
            self._show()

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        console.print(self.live.table())


def _held(out: Path) -> dict[str, Any]:
    """run.json of the folder where it has rows already."""
    from liftlm.evaluation.scoring import read_rows

    try:
        held = json.loads((out / _RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    has_rows = any(read_rows(out, stem)[0] for stem in ("predictions", "absorbs"))
    return held if has_rows and isinstance(held, dict) else {}


def _settings(run: _Run, model: Model) -> dict[str, Any]:
    """What all rows of a folder have in common, flat: its report shows one line a method, and one configuration."""
    from liftlm.adapters import start_fingerprint

    config = model.resolve(run.config)
    answering = config.answering.model_dump(mode="json", exclude={"batch_tokens", "context", "max_new_tokens"})
    tree = {
        "window": model.window,
        "max_new_tokens": run.benchmark.max_new_tokens,
        "model": {"fingerprint": model.fingerprint, "quantization": config.model.quantization},
        "start": start_fingerprint(config.adapter),
        "answering": answering,
        **config.recipe(),
    }
    return dict(_flat(tree))


def _flat(tree: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        yield from _flat(value, f"{before}{key}.") if isinstance(value, dict) else [(before + key, value)]


def _refuse_other_settings(out: Path, held: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises ConfigError."""
    if not held:
        raise ConfigError(f"{out} holds answers of an earlier version, which did not note its settings.", _ANOTHER)
    names = [name for name in given | held if held.get(name, _UNKNOWN) != given.get(name, _UNKNOWN)]
    if names:
        told = [
            f"{name} is {held.get(name, _UNKNOWN)} there and {given.get(name, _UNKNOWN)} here" for name in names[:3]
        ]
        more = f", and {len(names) - 3} more differ" if len(names) > 3 else ""
        raise ConfigError(f"{out} holds answers by other settings: {', '.join(told)}{more}.", _ANOTHER)


def _describe(run: _Run, model: Model) -> dict[str, Any]:
    from liftlm.devices import describe_machine

    benchmark, config = run.benchmark, run.config
    machine = describe_machine(model.device, model.dtype)
    return {
        "benchmark": benchmark.name,
        "methods": list(run.methods),
        "config": model.resolve(config).model_dump(mode="json"),
        "settings": _settings(run, model),
        "seed": config.seed,
        "limit": run.limit,
        "max_new_tokens": benchmark.max_new_tokens,
        "machine": machine,
        "versions": machine.get("versions", {}),
        "command": shlex.join(["lift", *sys.argv[1:]]),
        "dataset": benchmark.dataset,
        "source": benchmark.source,
        "metrics": list(benchmark.metrics),
    }


def _score(benchmark: Benchmark, folder: Path, url: str | None, judge_model: str | None, with_bert_score: bool) -> None:
    from liftlm.evaluation.encoder_score import bert_score
    from liftlm.evaluation.judge import Judge
    from liftlm.evaluation.report import write_report
    from liftlm.evaluation.scoring import score_folder
    from liftlm.storage import file_lock

    judge = None if url is None or judge_model is None else Judge(base_url=url, model=judge_model)
    # Processes that share an evaluation end at about the same time; what one asked the judge, the next finds answered.
    with file_lock(folder / _LOCK, lambda: note("Another process is scoring this folder; waiting until it is done.")):
        score_folder(folder, benchmark, judge, bert_score if with_bert_score else None)
        write_report(folder)
    print(folder / "report.md")


def _check_judge(url: str | None, judge_model: str | None) -> None:
    """Said before any work."""
    if (url is None) != (judge_model is None):
        raise ConfigError("A judge needs --judge-url and --judge-model.", "Give both, or neither.")


def _check_installed() -> None:
    """The metrics and plots come with an extra: said now, not after an hour's predictions."""
    missing = [name for name in ("rouge_score", "nltk", "bert_score", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Evaluation needs {', '.join(missing)}, which are not installed.",
            "pip install 'liftlm[eval]'; in a clone: .venv/bin/pip install -c constraints.txt -e '.[eval]'.",
        )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"'{text}' is not a number.", "Write numbers with commas between them.") from None
