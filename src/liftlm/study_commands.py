"""`lift study`: an experiment on one of LIFT's claims → a folder with rows, figures, plots, a report and a verdict."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, get_args

import typer

from liftlm.arguments import ConfigOption, ModelOption, RayOption, SetOption, WindowOption, read_config, refuse_divided
from liftlm.cluster_commands import study_shared
from liftlm.display import note
from liftlm.errors import ConfigError


def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The study; a wrong name lists them.")],
    out: Annotated[Path, typer.Option("--out", help="The folder of the study; the same command again resumes.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="[DOMAIN=]PATH[:N[-M]]: documents with questions, those numbers of them; repeatable. Default: the demo's.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small settings and the beginnings of documents only.")
    ] = False,
    seeds: Annotated[str, typer.Option("--seeds", help="Comma-separated.")] = "0",
    documents: Annotated[int | None, typer.Option("--documents", min=1, help="At most so many of each --data.")] = None,
    questions: Annotated[int | None, typer.Option("--questions", min=1, help="At most so many of a document.")] = None,
    characters: Annotated[int | None, typer.Option("--characters", min=200, help="Cut documents to so many.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="Processes that share the documents; 0: by cores.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the adapters below OUT/work.")] = False,
    arms: Annotated[Path | None, typer.Option("--arms", help="adapters, recipes: YAML of named settings.")] = None,
    lengths: Annotated[str, typer.Option("--lengths", help="efficiency: tokens, comma-separated.")] = "",
    graded: Annotated[Path | None, typer.Option("--graded", help="tasks: the sheet that a person graded.")] = None,
    writers: Annotated[str, typer.Option("--writers", help="tasks: compared with extractive, e.g. self,llm.")] = "",
    model: ModelOption = None,
    window: WindowOption = None,
    ray: RayOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Run an experiment on one of LIFT's claims, and say what it shows."""
    check_plots()
    from liftlm.studies.registry import make_study
    from liftlm.studies.running import run_study
    from liftlm.studies.study import Options

    chosen = make_study(name)
    below = dict(chosen.defaults)
    resolved = read_config(config, settings, model=model, window=window, below=below)
    refuse_divided(resolved)
    options = Options(
        sources=tuple(_source(text) for text in data or ()),
        seeds=_numbers(seeds, "--seeds"),
        quick=quick,
        documents=documents,
        questions=questions,
        characters=characters,
        jobs=jobs,
        keep=keep,
        arms=arms,
        lengths=_numbers(lengths, "--lengths") if lengths else (),
        graded=graded,
        writers=_writers(writers),
    )
    _check_study_of_options(name, arms, graded, lengths, writers)
    if ray is not None and keep:
        raise ConfigError("--keep keeps adapters of this machine, and --ray makes them elsewhere.", "Leave one out.")
    share = None if ray is None else partial(study_shared, ray)
    conclusion = run_study(chosen, out, resolved, options, shlex.join(["lift", *sys.argv[1:]]), share=share)
    note(f"{conclusion.verdict.outcome}: {conclusion.verdict.sentence}")
    print(out / "report.md")


def _check_study_of_options(name: str, arms: Path | None, graded: Path | None, lengths: str, writers: str) -> None:
    """Some options are one study's own."""
    for flag, given, taken in (
        ("--arms", arms, ("adapters", "recipes")),
        ("--graded", graded, ("tasks",)),
        ("--lengths", lengths or None, ("efficiency",)),
        ("--writers", writers or None, ("tasks",)),
    ):
        if given is not None and name not in taken:
            raise ConfigError(f"{flag} goes with the study {' or '.join(taken)}, not with {name}.", "Leave it out.")


def check_plots() -> None:
    """Said now, not after an hour's work."""
    missing = [name for name in ("rouge_score", "nltk", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Studies need {', '.join(missing)}, which are not installed.",
            "pip install 'liftlm[eval]'; in a clone: .venv/bin/pip install -c constraints.txt -e '.[eval]'.",
        )


def _source(text: str) -> tuple[str, str]:
    domain, equals, path = text.partition("=")
    return (domain.strip(), path.strip()) if equals and not Path(text).exists() else ("", text)


def _writers(text: str) -> tuple[str, ...]:
    from liftlm.config import TasksConfig

    known = [name for name in get_args(TasksConfig.model_fields["writer"].annotation) if name != "none"]
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if unknown := [name for name in found if name not in known]:
        raise ConfigError(f"There is no writer '{unknown[0]}' to compare.", f"Writers are {', '.join(known)}.")
    return found


def _numbers(text: str, flag: str) -> tuple[int, ...]:
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        found = ()
    if not found or min(found) < 0:
        raise ConfigError(f"{flag} cannot be '{text}'.", f"Write whole numbers with commas between: {flag} 0,1,2.")
    return found
