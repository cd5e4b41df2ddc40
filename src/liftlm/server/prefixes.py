"""Beginnings of prompts that were computed already: questions about one document often begin with the same text.

Keys and values are kept as they are after a prompt, least recently used ones go first. Knows nothing of what a key stands for.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from liftlm.batching import Network

_WORTH_KEEPING = 64  # tokens
_EACH = 4  # prompts of one key


class PrefixCache:
    """Within a number of bytes; nothing is kept where it is 0."""

    def __init__(self, network: Network, most_bytes: int) -> None:
        self._network, self._most = network, most_bytes
        self._kept: OrderedDict[tuple[Hashable, tuple[int, ...]], tuple[Any, int]] = OrderedDict()
        self.bytes = self.hits = self.misses = 0

    def find(self, key: Hashable, prompt: list[int]) -> tuple[Any, int]:
        """A cache that holds the longest known beginning of the prompt, and its tokens; (None, 0) where none is worth it.

        At least one token is left to compute.
        """
        best: tuple[Hashable, tuple[int, ...]] | None = None
        length = _WORTH_KEEPING - 1
        for place in self._kept:
            if place[0] == key:
                pairs = zip(place[1], prompt[:-1], strict=False)
                alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
                best, length = (place, alike) if alike > length else (best, length)
        if best is None:
            self.misses += 1
            return None, 0
        self.hits += 1
        self._kept.move_to_end(best)
        cache = self._network.new_cache()
        for index, layer in enumerate(self._kept[best][0]):  # views: a cache that grows copies them
            cache.layers[index].update(layer[0][..., :length, :], layer[1][..., :length, :])
        return cache, length

    def keep(self, key: Hashable, prompt: list[int], cache: Any) -> None:
        """Keeps what was computed of a prompt, where such a cache can be cut."""
        place = (key, tuple(prompt))
        if len(prompt) <= _WORTH_KEEPING or place in self._kept or not self._network.joins(cache):
            return
        tensors = [(layer.keys, layer.values) for layer in cache.layers]
        size = sum(tensor.nbytes for pair in tensors for tensor in pair)
        if size > self._most:
            return
        own = [known for known in self._kept if known[0] == key]
        for old in own[: max(0, len(own) - _EACH + 1)]:
            self._drop(old)
        while self.bytes + size > self._most:
            self._drop(next(iter(self._kept)))
        self._kept[place] = (tensors, size)
        self.bytes += size

    def forget(self, entry: str) -> None:
        """All of an entry; keys are (entry, strength)."""
        for place in [place for place in self._kept if isinstance(place[0], tuple) and place[0][0] == entry]:
            self._drop(place)

    def _drop(self, place: tuple[Hashable, tuple[int, ...]]) -> None:
        self.bytes -= self._kept.pop(place)[1]
