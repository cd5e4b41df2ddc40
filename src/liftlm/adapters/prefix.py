"""A trained prefix of keys and values ("cartridge", arXiv 2506.06266): the model's own cache of some tokens, then trained.

It begins as what each attention computes for the first tokens of the document, or for runs of tokens from all over it, and so
as the base model that has those in its window. Keys are rotated as if the prefix stood right before the text, at positions
-p … -1, so that the text keeps its own. It costs no place in the window; every token sees all of it, also in layers
with a sliding window. Where positions are learnt (GPT-2) there are none below 0, and prefix and text share theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from liftlm.adapters.seam import SeamAdapter, read_card, read_weights, sites_of
from liftlm.attention_calls import AttentionCall, implementation, listening
from liftlm.config import AdapterConfig
from liftlm.errors import ConfigError
from liftlm.models import Model
from liftlm.prompts import leading_tokens

_RUN = 64  # tokens of a run, where the prefix is to cover the document
_KNOWN = ("sdpa", "eager", "liftlm_blocks")  # implementations whose masks are known to be what `_Mask` extends


class _Mask:
    """The mask with columns for the prefix, made once for all layers of a forward pass."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._of: Tensor | None = None
        self._made: Tensor | None = None

    def extended(self, call: AttentionCall, prefix: int, strength: float) -> Tensor | None:
        """(batch or 1, 1, tokens, prefix + tokens seen), added to scores; None where every token may see everything.

        strength: how much the prefix counts in the softmax, beside the text; 0 = not at all.
        """
        tokens, seen = call.query.shape[2], call.key.shape[2]
        if call.mask is None and tokens == 1 and strength == 1:
            return None
        key = (prefix, strength, tokens, seen, call.query.dtype, call.query.device, torch.is_inference_mode_enabled())
        if self._made is None or self._key != key or self._of is not call.mask:
            self._key, self._of, self._made = key, call.mask, _extend(call, prefix, strength)
        return self._made


def _extend(call: AttentionCall, prefix: int, strength: float) -> Tensor:
    like, mask = call.query, call.mask
    tokens, seen = call.query.shape[2], call.key.shape[2]
    lowest = torch.finfo(like.dtype).min
    if mask is None:
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=like.device).tril(seen - tokens)[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, lowest)
    columns = mask.new_full((*mask.shape[:3], prefix), math.log(strength) if strength else lowest)
    return torch.cat([columns, mask], 3)


class Prefix(torch.nn.Module):
    """Of one attention: keys and values (key heads, tokens, size). The first `frozen` tokens stay as they are."""

    def __init__(self, key: Tensor, value: Tensor, frozen: int, mask: _Mask) -> None:
        super().__init__()
        plain = torch.contiguous_format
        self.register_buffer("first_key", key[:, :frozen].clone(memory_format=plain))
        self.register_buffer("first_value", value[:, :frozen].clone(memory_format=plain))
        self.key = Parameter(key[:, frozen:].clone(memory_format=plain))
        self.value = Parameter(value[:, frozen:].clone(memory_format=plain))
        self._mask = mask

    def forward(self, call: AttentionCall, queries: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        if strength == 0:
            return call.compute()
        tokens = call.query.shape[2]
        if call.mask is None and tokens > 1:  # causal over what is there; a cache of fixed size may hold empty places
            call.key, call.value = call.key[:, :, :tokens], call.value[:, :, :tokens]
        first: Any = (self.first_key, self.first_value)
        prefix = first[0].shape[1] + self.key.shape[1]
        call.mask = self._mask.extended(call, prefix, strength)
        for name, frozen, trained in (("key", first[0], self.key), ("value", first[1], self.value)):
            seen = getattr(call, name)
            before = torch.cat([frozen, trained], 1).to(seen.dtype).expand(len(seen), -1, -1, -1)
            setattr(call, name, torch.cat([before, seen], 2))
        return call.compute()


class PrefixAdapter(SeamAdapter):
    """A prefix in all layers, or some. strength: how much it counts in the softmax beside the text in the window."""

    @classmethod
    def attach(cls, model: Model, name: str, config: AdapterConfig, tokens: Sequence[int]) -> PrefixAdapter:
        """A fresh one, from the document's token ids. Raises ConfigError where the model or its window do not allow it."""
        sites = sites_of(model, config.layers)
        _check(model)
        chosen = choose_tokens(tokens, config.prefix.tokens, config.prefix.source, leading_tokens(model.tokenizer))
        if len(chosen) > model.window:
            raise ConfigError(
                f"A prefix of {len(chosen)} tokens is computed at once and does not fit the window of {model.window}.",
                f"Lower adapter.prefix.tokens to {model.window} or less.",
            )
        positions_below = all(site.rotates is not False for site in sites)
        caches = _caches(model, chosen, positions_below)
        mask, frozen = _Mask(), min(config.prefix.frozen_tokens, len(chosen) - 1)
        layers = {site.path: Prefix(*caches[site.path], frozen, mask) for site in sites}
        card = {"kind": config.kind, "tokens": len(chosen), "frozen_tokens": frozen, "layers": list(layers)}
        return cls(model, name, layers, card)

    @classmethod
    def read(cls, model: Model, name: str, folder: Path) -> PrefixAdapter:
        """A stored one. Raises ConfigError where it does not fit."""
        card, tensors = read_card(folder), read_weights(folder)
        sites_of(model, None)
        _check(model)
        caches = _caches(model, [0, 0], positions_below=False)  # for their sizes
        mask = _Mask()

        def make(found: tuple[Tensor, Tensor]) -> Prefix:
            key, value = (part[:, :1].repeat(1, card["tokens"], 1) for part in found)
            return Prefix(key, value, card["frozen_tokens"], mask)

        return cls.of_stored(model, name, card, tensors, caches, make)


def choose_tokens(tokens: Sequence[int], count: int, source: str, lead: Sequence[int]) -> list[int]:
    """The tokenizer's leading tokens, then `count` of the document's in all: its first, or runs spread evenly over it."""
    room = count - len(lead)
    if source == "beginning" or len(tokens) <= room:
        return [*lead, *tokens[: max(room, 2)]]
    runs = max(1, room // _RUN)
    length = room // runs
    starts = [round(index * (len(tokens) - length) / max(runs - 1, 1)) for index in range(runs)]
    return [*lead, *(token for start in starts for token in tokens[start : start + length])]


@torch.no_grad()
def _caches(model: Model, tokens: Sequence[int], positions_below: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """By attention: float32 (key heads, tokens, size) keys and values of the bare model for these tokens."""
    network: Any = model.network
    paths = {module: path for path, module in network.named_modules()}
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(call: AttentionCall) -> None:
        found[paths[call.module]] = (call.key[0].float(), call.value[0].float())

    inputs = {"input_ids": torch.tensor([list(tokens)], device=model.device), "use_cache": False}
    if positions_below:
        inputs["position_ids"] = torch.arange(-len(tokens), 0, device=model.device)[None]
    with listening(network, keep):
        network.base_model(**inputs)
    return found


def _check(model: Model) -> None:
    name = implementation(model.network)
    if name not in _KNOWN:
        raise ConfigError(
            f"A prefix is not supported with the attention implementation '{name}'.",
            "Load the model with 'sdpa' or 'eager'.",
        )
