"""The penalty on drifting: texts of the base model, its probabilities there, and a training step against a naive one."""

from __future__ import annotations

import json
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
from liftlm.losses import OTHERS
from liftlm.prompts import Wording, render_prompt, worded_turn
from liftlm.rows import DriftTexts, SoftTargets
from liftlm.training import StepMetrics, train

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
    plain = [row for row in texts.examples if sum(label == NO_LOSS for label in row.labels) == 1]  # a word is given
    assert 90 < len(texts.examples) <= 128 and 55 < len(plain) <= 64
    assert len({row.tokens[0] for row in plain}) == len(plain) and plain == texts.examples[-len(plain) :]
    frame = render_prompt(model.tokenizer, [worded_turn(model.tokenizer, Wording("", "", ""))])
    for row in texts.examples[: -len(plain)]:
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


@pytest.mark.parametrize("chat", [True, False])
def test_no_text_is_the_beginning_of_another(chat: bool, tmp_path: Path) -> None:
    """Regression: without a chat template, what was asked was what the plain texts began with."""
    model = load_model(str(save_model(tmp_path / "m", window=512, chat=chat)))
    texts = write_drift_texts(model, config())
    assert texts is not None and len(texts.examples) > 90
    begun = [row.tokens[:12] for row in texts.examples if sum(label == NO_LOSS for label in row.labels) <= 2]
    asked = [row.tokens[:12] for row in texts.examples if sum(label == NO_LOSS for label in row.labels) > 2]
    assert len(begun) == 64 and not set(begun) & set(asked)


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


def test_probabilities_are_the_models_and_the_rest_is_that_of_all_others(model: Model, texts: DriftTexts) -> None:
    assert texts.soft.tokens.shape[1] == 33
    assert [row.soft for row in texts.examples] == [
        sum(row.targets for row in texts.examples[:place]) for place in range(len(texts.examples))
    ]
    for row in (texts.examples[3], texts.examples[-3]):
        expected = logs(model.network, row).exp()
        assert row.soft is not None and row.soft_weight == 1
        tokens = texts.soft.tokens[row.soft : row.soft + row.targets].long()
        shares = texts.soft.shares[row.soft : row.soft + row.targets]
        torch.testing.assert_close(expected.topk(32).values, shares[:, :-1], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(expected.gather(1, tokens[:, :-1]), shares[:, :-1], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(1 - shares[:, :-1].sum(1), shares[:, -1], rtol=1e-3, atol=1e-5)
        assert set(tokens[:, -1].tolist()) == {OTHERS} and float(shares[:, -1].mean()) > 0.1


def test_each_step_has_other_ones_as_many_as_its_tokens_ask_for() -> None:
    rows = [Example((1, index), (NO_LOSS, index)) for index in range(50)]
    texts = DriftTexts(rows, SoftTargets(torch.zeros(0, 1), torch.zeros(0, 1)))
    assert [len(texts.of_step(0, tokens, 0)) for tokens in (1, 512, 1023, 1024, 10**15)] == [1, 1, 1, 2, 50]
    drawn = [texts.of_step(step, 1024, 0) for step in range(200)]
    assert all(one is not other for one, other in drawn) and drawn[3] == texts.of_step(3, 1024, 0) != texts.of_step(
        3, 1024, 1
    )
    assert {row.tokens[1] for step in drawn for row in step} == set(range(50))


def test_none_where_no_weight_is_given(model: Model) -> None:
    assert write_drift_texts(model, config("training.drift_weight=0")) is None


@pytest.mark.parametrize("where", ["model", "file"])
def test_they_are_written_once(where: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all documents that a process absorbs, and for a run that goes on in another process."""
    cache, model = tmp_path / "drift.safetensors", load_model(str(folder))
    first = write_drift_texts(model, config(), cache)
    monkeypatch.setattr(Model, "top_tokens", lambda *arguments, **more: pytest.fail("the model was asked again"))
    if where == "model":
        again = write_drift_texts(model, config("seed=7"), tmp_path / "other.safetensors")
        assert (tmp_path / "other.safetensors").read_bytes() == cache.read_bytes()
    else:
        again = write_drift_texts(load_model(str(folder)), config(), cache)
    assert first is not None and again is not None and first.examples == again.examples
    assert torch.equal(first.soft.shares, again.soft.shares) and torch.equal(first.soft.tokens, again.soft.tokens)


def test_those_of_another_model_are_not_taken(folder: Path, tmp_path: Path, texts: DriftTexts) -> None:
    cache = tmp_path / "drift.safetensors"
    other = load_model(str(save_model(tmp_path / "m", "llama-untied", window=512, seed=4)))
    write_drift_texts(other, config(), cache)
    model = load_model(str(folder))
    found = write_drift_texts(model, config(), cache)
    assert found is not None and [row.tokens for row in found.examples] == [row.tokens for row in texts.examples]


@pytest.mark.parametrize("change", ["window", "divided"])
def test_where_they_cannot_be_written_nothing_is_begun(change: str, model: Model) -> None:
    if change == "window":
        model.window = 110
    else:
        model.tensor_parallel = True
    heard: list[Any] = []
    # a dead server would be found only when tasks are asked for
    settings = config("tasks.writer=llm", "tasks.llm.base_url=http://127.0.0.1:9/v1", "tasks.llm.model=m")
    with pytest.raises(ConfigError, match="drift_weight") as caught:
        absorb(DOCUMENT, model, settings, on_step=heard.append)
    assert "training.drift_weight=0" in caught.value.next_step and not heard and not model.adapters


# --- training ---------------------------------------------------------------------------------------------------------


def make_rows() -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    lengths = (20, 33, 12, 27, 40, 18)
    return [
        Example(tuple(ids), tuple(ids))
        for n in lengths
        for ids in [torch.randint(5, 300, (n,), generator=generator).tolist()]
    ]


def divergence(p: Tensor, log_q: Tensor, count: int) -> Tensor:
    """(positions,) KL of the `count` outcomes that p finds likeliest and of all others as one."""
    values, ids = p.topk(count)
    q = log_q.exp().gather(1, ids)
    rest, other = 1 - values.sum(1), 1 - q.sum(1)
    return (values * (values.log() - q.log())).sum(1) + rest * (rest.log() - other.log())


def naive_loop(
    folder: Path, settings: LiftConfig, rows: list[Example], texts: DriftTexts
) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    """PEFT and autograd: mean loss of the labels, plus the weighted mean divergence from the base model."""
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
        drift = texts.of_step(number, sum(len(rows[index]) for index in step), settings.seed)
        with torch.no_grad(), peft.disable_adapter():
            base = [logs(peft, row) for row in drift]
        found = [-logs(peft, rows[index]).gather(1, torch.tensor(rows[index].labels[1:])[:, None]) for index in step]
        loss = torch.cat(found).mean()
        drifted = torch.cat(
            [divergence(log.exp(), logs(peft, row), 32) for log, row in zip(base, drift, strict=True)]
        ).mean()
        (loss + training.drift_weight * drifted).backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        heard.append((float(loss.detach()), float(drifted.detach())))
    return dict(get_peft_model_state_dict(peft)), heard


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert set(one) == set(other)
    return float(sum((one[name].double() - other[name].double()).square().sum() for name in one)) ** 0.5


def run(
    folder: Path, settings: LiftConfig, rows: list[Example], texts: DriftTexts | None
) -> tuple[dict[str, Tensor], list[StepMetrics]]:
    model = load_model(str(folder), settings.model)
    attach_adapter(model, "x", settings.adapter, settings.seed)
    heard: list[StepMetrics] = []
    train(model, "x", rows, settings, drift=texts, on_step=heard.append)
    return {name: tensor.clone() for name, tensor in model.adapters["x"].tensors().items()}, heard


FLAT = ("training.schedule=constant", "training.warmup_fraction=0", "training.micro_batch_tokens=64")


@pytest.mark.parametrize("batch_tokens", [60, 100_000])
def test_training_equals_a_naive_loop(batch_tokens: int, folder: Path, texts: DriftTexts) -> None:
    """Also for several texts a step; what is told is the document's loss, and the drift beside it."""
    settings = config("training.epochs=3", f"training.batch_tokens={batch_tokens}", *FLAT)
    rows = make_rows() * (1 if batch_tokens == 60 else 8)
    ours, heard = run(folder, settings, rows, texts)
    expected, told = naive_loop(folder, settings, rows, texts)
    without, plain = run(folder, settings, rows, None)
    moved = apart(expected, without)  # what the penalty does
    assert len(told) >= 3 and moved > 0.05
    assert apart(ours, expected) < 0.01 * moved
    assert [metrics.loss for metrics in heard] == pytest.approx([loss for loss, _ in told], rel=1e-4)
    assert [metrics.drift for metrics in heard] == pytest.approx([drift for _, drift in told], rel=1e-3, abs=1e-5)
    assert heard[-1].drift is not None and heard[-1].drift > 1e-3 and plain[0].drift is None


def test_where_nothing_has_drifted_there_is_no_gradient(folder: Path, texts: DriftTexts) -> None:
    """Regression: one token stood for all unlikely ones, and was learnt. The first step is that without a penalty."""
    rows = make_rows()
    results = [
        run(folder, config(f"training.drift_weight={weight}", "training.batch_tokens=100000", *FLAT), rows, texts)
        for weight in (1000, 1e-9)
    ]
    (ours, heard), (expected, _) = results
    model = load_model(str(folder))
    attach_adapter(model, "x", config().adapter, 0)
    moved = apart(expected, model.adapters["x"].tensors())
    assert len(heard) == 1 and heard[0].drift == pytest.approx(0, abs=1e-5)
    assert apart(ours, expected) < 0.05 * moved


def test_less_is_forgotten_of_other_texts_too(folder: Path) -> None:
    """Measured on texts that training did not see."""
    settings = config("training.epochs=6", "training.batch_tokens=64")
    drifts = []
    for weight in (0.0, 3.0):
        model = load_model(str(folder), settings.model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("liftlm.drift._SEED", 9)
            others = write_drift_texts(model, config())
            model.drift = None
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
            model = load_model(str(folder), settings.model)  # as another process would
        adapter = absorb(DOCUMENT, model, settings, folder=tmp_path / name)
        results.append({name: tensor.clone() for name, tensor in model.adapters[adapter.id].tensors().items()})
        assert adapter.report.resumed_from == (3 if name == "work" else None)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "work")]
    drifts = [[json.loads(line)["drift"] for line in told] for told in lines]
    assert drifts[0] == drifts[1] and len(drifts[0]) == len(lines[0]) > 4


def test_without_a_weight_the_recipe_is_as_before() -> None:
    assert "drift_weight" not in load_config(None, []).recipe()["training"]
    assert config().recipe()["training"]["drift_weight"] == 0.7
