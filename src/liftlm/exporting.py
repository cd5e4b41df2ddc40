"""A library entry for other programs: PEFT's folder (transformers, vLLM), a whole model, or a GGUF file (llama.cpp).

Nothing that exists is overwritten, and what is written is whole or not there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from liftlm.adapters import use_adapter
from liftlm.config import ModelConfig
from liftlm.errors import ConfigError
from liftlm.gguf_lora import write_gguf_lora
from liftlm.library import Library
from liftlm.models import load_model, quiet_transformers
from liftlm.shelf import Entry, check_files
from liftlm.storage import new_folder
from liftlm.vllm_limits import Serving, check_for_vllm

Form = Literal["peft", "merged", "gguf"]
FORMS: tuple[str, ...] = get_args(Form)


def export(entry: Entry, target: Path, form: Form = "peft") -> None:
    """Writes an entry's adapter to `target`, which must not exist yet.

    peft: the adapter alone, a folder (of full weights: one safetensors file in it). merged: a model folder, in float32 so
    that merging does not round; what transformers, vLLM and llama.cpp's converter load as any model. gguf: one file.
    Raises ConfigError where `target` exists or the adapter has no such form, DamagedEntryError, NoWritePermissionError,
    DiskFullError and what `load_model` raises.
    """
    if target.exists():
        raise ConfigError(f"{target} exists already.", "Give a name that is free; nothing is overwritten.")
    check_files(entry.folder)
    match form:
        case "peft":
            with new_folder(target, sealed=False) as draft:
                shutil.copytree(entry.folder / "adapter", draft, dirs_exist_ok=True)
        case "merged":
            _write_merged(entry, target)
        case "gguf":
            _write_gguf(entry, target)


def check_serving(entry: Entry) -> Serving:
    """Whether vLLM can serve an entry's adapter."""
    return check_for_vllm(entry.folder / "adapter", base_config(entry) or {})


def base_config(entry: Entry) -> Mapping[str, Any] | None:
    """config.json of the model that an entry was absorbed by; None where it is not on this machine any more."""
    path = Path(entry.card["model"]["folder"]) / "config.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    text: dict[str, Any] = found.get("text_config", found)  # of a model that also sees
    return text


def _write_merged(entry: Entry, target: Path) -> None:
    """Loads the base model anew, since merging changes it for good."""
    if (held := entry.card["config"]["model"].get("quantization", "none")) != "none":
        raise ConfigError(
            f"Entry {entry.id} was absorbed on weights in {held}, into which nothing can be merged without rounding it away.",
            "Export it with --to peft or --to gguf.",
        )
    model = load_model(entry.card["model"]["name"], ModelConfig(device="cpu", dtype="float32"))
    Library(entry.folder.parent.parent).open(entry.id, model)
    if not model.adapters[entry.id].mergeable:
        kind = entry.card["config"]["adapter"]["kind"]
        raise ConfigError(
            f"Entry {entry.id} is a {kind} adapter, which is no change of weights and cannot be merged into them.",
            "Export it with --to peft; liftlm reads it from there.",
        )
    with use_adapter(model, entry.id), quiet_transformers(), new_folder(target, sealed=False) as draft:
        network = model.network if model.peft is None else model.peft.merge_and_unload(adapter_names=[entry.id])
        network.save_pretrained(draft)
        model.tokenizer.save_pretrained(draft)


def _write_gguf(entry: Entry, target: Path) -> None:
    adapter, base = entry.folder / "adapter", base_config(entry)
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(
            f"Entry {entry.id} is a {entry.card['config']['adapter']['kind']} adapter, and llama.cpp adds LoRAs only.",
            "Full weights: export with --to merged, and use llama.cpp's own converter.",
        )
    if base is None:
        raise ConfigError(
            f"The model of entry {entry.id} is not in {entry.card['model']['folder']} any more, and names its layers.",
            "Bring it back, or export where it is.",
        )
    with new_folder(
        target.with_name(f".{target.name}.gguf"), sealed=False
    ) as draft:  # one file, as whole as a folder is
        write_gguf_lora(adapter, base, draft / "adapter.gguf")
    whole = target.with_name(f".{target.name}.gguf")
    try:
        (whole / "adapter.gguf").rename(target)
    finally:
        shutil.rmtree(whole, ignore_errors=True)


__all__ = ["FORMS", "Form", "base_config", "check_serving", "export"]
