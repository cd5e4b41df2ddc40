"""A whole decoder layer with LoRA as one operation with a gradient, for training on CPUs.

A layer of Llama's form (Llama, SmolLM2, Mistral, Qwen2: RMS norm, rotated attention, a gated MLP with SiLU, two sums) is some
sixty operations in PyTorch, each of which autograd notes, keeps inputs of, and walks back through. Here both passes are written
out, which takes less memory and a little less time: the sums with the residual stream are done inside products, layers that read
the same rows share LoRA's first product, norms and activations are computed again instead of kept, gradients are added in place.
Layers of these classes are read from their modules and then tried on a few tokens; any other goes on as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from liftlm.adapters.fused import FusedLinear
from liftlm.attention import attend, attend_backward, can_attend
from liftlm.products import OtherFormError, base_layer, check_form

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # read the same rows
# others rotate or scale in ways of their own, which a few tokens need not show
_CLASSES = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}
_HARMLESS = {"position_ids", "use_cache", "cache_position", "past_key_values"}  # arguments of a layer without a cache


@contextlib.contextmanager
def fast_layers(network: PreTrainedModel) -> Iterator[None]:
    """While active, decoder layers on a CPU compute as one operation wherever gradients go through them."""
    layers = _readable(network)
    for layer in layers:
        layer.forward = functools.partial(_forward, layer, layer.forward)
    try:
        if layers and not _same(network, layers):
            _restore(layers)
        yield
    finally:
        _restore(layers)


def keeps_little(network: PreTrainedModel) -> bool:
    """Whether training a plain LoRA of this network keeps as little of a token as `_DecoderLayer` does, unless it recomputes."""
    layers = getattr(network.base_model, "layers", None) or []
    installed = bool(len(layers)) and all("forward" in layer.__dict__ for layer in layers)
    dropout = any(isinstance(part, torch.nn.Dropout) and part.p for part in network.modules())
    return not dropout and (installed or bool(_readable(network)))


def _restore(layers: Sequence[Any]) -> None:
    for layer in layers:
        layer.__dict__.pop("forward", None)  # the class's own


def _readable(network: PreTrainedModel) -> list[Any]:
    """The layers, if each has the form that is written out here."""
    try:
        layers = list(network.base_model.layers)
        for layer in layers:
            check_form(layer)
            attention = layer.self_attn
            own = type(layer).__name__ in _CLASSES and type(layer).__module__.startswith("transformers.models.")
            inner = [part for part in layer.modules() if part is not layer]
            hooks = any(part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__ for part in inner)
            devices = {parameter.device.type for parameter in layer.parameters()}
            if not own or not attention.is_causal or hooks or devices != {"cpu"} or "forward" in layer.__dict__:
                return []
    except (AttributeError, TypeError, OtherFormError):
        return []
    return layers


def _same(network: PreTrainedModel, layers: Sequence[Any]) -> bool:
    """Whether a few tokens get the same states both ways: some families multiply the sums, or what is added."""
    vocabulary = network.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr,index]
    ids = torch.tensor([[index * 7 % vocabulary for index in row] for row in ((1, 5, 3, 8, 2), (4, 9, 6, 1, 7))])
    written_out = [layer.forward for layer in layers]
    try:
        got = network.base_model(input_ids=ids, use_cache=False)[0].detach()
        _restore(layers)
        expected = network.base_model(input_ids=ids, use_cache=False)[0].detach()
        alike = (got - expected).float().norm() <= torch.finfo(got.dtype).eps ** 0.5 * expected.float().norm()
    except (TypeError, AttributeError, RuntimeError, ValueError, IndexError, KeyError):
        return False
    for layer, forward in zip(layers, written_out, strict=True):
        layer.forward = forward
    return bool(alike)


@dataclass(frozen=True)
class _Linear:
    """A frozen layer, and by how much a LoRA beside it counts (0: there is none)."""

    weight: Tensor
    bias: Tensor | None
    scale: float


@dataclass(frozen=True)
class _Form:
    """What a layer is made of, besides what is trained."""

    norms: tuple[Tensor, Tensor]
    eps: tuple[float, float]
    groups: tuple[tuple[_Linear, ...], ...]
    size: int  # of a head
    scale: float


def _forward(layer: Any, original: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """In place of the layer's own."""
    rotation: Any = kwargs.get("position_embeddings")
    mask = kwargs.get("attention_mask")
    extra = {name for name, value in kwargs.items() if value is not None} - {"position_embeddings", "attention_mask"}
    wanted = not args and rotation is not None and kwargs.get("past_key_values") is None and extra <= _HARMLESS
    if not wanted or not torch.is_grad_enabled() or torch.is_autocast_enabled(hidden_states.device.type):
        return original(hidden_states, *args, **kwargs)
    if (
        layer.gradient_checkpointing and layer.training
    ):  # the layer's own computes activations again, this one keeps them
        return original(hidden_states, *args, **kwargs)
    try:
        form, changes = _read(layer, hidden_states, rotation[0], mask)
    except OtherFormError:
        return original(hidden_states, *args, **kwargs)
    if not hidden_states.requires_grad and not any(change is not None and change.requires_grad for change in changes):
        return original(hidden_states, *args, **kwargs)
    return _DecoderLayer.apply(hidden_states, *rotation, mask, form, *changes)  # type: ignore[no-untyped-call,misc]


def _read(layer: Any, hidden: Tensor, cosine: Tensor, mask: Tensor | None) -> tuple[_Form, list[Tensor | None]]:
    """The layer's parts, and the matrices of each LoRA in the order of its linear layers. Raises OtherFormError."""
    attention, norms = layer.self_attn, (layer.input_layernorm, layer.post_attention_layernorm)
    size = int(attention.head_dim)
    if hidden.device.type != "cpu" or hidden.dtype == torch.float16:
        raise OtherFormError
    if getattr(attention, "attention_dropout", 0.0) and layer.training:
        raise OtherFormError
    if any(norm.weight.requires_grad for norm in norms) or hidden.dtype != norms[0].weight.dtype:
        raise OtherFormError
    changes: list[Tensor | None] = []
    groups = []
    for names in _GROUPS:
        group = []
        for name in names:
            part, down, up = _read_linear(getattr(attention if hasattr(attention, name) else layer.mlp, name), hidden)
            changes += [down, up]
            group.append(part)
        groups.append(tuple(group))
    batch, tokens = hidden.shape[:2]
    query, key, value = (torch.Size([batch, part.weight.shape[0] // size, tokens, size]) for part in groups[0])
    if cosine.shape[-1] != size or not can_attend(query, key, value, mask):
        raise OtherFormError
    eps = (float(norms[0].variance_epsilon), float(norms[1].variance_epsilon))
    weights = (norms[0].weight, norms[1].weight)
    return _Form(weights, eps, tuple(groups), size, float(attention.scaling)), changes


def _read_linear(layer: Any, hidden: Tensor) -> tuple[_Linear, Tensor | None, Tensor | None]:
    base = base_layer(layer)
    if type(base) is not torch.nn.Linear or type(base.weight) is not torch.nn.Parameter:
        raise OtherFormError
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        raise OtherFormError
    if layer is base or getattr(layer, "disable_adapters", False):
        return _Linear(base.weight, base.bias, 0.0), None, None
    name = layer.alone(hidden) if isinstance(layer, FusedLinear) else None
    if name is None:
        raise OtherFormError
    return (
        _Linear(base.weight, base.bias, float(layer.scaling[name])),
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
    )


class _Group:
    """Linear layers that read the same rows, with what is trained beside them: (tokens, in) → a (tokens, out) each."""

    def __init__(self, layers: tuple[_Linear, ...], changes: Sequence[Tensor | None]) -> None:
        self.layers = layers
        dtype = layers[0].weight.dtype
        downs, self.ups = changes[::2], [None if up is None else up.to(dtype) for up in changes[1::2]]
        self.ranks = [0 if down is None else down.shape[0] for down in downs]
        trained = [down for down in downs if down is not None]
        self.downs = torch.cat(trained).to(dtype) if trained else None
        self.formats = [None if change is None else change.dtype for change in changes]

    def lows(self, rows: Tensor) -> Tensor | None:
        """(tokens, ranks of all) LoRA's first product."""
        return None if self.downs is None else rows.mm(self.downs.T)

    def products(self, rows: Tensor, low: Tensor | None, onto: Tensor | None = None) -> list[Tensor]:
        """onto: what the product of a single layer is added to."""
        results = []
        for layer, up, part in zip(self.layers, self.ups, self._parts(low), strict=True):
            if onto is None:
                result = linear(rows, layer.weight, layer.bias)
            else:
                result = torch.addmm(onto if layer.bias is None else onto + layer.bias, rows, layer.weight.T)
            if up is not None and part is not None:
                result.addmm_(part, up.T, alpha=layer.scale)
            results.append(result)
        return results

    def slopes(self, grads: Sequence[Tensor]) -> Tensor | None:
        """(tokens, ranks of all) the gradient of LoRA's first product, with its scale in it."""
        found = [
            grad.mm(up).mul_(layer.scale)
            for grad, up, layer in zip(grads, self.ups, self.layers, strict=True)
            if up is not None
        ]
        return (torch.cat(found, 1) if len(found) > 1 else found[0]) if found else None

    def backward(self, grads: Sequence[Tensor], slopes: Tensor | None) -> Tensor:
        """The gradient of the rows."""
        result = grads[0].mm(self.layers[0].weight)
        for grad, layer in zip(grads[1:], self.layers[1:], strict=True):
            result.addmm_(grad, layer.weight)
        if slopes is not None and self.downs is not None:
            result.addmm_(slopes, self.downs)
        return result

    def changes(
        self, grads: Sequence[Tensor], slopes: Tensor | None, rows: Tensor, low: Tensor | None
    ) -> list[Tensor | None]:
        """The gradients of the matrices, in their own number formats."""
        if slopes is None or low is None:
            return [None] * len(self.formats)
        downs = iter(torch.split(slopes.T.mm(rows), [rank for rank in self.ranks if rank]))
        found: list[Tensor | None] = []
        for grad, layer, part, formats in zip(
            grads, self.layers, self._parts(low), zip(self.formats[::2], self.formats[1::2], strict=True), strict=True
        ):
            if part is None:
                found += [None, None]
            else:
                found += [next(downs).to(formats[0]), grad.T.mm(part).to(formats[1]).mul_(layer.scale)]
        return found

    def _parts(self, low: Tensor | None) -> list[Tensor | None]:
        """Of the first products, those of each layer."""
        parts, start = [], 0
        for rank in self.ranks:
            parts.append(low[:, start : start + rank] if rank and low is not None else None)
            start += rank
        return parts


class _DecoderLayer(torch.autograd.Function):
    """(batch, tokens, hidden) → the same. Of each token it keeps what is not cheap to compute again: some twelve hidden sizes."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        cosine: Tensor,
        sine: Tensor,
        mask: Tensor | None,
        form: _Form,
        *changes: Tensor | None,
    ) -> Tensor:
        batch, tokens = hidden.shape[:2]
        x = hidden.reshape(batch * tokens, -1)
        qkv, out, gate_up, down = _groups(form, changes)
        first, root = _norm(x, form.norms[0], form.eps[0])
        low_qkv = qkv.lows(first)
        query, key, value = (part.view(batch, tokens, -1, form.size) for part in qkv.products(first, low_qkv))
        query, key = _rotated(query, cosine, sine), _rotated(key, cosine, sine)
        heads = [part.transpose(1, 2) for part in (query, key, value)]
        found, sums = attend(heads[0], heads[1], heads[2], mask, form.scale)
        attended = found.transpose(1, 2).reshape(batch * tokens, -1)
        low_out = out.lows(attended)
        (middle,) = out.products(attended, low_out, onto=x)
        second, middle_root = _norm(middle, form.norms[1], form.eps[1])
        low_mlp = gate_up.lows(second)
        gate, up = gate_up.products(second, low_mlp)
        inner = silu(gate).mul_(up)
        low_down = down.lows(inner)
        (result,) = down.products(inner, low_down, onto=middle)
        ctx.save_for_backward(
            x, root, query, key, value, sums, attended, middle, middle_root, gate, up, cosine, sine, mask,
            low_qkv, low_out, low_mlp, low_down,
        )  # fmt: skip
        ctx.form, ctx.groups = form, (qkv, out, gate_up, down)
        return result.view(hidden.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (
            x, root, query, key, value, sums, attended, middle, middle_root, gate, up, cosine, sine, mask,
            low_qkv, low_out, low_mlp, low_down,
        ) = ctx.saved_tensors  # fmt: skip
        form, (qkv, out, gate_up, down) = ctx.form, ctx.groups
        grad = given.reshape(x.shape)

        slopes = down.slopes([grad])
        inner_grad = down.backward([grad], slopes)
        active = silu(gate)
        up_grad = inner_grad * active
        down_changes = down.changes([grad], slopes, active.mul_(up), low_down)
        gate_grad = torch.ops.aten.silu_backward(inner_grad.mul_(up), gate)
        del active, inner_grad
        slopes = gate_up.slopes([gate_grad, up_grad])
        second = _again(middle, middle_root, form.norms[1])
        mlp_changes = gate_up.changes([gate_grad, up_grad], slopes, second, low_mlp)
        grad = _norm_backward(
            gate_up.backward([gate_grad, up_grad], slopes), middle, middle_root, form.norms[1], onto=grad
        )
        del gate_grad, up_grad, second

        slopes = out.slopes([grad])
        out_changes = out.changes([grad], slopes, attended, low_out)
        shape = (*query.shape[:2], -1, form.size)
        known = (out.backward([grad], slopes), query, key, value, attended)
        given_out, q, k, v, found = (part.view(shape).transpose(1, 2) for part in known)
        query_grad, key_grad, value_grad = attend_backward(given_out, q, k, v, mask, form.scale, found, sums)
        grads = [_rotated(part.transpose(1, 2), cosine, sine, back=True) for part in (query_grad, key_grad)]
        rows = [part.reshape(len(x), -1) for part in (*grads, value_grad.transpose(1, 2))]
        slopes = qkv.slopes(rows)
        qkv_changes = qkv.changes(rows, slopes, _again(x, root, form.norms[0]), low_qkv)
        hidden_grad = None
        if ctx.needs_input_grad[0]:
            into_norm = qkv.backward(rows, slopes)
            hidden_grad = _norm_backward(into_norm, x, root, form.norms[0], onto=grad).view(given.shape)
        return hidden_grad, None, None, None, None, *qkv_changes, *out_changes, *mlp_changes, *down_changes


def _groups(form: _Form, changes: Sequence[Tensor | None]) -> list[_Group]:
    groups, start = [], 0
    for layers in form.groups:
        groups.append(_Group(layers, changes[start : start + 2 * len(layers)]))
        start += 2 * len(layers)
    return groups


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS norm as transformers rounds it, and (tokens, 1) float32 what the rows were multiplied by."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    root = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return _again(x, root, weight), root


def _again(x: Tensor, root: Tensor, weight: Tensor) -> Tensor:
    return (x * root).to(x.dtype).mul_(weight)


def _norm_backward(grad: Tensor, x: Tensor, root: Tensor, weight: Tensor, onto: Tensor) -> Tensor:
    """The gradient of the norm's input, added to another one: root * g - x * root^3 * mean(g * x), with g = grad * weight."""
    grad = grad.mul_(weight)
    along = (grad * x).sum(-1, keepdim=True, dtype=torch.float32)
    along.mul_(root**3).div_(-x.shape[-1])
    return torch.addcmul(onto, grad, root.to(x.dtype)).addcmul_(x, along.to(x.dtype))


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor, back: bool = False) -> Tensor:
    """Rotary embedding of (batch, tokens, heads, size), contiguous; back: the gradient of what was rotated."""
    half = x.shape[-1] // 2
    result = torch.empty(x.shape, dtype=x.dtype)
    cosine, sine = cosine[:, :, None], sine[:, :, None]
    one, two = x[..., :half], x[..., half:]
    first, second = sine[..., :half], sine[..., half:]
    if back:
        first, second = -second, -first
    torch.mul(one, cosine[..., :half], out=result[..., :half]).addcmul_(two, first, value=-1)
    torch.mul(two, cosine[..., half:], out=result[..., half:]).addcmul_(one, second)
    return result
