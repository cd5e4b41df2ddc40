"""Next-token loss on the labelled positions only; the logits of all positions never exist at once.

For a vocabulary of 49,152 and a segment of 2048 tokens the full logits and their gradient are 800 MB in float32. Here
logits are made a chunk at a time and turned into the gradient of the hidden states at once (the idea of Liger's and
Apple's fused losses), so memory does not depend on the vocabulary times the length. Knows nothing of models: it is
given hidden states and a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liftlm.pauses import pause

_LEAST = 1e-6  # of what is left for OTHERS, as float32 does not tell less apart
OTHERS = -1  # in place of a target's id: all tokens that are not named beside it, as one
_CHUNK_ELEMENTS = 3 << 22  # logits at once: 48 MiB in float32


def next_token_loss(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Sum of -log p(label) over n positions, float32 scalar.

    hidden (n, hidden size): states that predict; labels (n): the token that follows each; weight (vocabulary, hidden
    size) and bias (vocabulary): the model's head; softcap: Gemma-2's `final_logit_softcapping`,
    logits = cap * tanh(logits / cap).
    """
    return soft_target_loss(
        hidden, labels[:, None], torch.ones_like(labels, dtype=torch.float32)[:, None], weight, bias, softcap
    )


def soft_target_loss(
    hidden: Tensor,
    targets: Tensor,
    shares: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Sum over n positions of -sum_k share * log p(target): cross-entropy with a distribution of k tokens.

    targets, shares: (n, k) token ids and float32 shares, as a teacher gives them. Its gradient is that of the KL divergence, from
    which it differs by the teacher's entropy. A target OTHERS is what is not named (with a share above 0, and once) in its row,
    as one outcome: how probabilities divide among those is free. The other arguments are those of `next_token_loss`.
    """
    loss: Tensor = _HeadLoss.apply(hidden, weight, bias, targets, shares, softcap)  # type: ignore[no-untyped-call]
    return loss


def soft_target_loss_of_logits(logits: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
    """The same from (n, vocabulary) float32 logits, where there is no head to be had apart."""
    logs = logits.log_softmax(-1)
    named = shares.masked_fill(targets == OTHERS, 0.0)
    reached = logs.gather(1, targets.clamp(min=0))
    loss = -(named * reached).sum()
    if bool((targets == OTHERS).any()):
        left = 1 - (reached.exp() * (named > 0)).sum(1)
        loss = loss - ((shares.sum(1) - named.sum(1)) * left.clamp(min=_LEAST).log()).sum()
    return loss


def _number_format(hidden: Tensor) -> torch.dtype:
    """What the head multiplies in: that of the hidden states, or autocast's."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _into_slopes(logits: Tensor, targets: Tensor, shares: Tensor, lumped: bool) -> Tensor:
    """The loss, summed over (n, vocabulary) float32 logits, which become its slopes in place.

    Those are softmax times the shares' sum, minus the wanted distribution; OTHERS divide their share as they do now.
    lumped: whether there are any.
    """
    given = shares.sum(1, keepdim=True)
    if lumped:
        shares = shares.masked_fill(targets == OTHERS, 0.0)
        targets = targets.clamp(min=0)
    reached = logits.gather(1, targets)
    highest = logits.amax(1, keepdim=True)
    mass = logits.sub_(highest).exp_().sum(1, keepdim=True)
    loss = (shares * (highest + mass.log() - reached)).sum()
    scale, wanted = given / mass, shares
    if lumped:
        named = logits.gather(1, targets) * (shares > 0)
        rest = given - shares.sum(1, keepdim=True)
        left = (mass - named.sum(1, keepdim=True)).clamp(min=_LEAST * mass)
        loss = loss + (rest * (mass.log() - left.log())).sum()
        scale, wanted = scale - rest / left, shares - named * rest / left
    logits.mul_(scale)
    logits.scatter_add_(1, targets, -wanted)
    return loss


class _HeadLoss(torch.autograd.Function):
    """Forward forms the gradients already, as both need the softmax; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shares: Tensor,
        softcap: float | None,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and need_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = min(max(1, _CHUNK_ELEMENTS // weight.shape[0]), max(1, hidden.shape[0]))
        number_format = _number_format(hidden)
        ctx.dtypes = (weight.dtype, bias.dtype if bias is not None else None)
        weight = weight.to(number_format)
        lumped = bool((targets == OTHERS).any())
        scores = hidden.new_empty(chunk, weight.shape[0], dtype=number_format)  # the same memory for every chunk
        wide = scores if number_format == torch.float32 else torch.empty_like(scores, dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk):
            pause()
            part = hidden[start : start + chunk].to(number_format)
            wanted, share = targets[start : start + chunk], shares[start : start + chunk].float()
            low, error = scores[: len(part)], wide[: len(part)]
            torch.mm(part, weight.T, out=low)
            if bias is not None:
                low += bias
            error.copy_(low)
            slope: Tensor | None = None
            if softcap is not None:
                squashed = error.div_(softcap).tanh_()
                slope = 1 - squashed.square()
                squashed.mul_(softcap)
            total += _into_slopes(error, wanted, share, lumped)
            if not (need_hidden or need_weight or need_bias):
                continue
            if slope is not None:
                error *= slope
            if grad_bias is not None:
                grad_bias += error.sum(0)
            low.copy_(error)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = low.mm(weight)
            if grad_weight is not None:
                grad_weight += low.T.mm(part)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(weight_dtype),
            None if grad_bias is None else (grad_bias * grad).to(bias_dtype),
            None,
            None,
            None,
        )
