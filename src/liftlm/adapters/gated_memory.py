"""Gated Memory (arXiv 2502.14644 v1-v3): what attention to text outside the window would have added, from the query alone.

Of each query, before rotary embedding and for each head with weights of its own, one small network gives what is remembered and
another says how much of it counts:

    memory = down(silu(up(query)))                head size → 2 · head size → value size
    gate   = sigmoid(3 · (x - 1)), x = down(silu(up(query)))        head size → √(head size) → 1
    out    = (1 - gate) · attention + gate · memory

Attention to a whole text is exactly of this form: with the share of the softmax that falls on what is outside the window as
the gate, and attention to that part alone as the memory. A test holds the code to that.

The authors' start has the gate at 0.05 and a random memory, which changes the model. The start here is the base model: the
memory's last layer is zero, and the attention yields only as far as a learnt number a head says, from 0: (1 - yields · gate) ·
attention. That is the same formula with a memory that begins as the attention itself.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from liftlm.adapters.seam import SeamAdapter, read_card, read_weights, sites_of
from liftlm.attention_calls import AttentionCall
from liftlm.config import AdapterConfig
from liftlm.errors import ConfigError
from liftlm.models import Model


class GatedMemory(torch.nn.Module):
    """Of one attention with so many heads."""

    def __init__(self, heads: int, head_size: int, value_size: int, start: str, generator: torch.Generator) -> None:
        super().__init__()

        def linear(outputs: int, inputs: int) -> tuple[Parameter, Parameter]:
            """(heads, outputs, inputs) and (heads, outputs, 1), as torch.nn.Linear begins."""
            shapes = (heads, outputs, inputs), (heads, outputs, 1)
            weight, bias = (torch.rand(shape, generator=generator).mul_(2).sub_(1) for shape in shapes)
            return Parameter(weight / math.sqrt(inputs)), Parameter(bias / math.sqrt(inputs))

        narrow = math.isqrt(head_size)
        self.memory_up, self.memory_up_bias = linear(2 * head_size, head_size)
        self.memory_down, self.memory_down_bias = linear(value_size, 2 * head_size)
        self.gate_up, self.gate_up_bias = linear(narrow, head_size)
        self.gate_down, self.gate_down_bias = linear(1, narrow)
        if start == "base":
            torch.nn.init.zeros_(self.memory_down)
            torch.nn.init.zeros_(self.memory_down_bias)
            self.yields: Parameter | None = Parameter(torch.zeros(heads, 1))
        else:
            self.yields = None  # attention yields by the whole gate, always

    def remember(self, call: AttentionCall, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, tokens, heads, value size) memory and (batch, tokens, heads, 1) gate, of queries before they are rotated."""
        batch, tokens = queries.shape[:2]
        columns = queries.to(self.memory_up.dtype).flatten(0, 1).permute(1, 2, 0)  # (heads, head size, batch · tokens)
        silu = torch.nn.functional.silu
        memory = torch.baddbmm(self.memory_up_bias, self.memory_up, columns)
        memory = torch.baddbmm(self.memory_down_bias, self.memory_down, silu(memory))
        gate = torch.baddbmm(self.gate_up_bias, self.gate_up, columns)
        gate = torch.sigmoid(3 * (torch.baddbmm(self.gate_down_bias, self.gate_down, silu(gate)) - 1))
        memory, gate = (part.permute(2, 0, 1).reshape(batch, tokens, *part.shape[:2]) for part in (memory, gate))
        return memory, gate

    def forward(self, call: AttentionCall, queries: Tensor, strength: float) -> tuple[Tensor, Tensor | None]:
        seen, weights = call.compute()
        memory, gate = self.remember(call, queries)
        left = seen.to(memory.dtype) if self.yields is None else self.yields * seen
        mixed = seen + (strength * gate) * (memory - left)
        return mixed.to(seen.dtype), weights


class GatedMemoryAdapter(SeamAdapter):
    """Gated Memory in all layers, or some. strength: the gate is multiplied by it."""

    @classmethod
    def attach(cls, model: Model, name: str, config: AdapterConfig, seed: int) -> GatedMemoryAdapter:
        """A fresh one. Raises ConfigError where the model's attention cannot be reached, or hides its queries."""
        sites = sites_of(model, config.layers)
        hidden = [site.path for site in sites if not site.source]
        if hidden:
            raise ConfigError(
                f"The queries of {hidden[0]} in {model.name} cannot be seen before they are rotated.",
                "Use --set adapter.kind=lora or prefix.",
            )
        generator = torch.Generator().manual_seed(seed)
        start = config.gated_memory.start
        layers = {
            site.path: GatedMemory(site.heads, site.head_size, site.value_size, start, generator) for site in sites
        }
        return cls(model, name, layers, {"kind": config.kind, "start": start, "layers": list(layers)})

    @classmethod
    def read(cls, model: Model, name: str, folder: Path) -> GatedMemoryAdapter:
        """A stored one. Raises ConfigError where it does not fit."""
        card, tensors = read_card(folder), read_weights(folder)
        sites = {site.path: site for site in sites_of(model, None)}
        generator = torch.Generator().manual_seed(0)
        return cls.of_stored(
            model,
            name,
            card,
            tensors,
            sites,
            lambda site: GatedMemory(site.heads, site.head_size, site.value_size, card["start"], generator),
        )
