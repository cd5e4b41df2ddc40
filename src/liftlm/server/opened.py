"""Library entries that are on the model at the moment: least recently used ones leave when a memory budget is spent.

Knows nothing of requests; whoever uses an entry says so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from liftlm.absorbing import Adapter
from liftlm.adapters import remove_adapter
from liftlm.config import AnsweringConfig
from liftlm.context import WindowText
from liftlm.library import Library
from liftlm.models import Model


@dataclass(eq=False)
class Opened:
    """An entry on the model, and its text as context policies show it."""

    adapter: Adapter
    bytes: int
    texts: dict[AnsweringConfig, WindowText] = field(default_factory=dict)


class OpenedEntries:
    """in_use: whether an entry must stay."""

    def __init__(self, model: Model, library: Library, most_bytes: int, in_use: Callable[[str], bool]) -> None:
        self._model, self._library, self._most, self._in_use = model, library, most_bytes, in_use
        self._entries: OrderedDict[str, Opened] = OrderedDict()
        self.hits = self.misses = 0

    @property
    def bytes(self) -> int:
        return sum(opened.bytes for opened in self._entries.values())

    def get(self, entry_id: str) -> Opened:
        """The entry, put on the model if it is not there. Raises what `Library.open` raises."""
        if entry_id in self._entries:
            self.hits += 1
            self._entries.move_to_end(entry_id)
            return self._entries[entry_id]
        self.misses += 1
        return self.add(self._library.open(entry_id, self._model))

    def add(self, adapter: Adapter) -> Opened:
        """One that is on the model already."""
        size = sum(tensor.nbytes for tensor in self._model.adapters[adapter.id].tensors().values())
        self._model.network.eval()  # a fresh LoRA layer begins in training mode, in which dropout acts
        opened = self._entries[adapter.id] = Opened(adapter, size)
        for old in list(self._entries):
            if self.bytes <= self._most:
                break
            if old != adapter.id and not self._in_use(old):
                self.forget(old)
        return opened

    def forget(self, entry_id: str) -> None:
        """Frees its memory."""
        if self._entries.pop(entry_id, None) is not None:
            remove_adapter(self._model, entry_id)
