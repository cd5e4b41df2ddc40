"""Tensors of which each process holds a part (PyTorch's DTensor, under FSDP and tensor parallel), beside plain ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter


def whole(tensor: Tensor) -> Tensor:
    """A tensor as a single process would hold it. Under FSDP all processes must ask for it together."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def placed_like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` on the device of `parameter`, or sharded as it is."""
    mesh, placements = getattr(parameter, "device_mesh", None), getattr(parameter, "placements", None)
    if mesh is None:
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), mesh, placements)


def clip_gradients(parameters: Iterable[Parameter], most: float) -> float:
    """As `torch.nn.utils.clip_grad_norm_`, which refuses whole and divided parameters together. Returns the norm before."""
    found = list(parameters)
    if len({type(parameter.data) for parameter in found}) == 1:
        return float(whole(torch.nn.utils.clip_grad_norm_(found, most)))
    gradients = [parameter.grad for parameter in found if parameter.grad is not None]
    norm = torch.stack([whole(gradient.norm()) for gradient in gradients]).norm()
    for gradient in gradients:
        gradient.mul_(float((most / (norm + 1e-6)).clamp(max=1.0)))
    return float(norm)
