"""A linear layer with LoRA as one operation: PEFT's own layer where it is slow, and that layer itself everywhere else.

PEFT adds `scale * B(A(x))` to the layer's output in three passes over it, forward and backward, and autograd keeps what they
leave. Here both products go into the output in place (BLAS adds while it multiplies), which is the same sum in another
order of rounding. Knows nothing of models: PEFT puts the layer in (`LoraConfig._register_custom_module`).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor


class FusedLinear(Linear):  # type: ignore[misc]  # PEFT has no types
    """PEFT's layer; saved, merged, scaled and switched by PEFT."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(…, in features) → (…, out features)."""
        name = None if args or kwargs else self.alone(x)
        if name is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base: Any = self.base_layer
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        fused: Tensor = _LoraProduct.apply(x, base.weight, base.bias, down, up, self.scaling[name])  # type: ignore[no-untyped-call]
        return fused

    def alone(self, x: Tensor) -> str | None:
        """The adapter that is on beside the weights, if it is a single plain LoRA in the number format of weights and x."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant or self.lora_bias[active[0]]:
            return None
        (name,) = active
        weight, down, up = self.base_layer.weight, self.lora_A[name].weight, self.lora_B[name].weight
        if any(type(matrix) is not torch.nn.Parameter for matrix in (weight, down, up)) or weight.dtype != x.dtype:
            return None  # sharded or quantised, or of mixed precision
        if self.base_layer.weight.requires_grad or torch.is_autocast_enabled(x.device.type):
            return None
        dropout = self.lora_dropout[name]
        return name if isinstance(dropout, torch.nn.Identity) or not dropout.training else None


def fuse_linear(target: torch.nn.Module, adapter_name: str, config: Any, **options: Any) -> FusedLinear | None:
    """What PEFT calls to replace a layer; None (for subclasses of Linear, such as quantised ones) leaves it to PEFT."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return FusedLinear(target, adapter_name, config=config, **options) if type(base) is torch.nn.Linear else None


class _LoraProduct(torch.autograd.Function):
    """y = x W' + bias + scale * (x A') B', for a frozen W.

    x (…, in), W (out, in), A (rank, in), B (out, rank). A and B may be wider than x and W (float32 weights of an adapter on
    a bfloat16 network): they are multiplied in x's number format, as under autocast, and get gradients in their own.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.formats = down.dtype, up.dtype
        down, up = down.to(x.dtype), up.to(x.dtype)
        low = rows.mm(down.T)
        result = torch.nn.functional.linear(rows, weight, bias).addmm_(low, up.T, alpha=scale)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, low, weight, down, up = ctx.saved_tensors
        need_x, _, _, need_down, need_up, _ = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = grad.mm(up).mul_(ctx.scale)
        grad_x = grad.mm(weight).addmm_(grad_low, down).view(ctx.shape) if need_x else None
        grad_down = grad_low.T.mm(rows).to(ctx.formats[0]) if need_down else None
        grad_up = grad.T.mm(low).to(ctx.formats[1]).mul_(ctx.scale) if need_up else None
        return grad_x, None, None, grad_down, grad_up, None
