"""What several commands take: options in one wording, and what they mean: the settings, the document, the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liftlm.display import note
from liftlm.errors import ConfigError, DocumentNotFoundError

if TYPE_CHECKING:
    from liftlm.config import LiftConfig
    from liftlm.documents import Document
    from liftlm.models import Model
    from liftlm.shelf import Entry

DocumentArgument = Annotated[
    str, typer.Argument(metavar="DOCUMENT", help="A file, - for standard input, or a library id.")
]
TitleOption = Annotated[str | None, typer.Option("--title", help="Title of the document; default: taken from it.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="A model folder, hub id or built-in name.")]
WindowOption = Annotated[
    int | None, typer.Option("--window", help="Tokens the model may see at once; default: its own limit.")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="A YAML file of settings.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="One setting, e.g. training.epochs=2; repeatable.")]
ContextOption = Annotated[
    str | None,
    typer.Option("--context", help="Text in the window beside the question: none, truncate, retrieve or recite."),
]
BaseOption = Annotated[bool, typer.Option("--base", help="Ask the bare model, without absorbing (for comparison).")]
StartOption = Annotated[
    str | None, typer.Option("--start", help="A starting adapter that `lift pre-sft` made, to absorb from.")
]
RayOption = Annotated[
    str | None, typer.Option("--ray", help="Share the work out over a Ray cluster: local, auto, HOST:PORT or ray://….")
]
LibraryOption = Annotated[
    str | None, typer.Option("--library", help="Where adapters go, any fsspec address (s3://…); default: the library.")
]
TasksOption = Annotated[
    Path | None,
    typer.Option("--tasks", help="Train on these questions (JSONL, see `lift tasks`), not on written ones."),
]


def read_config(
    path: Path | None,
    settings: list[str] | None,
    *,
    model: str | None = None,
    window: int | None = None,
    context: str | None = None,
    start: str | None = None,
    seed: int | None = None,
    below: dict[str, Any] | None = None,
) -> LiftConfig:
    """Defaults → file → --set → the flags that stand for a setting; below: a command's own defaults."""
    from liftlm.config import load_config

    flags: dict[str, Any] = {
        "model.name": model, "model.window": window, "answering.context": context, "adapter.start": start,
        "seed": seed,
    }  # fmt: skip
    # as JSON, since a model called 1.0 is a text; not escaped, since YAML reads escaped surrogates differently
    given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in flags.items() if value is not None]
    return load_config(path, [*(settings or []), *given], below)


def refuse_divided(config: LiftConfig) -> None:
    """Raises ConfigError: only the first of several processes answers, and a divided model needs them all."""
    if config.model.parallel == "tensor":
        raise ConfigError(
            "A model that is divided over processes absorbs, and does not answer.",
            "`lift absorb` with model.parallel=tensor; then export the adapter, or ask without that setting.",
        )


def read_document(name: str, title: str | None) -> tuple[Document, Entry | None]:
    """A file or standard input; where there is no such file, an entry of the library."""
    from liftlm.documents import Document, load_document
    from liftlm.shelf import Shelf

    try:
        return load_document(name, title), None
    except DocumentNotFoundError:
        shelf = Shelf()
        if not re.fullmatch("[0-9a-f]{1,16}", name) or not shelf.matching(name):
            raise
        entry = shelf.find(name)
        stored = shelf.document(entry.id)
        return Document(title=title or stored.title, text=stored.text, source=stored.source), entry


def load_chosen_model(config: LiftConfig, entry: Entry | None = None) -> Model:
    from liftlm.config import DEFAULT_MODEL
    from liftlm.models import load_model

    name = config.model.name
    if entry is not None and name == DEFAULT_MODEL:
        name = str(entry.card["model"]["name"])
    return load_model(name, config.model, notify=note)
