"""Packed rows: one forward pass over many tasks gives the loss and the gradients of each of them by itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import FAMILIES, attention_that_runs, make_tokenizer, save_model
from liftlm import load_config, load_model
from liftlm.adapters import attach_adapter, use_adapter
from liftlm.config import ModelConfig
from liftlm.examples import NO_LOSS, Example, make_task_examples, share_beginning
from liftlm.models import Model
from liftlm.rows import row_tensors
from liftlm.tasks import Task
from liftlm.training import train

ANSWERS = [
    "Oswin.",
    "On 3 May 1743, in the snow.",
    "The bell of the old town rang on the lake.",
    "41",
    "Nobody, twice.",
]
SLIDING = {"gemma2", "gemma3", "mistral-sliding"}  # in conftest, with a window of 24 tokens


def load(folder: Path, dtype: Any = "float32") -> Model:
    return load_model(str(folder), ModelConfig(dtype=dtype))


def tasks_of(model: Model) -> list[Example]:
    """Real prompts, of about fifty tokens."""
    tasks = [Task(f"Which {n}?" * n, answer, "given", 0, 1) for n, answer in enumerate(ANSWERS, 1)]
    return make_task_examples(tasks, model.tokenizer, "T", model.window)


def short_rows(seed: int = 0, shared: int = 9, longest: int = 24) -> list[Example]:
    """Random tokens behind a common beginning; one with a gap in its labels, as distilling may leave."""
    draw = random.Random(seed)
    first = [draw.randrange(5, 300) for _ in range(shared)]
    rows = []
    for number in range(5):
        own = [draw.randrange(5, 300) for _ in range(draw.randint(4, longest - shared))]
        labels = [NO_LOSS] * (shared + 2) + own[2:]
        labels[-2 if number == 3 else 0] = NO_LOSS
        rows.append(Example((*first, *own), tuple(labels)))
    return share_beginning(rows, "g")


def losses_and_gradients(model: Model, batches: list[tuple[Tensor, ...]]) -> tuple[Tensor, list[Tensor]]:
    """Summed over the batches."""
    parameters = list(model.adapters["x"].parameters().values())
    total = torch.stack([model.loss_sum(*batch) for batch in batches]).sum()
    return total.detach(), list(torch.autograd.grad(total, parameters))


def attach(model: Model) -> None:
    attach_adapter(model, "x", load_config(None, ["adapter.rank=4"]).adapter, 0)
    torch.manual_seed(3)
    for parameter in model.adapters["x"].parameters().values():  # a fresh LoRA has zeros, and no gradient there
        parameter.data.normal_(std=0.2)


def one_by_one(rows: list[Example]) -> list[tuple[Tensor, ...]]:
    return [(torch.tensor([row.tokens]), torch.tensor([row.labels])) for row in rows]


def transformers_loss(model: Model, rows: list[Example]) -> Tensor:
    """Without any code of ours."""
    found = [
        model.network(input_ids=torch.tensor([row.tokens]), labels=torch.tensor([row.labels]), use_cache=False).loss
        * sum(label != NO_LOSS for label in row.labels[1:])
        for row in rows
    ]
    return torch.stack(found).sum()


def compare(model: Model, rows: list[Example]) -> None:
    tensors = row_tensors(model, rows)
    length = rows[0].shared + sum(len(r) - r.shared for r in rows)
    assert len(tensors) == 4 and tensors[0].shape == (1, length + -length % (32 if length >= 256 else 8))
    with use_adapter(model, "x", training=True):
        loss, gradients = losses_and_gradients(model, [tensors])
        expected, wanted = losses_and_gradients(model, one_by_one(rows))
        torch.testing.assert_close(loss, transformers_loss(model, rows).detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
        for gradient, correct in zip(gradients, wanted, strict=True):
            scale = float(correct.abs().max())
            assert scale > 0
            torch.testing.assert_close(gradient, correct, rtol=1e-4, atol=1e-4 * scale)
        # and the comparison can fail: the same row with every token seeing all before it, or with positions counted on
        ids, labels, positions, mask = tensors
        everything = torch.zeros_like(mask).masked_fill(~torch.ones_like(mask).tril().bool(), mask.min())
        shifted = positions + (positions >= rows[0].shared)
        for wrong in ((ids, labels, positions, everything), (ids, labels, shifted, mask)):
            if rows[0].shared or wrong[3] is everything:  # alone, an example may stand anywhere
                assert apart(losses_and_gradients(model, [wrong])[1], wanted) > 1e-2


def apart(gradients: list[Tensor], correct: list[Tensor]) -> float:
    """Distance as a share of the length, over all weights."""
    one, other = (torch.cat([part.flatten() for part in parts]) for parts in (gradients, correct))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_is_its_examples_one_by_one(family: str, tmp_path: Path) -> None:
    model = load(save_model(tmp_path / "m", family))
    attach(model)
    rows = short_rows()
    assert max(map(len, rows)) <= 24 and len({len(row) for row in rows}) > 2
    compare(model, rows)
    if family not in SLIDING:  # whose window is shorter than real prompts
        compare(model, tasks_of(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_longer_than_a_sliding_window_are_padded(family: str, tmp_path: Path) -> None:
    model = load(save_model(tmp_path / "m", family))
    rows = tasks_of(model)
    longest = max(map(len, rows))
    assert longest > 24 and rows[0].shared > 10
    assert model.can_pack(24) and model.can_pack(25) == model.can_pack(longest) == (family not in SLIDING)
    tensors = row_tensors(model, rows)
    if family in SLIDING:
        assert [tuple(t.shape) for t in tensors] == [(len(rows), longest + -longest % 8)] * 2
    loss = model.loss_sum(*tensors)
    torch.testing.assert_close(loss, transformers_loss(model, rows).detach(), rtol=1e-4, atol=1e-3)


def test_packing_such_examples_would_be_wrong(tmp_path: Path) -> None:
    """Why `can_pack` is there: the mask of a packed row replaces the one that hides what is too far back."""
    for family in sorted(SLIDING):
        model = load(save_model(tmp_path / family, family))
        model.can_pack = lambda longest: True  # type: ignore[method-assign]
        attach(model)
        rows = tasks_of(model)
        with use_adapter(model, "x", training=True):
            packed = losses_and_gradients(model, [row_tensors(model, rows)])[1]
            assert apart(packed, losses_and_gradients(model, one_by_one(rows))[1]) > 1e-2


OTHERS: dict[str, tuple[dict[str, Any], bool]] = {  # transformers' configuration, and whether rows may be packed
    "OPTConfig": ({"ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32}, True),
    "GPTJConfig": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 99, "rotary_dim": 8}, True),
    # no attention at all, or one that counts positions by itself
    "MambaConfig": ({"state_size": 4}, False),
    "Mamba2Config": ({"state_size": 4, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1}, False),
    "BloomConfig": ({"n_layer": 2, "n_head": 4}, False),
    "MptConfig": ({"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 99}, False),
    "GPTNeoConfig": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
        False,
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_whether_a_network_can_pack_is_measured(kind: str, tmp_path: Path) -> None:
    """Regression: any causal language model is welcome, but not all obey a mask. One that does not crashed, or was misled."""
    import transformers

    sizes, packs = OTHERS[kind]
    tokenizer = make_tokenizer()
    common = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    specials = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 3}
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**(common | specials | sizes)))
    for parameter in network.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(3)
    network.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    model = load(tmp_path / "m")
    rows = short_rows()
    tensors = row_tensors(model, rows)
    assert model.can_pack(24) == packs and len(tensors) == (4 if packs else 2)
    assert not model.network.training
    torch.testing.assert_close(model.loss_sum(*tensors), transformers_loss(model, rows), rtol=1e-4, atol=1e-3)
    if not packs:  # and the measurement is right to say no
        model.can_pack = lambda longest: True  # type: ignore[method-assign]
        try:
            wrong = model.loss_sum(*row_tensors(model, rows))
        except (RuntimeError, ValueError, TypeError):
            return
        assert not torch.allclose(wrong, transformers_loss(model, rows), rtol=1e-3)


def test_positions_that_were_learnt_do_not_run_out(tmp_path: Path) -> None:
    """GPT-2 has a vector for each position of its window; a packed row is longer than that, its positions are not."""
    model = load(save_model(tmp_path / "m", "gpt2", window=64))
    attach(model)
    rows = short_rows(longest=60)
    assert sum(map(len, rows)) > 64
    compare(model, rows)


def test_rows_that_are_no_group_are_padded(tiny_model: Model) -> None:
    rows = [Example(row.tokens, row.labels) for row in short_rows()]
    for chosen in (rows, rows[:1], short_rows()[:1]):  # nor one example alone
        ids, labels = row_tensors(tiny_model, chosen)
        longest = max(map(len, chosen))
        assert ids.shape == labels.shape == (len(chosen), longest + -longest % 8)
        for row, tokens, wanted in zip(chosen, ids.tolist(), labels.tolist(), strict=True):
            assert tuple(tokens[: len(row)]) == row.tokens and tuple(wanted[: len(row)]) == row.labels
            assert set(wanted[len(row) :]) <= {NO_LOSS}


def test_rows_of_a_window_are_not_padded_beyond_it(tmp_path: Path) -> None:
    """GPT-2 has no position there."""
    model = load(save_model(tmp_path / "m", "gpt2", window=50))
    row = Example(tuple(range(5, 54)), tuple(range(5, 54)))
    assert len(row) == 49 and row_tensors(model, [row])[0].shape == (1, 50)
    torch.testing.assert_close(model.loss_sum(*row_tensors(model, [row])), model.loss_sum(*one_by_one([row])[0]))


@pytest.mark.parametrize(
    ("tokens", "padded"), [(1, 8), (8, 8), (9, 16), (255, 256), (256, 256), (257, 288), (300, 320)]
)
def test_lengths_that_repeat(tokens: int, padded: int, tiny_model: Model) -> None:
    """Few of them, as a product is compiled for each; and not at the price of short rows."""
    row = Example((7,) * tokens, (7,) * tokens)
    assert row_tensors(tiny_model, [row])[0].shape == (1, min(padded, max(tokens, tiny_model.window)))


def test_a_group_with_nothing_in_common(tiny_model: Model) -> None:
    attach(tiny_model)
    rows = [Example(row.tokens[9:], row.labels[9:]) for row in short_rows(seed=4)]
    rows = share_beginning([Example((n, *row.tokens), (NO_LOSS, *row.labels)) for n, row in enumerate(rows, 7)], "g")
    assert rows[0].shared == 0
    compare(tiny_model, rows)


def test_bfloat16_rows_are_near(tiny_folder: Path) -> None:
    """The mask is in the model's number format, as attention demands."""
    exact, rounded = load(tiny_folder), load(tiny_folder, "bfloat16")
    rows = tasks_of(exact)
    tensors = row_tensors(rounded, rows)
    assert tensors[3].dtype == torch.bfloat16
    with attention_that_runs():
        loss = rounded.loss_sum(*tensors)
    torch.testing.assert_close(loss, exact.loss_sum(*row_tensors(exact, rows)), rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_on_packed_rows_is_training_on_padded_ones(
    kind: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run: tasks beside segments, in micro-batches of both."""
    settings = load_config(
        None,
        [
            *(f"adapter.kind={kind}", "adapter.rank=4", "training.epochs=2", "training.batch_tokens=300"),
            *("training.learning_rate=5e-3", "training.micro_batch_tokens=200"),
        ],
    )
    results: list[dict[str, Tensor]] = []
    shapes: set[int] = set()
    whole = Model.loss_sum

    def watch(self: Model, tokens: Tensor, *rest: Any) -> Tensor:
        shapes.add(len(tokens))
        return whole(self, tokens, *rest)

    monkeypatch.setattr(Model, "loss_sum", watch)
    for packs in (True, False):
        model = load(tiny_folder)
        model.can_pack = lambda longest, packs=packs: packs  # type: ignore[method-assign, misc]
        plain = [Example(row.tokens, row.tokens) for row in short_rows(seed=8)]
        attach_adapter(model, "x", settings.adapter, settings.seed)
        before = {name: tensor.clone() for name, tensor in model.adapters["x"].tensors().items()}
        train(model, "x", [*plain, *tasks_of(model), *short_rows()], settings)
        results.append({name: t.clone() for name, t in model.adapters["x"].tensors().items()})
    assert max(shapes) > 1, "nothing was padded"
    packed, padded = results
    moved = sum(float((padded[name] - before[name]).square().sum()) for name in padded) ** 0.5
    between = sum(float((padded[name] - packed[name]).square().sum()) for name in padded) ** 0.5
    assert moved > 0.1 and 0 < between < 1e-3 * moved
