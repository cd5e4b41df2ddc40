"""A decoder layer as one operation has the gradients of transformers and autograd; what it does not cover is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FAMILIES, save_model
from liftlm import layers as module
from liftlm import load_config, load_model
from liftlm.adapters import attach_adapter, use_adapter
from liftlm.examples import Example
from liftlm.layers import fast_layers
from liftlm.memory import predict_memory
from liftlm.models import Model
from liftlm.probes import owner_mask

WRITTEN_OUT = {"llama", "llama-untied", "mistral-sliding"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each layer that was computed as one operation."""
    made: list[int] = []
    original = module._DecoderLayer.apply
    monkeypatch.setattr(module._DecoderLayer, "apply", lambda *inputs: made.append(1) or original(*inputs))
    return made


def adapted(folder: Path, family: str = "llama", *settings: str) -> Model:
    """With a LoRA whose matrices are all random."""
    model = load_model(str(save_model(folder / family, family)))
    attach_adapter(model, "a", load_config(None, ["adapter.rank=3", *settings]).adapter, 0)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.adapters["a"].parameters().values():
        parameter.data.normal_(0, 0.1, generator=draw)
    return model


def batch(rows: int = 2, tokens: int = 40) -> torch.Tensor:
    return torch.randint(5, 150, (rows, tokens), generator=torch.Generator().manual_seed(0))


def gradients(model: Model, *inputs: Any) -> list[torch.Tensor]:
    """The loss, and the gradient of every matrix."""
    trained = list(model.adapters["a"].parameters().values())
    for parameter in trained:
        parameter.grad = None
    loss = model.loss_sum(*inputs)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in trained if parameter.grad is not None)]


def check(model: Model, *inputs: Any) -> None:
    with use_adapter(model, "a", training=True):
        expected = gradients(model, *inputs)
        with fast_layers(model.network):
            got = gradients(model, *inputs)
    assert len(got) == len(expected) > 1
    for mine, other in zip(got, expected, strict=True):
        assert (mine - other).norm() <= 1e-3 * other.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_gradients_it_has_without(family: str, tmp_path: Path, calls: list[int]) -> None:
    model = adapted(tmp_path, family)
    check(model, batch(), batch())
    if family in WRITTEN_OUT:
        assert len(calls) >= 2
    else:
        assert not calls


@pytest.mark.parametrize(
    "setting",
    ["adapter.target_modules=[q_proj, v_proj]", "adapter.target_modules=[down_proj]", "adapter.layers=[1]"],
)
def test_where_only_some_layers_have_a_lora(setting: str, tmp_path: Path, calls: list[int]) -> None:
    check(adapted(tmp_path, "llama", setting), batch(), batch())
    assert calls


def test_biases_are_added(tmp_path: Path, calls: list[int]) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = save_model(tmp_path / "m", "llama")
    config = LlamaConfig.from_pretrained(folder)
    config.attention_bias = config.mlp_bias = True
    network = AutoModelForCausalLM.from_config(config)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    network.save_pretrained(folder)
    model = load_model(str(folder))
    attach_adapter(model, "a", load_config(None, ["adapter.rank=3"]).adapter, 0)
    check(model, batch(), batch())
    assert calls


def test_a_packed_row_and_one_that_is_padded(tmp_path: Path, calls: list[int]) -> None:
    model = adapted(tmp_path)
    owner = torch.tensor([0] * 4 + [1] * 9 + [2] * 11)
    positions = torch.cat([torch.arange(4), torch.arange(4, 13), torch.arange(4, 15)])[None]
    check(model, batch(1, 24), batch(1, 24), positions, owner_mask(owner, torch.float32))
    labels = batch()
    labels[1, 25:] = -100
    check(model, batch(), labels)
    assert calls


def test_activations_computed_again(tmp_path: Path, calls: list[int]) -> None:
    model = adapted(tmp_path)
    model.recompute_activations(True)
    model.network.train()
    check(model, batch(), batch())
    assert not calls, "transformers does that, this would keep them"
    assert not predicts_little(model, "training.gradient_checkpointing=true")


def predicts_little(model: Model, *settings: str) -> bool:
    """Whether fewer bytes a token are predicted than for layers that autograd walks through."""
    config = load_config(None, [*settings, "training.batch_tokens=4000"])
    rows = [Example((7,) * 2000, (7,) * 2000)] * 2
    with pytest.MonkeyPatch.context() as patch:
        found = [predict_memory(model, model.adapters["a"].parameters(), rows, config.training)]
        patch.setattr("liftlm.memory.keeps_little", lambda network: False)
        found.append(predict_memory(model, model.adapters["a"].parameters(), rows, config.training))
    return found[0] < found[1]


def test_less_memory_is_predicted_where_less_is_kept(tmp_path: Path) -> None:
    model = adapted(tmp_path)
    assert predicts_little(model)
    with use_adapter(model, "a", training=True), fast_layers(model.network):
        assert predicts_little(model), "inside, as training asks"
    assert not predicts_little(adapted(tmp_path / "g", "granite"))
    assert not predicts_little(adapted(tmp_path / "d", "llama", "adapter.dropout=0.5"))


def test_a_lora_that_is_off_is_not_added(tmp_path: Path, calls: list[int]) -> None:
    model = adapted(tmp_path)
    states = torch.randn(1, 9, model.network.config.hidden_size).requires_grad_()
    with use_adapter(model, None):
        expected = model.network.base_model(inputs_embeds=states, use_cache=False)[0]
        with fast_layers(model.network):
            calls.clear()
            got = model.network.base_model(inputs_embeds=states, use_cache=False)[0]
    assert calls
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_covered_is_left_to_transformers(tmp_path: Path, calls: list[int]) -> None:
    model = adapted(tmp_path, "llama", "adapter.dropout=0.5")
    with use_adapter(model, "a", training=True), fast_layers(model.network):
        calls.clear()  # it was tried at first
        model.network.train()
        gradients(model, batch(), batch())
        assert not calls, "dropout in the LoRA"
        model.network.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gradients(model, batch(), batch())
        with torch.no_grad():
            model.loss_sum(batch(), batch())
        model.network.generate(batch(1, 5), max_new_tokens=3)
        assert not calls
        gradients(model, batch(), batch())
        assert calls, "no dropout where it is off"
    calls.clear()
    gradients_before = [layer.__dict__.get("forward") for layer in model.network.base_model.layers]
    assert gradients_before == [None, None], "transformers' own again"


def test_all_weights_are_trained_by_autograd(tiny_folder: Path, calls: list[int]) -> None:
    model = load_model(str(tiny_folder))
    attach_adapter(model, "a", load_config(None, ["adapter.kind=full"]).adapter, 0)
    check(model, batch(), batch())
    assert not calls


def test_layers_that_give_something_else_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tmp_path)
    layers = model.network.base_model.layers
    plain = type(layers[0].mlp).forward
    monkeypatch.setattr(type(layers[0].mlp), "forward", lambda self, x: 2 * plain(self, x))
    with use_adapter(model, "a", training=True), fast_layers(model.network):
        assert all("forward" not in layer.__dict__ for layer in layers)


def test_someone_who_listens_inside_a_layer_is_heard(tmp_path: Path, calls: list[int]) -> None:
    model = adapted(tmp_path)
    heard = []
    model.network.base_model.layers[0].mlp.register_forward_hook(lambda *given: heard.append(1))
    check(model, batch(), batch())
    assert heard and not calls


def test_less_is_kept_for_the_backward_pass(tmp_path: Path) -> None:
    """Counted, not timed: numbers that autograd holds of a layer, for each token and hidden size."""
    model = adapted(tmp_path)
    ids = batch(1, 128)

    def kept() -> int:
        held: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.numel() % ids.numel() == 0 and not isinstance(tensor, torch.nn.Parameter):
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model.loss_sum(ids, ids)
        loss.backward()
        return sum(held.values())

    with use_adapter(model, "a", training=True):
        plain = kept()
        with fast_layers(model.network):
            assert kept() < 0.75 * plain
