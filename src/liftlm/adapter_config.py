"""The settings of `adapter`: which kind, and what each kind has. Part of the one tree (`config.LiftConfig.adapter`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from liftlm.setting_types import Branch as _Branch
from liftlm.setting_types import Number as _Number
from liftlm.setting_types import Whole as _Whole


class GatedMemoryConfig(_Branch):
    """Of `kind: gated-memory` (arXiv 2502.14644 v1-v3)."""

    start: Literal["base", "authors"] = "base"  # as the base model, or with a random memory behind a gate of 0.05


class PrefixConfig(_Branch):
    """Of `kind: prefix`, a trained prefix of keys and values (arXiv 2506.06266)."""

    tokens: _Whole = Field(default=256, ge=2)  # in each layer
    source: Literal["beginning", "whole"] = (
        "beginning"  # whose cache it begins as: the first tokens, or runs from all over
    )
    frozen_tokens: _Whole = Field(default=1, ge=0)  # its first ones, which stay: what attention rests on


class AdapterConfig(_Branch):
    """What training may change."""

    kind: Literal["lora", "full", "gated-memory", "prefix"] = "lora"
    rank: _Whole = Field(default=32, ge=1)
    alpha: _Number = Field(default=64.0, gt=0)  # LoRA scale = alpha / rank
    dropout: _Number = Field(default=0.0, ge=0, lt=1)
    # as PEFT calls them; pissa and olora begin with parts of the weights and are written as a plain LoRA of twice the rank
    initialization: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"] = "kaiming"
    # names as in PEFT, of linear layers; the head is never one
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    start: str | None = None  # folder of a starting adapter that `lift pre-sft` made; None = one that changes nothing
    dora: bool = False  # PEFT's use_dora: directions and lengths of the weights are learnt apart
    rslora: bool = False  # PEFT's use_rslora: LoRA scale = alpha / √rank
    layers: Annotated[tuple[_Whole, ...], Field(min_length=1)] | None = None  # from 0, or from -1 down; None = all
    gated_memory: GatedMemoryConfig = GatedMemoryConfig()
    prefix: PrefixConfig = PrefixConfig()

    def recipe(self) -> dict[str, Any]:
        """What takes part, for this kind; what came later and is not used is left out, so that entries are found again.

        Of `start` its content counts, not its place (`adapters.start_fingerprint`).
        """
        settings = self.model_dump(mode="json")
        later = {"dora": False, "rslora": False, "layers": None}
        used = {key: settings[key] for key, unused in later.items() if settings[key] != unused}
        match self.kind:
            case "lora":
                first = ("rank", "alpha", "dropout", "initialization", "target_modules")
                return {"kind": "lora"} | {key: settings[key] for key in first} | used
            case "full":
                return {"kind": "full"}
            case "gated-memory" | "prefix":
                layers = {"layers": used["layers"]} if "layers" in used else {}
                branch = self.kind.replace("-", "_")
                return {"kind": self.kind, branch: settings[branch]} | layers
