"""LoRA through PEFT: written as a standard PEFT folder, many on one network."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from liftlm.config import AdapterConfig
from liftlm.errors import ConfigError
from liftlm.models import Model


class LoraAdapter:
    """One LoRA on the network of `model`, under `name`. Its weights are float32 whatever the base model's are."""

    def __init__(self, model: Model, name: str, config: AdapterConfig, seed: int) -> None:
        targets = config.target_modules
        self._attach(
            model,
            name,
            LoraConfig(
                task_type="CAUSAL_LM",
                base_model_name_or_path=str(model.folder),
                r=config.rank,
                lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT computes with floats all the same
                lora_dropout=config.dropout,
                target_modules=targets if isinstance(targets, str) else list(targets),
            ),
            seed,
        )

    @classmethod
    def read(cls, model: Model, name: str, folder: Path) -> LoraAdapter:
        """A stored one."""
        adapter = cls.__new__(cls)
        adapter._attach(model, name, LoraConfig.from_pretrained(str(folder)), seed=0)
        adapter.load(load_file(folder / "adapter_model.safetensors"))
        return adapter

    def _attach(self, model: Model, name: str, config: Any, seed: int) -> None:
        self._model, self._name = model, name
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
        self.switch_off()

    def parameters(self) -> dict[str, Parameter]:
        marks = (f".lora_A.{self._name}.", f".lora_B.{self._name}.")
        network: torch.nn.Module = self._model.network
        return {name: p for name, p in network.named_parameters() if any(mark in name for mark in marks)}

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = get_peft_model_state_dict(
            self._model.peft, adapter_name=self._name, save_embedding_layers=False
        )
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        result = set_peft_model_state_dict(self._model.peft, tensors, adapter_name=self._name)
        if result.unexpected_keys:
            raise ConfigError(
                f"The adapter does not fit {self._model.name}: it changes '{result.unexpected_keys[0]}', which is not there.",
                "Use the model it was made for.",
            )

    def switch_on(self, training: bool) -> None:
        self._model.peft.base_model.enable_adapter_layers()
        self._model.peft.base_model.set_adapter(self._name, inference_mode=not training)

    def switch_off(self) -> None:
        self._model.peft.base_model.disable_adapter_layers()

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
        self.switch_off()
