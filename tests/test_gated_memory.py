"""Gated Memory against exact attention, and everything that an adapter must do, on every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import FAMILIES, load_in_float32, make_network, make_tokenizer, save_model
from liftlm.adapters import attach_adapter, load_adapter, remove_adapter, use_adapter
from liftlm.adapters.gated_memory import GatedMemory, GatedMemoryAdapter
from liftlm.attention_calls import SEAM, AttentionCall, listening
from liftlm.config import AdapterConfig
from liftlm.errors import ConfigError
from liftlm.models import Model
from liftlm.probes import attention_sites

GATED = AdapterConfig(kind="gated-memory")
AUTHORS = AdapterConfig.model_validate({"kind": "gated-memory", "gated_memory": {"start": "authors"}})
IDS = torch.randint(5, 150, (2, 14), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiny_model(tiny_folder: Path) -> Model:
    return load_in_float32(tiny_folder)


def logits(model: Model, name: str | None, **inputs: Any) -> Tensor:
    with torch.no_grad(), use_adapter(model, name):
        return model.network(**({"input_ids": IDS} | inputs)).logits.clone()


def shake(model: Model, name: str, size: float = 0.3) -> None:
    """Weights as after much training."""
    draw = torch.Generator().manual_seed(7)
    for parameter in model.adapters[name].parameters().values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * size)


# --- where queries are found ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_before_rotary_are_found(family: str) -> None:
    """What the network's own attention is given at every position, turned back by hand, is what was found."""
    network = make_network(family, 320)
    sites = attention_sites(network)
    expected = {
        "phi3": "qkv_proj",
        "gpt-neox": "query_key_value",
        "gpt2": "c_attn",
        "qwen3": "q_norm",
        "gemma3": "q_norm",
    }
    assert [site.source for site in sites] == [expected.get(family, "q_proj")] * 2
    assert [site.rotates for site in sites] == [family != "gpt2"] * 2
    given: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(f"{site.path}.{site.source}").register_forward_hook(
            lambda module, inputs, output, site=site: given.__setitem__(site.path, site.read(output))
        )
        for site in sites
    ]
    calls: list[AttentionCall] = []
    with torch.no_grad(), listening(network, calls.append):
        # every token at position 0, where rotary embedding is nothing: positions 1 to 13 are checked as well
        network(input_ids=IDS, position_ids=torch.zeros_like(IDS))
    for hook in hooks:
        hook.remove()
    for call, site in zip(calls, sites, strict=True):
        torch.testing.assert_close(given[site.path], call.query.transpose(1, 2))


@pytest.mark.parametrize("kind", ["gated-memory", "prefix"])
def test_a_network_without_such_attention_is_refused(kind: str, tmp_path: Path) -> None:
    import transformers

    tokenizer = make_tokenizer()
    config = transformers.MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_in_float32(tmp_path)
    config = AdapterConfig.model_validate({"kind": kind})
    with pytest.raises(ConfigError, match="transformers' attention interface"):
        attach_adapter(model, "A1", config, 0, tokens=range(20))
    assert not model.adapters


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_the_base_model_and_the_authors_start_does_not(family: str, tmp_path: Path) -> None:
    model = load_in_float32(save_model(tmp_path / "m", family))
    base = logits(model, None)
    attach_adapter(model, "ours", GATED, seed=1)
    assert (logits(model, "ours") - base).abs().max() < 1e-3
    attach_adapter(model, "theirs", AUTHORS, seed=1)
    changed = (logits(model, "theirs") - base).abs().max()
    assert changed > 1e-3
    gates: list[Tensor] = []
    for layer in (module for module in model.network.modules() if isinstance(module, GatedMemory)):
        if layer.yields is None:
            queries = torch.randn(1, 50, *layer.memory_up.shape[::2])
            gates.append(layer.remember(None, queries)[1])  # type: ignore[arg-type]
    assert len(gates) == 2 and all(0.01 < float(gate.mean()) < 0.15 for gate in gates), "sigmoid(-3) is 0.047"


def test_shapes_are_the_authors(tiny_model: Model) -> None:
    shapes = {name: tuple(p.shape) for name, p in attach_adapter(tiny_model, "A1", AUTHORS, 0).parameters().items()}
    own = {name.rpartition(".")[2]: shape for name, shape in shapes.items()}
    assert own == {
        "memory_up": (4, 32, 16), "memory_up_bias": (4, 32, 1), "memory_down": (4, 16, 32), "memory_down_bias": (4, 16, 1),
        "gate_up": (4, 4, 16), "gate_up_bias": (4, 4, 1), "gate_down": (4, 1, 4), "gate_down_bias": (4, 1, 1),
    }  # fmt: skip
    assert len(shapes) == 16


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_the_formula_by_plain_layers() -> None:
    """One head at a time with torch.nn.Linear."""
    layer = GatedMemory(3, 9, 5, "authors", torch.Generator().manual_seed(0))
    queries, attention = torch.randn(2, 4, 3, 9), torch.randn(2, 4, 3, 5)

    def nothing(*arguments: Any, **options: Any) -> tuple[Tensor, None]:
        return attention, None

    call = AttentionCall(torch.nn.Module(), *[torch.zeros(1)] * 3, None, {}, nothing)
    mixed, _ = layer(call, queries, 1.0)
    for head in range(3):
        parts = {}
        for name, sizes in {"memory": (9, 18, 5), "gate": (9, 3, 1)}.items():
            up, down = torch.nn.Linear(sizes[0], sizes[1]), torch.nn.Linear(sizes[1], sizes[2])
            for part, linear in (("up", up), ("down", down)):
                linear.weight.data = getattr(layer, f"{name}_{part}")[head]
                linear.bias.data = getattr(layer, f"{name}_{part}_bias")[head, :, 0]
            parts[name] = down(torch.nn.functional.silu(up(queries[:, :, head])))
        gate = torch.sigmoid(3 * (parts["gate"] - 1))
        torch.testing.assert_close(mixed[:, :, head], (1 - gate) * attention[:, :, head] + gate * parts["memory"])


class ExactMemory(GatedMemory):
    """What the memory module approximates, computed: attention to the keys outside the window, and their share of the softmax."""

    outside: tuple[Tensor, Tensor]

    def remember(self, call: AttentionCall, queries: Tensor) -> tuple[Tensor, Tensor]:
        repeat = call.query.shape[1] // call.key.shape[1]
        keys, values, inside = (x.repeat_interleave(repeat, 1) for x in (*self.outside, call.key))
        scale = call.options["scaling"]
        past = call.query @ keys.transpose(2, 3) * scale
        near = call.query @ inside.transpose(2, 3) * scale
        near = near.masked_fill(torch.ones_like(near[0, 0], dtype=torch.bool).triu(1), float("-inf"))
        share = torch.sigmoid(past.logsumexp(-1, keepdim=True) - near.logsumexp(-1, keepdim=True))
        return (past.softmax(-1) @ values).transpose(1, 2), share.transpose(1, 2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt-neox", "gpt2", "granite"])
def test_with_the_exact_memory_it_is_attention_over_the_whole_document(family: str, tmp_path: Path) -> None:
    """out = g · memory + (1 - g) · in-context, to 1e-5, in every layer and at every token of the window."""
    model = load_in_float32(save_model(tmp_path / "m", family))
    document = torch.randint(5, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    cut = 25  # tokens that have left the window
    calls: list[AttentionCall] = []
    with torch.no_grad(), listening(model.network, calls.append):
        whole = model.network(input_ids=document).logits[:, cut:]
    attach_adapter(model, "A1", AUTHORS, 0)
    paths = {module: path for path, module in model.network.named_modules()}
    for call in calls:
        layer = model.network.get_submodule(f"{paths[call.module]}.{SEAM}").layers["A1"]  # type: ignore[union-attr,operator]
        layer.__class__ = ExactMemory
        layer.outside = (call.key[:, :, :cut], call.value[:, :, :cut])
    positions = torch.arange(cut, 40)[None]
    window = logits(model, "A1", input_ids=document[:, cut:], position_ids=positions)
    torch.testing.assert_close(window, whole, rtol=1e-5, atol=1e-5)
    alone = logits(model, None, input_ids=document[:, cut:], position_ids=positions)
    assert (alone - whole).abs().max() > 0.01, "what is outside the window matters"


@pytest.mark.parametrize("config", [GATED, AUTHORS], ids=["base", "authors"])
def test_gradients_by_differences(config: AdapterConfig, tmp_path: Path) -> None:
    """In float64, through a whole network that computes in it (Llama's norms are float32 always)."""
    model = load_in_float32(save_model(tmp_path / "m", "gpt-neox"))
    model.network.double()
    attached = attach_adapter(model, "A1", config, 0)
    for layer in attached._layers.values():  # type: ignore[attr-defined]
        layer.double()
    shake(model, "A1")
    tokens = IDS[:, :6]
    with use_adapter(model, "A1", training=True):

        def loss() -> Tensor:
            hidden = model.network.base_model(input_ids=tokens, use_cache=False)[0]
            return (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=torch.float64).view_as(hidden)).sum()

        loss().backward()
        for name, parameter in attached.parameters().items():
            assert parameter.grad is not None
            flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
            index = int(gradient.abs().argmax())
            kept, step = float(flat[index]), 1e-5
            values = []
            with torch.no_grad():
                for at in (kept + step, kept - step):
                    flat[index] = at
                    values.append(float(loss()))
            flat[index] = kept
            assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient[index]), rel=1e-5), name


# --- as any adapter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_and_padding_change_nothing(family: str, tmp_path: Path) -> None:
    """Token by token with a cache, and beside a longer prompt, the adapter says what it says of the whole at once."""
    model = load_in_float32(save_model(tmp_path / "m", family))
    attach_adapter(model, "A1", GATED, 0)
    shake(model, "A1")
    whole = logits(model, "A1", input_ids=IDS[:1])
    assert (whole - logits(model, None, input_ids=IDS[:1])).abs().max() > 0.01
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1]], 1)
    mask = torch.tensor([[0] * 3 + [1] * IDS.shape[1]])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    got = logits(model, "A1", input_ids=padded, attention_mask=mask, position_ids=positions)[:, 3:]
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), use_adapter(model, "A1"):
        first = model.network(input_ids=IDS[:1, :9], use_cache=True)
        rest = []
        cache = first.past_key_values
        for index in range(9, IDS.shape[1]):
            rest.append(
                model.network(input_ids=IDS[:1, index : index + 1], past_key_values=cache, use_cache=True).logits
            )
    torch.testing.assert_close(torch.cat(rest, 1), whole[:, 9:], rtol=1e-4, atol=1e-4)


def test_strength_goes_from_the_base_model_to_all_of_it(tiny_model: Model) -> None:
    base = logits(tiny_model, None)
    attach_adapter(tiny_model, "A1", GATED, 0)
    shake(tiny_model, "A1")
    distances = []
    for strength in (0.0, 0.3, 1.0):
        with torch.no_grad(), use_adapter(tiny_model, "A1", strength=strength):
            distances.append(float((tiny_model.network(input_ids=IDS).logits - base).abs().max()))
    assert distances[0] == 0 < distances[1] < distances[2]


def test_some_layers_only(tiny_model: Model) -> None:
    config = GATED.model_copy(update={"layers": (-1,)})
    names = attach_adapter(tiny_model, "A1", config, 0).parameters()
    assert {name.rpartition(".")[0] for name in names} == {"model.layers.1.self_attn"}
    with pytest.raises(ConfigError, match=r"names 2, and .* has 2 layers"):
        attach_adapter(tiny_model, "B2", GATED.model_copy(update={"layers": (2,)}), 0)


def test_beside_a_lora_and_before_one(tiny_folder: Path) -> None:
    """PEFT wraps the layer that gives the queries, before or after the hook is there."""
    results = []
    for order in (("gated", "lora"), ("lora", "gated")):
        model = load_in_float32(tiny_folder)
        for kind in order:
            attach_adapter(model, kind, GATED if kind == "gated" else AdapterConfig(rank=2), 0)
        shake(model, "gated")
        results.append(logits(model, "gated"))
        assert len(model.adapters["lora"].parameters()) == 2 * 2 * 7, "LoRA leaves the memory alone"
        remove_adapter(model, "lora")
        assert torch.equal(logits(model, "gated"), results[-1])
    assert torch.equal(*results)


def test_nothing_is_left_when_it_is_removed(tiny_model: Model) -> None:
    attach_adapter(tiny_model, "A1", GATED, 0)
    attach_adapter(tiny_model, "B2", GATED, 0)
    assert any(SEAM in name for name, _ in tiny_model.network.named_modules())
    remove_adapter(tiny_model, "A1")
    shake(tiny_model, "B2")
    logits(tiny_model, "B2")
    remove_adapter(tiny_model, "B2")
    assert not any(SEAM in name for name, _ in tiny_model.network.named_modules())
    assert not any(module._forward_hooks for module in tiny_model.network.modules())


def test_files(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_in_float32(tiny_folder)
    for name, config in (("A1", GATED), ("B2", AUTHORS)):
        attached = attach_adapter(model, name, config, 0)
        shake(model, name)
        (tmp_path / name).mkdir()
        attached.write(tmp_path / name, attached.tensors())
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "lift_adapter.json",
            "lift_adapter.safetensors",
        ]
        other = load_in_float32(tiny_folder)
        assert isinstance(load_adapter(other, "C3", tmp_path / name), GatedMemoryAdapter)
        assert torch.equal(logits(other, "C3"), logits(model, name))
    card = json.loads((tmp_path / "A1" / "lift_adapter.json").read_text())
    assert card == {
        "format": 1, "kind": "gated-memory", "start": "base",
        "layers": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
    }  # fmt: skip
    for damage, message in (("{", "describes no adapter"), ('{"format": 9, "kind": "x"}', "newer version")):
        (tmp_path / "A1" / "lift_adapter.json").write_text(damage)
        with pytest.raises(ConfigError, match=message):
            load_adapter(model, "D4", tmp_path / "A1")
    (tmp_path / "A1" / "lift_adapter.json").write_text('{"format": 1, "kind": "x"}')
    with pytest.raises(ConfigError, match="unknown kind 'x'"):
        load_adapter(model, "D4", tmp_path / "A1")
