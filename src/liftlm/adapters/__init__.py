"""What training changes, kept apart from the base model: attach, switch, save, load, remove.

Adapters live on one network under a name. `use_adapter` switches one on (or none) and puts back what was on before, so
that adapters never leak into each other or into the bare model. Knows nothing of documents or training.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.nn import Parameter

from liftlm.adapters.full import FullAdapter
from liftlm.adapters.gated_memory import GatedMemoryAdapter
from liftlm.adapters.lora import LoraAdapter
from liftlm.adapters.prefix import PrefixAdapter
from liftlm.adapters.seam import CARD, read_card
from liftlm.config import AdapterConfig
from liftlm.errors import ConfigError, EntryNotFoundError
from liftlm.models import Model
from liftlm.storage import file_sha256

START_FOLDER = "start"  # of what `lift pre-sft` writes


class AttachedAdapter(Protocol):
    """One adapter on one network."""

    mergeable: bool  # whether the network can take it into its own weights

    def parameters(self) -> dict[str, Parameter]:
        """What an optimiser may change, by name."""

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored, by the name it has on disk."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Puts stored tensors in place."""

    def switch_on(self, training: bool, strength: float) -> None:
        """strength: so much of the change, from 0 (the base model) to 1 (all of it)."""

    def switch_off(self) -> None: ...

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Writes the adapter in its standard form into an existing folder."""

    def remove(self) -> None:
        """Takes it off the network for good; it must be off."""


_ACTIVE = (
    ""  # no adapter may have this name: model.adapters[_ACTIVE] is (name, training, strength) of the one that is on
)


def attach_adapter(
    model: Model, name: str, config: AdapterConfig, seed: int, tokens: Sequence[int] = ()
) -> AttachedAdapter:
    """Adds a fresh adapter (off): one that changes nothing yet, a copy of `config.start`, or a prefix.

    tokens: the document's, which a prefix begins with. Raises ConfigError where the settings, or the start, do not fit the model.
    """
    if name in model.adapters:
        remove_adapter(model, name)
    if config.start is not None:
        return load_adapter(model, name, find_start(config))
    with use_adapter(model, None):  # it starts from the bare weights and is off, whatever is on at the moment
        fresh = _fresh(model, name, config, seed, tokens)
    model.adapters[name] = fresh
    return fresh


def _fresh(model: Model, name: str, config: AdapterConfig, seed: int, tokens: Sequence[int]) -> AttachedAdapter:
    match config.kind:
        case "lora":
            return LoraAdapter(model, name, config, seed)
        case "full":
            return FullAdapter(model)
        case "gated-memory":
            return GatedMemoryAdapter.attach(model, name, config, seed)
        case "prefix":
            return PrefixAdapter.attach(model, name, config, tokens)


def find_start(config: AdapterConfig) -> Path:
    """The folder of the starting adapter's files: `config.start`, or `start` inside it. Raises ConfigError."""
    given = Path(str(config.start)).expanduser()
    for folder in (given / START_FOLDER, given):
        if (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file():
            break
    else:
        raise ConfigError(f"{given} holds no starting adapter.", "Give the folder that `lift pre-sft --out` made.")
    if config.kind != "lora":
        raise ConfigError(
            f"A starting adapter is a LoRA, and adapter.kind is {config.kind}.", "Leave adapter.kind out, or --start."
        )
    try:
        stored = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank, alpha = int(stored["r"]), float(stored["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"The starting adapter in {folder} is damaged: {error}.", "Make or copy it again.") from error
    if (rank, alpha) != (config.rank, config.alpha) or config.initialization != "kaiming":
        raise ConfigError(
            f"The starting adapter has rank {rank} and alpha {alpha:g}, the settings say {config.rank}, {config.alpha:g} and "
            f"initialization {config.initialization}.",
            f"Use --set adapter.rank={rank} --set adapter.alpha={alpha:g}, and no other initialization than kaiming.",
        )
    return folder


def start_fingerprint(config: AdapterConfig) -> str | None:
    """What tells starting adapters apart: SHA-256 of the weights; None without one. Raises ConfigError."""
    return None if config.start is None else file_sha256(find_start(config) / "adapter_model.safetensors")


def load_adapter(model: Model, name: str, folder: Path) -> AttachedAdapter:
    """Adds a stored adapter (off) from a folder that `AttachedAdapter.write` made; does nothing if it is attached.

    Raises ConfigError where it does not fit the model.
    """
    if name not in model.adapters:
        with use_adapter(model, None):
            model.adapters[name] = _stored(model, name, folder)
    attached: AttachedAdapter = model.adapters[name]
    return attached


def _stored(model: Model, name: str, folder: Path) -> AttachedAdapter:
    if (folder / "adapter_config.json").is_file():
        return LoraAdapter.read(model, name, folder)
    if not (folder / CARD).is_file():
        return FullAdapter.read(model, folder)
    kind = read_card(folder)["kind"]
    if kind == "prefix":
        return PrefixAdapter.read(model, name, folder)
    if kind == "gated-memory":
        return GatedMemoryAdapter.read(model, name, folder)
    raise ConfigError(f"{folder} holds an adapter of the unknown kind '{kind}'.", "Use the version that wrote it.")


@contextlib.contextmanager
def use_adapter(model: Model, name: str | None, training: bool = False, strength: float = 1.0) -> Iterator[None]:
    """Within the block the named adapter is on, or with None the bare base model; afterwards all is as it was before.

    strength: so much of the change that it makes to the weights, between the base model (0) and all of it (1).
    Raises EntryNotFoundError where the model has no adapter of that name.
    """
    if name is not None and name not in model.adapters:
        raise EntryNotFoundError(
            f"The model {model.name} holds no adapter '{name}'.",
            "Absorb the document with this model, or open its library entry on it.",
        )
    before = model.adapters.get(_ACTIVE)
    try:
        _switch(model, name, training, strength)
        yield
    finally:
        if before is not None and before[0] in model.adapters:  # it may have been removed meanwhile
            _switch(model, *before)
        else:
            _switch(model, None)


def active_adapter(model: Model) -> AttachedAdapter | None:
    """The one that is on."""
    active = model.adapters.get(_ACTIVE)
    adapter: AttachedAdapter | None = None if active is None else model.adapters[active[0]]
    return adapter


@contextlib.contextmanager
def merge_adapter(model: Model) -> Iterator[None]:
    """Within the block the adapter that is on is part of the network's own weights, as far as it can be; afterwards they are
    the same as before, bit for bit. No adapter may be switched inside."""
    adapter = active_adapter(model)
    with adapter.merge() if isinstance(adapter, LoraAdapter) else contextlib.nullcontext():
        yield


def remove_adapter(model: Model, name: str) -> None:
    """Frees an adapter's memory."""
    with use_adapter(model, None):
        model.adapters.pop(name).remove()


def _switch(model: Model, name: str | None, training: bool = False, strength: float = 1.0) -> None:
    active = model.adapters.pop(_ACTIVE, None)
    if active is not None:
        model.adapters[active[0]].switch_off()
    if name is not None:
        model.adapters[name].switch_on(training, strength)
        model.adapters[_ACTIVE] = (name, training, strength)


__all__ = [
    "START_FOLDER",
    "AttachedAdapter",
    "active_adapter",
    "attach_adapter",
    "find_start",
    "load_adapter",
    "merge_adapter",
    "remove_adapter",
    "start_fingerprint",
    "use_adapter",
]
