"""Document → adapter: the whole of LIFT in one function. Read this first."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from liftlm.adapters import attach_adapter, remove_adapter
from liftlm.config import LiftConfig
from liftlm.documents import Document
from liftlm.errors import EmptyDocumentError
from liftlm.examples import make_examples
from liftlm.models import Model
from liftlm.segments import split_into_segments
from liftlm.storage import canonical_json
from liftlm.training import OnStep, TrainingReport, train


@dataclass(frozen=True)
class Adapter:
    """An absorbed document: the weights live on the model's network (or in the library) under `id`."""

    id: str
    document: Document
    document_tokens: int
    segments: int
    config: LiftConfig  # resolved
    report: TrainingReport


def absorb(
    document: Document,
    model: Model,
    config: LiftConfig | None = None,
    *,
    folder: Path | None = None,
    on_step: OnStep = lambda metrics: None,
) -> Adapter:
    """Fine-tunes a fresh adapter on overlapping segments of the document (LIFT, section 3.1).

    With a folder, checkpoints and metrics.jsonl go there and an interrupted call continues where it stopped; without one
    nothing is written. `Library.absorb_once` does this and keeps the result. Raises what `train` raises, and EmptyDocumentError.
    """
    config = model.resolve(config or LiftConfig())
    # 1. the document, in pieces that fit the window and overlap, so that what follows what is learnt too
    tokens = model.encode(document.text)
    segments = split_into_segments(tokens, config.segments.segment_tokens, config.segments.overlap_tokens)
    # 2. pieces with labels
    examples = make_examples(segments, model.tokenizer)
    if not examples:
        raise EmptyDocumentError(
            f"'{document.title}' is a single token; there is nothing to learn.", "Give a longer document."
        )
    # 3. the weights that may change
    name = adapter_id(document, model, config)
    attach_adapter(model, name, config.adapter, config.seed)
    # 4. learn
    try:
        report = train(model, name, examples, config, folder=folder, on_step=on_step)
    except BaseException:
        remove_adapter(model, name)  # nobody may take a half-trained one for the real one
        raise
    return Adapter(name, document, len(tokens), len(segments), config, report)


def adapter_id(document: Document, model: Model, config: LiftConfig) -> str:
    """What decides an adapter's content, hashed: text and title, base weights, recipe. 16 hex digits."""
    recipe = model.resolve(config).recipe()
    parts = {"text": document.id, "title": document.title, "model": model.fingerprint, "recipe": recipe}
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]
