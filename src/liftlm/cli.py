"""The command line: what and where are arguments, everything else is in the config tree. Heavy imports wait for their command.

Exit codes: 0, 2 for a wrong flag or setting, else those of `liftlm.errors` (docs/errors.md); 1 is a defect of the program.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liftlm import __version__
from liftlm.config import LiftConfig, load_config, to_yaml
from liftlm.display import TrainingDisplay, console, minutes, note
from liftlm.documents import Document, load_document
from liftlm.errors import ConfigError, DocumentNotFoundError, EntryNotFoundError, LiftError, TerminatedWorkError

if TYPE_CHECKING:
    from liftlm.absorbing import Adapter
    from liftlm.answering import Answer
    from liftlm.library import Entry, Library
    from liftlm.models import Model

app = typer.Typer(
    help="Absorb a long document into a small adapter of a language model, and answer from it (LIFT).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    epilog="--debug, anywhere, shows the traceback of a failure. Exit codes: docs/errors.md.",
)
library_app = typer.Typer(help="List, inspect, check and remove absorbed documents.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(library_app, name="library")

DocumentArgument = Annotated[str, typer.Argument(metavar="DOCUMENT", help="A file, - for standard input, or a library id.")]
TitleOption = Annotated[str | None, typer.Option("--title", help="Title of the document; default: taken from it.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="A model folder, hub id or built-in name.")]
WindowOption = Annotated[int | None, typer.Option("--window", help="Tokens the model may see at once; default: its own limit.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="A YAML file of settings.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="One setting, e.g. training.epochs=2; repeatable.")]
ContextOption = Annotated[
    str | None, typer.Option("--context", help="Text in the window beside the question: none, truncate or retrieve.")
]
BaseOption = Annotated[bool, typer.Option("--base", help="Ask the bare model, without absorbing (for comparison).")]
EntryArgument = Annotated[str, typer.Argument(metavar="ID", help="A library id, or the beginning of one.")]


# --- absorbing and answering --------------------------------------------------------------------------------------------------


@app.command()
def absorb(
    document: DocumentArgument,
    title: TitleOption = None,
    model: ModelOption = None,
    window: WindowOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Absorb DOCUMENT into an adapter and keep it in the library."""
    resolved = _config(config, settings, model=model, window=window)
    text, _ = _document(document, title)
    loaded = _load_model(resolved)
    adapter, new = _absorb(text, loaded, resolved)
    print(f"{adapter.id}  {text.title}" + ("" if new else "  (was in the library)"))


@app.command()
def ask(
    document: DocumentArgument,
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="What to ask.")] = None,
    questions: Annotated[Path | None, typer.Option("--questions", help='JSONL file, one {"question": …} a line.')] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write the answers (JSONL); default: standard output.")] = None,
    context: ContextOption = None,
    base: BaseOption = False,
    title: TitleOption = None,
    model: ModelOption = None,
    window: WindowOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Answer QUESTION, or a file of questions, about DOCUMENT; absorbs it first if the library does not have it."""
    from liftlm.questions import answer_rows, read_questions

    if (question is None) == (questions is None):
        raise ConfigError("Give either a QUESTION or --questions FILE.", "See `lift ask --help`.")
    if out is not None and questions is None:
        raise ConfigError("--out goes with --questions FILE.", "A single answer is printed.")
    resolved = _config(config, settings, model=model, window=window, context=context)
    rows = [{"question": question}] if questions is None else read_questions(questions)
    text, entry = _document(document, title)
    loaded = _load_model(resolved, entry)
    adapter = _ready(text, entry, loaded, resolved, base, [str(row["question"]) for row in rows])
    if questions is None:
        _print_streamed(loaded, adapter, str(question), text, resolved)
        return
    answered = answer_rows(
        loaded,
        adapter,
        rows,
        document=text,
        config=resolved,
        out=out,
        on_answer=lambda index, answer: note(f"{index + 1}/{len(rows)}: {answer.question}"),
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
    title: TitleOption = None,
    model: ModelOption = None,
    window: WindowOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Talk about DOCUMENT; turns are kept as far as the window allows. /quit or Ctrl-D ends."""
    from liftlm.answering import Conversation

    if document == "-":
        raise ConfigError("A chat reads its questions from standard input, so the document cannot come from there.", "Save it first.")
    resolved = _config(config, settings, model=model, window=window, context=context)
    text, entry = _document(document, title)
    loaded = _load_model(resolved, entry)
    adapter = _ready(text, entry, loaded, resolved, base, [])
    conversation = Conversation(loaded, adapter, document=text, config=resolved)
    note(f"About '{text.title}'. /quit or Ctrl-D ends.")
    while True:
        console.print("> ", end="", style="bold")
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if not line.strip():
            continue
        try:
            conversation.ask(line.strip(), on_text=lambda part: print(part, end="", flush=True))
            print(flush=True)
        except LiftError as error:
            if error.exit_code >= 128:
                raise
            _report(error)


@app.command()
def demo(
    window: Annotated[int, typer.Option("--window", help="Tokens the model may see at once.")] = 2048,
    model: ModelOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write every answer as JSON there.")] = None,
) -> None:
    """Absorb an invented chronicle and compare four ways of answering questions about it."""
    from liftlm.demo import run_demo

    resolved = _config(config, settings, model=model, window=window)
    run_demo(_load_model(resolved), resolved, out=out)


# --- library ------------------------------------------------------------------------------------------------------------------


@library_app.command("list")
def list_entries() -> None:
    """One line a document: id, date, model, tokens, size, title."""
    entries, damaged = _library().entries()
    for entry in entries:
        card = entry.card
        print(
            f"{entry.id}  {card['created'][:16]}  {card['model']['name']}  {card['document']['tokens']:>9,} tokens"
            f"  {entry.size_bytes / 1e6:>7.1f} MB  {entry.title}"
        )
    for entry_id in damaged:
        print(f"{entry_id}  damaged; `lift library verify` says why")
    if not entries and not damaged:
        note(f"The library at {_library().home} is empty.")


@library_app.command()
def show(entry: EntryArgument) -> None:
    """Everything known of an absorbed document: source, model, settings, training, machine."""
    print(json.dumps(_library().find(entry).card, indent=2, ensure_ascii=False))


@library_app.command()
def remove(entry: EntryArgument) -> None:
    """Delete an absorbed document (also a damaged one, by its full id)."""
    library = _library()
    if (library.home / "library" / entry / "entry.json").exists() or (library.home / "library" / entry).is_dir():
        library.remove(entry)
    else:
        library.remove(library.find(entry).id)
    note("Removed.")


@library_app.command()
def verify(entry: Annotated[str | None, typer.Argument(metavar="[ID]", help="Default: all.")] = None) -> None:
    """Check the files of one or all entries against their checksums."""
    library = _library()
    entries, damaged = library.entries()
    ids = [library.find(entry).id] if entry else [found.id for found in entries] + damaged
    bad = 0
    for entry_id in ids:
        problems = library.problems(entry_id)
        bad += bool(problems)
        print(f"{entry_id}  {'; '.join(problems) if problems else 'whole'}")
    if bad:
        from liftlm.errors import DamagedEntryError

        raise DamagedEntryError(f"{bad} of {len(ids)} entries are damaged.", "`lift library remove ID` deletes one.")


@app.command()
def export(
    entry: EntryArgument,
    to: Annotated[Path, typer.Option("--to", help="A folder that does not exist yet.")],
    merged: Annotated[bool, typer.Option("--merged", help="Whole model with the adapter merged into its weights.")] = False,
) -> None:
    """Write an adapter as a PEFT folder, or the whole model with it merged in."""
    from liftlm.library import export as export_entry

    if to.exists():
        raise ConfigError(f"{to} exists already.", "Give a folder that does not exist yet; nothing is overwritten.")
    export_entry(_library().find(entry), to, merged=merged)
    note(f"Written to {to}.")


@app.command("config")
def print_config(config: ConfigOption = None, settings: SetOption = None) -> None:
    """Print every setting with its value, as YAML that --config reads."""
    print(to_yaml(load_config(config, settings or [])), end="")


# --- what the commands share ----------------------------------------------------------------------------------------------------


def _config(
    path: Path | None,
    settings: list[str] | None,
    *,
    model: str | None = None,
    window: int | None = None,
    context: str | None = None,
) -> LiftConfig:
    """Defaults → file → --set → the flags that stand for a setting."""
    flags: dict[str, Any] = {"model.name": model, "model.window": window, "answering.context": context}
    given = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    config = load_config(path, [*(settings or []), *given])
    if config.answering.context == "retrieve":
        from liftlm.context import select_context

        select_context("retrieve", [], 0, [])
    return config


def _document(name: str, title: str | None) -> tuple[Document, Entry | None]:
    """A file or standard input; where there is no such file, an entry of the library."""
    try:
        return load_document(name, title), None
    except DocumentNotFoundError as missing:
        library = _library()
        try:
            entry = library.find(name)
        except EntryNotFoundError:
            raise missing from None
        stored = library.document(entry.id)
        return Document(title=title or stored.title, text=stored.text, source=stored.source), entry


def _load_model(config: LiftConfig, entry: Entry | None = None) -> Model:
    from liftlm.models import load_model

    name = config.model.name
    if entry is not None and name == LiftConfig().model.name:
        name = str(entry.card["model"]["name"])
    return load_model(name, config.model, notify=note)


def _ready(
    text: Document, entry: Entry | None, model: Model, config: LiftConfig, base: bool, questions: list[str]
) -> Adapter | None:
    """The adapter to answer with; questions that cannot be asked fail before any training."""
    from liftlm.answering import check_questions

    check_questions(model, text, questions, config)
    if base:
        return None
    if entry is not None:
        return _library().open(entry.id, model)
    return _absorb(text, model, config)[0]


def _absorb(text: Document, model: Model, config: LiftConfig) -> tuple[Adapter, bool]:
    library = _library()
    resolved = model.resolve(config)
    if not library.has(text, model, config):
        tokens = len(model.encode(text.text))
        if tokens < resolved.segments.segment_tokens:
            note(f"The document has {tokens} tokens, less than one segment of {resolved.segments.segment_tokens}: it is one piece.")
    with TrainingDisplay(f"Absorbing '{text.title}'") as display:
        adapter, new = library.absorb_once(text, model, config, on_step=display)
    report = adapter.report
    if new:
        note(
            f"Absorbed {adapter.document_tokens:,} tokens in {adapter.segments} segments: {report.steps} steps, "
            f"{minutes(report.seconds)}, {report.tokens_per_second:.0f} tokens/s, loss {report.epoch_losses[0]:.2f} → "
            f"{report.epoch_losses[-1]:.2f}, peak memory {report.peak_memory_bytes / 1e9:.1f} GB. Library id {adapter.id}."
        )
    else:
        note(f"From the library (id {adapter.id}).")
    return adapter, new


def _print_streamed(model: Model, adapter: Adapter | None, question: str, text: Document, config: LiftConfig) -> None:
    from liftlm.answering import answer

    parts: list[str] = []

    def show(part: str) -> None:
        parts.append(part)
        print(part, end="", flush=True)

    given = answer(model, adapter, question, document=text, config=config, on_text=show)
    print(flush=True)
    note(_cost(given))


def _cost(answer: Answer) -> str:
    return (
        f"{answer.method} · {answer.prompt_tokens} prompt tokens ({answer.context_tokens} of the document) · "
        f"{answer.answer_tokens} answer tokens · {answer.seconds:.1f} s"
    )


def _library() -> Library:
    from liftlm.library import Library

    return Library()


# --- entry point ----------------------------------------------------------------------------------------------------------------


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _report(error: LiftError) -> None:
    console.print(f"Error: {error.message}", style="red", markup=False)
    if error.next_step:
        console.print(f"       {error.next_step}", markup=False)


def _terminated(number: int, frame: FrameType | None) -> None:
    raise TerminatedWorkError("Stopped by SIGTERM.", "The same command continues where it can.")


def main() -> None:
    """Runs the command line; every expected failure ends in one sentence and its exit code."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app(arguments, prog_name="lift")
    except LiftError as error:
        if debug:
            traceback.print_exc()
        _report(error)
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            traceback.print_exc()
        console.print(f"Error: {type(error).__name__}: {error}", style="red", markup=False)
        console.print("       This is a defect of liftlm; please report it with the output of the same command with --debug.", markup=False)
        sys.exit(1)
