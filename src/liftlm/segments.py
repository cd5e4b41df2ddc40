"""Cuts a document's tokens into overlapping segments. Pure: knows numbers, not tokenizers or models.

Why overlap: the paper found that without it the model learns pieces but not what follows what (LIFT, section 3.1,
"Training with segmented inputs": segments of l tokens, s of them shared with the next, s = 3/8 l).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens. `start` is the position of its first token in the document."""

    index: int
    start: int  # tokens
    tokens: tuple[int, ...]

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


def split_into_segments(tokens: Sequence[int], segment_tokens: int = 2048, overlap_tokens: int = 768) -> list[Segment]:
    """As few segments of at most `segment_tokens` as cover all tokens; neighbours share exactly `overlap_tokens`.

    The policy for the rest: instead of full segments and a short last one, the same number of segments is made equally
    long (to within one token), so that the last is never a sliver: it brings at least half as many new tokens as a full
    one, (segment_tokens - overlap_tokens) / 2. No tokens give no segments; a document that fits into one is one.

    The paper's s read the authors' way (segments *start* every s tokens) is `overlap_tokens = segment_tokens - s`;
    evened out, they start s apart or a little less.
    Raises ValueError unless 0 <= overlap_tokens < segment_tokens.
    """
    if not 0 <= overlap_tokens < segment_tokens:
        raise ValueError(f"need 0 <= overlap_tokens < segment_tokens, got {overlap_tokens} and {segment_tokens}")
    count = len(tokens)
    if count == 0:
        return []
    if count <= segment_tokens:
        return [Segment(0, 0, tuple(tokens))]
    fresh = count - overlap_tokens  # tokens to share out: each segment is its share of these, after the overlap
    pieces = -(-fresh // (segment_tokens - overlap_tokens))
    starts = [fresh * index // pieces for index in range(pieces + 1)]
    return [
        Segment(index, start, tuple(tokens[start : starts[index + 1] + overlap_tokens]))
        for index, start in enumerate(starts[:-1])
    ]
