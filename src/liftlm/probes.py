"""What a network does, found out by a look at it instead of by a list of families.

Knows transformers' networks only; `models` asks once and remembers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from liftlm.attention_calls import AttentionCall, listening

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


@dataclass(frozen=True)
class AttentionSite:
    """A softmax attention of a network, and where its queries are before they are rotated."""

    path: str  # of the attention module
    heads: int
    head_size: int
    value_size: int
    rotates: bool | None  # whether queries depend on positions after that place; None where the place is not found
    source: str = ""  # the module below it that gives the queries out; "" where none does
    token_axis: int = 1  # of what that module gives
    columns: tuple[int, ...] | None = (
        None  # which of its numbers a token are the queries, head by head; None = all, in order
    )

    def read(self, output: Tensor) -> Tensor:
        """(batch, tokens, heads, head size) the queries in what the module `source` gave."""
        flat = output.movedim(self.token_axis, 1).flatten(2)
        if self.columns is not None:
            flat = flat[..., torch.tensor(self.columns, device=flat.device)]
        return flat.reshape(*flat.shape[:2], self.heads, self.head_size)


_TOKENS = 5  # of the texts that attention is looked at with
_TEXTS = 8


@torch.no_grad()
def attention_sites(network: PreTrainedModel) -> list[AttentionSite]:
    """All attentions that go through transformers' interface, in order; none where there are none.

    The queries before rotary embedding are found by what rotary embedding is: at position 0 it changes nothing. So of the modules
    inside an attention module that one gives the queries out whose numbers at the first token are, over several texts,
    those of the queries that attention is computed with; that also tells where they are among keys and values.
    """
    calls: dict[torch.nn.Module, AttentionCall] = {}
    _look(network, lambda call: calls.setdefault(call.module, call))
    outputs: dict[torch.nn.Module, Tensor] = {}

    def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[module] = output

    inside = {part for module in calls for part in module.modules() if part is not module}
    hooks = [part.register_forward_hook(keep) for part in inside]
    try:
        _look(network, lambda call: calls.__setitem__(call.module, call))
    finally:
        for hook in hooks:
            hook.remove()
    paths = {module: path for path, module in network.named_modules()}
    return [_site(paths[module], call, outputs) for module, call in calls.items()]


def _look(network: PreTrainedModel, listener: Callable[[AttentionCall], Any]) -> None:
    embedding: Any = network.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    probe = torch.randint(vocabulary, (_TEXTS, _TOKENS), generator=draw).to(embedding.weight.device)
    training = network.training
    network.eval()
    try:
        with listening(network, listener):
            network.base_model(input_ids=probe, use_cache=False)
    except (TypeError, AttributeError, RuntimeError, ValueError, IndexError, KeyError):
        return
    finally:
        network.train(training)


def _site(path: str, call: AttentionCall, outputs: dict[torch.nn.Module, Tensor]) -> AttentionSite:
    heads, size = call.query.shape[1], call.query.shape[3]
    site = AttentionSite(path, heads, size, call.value.shape[3], None)
    for name, part in reversed([*call.module.named_modules()]):  # a layer before the wrapper that PEFT puts around it
        output = outputs.get(part)
        if output is None or not name:
            continue
        for axis in range(1, output.dim()):
            if output.shape[axis] != _TOKENS or output.shape[0] != _TEXTS:
                continue
            columns = _columns(call.query[:, :, 0].flatten(1).float(), output.movedim(axis, 1)[:, 0].flatten(1).float())
            if columns is not None:
                plain = columns == tuple(range(output[0].numel() // _TOKENS))
                found = replace(site, source=name, token_axis=axis, columns=None if plain else columns)
                before = found.read(output).transpose(1, 2).float()
                turned = (before - call.query.float()).norm() > 0.1 * before.norm()
                return replace(found, rotates=bool(turned))
    return site


def _columns(queries: Tensor, numbers: Tensor) -> tuple[int, ...] | None:
    """For each query number its place among `numbers` (both (texts, …)), by what both are over the texts, up to a scale."""
    wanted = queries / queries.norm(dim=0, keepdim=True).clamp_min(1e-20)
    given = numbers / numbers.norm(dim=0, keepdim=True).clamp_min(1e-20)
    likeness, places = (wanted.T @ given).max(1)
    return tuple(places.tolist()) if bool((likeness > 0.999).all()) else None
