"""Continuous batching: prompts are computed in pieces, join a running batch, and leave it when they end.

The rows of a batch share transformers' cache: shorter ones are padded on the left, which is masked and not counted in
positions. Where a network's cache is not plain keys and values of every token (sliding windows, Mamba), or its positions cannot
be given, every text is continued alone. Knows nothing of adapters, queues or documents.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from liftlm.generating import attends_fully
from liftlm.models import Model
from liftlm.server.sequences import Choice, Sequence, choices_of

_HEADROOM = 64  # tokens that a batch can grow by before its keys and values are copied


class Network:
    """What a model's network can do, and one step of it."""

    def __init__(self, model: Model) -> None:
        self._network: Any = model.network
        self._device = model.device
        accepted = inspect.signature(model.network.forward).parameters
        self._keeps = "logits_to_keep" in accepted
        self._joins = "position_ids" in accepted and attends_fully(model)

    def new_cache(self) -> Any:
        return DynamicCache(config=self._network.config)

    def joins(self, cache: Any) -> bool:
        """Whether a text with such a cache can be one row of a batch."""
        return self._joins and all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)

    def compute(self, tokens: list[int], cache: Any, *, every: bool) -> Tensor:
        """(1 or tokens, vocabulary) logits after the last or after every token; the cache grows."""
        options: dict[str, Any] = {"logits_to_keep": 1} if self._keeps and not every else {}
        ids = torch.tensor([tokens], device=self._device)
        logits: Tensor = self._network(input_ids=ids, past_key_values=cache, use_cache=True, **options).logits[0]
        return logits if every else logits[-1:]

    def step(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any) -> Tensor:
        """(rows, vocabulary) logits after one more token in each row."""
        options = {} if positions is None else {"attention_mask": mask, "position_ids": positions}
        logits: Tensor = self._network(input_ids=ids, past_key_values=cache, use_cache=True, **options).logits[:, -1]
        return logits


class Prefill:
    """A prompt on its way into a cache. length: tokens that a cache from elsewhere holds already."""

    def __init__(self, network: Network, sequence: Sequence, cache: Any = None, length: int = 0) -> None:
        self.sequence, self.cache, self.length = sequence, cache or network.new_cache(), length
        self.choices: list[Choice] = []  # of the prompt, where they are wanted
        self._network = network
        self._logits: Tensor | None = None

    @property
    def done(self) -> bool:
        return self.length == len(self.sequence.prompt)

    @torch.inference_mode()
    def advance(self, tokens: int) -> None:
        """Computes so many more tokens."""
        prompt, sampling = self.sequence.prompt, self.sequence.sampling
        part = prompt[self.length : self.length + tokens]
        every = sampling.echo and sampling.logprobs is not None
        logits = self._network.compute(part, self.cache, every=every)
        if every:
            if not self.choices:
                self.choices.append(Choice(prompt[0]))
            following = prompt[self.length + 1 : self.length + 1 + len(part)]
            self.choices += choices_of(logits[: len(following)], following, sampling.logprobs or 0)
        self.length += len(part)
        self._logits = logits[-1]

    def first(self) -> str:
        """Takes the first token of the continuation."""
        assert self.done and self._logits is not None
        return self.sequence.take(self._logits)


class Batch:
    """Texts that are continued together, one token each at every step."""

    def __init__(self, network: Network, prefill: Prefill) -> None:
        self._network = network
        self.rows: list[Sequence] = [prefill.sequence]
        self._lengths = [prefill.length]  # real tokens in the cache, by row
        self.joins = network.joins(prefill.cache)
        self._cache = prefill.cache
        if self.joins:
            self._cache = _growing(network, [(layer.keys, layer.values) for layer in prefill.cache.layers])

    def join(self, prefill: Prefill) -> None:
        """Adds a row. Only where both `joins`."""
        longest = max(*self._lengths, prefill.length)
        layers = []
        for mine, theirs in zip(self._cache.layers, prefill.cache.layers, strict=True):
            pairs = ((mine.keys, theirs.keys), (mine.values, theirs.values))
            layers.append(tuple(torch.cat([_padded(a, longest), _padded(b, longest)]) for a, b in pairs))
        self._cache = _growing(self._network, layers)
        self.rows.append(prefill.sequence)
        self._lengths.append(prefill.length)

    @torch.inference_mode()
    def step(self) -> list[str]:
        """The text that became certain in each row. Ended rows are still there; see `drop`."""
        longest = max(self._lengths)
        ids = torch.tensor([[row.last] for row in self.rows])
        mask = positions = None
        if self.joins:
            positions = torch.tensor(self._lengths)[:, None]
            if min(self._lengths) < longest:
                mask = (torch.arange(longest + 1)[None] >= longest - positions).long()
        placed = [None if value is None else value.to(self._network._device) for value in (ids, mask, positions)]
        assert placed[0] is not None
        logits = self._network.step(placed[0], placed[1], placed[2], self._cache)
        self._lengths = [length + 1 for length in self._lengths]
        return [row.take(scores) for row, scores in zip(self.rows, logits, strict=True)]

    def drop(self, gone: list[Sequence]) -> None:
        """Takes rows out, and padding that no row needs any more."""
        kept = [index for index, row in enumerate(self.rows) if row not in gone]
        if len(kept) == len(self.rows):
            return
        before = max(self._lengths)
        self.rows = [self.rows[index] for index in kept]
        self._lengths = [self._lengths[index] for index in kept]
        if not kept:
            self._cache = None
            return
        start = before - max(self._lengths)
        layers = [
            tuple(tensor[kept, :, start:] for tensor in (layer.keys, layer.values)) for layer in self._cache.layers
        ]
        self._cache = _growing(self._network, layers)


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """transformers' layer copies all it holds at every token; this one has room for some more."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._hold(keys, values)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self._stores = [torch.nn.functional.pad(tensor, (0, 0, 0, _HEADROOM)) for tensor in (keys, values)]
        self.keys, self.values = (store[..., : keys.shape[-2], :] for store in self._stores)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        if after > self._stores[0].shape[-2]:
            self._hold(self.keys, self.values)
        for store, new in zip(self._stores, (key_states, value_states), strict=True):
            store[..., before:after, :] = new
        self.keys, self.values = (store[..., :after, :] for store in self._stores)
        return self.keys, self.values


def _growing(network: Network, layers: list[Any]) -> Any:
    cache = network.new_cache()
    cache.layers = [_GrowingLayer(keys, values) for keys, values in layers]
    return cache


def _padded(tensor: Tensor, length: int) -> Tensor:
    """(rows, heads, length, size), zeros on the left."""
    return torch.nn.functional.pad(tensor, (0, 0, length - tensor.shape[-2], 0))
