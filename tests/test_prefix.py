"""A trained prefix begins as the model that has those tokens in its window, and counts as one everywhere."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import FAMILIES, load_in_float32, save_model
from fake_server import FakeServer
from liftlm import Document, absorb, load_config
from liftlm.adapters import attach_adapter, load_adapter, use_adapter
from liftlm.adapters.prefix import choose_tokens
from liftlm.config import AdapterConfig
from liftlm.errors import ConfigError
from liftlm.examples import Example
from liftlm.generating import Prompt, generate
from liftlm.models import Model
from liftlm.rows import row_tensors
from test_tasks_llm import document as sentences

DRAW = torch.Generator().manual_seed(3)
BEGINNING = torch.randint(5, 150, (9,), generator=DRAW).tolist()
TEXT = torch.randint(5, 150, (1, 11), generator=DRAW)
SLIDING = 24  # the window of the tiny families that have one


def prefix(**settings: Any) -> AdapterConfig:
    return AdapterConfig.model_validate({"kind": "prefix", "prefix": {"tokens": len(BEGINNING)} | settings})


@pytest.fixture
def tiny_model(tiny_folder: Path) -> Model:
    model: Model = load_in_float32(tiny_folder)
    return model


def logits(model: Model, name: str | None, strength: float = 1.0, **inputs: Any) -> Tensor:
    with torch.no_grad(), use_adapter(model, name, strength=strength):
        return model.network(**({"input_ids": TEXT} | inputs)).logits.clone()


def shake(model: Model, name: str) -> None:
    draw = torch.Generator().manual_seed(7)
    for parameter in model.adapters[name].parameters().values():
        parameter.data.add_(torch.randn(parameter.shape, generator=draw))


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_as_those_tokens_in_the_window(family: str, tmp_path: Path) -> None:
    """The text keeps its own positions. Where they are learnt, prefix and text have the same ones."""
    model = load_in_float32(save_model(tmp_path / "m", family))
    attach_adapter(model, "A1", prefix(), 0, BEGINNING)
    whole = torch.cat([torch.tensor([BEGINNING]), TEXT], 1)
    positions = torch.arange(whole.shape[1])[None]
    inputs: dict[str, Any] = {}
    if family == "gpt2":
        positions = torch.cat([torch.arange(9), torch.arange(11)])[None]
        sees = torch.ones(20, 20, dtype=torch.bool).tril()
        inputs = {"attention_mask": torch.zeros(1, 1, 20, 20).masked_fill(~sees, torch.finfo(torch.float32).min)}
    expected = logits(model, None, input_ids=whole, position_ids=positions, **inputs)[:, len(BEGINNING) :]
    got = logits(model, "A1")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - logits(model, None)).abs().max() > 0.01


def test_every_token_sees_it_beyond_a_sliding_window(tmp_path: Path) -> None:
    model = load_in_float32(save_model(tmp_path / "m", "mistral-sliding"))
    attach_adapter(model, "A1", prefix(), 0, BEGINNING)
    text = torch.randint(5, 150, (1, 3 * SLIDING), generator=DRAW)
    with_it, without = logits(model, "A1", input_ids=text), logits(model, None, input_ids=text)
    assert bool(((with_it - without).abs().amax(-1) > 1e-3).all())


def test_tokens_from_all_over_the_document() -> None:
    document = list(range(1000))
    assert choose_tokens(document, 200, "beginning", [7]) == [7, *range(199)]
    chosen = choose_tokens(document, 200, "whole", [])
    assert len(chosen) == 198 and chosen[0] == 0 and chosen[-1] == 999
    assert [i for i, (a, b) in enumerate(itertools.pairwise(chosen)) if b != a + 1] == [65, 131]
    assert choose_tokens(document[:50], 200, "whole", [7]) == [7, *range(50)]


def test_it_must_fit_the_window(tmp_path: Path) -> None:
    model = load_in_float32(save_model(tmp_path / "m", window=64))
    with pytest.raises(ConfigError, match=r"prefix of 65 tokens .* window of 64"):
        attach_adapter(model, "A1", prefix(tokens=65), 0, list(range(5, 120)))
    assert not model.adapters


# --- where it acts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_and_padding_change_nothing(family: str, tmp_path: Path) -> None:
    model = load_in_float32(save_model(tmp_path / "m", family))
    attach_adapter(model, "A1", prefix(), 0, BEGINNING)
    shake(model, "A1")
    whole = logits(model, "A1")
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), TEXT], 1)
    mask = torch.tensor([[0] * 3 + [1] * TEXT.shape[1]])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    got = logits(model, "A1", input_ids=padded, attention_mask=mask, position_ids=positions)[:, 3:]
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), use_adapter(model, "A1"):
        first = model.network(input_ids=TEXT[:, :7], use_cache=True)
        cache, rest = first.past_key_values, []
        for index in range(7, TEXT.shape[1]):
            rest.append(
                model.network(input_ids=TEXT[:, index : index + 1], past_key_values=cache, use_cache=True).logits
            )
    torch.testing.assert_close(torch.cat([first.logits, *rest], 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_loss_of_examples_one_by_one(family: str, tmp_path: Path) -> None:
    model = load_in_float32(save_model(tmp_path / "m", family))
    attach_adapter(model, "A1", prefix(), 0, BEGINNING)
    shake(model, "A1")
    rows = [
        Example((5, 6, 7, *more), (-100,) * 4 + tuple(more[1:]), group="tasks", shared=3)
        for more in ((10, 11, 12), (20, 21), (30, 31, 32, 33))
    ]
    with torch.no_grad(), use_adapter(model, "A1"):
        tensors = row_tensors(model, rows)
        assert len(tensors) == 4, "packed"
        packed = model.loss_sum(*tensors)
        single = sum(model.loss_sum(*row_tensors(model, [row])) for row in rows)
    torch.testing.assert_close(packed, single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["prefix", "gated-memory"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-neox", "gpt2"])
def test_batched_answers_are_those_of_prompts_one_by_one(kind: str, family: str, tmp_path: Path) -> None:
    """Padding on the left, and a beginning that several prompts share computed once."""
    model = load_in_float32(save_model(tmp_path / "m", family))
    attach_adapter(model, "A1", prefix() if kind == "prefix" else AdapterConfig(kind="gated-memory"), 0, BEGINNING)
    shake(model, "A1")
    shared = torch.randint(5, 150, (70,), generator=DRAW).tolist()
    prompts = [Prompt([*shared, *range(20, 20 + count)], "text") for count in (2, 9, 5)] + [Prompt(list(range(9, 15)))]
    settings = load_config(None, ["answering.max_new_tokens=8"]).answering
    with use_adapter(model, "A1"):
        together = {text.index: text.text for text in generate(model, prompts, settings, 0)}
        alone = [next(generate(model, [Prompt(prompt.tokens)], settings, 0)).text for prompt in prompts]
    assert [together[index] for index in range(len(prompts))] == alone
    bare = [next(generate(model, [Prompt(prompt.tokens)], settings, 0)).text for prompt in prompts]
    assert bare != alone


def test_strength_weighs_it_against_the_text(tiny_model: Model) -> None:
    base = logits(tiny_model, None)
    attach_adapter(tiny_model, "A1", prefix(), 0, BEGINNING)
    shake(tiny_model, "A1")
    distances = [float((logits(tiny_model, "A1", strength) - base).abs().max()) for strength in (0.0, 0.2, 1.0)]
    assert distances[0] == 0 < distances[1] < distances[2]
    torch.testing.assert_close(logits(tiny_model, "A1", 1 - 1e-7), logits(tiny_model, "A1"), rtol=1e-4, atol=1e-4)


# --- training and files -----------------------------------------------------------------------------------------------


def test_gradients_by_differences(tmp_path: Path) -> None:
    model = load_in_float32(save_model(tmp_path / "m", "gpt-neox"))
    attached = attach_adapter(model, "A1", prefix(), 0, BEGINNING)
    model.network.double()
    weights = torch.linspace(-1, 1, 11 * 64, dtype=torch.float64).view(1, 11, 64)

    def loss() -> Tensor:
        return (model.network.base_model(input_ids=TEXT, use_cache=False)[0] * weights).sum()

    with use_adapter(model, "A1", training=True):
        loss().backward()
        assert len(attached.parameters()) == 4
        for name, parameter in attached.parameters().items():
            assert parameter.grad is not None and parameter.dtype == torch.float64
            flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
            index = int(gradient.abs().argmax())
            kept, step, values = float(flat[index]), 1e-5, []
            with torch.no_grad():
                for at in (kept + step, kept - step):
                    flat[index] = at
                    values.append(float(loss()))
            flat[index] = kept
            assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient[index]), rel=1e-5), name


@pytest.mark.parametrize("frozen", [0, 1, 4])
def test_the_first_tokens_stay(frozen: int, tiny_model: Model) -> None:
    attached = attach_adapter(tiny_model, "A1", prefix(frozen_tokens=frozen), 0, BEGINNING)
    assert {p.shape for p in attached.parameters().values()} == {(2, len(BEGINNING) - frozen, 16)}
    assert sum(t.shape[1] for n, t in attached.tensors().items() if n.endswith("key")) == 2 * len(BEGINNING)


def test_files(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_in_float32(tiny_folder)
    attached = attach_adapter(model, "A1", prefix(frozen_tokens=2), 0, BEGINNING)
    shake(model, "A1")
    attached.write(tmp_path, attached.tensors())
    other = load_in_float32(tiny_folder)
    load_adapter(other, "B2", tmp_path)
    assert torch.equal(logits(other, "B2"), logits(model, "A1"))
    assert torch.equal(logits(other, None), logits(model, None))
    wide = load_in_float32(save_model(tmp_path / "wide", width=128))
    with pytest.raises(ConfigError, match="does not fit"):
        load_adapter(wide, "C3", tmp_path)
    assert not wide.adapters


DOCUMENT = Document(title="Corriden", text="The ferryman Oswin Tarrel rang the bell of Corriden on 3 May 1743. " * 6)
LEARN = ["segments.segment_tokens=64", "training.batch_tokens=128", "adapter.prefix.tokens=16", "adapter.rank=4"]


@pytest.mark.parametrize("kind", ["lora", "full", "gated-memory", "prefix"])
@pytest.mark.parametrize(
    "objective",
    [
        ["tasks.writer=none"],
        ["tasks.writer=extractive"],
        ["tasks.writer=extractive", "tasks.teacher_weight=0.5", "tasks.reading=0.5", "tasks.passage_characters=200"],
    ],
    ids=["segments", "tasks", "distillation"],
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_objective_trains_every_kind(kind: str, objective: list[str], family: str, tmp_path: Path) -> None:
    model = load_in_float32(save_model(tmp_path / "m", family))
    rate = {"full": 1e-3, "prefix": 0.1}.get(kind, 0.01)
    settings = [*LEARN, *objective, f"adapter.kind={kind}", f"training.learning_rate={rate}", "training.epochs=6"]
    adapter = absorb(DOCUMENT, model, load_config(None, [*settings, "training.schedule=constant"]))
    losses = adapter.report.epoch_losses
    assert losses[-1] < losses[0] - 0.05, losses


@pytest.mark.usefixtures("quick_asking")
@pytest.mark.parametrize("kind", ["gated-memory", "prefix"])
def test_tasks_that_arrive_while_training_train_every_kind(kind: str, tiny_folder: Path) -> None:
    model = load_in_float32(tiny_folder)
    written = Document(title="The mill", text=sentences(12))
    with FakeServer() as server:
        rate = {"prefix": 0.1}.get(kind, 0.01)
        llm = ["tasks.writer=llm", f"tasks.llm.base_url={server.url}", "tasks.llm.model=writer-1", "training.epochs=6"]
        settings = [
            *LEARN,
            *llm,
            f"adapter.kind={kind}",
            f"training.learning_rate={rate}",
            "training.schedule=constant",
        ]
        adapter = absorb(written, model, load_config(None, settings))
    assert adapter.tasks >= 12 and len(server.requests) == 12
    losses = adapter.report.epoch_losses
    assert losses[-1] < losses[0] - 0.05, losses


@pytest.mark.parametrize("kind", ["gated-memory", "prefix"])
def test_activations_may_be_computed_again(kind: str, tiny_folder: Path) -> None:
    """Gradient checkpointing gives the same weights."""
    results = []
    for again in ("false", "true"):
        model = load_in_float32(tiny_folder)
        settings = [*LEARN, "tasks.writer=none", f"adapter.kind={kind}", f"training.gradient_checkpointing={again}"]
        adapter = absorb(DOCUMENT, model, load_config(None, settings))
        results.append({name: tensor.clone() for name, tensor in model.adapters[adapter.id].tensors().items()})
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-6)
