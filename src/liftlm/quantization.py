"""Base weights in 8 or 4 bits, through transformers' quantisation configs; a LoRA on them is trained and stored as ever.

torchao's 8 bits run on CPUs and are tested there; bitsandbytes needs CUDA and is **untested by us**. The head and the embeddings
stay as they are, since the loss reads the head's weights. Knows nothing of models.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch

from liftlm.config import ModelConfig
from liftlm.errors import ConfigError, DeviceError

_PACKAGES = {"int8": "torchao", "bnb-int8": "bitsandbytes", "nf4": "bitsandbytes"}


def quantized_loading(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told. Raises ConfigError where a package is missing, DeviceError on a wrong device."""
    kind = config.quantization
    if kind == "none":
        return {}
    package = _PACKAGES[kind]
    if find_spec(package) is None:
        raise ConfigError(f"model.quantization={kind} needs {package}.", f"pip install {package}")
    if package == "bitsandbytes":
        if device.type != "cuda":
            raise DeviceError(
                f"model.quantization={kind} needs a CUDA device, and this is {device.type}.",
                "Use model.quantization=int8.",
            )
        return {"quantization_config": _bits_and_bytes(kind), "device_map": {"": device}}
    for name in ("torchao", "torch.utils._pytree"):  # which tell of kernels for other hardware
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(quant_type=Int8WeightOnlyConfig()), "device_map": {"": device}}


def check_whole(network: object, what: str) -> None:
    """Raises ConfigError where the base weights are rounded, and `what` needs them as they are."""
    if getattr(network, "hf_quantizer", None) is not None:
        raise ConfigError(f"{what} cannot be trained on quantised weights.", "Use model.quantization=none.")


def _bits_and_bytes(kind: str) -> Any:
    """QLoRA's choice for 4 bits (arXiv 2305.14314): NF4, scales quantised too, products in bfloat16."""
    from transformers import BitsAndBytesConfig

    if kind == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
