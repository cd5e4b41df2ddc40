"""Base weights in 8 bits: a LoRA is trained, stored and opened as ever, on a network that answers nearly the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import save_model
from liftlm import Document, Library, load_config, load_model
from liftlm.adapters import attach_adapter, use_adapter
from liftlm.config import AdapterConfig, ModelConfig
from liftlm.errors import ConfigError, DeviceError, UnknownModelError
from liftlm.exporting import export

IDS = torch.tensor([[5, 17, 40, 30, 99, 12, 7, 8, 150, 31]])
DOCUMENT = Document(title="Corriden", text="The ferryman Oswin Tarrel rang the bell of Corriden on 3 May 1743. " * 12)
SETTINGS = [
    *("model.dtype=float32", "model.device=cpu", "tasks.writer=none", "segments.segment_tokens=64", "adapter.rank=4"),
    *("training.batch_tokens=128", "training.epochs=3", "training.learning_rate=5e-3"),
]


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "m")
    monkeypatch.setattr("liftlm.quantization.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="quantization=int8 needs torchao"):
        load_model(str(folder), ModelConfig(quantization="int8"))
    monkeypatch.setattr("liftlm.quantization.find_spec", lambda name: name)
    with pytest.raises(DeviceError, match="nf4 needs a CUDA device"):
        load_model(str(folder), ModelConfig(quantization="nf4", device="cpu"))


def test_a_lora_on_weights_in_8_bits(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    folder, library = save_model(tmp_path / "m"), Library()
    exact = load_model(str(folder), ModelConfig(dtype="float32", device="cpu"))
    config = load_config(None, [*SETTINGS, f"model.name={folder}", "model.quantization=int8"])
    model = load_model(config=config.model)
    weight = model.network.get_submodule("model.layers.0.mlp.up_proj").weight
    assert type(weight) is not torch.nn.Parameter and type(weight).__module__.startswith("torchao")
    with torch.no_grad():
        ours, theirs = (one.network(input_ids=IDS).logits for one in (model, exact))
    assert not torch.equal(ours, theirs) and (ours - theirs).norm() < 0.05 * theirs.norm()

    adapter, _ = library.absorb_once(DOCUMENT, model, config)
    losses = adapter.report.epoch_losses
    assert losses[-1] < 0.8 * losses[0], losses
    with torch.no_grad(), use_adapter(model, adapter.id):
        learnt = model.network(input_ids=IDS).logits
    assert (learnt - ours).norm() > 0.1 * ours.norm()

    again = load_model(config=config.model)  # opened by another process
    library.open(adapter.id, again)
    with torch.no_grad(), use_adapter(again, adapter.id):
        assert torch.equal(again.network(input_ids=IDS).logits, learnt)
    with pytest.raises(UnknownModelError):  # other weights: another entry
        library.open(adapter.id, exact)

    export(library.find(adapter.id), tmp_path / "peft")  # a plain LoRA in float32, as any
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(stored) == 28 and all(tensor.dtype == torch.float32 for tensor in stored.values())
    with pytest.raises(ConfigError, match="absorbed on weights in int8"):
        export(library.find(adapter.id), tmp_path / "merged", "merged")
    with pytest.raises(ConfigError, match="cannot be trained"):
        attach_adapter(dataclasses.replace(model, adapters={}), "full", AdapterConfig(kind="full"), 0)
