"""LoRA through PEFT: written as a standard PEFT folder, many on one network."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from liftlm.adapters.fused import FusedLinear, fuse_linear
from liftlm.adapters.seam import chosen_layers
from liftlm.adapters.starts import TAKEN_FROM_WEIGHTS, begin_with_part_of_weights
from liftlm.config import AdapterConfig
from liftlm.errors import ConfigError
from liftlm.models import Model
from liftlm.quantization import check_whole
from liftlm.sharded import whole

_OF_PEFT = ("gaussian", "orthogonal")  # names that PEFT's init_lora_weights takes and that leave the base weights alone
_LENGTHS = ".lora_magnitude_vector."


class LoraAdapter:
    """One LoRA on the network of `model`, under `name`. Its weights are float32 whatever the base model's are."""

    mergeable = True

    def __init__(self, model: Model, name: str, config: AdapterConfig, seed: int) -> None:
        targets: str | Sequence[str] = config.target_modules
        if targets != "all-linear":
            _check_targets(model, config.target_modules)
        where: dict[str, Any] = {}
        if config.layers is not None:
            if targets == "all-linear":  # PEFT wants names where it is to take some layers only
                targets = sorted({name.rpartition(".")[2] for name in _linear_layers(model)})
            where = _some_layers(model, config.layers)
        if config.initialization in TAKEN_FROM_WEIGHTS:
            check_whole(model.network, f"A LoRA that begins as a part of the weights ({config.initialization})")
        twice = 2 if config.initialization in TAKEN_FROM_WEIGHTS else 1
        # the same scale for twice the rank
        alpha = config.alpha * (math.sqrt(twice) if config.rslora else twice)
        self._attach(
            model,
            name,
            LoraConfig(
                task_type="CAUSAL_LM",
                base_model_name_or_path=str(model.folder),
                r=config.rank * twice,
                # other programs read adapter_config.json and expect a whole number; PEFT computes with either
                lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
                lora_dropout=config.dropout,
                target_modules=targets if isinstance(targets, str) else list(targets),
                use_dora=config.dora,
                use_rslora=config.rslora,
                init_lora_weights=config.initialization if config.initialization in _OF_PEFT else True,
                **where,
            ),
            seed,
        )
        if config.initialization in TAKEN_FROM_WEIGHTS:
            begin_with_part_of_weights(model.network, name, config.initialization, config.rank, seed)

    @classmethod
    def read(cls, model: Model, name: str, folder: Path) -> LoraAdapter:
        """A stored one."""
        adapter = cls.__new__(cls)
        adapter._attach(model, name, LoraConfig.from_pretrained(str(folder)), seed=0)
        try:
            adapter.load(load_file(folder / "adapter_model.safetensors"))
        except Exception:
            adapter.remove()
            raise
        return adapter

    def _attach(self, model: Model, name: str, config: Any, seed: int) -> None:
        self._model, self._name = model, name
        config._register_custom_module({torch.nn.Linear: fuse_linear})
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                torch.manual_seed(seed)  # LoRA's A is random
                if model.peft is None:
                    model.peft = get_peft_model(model.network, config, adapter_name=name)
                else:
                    model.peft.add_adapter(name, config)
        except ValueError as error:
            raise ConfigError(
                f"These LoRA settings do not fit {model.name}: {str(error).splitlines()[0].rstrip('.')}.",
                "Change adapter.target_modules ('all-linear' fits every model).",
            ) from error
        self._config = config
        self._model.tuned = [part for part in model.network.modules() if isinstance(part, BaseTunerLayer)]
        marks = (f".lora_A.{name}.", f".lora_B.{name}.", f"{_LENGTHS}{name}.")
        self._own = {path: p for path, p in model.network.named_parameters() if any(mark in path for mark in marks)}
        self._trainable: list[Parameter] | None = None  # of those, once PEFT has said it
        self._strength = 1.0
        if model.tensor_parallel:
            self._join_parts(config, seed)
        # DoRA's lengths of the weights' columns as they are without any change
        self._lengths = {path: p.detach().clone() for path, p in self._own.items() if _LENGTHS in path}
        self._whole: dict[str, Tensor] = {}  # the learnt lengths while others between them and those are on
        network: torch.nn.Module = self._model.network
        network.train(network.training)  # PEFT's new dropout layers would act while answering
        self._model.peft.base_model.disable_adapter_layers()

    def _join_parts(self, config: Any, seed: int) -> None:
        """Under tensor parallel: the starting weights that a single process would draw, divided as the layers are."""
        if config.use_dora or config.init_lora_weights is not True:
            raise ConfigError("DoRA and other starts than kaiming are not divided over processes.", "Leave them out.")
        start: dict[str, Tensor] = {}
        network: torch.nn.Module = self._model.network
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for path, layer in network.named_modules():
                if not hasattr(layer, "lora_A") or self._name not in layer.lora_A:  # type: ignore[operator]
                    continue
                down, up = layer.lora_A[self._name], layer.lora_B[self._name]  # type: ignore[index]
                for part in (
                    down,
                    up,
                ):  # transformers reads the widths of the whole layer there, and PEFT put those of the part
                    part.out_features, part.in_features = part.weight.shape
                # in the order in which PEFT draws them
                drawn = torch.nn.Linear(down.in_features, down.out_features, bias=False).weight
                torch.nn.Linear(up.in_features, up.out_features, bias=False)
                torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
                prefix = f"base_model.model.{path}"
                start[f"{prefix}.lora_A.weight"] = drawn.detach()
                start[f"{prefix}.lora_B.weight"] = torch.zeros(up.out_features, up.in_features)
        set_peft_model_state_dict(self._model.peft, start, adapter_name=self._name)

    def parameters(self) -> dict[str, Parameter]:
        return dict(self._own)

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = get_peft_model_state_dict(
            self._model.peft, adapter_name=self._name, save_embedding_layers=False
        )
        return {name: whole(tensor) for name, tensor in found.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        own = {name: tensor.shape for name, tensor in self.tensors().items()}
        stored = {name: tensor.shape for name, tensor in tensors.items()}
        wrong = sorted(name for name in own.keys() | stored.keys() if own.get(name) != stored.get(name))
        if wrong:
            raise ConfigError(
                f"The adapter does not fit {self._model.name}: '{wrong[0]}' is missing or of another shape there.",
                "Use the model it was made for.",
            )
        set_peft_model_state_dict(self._model.peft, tensors, adapter_name=self._name)

    def switch_on(self, training: bool, strength: float = 1.0) -> None:
        self._scale(strength)
        tuner = self._model.peft.base_model
        if training and self._trainable is None:
            tuner.enable_adapter_layers()
            tuner.set_adapter(self._name)
            self._trainable = [p for p in self._own.values() if p.requires_grad]
            return
        # what PEFT does there, without its walk over the network and over all adapters: a server switches many times a second
        for layer in self._model.tuned:
            layer._active_adapter, layer._disable_adapters = [self._name], False
        tuner.active_adapter = self._name
        for parameter in self._trainable or [] if training else []:
            parameter.requires_grad_(True)

    def switch_off(self) -> None:
        for layer in self._model.tuned:
            layer._disable_adapters = True
        for parameter in self._trainable or []:
            parameter.requires_grad_(False)
        self._scale(1.0)

    def _scale(self, strength: float) -> None:
        if strength == self._strength:
            return
        self._strength, own = strength, self._own
        for layer in self._model.tuned:
            if self._name in layer.scaling:
                layer.set_scale(self._name, strength)
        for name, learnt in self._whole.items():
            own[name].data = learnt
        self._whole = {name: own[name].data for name in self._lengths} if strength != 1 else {}
        for name, learnt in self._whole.items():
            own[name].data = torch.lerp(self._lengths[name], learnt, strength)

    @contextlib.contextmanager
    def merge(self) -> Iterator[None]:
        """Within the block it is part of the weights. They are exchanged for sums and put back, so nothing is lost by rounding;
        in 16 bits the sums themselves are rounded, once."""
        layers = [part for part in self._model.tuned if self._name in part.lora_A and not part.disable_adapters]
        kept = [layer.base_layer.weight.data for layer in layers]
        try:
            for layer, weight in zip(layers, kept, strict=True):
                self._merge(layer, weight)
            yield
        finally:
            for layer, weight in zip(layers, kept, strict=True):
                layer.base_layer.weight.data = weight
                layer.merged_adapters.clear()
                layer._caches.clear()  # DoRA's

    @torch.no_grad()
    def _merge(self, layer: Any, weight: Tensor) -> None:
        """PEFT's own merging is as good, and several times slower for what is the usual case."""
        plain = isinstance(layer, FusedLinear) and self._name not in layer.lora_variant
        if not plain or layer.lora_bias[self._name]:
            layer.base_layer.weight.data = weight.clone()
            layer.merge(adapter_names=[self._name])
            return
        down, up = layer.lora_A[self._name].weight.float(), layer.lora_B[self._name].weight.float()
        merged = torch.addmm(weight.float(), up, down, alpha=layer.scaling[self._name])
        layer.base_layer.weight.data = merged.to(weight.dtype)
        layer.merged_adapters.append(self._name)

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self._config.inference_mode = True
        self._config.save_pretrained(str(folder))
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )

    def remove(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model.peft.delete_adapter(self._name)
        self._model.peft.base_model.disable_adapter_layers()  # PEFT switches another one on


def _linear_layers(model: Model) -> list[str]:
    """The names of those that may change."""
    network: torch.nn.Module = model.network
    head = model.network.get_output_embeddings()
    return [
        name
        for name, module in network.named_modules()
        # on a network that holds a LoRA, a layer is a wrapper around the base layer and the LoRA's own small ones
        if isinstance(getattr(module, "base_layer", module), torch.nn.Linear | Conv1D)
        and module is not head
        and not name.endswith(".base_layer")
        and ".lora_" not in name
    ]


def _some_layers(model: Model, layers: Sequence[int]) -> dict[str, Any]:
    """What PEFT is told to change some layers only: their numbers, and what the list of layers is called in this network."""
    count = int(getattr(model.network.config.get_text_config(), "num_hidden_layers", 0))
    named = model.network.named_modules()
    lists = [name for name, module in named if isinstance(module, torch.nn.ModuleList) and len(module) == count]
    if not lists:
        raise ConfigError(f"The layers of {model.name} are not numbered.", "Name them in adapter.target_modules.")
    numbers = chosen_layers(model, layers, count)
    return {"layers_to_transform": numbers, "layers_pattern": [lists[0].rpartition(".")[2]]}


def _check_targets(model: Model, targets: Sequence[str]) -> None:
    """PEFT passes over names it does not find, and would change the head, which the loss reads without any LoRA."""
    linear = _linear_layers(model)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ConfigError(
                f"adapter.target_modules names '{target}', which is no linear layer of {model.name} that may change.",
                f"Use 'all-linear' or some of: {known}.",
            )
