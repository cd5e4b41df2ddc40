"""Attention for training equals PyTorch's own, forward and backward, with and without masks, shared key heads and kept shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FAMILIES, has_quick_bfloat16, save_model
from liftlm import attention, load_model
from liftlm.attention import fast_attention
from liftlm.probes import owner_mask


def tensors(heads: int, groups: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query, key, value, and a gradient of the output."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(2, heads, tokens, 8), (2, groups, tokens, 8), (2, groups, tokens, 8), (2, heads, tokens, 8)]
    return tuple(torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)


def reference(query: Any, key: Any, value: Any, mask: Any) -> torch.Tensor:
    """Scores, softmax, sum: written out, in float64."""
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1) @ value


def masks(tokens: int) -> dict[str, torch.Tensor | None]:
    owner = torch.tensor([0] * 3 + [1] * 5 + [2] * (tokens - 8))
    window = torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(-6)[None, None]
    return {"causal": None, "packed": owner_mask(owner, torch.float32), "window": window}


@pytest.mark.parametrize("kind", ["causal", "packed", "window"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_values_and_gradients(kind: str, heads: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_ROWS", 48)  # several blocks, the last one shorter
    query, key, value, grad = tensors(heads, groups, 53, torch.float32)
    mask = masks(53)[kind]
    ours = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    theirs = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    apply: Any = attention._BlockAttention.apply
    got = apply(*ours, mask, 8**-0.5)
    expected = reference(*theirs, mask)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    got.backward(grad)
    expected.backward(grad.double())
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None and other.grad is not None
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_shapes_that_the_kernel_takes() -> None:
    query, key, mask = torch.Size([1, 6, 5, 8]), torch.Size([1, 2, 5, 8]), torch.zeros(1, 1, 5, 5)
    assert attention.can_attend(query, key, key, None) and attention.can_attend(query, key, key, mask)
    assert not attention.can_attend(query, key, torch.Size([1, 2, 5, 4]), None), "values of another size"
    assert not attention.can_attend(query, torch.Size([1, 4, 5, 8]), torch.Size([1, 4, 5, 8]), None)
    assert not attention.can_attend(query, torch.Size([1, 2, 9, 8]), torch.Size([1, 2, 9, 8]), mask), "a cache"
    assert not attention.can_attend(query, key, key, torch.zeros(1, 6, 5, 5)), "a mask for each head"


def test_long_rows_are_taken_in_more_blocks() -> None:
    """Room for scores does not grow with the square of the length."""
    for tokens in (2048, 8192, 32768, 131072):
        row_bytes = 32 * tokens * 2
        assert attention._block(tokens, 4, row_bytes) * row_bytes <= max(64 << 20, 16 * row_bytes)
    assert attention._block(2048, 3, 9 * 2048 * 2) == 256 and attention._block(20, 3, 9 * 20 * 2) == 20


@pytest.mark.parametrize("kind", ["lowest", "infinite", "bool"])
def test_a_row_that_sees_nothing_has_no_gradient(kind: str) -> None:
    """The others are as without it."""
    query, key, value, grad = tensors(6, 2, 20, torch.float32)
    sees = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    blind = sees.clone()
    blind[..., 7, :] = False
    lowest = {"lowest": torch.finfo(torch.float32).min, "infinite": -torch.inf}
    mask = blind if kind == "bool" else torch.zeros(blind.shape).masked_fill_(~blind, lowest[kind])
    got = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    expected = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    apply: Any = attention._BlockAttention.apply
    apply(*got, mask, 8**-0.5).backward(grad)
    grad[:, :, 7] = 0
    reference(*expected, sees).backward(grad)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not has_quick_bfloat16(), reason="PyTorch's kernel for bfloat16 does not run under this capability")
def test_bfloat16_costs_less_than_two_roundings() -> None:
    query, key, value, grad = tensors(6, 2, 300, torch.bfloat16)
    truth = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    reference(*truth, None).backward(grad.double())
    apply: Any = attention._BlockAttention.apply
    ours = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    apply(*ours, None, 8**-0.5).backward(grad)
    for mine, true in zip(ours, truth, strict=True):
        assert mine.grad is not None and true.grad is not None
        assert float((mine.grad.double() - true.grad).norm() / true.grad.norm()) < 2**-7


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_gradients_it_has_without(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(save_model(tmp_path / "m", family)))
    calls = []
    original = attention._BlockAttention.apply
    monkeypatch.setattr(attention._BlockAttention, "apply", lambda *inputs: calls.append(1) or original(*inputs))
    ids = torch.randint(
        5, 150, (2, 40), generator=torch.Generator().manual_seed(0)
    )  # longer than a sliding window of 24
    parameter = next(p for name, p in model.network.named_parameters() if "layers.0" in name or "h.0" in name)

    def gradient() -> tuple[torch.Tensor, torch.Tensor]:
        parameter.requires_grad_(True)
        parameter.grad = None
        loss = model.loss_sum(ids, ids)
        loss.backward()
        assert parameter.grad is not None
        return loss.detach(), parameter.grad

    before = model.network.config._attn_implementation
    expected = gradient()
    with fast_attention(model.network):
        assert not calls
        got = gradient()
        assert bool(calls) == (before == "sdpa")
        count = len(calls)
        with torch.no_grad():
            model.network(input_ids=ids)
        assert len(calls) == count, "without a gradient PyTorch's own is as good"
    assert model.network.config._attn_implementation == before
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5)


def test_what_is_not_covered_is_left_to_pytorch(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(tiny_folder))
    parameter = next(p for name, p in model.network.named_parameters() if "layers.0" in name).requires_grad_(True)
    calls = []
    original = attention._BlockAttention.apply
    monkeypatch.setattr(attention._BlockAttention, "apply", lambda *inputs: calls.append(1) or original(*inputs))
    ids = torch.randint(5, 150, (1, 40), generator=torch.Generator().manual_seed(0))

    def run(**options: Any) -> int:
        calls.clear()
        model.network(input_ids=ids, **options).logits.sum().backward()
        assert parameter.grad is not None
        return len(calls)

    with fast_attention(model.network):
        assert run(use_cache=False) == 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert run(use_cache=False) == 0
        monkeypatch.setattr(attention, "can_attend", lambda *shapes: False)
        assert run(use_cache=False) == 0, "shapes that the kernel does not take"
    assert run(use_cache=False) == 0, "switched off again"
