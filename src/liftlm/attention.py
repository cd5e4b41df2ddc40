"""Attention for training on CPUs: the same function as PyTorch's, with a backward pass made of matrix products.

PyTorch's own CPU kernel is good forward, and its backward pass slow where rows are short. So the kernel computes the output and
each query's log-sum-exp, and the backward pass makes the shares of a block of queries anew from it: nothing of the size tokens x
tokens is kept. transformers calls it through its attention interface; what it does not cover (a GPU, dropout, caches, no gradient
wanted) goes to transformers' own function. Knows nothing of models or adapters.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from liftlm.attention_calls import implementation, use_implementation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KERNEL: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_NAME = "liftlm_blocks"
_ROWS = 512  # of scores at once, counting a key's heads: in cache, and enough for a good matrix product
_BLOCKS = 8  # of queries at most: each has products of its own shape, which oneDNN compiles
_ROOM_BYTES = 64 << 20  # of a block's scores: twice that is needed at once
_SEES_NOTHING = 1e5  # as the log-sum-exp of a row: its shares are 0, and so are their gradients


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
    if torch.is_autocast_enabled("cpu") or query.device.type != "cpu" or query.dtype == torch.float16:
        return False
    return can_attend(query.shape, key.shape, value.shape, mask)


def can_attend(query: torch.Size, key: torch.Size, value: torch.Size, mask: Tensor | None) -> bool:
    """Whether `attend` takes these shapes: as many keys as queries, all of one size, a mask that all heads share."""
    if key != value or query[2:] != key[2:] or query[1] % key[1]:
        return False
    return mask is None or (mask.shape[1] == 1 and not mask.requires_grad)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k' + mask) v, and the logarithm of the sum of each query's exponentials, (batch, heads, tokens) float32.

    query (batch, heads, tokens, size), key and value (batch, their heads, tokens, size); mask (batch or 1, 1, tokens, tokens),
    None for causal: bool, or added to the scores.
    """
    dtype = query.dtype if _kernel_takes(query.dtype) else torch.float32
    inputs = (each.to(dtype) for each in (query, key, value))
    out, sums = _KERNEL(*inputs, 0.0, mask is None, attn_mask=_added(mask, dtype), scale=scale)
    return out.to(query.dtype), sums.masked_fill_(~(sums > -1e30), _SEES_NOTHING)


@functools.cache
def _kernel_takes(dtype: torch.dtype) -> bool:
    """Not bfloat16 where a processor has AMX and PyTorch is told to do without AVX-512."""
    probe = torch.zeros(1, 1, 1024, 32, dtype=dtype)
    try:
        _KERNEL(probe, probe, probe, 0.0, True)
    except RuntimeError:
        return False
    return True


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of the output, and what `attend` took and gave; 0 for rows that see nothing.

    Two more columns bring a query's log-sum-exp, in two parts, into the products of scores: what comes out is the logarithm of a
    share, near 0 where the share counts, so that rounding it to bfloat16 costs no more than rounding the share. In the same way
    two columns take from the gradients of shares what their softmax takes.
    """
    (batch, heads, tokens, size), groups = query.shape, key.shape[1]
    count, shared = batch * groups, heads // groups
    mask = _added(mask, query.dtype)
    along = (grad * out).sum(-1, dtype=torch.float32)  # sum over keys of share times gradient

    def by_token(rows: Tensor, more: Tensor) -> Tensor:
        """(batch, heads, tokens, …) → (count, tokens * shared, … + 2): the heads of a key beside each other."""
        wide = torch.cat([rows, _two_parts(more, rows.dtype)], -1)
        return wide.view(batch, groups, shared, tokens, -1).transpose(2, 3).reshape(count, tokens * shared, -1)

    queries, grads = by_token(query, sums / -scale), by_token(grad, -along)
    keys, values = (each.reshape(count, tokens, size) for each in (key, value))
    ones = keys.new_ones(count, tokens, 2)
    wide_keys, wide_values = (torch.cat([each, ones], -1).transpose(1, 2) for each in (keys, values))
    grad_query = torch.empty(count, tokens * shared, size, dtype=query.dtype)
    grad_key, grad_value = keys, values  # of the last block, which sees all keys, and then of those before it too
    step = _block(tokens, shared, batch * heads * tokens * query.dtype.itemsize)
    later = torch.ones(step, step, dtype=torch.bool).triu_(1)[:, None]  # keys that come after a query
    room = torch.empty(2, count * shared * step * tokens, dtype=query.dtype)  # the same memory for every block
    for start in reversed(range(0, tokens, step)):
        end = min(tokens, start + step)
        rows, seen = end - start, tokens if mask is not None else end
        shares, slopes = (part[: count * shared * rows * seen].view(count, -1, seen) for part in room)
        asking, wanted = (each[:, start * shared : end * shared] for each in (queries, grads))
        torch.baddbmm(shares, asking, wide_keys[:, :, :seen], beta=0, alpha=scale, out=shares)
        if mask is not None:
            shares.view(batch, groups, rows, shared, seen).add_(mask[:, :, start:end, None])
        shares.exp_()
        if mask is None:
            shares.view(count, rows, shared, seen)[..., start:].masked_fill_(later[:rows, :, :rows], 0)
        into_values = torch.bmm(shares.transpose(1, 2), wanted[..., :size]).float()
        torch.bmm(wanted, wide_values[:, :, :seen], out=slopes)
        slopes.mul_(shares)
        grad_query[:, start * shared : end * shared] = torch.bmm(slopes, keys[:, :seen])
        into_keys = torch.bmm(slopes.transpose(1, 2), asking[..., :size]).float()
        if end == tokens:
            grad_key, grad_value = into_keys, into_values
        else:
            grad_key[:, :seen] += into_keys
            grad_value[:, :seen] += into_values
    by_head = grad_query.mul_(scale).view(batch, groups, tokens, shared, size).transpose(2, 3).reshape(query.shape)
    found = (grad_key.mul_(scale), grad_value)
    key_grad, value_grad = (part.to(query.dtype).view(key.shape) for part in found)
    return by_head, key_grad, value_grad


def _block(tokens: int, shared: int, row_bytes: int) -> int:
    """Queries whose scores are made at once; row_bytes: of the scores of one query, of all heads."""
    most = max(16, _ROOM_BYTES // row_bytes)
    return min(tokens, most, max(16, _ROWS // shared, -(-tokens // _BLOCKS)))


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as what is added to scores, in their number format."""
    if mask is None or mask.dtype == dtype:
        return mask
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _two_parts(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """(…, 2): the numbers in another format, and what that lost."""
    high = numbers.to(dtype)
    return torch.stack([high, (numbers - high.float()).to(dtype)], -1)


class _BlockAttention(torch.autograd.Function):
    """`attend` as an operation with a gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        out, sums = attend(query, key, value, mask, scale)
        ctx.save_for_backward(query, key, value, mask, out, sums)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, mask, out, sums = ctx.saved_tensors
        return *attend_backward(grad, query, key, value, mask, ctx.scale, out, sums), None, None
