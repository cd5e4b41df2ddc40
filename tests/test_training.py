"""The loop against a naive one; gradient accumulation, schedules, and what cannot be trained."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model

from liftlm import Document, LiftConfig, absorb, load_config, load_model
from liftlm.adapters import attach_adapter
from liftlm.config import TrainingConfig
from liftlm.errors import NotEnoughMemoryError, TrainingDivergedError
from liftlm.examples import make_examples
from liftlm.segments import split_into_segments
from liftlm.training import learning_rate, train

DOCUMENT = Document(title="Corriden", text="The ferryman Oswin Tarrel rang the bell of Corriden on 3 May 1743. " * 14)


def tiny_config(*more: str) -> LiftConfig:
    return load_config(
        None,
        [
            "segments.segment_tokens=64",
            "adapter.rank=4",
            "adapter.alpha=8",
            "training.epochs=2",
            "training.batch_tokens=128",
            "training.learning_rate=5e-3",
            *more,
        ],
    )


def weights(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone() for key, tensor in model.adapters[name].tensors().items()}


def test_steps_equal_a_naive_loop_with_peft_and_transformers_loss(tiny_folder: Path) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = tiny_config("training.schedule=linear", "training.warmup_fraction=0.25", "training.max_grad_norm=0.5")
    model = load_model(str(tiny_folder))
    adapter = absorb(DOCUMENT, model, config)

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer(DOCUMENT.text, add_special_tokens=False)["input_ids"]
    segments = [segment.tokens for segment in split_into_segments(ids, 64, 24)]
    torch.manual_seed(config.seed)
    network = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"),
    )
    trainable = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=1e-4)
    plan = []
    for epoch in range(2):
        order = list(range(len(segments)))
        random.Random(f"{config.seed}/{epoch}").shuffle(order)
        batch: list[int] = []
        for index in order:
            if batch and sum(len(segments[i]) for i in batch) + len(segments[index]) > 128:
                plan.append(batch)
                batch = []
            batch.append(index)
        plan.append(batch)
    losses = []
    for step, batch in enumerate(plan):
        warmup = round(0.25 * len(plan))
        rate = 5e-3 * ((step + 1) / (warmup + 1) if step < warmup else 1 - (step - warmup) / (len(plan) - warmup))
        for group in optimizer.param_groups:
            group["lr"] = rate
        targets = sum(len(segments[i]) - 1 for i in batch)
        total = 0.0
        for i in batch:
            row = torch.tensor([segments[i]])
            loss = network(input_ids=row, labels=row).loss * (row.shape[1] - 1) / targets
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(trainable, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((total, targets))
    assert adapter.report.steps == len(plan)
    expected = get_peft_model_state_dict(network, save_embedding_layers=False)
    found = weights(model, adapter.id)
    assert set(found) == set(expected)
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=2e-3, atol=2e-5)
    half = len(plan) // 2
    for epoch, part in enumerate((losses[:half], losses[half:])):
        mean = sum(loss * count for loss, count in part) / sum(count for _, count in part)
        assert adapter.report.epoch_losses[epoch] == pytest.approx(mean, rel=1e-4)


def test_accumulated_and_checkpointed_gradients_give_the_same_adapter_to_rounding(tiny_folder: Path) -> None:
    def result(*more: str) -> dict[str, torch.Tensor]:
        model = load_model(str(tiny_folder))
        config = tiny_config("training.batch_tokens=256", *more)
        return weights(model, absorb(DOCUMENT, model, config).id)

    whole, again = result("training.micro_batch_tokens=256"), result("training.micro_batch_tokens=256")
    pieces = result("training.micro_batch_tokens=64")
    recomputed = result("training.micro_batch_tokens=256", "training.gradient_checkpointing=true")
    other = result("training.micro_batch_tokens=256", "seed=1")
    for key in whole:
        assert torch.equal(whole[key], again[key])
        torch.testing.assert_close(pieces[key], whole[key], rtol=5e-3, atol=1e-4)
        torch.testing.assert_close(recomputed[key], whole[key], rtol=5e-3, atol=1e-4)
    assert any((other[key] - whole[key]).abs().max() > 1e-2 for key in whole)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("linear", 0.0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2]),
        ("constant", 0.5, [1 / 3, 2 / 3, 1, 1]),
        ("linear", 0.5, [1 / 3, 2 / 3, 1, 0.5]),
    ],
)
def test_learning_rates_by_hand(schedule: str, warmup: float, expected: list[float]) -> None:
    settings = TrainingConfig(learning_rate=1.0, schedule=schedule, warmup_fraction=warmup)  # type: ignore[arg-type]
    assert [learning_rate(settings, step, 4) for step in range(4)] == pytest.approx(expected)


def test_every_step_is_written_down(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_folder))
    heard: list[Any] = []
    adapter = absorb(DOCUMENT, model, tiny_config(), folder=tmp_path / "run", on_step=heard.append)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, adapter.report.steps + 1)) == [m.step for m in heard]
    wanted = "step steps epoch loss learning_rate grad_norm tokens tokens_per_second memory_bytes seconds_left"
    assert all(set(row) == set(wanted.split()) for row in rows)
    assert rows[-1]["seconds_left"] == 0 and rows[0]["memory_bytes"] > 0
    assert sum(row["tokens"] for row in rows) == adapter.report.tokens


def test_a_loss_that_is_no_number_stops_training(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = type(tiny_model).loss_sum
    monkeypatch.setattr(type(tiny_model), "loss_sum", lambda self, *rows: whole(self, *rows) * float("nan"))
    with pytest.raises(TrainingDivergedError, match="step 1") as caught:
        absorb(DOCUMENT, tiny_model, tiny_config())
    assert "learning_rate" in caught.value.next_step


def test_memory_is_predicted_before_the_work_starts(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from liftlm import training

    monkeypatch.setattr(training, "available_memory", lambda device: 10_000_000)
    with pytest.raises(NotEnoughMemoryError, match=r"about [\d.]+ GB of memory and 0.0 GB are free") as caught:
        absorb(DOCUMENT, tiny_model, tiny_config())
    for setting in ("micro_batch_tokens", "segment_tokens", "gradient_checkpointing"):
        assert setting in caught.value.next_step


def test_running_out_of_memory_in_a_step_is_said_clearly(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(self: Any, *rows: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried …")

    monkeypatch.setattr(type(tiny_model), "loss_sum", explode)
    with pytest.raises(NotEnoughMemoryError):
        absorb(DOCUMENT, tiny_model, tiny_config())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_bfloat16_learns_and_leaves_the_base_alone(kind: str, tmp_path: Path) -> None:
    config = tiny_config("model.dtype=bfloat16", f"adapter.kind={kind}", "training.epochs=4")
    model = load_model(str(save_model(tmp_path / "m")), config.model)
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    adapter = absorb(DOCUMENT, model, config)
    assert adapter.report.epoch_losses[-1] < 0.95 * adapter.report.epoch_losses[0]
    for name, p in model.network.named_parameters():
        plain = name.replace(".base_layer", "")
        if plain in before:
            assert torch.equal(p, before[plain]) and not p.requires_grad


def test_nothing_to_train_on_is_a_mistake_of_the_caller(tiny_model: Any) -> None:
    config = tiny_model.resolve(tiny_config())
    attach_adapter(tiny_model, "a", config.adapter, 0)
    with pytest.raises(ValueError):
        train(tiny_model, "a", make_examples([], tiny_model.tokenizer), config)
