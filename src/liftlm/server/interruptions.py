"""Absorbing that is left in the middle of a step, and goes on as if nothing had happened.

A network pauses (`liftlm.pauses`) before each of its layers, forwards and backwards; there it can be put `Aside` and used for
something else. What is learnt is the same bit for bit. Knows nothing of questions or jobs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from liftlm.models import Model
from liftlm.pauses import pause


@contextlib.contextmanager
def pause_at_layers(network: torch.nn.Module) -> Iterator[None]:
    """Within the block a network pauses before each of its layers, in the forward and in the backward pass."""
    hooks: list[Any] = []
    for layer in _layers(network):
        hooks.append(layer.register_forward_pre_hook(lambda *given: pause()))
        hooks.append(layer.register_forward_hook(_pause_when_the_gradient_is_there))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pause_when_the_gradient_is_there(layer: torch.nn.Module, given: Any, output: Tensor | tuple[Tensor, ...]) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: pause())  # type: ignore[no-untyped-call]


def _layers(network: torch.nn.Module) -> list[torch.nn.Module]:
    """From the first to the last; nothing where the network has no such list, and then it does not pause."""
    config: Any = network.config
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [module for module in network.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count]
    return list(lists[0]) if lists else []


class Aside:
    """Puts what is computed with a model aside while one of its adapters is made. name: that adapter's, there or to come."""

    def __init__(self, model: Model, name: str) -> None:
        self._model, self._name = model, name
        self._parameters: list[Parameter] = []
        self._training: list[torch.nn.Module] = []  # modules in that mode; a walk over all at every pause would be slow

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within the block the network may be used for something else, and adapters may come and go."""
        model = self._model
        devices = [model.device] if model.device.type == "cuda" else []
        if not self._parameters and self._name in model.adapters:
            self._parameters = list(model.adapters[self._name].parameters().values())
        gradients = [(parameter, parameter.grad) for parameter in self._parameters]  # some adapters drop them when off
        with (
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),  # which is for good in what is made in it, such as another adapter
            torch.no_grad(),
            torch.autocast(model.device.type, enabled=False),
            self._evaluating(),
        ):
            try:
                yield
            finally:
                for parameter, gradient in gradients:
                    parameter.grad = gradient

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        network = self._model.network
        if not network.training:
            yield
            return
        if not self._training:
            self._training = [module for module in network.modules() if module.training]
        for module in self._training:
            vars(module)["training"] = False  # `Module.__setattr__` looks for parameters first
        try:
            yield
        finally:
            for module in self._training:
                vars(module)["training"] = True
