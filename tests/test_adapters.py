"""Adapters never leak: into the base model, into each other, or across switching, failing, removing and reloading.

Everything is compared bit for bit; the reference for files and logits is PEFT itself.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import FAMILIES, save_model
from liftlm import load_model
from liftlm.adapters import attach_adapter, load_adapter, remove_adapter, use_adapter
from liftlm.config import AdapterConfig, ModelConfig
from liftlm.errors import ConfigError, EntryNotFoundError
from liftlm.models import Model

IDS = torch.tensor([[5, 17, 40, 3, 99, 12, 7, 8, 150, 31], [9, 9, 1, 2, 77, 60, 5, 4, 3, 2]])
LORA = AdapterConfig(rank=4, alpha=8)
SMALL = AdapterConfig(rank=2, alpha=2, target_modules=("q_proj", "down_proj"))
FULL = AdapterConfig(kind="full")
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # of a Llama, but the head
GATED = AdapterConfig(kind="gated-memory")
DORA = AdapterConfig(rank=4, alpha=8, dora=True)
KINDS = pytest.mark.parametrize("config", [LORA, SMALL, FULL, GATED], ids=["lora", "lora-small", "full", "gated"])


def logits(model: Model, name: str | None = None) -> Tensor:
    with torch.no_grad(), use_adapter(model, name):
        return current(model)


def current(model: Model) -> Tensor:
    """Of whatever is on."""
    with torch.no_grad():
        found: Tensor = model.network(input_ids=IDS).logits
    return found.clone()


def fit(model: Model, name: str, *, steps: int = 2, seed: int = 0) -> None:
    """A few large steps on random text, each adapter on its own."""
    tokens = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(seed))
    with use_adapter(model, name, training=True):
        parameters = list(model.adapters[name].parameters().values())
        assert parameters and all(p.requires_grad for p in parameters)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            model.loss_sum(tokens, tokens).backward()
            optimizer.step()


def trained(model: Model, name: str, config: AdapterConfig, seed: int = 0) -> Tensor:
    """Attached and fitted; its logits."""
    attach_adapter(model, name, config, seed)
    fit(model, name, seed=seed)
    return logits(model, name)


def base_hash(model: Model) -> str:
    """Of every base weight, whatever PEFT has wrapped around it."""
    digest = hashlib.sha256()
    marks = (".lora_", "lift_seam")
    own = [(n, p) for n, p in model.network.named_parameters() if not any(mark in n for mark in marks)]
    named = {n.replace(".base_layer.", "."): p for n, p in own}
    for name in sorted(named):
        digest.update(f"{name}{named[name].dtype}{tuple(named[name].shape)}".encode())
        digest.update(named[name].detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- the base model ---------------------------------------------------------------------------------------------------


@KINDS
def test_the_base_model_stays_the_same_bit_for_bit(tiny_model: Model, config: AdapterConfig) -> None:
    before, weights = current(tiny_model), base_hash(tiny_model)
    attach_adapter(tiny_model, "A1", config, seed=1)
    assert torch.equal(current(tiny_model), before), "attached, off"
    assert torch.equal(logits(tiny_model, "A1"), before), "a fresh adapter changes nothing"
    fit(tiny_model, "A1")
    assert torch.equal(current(tiny_model), before), "trained, off"
    assert base_hash(tiny_model) == weights
    assert not torch.allclose(logits(tiny_model, "A1"), before), "training changed the adapter"
    assert torch.equal(current(tiny_model), before) and torch.equal(logits(tiny_model, None), before)
    assert not any(p.requires_grad for p in tiny_model.network.parameters())
    remove_adapter(tiny_model, "A1")
    assert torch.equal(current(tiny_model), before), "removed"
    assert base_hash(tiny_model) == weights and tiny_model.adapters == {}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [LORA, FULL, GATED, DORA], ids=["lora", "full", "gated", "dora"])
def test_every_family_switches_cleanly(family: str, config: AdapterConfig, tmp_path: Path) -> None:
    model = load_model(str(save_model(tmp_path / "m", family)))
    before, weights = current(model), base_hash(model)
    first = trained(model, "A1", config)
    assert not torch.equal(first, before)
    assert torch.equal(current(model), before) and torch.equal(logits(model, "A1"), first)
    assert base_hash(model) == weights


@pytest.mark.parametrize("config", [LORA, FULL, GATED], ids=["lora", "full", "gated"])
def test_sixteen_bit_models(config: AdapterConfig, tiny_folder: Path, tmp_path: Path) -> None:
    """Trained in float32, used in the model's own format, and the same after reloading."""
    model = load_model(str(tiny_folder), ModelConfig(dtype="bfloat16"))
    before, weights = current(model), base_hash(model)
    attach_adapter(model, "A1", config, seed=1)
    with use_adapter(model, "A1", training=True):
        assert {p.dtype for p in model.adapters["A1"].parameters().values()} == {torch.float32}
    fit(model, "A1")
    stored = model.adapters["A1"].tensors()  # as the library does, right after training
    first = logits(model, "A1")
    assert before.dtype == first.dtype == torch.bfloat16 and not torch.equal(first, before)
    assert torch.equal(current(model), before) and base_hash(model) == weights
    model.adapters["A1"].write(tmp_path, stored)
    (file,) = tmp_path.glob("*.safetensors")
    assert {t.dtype for t in load_file(file).values()} == {torch.bfloat16 if config is FULL else torch.float32}
    remove_adapter(model, "A1")
    load_adapter(model, "B2", tmp_path)
    assert torch.equal(logits(model, "B2"), first)
    assert torch.equal(current(model), before)


# --- several adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [LORA, SMALL, FULL, GATED], ids=["lora", "lora-small", "full", "gated"])
@pytest.mark.parametrize("second", [LORA, SMALL, FULL, GATED], ids=["lora", "lora-small", "full", "gated"])
def test_a_b_and_a_again(tiny_folder: Path, first: AdapterConfig, second: AdapterConfig) -> None:
    model = load_model(str(tiny_folder))
    base, weights = current(model), base_hash(model)
    a = trained(model, "A1", first, seed=1)
    b = trained(model, "B2", second, seed=2)
    assert not torch.equal(a, b) and not torch.equal(a, base) and not torch.equal(b, base)
    assert torch.equal(logits(model, "A1"), a) and torch.equal(logits(model, "B2"), b)
    assert torch.equal(logits(model, "A1"), a)
    assert torch.equal(current(model), base) and base_hash(model) == weights
    alone = load_model(str(tiny_folder))
    assert torch.equal(trained(alone, "B2", second, seed=2), b), "B is what it would be without A"
    remove_adapter(model, "A1")
    assert torch.equal(logits(model, "B2"), b) and torch.equal(current(model), base)


def test_all_linear_means_the_same_beside_another_lora(tiny_folder: Path) -> None:
    """PEFT looks for linear layers on a network that already has LoRA's own in it."""
    alone, second = load_model(str(tiny_folder)), load_model(str(tiny_folder))
    attach_adapter(second, "A1", SMALL, seed=1)
    names = [set(attach_adapter(model, "B2", LORA, seed=2).tensors()) for model in (alone, second)]
    assert names[0] == names[1] and len(names[0]) == 2 * 2 * 7  # A and B, 2 layers, 7 linear layers each


def test_only_the_trained_adapter_changes(tiny_model: Model) -> None:
    attach_adapter(tiny_model, "A1", LORA, seed=1)
    attach_adapter(tiny_model, "B2", LORA, seed=1)
    before = {name: tensor.clone() for name, tensor in tiny_model.adapters["A1"].tensors().items()}
    fit(tiny_model, "B2")
    after = tiny_model.adapters["A1"].tensors()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in tiny_model.adapters["A1"].parameters().values())


@KINDS
def test_the_start_depends_on_the_seed_alone(tiny_folder: Path, config: AdapterConfig) -> None:
    starts = []
    for global_seed, seed in ((0, 5), (1, 5), (0, 6)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        model = load_model(str(tiny_folder))
        starts.append(attach_adapter(model, "A1", config, seed).tensors())
        assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    same, other = ([torch.equal(starts[0][n], starts[i][n]) for n in starts[0]] for i in (1, 2))
    assert all(same)
    assert all(other) is (config.kind == "full")  # LoRA's A is random, a copy of the weights is not


def test_attaching_again_starts_afresh(tiny_model: Model) -> None:
    base = current(tiny_model)
    trained(tiny_model, "A1", LORA)
    attach_adapter(tiny_model, "A1", SMALL, seed=0)
    assert torch.equal(logits(tiny_model, "A1"), base)
    assert len(tiny_model.adapters["A1"].tensors()) == 2 * 2 * 2


@KINDS
def test_removing_the_last_and_attaching_again(tiny_folder: Path, config: AdapterConfig) -> None:
    model = load_model(str(tiny_folder))
    base = current(model)
    first = trained(model, "A1", config)
    for _ in range(2):
        remove_adapter(model, "A1")
        assert torch.equal(current(model), base)
        assert torch.equal(trained(model, "A1", config), first)
    remove_adapter(model, "A1")
    assert not any(".lora_" in name for name, _ in model.network.named_parameters()), "its memory is free"


# --- switching --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tiny_model: Model) -> tuple[Model, dict[str | None, Tensor]]:
    """A model with a LoRA A1 and full weights B2, and the logits of each and of neither."""
    expected: dict[str | None, Tensor] = {None: current(tiny_model)}
    expected["A1"] = trained(tiny_model, "A1", LORA, seed=1)
    expected["B2"] = trained(tiny_model, "B2", FULL, seed=2)
    return tiny_model, expected


def test_nested_blocks_put_back_what_was_on(pair: tuple[Model, dict[str | None, Tensor]]) -> None:
    model, expected = pair

    def check(name: str | None) -> None:
        assert torch.equal(current(model), expected[name]), name

    with use_adapter(model, "A1"):
        check("A1")
        with use_adapter(model, "B2"):
            check("B2")
            with use_adapter(model, None):
                check(None)
                with use_adapter(model, "A1"):
                    check("A1")
                check(None)
            check("B2")
            with use_adapter(model, "B2"):
                check("B2")
            check("B2")
        check("A1")
    check(None)


@pytest.mark.parametrize("name", ["A1", "B2"])
@pytest.mark.parametrize("training", [False, True])
def test_an_exception_puts_back_what_was_on(
    pair: tuple[Model, dict[str | None, Tensor]], name: str, training: bool
) -> None:
    model, expected = pair
    with pytest.raises(RuntimeError, match="boom"), use_adapter(model, name, training=training):
        raise RuntimeError("boom")
    assert torch.equal(current(model), expected[None])
    other = {"A1": "B2", "B2": "A1"}[name]
    with use_adapter(model, other):
        with pytest.raises(KeyboardInterrupt), use_adapter(model, name, training=training):
            raise KeyboardInterrupt
        assert torch.equal(current(model), expected[other])
    assert not any(p.requires_grad for p in model.network.parameters())


@pytest.mark.parametrize("outer", ["A1", "B2"])
def test_training_goes_on_after_a_look_at_something_else(
    pair: tuple[Model, dict[str | None, Tensor]], outer: str
) -> None:
    """A callback may ask the base model or another adapter in the middle of training."""
    model, expected = pair
    other = {"A1": "B2", "B2": "A1"}[outer]
    with use_adapter(model, outer, training=True):
        for inner in (None, other):
            assert torch.equal(logits(model, inner), expected[inner])
        parameters = model.adapters[outer].parameters().values()
        assert all(p.requires_grad for p in parameters)
        model.loss_sum(IDS, IDS).backward()
        assert any(p.grad is not None and p.grad.any() for p in parameters)


def test_sixteen_bit_training_keeps_its_small_steps_through_a_look_at_the_base(tiny_folder: Path) -> None:
    model = load_model(str(tiny_folder), ModelConfig(dtype="bfloat16"))
    attach_adapter(model, "A1", FULL, seed=0)
    with use_adapter(model, "A1", training=True):
        parameter = next(iter(model.adapters["A1"].parameters().values()))
        with torch.no_grad():
            parameter.fill_(1 + 2**-12)  # bfloat16 would round it to 1
        with use_adapter(model, None):
            assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
        assert parameter.dtype == torch.float32 and (parameter == 1 + 2**-12).all()


@KINDS
@pytest.mark.parametrize("on", ["A1", "B2"])
def test_attaching_loading_and_removing_while_another_is_on(
    pair: tuple[Model, dict[str | None, Tensor]], on: str, config: AdapterConfig, tmp_path: Path
) -> None:
    model, expected = pair
    with use_adapter(model, on):
        attach_adapter(model, "C3", config, seed=3)
        assert torch.equal(current(model), expected[on]), "the one that is on stays on"
        assert torch.equal(logits(model, "C3"), expected[None]), "the new one starts from the base model"
        model.adapters["C3"].write(tmp_path, model.adapters["C3"].tensors())
        remove_adapter(model, "C3")
        assert torch.equal(current(model), expected[on])
        load_adapter(model, "C3", tmp_path)
        assert torch.equal(current(model), expected[on])
    assert torch.equal(current(model), expected[None])


@pytest.mark.parametrize("name", ["A1", "B2"])
def test_removing_the_one_that_is_on(pair: tuple[Model, dict[str | None, Tensor]], name: str) -> None:
    model, expected = pair
    with use_adapter(model, name):
        with use_adapter(model, None):
            remove_adapter(model, name)
        assert torch.equal(current(model), expected[None])
    other = {"A1": "B2", "B2": "A1"}[name]
    with use_adapter(model, other):
        remove_adapter(model, other)
        assert torch.equal(current(model), expected[None])
    assert torch.equal(current(model), expected[None])


def test_an_adapter_of_another_model_is_named(pair: tuple[Model, dict[str | None, Tensor]]) -> None:
    model, expected = pair
    with use_adapter(model, "A1"):
        with pytest.raises(EntryNotFoundError, match="no adapter 'D4'"), use_adapter(model, "D4"):
            pass
        assert torch.equal(current(model), expected["A1"])


# --- settings and files that do not fit -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [
        ("nonsense",),
        ("q_proj", "nonsense"),
        ("mlp",),
        ("lm_head",),
        ("q_proj", "lm_head"),
        ("embed_tokens",),
        ("proj",),
        ("all-linear",),
        ("",),
    ],
    ids=str,
)
def test_wrong_target_modules(tiny_folder: Path, targets: tuple[str, ...]) -> None:
    """Each name must be a linear layer other than the head, and a refusal leaves the model as it was."""
    model = load_model(str(tiny_folder))
    base = current(model)
    wrong = AdapterConfig(rank=2, target_modules=targets)
    for loras in (0, 1):
        with pytest.raises(ConfigError, match="target_modules") as caught:
            attach_adapter(model, "A1", wrong, seed=0)
        assert f"'{targets[-1]}'" in caught.value.message
        assert "all-linear" in caught.value.next_step
        assert set(caught.value.next_step.removesuffix(".").split(": ")[1].split(", ")) == LINEAR
        assert "A1" not in model.adapters and torch.equal(current(model), base)
        if loras == 0:
            trained(model, "B2", LORA)
    trained(model, "A1", SMALL)


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("q_proj",), 2), (("self_attn.q_proj", "mlp.up_proj"), 4), (("model.layers.1.mlp.down_proj",), 1)],
    ids=str,
)
def test_target_modules_by_name_and_by_place(tiny_model: Model, targets: tuple[str, ...], count: int) -> None:
    config = AdapterConfig(rank=2, target_modules=targets)
    assert len(attach_adapter(tiny_model, "A1", config, seed=0).parameters()) == 2 * count
    remove_adapter(tiny_model, "A1")
    attach_adapter(tiny_model, "B2", LORA, seed=0)
    assert len(attach_adapter(tiny_model, "A1", config, seed=0).parameters()) == 2 * count


@pytest.mark.parametrize("config", [LORA, FULL, GATED], ids=["lora", "full", "gated"])
@pytest.mark.parametrize("damage", ["other family", "other size", "a tensor less", "a tensor more"])
def test_adapters_that_do_not_fit_the_model(
    tiny_folder: Path, config: AdapterConfig, damage: str, tmp_path: Path
) -> None:
    model = load_model(str(tiny_folder))
    source = load_model(str(save_model(tmp_path / "m", "gpt-neox"))) if damage == "other family" else model
    attached = attach_adapter(source, "A1", config, seed=0)
    tensors = dict(attached.tensors())
    name = sorted(tensors)[0]
    if damage == "other size":
        tensors[name] = tensors[name][:, :-1].clone()
    elif damage == "a tensor less":
        del tensors[name]
    elif damage == "a tensor more":
        tensors[name.replace(".0.", ".9.") + "x"] = tensors[name].clone()
    folder = tmp_path / "adapter"
    folder.mkdir()
    attached.write(folder, tensors)
    remove_adapter(source, "A1")
    base = current(model)
    with pytest.raises(ConfigError, match="fit"):
        load_adapter(model, "B2", folder)
    assert "B2" not in model.adapters and torch.equal(current(model), base)
    assert not any(".lora_" in name for name, _ in model.network.named_parameters()), "nothing half-loaded is left"
    attach_adapter(model, "B2", config, seed=0)
    assert torch.equal(logits(model, "B2"), base)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "phi3", "gemma3"])
def test_folder_is_a_peft_folder(family: str, tmp_path: Path) -> None:
    """The same tensor names as PEFT's own save_pretrained; plain PEFT and transformers give the same logits with it."""
    import transformers

    model = load_model(str(save_model(tmp_path / "m", family)))
    expected = trained(model, "A1", LORA)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    model.adapters["A1"].write(ours, model.adapters["A1"].tensors())
    model.peft.save_pretrained(str(theirs), selected_adapters=["A1"])
    wanted = load_file(theirs / "A1" / "adapter_model.safetensors")
    written = load_file(ours / "adapter_model.safetensors")
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    plain = peft.PeftModel.from_pretrained(network, str(ours)).eval()
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS).logits, expected)
    # and the other way round: a folder that PEFT wrote
    remove_adapter(model, "A1")
    load_adapter(model, "B2", theirs / "A1")
    assert torch.equal(logits(model, "B2"), expected)


@pytest.mark.parametrize(
    ("config", "alpha"),
    [(LORA, 8), (SMALL, 2), (AdapterConfig(rank=4, alpha=2.5), 2.5)],
    ids=["all-linear", "named", "uneven alpha"],
)
def test_adapter_config_holds_what_peft_and_vllm_read(
    tiny_model: Model, config: AdapterConfig, alpha: float, tmp_path: Path
) -> None:
    attached = attach_adapter(tiny_model, "A1", config, seed=0)
    attached.write(tmp_path, attached.tensors())
    card: dict[str, Any] = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (card["peft_type"], card["task_type"], card["r"]) == ("LORA", "CAUSAL_LM", config.rank)
    assert card["lora_alpha"] == alpha and isinstance(card["lora_alpha"], type(alpha))
    assert isinstance(card["target_modules"], list)
    layers = {name.rpartition(".")[2] for name in card["target_modules"]}
    assert layers == (LINEAR if config.target_modules == "all-linear" else set(config.target_modules))
    assert card["base_model_name_or_path"] == str(tiny_model.folder)
    assert (card["bias"], card["use_dora"], card["use_rslora"], card["inference_mode"]) == ("none", False, False, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_full_weights_are_a_file_that_transformers_reads(tiny_model: Model, tmp_path: Path) -> None:
    import shutil

    import transformers

    expected = trained(tiny_model, "A1", FULL)
    tiny_model.adapters["A1"].write(tmp_path, tiny_model.adapters["A1"].tensors())
    shutil.copy(tiny_model.folder / "config.json", tmp_path)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(network(input_ids=IDS).logits, expected)


@KINDS
def test_loading_into_a_fresh_model_beside_others(tiny_folder: Path, config: AdapterConfig, tmp_path: Path) -> None:
    model = load_model(str(tiny_folder))
    expected = trained(model, "A1", config)
    model.adapters["A1"].write(tmp_path, model.adapters["A1"].tensors())
    other = load_model(str(tiny_folder))
    base = current(other)
    for name in ("A1", "C3"):  # the first LoRA of a network, and a further one
        load_adapter(other, name, tmp_path)
        assert torch.equal(current(other), base), "loaded, off"
    b = trained(other, "B2", LORA, seed=9)
    assert load_adapter(other, "A1", tmp_path / "gone") is other.adapters["A1"], "already there"
    assert torch.equal(logits(other, "A1"), expected) and torch.equal(logits(other, "B2"), b)


def test_dropout_does_not_act_where_a_stored_adapter_answers(tiny_folder: Path, tmp_path: Path) -> None:
    """PEFT's new layers begin in training mode: opened from a library, such an adapter answered by chance."""
    model = load_model(str(tiny_folder))
    attach_adapter(model, "A1", AdapterConfig(rank=4, alpha=8, dropout=0.5), seed=0)
    for parameter in model.adapters["A1"].parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(5, 150, (1, 20), generator=torch.Generator().manual_seed(0))
    with use_adapter(model, "A1"), torch.no_grad():
        first, second = (model.network(input_ids=ids).logits for _ in range(2))
    assert torch.equal(first, second)
