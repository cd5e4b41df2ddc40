"""The decoder of few operations gives what transformers gives; merged adapters leave the weights as they were; and counts:
products, forward passes, allocations and compilations, which no noise of a machine can hide."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import FAMILIES, load_in_float32, make_network, save_model
from liftlm import Document, LiftConfig, answer_all, load_config
from liftlm.adapters import attach_adapter, merge_adapter, use_adapter
from liftlm.batching import Batch, Network, continuation
from liftlm.decoding import Beginning, Decoder, open_decoder
from liftlm.examples import make_examples
from liftlm.segments import split_into_segments
from liftlm.sequences import Sampling
from liftlm.training import train

DECODED = {"llama", "llama-untied", "qwen3"}
KINDS = {
    "lora": [],
    "dora": ["adapter.dora=true"],
    "rslora": ["adapter.rslora=true"],
    "pissa": ["adapter.initialization=pissa"],
    "one layer": ["adapter.layers=[1]"],
    "some": ["adapter.target_modules=[v_proj,down_proj]"],
}
DOCUMENT = Document(title="Corriden", text="The ferryman Oswin Tarrel rang the bell of Corriden on 3 May 1743. " * 4)


def with_adapter(folder: Path, *settings: str, seed: int = 0) -> Any:
    """A model with an adapter `a` that changes a lot."""
    model = load_in_float32(folder)
    config = load_config(None, ["adapter.rank=4", "adapter.alpha=8", *settings])
    adapter = attach_adapter(model, "a", config.adapter, seed)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.parameters().items():
        if "lora_" in name and "magnitude" not in name:
            parameter.data += torch.randn(parameter.shape, generator=draw) * 0.2
    return model


def logits(model: Any, prompt: list[int], tokens: list[int], decoder: Decoder | None) -> torch.Tensor:
    """After each of `tokens`, one by one, behind a prompt that transformers computed."""
    network = Network(model)
    network._decoder = decoder
    cache, found = network.new_cache(), []
    with torch.inference_mode():
        network.fill(prompt, cache)
        for place, token in enumerate(tokens, len(prompt)):
            found.append(network.step(torch.tensor([[token]]), None, torch.tensor([[place]]), cache))
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_are_decoded_is_measured_and_what_comes_out_is_transformers(family: str, tmp_path: Path) -> None:
    model = load_in_float32(save_model(tmp_path / "m", family))
    decoder = open_decoder(model)
    assert (decoder is not None) == (family in DECODED)
    if decoder is not None:
        prompt, tokens = [5, 90, 17, 44] * 5, [7, 120, 33]
        torch.testing.assert_close(
            logits(model, prompt, tokens, decoder), logits(model, prompt, tokens, None), rtol=1e-4, atol=1e-4
        )


def test_a_family_that_only_looks_alike_is_left_to_transformers(tmp_path: Path) -> None:
    """Llama's modules with one number that the decoder does not know of."""
    model = load_in_float32(save_model(tmp_path / "m"))
    for layer in model.network.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, inputs, output: output * 1.5)
    assert open_decoder(model) is None and model.decoder is False


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_beside_the_weights_or_merged_is_the_same(kind: str, strength: float, tiny_folder: Path) -> None:
    model = with_adapter(tiny_folder, *KINDS[kind])
    prompt, tokens = [9, 80, 71] * 6, [7, 120, 33]
    bare = logits(model, prompt, tokens, open_decoder(model))
    with use_adapter(model, "a", strength=strength):
        expected = logits(model, prompt, tokens, None)
        beside = open_decoder(model)
        assert (beside is None) == (kind == "dora")
        if beside is not None:
            torch.testing.assert_close(logits(model, prompt, tokens, beside), expected, rtol=1e-4, atol=1e-4)
        with merge_adapter(model):
            merged = open_decoder(model)
            assert merged is not None
            torch.testing.assert_close(logits(model, prompt, tokens, merged), expected, rtol=1e-4, atol=2e-4)
            torch.testing.assert_close(logits(model, prompt, tokens, None), expected, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(logits(model, prompt, tokens, None), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(model, prompt, tokens, open_decoder(model)), bare, rtol=0, atol=0)
    assert (bare - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_after_merging_are_the_same_bit_for_bit(dtype: str, tiny_folder: Path) -> None:
    model = with_adapter(tiny_folder)
    model.network.to(getattr(torch, dtype))  # type: ignore[arg-type]
    model.dtype = getattr(torch, dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.network.named_parameters()}
    places = {name: parameter.data_ptr() for name, parameter in model.network.named_parameters()}
    with use_adapter(model, "a"):
        for _ in range(3):
            with pytest.raises(KeyError), merge_adapter(model):
                inside = dict(model.network.named_parameters())
                assert not all(torch.equal(inside[name], before[name]) for name in before)
                raise KeyError
    for name, parameter in model.network.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.data_ptr() == places[name]


def test_weights_that_changed_are_laid_out_again(tiny_folder: Path) -> None:
    model = load_in_float32(tiny_folder)
    prompt, tokens = [9, 80, 71] * 6, [7]
    first = logits(model, prompt, tokens, open_decoder(model))
    laid = model.decoder
    assert open_decoder(model) is not None and model.decoder is laid
    with torch.no_grad():
        model.network.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    second = logits(model, prompt, tokens, open_decoder(model))
    assert model.decoder is not laid and (first - second).abs().max() > 0.01
    torch.testing.assert_close(second, logits(model, prompt, tokens, None), rtol=1e-4, atol=1e-4)


def test_a_common_beginning_is_attended_to_as_if_each_row_had_it(tiny_folder: Path) -> None:
    model = load_in_float32(tiny_folder)
    network = Network(model)
    network.refresh()
    text = [index * 31 % 300 + 5 for index in range(90)]
    prompts = [[*text, *tail] for tail in ([7], [8, 9, 10], [11] * 20, [12, 13])]
    cache = network.new_cache()
    with torch.inference_mode():
        network.fill(text, cache)
    beginning = Beginning(len(text), [(layer.keys, layer.values) for layer in cache.layers])
    rows = [continuation(model, prompt, Sampling(20)) for prompt in prompts]
    batch = Batch.begin(network, rows[:3], beginning)
    batch.merge(Batch.begin(network, rows[3:], beginning))
    assert batch._cache.layers[0].keys.shape[2] < len(text)
    while any(row.ending is None for row in rows):
        batch.step()
    for row, prompt in zip(rows, prompts, strict=True):
        alone = continuation(model, prompt, Sampling(20))
        single = Batch.begin(Network(model), [alone])  # by transformers
        while alone.ending is None:
            single.step()
        assert row.tokens == alone.tokens


# --- counting ---------------------------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Of everything that PyTorch computes inside: calls by name, and the largest tensor that came out (in numbers)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        self.calls[name] = self.calls.get(name, 0) + 1
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return found

    def products(self) -> int:
        return sum(self.calls.get(name, 0) for name in ("mm", "addmm", "addmm_", "linear", "_linear_pointwise"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often the decoder went forward, and how often transformers did."""
    counts = {"steps": 0, "reads": 0, "forward": 0}

    def counted(owner: Any, method: str, key: str) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            counts[key] += 1
            return original(self, *arguments, **options)

        monkeypatch.setattr(owner, method, call)

    from transformers import LlamaForCausalLM

    counted(Decoder, "step", "steps")
    counted(Decoder, "read", "reads")
    counted(LlamaForCausalLM, "forward", "forward")
    return counts


def asked(model: Any, questions: list[str], count: int, *more: str) -> list[Any]:
    config = load_config(None, [f"answering.max_new_tokens={count}", "answering.context=none", *more])
    return answer_all(model, None, questions, document=DOCUMENT, config=config)


def test_forward_passes_for_a_token(
    tiny_folder: Path, decoded: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for a token of all rows together, one for a row of prompts, one for their common beginning."""
    monkeypatch.setattr("liftlm.batching.end_tokens", lambda model: frozenset())
    model = load_in_float32(tiny_folder)
    open_decoder(model)  # which compares itself with transformers once
    decoded.update(dict.fromkeys(decoded, 0))
    (one,) = asked(model, ["Who?"], 12)
    assert one.answer_tokens == 12 and decoded == {"steps": 11, "reads": 1, "forward": 0}
    decoded.update(dict.fromkeys(decoded, 0))
    many = asked(model, [f"Who was number {number}?" for number in range(8)], 12)
    assert all(each.answer_tokens == 12 for each in many)
    assert decoded == {"steps": 11, "reads": 2, "forward": 0}


def test_products_of_a_generated_token(tiny_folder: Path) -> None:
    """q, k and v are one; gate, up, down and what follows them are inside a product; the head."""
    model = with_adapter(tiny_folder)
    layers = len(model.network.model.layers)
    for name, merged, most in ((None, False, 5), ("a", True, 5), ("a", False, 15)):
        with use_adapter(model, name):
            context = merge_adapter(model) if merged else use_adapter(model, name)
            with context, torch.inference_mode():
                network = Network(model)
                network.refresh()
                row = continuation(model, [5, 6, 7], Sampling(9))
                batch = Batch.begin(network, [row])
                with Count() as count:
                    batch.step()
        assert count.products() == most * layers + 1, (name, merged)


def small_training(model: Any) -> tuple[list[Any], LiftConfig]:
    """Three segments of 200 tokens, a step each, and an adapter `a`; what is measured of a network once, is."""
    config = load_config(
        None, ["adapter.rank=2", "segments.segment_tokens=200", "training.batch_tokens=200", "training.epochs=1"]
    )
    tokens = model.encode(DOCUMENT.text * 8)[: 3 * 200]
    examples = make_examples(split_into_segments(tokens, 200, 0), model.tokenizer)
    for _ in range(2):
        attach_adapter(model, "a", config.adapter, 0)
        if model._plain_head is None:
            train(model, "a", examples[:1], config)
    return examples, config


def test_products_of_a_training_step(tiny_folder: Path) -> None:
    model = load_in_float32(tiny_folder)
    examples, config = small_training(model)
    with Count() as count:
        train(model, "a", examples, config)
    layers, linear, inputs = (
        2,
        7,
        4,
    )  # q, k, v read the same rows, and so do gate and up: they share LoRA's first product
    forward = linear + inputs + linear  # the weight, A, B
    backward = linear + linear + inputs + inputs + linear  # for inputs' gradients B, the weight, A; A's and B's own
    first = 3 + 1  # nothing before the first q, k, v has a gradient
    head = 2
    tried = layers * forward + layers * linear * 3  # once, both ways
    assert count.products() == len(examples) * (layers * (forward + backward) - first + head) + tried


def test_a_training_step_makes_no_tensor_of_the_logits_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = 8000
    folder = save_model(tmp_path / "m")
    make_network("llama", vocabulary).save_pretrained(folder)
    model = load_in_float32(folder)
    monkeypatch.setattr("liftlm.losses._CHUNK_ELEMENTS", 20 * vocabulary)
    examples, config = small_training(model)
    with Count() as count:
        train(model, "a", examples, config)
    assert vocabulary * 64 <= count.largest < 200 * vocabulary / 3, "the weights of the head are the largest"


def test_nothing_is_compiled_anew_from_batch_to_batch(tiny_folder: Path) -> None:
    """Neither training nor answering compiles anything: rows of any length cost what their tokens cost."""
    from torch._dynamo.utils import counters

    counters.clear()
    model = load_in_float32(tiny_folder)
    examples, config = small_training(model)
    train(model, "a", examples, config)
    asked(model, ["Who?", "When was it, and where?"], 5)
    assert not counters["frames"] and not counters["stats"]
