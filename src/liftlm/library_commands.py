"""The commands about what is absorbed already: `lift library …` and `lift export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from liftlm.display import note
from liftlm.errors import ConfigError, DamagedEntryError

library_app = typer.Typer(
    help="List, inspect, check and remove absorbed documents.", no_args_is_help=True, rich_markup_mode=None
)
EntryArgument = Annotated[str, typer.Argument(metavar="ID", help="A library id, or the beginning of one.")]


@library_app.command("list")
def list_entries() -> None:
    """One line a document: id, date, model, tokens, size, title."""
    from liftlm.shelf import Shelf

    shelf = Shelf()
    entries, damaged = shelf.entries()
    for entry in entries:
        card = entry.card
        print(
            f"{entry.id}  {card['created'][:16]}  {Path(card['model']['name']).name}"
            f"  {card['document']['tokens']:>9,} tokens  {entry.size_bytes / 1e6:>7.1f} MB  {entry.title}"
        )
    for entry_id in damaged:
        print(f"{entry_id}  damaged; `lift library verify` says why")
    unfinished = shelf.unfinished()
    for entry_id in unfinished:
        print(f"{entry_id}  unfinished; the command that began it continues, `lift library remove` deletes it")
    if not entries and not damaged and not unfinished:
        note(f"The library at {shelf.home} is empty.")


@library_app.command()
def show(entry: EntryArgument) -> None:
    """Everything known of an absorbed document: source, model, settings, training, machine."""
    from liftlm.shelf import Shelf

    print(json.dumps(Shelf().find(entry).card, indent=2, ensure_ascii=False))


@library_app.command()
def remove(entry: EntryArgument) -> None:
    """Delete an absorbed document, damaged and unfinished ones too."""
    from liftlm.shelf import Shelf

    shelf = Shelf()
    entry_id = shelf.find_id(entry, unfinished=True)
    shelf.remove(entry_id)
    note(f"Removed {entry_id}.")


@library_app.command()
def verify(entry: Annotated[str | None, typer.Argument(metavar="[ID]", help="Default: all.")] = None) -> None:
    """Check the files of one or all entries against their checksums."""
    from liftlm.shelf import Shelf

    shelf = Shelf()
    ids = shelf.matching("") if entry is None else [shelf.find_id(entry)]
    if not ids:
        note(f"The library at {shelf.home} is empty.")
    bad = 0
    for entry_id in ids:
        problems = shelf.problems(entry_id)
        bad += bool(problems)
        print(f"{entry_id}  {'; '.join(problems) if problems else 'whole'}")
    if bad:
        raise DamagedEntryError(f"Damaged entries: {bad} of {len(ids)}.", "`lift library remove ID` deletes one.")


def export(
    entry: EntryArgument,
    to: Annotated[
        str, typer.Option("--to", help="peft (the adapter alone), merged (a whole model) or gguf (llama.cpp).")
    ],
    out: Annotated[Path, typer.Option("--out", help="Where to; a name that is free.")],
) -> None:
    """Write an adapter as other programs load it, and say how vLLM or llama.cpp serves it."""
    from liftlm.shelf import Shelf

    if to not in ("peft", "merged", "gguf"):
        raise ConfigError(
            f"There is no form '{to}'.", "Use --to peft, --to merged or --to gguf, and --out for the place."
        )
    found = Shelf().find(entry)
    from liftlm.exporting import check_serving
    from liftlm.exporting import export as export_entry

    export_entry(found, out, to)  # type: ignore[arg-type]  # one of the three
    note(f"Written to {out}.")
    model = str(found.card["model"]["name"])
    if to == "gguf":
        note(f"With the same model as GGUF: llama-server -m MODEL.gguf --lora {out}")
    elif to == "merged":
        note(f"As any model: vllm serve {out}, or llama.cpp's convert_hf_to_gguf.py {out}")
    else:
        serving = check_serving(found)
        for sentence in (*serving.problems, *serving.doubts):
            note(sentence)
        if not serving.problems:
            note(f"vLLM (not run by us): {serving.command(model, found.id, out.resolve())}")
