"""What a network does, found out by a look at it instead of by a list of families.

Knows transformers' networks only; `models` asks once and remembers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def owner_mask(owner: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, 1, tokens, tokens) added to attention scores: 0 where a token sees another, else the lowest number.

    owner (tokens): which example of a packed row a token belongs to, 0 for the beginning that all of them see.
    """
    sees = ((owner[:, None] == owner) | (owner == 0)).tril()
    mask = torch.zeros(sees.shape, dtype=dtype, device=owner.device)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min)[None, None]


def softcap(network: PreTrainedModel) -> float | None:
    value = getattr(network.config.get_text_config(), "final_logit_softcapping", None)
    return float(value) if value else None


@torch.no_grad()
def head_is_plain(network: PreTrainedModel) -> bool:
    """Whether logits = head(hidden states), up to a soft cap; measured on a few tokens instead of listing families.

    Some families scale them, and then the whole network is asked.
    """
    head = network.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return False
    vocabulary = head.weight.shape[0]
    probe = torch.tensor([[index % vocabulary for index in (1, 5, 3, 7)]], device=head.weight.device)
    training = network.training
    network.eval()
    try:
        expected = network(input_ids=probe, use_cache=False).logits.float()
        logits = head(network.base_model(input_ids=probe, use_cache=False)[0].to(head.weight.dtype)).float()
    except (TypeError, AttributeError, RuntimeError, ValueError):
        return False
    finally:
        network.train(training)
    cap = softcap(network)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return torch.allclose(expected, logits, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def keeps_apart(network: PreTrainedModel) -> bool:
    """Whether the network obeys positions and a mask that keep the examples of a row apart; measured on two short ones.

    What has no attention (Mamba), or counts positions by itself (ALiBi), does not.
    """
    if getattr(network.config.get_text_config(), "window_size", None):
        return False  # GPT-Neo's local attention counts by itself, too far apart to be seen here
    device = next(network.parameters()).device
    beginning, one, other = [1, 5], [3, 7, 2], [8, 4, 6, 9]
    owner = torch.tensor([0] * 2 + [1] * 3 + [2] * 4, device=device)
    positions = torch.tensor([[0, 1, 2, 3, 4, 2, 3, 4, 5]], device=device)
    training = network.training
    network.eval()
    try:
        row = {"attention_mask": owner_mask(owner, network.dtype), "position_ids": positions, "use_cache": False}
        packed = network.base_model(input_ids=torch.tensor([beginning + one + other], device=device), **row)[0]
        alone = network.base_model(input_ids=torch.tensor([beginning + other], device=device), use_cache=False)[0]
    except (TypeError, AttributeError, RuntimeError, ValueError, IndexError):
        return False
    finally:
        network.train(training)
    expected = alone[0, 2:].float()
    apart = (packed[0, 5:].float() - expected).norm() / expected.norm()
    return bool(apart < torch.finfo(network.dtype).eps ** 0.5)
