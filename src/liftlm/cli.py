"""The command line: what and where are arguments, everything else is in the config tree.

Heavy imports wait for the command that needs them. Exit codes: 0, 2 for a wrong flag or setting, else those of
`liftlm.errors` (docs/errors.md); 1 is a defect of the program.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liftlm import __version__
from liftlm.arguments import (
    BaseOption,
    ConfigOption,
    ContextOption,
    DocumentArgument,
    LibraryOption,
    ModelOption,
    RayOption,
    SetOption,
    StartOption,
    TasksOption,
    TitleOption,
    WindowOption,
    load_chosen_model,
    read_config,
    read_document,
    refuse_divided,
)
from liftlm.cluster_commands import absorb_many, is_folder
from liftlm.display import TrainingDisplay, console, minutes, note
from liftlm.errors import ConfigError, LiftError
from liftlm.evaluation_commands import evaluate, score
from liftlm.library_commands import export, library_app
from liftlm.pre_sft_commands import pre_sft
from liftlm.process import as_text, first_process, report_error, run_process
from liftlm.server_commands import keys_app, serve
from liftlm.study_commands import study

if TYPE_CHECKING:
    from liftlm.absorbing import Adapter
    from liftlm.answering import Answer
    from liftlm.config import LiftConfig
    from liftlm.documents import Document
    from liftlm.models import Model
    from liftlm.shelf import Entry
    from liftlm.tasks import Task

app = typer.Typer(
    help="Absorb a long document into a small adapter of a language model, and answer from it (LIFT).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    epilog="--debug, anywhere, shows the traceback of a failure. Exit codes: docs/errors.md.",
)
app.add_typer(library_app, name="library")
app.command()(export)
app.command()(evaluate)
app.command()(score)
app.command()(serve)
app.add_typer(keys_app, name="keys")
app.command()(study)
app.command("pre-sft")(pre_sft)

# --- absorbing and answering ------------------------------------------------------------------------------------------


@app.command()
def absorb(
    document: DocumentArgument,
    tasks: TasksOption = None,
    start: StartOption = None,
    title: TitleOption = None,
    model: ModelOption = None,
    window: WindowOption = None,
    ray: RayOption = None,
    library: LibraryOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Absorb DOCUMENT, or every document in a folder, into adapters and keep them in the library."""
    resolved = read_config(config, settings, model=model, window=window, start=start)
    if is_folder(document):
        if tasks is not None or title is not None:
            raise ConfigError("--tasks and --title are of one document, and this is a folder.", "Leave them out.")
        absorb_many(document, resolved, ray, library)
        return
    if ray is not None or library is not None:
        raise ConfigError("--ray and --library go with a folder of documents.", "Give a folder, or leave them out.")
    text, entry = read_document(document, title)
    given = _given_tasks(tasks, text)
    adapter, new = _absorb(text, load_chosen_model(resolved, entry), resolved, given)
    if first_process():
        print(f"{adapter.id}  {text.title}" + ("" if new else "  (was in the library)"))


@app.command()
def ask(
    document: DocumentArgument,
    question: Annotated[str | None, typer.Argument(metavar="[QUESTION]", help="What to ask.")] = None,
    questions: Annotated[
        Path | None, typer.Option("--questions", help='JSONL file, one {"question": …} a line.')
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the answers (JSONL); default: standard output.")
    ] = None,
    context: ContextOption = None,
    base: BaseOption = False,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="Look for known failures of absorbing first; warns in sentences.")
    ] = False,
    tasks: TasksOption = None,
    start: StartOption = None,
    title: TitleOption = None,
    model: ModelOption = None,
    window: WindowOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Answer QUESTION, or a file of questions, about DOCUMENT; absorbs it first if the library does not have it."""
    if (question is None) == (questions is None):
        raise ConfigError("Give either a QUESTION or --questions FILE.", "See `lift ask --help`.")
    if out is not None and questions is None:
        raise ConfigError("--out goes with --questions FILE.", "A single answer is printed.")
    question = None if question is None else as_text(question)
    if question is not None and not question.strip():
        raise ConfigError("The question is empty.", "Write what you want to know.")
    if diagnose and base:
        raise ConfigError("--base absorbs nothing that --diagnose could look at.", "Leave one of the two out.")
    resolved = read_config(config, settings, model=model, window=window, context=context, start=start)
    refuse_divided(resolved)
    text, entry = read_document(document, title)
    if questions is not None:
        _ask_file(questions, out, document, text, entry, resolved, base, tasks, diagnose)
        return
    given = _given_tasks(tasks, text)
    loaded = load_chosen_model(resolved, entry)
    adapter = _ready(text, entry, loaded, resolved, base, [str(question)], given)
    if first_process():
        _warn(diagnose, loaded, adapter, resolved)
        _print_streamed(loaded, adapter, str(question), text, resolved)


def _ask_file(
    questions: Path,
    out: Path | None,
    name: str,
    text: Document,
    entry: Entry | None,
    config: LiftConfig,
    base: bool,
    tasks: Path | None,
    diagnose: bool,
) -> None:
    from liftlm.questions import answer_rows, check_out, read_questions

    rows = read_questions(questions)
    if out is not None:
        check_out(out, questions, Path(name))
    given = _given_tasks(tasks, text)
    loaded = load_chosen_model(config, entry)
    adapter = _ready(text, entry, loaded, config, base, [row["question"] for row in rows], given)
    if not first_process():
        return
    _warn(diagnose, loaded, adapter, config)
    answered = answer_rows(
        loaded,
        adapter,
        rows,
        document=text,
        config=config,
        out=out,
        on_answer=lambda index, answer: note(f"{index + 1}/{len(rows)}: {' '.join(answer.question.split())}"),
    )
    if out is None:
        for row in answered:
            print(json.dumps(row, ensure_ascii=False))
    else:
        note(f"{len(answered)} answers in {out}.")


@app.command()
def chat(
    document: DocumentArgument,
    context: ContextOption = None,
    base: BaseOption = False,
    tasks: TasksOption = None,
    title: TitleOption = None,
    model: ModelOption = None,
    window: WindowOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Talk about DOCUMENT; turns are kept as far as the window allows. /quit or Ctrl-D ends."""
    if document == "-":
        raise ConfigError("A chat reads its questions from standard input.", "Give the document as a file.")
    resolved = read_config(config, settings, model=model, window=window, context=context)
    refuse_divided(resolved)
    text, entry = read_document(document, title)
    given = _given_tasks(tasks, text)
    loaded = load_chosen_model(resolved, entry)
    adapter = _ready(text, entry, loaded, resolved, base, [], given)

    from liftlm.answering import Conversation

    conversation = Conversation(loaded, adapter, document=text, config=resolved)
    note(f"About '{text.title}'. /quit or Ctrl-D ends.")
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            console.print("> ", end="", style="bold")
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if not line.strip():
            continue
        try:
            said = conversation.ask(as_text(line.strip()), on_text=lambda part: print(part, end="", flush=True))
            print(flush=True)
            _show_source(said)
        except LiftError as error:
            report_error(error)


@app.command("tasks")
def write_tasks(
    document: DocumentArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write them (JSONL), to edit and train on.")
    ] = None,
    sample: Annotated[int, typer.Option("--sample", min=0, help="How many to print.")] = 10,
    title: TitleOption = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Write questions and answers about DOCUMENT as absorbing would, print statistics and a sample."""
    from liftlm.questions import check_out
    from liftlm.task_report import report_tasks

    resolved = read_config(config, settings, model=model)
    if resolved.tasks.writer == "none":
        raise ConfigError("tasks.writer is none, which writes nothing.", "Use --set tasks.writer=extractive.")
    text, entry = read_document(document, title)
    if out is not None:
        check_out(out, Path(document))
    report_tasks(text, resolved, lambda: load_chosen_model(resolved, entry), out, sample)


@app.command()
def demo(
    window: Annotated[int, typer.Option("--window", help="Tokens the model may see at once.")] = 2048,
    model: ModelOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    every: Annotated[bool, typer.Option("--all", help="Ask all 36 questions, not only ten.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Train on everything also where bfloat16 is missing.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Also write every answer as JSON there.")] = None,
) -> None:
    """Absorb an invented chronicle and compare six ways of answering questions about it."""
    from liftlm.demo import run_demo
    from liftlm.questions import check_out

    resolved = read_config(config, settings, model=model, window=window)
    if out is not None:
        check_out(out)
    run_demo(load_chosen_model(resolved), resolved, every=every, full=full, out=out)


@app.command("config")
def print_config(config: ConfigOption = None, settings: SetOption = None) -> None:
    """Print every setting with its value, as YAML that --config reads."""
    from liftlm.config import load_config, to_yaml

    print(to_yaml(load_config(config, settings or [])), end="")


# --- what the commands share ------------------------------------------------------------------------------------------


def _given_tasks(path: Path | None, text: Document) -> list[Task] | None:
    from liftlm.tasks import read_tasks_file

    return None if path is None else read_tasks_file(path, len(text.text))


def _ready(
    text: Document,
    entry: Entry | None,
    model: Model,
    config: LiftConfig,
    base: bool,
    questions: list[str],
    tasks: list[Task] | None,
) -> Adapter | None:
    """The adapter to answer with; questions that cannot be asked fail before any training."""
    from liftlm.answering import check_questions
    from liftlm.config import LiftConfig
    from liftlm.library import Library

    check_questions(model, text, questions, config)
    if base:
        return None
    if entry is None or tasks is not None or config.adapter.start is not None:
        return _absorb(text, model, config, tasks)[0]
    adapter = Library().open(entry.id, model)
    asked, stored, default = model.resolve(config).recipe(), adapter.config.recipe(), LiftConfig().recipe()
    for branch in ("segments", "tasks", "adapter", "training"):
        for key, value in config.recipe()[branch].items():
            if value != default[branch].get(key) and asked[branch][key] != stored[branch].get(key):
                raise ConfigError(
                    f"Entry {entry.id} was absorbed with another {branch}.{key} than {value}.",
                    "Leave that setting out, or give the document itself, to absorb it so.",
                )
    note(f"From the library: '{entry.title}' (id {entry.id}).")
    return adapter


def _absorb(text: Document, model: Model, config: LiftConfig, tasks: list[Task] | None = None) -> tuple[Adapter, bool]:
    from liftlm.library import Library

    library = Library()
    segment_tokens = model.resolve(config).segments.segment_tokens
    if not library.has(text, model, config, tasks):
        tokens = len(model.encode(text.text))
        if tokens < segment_tokens:
            note(f"The document has {tokens} tokens, less than one segment of {segment_tokens}: it is one piece.")
    with TrainingDisplay(f"Absorbing '{text.title}'") as display:
        adapter, new = library.absorb_once(text, model, config, tasks=tasks, on_step=display)
    report = adapter.report
    if new:
        for line in adapter.notes:
            note(line)
        note(
            f"Absorbed {adapter.document_tokens:,} tokens in {adapter.segments} segments and {adapter.tasks:,} tasks: "
            f"{report.steps} steps, {minutes(report.seconds)}, {report.tokens_per_second:.0f} tokens/s, "
            f"mean loss {report.losses}, peak memory {report.peak_memory_bytes / 1e9:.1f} GB. Library id {adapter.id}."
        )
    else:
        note(f"From the library: '{text.title}' (id {adapter.id}).")
    return adapter, new


def _warn(diagnose: bool, model: Model, adapter: Adapter | None, config: LiftConfig) -> None:
    if diagnose and adapter is not None:
        from liftlm.diagnosing import warn_of_failures

        warn_of_failures(model, adapter, config)


def _print_streamed(model: Model, adapter: Adapter | None, question: str, text: Document, config: LiftConfig) -> None:
    from liftlm.answering import answer

    given = answer(
        model,
        adapter,
        question,
        document=text,
        config=config,
        on_text=lambda part: print(part, end="", flush=True),
    )
    print(flush=True)
    _show_source(given)
    origin = "recited" if given.context == "recite" else "of the document"
    note(
        f"{given.method} · {given.prompt_tokens} prompt tokens ({given.context_tokens} {origin}) · "
        f"{given.answer_tokens} answer tokens · {given.seconds:.1f} s"
    )


def _show_source(given: Answer) -> None:
    """A small model misreads what it has found or recited; the sentence itself lets the reader see it."""
    if given.sources:
        where = "From memory, perhaps wrong" if given.context == "recite" else "Best match in the text"
        note(f"{where}: “{given.sources[0]}”")


# --- entry point ------------------------------------------------------------------------------------------------------


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Runs the command line; every expected failure ends in one sentence and its exit code."""
    run_process(lambda arguments: app(arguments, prog_name="lift"))
