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
    """in_use: whether an entry must stay; switch_off: no adapter may be on when one is taken away."""

    def __init__(
        self,
        model: Model,
        library: Library,
        most_bytes: int,
        in_use: Callable[[str], bool],
        switch_off: Callable[[], None],
    ) -> None:
        self._model, self._library, self._most = model, library, most_bytes
        self._in_use, self._switch_off = in_use, switch_off
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
        self.trim()
        return opened

    def trim(self) -> None:
        """Takes entries away that nobody uses until the rest fits the budget; the one used last stays."""
        for old in list(self._entries)[:-1]:
            if self.bytes <= self._most:
                break
            if not self._in_use(old):
                self.forget(old)

    def forget(self, entry_id: str) -> None:
        """Frees its memory."""
        if self._entries.pop(entry_id, None) is not None:
            self._switch_off()
            remove_adapter(self._model, entry_id)
