"""The penalty on drifting: texts of the base model, its probabilities there, and a training step against a naive one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import save_model
from liftlm import Document, LiftConfig, Model, absorb, load_config, load_model
from liftlm.adapters import attach_adapter, use_adapter
from liftlm.drift import write_drift_texts
from liftlm.errors import ConfigError
from liftlm.examples import NO_LOSS, Example, plan_steps
from liftlm.prompts import Wording, render_prompt, worded_turn
from liftlm.rows import DriftTexts, SoftTargets, row_tensors
from liftlm.training import train

TEXT = " ".join(f"The ferryman Oswin rang the bell of Corriden on {day} May {1700 + day}." for day in range(1, 9))
DOCUMENT = Document(title="Ferrymen", text=TEXT)


def config(*more: str) -> LiftConfig:
    common = ["model.dtype=float32", "adapter.rank=4", "training.learning_rate=5e-3", "training.drift_weight=0.7"]
    return load_config(None, [*common, "tasks.writer=none", "segments.segment_tokens=64", *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "drift", "llama-untied", window=512, seed=3)


@pytest.fixture
def model(folder: Path) -> Model:
    return load_model(str(folder))


@pytest.fixture
def texts(model: Model) -> DriftTexts:
    found = write_drift_texts(model, config())
    assert found is not None
    return found


def logs(network: Any, row: Example) -> Tensor:
    """(labelled positions, vocabulary) log probabilities that predict the labels of one row by itself."""
    keep = torch.tensor(row.labels[1:]) != NO_LOSS
    return network(torch.tensor([row.tokens])).logits[0, :-1].float().log_softmax(-1)[keep]  # type: ignore[no-any-return]


# --- the texts --------------------------------------------------------------------------------------------------------


def test_half_are_conversations_and_half_are_plain(model: Model, texts: DriftTexts) -> None:
    plain = texts.examples[-64:]
    assert 90 < len(texts.examples) <= 128
    assert {sum(label == NO_LOSS for label in row.labels) for row in plain} == {
        1
    }  # nothing but the first token is given
    frame = render_prompt(model.tokenizer, [worded_turn(model.tokenizer, Wording("", "", ""))])
    for row in texts.examples[:-64]:
        asked = sum(label == NO_LOSS for label in row.labels)
        assert asked > len(frame) and list(row.tokens[:2]) == frame[:2]
    for row in texts.examples:
        given = sum(label == NO_LOSS for label in row.labels)
        assert tuple(row.labels) == (
            *[NO_LOSS] * given,
            *row.tokens[given:],
        )  # an answer has labels from its first word on
        assert 1 <= row.targets <= 65
    assert len({row.tokens for row in texts.examples}) > 90


def test_the_model_itself_is_asked_without_its_adapter(folder: Path, texts: DriftTexts) -> None:
    model = load_model(str(folder))
    attach_adapter(model, "x", config().adapter, 0)
    for tensor in model.adapters["x"].parameters().values():
        tensor.data.normal_()
    with use_adapter(model, "x"):
        again = write_drift_texts(model, config())
    assert again is not None
    assert [row.tokens for row in again.examples] == [row.tokens for row in texts.examples]
    torch.testing.assert_close(again.soft.shares, texts.soft.shares)


def test_probabilities_are_the_models_and_one_token_stands_for_the_others(model: Model, texts: DriftTexts) -> None:
    assert texts.soft.tokens.shape[1] == 33
    torch.testing.assert_close(texts.soft.shares.sum(1), torch.ones(len(texts.soft.shares)))
    assert [row.soft for row in texts.examples] == [
        sum(row.targets for row in texts.examples[:place]) for place in range(len(texts.examples))
    ]
    for row in (texts.examples[3], texts.examples[-3]):
        expected = logs(model.network, row).exp()
        assert row.soft is not None and row.soft_weight == 1
        tokens = texts.soft.tokens[row.soft : row.soft + row.targets].long()
        shares = texts.soft.shares[row.soft : row.soft + row.targets]
        torch.testing.assert_close(expected.gather(1, tokens[:, :-1]), shares[:, :-1], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(1 - shares[:, :-1].sum(1), shares[:, -1], rtol=1e-3, atol=1e-5)
        assert not (tokens[:, -1:] == tokens[:, :-1]).any()


def test_over_many_draws_it_is_the_whole_distribution(model: Model) -> None:
    row = Example(range(5, 12), (*[NO_LOSS] * 6, 11))
    whole = logs(model.network, row)[0].exp()
    draw, mean = torch.Generator().manual_seed(0), torch.zeros_like(whole)
    for _ in range(40):
        ids, shares = model.top_tokens(3, *row_tensors(model, [row] * 500), draw=draw)
        mean.index_add_(0, ids.flatten(), shares.flatten() / 20_000)
    assert (mean - whole).abs().sum() < 0.15
    assert (torch.full_like(whole, 1 / len(whole)) - whole).abs().sum() > 0.4  # so the bound means something
    ids, shares = model.top_tokens(10_000, *row_tensors(model, [row]), draw=draw)
    assert ids.shape[1] == len(whole) and sorted(ids[0].tolist()) == list(range(len(whole)))


def test_each_step_has_other_ones() -> None:
    rows = [Example((1, index), (NO_LOSS, index)) for index in range(5)]
    texts = DriftTexts(rows, SoftTargets(torch.zeros(0, 1), torch.zeros(0, 1)))
    assert [[row.tokens[1] for row in texts.of_step(step, 2)] for step in range(4)] == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_none_where_no_weight_is_given(model: Model) -> None:
    assert write_drift_texts(model, config("training.drift_weight=0")) is None


@pytest.mark.parametrize("where", ["model", "file"])
def test_they_are_written_once(where: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all documents that a process absorbs, and for a run that goes on in another process."""
    cache, model = tmp_path / "drift.safetensors", load_model(str(folder))
    first = write_drift_texts(model, config(), cache)
    monkeypatch.setattr(Model, "top_tokens", lambda *arguments, **more: pytest.fail("the model was asked again"))
    if where == "model":
        again = write_drift_texts(model, config(), tmp_path / "other.safetensors")
        assert (tmp_path / "other.safetensors").read_bytes() == cache.read_bytes()
    else:
        again = write_drift_texts(load_model(str(folder)), config(), cache)
    assert first is not None and again is not None and first.examples == again.examples
    assert torch.equal(first.soft.shares, again.soft.shares) and torch.equal(first.soft.tokens, again.soft.tokens)


@pytest.mark.parametrize("change", ["window", "divided"])
def test_where_they_cannot_be_written(change: str, model: Model) -> None:
    if change == "window":
        model.window = 40
    else:
        model.tensor_parallel = True
    with pytest.raises(ConfigError, match="drift_weight") as caught:
        write_drift_texts(model, config())
    assert "training.drift_weight=0" in caught.value.next_step


# --- training ---------------------------------------------------------------------------------------------------------


def make_rows() -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    lengths = (20, 33, 12, 27, 40, 18)
    return [
        Example(tuple(ids), tuple(ids))
        for n in lengths
        for ids in [torch.randint(5, 300, (n,), generator=generator).tolist()]
    ]


def whole_distribution(model: Model, rows: list[Example]) -> DriftTexts:
    """The same texts with the probabilities of all tokens."""
    draw = torch.Generator().manual_seed(0)
    tables = [model.top_tokens(10_000, *row_tensors(model, [row]), draw=draw) for row in rows]
    starts = itertools.accumulate((row.targets for row in rows), initial=0)
    numbered = [replace(row, soft=start) for row, start in zip(rows, starts, strict=False)]
    ids, shares = (torch.cat(parts) for parts in zip(*tables, strict=True))
    return DriftTexts(numbered, SoftTargets(ids, shares))


def naive_loop(
    folder: Path, settings: LiftConfig, rows: list[Example], texts: DriftTexts
) -> tuple[dict[str, Tensor], list[float]]:
    """PEFT and autograd: mean loss of the labels, plus the weighted mean KL divergence from the base model."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    training = settings.training
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    torch.manual_seed(settings.seed)
    peft: Any = get_peft_model(
        network, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=64, lora_dropout=0, target_modules="all-linear")
    )
    parameters = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=1e-4, foreach=False
    )
    heard = []
    plan = [
        step
        for epoch in range(training.epochs)
        for step in plan_steps(rows, training.batch_tokens, epoch, settings.seed)
    ]
    for number, step in enumerate(plan):
        count = max(1, training.batch_tokens // 512)
        drift = [texts.examples[place % len(texts.examples)] for place in range(number * count, (number + 1) * count)]
        with torch.no_grad(), peft.disable_adapter():
            base = [logs(peft, row) for row in drift]
        found = [-logs(peft, rows[index]).gather(1, torch.tensor(rows[index].labels[1:])[:, None]) for index in step]
        loss = torch.cat(found).mean()
        apart = torch.cat([(log.exp() * (log - logs(peft, row))).sum(1) for log, row in zip(base, drift, strict=True)])
        (loss + training.drift_weight * apart.mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        heard.append(float(loss.detach()))
    return dict(get_peft_model_state_dict(peft)), heard


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert set(one) == set(other)
    return float(sum((one[name].double() - other[name].double()).square().sum() for name in one)) ** 0.5


def run(
    folder: Path, settings: LiftConfig, rows: list[Example], texts: DriftTexts | None
) -> tuple[dict[str, Tensor], list[float]]:
    model = load_model(str(folder), settings.model)
    attach_adapter(model, "x", settings.adapter, settings.seed)
    heard: list[float] = []
    train(model, "x", rows, settings, drift=texts, on_step=lambda metrics: heard.append(metrics.loss))
    return {name: tensor.clone() for name, tensor in model.adapters["x"].tensors().items()}, heard


@pytest.mark.parametrize("batch_tokens", [60, 1100])
def test_training_equals_a_naive_loop(batch_tokens: int, folder: Path, texts: DriftTexts, model: Model) -> None:
    """Also for two texts a step, and where they begin again from the first; the loss that is told is the document's."""
    settings = config(
        *("training.epochs=3", f"training.batch_tokens={batch_tokens}", "training.micro_batch_tokens=64"),
        *("training.schedule=constant", "training.warmup_fraction=0"),
    )
    whole = whole_distribution(model, [texts.examples[0], texts.examples[-1], texts.examples[1]])
    rows = make_rows()
    ours, heard = run(folder, settings, rows, whole)
    expected, losses = naive_loop(folder, settings, rows, whole)
    without, _ = run(folder, settings, rows, None)
    moved = apart(expected, without)  # what the penalty does
    assert len(losses) >= 3 and moved > 0.05
    assert apart(ours, expected) < 0.01 * moved
    assert heard == pytest.approx(losses, rel=1e-4)


def test_less_is_forgotten_of_other_texts_too(folder: Path) -> None:
    """Measured on texts of another seed, which training did not see."""
    settings = config("training.epochs=6", "training.batch_tokens=64")
    drifts = []
    for weight in (0.0, 3.0):
        model = load_model(str(folder), settings.model)
        others = write_drift_texts(model, config("seed=9"))
        assert others is not None
        rows = others.examples[::8]
        with torch.no_grad():
            base = [logs(model.network, row) for row in rows]
        adapter = absorb(
            DOCUMENT, model, config(f"training.drift_weight={weight}", "training.epochs=6", "training.batch_tokens=64")
        )
        with use_adapter(model, adapter.id), torch.no_grad():
            now = [logs(model.network, row) for row in rows]
        drifts.append(float(torch.cat([(p.exp() * (p - q)).sum(1) for p, q in zip(base, now, strict=True)]).mean()))
    assert drifts[1] < 0.7 * drifts[0] and drifts[0] > 0.01


def test_an_interrupted_run_ends_alike(folder: Path, tmp_path: Path) -> None:
    settings = config("training.epochs=3", "training.batch_tokens=64", "training.checkpoint_seconds=0")

    class Crash(Exception):
        pass

    def crash(metrics: Any) -> None:
        if metrics.step == 4:
            raise Crash

    results = []
    for name in ("whole", "work"):
        model = load_model(str(folder), settings.model)
        if name == "work":
            with pytest.raises(Crash):
                absorb(DOCUMENT, model, settings, folder=tmp_path / name, on_step=crash)
        adapter = absorb(DOCUMENT, model, settings, folder=tmp_path / name)
        results.append({name: tensor.clone() for name, tensor in model.adapters[adapter.id].tensors().items()})
        assert adapter.report.resumed_from == (3 if name == "work" else None)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_without_a_weight_the_recipe_is_as_before() -> None:
    assert "drift_weight" not in load_config(None, []).recipe()["training"]
    assert config().recipe()["training"]["drift_weight"] == 0.7
