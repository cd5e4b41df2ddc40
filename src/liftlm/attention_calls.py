"""The place where transformers' networks compute softmax attention, opened without a copy of any model file.

Every network that goes through transformers' attention interface asks it for a function by a name in its config. Here that name
is exchanged for one of ours, whose function sees queries, keys, values and mask of every layer, and calls the very function
that the network would have called. Knows nothing of what is done there (`liftlm.adapters`) and nothing of families.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from liftlm.pauses import pausing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEAM = "lift_seam"  # the child of an attention module that is asked instead, where there is one
_ROUTED = "lift_routed_"  # then the name of the implementation that does the work


@dataclass
class AttentionCall:
    """One attention of one layer, as the network asks for it.

    query (batch, heads, tokens, head size), key and value (batch, key heads, tokens seen, size), rotated already; mask None
    (causal) or (batch, 1, tokens, tokens seen): bool, or added to the scores.
    """

    module: torch.nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]
    function: Callable[..., tuple[Tensor, Tensor | None]]

    def compute(self) -> tuple[Tensor, Tensor | None]:
        """What the network expects: (batch, tokens, heads, value size), and weights where the implementation gives them."""
        return self.function(self.module, self.query, self.key, self.value, self.mask, **self.options)


_listener: Callable[[AttentionCall], None] | None = None


@contextlib.contextmanager
def listening(network: PreTrainedModel, listener: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Within the block `listener` is told of every attention that the network computes, before it is computed."""
    global _listener
    before, was_routed = _listener, is_routed(network)
    _listener = listener
    route(network, True)
    try:
        with pausing(None):  # who listens is not told of what is computed in a pause
            yield
    finally:
        _listener = before
        route(network, was_routed)


def is_routed(network: PreTrainedModel) -> bool:
    return str(network.config.get_text_config()._attn_implementation).startswith(_ROUTED)


def implementation(network: PreTrainedModel) -> str:
    """The name of what computes attention, whether or not it goes through here."""
    return str(network.config.get_text_config()._attn_implementation).removeprefix(_ROUTED)


def use_implementation(network: PreTrainedModel, name: str) -> None:
    """Another one, by its name in transformers' interface; what goes through here goes on doing so."""
    routed = is_routed(network)
    network.config.get_text_config()._attn_implementation = name
    route(network, routed)


def route(network: PreTrainedModel, on: bool) -> None:
    """Whether attention goes through here. Off, the network is as transformers made it."""
    name = implementation(network)
    if on:
        routed = _ROUTED + name
        if routed not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(routed, functools.partial(_attend, name))
            if name in ALL_MASK_ATTENTION_FUNCTIONS:  # masks are made by that name too
                ALL_MASK_ATTENTION_FUNCTIONS.register(routed, ALL_MASK_ATTENTION_FUNCTIONS[name])
        name = routed
    network.config.get_text_config()._attn_implementation = name


def _attend(
    implementation: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    call = AttentionCall(module, query, key, value, attention_mask, options, _original(module, implementation))
    if _listener is not None:
        _listener(call)
    seam = module._modules.get(SEAM)
    found: tuple[Tensor, Tensor | None] = seam(call) if seam is not None else call.compute()
    return found


def _original(module: torch.nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that the network's own file would have taken; each file has an eager one of its own."""
    own = sys.modules[type(module).__module__]
    interface = getattr(own, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    function: Callable[..., tuple[Tensor, Tensor | None]] = interface.get_interface(
        implementation, getattr(own, "eager_attention_forward", None)
    )
    return function
