"""Adapters that act where attention is computed: small modules, many on one network, one a layer and adapter.

They sit in the network below the attention modules, so that they move, train and are shared out with it; while none is on,
the network computes as transformers made it. Written as one safetensors file and one JSON file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from liftlm.attention_calls import SEAM, AttentionCall, route
from liftlm.errors import ConfigError
from liftlm.models import Model
from liftlm.probes import AttentionSite, attention_sites

CARD = "lift_adapter.json"
_WEIGHTS = "lift_adapter.safetensors"
_FORMAT = 1
Given = TypeVar("Given")  # what a kind of adapter needs to know of an attention to make its layer


class Seam(torch.nn.Module):
    """Below one attention module: the layers of all adapters, and which of them is on."""

    def __init__(self, site: AttentionSite) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict()
        self.active: str | None = None
        self.strength = 1.0
        self._site = site
        self._given: Tensor | None = None  # what the module gave that holds the queries before they are rotated

    def keep(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        """A hook of that module. As a method it goes with the seam where the network is copied."""
        if self.active is not None:
            self._given = output

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        given, self._given = self._given, None
        if self.active is None:
            return call.compute()
        queries = None if given is None else self._site.read(given)
        found: tuple[Tensor, Tensor | None] = self.layers[self.active](call, queries, self.strength)
        return found


def sites_of(model: Model, layers: Sequence[int] | None) -> list[AttentionSite]:
    """The attentions that an adapter is to change, found once a model. layers: counted from 0, or from the end; None = all.

    Raises ConfigError where the model has none that go through transformers' interface, or not so many.
    """
    if model.sites is None:
        model.sites = attention_sites(model.network)
    found: list[AttentionSite] = model.sites
    if not found:
        raise ConfigError(
            f"{model.name} does not compute attention through transformers' attention interface.",
            "Use --set adapter.kind=lora or full.",
        )
    return found if layers is None else [found[index] for index in chosen_layers(model, layers, len(found))]


def chosen_layers(model: Model, layers: Sequence[int], count: int) -> list[int]:
    """Numbers from 0, in order. Raises ConfigError for one that is not there."""
    for layer in layers:
        if not -count <= layer < count:
            raise ConfigError(
                f"adapter.layers names {layer}, and {model.name} has {count} layers.",
                f"Use numbers from 0 to {count - 1}, or from -1 for the last one down.",
            )
    return sorted({layer % count for layer in layers})


class SeamAdapter:
    """One adapter: a layer for each of some attentions, float32 whatever the model's number format is."""

    mergeable = False

    def __init__(self, model: Model, name: str, layers: Mapping[str, torch.nn.Module], card: dict[str, Any]) -> None:
        self._model, self._name, self._layers, self._card = model, name, dict(layers), card
        sites = {site.path: site for site in sites_of(model, None)}
        for path, layer in self._layers.items():
            module = model.network.get_submodule(path)
            if SEAM not in module._modules:
                seam = Seam(sites[path])
                if sites[path].source:
                    module.get_submodule(sites[path].source).register_forward_hook(seam.keep)
                module.add_module(SEAM, seam)
            module.get_submodule(SEAM).layers[name] = layer.to(model.device)  # type: ignore[operator,index]
        self.switch_off()

    @classmethod
    def of_stored(
        cls,
        model: Model,
        name: str,
        card: dict[str, Any],
        tensors: dict[str, Tensor],
        attentions: Mapping[str, Given],
        make: Callable[[Given], torch.nn.Module],
    ) -> Self:
        """A stored one: a layer made of what the model gives for each attention that the card names, and its weights.

        Raises ConfigError where it does not fit, and then nothing of it is left on the network.
        """
        missing = [path for path in card["layers"] if path not in attentions]
        if missing:
            raise ConfigError(
                f"The adapter does not fit {model.name}: there is no attention '{missing[0]}'.",
                "Use the model it was made for.",
            )
        adapter = cls(model, name, {path: make(attentions[path]) for path in card["layers"]}, card)
        try:
            adapter.load(tensors)
        except Exception:
            adapter.remove()
            raise
        return adapter

    def _seams(self) -> list[Any]:
        return [self._model.network.get_submodule(f"{path}.{SEAM}") for path in self._layers]

    def parameters(self) -> dict[str, Parameter]:
        named = ((path, layer.named_parameters()) for path, layer in self._layers.items())
        return {f"{path}.{name}": parameter for path, own in named for name, parameter in own}

    def tensors(self) -> dict[str, Tensor]:
        named = ((path, layer.state_dict()) for path, layer in self._layers.items())
        return {f"{path}.{name}": tensor for path, own in named for name, tensor in own.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        own = self.tensors()
        wrong = sorted(
            name
            for name in own.keys() | tensors.keys()
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape
        )
        if wrong:
            raise ConfigError(
                f"The adapter does not fit {self._model.name}: '{wrong[0]}' is missing or of another shape there.",
                "Use the model it was made for.",
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def switch_on(self, training: bool, strength: float = 1.0) -> None:
        route(self._model.network, True)
        for seam in self._seams():
            seam.active, seam.strength = self._name, strength
        for parameter in self.parameters().values():
            parameter.requires_grad_(training)

    def switch_off(self) -> None:
        route(self._model.network, False)
        for seam in self._seams():
            seam.active = seam._given = None
        for parameter in self.parameters().values():
            parameter.requires_grad_(False)
            parameter.grad = None

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, folder / _WEIGHTS, metadata={"format": "pt"})
        (folder / CARD).write_text(json.dumps({"format": _FORMAT} | self._card, indent=1), encoding="utf-8")

    def remove(self) -> None:
        for path in self._layers:
            module = self._model.network.get_submodule(path)
            seam: Any = module.get_submodule(SEAM)
            del seam.layers[self._name]
            if not seam.layers:
                delattr(module, SEAM)
                for part in module.modules():
                    for key, hook in [*part._forward_hooks.items()]:
                        if getattr(hook, "__self__", None) is seam:
                            del part._forward_hooks[key]


def read_card(folder: Path) -> dict[str, Any]:
    """What `SeamAdapter.write` said of the adapter. Raises ConfigError where this program did not write it."""
    try:
        card: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if card["format"] > _FORMAT:
            raise ConfigError(f"{folder / CARD} was written by a newer version of liftlm.", "Use that version.")
        str(card["kind"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / CARD} describes no adapter: {error}.", "Absorb the document again.") from error
    return card


def read_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / _WEIGHTS)
