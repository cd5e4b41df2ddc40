"""Linear layers and norms of a network, laid out once for products with few rows. What `decoding` is made of.

oneDNN lays a weight out anew at every product with few rows, which takes longer than the product. PyTorch has operations for
weights that are laid out before (torch.compile uses them for frozen ones); where those are not, plain products are taken.
Knows nothing of how a network puts layers together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
ROWS = 4  # at least: oneDNN's product for one row reads the weights at two thirds of the speed of the one for four


class OtherFormError(Exception):
    """Something else than plain linear layers, with a plain LoRA or none."""


def base_layer(layer: Any) -> Any:
    """The layer itself, below what PEFT put around it."""
    return getattr(layer, "base_layer", layer)


def check_form(block: Any, besides: AbstractSet[str] = frozenset()) -> None:
    """Raises OtherFormError unless a decoder layer has the parts that Llama's has; besides: what its attention may have too."""
    parts = (block, _LAYER), (block.self_attn, _ATTENTION | besides), (block.mlp, _MLP)
    if any(not {name for name, _ in module.named_children()} <= names for module, names in parts):
        raise OtherFormError
    if not isinstance(block.mlp.act_fn, torch.nn.SiLU) and type(block.mlp.act_fn).__name__ != "SiLUActivation":
        raise OtherFormError


@dataclass(frozen=True)
class Change:
    """A LoRA beside a product, with its scale."""

    down: Tensor
    up: Tensor
    packed: bool

    @classmethod
    def of(cls, down: Tensor, up: Tensor) -> Change:
        """(ranks, in) and (out, ranks)."""
        packed = _can_pack(down.dtype)
        if packed:
            down, up = (torch.ops.mkldnn._reorder_linear_weight(each.contiguous(), ROWS) for each in (down, up))
        return cls(down, up, packed)

    def added(self, x: Tensor, given: Tensor) -> Tensor:
        if self.packed:
            low = torch.ops.mkldnn._linear_pointwise.default(x, self.down, None, "none", [], "")
            both: Tensor = torch.ops.mkldnn._linear_pointwise.binary(low, given, self.up, None, "add")
            return both
        return given.addmm_(x.mm(self.down.T), self.up.T)


@dataclass(frozen=True)
class Product:
    """The weights of one or several linear layers with the same input, one on top of the other."""

    weight: Tensor
    bias: Tensor | None
    packed: bool

    @classmethod
    def of(cls, layers: Sequence[Any]) -> Product:
        bases = [base_layer(layer) for layer in layers]
        weight = torch.cat([base.weight.detach() for base in bases]) if len(bases) > 1 else bases[0].weight.detach()
        biases = [base.bias for base in bases]
        if any(bias is None for bias in biases) != all(bias is None for bias in biases):
            raise OtherFormError
        bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        packed = _can_pack(weight.dtype)
        if packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        return cls(weight, bias, packed)

    def __call__(self, x: Tensor, change: Change | None, after: str = "none") -> Tensor:
        """(rows, in) → (rows, out), then `after`: none or swish."""
        if change is None and self.packed:
            given: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, after, [], "")
            return given
        if self.packed:
            given = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        else:
            given = linear(x, self.weight, self.bias)
        if change is not None:
            given = change.added(x, given)
        return torch.nn.functional.silu(given, inplace=True) if after == "swish" else given

    def joined(self, x: Tensor, other: Tensor, change: Change | None, how: str) -> Tensor:
        """The product plus (`add`) or times (`mul`) another tensor of its shape."""
        if change is None and self.packed:
            given: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, how)
            return given
        given = self(x, change)
        return given.add_(other) if how == "add" else given.mul_(other)


@dataclass(frozen=True)
class Norm:
    """x over the root of its mean square, times a weight.

    That is the layer norm of x followed by -x, whose mean is 0. PyTorch has one operation for a layer norm, and makes a
    dozen of an RMS norm.
    """

    weight: Tensor  # twice
    eps: float

    @classmethod
    def of(cls, norm: Any) -> Norm:
        weight = norm.weight.detach()
        return cls(torch.cat([weight, weight]), float(norm.variance_epsilon))

    def __call__(self, x: Tensor) -> Tensor:
        both = layer_norm(torch.cat([x, -x], -1), self.weight.shape, self.weight, None, self.eps)
        return both.narrow(-1, 0, x.shape[-1])


@functools.cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether PyTorch has oneDNN's products for weights that are laid out before."""
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(2, 2, dtype=dtype), ROWS)
        torch.ops.mkldnn._linear_pointwise(torch.ones(ROWS, 2, dtype=dtype), weight, None, "swish", [], "")
    except (AttributeError, RuntimeError):
        return False
    return dtype in (torch.float32, torch.bfloat16)
