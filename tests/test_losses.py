"""The chunked loss against PyTorch's cross-entropy, `Model.loss_sum` against transformers' own loss of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import FAMILIES, save_model
from liftlm import load_model, losses
from liftlm.losses import next_token_loss

PLAIN_HEADS = sorted(set(FAMILIES) - {"granite"})


def reference(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def inputs(count: int, size: int, vocabulary: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """hidden, weight, bias, labels."""
    generator = torch.Generator().manual_seed(count * 1000 + vocabulary)
    shapes = [(count, size), (vocabulary, size), (vocabulary,)]
    made = [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in shapes]
    return [*made, torch.randint(vocabulary, (count,), generator=generator)]


def value_and_gradients(loss: Any, leaves: list[Tensor], factor: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    value = loss(*leaves)
    return value, torch.autograd.grad(value * factor, leaves)


@settings(deadline=None)
@given(
    count=st.integers(1, 9),
    vocabulary=st.integers(2, 12),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    elements=st.sampled_from([1, 7, 24, 1 << 24]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    factor=st.sampled_from([1.0, -0.37, 1024.0]),
)
def test_value_and_gradients_equal_cross_entropy(
    count: int, vocabulary: int, bias: bool, softcap: float | None, elements: int, dtype: torch.dtype, factor: float
) -> None:
    *leaves, labels = inputs(count, 5, vocabulary, dtype, scale=2.0)
    leaves = [leaf.requires_grad_() for leaf in (leaves if bias else leaves[:2])]

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return next_token_loss(hidden, labels, weight, bias, softcap)

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference(hidden, labels, weight, bias, softcap)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_CHUNK_ELEMENTS", elements)
        value, gradients = value_and_gradients(ours, leaves, factor)
    expected, wanted = value_and_gradients(theirs, leaves, factor)
    assert value.dtype == torch.float32 and value.shape == ()
    # inside, everything is float32, so float64 inputs agree to float32's precision too
    torch.testing.assert_close(value.to(dtype), expected, rtol=1e-5, atol=1e-5)
    for gradient, correct in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, correct, rtol=1e-4, atol=2e-5 * abs(factor))


def test_gradients_equal_differences_of_the_loss() -> None:
    """A reference without autograd: central differences, in the float32 that the loss computes in."""
    hidden, weight, bias, labels = inputs(3, 4, 6, torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]

    def loss(*values: Tensor) -> Tensor:
        return next_token_loss(values[0], labels, values[1], values[2], softcap=5.0).double()

    assert torch.autograd.gradcheck(loss, leaves, eps=1e-2, atol=1e-3, rtol=1e-3, check_batched_grad=False)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_wanted_gradients_are_made(wanted: tuple[bool, ...]) -> None:
    *leaves, labels = inputs(6, 5, 9, torch.float32)
    leaves = [leaf.requires_grad_(want) for leaf, want in zip(leaves, wanted, strict=True)]
    hidden, weight, bias = leaves
    next_token_loss(hidden, labels, weight, bias).backward()
    copies = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
    reference(copies[0], labels, copies[1], copies[2]).backward()
    for leaf, copy in zip(leaves, copies, strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, copy.grad, rtol=1e-4, atol=1e-6)
        else:
            assert leaf.grad is None


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, weight, bias, labels = inputs(6, 5, 9, torch.float32)
    value = next_token_loss(hidden, labels, weight, bias)
    assert not value.requires_grad
    torch.testing.assert_close(value, reference(hidden, labels, weight, bias))


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, bias, labels = inputs(6, 5, 9, torch.float32, scale=200.0)
    hidden.requires_grad_()
    value = next_token_loss(hidden, labels, weight, bias)
    value.backward()
    assert value.isfinite() and hidden.grad is not None and hidden.grad.isfinite().all()
    torch.testing.assert_close(value, reference(hidden, labels, weight, bias), rtol=1e-4, atol=1.0)


def test_no_positions_no_loss() -> None:
    hidden, weight, bias, labels = inputs(0, 5, 9, torch.float32)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    value = next_token_loss(hidden, labels, weight, bias)
    value.backward()
    assert value == 0
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)
    assert hidden.grad is not None and hidden.grad.shape == (0, 5)


@pytest.mark.parametrize("elements", [40, 1 << 24])
def test_bfloat16_is_as_near_the_truth_as_pytorch(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", elements)
    hidden, weight, bias, labels = inputs(40, 16, 30, torch.bfloat16)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def naive(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight, bias).float()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    value, ours = value_and_gradients(lambda h, w, b: next_token_loss(h, labels, w, b), leaves, 0.3)
    rounded, theirs = value_and_gradients(naive, leaves, 0.3)
    expected, truth = value_and_gradients(lambda h, w, b: reference(h, labels, w, b), exact, 0.3)
    assert value.dtype == torch.float32
    assert abs(value - expected) <= 1.5 * abs(rounded - expected) + 1e-3
    for gradient, other, correct in zip(ours, theirs, truth, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - correct).norm() <= 1.5 * (other.double() - correct).norm() + 1e-6


# --- of whole models --------------------------------------------------------------------------------------------------


def batch_of(vocabulary: int, lengths: list[int], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random ids padded on the right, labels with some positions left out, and the mask that transformers wants."""
    generator = torch.Generator().manual_seed(5)
    longest = max(lengths)
    tokens = torch.randint(vocabulary, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    tokens[~mask] = pad
    labels = tokens.masked_fill(~mask, -100)
    labels[:, 3:6] = -100
    return tokens, labels, mask.long()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_sum_equals_transformers_loss(family: str, tmp_path: Path) -> None:
    model = load_model(str(save_model(tmp_path / "m", family)))
    for lengths in ([50], [50, 31, 8]):  # longer than the sliding window of 24
        tokens, labels, mask = batch_of(model.network.config.vocab_size, lengths, model.tokenizer.pad_token_id)
        mean = model.network(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss
        count = int((labels[:, 1:] != -100).sum())
        torch.testing.assert_close(model.loss_sum(tokens, labels), mean * count, rtol=1e-5, atol=1e-4)
    assert model._plain_head is (family != "granite"), "which families take the fused path"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_loss_sum_equal_transformers(family: str, tmp_path: Path) -> None:
    model = load_model(str(save_model(tmp_path / "m", family)))
    tokens, labels, mask = batch_of(model.network.config.vocab_size, [30, 17], model.tokenizer.pad_token_id)
    count = int((labels[:, 1:] != -100).sum())
    parameters = dict(model.network.requires_grad_(True).named_parameters())
    ours = torch.autograd.grad(model.loss_sum(tokens, labels) / count, list(parameters.values()))
    theirs = torch.autograd.grad(
        model.network(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss,
        list(parameters.values()),
    )
    for name, gradient, correct in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(
            gradient, correct, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_loss_sum_in_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(save_model(tmp_path / "m", "gemma2")))
    tokens, labels, _ = batch_of(model.network.config.vocab_size, [40, 22], model.tokenizer.pad_token_id)
    whole = model.loss_sum(tokens, labels)
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 3 * model.network.config.vocab_size)
    torch.testing.assert_close(model.loss_sum(tokens, labels), whole)


def test_loss_sum_of_a_batch_without_labels_is_zero(tiny_model: Any) -> None:
    """What a process without work of its own computes, so that all processes take part in the exchange."""
    tiny_model.network.requires_grad_(True)
    loss = tiny_model.loss_sum(torch.tensor([[5, 6]]), torch.tensor([[-100, -100]]))
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in tiny_model.network.parameters())
