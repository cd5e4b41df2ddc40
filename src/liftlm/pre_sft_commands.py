"""`lift pre-sft`: many documents → a model that is used to absorbing, and a starting adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liftlm.arguments import ConfigOption, ModelOption, SetOption, WindowOption, read_config
from liftlm.display import TrainingDisplay, minutes, note
from liftlm.errors import ConfigError
from liftlm.process import first_process

if TYPE_CHECKING:
    from liftlm.pre_sft.corpus import Corpus


def pre_sft(
    corpus: Annotated[
        list[str],
        typer.Argument(metavar="CORPUS…", help="PATH[:N[-M]]: files or folders of documents."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The model's folder; must not exist. The same command resumes.")],
    mode: Annotated[
        str, typer.Option("--mode", help="sft (the paper's recipe) or meta (learns where to start from).")
    ] = "sft",
    keep_out: Annotated[
        list[str] | None,
        typer.Option("--keep-out", help="PATH[:N[-M]]: documents that must not be in the corpus; repeatable."),
    ] = None,
    model: ModelOption = None,
    window: WindowOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Fine-tune a model on many documents so that it absorbs others better."""
    if mode not in ("sft", "meta"):
        raise ConfigError(f"There is no mode '{mode}'.", "Choose sft or meta.")
    resolved = read_config(config, settings, model=model, window=window)
    from liftlm.pre_sft.running import pre_sft as run

    def told(found: Corpus) -> None:
        note(f"{found.documents:,} documents, {found.questions:,} questions given with them.")

    with TrainingDisplay("Pre-LIFT fine-tuning") as display:
        report = run(
            corpus,
            out,
            resolved,
            mode="meta" if mode == "meta" else "sft",
            keep_out=keep_out or (),
            on_step=display,
            on_corpus=told,
        )
    note(
        f"{report.steps} steps, {report.tokens:,} tokens, {minutes(report.seconds)}, loss {report.epoch_losses[0]:.3f}."
    )
    if first_process():
        print(out)
