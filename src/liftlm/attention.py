"""Attention for training on CPUs: the same function as PyTorch's, with a backward pass made of matrix products.

PyTorch's own CPU kernel is good forward, and its backward pass reaches a third of what the processor's matrix products do. Here
the scores of a block of queries are made at once, the softmax is in float32, and everything else is batched products in the
network's number format. transformers calls it through its attention interface; what it does not cover (a GPU, dropout, caches,
no gradient wanted) goes to transformers' own function. Knows nothing of models or adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "liftlm_blocks"
_ROWS = 384  # of scores at once, counting a key's heads: in cache, and enough for a good matrix product
_KEPT_BYTES = 64 << 20  # probabilities of one call that are kept for the backward pass; more are computed again


@contextlib.contextmanager
def fast_attention(network: PreTrainedModel) -> Iterator[None]:
    """While active, a network on a CPU that uses PyTorch's attention uses this one where gradients are wanted."""
    config: Any = network.config
    if config._attn_implementation != "sdpa" or next(network.parameters()).device.type != "cpu":
        yield
        return
    _register()
    network.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        network.set_attn_implementation("sdpa")


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _forward)
    AttentionMaskInterface.register(_NAME, sdpa_mask)  # the same masks, and none where causal order is enough


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls. query (batch, heads, tokens, size), key and value (batch, their heads, tokens, size)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = attention_mask is None
    wants = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    ordinary = dropout == 0 and not any(
        kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux")
    )
    ordinary = ordinary and not torch.is_autocast_enabled("cpu")  # products of mixed number formats
    fits = query.shape[2] == key.shape[2] and query.shape[3] == key.shape[3] and query.shape[1] % key.shape[1] == 0
    ordered = not causal or (is_causal if is_causal is not None else getattr(module, "is_causal", True))
    if not (wants and ordinary and fits and ordered) or (attention_mask is not None and attention_mask.shape[1] != 1):
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _BlockAttention.apply(query, key, value, attention_mask, scale)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


class _Blocks:
    """Blocks of queries with the keys they may see; query heads that share a key head are rows of one product."""

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        self.batch, self.heads, self.tokens, self.size = query.shape
        self.groups = key.shape[1]
        self.shared = self.heads // self.groups
        self._mask = mask
        self._query = (query.float() * scale).view(-1, self.shared, self.tokens, self.size)
        self._keys = key.float().view(-1, self.tokens, self.size).transpose(1, 2)
        self._step = max(16, _ROWS // self.shared)
        self._later = torch.ones(self._step, self._step, dtype=torch.bool).triu_(1)

    def spans(self) -> list[tuple[int, int, int]]:
        """(first query, behind the last query, keys seen) of each block."""
        starts = range(0, self.tokens, self._step)
        ends = [min(self.tokens, start + self._step) for start in starts]
        return [
            (start, end, end if self._mask is None else self.tokens) for start, end in zip(starts, ends, strict=True)
        ]

    def probabilities(self, start: int, end: int, seen: int, dtype: torch.dtype) -> Tensor:
        """(batch * groups, shared * queries, keys seen)"""
        rows = self._query[:, :, start:end].reshape(len(self._query), -1, self.size)
        scores = torch.bmm(rows, self._keys[:, :, :seen])
        by_head = scores.view(self.batch, self.heads, end - start, seen)
        if self._mask is None:
            by_head[..., start:].masked_fill_(self._later[: end - start, : end - start], -torch.inf)
        elif self._mask.dtype == torch.bool:
            by_head.masked_fill_(~self._mask[:, :, start:end], torch.finfo(scores.dtype).min)
        else:
            by_head += self._mask[:, :, start:end]
        return torch.softmax(scores, -1).to(dtype)


class _BlockAttention(torch.autograd.Function):
    """softmax(scale * q k' + mask) v. Causal where there is no mask; a row of a mask that sees nothing sees all, as in `sdpa`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        blocks = _Blocks(query, key, mask, scale)
        values = value.view(-1, blocks.tokens, value.shape[-1])
        out = query.new_empty(*blocks._query.shape[:3], value.shape[-1])
        spans = blocks.spans()
        numbers = sum((end - start) * seen for start, end, seen in spans) * blocks.batch * blocks.heads
        keep = numbers * query.dtype.itemsize <= _KEPT_BYTES
        kept = []
        for start, end, seen in spans:
            shares = blocks.probabilities(start, end, seen, query.dtype)
            out[:, :, start:end] = torch.bmm(shares, values[:, :seen]).view(
                len(out), blocks.shared, end - start, value.shape[-1]
            )
            if keep:
                kept.append(shares)
        ctx.save_for_backward(query, key, value, mask, out, *kept)
        ctx.scale = scale
        return out.view(*query.shape[:3], value.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, mask, out, *kept = ctx.saved_tensors
        blocks = _Blocks(query, key, mask, ctx.scale)
        width, count = value.shape[-1], len(out)
        keys, values = key.view(count, blocks.tokens, -1), value.view(count, blocks.tokens, width)
        queries, grads = query.view(count, blocks.shared, blocks.tokens, -1), grad.reshape(out.shape)
        along = (grads.float() * out.float()).sum(-1, keepdim=True)  # sum over keys of share times its gradient
        grad_query = torch.empty_like(queries)
        grad_key = torch.zeros(keys.shape, dtype=torch.float32)
        grad_value = torch.zeros(values.shape, dtype=torch.float32)
        for index, (start, end, seen) in enumerate(blocks.spans()):
            shares = kept[index] if kept else blocks.probabilities(start, end, seen, query.dtype)
            part = grads[:, :, start:end].reshape(count, -1, width)
            grad_value[:, :seen] += torch.bmm(shares.transpose(1, 2), part)
            slope = torch.bmm(part, values[:, :seen].transpose(1, 2))
            slope = slope.sub_(along[:, :, start:end].reshape(count, -1, 1).to(slope.dtype)).mul_(shares)
            grad_query[:, :, start:end] = torch.bmm(slope, keys[:, :seen]).view(grad_query[:, :, start:end].shape)
            grad_key[:, :seen] += torch.bmm(
                slope.transpose(1, 2), queries[:, :, start:end].reshape(count, -1, blocks.size)
            )
        return (
            grad_query.mul_(ctx.scale).view_as(query),
            grad_key.mul_(ctx.scale).to(key.dtype).view_as(key),
            grad_value.to(value.dtype).view_as(value),
            None,
            None,
        )
