"""Every weight of the network as the adapter: a second set that takes the place of the base model's while it is on.

Switching exchanges which storage the parameters point to, so nothing is copied and the base weights stay untouched bit
for bit. While it is trained it is float32 whatever the model's number format is, since small updates vanish in 16 bits.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from liftlm.attention_calls import SEAM
from liftlm.errors import ConfigError
from liftlm.models import Model
from liftlm.quantization import check_whole

_FILE = "model.safetensors"


def base_parameters(network: torch.nn.Module) -> dict[str, Parameter]:
    """The network's own parameters, tied ones once, without those of adapters, named as without PEFT's wrapping."""
    named = network.named_parameters()
    return {name.replace(".base_layer.", "."): p for name, p in named if ".lora_" not in name and SEAM not in name}


class FullAdapter:
    """A full set of weights for the network of `model`."""

    mergeable = True
    _whole: dict[str, Tensor] | None = None  # the adapter's weights while a mixture of them and the base's is on

    def __init__(self, model: Model) -> None:
        check_whole(model.network, "All weights")
        self._model = model
        self._on = False
        # the weights that are not in place: the adapter's own while it is off, the base model's while it is on
        self._other = {name: p.detach().clone() for name, p in self._base().items()}

    @classmethod
    def read(cls, model: Model, folder: Path) -> FullAdapter:
        adapter = cls.__new__(cls)
        adapter._model, adapter._on, adapter._other = model, False, {}
        adapter.load(load_file(folder / _FILE))
        return adapter

    def _base(self) -> dict[str, Parameter]:
        return base_parameters(self._model.network)

    def parameters(self) -> dict[str, Parameter]:
        return self._base()

    def tensors(self) -> dict[str, Tensor]:
        own = {name: p.detach() for name, p in self._base().items()} if self._on else self._other
        return {name: tensor.to(self._model.dtype) for name, tensor in own.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        base = self._base()
        if set(tensors) != set(base) or any(tensors[name].shape != p.shape for name, p in base.items()):
            raise ConfigError(f"The stored weights do not fit {self._model.name}.", "Use the model they were made for.")
        placed = {name: tensors[name].to(p.device, p.dtype) for name, p in base.items()}
        if self._on:
            for name, p in base.items():
                p.data.copy_(placed[name])
        else:
            self._other = placed

    def switch_on(self, training: bool, strength: float = 1.0) -> None:
        dtype = torch.float32 if training else self._model.dtype
        self._other = {name: tensor.to(dtype) for name, tensor in self._other.items()}
        if strength != 1:
            self._whole = self._other
            base = self._base()
            self._other = {name: torch.lerp(base[name].data, new, strength) for name, new in self._whole.items()}
        self._exchange()
        for p in self._base().values():
            p.requires_grad_(training)

    def switch_off(self) -> None:
        for p in self._base().values():
            p.requires_grad_(False)
        self._exchange()  # stays float32 after training, which may go on
        if self._whole is not None:
            self._other, self._whole = self._whole, None

    def _exchange(self) -> None:
        self._on = not self._on
        for name, p in self._base().items():
            p.data, self._other[name] = self._other[name], p.data
            p.grad = None

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            folder / _FILE,
            metadata={"format": "pt"},
        )

    def remove(self) -> None:
        self._other.clear()
