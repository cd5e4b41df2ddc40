"""The fused layer is PEFT's layer: same values, same gradients, and PEFT's own code wherever it is not that simple."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear

from conftest import FAMILIES, save_model
from liftlm import load_model
from liftlm.adapters import attach_adapter, use_adapter
from liftlm.adapters import fused as fused_module
from liftlm.adapters.fused import FusedLinear
from liftlm.config import AdapterConfig, ModelConfig

IDS = torch.randint(5, 150, (2, 12), generator=torch.Generator().manual_seed(0))


class Counted:
    """Counts calls of the fused product."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        original = fused_module._LoraProduct.apply

        def apply(*arguments: Any) -> Any:
            self.calls += 1
            return original(*arguments)

        monkeypatch.setattr(fused_module._LoraProduct, "apply", apply)


@pytest.mark.parametrize("shape", [(7, 10), (2, 7, 10), (10,)])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_peft(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(10, 6, bias=bias).double()
    base.requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=5)
    theirs = Linear(copy.deepcopy(base), "one", config=config, r=3, lora_alpha=5).double()
    ours = FusedLinear(copy.deepcopy(base), "one", config=config, r=3, lora_alpha=5).double()
    torch.nn.init.normal_(theirs.lora_B["one"].weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_(True)
    weights = torch.randn(*shape[:-1], 6, dtype=torch.float64)
    expected, got = theirs(x), ours(twin)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    assert x.grad is not None and twin.grad is not None
    torch.testing.assert_close(twin.grad, x.grad, rtol=1e-12, atol=1e-12)
    for name, parameter in theirs.named_parameters():
        other = dict(ours.named_parameters())[name].grad
        assert (parameter.grad is None) == (other is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(other, parameter.grad, rtol=1e-12, atol=1e-12)


def test_gradients_by_differences() -> None:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x, down, up = (t.requires_grad_() for t in (random(4, 5), random(2, 5), random(3, 2)))
    weight, bias = random(3, 5), random(3)
    apply: Any = fused_module._LoraProduct.apply
    assert torch.autograd.gradcheck(lambda x, down, up: apply(x, weight, bias, down, up, 1.5), (x, down, up))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_as_with_peft_alone(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for fuse in (True, False):
        with monkeypatch.context() as patch:
            if not fuse:
                patch.setattr(FusedLinear, "alone", lambda self, x: None)
            counted = Counted(patch)
            model = load_model(str(save_model(tmp_path / str(fuse), family)))
            attach_adapter(model, "A1", AdapterConfig(rank=4, alpha=8), seed=0)
            attached = model.adapters["A1"]
            for parameter in attached.parameters().values():
                torch.manual_seed(parameter.numel())
                torch.nn.init.normal_(parameter, std=0.1)
            with use_adapter(model, "A1", training=True, strength=0.5):
                loss = model.loss_sum(IDS, IDS)
                loss.backward()
            assert (counted.calls > 0) == (fuse and family != "gpt2"), "GPT-2's layers are Conv1D"
            gradients.append(
                {n: p.grad.clone() for n, p in attached.parameters().items() if p.grad is not None}
                | {"loss": loss.detach()}
            )
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=2e-4, atol=2e-5, msg=name)


def test_peft_itself_where_it_is_not_so_simple(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    model = load_model(str(tiny_folder))
    attach_adapter(model, "plain", AdapterConfig(rank=2, alpha=2), seed=0)
    attach_adapter(model, "dropping", AdapterConfig(rank=2, alpha=2, dropout=0.5), seed=0)

    def run(name: str | None, training: bool = False) -> int:
        before = counted.calls
        with use_adapter(model, name, training=training):
            model.network.train(training)
            model.network(input_ids=IDS)
            model.network.eval()
        return counted.calls - before

    assert run("plain") > 0 and run("plain", training=True) > 0
    assert run(None) == 0, "the bare model"
    assert run("dropping", training=True) == 0 and run("dropping") > 0, "dropout only acts in training"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run("plain") == 0


def test_float32_lora_on_a_bfloat16_network(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplied in bfloat16, as under autocast; as near to the float32 truth as PEFT, which multiplies in float32."""
    results: list[dict[str, torch.Tensor]] = []
    for dtype, fuse in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        with monkeypatch.context() as patch:
            if not fuse:
                patch.setattr(FusedLinear, "alone", lambda self, x: None)
            counted = Counted(patch)
            model = load_model(str(tiny_folder), ModelConfig(dtype=dtype))
            attach_adapter(model, "A1", AdapterConfig(rank=4, alpha=8), seed=0)
            parameters = model.adapters["A1"].parameters()
            for parameter in parameters.values():
                torch.manual_seed(parameter.numel())
                torch.nn.init.normal_(parameter, std=0.1)
            with use_adapter(model, "A1", training=True):
                loss = model.loss_sum(IDS, IDS)
                loss.backward()
            assert (counted.calls > 0) == fuse
            gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
            assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
            results.append({"loss": loss.detach(), **gradients})
    truth, theirs, ours = (torch.cat([tensor.flatten().float() for tensor in result.values()]) for result in results)
    error, allowed = (ours - truth).norm() / truth.norm(), (theirs - truth).norm() / truth.norm()
    assert 0 < error < 1.5 * allowed + 1e-3, (error, allowed)


def test_what_is_written_is_an_ordinary_peft_folder(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_folder))
    attach_adapter(model, "A1", AdapterConfig(rank=2, alpha=2), seed=0)
    attached = model.adapters["A1"]
    assert any(type(module) is FusedLinear for module in model.network.modules())
    attached.write(tmp_path, attached.tensors())
    assert "custom" not in (tmp_path / "adapter_config.json").read_text()
    plain = get_peft_model(load_model(str(tiny_folder)).network, LoraConfig.from_pretrained(str(tmp_path)))
    assert not any(type(module) is FusedLinear for module in plain.modules())
