"""Every family goes through absorb → answer → save → load, and its fused loss equals transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import FAMILIES, save_model
from liftlm import Document, LiftConfig, answer_all, load_config, load_model
from liftlm.adapters import use_adapter
from liftlm.library import Library

TEXT = "The ferryman Oswin Tarrel rang the bell of Corriden on 3 May 1743. " * 12


def tiny_config(*more: str) -> LiftConfig:
    return load_config(
        None,
        [
            "tasks.per_sentence=1",
            "tasks.passage_characters=150",
            "segments.segment_tokens=64",
            "segments.overlap_tokens=24",
            "adapter.rank=4",
            "training.epochs=2",
            "training.batch_tokens=128",
            "training.learning_rate=5e-3",
            "answering.max_new_tokens=8",
            *more,
        ],
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_absorb_answer_save_load(family: str, kind: str, tmp_path: Path) -> None:
    folder = save_model(
        tmp_path / "m", family, chat=family != "gpt2", pad=family != "gpt-neox", bos=family.startswith("gemma")
    )
    model = load_model(str(folder))
    document = Document(title="Corriden", text=TEXT)
    config = tiny_config(f"adapter.kind={kind}")
    questions = ["Who rang the bell?", "When?"]
    base = answer_all(model, None, questions, document=document, config=config)
    library = Library()
    adapter, new = library.absorb_once(document, model, config)
    assert new and adapter.tasks > 10 and adapter.report.epoch_losses[-1] < adapter.report.epoch_losses[0]
    first = answer_all(model, adapter, questions, config=config)
    ids = torch.tensor([model.encode(TEXT)[:50]])
    with torch.no_grad(), use_adapter(model, adapter.id):
        logits = model.network(ids).logits
    other = load_model(str(folder))
    again = library.open(adapter.id, other)
    with torch.no_grad(), use_adapter(other, adapter.id):
        assert torch.equal(other.network(ids).logits, logits)
    assert [a.answer for a in answer_all(other, again, questions, config=config)] == [a.answer for a in first]
    assert [a.answer for a in answer_all(other, None, questions, document=document, config=config)] == [
        a.answer for a in base
    ]
