"""Which part of a document goes into the window beside the question. Pure: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Sequence

from liftlm.config import ContextPolicy
from liftlm.errors import ConfigError


def select_context(policy: ContextPolicy, tokens: Sequence[int], budget: int, mark: Sequence[int]) -> list[int]:
    """At most `budget` token ids of the document `tokens`.

    none: nothing. truncate: all of it where it fits, else head and tail halves around `mark` ("...", as in the authors'
    LooGLE set-up: `ids[:max // 2 - len(mark)] + mark + ids[-max // 2:]`; here the mark's length is shared by both
    halves). Raises ConfigError for `retrieve`, which is not there yet.
    """
    if policy == "none":
        return []
    if policy == "retrieve":
        raise ConfigError("The context policy 'retrieve' is not implemented yet.", "Use --context truncate or none.")
    if len(tokens) <= budget:
        return list(tokens)
    kept = budget - len(mark)
    if kept < 2:
        return []
    tail = kept // 2
    return [*tokens[: kept - tail], *mark, *tokens[-tail:]]
