"""One more token for each of several texts on a CPU: networks of Llama's form, in few operations, with weights laid out for it.

A token reads every weight once, so reading them is what it takes. transformers' own forward pass takes twice as long: oneDNN lays
the weights out anew at every product, and hundreds of small operations wait between them. Here the weights are laid out once
(a copy of them in memory), q, k and v are one product, and what follows a product (silu, times, plus) is done inside it. Which
networks have that form is measured: one token through both ways must give the same. LoRA that is on is multiplied beside
the weights. Everything else is left to transformers. Knows nothing of batches, questions or documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from liftlm.adapters import active_adapter
from liftlm.attention_calls import SEAM
from liftlm.devices import available_memory
from liftlm.models import Model
from liftlm.pauses import pause
from liftlm.products import ROWS, Change, Norm, OtherFormError, Product, base_layer, check_form


@dataclass(frozen=True)
class Beginning:
    """Tokens that texts begin with alike, and (1, heads, tokens, size) keys and values of them by layer."""

    tokens: int
    layers: Sequence[tuple[Tensor, Tensor]]


def attends_fully(model: Model) -> bool:
    """Whether every layer sees all tokens before it."""
    config: Any = model.network.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return all(kind == "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is None


def open_decoder(model: Model) -> Decoder | None:
    """For the weights and the adapter that are on now; None where transformers is to do it.

    To be asked for again when an adapter was switched or trained.
    """
    if model.device.type != "cpu" or model.network.training or model.decoder is False or not attends_fully(model):
        return None
    adapter = active_adapter(model)
    if adapter is not None and not adapter.mergeable:
        return None  # it acts at the attention
    kept: _Laid | None = model.decoder
    stamp = _stamp(model)
    if kept is None or kept.stamp != stamp:
        fresh = _lay_out(model, stamp)
        if fresh is None:
            model.decoder = False if kept is None else None
            return None
        model.decoder = kept = fresh
    try:
        return Decoder(model.network, kept, [[_change(part) for part in parts] for parts in kept.parts])
    except OtherFormError:
        return None


def in_one_row(texts: Sequence[Sequence[int]], known: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of texts behind so many known tokens: (tokens) ids and positions, and (texts) where each one ends."""
    ids = torch.tensor([token for text in texts for token in text])
    positions = torch.cat([torch.arange(known, known + len(text)) for text in texts])
    return ids, positions, torch.tensor([len(text) for text in texts]).cumsum(0) - 1


def apart(texts: Sequence[Sequence[int]], known: int) -> Tensor:
    """(tokens, known and tokens) whether one sees another: what is known, and what its own text has up to it."""
    owner = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor([len(text) for text in texts]))
    own = (owner[:, None] == owner).tril()
    return torch.cat([own.new_ones(len(owner), known), own], 1)


@dataclass(frozen=True)
class _Layer:
    first: Norm  # before attention
    qkv: Product
    q_norm: Norm | None
    k_norm: Norm | None
    out: Product
    second: Norm  # before the rest
    gate: Product
    up: Product
    down: Product
    heads: tuple[int, int, int]  # of queries, of keys, numbers in one
    scale: float


@dataclass(frozen=True)
class _Laid:
    """All weights of a network. stamp: which ones; alive: what they are of, so that no others get their addresses;
    parts: the linear layers of each product, by layer."""

    stamp: tuple[Any, ...]
    alive: list[Tensor] = field(repr=False)
    layers: list[_Layer]
    norm: Norm
    head: Product
    parts: list[list[list[Any]]] = field(repr=False)


class Decoder:
    """A network with what is on at the moment."""

    def __init__(self, network: Any, laid: _Laid, changes: list[list[Change | None]]) -> None:
        self._inner, self._laid, self._changes = network.base_model, laid, changes

    def read(self, ids: Tensor, positions: Tensor, cache: Any, mask: Tensor | None, ends: Tensor) -> Tensor:
        """(ends, vocabulary) logits after some of a row's tokens; the cache grows by all of them.

        ids, positions: (tokens). mask: (tokens, those of the cache and these), False where one does not see another; without
        one the cache is empty, and each sees what is before it. Meant for prompts.
        """
        layers = self._laid.layers
        x = self._through(
            ids,
            positions,
            lambda number, both, values: _read(both, values, cache.layers[number], mask, layers[number]),
        )
        return self._laid.head(self._laid.norm(x[ends]), None)

    def step(
        self, ids: Tensor, positions: Tensor, cache: Any, mask: Tensor | None = None, beginning: Beginning | None = None
    ) -> Tensor:
        """(rows, vocabulary) logits after one more token in each row; the cache grows.

        ids, positions: (rows, 1). mask: (rows, tokens of the cache, the new one included), False where a row has none.
        beginning: what all rows have before the cache; its keys and values are read once for all of them.
        """
        rows = len(ids)
        spare = max(0, ROWS - rows)
        shown = None if mask is None else mask[:, None, None].bool()
        layers = self._laid.layers

        def attend(number: int, both: Tensor, values: Tensor) -> Tensor:
            begun = None if beginning is None else beginning.layers[number]
            read = _step(both[:rows], values[:rows], cache.layers[number], shown, begun, layers[number])
            return pad(read, (0, 0, 0, spare)) if spare else read

        x = self._through(pad(ids[:, 0], (0, spare)), pad(positions[:, 0], (0, spare)), attend)
        return self._laid.head(self._laid.norm(x), None)[:rows]

    def _through(self, ids: Tensor, positions: Tensor, attend: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """(tokens, hidden) after all layers.

        attend: of a layer's number, (tokens, heads, size) queries and keys together, and values → (tokens, heads * size).
        """
        x: Tensor = self._inner.embed_tokens(ids)
        cos, sin = (each[0, :, None] for each in self._inner.rotary_emb(x, positions[None]))
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        for number, layer in enumerate(self._laid.layers):
            pause()
            changes = self._changes[number]
            queries, keys, size = layer.heads
            found = layer.qkv(layer.first(x), changes[0]).view(len(x), -1, size)
            both = found[:, : queries + keys]
            if layer.q_norm is not None and layer.k_norm is not None:
                both = torch.cat([layer.q_norm(both[:, :queries]), layer.k_norm(both[:, queries:])], 1)
            both = torch.addcmul(both * cos, both.roll(half, -1), sin)
            x = layer.out.joined(attend(number, both, found[:, queries + keys :]), x, changes[1], "add")
            inner = layer.second(x)
            gate = layer.gate(inner, changes[2], "swish")
            x = layer.down.joined(layer.up.joined(inner, gate, changes[3], "mul"), x, changes[4], "add")
        return x


def _read(both: Tensor, values: Tensor, store: Any, mask: Tensor | None, layer: _Layer) -> Tensor:
    """Attention of the tokens of a row."""
    queries = layer.heads[0]
    asked, new = (part.transpose(0, 1)[None] for part in (both[:, :queries], both[:, queries:]))
    keys, values = store.update(new, values.transpose(0, 1)[None])
    found = scaled_dot_product_attention(
        asked, keys, values, mask, is_causal=mask is None, scale=layer.scale, enable_gqa=True
    )
    return found[0].transpose(0, 1).reshape(len(both), -1)


def _step(
    both: Tensor, values: Tensor, store: Any, mask: Tensor | None, begun: tuple[Tensor, Tensor] | None, layer: _Layer
) -> Tensor:
    """Attention of one token in each row."""
    queries, heads, size = layer.heads
    keys, values = store.update(both[:, queries:, None], values[:, :, None])
    # the query heads that share a key stand as if they were tokens
    asked = both[:, :queries].reshape(len(both), heads, queries // heads, size)
    return _attend(asked, keys, values, mask, begun, layer.scale).reshape(len(both), -1)


def _attend(
    asked: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    begun: tuple[Tensor, Tensor] | None,
    scale: float,
) -> Tensor:
    """(rows, key heads, queries, size). Over two parts the softmaxes are joined by their sums."""
    if begun is None:
        return scaled_dot_product_attention(asked, keys, values, mask, scale=scale)
    rows, heads, queries, size = asked.shape
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=asked.dtype).masked_fill_(~mask, float("-inf"))
    own, own_sum = flash(asked, keys, values, attn_mask=mask, scale=scale)
    beside = asked.transpose(0, 1).reshape(1, heads, rows * queries, size)
    first, first_sum = flash(beside, *begun, scale=scale)
    first = first.reshape(heads, rows, queries, size).transpose(0, 1)
    first_sum = first_sum.reshape(heads, rows, queries).transpose(0, 1)
    share = torch.sigmoid(first_sum - own_sum)[..., None]
    return torch.lerp(own.float(), first.float(), share).to(asked.dtype)


# --- reading a network ------------------------------------------------------------------------------------------------


def _stamp(model: Model) -> tuple[Any, ...]:
    """Changes whenever the weights do, or the layers: PEFT puts others in their places for a first adapter."""
    network: Any = model.network
    weights = ((p.data_ptr(), p._version) for name, p in network.named_parameters() if ".lora_" not in name)
    return (*map(id, model.tuned or ()), *weights)


@torch.inference_mode()
def _lay_out(model: Model, stamp: tuple[Any, ...]) -> _Laid | None:
    """None where the network has another form, or memory is short."""
    network: Any = model.network
    needed = sum(p.nbytes for p in network.parameters())
    if needed * 2 > available_memory(model.device):
        return None
    try:
        inner, head = network.base_model, network.get_output_embeddings()
        layers, parts = [], []
        for block in inner.layers:
            layer, products = _read_layer(block)
            layers.append(layer)
            parts.append(products)
        laid = _Laid(
            stamp, [p.data for p in network.parameters()], layers, Norm.of(inner.norm), Product.of([head]), parts
        )
        return laid if _same(model, laid) else None
    except (AttributeError, TypeError, RuntimeError, ValueError, OtherFormError):
        return None


def _read_layer(block: Any) -> tuple[_Layer, list[list[Any]]]:
    attention, mlp = block.self_attn, block.mlp
    check_form(block, besides={"q_norm", "k_norm", SEAM})
    parts = [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj],
        [mlp.up_proj],
        [mlp.down_proj],
    ]
    size = int(attention.head_dim)
    queries, keys = (base_layer(part).weight.shape[0] // size for part in parts[0][:2])
    qkv, out, gate, up, down = (Product.of(part) for part in parts)
    layer = _Layer(
        first=Norm.of(block.input_layernorm),
        qkv=qkv,
        q_norm=Norm.of(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=Norm.of(attention.k_norm) if hasattr(attention, "k_norm") else None,
        out=out,
        second=Norm.of(block.post_attention_layernorm),
        gate=gate,
        up=up,
        down=down,
        heads=(queries, keys, size),
        scale=float(attention.scaling),
    )
    return layer, parts


def _same(model: Model, laid: _Laid) -> bool:
    """Whether a token after some others gets the same logits both ways."""
    from transformers import DynamicCache

    network: Any = model.network
    try:
        decoder = Decoder(network, laid, [[_change(part) for part in parts] for parts in laid.parts])
    except OtherFormError:
        return False
    vocabulary = network.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([index * 7 % vocabulary for index in (1, 5, 3, 8, 2)])
    cache = DynamicCache(config=network.config)
    first = decoder.read(ids[:4], torch.arange(4), cache, None, torch.tensor([3]))
    second = decoder.step(ids[4:, None], torch.tensor([[4]]), cache)
    found = torch.cat([first, second]).float()
    expected = network(input_ids=ids[None], use_cache=False).logits[0, 3:].float()
    limit = torch.finfo(model.dtype).eps ** 0.5
    return bool((found - expected).norm() <= limit * expected.norm())


def _change(layers: Sequence[Any]) -> Change | None:
    """The LoRA of these layers that is on; their parts do not mix. Raises OtherFormError."""
    if not any(hasattr(layer, "base_layer") for layer in layers):
        return None
    downs, ups, offset, rank = [], [], 0, 0
    width = sum(base_layer(layer).weight.shape[0] for layer in layers)
    for layer in layers:
        base = base_layer(layer)
        name = _name_of_change(layer)
        if name is not None:
            scale = layer.scaling[name]
            downs.append(layer.lora_A[name].weight.detach())
            ups.append((layer.lora_B[name].weight.detach() * scale, rank, offset))
            rank += downs[-1].shape[0]
        offset += base.weight.shape[0]
    if not downs:
        return None
    dtype = base_layer(layers[0]).weight.dtype
    up = downs[0].new_zeros(width, rank)
    for part, column, row in ups:
        up[row : row + part.shape[0], column : column + part.shape[1]] = part
    return Change.of(torch.cat(downs).to(dtype), up.to(dtype))


def _name_of_change(layer: Any) -> str | None:
    if not hasattr(layer, "base_layer") or layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return None
    if len(active) != 1 or active[0] in layer.lora_variant or layer.lora_bias[active[0]]:
        raise OtherFormError
    return str(active[0])


__all__ = ["Beginning", "Decoder", "apart", "attends_fully", "in_one_row", "open_decoder"]
