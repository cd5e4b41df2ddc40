"""LoRA as PEFT varies it: every variant trains, is stored as PEFT stores it, and leaves the base model alone."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from conftest import load_in_float32, save_model
from liftlm.adapters import attach_adapter, load_adapter, use_adapter
from liftlm.adapters import fused as fused_module
from liftlm.config import AdapterConfig, LiftConfig, load_config
from liftlm.errors import ConfigError
from liftlm.models import Model

IDS = torch.tensor([[5, 17, 40, 3, 99, 12, 7, 8, 150, 31], [9, 9, 1, 2, 77, 60, 5, 4, 3, 2]])
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "gaussian": {"initialization": "gaussian"},
    "orthogonal": {"initialization": "orthogonal"},
    "pissa": {"initialization": "pissa"},
    "olora": {"initialization": "olora"},
    "olora-rslora": {"initialization": "olora", "rslora": True},
    "dora-pissa": {"dora": True, "initialization": "pissa"},
    "layers": {"layers": (0,)},
    "layers-named": {"layers": (-1,), "target_modules": ("q_proj", "down_proj")},
}


def variant(name: str) -> AdapterConfig:
    return AdapterConfig.model_validate({"rank": 4, "alpha": 6} | VARIANTS[name])


def logits(model: Model, name: str | None, strength: float = 1.0) -> Tensor:
    with torch.no_grad(), use_adapter(model, name, strength=strength):
        return model.network(input_ids=IDS).logits.clone()


def fit(model: Model, name: str, steps: int = 3) -> None:
    tokens = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
    with use_adapter(model, name, training=True):
        optimizer = torch.optim.AdamW(list(model.adapters[name].parameters().values()), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            model.loss_sum(tokens, tokens).backward()
            optimizer.step()


@pytest.mark.parametrize("name", VARIANTS)
def test_it_starts_as_the_base_model_and_loads_in_plain_peft(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    import transformers

    model: Model = load_in_float32(tiny_folder)
    base = logits(model, None)
    attached = attach_adapter(model, "A1", variant(name), seed=0)
    torch.testing.assert_close(logits(model, "A1"), base, rtol=1e-4, atol=1e-4)
    fit(model, "A1")
    trained = logits(model, "A1")
    assert (trained - base).abs().max() > 1e-2
    assert torch.equal(logits(model, None), base), "the base model stays the same bit for bit"
    attached.write(tmp_path, attached.tensors())
    network = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    plain = peft.PeftModel.from_pretrained(network, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=IDS).logits, trained, rtol=1e-5, atol=1e-5)
    other = load_in_float32(tiny_folder)
    load_adapter(other, "B2", tmp_path)
    assert torch.equal(logits(other, "B2"), trained)


@pytest.mark.parametrize("name", ["dora", "dora-pissa", "rslora", "olora"])
def test_strength_goes_from_the_base_model_to_all_of_it(name: str, tiny_folder: Path) -> None:
    model: Model = load_in_float32(tiny_folder)
    base = logits(model, None)
    attach_adapter(model, "A1", variant(name), seed=0)
    fit(model, "A1")
    trained = logits(model, "A1")
    torch.testing.assert_close(logits(model, "A1", 0.0), base, rtol=1e-4, atol=1e-4)
    assert 0 < (logits(model, "A1", 0.5) - base).abs().max() < 2 * (trained - base).abs().max()
    assert torch.equal(logits(model, "A1"), trained), "all of it is back"


def test_the_fused_product_leaves_dora_to_peft(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = fused_module._LoraProduct.apply
    monkeypatch.setattr(fused_module._LoraProduct, "apply", lambda *a: (calls.append(1), original(*a))[1])
    model: Model = load_in_float32(tiny_folder)
    for name, expected in (("dora", 0), ("rslora", 14), ("olora", 14)):
        attach_adapter(model, name, variant(name), seed=0)
        calls.clear()
        logits(model, name)
        assert len(calls) == expected, name


@pytest.mark.parametrize("rslora", [False, True])
def test_olora_is_that_of_peft(rslora: bool, tiny_folder: Path) -> None:
    """PEFT takes the product from the weights and trains it; the same steps give the same function here."""
    config = AdapterConfig(rank=4, alpha=6, initialization="olora", rslora=rslora, target_modules=("q_proj",))
    model: Model = load_in_float32(tiny_folder)
    theirs = copy.copy(model)
    theirs.network = load_in_float32(tiny_folder).network
    attach_adapter(model, "A1", config, seed=0)
    wanted = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights="olora", use_rslora=rslora, target_modules=["q_proj"]  # type: ignore[arg-type]
    )  # fmt: skip
    wrapped = peft.get_peft_model(theirs.network, wanted)
    for layer in range(2):
        ours = model.network.model.layers[layer].self_attn.q_proj
        reference = wrapped.base_model.model.model.layers[layer].self_attn.q_proj
        for part in ("lora_A", "lora_B"):
            half = getattr(ours, part)["A1"].weight.chunk(2, 0 if part == "lora_A" else 1)[0]
            torch.testing.assert_close(half, getattr(reference, part)["default"].weight)
        assert ours.scaling["A1"] == pytest.approx(reference.scaling["default"])
        assert ours.scaling["A1"] == pytest.approx(6 / (math.sqrt(4) if rslora else 4))


@pytest.mark.parametrize(("family", "pattern"), [("llama", "layers"), ("gpt2", "h"), ("gpt-neox", "layers")])
def test_selected_layers(family: str, pattern: str, tmp_path: Path) -> None:
    model: Model = load_in_float32(save_model(tmp_path / "m", family))
    config = AdapterConfig(rank=2, layers=(-1,))
    attached = attach_adapter(model, "A1", config, seed=0)
    assert attached.parameters() and all(f".{pattern}.1." in name for name in attached.parameters())
    whole = attach_adapter(model, "B2", AdapterConfig(rank=2), seed=0)
    assert len(whole.parameters()) == 2 * len(attached.parameters())
    attached.write(tmp_path, attached.tensors())
    card = json.loads((tmp_path / "adapter_config.json").read_text())
    assert card["layers_to_transform"] == [1] and card["layers_pattern"] == [pattern]
    for wrong in (2, -3):
        with pytest.raises(ConfigError, match=f"adapter.layers names {wrong}"):
            attach_adapter(model, "C3", AdapterConfig(rank=2, layers=(wrong,)), seed=0)


def test_entries_keep_their_ids() -> None:
    """What came with the variants takes no part in the recipe of a plain LoRA."""
    plain = LiftConfig().recipe()["adapter"]
    assert plain == {
        "kind": "lora", "rank": 32, "alpha": 64.0, "dropout": 0.0, "initialization": "kaiming",
        "target_modules": "all-linear",
    }  # fmt: skip
    assert (
        load_config(None, ["adapter.prefix.tokens=9", "adapter.gated_memory.start=authors"]).recipe()["adapter"]
        == plain
    )
    assert load_config(None, ["adapter.kind=full", "adapter.rank=9", "adapter.dora=true"]).recipe()["adapter"] == {
        "kind": "full"
    }
    assert load_config(None, ["adapter.dora=true", "adapter.layers=[0,-1]"]).recipe()["adapter"] == plain | {
        "dora": True, "layers": [0, -1]
    }  # fmt: skip
    gated = load_config(None, ["adapter.kind=gated-memory", "adapter.rank=9"]).recipe()["adapter"]
    assert gated == {"kind": "gated-memory", "gated_memory": {"start": "base"}}
    prefix = load_config(None, ["adapter.kind=prefix", "adapter.layers=[1]"]).recipe()["adapter"]
    assert prefix == {
        "kind": "prefix", "prefix": {"tokens": 256, "source": "beginning", "frozen_tokens": 1}, "layers": [1]
    }  # fmt: skip
