"""Examples → tensors of one forward pass: one packed row of a group, else rows padded on the right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liftlm.examples import NO_LOSS, Example, PackedRow, pack_row, split_step
from liftlm.models import Model
from liftlm.probes import owner_mask

_TOKENS_A_DRIFT_TEXT = 512
# rows on a CPU have a multiple of these: oneDNN compiles every product anew for a length it has not met lately
_LENGTHS, _SHORT_LENGTHS, _SHORT = 32, 8, 256


@dataclass(frozen=True)
class SoftTargets:
    """Rows of all distilled positions: tokens (rows, k) int32, or OTHERS; shares (rows, k) float32 that sum to 1."""

    tokens: Tensor
    shares: Tensor


@dataclass(frozen=True)
class DriftTexts:
    """What a penalty on drifting is measured on (see `drift`); every example has its rows of `soft`."""

    examples: list[Example]
    soft: SoftTargets

    def of_step(self, step: int, tokens: int, seed: int) -> list[Example]:
        """One for each 512 tokens that the step has, at least one, drawn anew for every step."""
        count = min(len(self.examples), max(1, tokens // _TOKENS_A_DRIFT_TEXT))
        return random.Random(f"{seed}/drift/{step}").sample(self.examples, count)

    def entropy(self, rows: Sequence[Example]) -> float:
        """Mean over the targets of these, nats: by so much the loss is more than the divergence."""
        shares = torch.cat(
            [self.soft.shares[row.soft : row.soft + row.targets] for row in rows if row.soft is not None]
        )
        return float(torch.special.entr(shares).sum(1).mean())


def row_tensors(model: Model, rows: Sequence[Example]) -> tuple[Tensor, ...]:
    """What `Model.loss_sum` takes first: ids, labels, and for a packed row positions and mask."""
    longest = max(len(row) for row in rows)
    if rows[0].group and len(rows) > 1 and model.can_pack(longest):
        return _packed(model, pack_row(rows))
    pad, length = model.tokenizer.pad_token_id, _length(model, longest)
    tokens = [[*row.tokens, *[pad] * (length - len(row))] for row in rows]
    labels = [[*row.labels, *[NO_LOSS] * (length - len(row))] for row in rows]
    return torch.tensor(tokens, device=model.device), torch.tensor(labels, device=model.device)


def _packed(model: Model, row: PackedRow) -> tuple[Tensor, ...]:
    """(1, tokens) ids, labels and positions, and the mask. Padding is one more example, which has no loss."""
    pads = _rounded(len(row.tokens)) - len(row.tokens) if _pads(model) else 0
    filled = (
        row.tokens + [model.tokenizer.pad_token_id] * pads,
        row.labels + [NO_LOSS] * pads,
        row.positions + [0] * pads,
    )
    ids = [torch.tensor([values], device=model.device) for values in filled]
    owner = torch.tensor(row.owner + [row.owner[-1] + 1] * pads, device=model.device)
    return *ids, owner_mask(owner, model.dtype)


def _length(model: Model, longest: int) -> int:
    """What rows of so many tokens are padded to; not beyond the window, where learnt positions end."""
    return max(longest, min(_rounded(longest), model.window)) if _pads(model) else longest


def _rounded(tokens: int) -> int:
    """An eighth more at most, but for the shortest rows."""
    return tokens + -tokens % (_LENGTHS if tokens >= _SHORT else _SHORT_LENGTHS)


def _pads(model: Model) -> bool:
    """Not where the longest row decides how positions are rotated."""
    config = model.network.config.get_text_config()
    rotation = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return model.device.type == "cpu" and rotation.get("rope_type") not in ("dynamic", "longrope")


def likeliest_tokens(
    model: Model, rows: Sequence[Example], count: int, batch_tokens: int, *, whole: bool = True
) -> tuple[Tensor, Tensor]:
    """`Model.top_tokens` of all targets of these examples, in their order, in batches: (targets, count) int32 and float32."""
    said: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in split_step(range(len(rows)), rows, batch_tokens, 1, model.can_pack):
        chosen = [rows[index] for index in batch]
        ids, probabilities = model.top_tokens(count, *row_tensors(model, chosen), whole=whole)
        counts = [row.targets for row in chosen]
        parts = zip(torch.split(ids, counts), torch.split(probabilities, counts), strict=True)
        said |= {i: (part.int().cpu(), share.cpu()) for i, (part, share) in zip(batch, parts, strict=True)}
    tokens, shares = (torch.cat([said[index][part] for index in range(len(rows))]) for part in (0, 1))
    return tokens, shares


def soft_rows(rows: Sequence[Example], table: SoftTargets) -> tuple[Tensor, Tensor]:
    """(labelled positions, k + 1) tokens and shares of a micro-batch, in its order; the last column is the label's."""
    tokens, shares = [], []
    width = table.tokens.shape[1]
    for row in rows:
        labels = torch.tensor([label for label in row.labels[1:] if label != NO_LOSS])[:, None]
        if row.soft is None:
            soft = torch.zeros(len(labels), width, dtype=torch.long)
            share, rest = torch.zeros(len(labels), width), torch.ones(len(labels), 1)
        else:
            soft = table.tokens[row.soft : row.soft + len(labels)].long()
            share = table.shares[row.soft : row.soft + len(labels)] * row.soft_weight
            rest = torch.full((len(labels), 1), 1 - row.soft_weight)
        tokens.append(torch.cat([soft, labels], 1))
        shares.append(torch.cat([share, rest], 1))
    return torch.cat(tokens), torch.cat(shares)
