"""Attention for training on CPUs: the same function as PyTorch's, with a backward pass made of matrix products.

PyTorch's own CPU kernel is good forward, and its backward pass reaches a third of what the processor's matrix products do. Here
the scores of a block of queries are made at once, the softmax is in float32, and everything else is batched products in the
network's number format. transformers calls it through its attention interface; what it does not cover (a GPU, dropout, caches,
long rows, no gradient wanted) goes to transformers' own function. Knows nothing of models or adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from liftlm.attention_calls import implementation, use_implementation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "liftlm_blocks"
_ROWS = 384  # of scores at once, counting a key's heads: in cache, and enough for a good matrix product
KEPT_BYTES = 64 << 20  # probabilities that a call keeps for its backward pass; with more, PyTorch's kernel is as fast


@contextlib.contextmanager
def fast_attention(network: PreTrainedModel) -> Iterator[None]:
    """While active, a network on a CPU that uses PyTorch's attention uses this one where gradients are wanted."""
    if implementation(network) != "sdpa" or next(network.parameters()).device.type != "cpu":
        yield
        return
    _register()
    use_implementation(network, _NAME)
    try:
        yield
    finally:
        use_implementation(network, "sdpa")


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

    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not (attention_mask is not None or causal) or not _covers(query, key, value, attention_mask, options):
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _BlockAttention.apply(query, key, value, attention_mask, scale)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


def _covers(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether the call is one of those that are faster here, and means the same."""
    if not torch.is_grad_enabled() or not (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    if options["dropout"] or any(
        options.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux")
    ):
        return False
    if torch.is_autocast_enabled("cpu") or (mask is not None and mask.shape[1] != 1):
        return False
    batch, heads, tokens, size = query.shape
    if key.shape[2:] != (tokens, size) or heads % key.shape[1]:
        return False
    numbers = batch * heads * tokens * (tokens if mask is not None else (tokens + _ROWS) / 2)
    return numbers * query.dtype.itemsize <= KEPT_BYTES


def _spans(tokens: int, shared: int, causal: bool) -> list[tuple[int, int, int]]:
    """(first query, behind the last query, keys seen) of each block."""
    step = max(16, _ROWS // shared)
    starts = range(0, tokens, step)
    ends = [min(tokens, start + step) for start in starts]
    return [(start, end, end if causal else tokens) for start, end in zip(starts, ends, strict=True)]


class _BlockAttention(torch.autograd.Function):
    """softmax(scale * q k' + mask) v. Causal where there is no mask; a row of a mask that sees nothing sees all, as in `sdpa`.

    Query heads that share a key head are rows of one product: (batch * key heads, shared heads, tokens, size).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        (batch, heads, tokens, size), width = query.shape, value.shape[-1]
        queries = query.reshape(batch * key.shape[1], -1, tokens, size)
        keys, values = key.reshape(-1, tokens, size), value.reshape(-1, tokens, width)
        count, shared = queries.shape[:2]
        wide, wide_keys = queries.float() * scale, keys.float().transpose(1, 2)
        out = query.new_empty(count, shared, tokens, width)
        kept = []
        for start, end, seen in _spans(tokens, shared, mask is None):
            scores = torch.bmm(wide[:, :, start:end].reshape(count, -1, size), wide_keys[:, :, :seen])
            by_head = scores.view(batch, heads, end - start, seen)
            if mask is None:
                later = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).triu_(1)
                by_head[..., start:].masked_fill_(later, -torch.inf)
            elif mask.dtype == torch.bool:
                by_head.masked_fill_(~mask[:, :, start:end], torch.finfo(scores.dtype).min)
            else:
                by_head += mask[:, :, start:end]
            shares = torch.softmax(scores, -1).to(query.dtype)
            out[:, :, start:end] = torch.bmm(shares, values[:, :seen]).view(count, shared, end - start, width)
            kept.append(shares)
        ctx.save_for_backward(queries, keys, values, out, *kept)
        ctx.scale, ctx.causal, ctx.shapes = scale, mask is None, (query.shape, key.shape, value.shape)
        return out.view(batch, heads, tokens, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, keys, values, out, *kept = ctx.saved_tensors
        count, shared, tokens, size = queries.shape
        grads = grad.reshape(out.shape)
        along = (
            (grads.float() * out.float()).sum(-1, keepdim=True).to(grad.dtype)
        )  # sum over keys of share times gradient
        grad_query = torch.empty_like(queries)
        grad_key = torch.zeros_like(keys, dtype=torch.float32)
        grad_value = torch.zeros_like(values, dtype=torch.float32)
        for (start, end, seen), shares in zip(_spans(tokens, shared, ctx.causal), kept, strict=True):
            part = grads[:, :, start:end].reshape(count, -1, values.shape[-1])
            slope = torch.bmm(part, values[:, :seen].transpose(1, 2))
            slope = slope.sub_(along[:, :, start:end].reshape(count, -1, 1)).mul_(shares)
            grad_query[:, :, start:end] = torch.bmm(slope, keys[:, :seen]).view(count, shared, end - start, size)
            grad_key[:, :seen] += torch.bmm(slope.transpose(1, 2), queries[:, :, start:end].reshape(count, -1, size))
            grad_value[:, :seen] += torch.bmm(shares.transpose(1, 2), part)
        found = (grad_query.mul_(ctx.scale), grad_key.mul_(ctx.scale), grad_value)
        shaped = [tensor.to(grad.dtype).view(shape) for tensor, shape in zip(found, ctx.shapes, strict=True)]
        return *shaped, None, None
