"""Continuous batching: prompts are computed in pieces, join a running batch, and leave it when they end.

The rows of a batch share transformers' cache: shorter ones are padded on the left, which is masked and not counted in
positions. Prompts that begin alike are computed from there on, many in one row that a mask keeps apart; what they share is held
once. Where a network's cache is not plain keys and values of every token (sliding windows, Mamba), or its positions cannot
be given, every text is continued alone. Knows nothing of adapters, queues or documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Rows
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from liftlm.decoding import Beginning, Decoder, apart, attends_fully, in_one_row, open_decoder
from liftlm.models import Model
from liftlm.sequences import Choice, Sampling, Sequence, choices_of

_HEADROOM = 64  # tokens that a batch can grow by before its keys and values are copied


class Network:
    """What a model's network can do, and one step of it."""

    def __init__(self, model: Model) -> None:
        self._network: Any = model.network
        self._model, self._device = model, model.device
        accepted = inspect.signature(model.network.forward).parameters
        self._keeps = "logits_to_keep" in accepted
        self._joins = "position_ids" in accepted and attends_fully(model)
        self._decoder: Decoder | None = None

    def refresh(self) -> None:
        """To be called when an adapter was switched: the fast way to a token is another one then, or there is none."""
        self._decoder = open_decoder(self._model) if self._joins else None

    @property
    def shares(self) -> bool:
        """Whether rows of a batch may have a `Beginning` in common."""
        return self._decoder is not None

    @property
    def batches(self) -> bool:
        """Whether texts can be continued together."""
        return self._joins

    def packs(self, longest: int) -> bool:
        """Whether prompts of up to so many tokens can be computed in one row."""
        return self._joins and self._model.can_pack(longest)

    def new_cache(self) -> Any:
        return DynamicCache(config=self._network.config)

    def joins(self, cache: Any) -> bool:
        """Whether a text with such a cache can be one row of a batch."""
        return self._joins and all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)

    def compute(self, tokens: list[int], cache: Any, *, every: bool) -> Tensor:
        """(1 or tokens, vocabulary) logits after the last or after every token; the cache grows."""
        if self._decoder is not None and not every:
            return self._read([tokens], cache)
        options: dict[str, Any] = {"logits_to_keep": 1} if self._keeps and not every else {}
        ids = torch.tensor([tokens], device=self._device)
        logits: Tensor = self._network(input_ids=ids, past_key_values=cache, use_cache=True, **options).logits[0]
        return logits if every else logits[-1:]

    def fill(self, tokens: list[int], cache: Any) -> None:
        """The same without logits."""
        if self._decoder is not None:
            self._read([tokens], cache)
            return
        ids = torch.tensor([tokens], device=self._device)
        self._network.base_model(input_ids=ids, past_key_values=cache, use_cache=True)

    def compute_apart(self, texts: Rows[Rows[int]], beginning: int, cache: Any) -> Tensor:
        """(texts, vocabulary) logits after each of some texts that all follow the tokens in the cache and do not see each other.

        Their keys and values are added to the cache one after the other. Only where it `packs`.
        """
        if self._decoder is not None:
            return self._read(texts, cache)
        ids, positions, ends = in_one_row(texts, beginning)
        sees = apart(texts, beginning)
        dtype, device = self._model.dtype, self._device
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
        options: dict[str, Any] = {"logits_to_keep": ends.to(device)} if self._keeps else {}
        logits: Tensor = self._network(
            input_ids=ids[None].to(device),
            position_ids=positions[None].to(device),
            attention_mask=mask[None, None].to(device),
            past_key_values=cache,
            use_cache=True,
            **options,
        ).logits[0]
        return logits if self._keeps else logits[ends]

    def _read(self, texts: Rows[Rows[int]], cache: Any) -> Tensor:
        assert self._decoder is not None
        known = int(cache.get_seq_length())
        ids, positions, ends = in_one_row(texts, known)
        alone = len(texts) == 1 and known == 0
        return self._decoder.read(ids, positions, cache, None if alone else apart(texts, known), ends)

    def step(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any, beginning: Beginning | None = None
    ) -> Tensor:
        """(rows, vocabulary) logits after one more token in each row. beginning: only where it `shares`."""
        if self._decoder is not None and positions is not None:
            return self._decoder.step(ids, positions, cache, mask, beginning)
        options = {} if positions is None else {"attention_mask": mask, "position_ids": positions}
        logits: Tensor = self._network(input_ids=ids, past_key_values=cache, use_cache=True, **options).logits[:, -1]
        return logits


def end_tokens(model: Model) -> frozenset[int]:
    """Those that end a text, as the model's own settings and its tokenizer say."""
    ends: Any = model.network.generation_config.eos_token_id  # type: ignore[union-attr]
    return frozenset([*(ends if isinstance(ends, list) else [ends]), model.tokenizer.eos_token_id]) - {None}


def continuation(model: Model, prompt: list[int], sampling: Sampling) -> Sequence:
    """A prompt to be continued as the model's own settings say."""
    penalty = float(getattr(model.network.generation_config, "repetition_penalty", None) or 1.0)
    return Sequence(prompt, sampling, model.tokenizer, end_tokens(model), penalty)


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
        self.beginning: Beginning | None = None
        if self.joins:
            self._cache = _growing(network, [(layer.keys, layer.values) for layer in prefill.cache.layers])

    @classmethod
    @torch.inference_mode()
    def begin(cls, network: Network, rows: list[Sequence], beginning: Beginning | None = None) -> Batch:
        """Computes the prompts of several texts, from their common beginning on, and takes the first token of each.

        Only where the network `packs`; ended rows are there too. beginning: only where it `shares`.
        """
        known = 0 if beginning is None else beginning.tokens
        cache = network.new_cache()
        for index, (keys, values) in enumerate(() if beginning is None else beginning.layers):
            cache.layers[index].update(keys, values)
        texts = [row.prompt[known:] for row in rows]
        alone = len(rows) == 1
        logits = network.compute(texts[0], cache, every=False) if alone else network.compute_apart(texts, known, cache)
        batch = cls.__new__(cls)
        batch._network, batch.rows, batch.joins, batch.beginning = network, rows, True, beginning
        batch._lengths = [len(text) for text in texts]
        longest, ends = max(batch._lengths), [known + sum(batch._lengths[: n + 1]) for n in range(len(rows))]
        spans = [(end - length, end) for end, length in zip(ends, batch._lengths, strict=True)]
        batch._cache = _growing(
            network,
            [
                [
                    torch.cat([_padded(tensor[..., start:end, :], longest) for start, end in spans])
                    for tensor in (layer.keys, layer.values)
                ]
                for layer in cache.layers
            ],
        )
        batch._take(logits)
        return batch

    def join(self, prefill: Prefill) -> None:
        """Adds a row. Only where both `joins`."""
        self.merge(Batch(self._network, prefill))

    def merge(self, other: Batch) -> None:
        """Adds another batch's rows. Only where both `joins` and have the same beginning."""
        longest = max(*self._lengths, *other._lengths)
        layers = []
        for mine, theirs in zip(self._cache.layers, other._cache.layers, strict=True):
            pairs = ((mine.keys, theirs.keys), (mine.values, theirs.values))
            layers.append([torch.cat([_padded(a, longest), _padded(b, longest)]) for a, b in pairs])
        self._cache = _growing(self._network, layers)
        self.rows = self.rows + other.rows
        self._lengths = self._lengths + other._lengths

    @torch.inference_mode()
    def step(self) -> list[str]:
        """The text that became certain in each row. Ended rows are still there, and are not asked; see `drop`."""
        longest = max(self._lengths)
        ids = torch.tensor([[row.last] for row in self.rows])
        mask = positions = None
        if self.joins:
            positions = torch.tensor(self._lengths)[:, None]
            if min(self._lengths) < longest:
                mask = (torch.arange(longest + 1)[None] >= longest - positions).long()
            positions = positions + (0 if self.beginning is None else self.beginning.tokens)
        placed = [None if value is None else value.to(self._network._device) for value in (ids, mask, positions)]
        assert placed[0] is not None
        logits = self._network.step(placed[0], placed[1], placed[2], self._cache, self.beginning)
        self._lengths = [length + 1 for length in self._lengths]
        return self._take(logits)

    def _take(self, logits: Tensor) -> list[str]:
        """(rows, vocabulary); the likeliest tokens of all rows are found at once."""
        likeliest = logits.argmax(-1).tolist() if any(row.greedy for row in self.rows) else [None] * len(self.rows)
        told = []
        for row, scores, token in zip(self.rows, logits, likeliest, strict=True):
            told.append("" if row.ending is not None else row.take(scores, token if row.greedy else None))
        return told

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
        layers = [[tensor[kept, :, start:] for tensor in (layer.keys, layer.values)] for layer in self._cache.layers]
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


def _growing(network: Network, layers: Rows[Any]) -> Any:
    cache = network.new_cache()
    cache.layers = [_GrowingLayer(keys, values) for keys, values in layers]
    return cache


def _padded(tensor: Tensor, length: int) -> Tensor:
    """(rows, heads, length, size), zeros on the left."""
    return torch.nn.functional.pad(tensor, (0, 0, length - tensor.shape[-2], 0))
