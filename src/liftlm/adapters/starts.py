"""LoRAs that begin as a part of each weight, and leave the weights as they are.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) start with A and B such that scale * B A is a part of the weight, and take
that part from it. Here the weight stays, for other adapters use it too: a second, frozen half of the LoRA subtracts that
part instead. To the function and its gradients that is the same, and what is stored loads in every program.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

TAKEN_FROM_WEIGHTS = ("pissa", "olora")


@torch.no_grad()
def begin_with_part_of_weights(network: Any, name: str, kind: str, rank: int, seed: int) -> None:
    """Fills the LoRA `name`, which is of twice the rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.modules():
            downs = getattr(module, "lora_A", None)
            if not isinstance(downs, torch.nn.ModuleDict) or name not in downs:
                continue
            down, up = module.lora_A[name].weight, module.lora_B[name].weight
            weight = module.base_layer.weight.float()
            weight = weight.T if isinstance(module.base_layer, Conv1D) else weight
            found_a, found_b = _principal(weight, rank, module.scaling[name]) if kind == "pissa" else _qr(weight, rank)
            kept = found_a.shape[0]
            a, b = weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
            a[:kept], b[:, :kept] = found_a, found_b
            down.copy_(torch.cat([a, a]))
            up.copy_(torch.cat([b, -b], 1))
            for parameter, dim in ((down, 0), (up, 1)):
                parameter.requires_grad_(True)  # off on an adapter that is off, and hooks need it
                parameter.register_hook(functools.partial(_first_half, dim=dim))
                parameter.requires_grad_(False)


def _principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """PiSSA: the largest singular values with their directions."""
    left, values, right = torch.svd_lowrank(weight, q=min(rank + 8, *weight.shape), niter=4)
    root = (values[:rank] / scale).sqrt()
    return (root * right[:, :rank]).T, root * left[:, :rank]


def _qr(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """OLoRA: orthonormal columns and what they are combined with; PEFT, too, scales the product after it."""
    orthonormal, upper = torch.linalg.qr(weight)
    return upper[:rank], orthonormal[:, :rank]


def _first_half(gradient: Tensor, dim: int) -> Tensor:
    """The gradient without that of the second half along `dim`."""
    learnt, frozen = gradient.chunk(2, dim)
    return torch.cat([learnt, torch.zeros_like(frozen)], dim)
