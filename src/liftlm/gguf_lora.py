"""A LoRA in PEFT's folder → one GGUF file that llama.cpp adds to its base model (`llama-server --lora`).

llama.cpp names tensors in its own way (the `gguf` package knows how) and keeps the query and key rows of some families in
another order, since it pairs the dimensions of rotary embedding differently; B's rows follow them. What a LoRA on such a
file cannot say (DoRA's lengths, biases, saved modules) is refused. Knows nothing of the library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from liftlm.errors import ConfigError
from liftlm.storage import write_errors

Matrix = NDArray[np.float32]
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Family:
    """architecture: llama.cpp's name for it. pairs: whether its q and k rows are paired as neighbours there."""

    architecture: str
    pairs: bool = False


# transformers' model_type → what llama.cpp's converter makes of it (convert_hf_to_gguf.py, LlamaModel.permute)
_FAMILIES = {
    "llama": _Family("llama", pairs=True),
    "mistral": _Family("llama", pairs=True),
    "granite": _Family("granite", pairs=True),
    "smollm3": _Family("smollm3", pairs=True),
    "qwen2": _Family("qwen2"),
    "qwen3": _Family("qwen3"),
    "gemma2": _Family("gemma2"),
    "gemma3_text": _Family("gemma3"),
    "phi3": _Family("phi3"),
}


def write_gguf_lora(adapter: Path, base: Mapping[str, Any], target: Path) -> None:
    """Writes the GGUF file of a PEFT folder. base: config.json of the model that it changes.

    Weights stay float32. Raises ConfigError for a family or a kind of LoRA that llama.cpp cannot take, DiskFullError,
    NoWritePermissionError.
    """
    import gguf

    family = _family(base)
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    _check(settings)
    rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    # llama.cpp scales by alpha / rank
    alpha = alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
    with write_errors(target):
        writer = gguf.GGUFWriter(str(target), family.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, tensor in sorted(_tensors(adapter, base, family).items()):
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_gguf_lora(path: Path) -> tuple[dict[str, Any], dict[str, Matrix]]:
    """Metadata and tensors of such a file, as llama.cpp will see them: (rank, in) for `.lora_a`, (out, rank) for `.lora_b`."""
    import gguf

    reader = gguf.GGUFReader(str(path))
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in reader.tensors}


def _family(base: Mapping[str, Any]) -> _Family:
    kind = str(base.get("model_type"))
    if kind not in _FAMILIES:
        raise ConfigError(
            f"How llama.cpp keeps the weights of a model of type '{kind}' is not known here.",
            f"Known are {', '.join(sorted(_FAMILIES))}; `--to merged` and llama.cpp's own converter take others.",
        )
    return _FAMILIES[kind]


def _check(settings: Mapping[str, Any]) -> None:
    for key, what in (("use_dora", "DoRA"), ("lora_bias", "a bias in a LoRA"), ("modules_to_save", "saved modules")):
        if settings.get(key):
            raise ConfigError(f"llama.cpp does not know {what}.", "Use `--to merged` instead.")
    if settings.get("bias", "none") != "none":
        raise ConfigError("llama.cpp does not know trained biases.", "Use `--to merged` instead.")
    if settings.get("rank_pattern") or settings.get("alpha_pattern"):
        raise ConfigError("llama.cpp knows one scale for all layers of a LoRA.", "Use `--to merged` instead.")


def _tensors(adapter: Path, base: Mapping[str, Any], family: _Family) -> dict[str, Matrix]:
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, int(base["num_hidden_layers"]))
    found: dict[str, Matrix] = {}
    for path, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, matrix = path.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        name = names.get_name(module)
        if name is None or matrix not in ("lora_A", "lora_B"):
            raise ConfigError(
                f"llama.cpp has no place for the adapter's '{path}'.",
                "Use `--to merged` and llama.cpp's own converter.",
            )
        values = np.ascontiguousarray(tensor, dtype=np.float32)
        heads = _paired_heads(module, base) if family.pairs and matrix == "lora_B" else None
        found[f"{name}.weight.{matrix.lower()}"] = values if heads is None else _as_neighbours(values, heads)
    return found


def _paired_heads(module: str, base: Mapping[str, Any]) -> int | None:
    """The number of heads in a query's or key's rows; None for other layers."""
    layer = module.rpartition(".")[2]
    if layer == "q_proj":
        return int(base["num_attention_heads"])
    return int(base.get("num_key_value_heads") or base["num_attention_heads"]) if layer == "k_proj" else None


def _as_neighbours(rows: Matrix, heads: int) -> Matrix:
    """Rows of each head in the order 0, d/2, 1, d/2 + 1, …: rotary embedding turns i with i + d/2 here, 2i with 2i + 1 there."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))
