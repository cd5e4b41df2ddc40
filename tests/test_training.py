"""The training loop against a naive one: PEFT's own wrapping, transformers' own loss, torch's plain AdamW."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import attention_that_runs, save_model
from liftlm.adapters import attach_adapter, use_adapter
from liftlm.config import LiftConfig, ModelConfig, load_config
from liftlm.errors import ConfigError, NotEnoughMemoryError, TrainingDivergedError
from liftlm.examples import NO_LOSS, Example, plan_steps
from liftlm.memory import predict_memory
from liftlm.models import Model, load_model
from liftlm.schedule import learning_rate
from liftlm.training import StepMetrics, TrainingReport, train

RATE = 5e-3


def settings(*more: str) -> LiftConfig:
    common = ["adapter.rank=4", "adapter.alpha=8.0", "training.epochs=2", "training.batch_tokens=90"]
    return load_config(None, [*common, "training.micro_batch_tokens=10000", f"training.learning_rate={RATE}", *more])


def load(folder: Path, dtype: Any = "float32") -> Model:
    return load_model(str(folder), ModelConfig(dtype=dtype))


def make_rows(count: int = 7, seed: int = 0, lengths: tuple[int, int] = (12, 40)) -> list[Example]:
    """Random tokens, of different lengths; some have a start without loss, as questions will."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        tokens = tuple(rng.randrange(5, 300) for _ in range(rng.randrange(*lengths)))
        quiet = index % 3 * 4
        rows.append(Example(tokens, (*[NO_LOSS] * quiet, *tokens[quiet:])))
    return rows


def run(model: Model, config: LiftConfig, rows: list[Example] | None = None, **more: Any) -> tuple[TrainingReport, Any]:
    """Trains a fresh adapter; the report and its tensors."""
    attach_adapter(model, "x", config.adapter, config.seed)
    report = train(model, "x", rows or make_rows(), config, **more)
    return report, {name: tensor.clone() for name, tensor in model.adapters["x"].tensors().items()}


Tensors = dict[str, torch.Tensor]


def distance(one: Tensors, other: Tensors) -> float:
    """Euclidean, over all weights. Single weights may differ more: AdamW blows up the rounding of tiny gradients."""
    assert set(one) == set(other)
    return math.sqrt(sum(float((one[name].double() - other[name].double()).square().sum()) for name in one))


def fresh(folder: Path, config: LiftConfig) -> Tensors:
    """The adapter before training."""
    model = load(folder)
    attach_adapter(model, "x", config.adapter, config.seed)
    return model.adapters["x"].tensors()  # type: ignore[no-any-return]


def base_logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.network(torch.arange(5, 45)[None]).logits
    return logits


def pad(rows: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row.tokens, *[0] * (longest - len(row))] for row in rows])
    labels = torch.tensor([[*row.labels, *[-100] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, labels, mask


def reference(
    folder: Path,
    config: LiftConfig,
    rows: list[Example],
    rate_at: Callable[[int, int], float],
    max_steps: int,
    beta2: float = 0.98,
    max_norm: float = 1.0,
) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """The naive loop: whole batches padded with a mask, transformers' mean loss. Returns weights, losses, norms."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    if config.adapter.kind == "lora":
        torch.manual_seed(config.seed)
        network = get_peft_model(
            network, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0, target_modules="all-linear")
        )
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, beta2), eps=1e-8, weight_decay=1e-4, foreach=False)
    plan = [step for epoch in range(config.training.epochs) for step in plan_steps(rows, 90, epoch, config.seed)]
    losses, norms = [], []
    for number, step in enumerate(plan[:max_steps]):
        ids, labels, mask = pad([rows[index] for index in step])
        loss = network(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, max_norm)))
        optimizer.param_groups[0]["lr"] = rate_at(number, len(plan))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if config.adapter.kind == "lora":
        return get_peft_model_state_dict(network), losses, norms
    return {name: p.detach() for name, p in network.named_parameters()}, losses, norms


class _Enough(Exception):
    pass


def stop_after(steps: int) -> Callable[[StepMetrics], None]:
    def on_step(metrics: StepMetrics) -> None:
        if metrics.step == steps:
            raise _Enough

    return on_step


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_steps_equal_a_naive_loop(kind: str, steps: int, tiny_folder: Path) -> None:
    norm_limit = 0.5  # below every norm here, so that all steps are clipped
    flat = ["training.schedule=constant", "training.warmup_fraction=0", f"training.max_grad_norm={norm_limit}"]
    config = settings(f"adapter.kind={kind}", *flat)
    rows = make_rows()
    model = load(tiny_folder)
    attach_adapter(model, "x", config.adapter, config.seed)
    metrics: list[StepMetrics] = []
    with pytest.raises(_Enough):
        train(model, "x", rows, config, on_step=lambda m: (metrics.append(m), stop_after(steps)(m))[1])
    ours = model.adapters["x"].tensors()
    moved = distance(ours, fresh(tiny_folder, config))

    def naive(**other: float) -> tuple[Tensors, list[float], list[float]]:
        return reference(tiny_folder, config, rows, lambda step, of: RATE, steps, **{"max_norm": norm_limit, **other})

    expected, losses, norms = naive()
    assert moved > 0.1 and min(norms) > norm_limit
    assert distance(ours, expected) < 1e-4 * moved
    assert [m.loss for m in metrics] == pytest.approx(losses, rel=1e-5)
    assert [m.grad_norm for m in metrics] == pytest.approx(norms, rel=1e-4)
    if steps == 5:  # a loop that differs in one thing ends elsewhere, so the comparison can fail
        assert distance(ours, naive(beta2=0.999)[0]) > 1e-3 * moved
        assert distance(ours, naive(max_norm=1e9)[0]) > 1e-3 * moved


def test_a_whole_run_with_warm_up_and_cosine_equals_a_naive_loop(tiny_folder: Path) -> None:
    config = settings("training.epochs=3", "training.warmup_fraction=0.25", "training.schedule=cosine")
    rows = make_rows()
    report, ours = run(load(tiny_folder), config, rows)
    warm = round(0.25 * report.steps)

    def rate_at(step: int, of: int) -> float:
        if step < warm:
            return RATE * (step + 1) / (warm + 1)
        return RATE * 0.5 * (1 + math.cos(math.pi * (step - warm) / (of - warm)))

    expected, losses, _ = reference(tiny_folder, config, rows, rate_at, 1000)
    moved = distance(ours, fresh(tiny_folder, config))
    assert report.steps == len(losses) > 6
    assert distance(ours, expected) < 1e-3 * moved
    constant, _, _ = reference(tiny_folder, config, rows, lambda step, of: RATE, 1000)
    assert distance(ours, constant) > 0.05 * moved


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.9619398, 0.8535534, 0.6913417, 0.5, 0.3086583, 0.1464466, 0.0380602]),
    ],
)
def test_learning_rate_by_hand(schedule: str, expected: list[float]) -> None:
    training = settings("training.warmup_fraction=0.2", f"training.schedule={schedule}").training
    assert [learning_rate(training, step, 10) / RATE for step in range(10)] == pytest.approx(expected, abs=1e-6)
    assert learning_rate(settings("training.warmup_fraction=0").training, 0, 1) == RATE


@contextlib.contextmanager
def counted(model: Model) -> Iterator[list[int]]:
    """Batch sizes of the forward passes of something in the first layer in training."""
    sizes: list[int] = []
    layer = model.network.model.layers[0].mlp
    hook = layer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])) if module.training else None)
    yield sizes
    hook.remove()


def test_accumulated_gradients_equal_one_big_batch(tiny_folder: Path) -> None:
    rows = make_rows(count=8, lengths=(30, 31))
    config = settings()
    model = load(tiny_folder)
    with counted(model) as sizes:
        _, big = run(model, config, rows)
        assert sizes == [3, 3, 2] * 2
        sizes.clear()
        _, small = run(model, settings("training.micro_batch_tokens=1"), rows)
        assert sizes == [1] * 16
    moved = distance(big, fresh(tiny_folder, config))
    assert 0 < distance(big, small) < 1e-4 * moved
    _, other = run(model, settings("training.batch_tokens=60"), rows)
    assert distance(big, other) > 0.1 * moved


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradient_checkpointing_changes_nothing_but_rounding(kind: str, tiny_folder: Path) -> None:
    model, config = load(tiny_folder), settings(f"adapter.kind={kind}")
    with counted(model) as sizes:
        _, plain = run(model, config)
        passes = len(sizes)
        _, saving = run(model, settings(f"adapter.kind={kind}", "training.gradient_checkpointing=true"))
    assert len(sizes) == passes + 2 * passes, "layers were not run a second time for the gradients"
    assert distance(plain, saving) < 1e-4 * distance(plain, fresh(tiny_folder, config))
    assert not model.network.is_activation_checkpointing and not model.network.training


def test_gradient_checkpointing_that_a_model_lacks_is_said(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_folder)
    monkeypatch.setattr(type(model.network), "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        run(model, settings("training.gradient_checkpointing=true"))
    assert not model.network.training


def test_seed_decides_everything(tiny_folder: Path) -> None:
    dropped = "adapter.dropout=0.3"
    _, one = run(load(tiny_folder), settings(dropped))
    torch.manual_seed(123)  # what the caller did with random numbers before must not matter
    before = torch.get_rng_state()
    _, again = run(load(tiny_folder), settings(dropped))
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers were changed"
    assert all(torch.equal(one[name], again[name]) for name in one)
    _, other = run(load(tiny_folder), settings(dropped, "seed=1"))
    _, undropped = run(load(tiny_folder), settings())
    assert min(distance(one, other), distance(one, undropped)) > 0.1
    run(load(tiny_folder), settings(f"seed={2**32 - 1}"))  # once overflowed


# --- what is reported -------------------------------------------------------------------------------------------------


def test_metrics_have_a_full_row_for_each_step(tiny_folder: Path, tmp_path: Path) -> None:
    config, rows, seen = settings("training.epochs=3"), make_rows(), []
    report, _ = run(load(tiny_folder), config, rows, folder=tmp_path / "w", on_step=seen.append)
    lines = (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert parsed == [{k: v for k, v in dataclasses.asdict(metrics).items() if k != "drift"} for metrics in seen]
    assert [row["step"] for row in parsed] == list(range(1, report.steps + 1))
    assert all({*row, "drift"} == {field.name for field in dataclasses.fields(StepMetrics)} for row in parsed)
    plan = [(epoch, step) for epoch in range(3) for step in plan_steps(rows, 90, epoch, 0)]
    assert [row["epoch"] - 1 for row in parsed] == [epoch for epoch, _ in plan]
    assert [row["tokens"] for row in parsed] == [sum(len(rows[i]) for i in step) for _, step in plan]
    expected = [learning_rate(config.training, s, len(plan)) for s in range(len(plan))]
    assert [row["learning_rate"] for row in parsed] == expected
    assert all(row["grad_norm"] > 0 and row["memory_bytes"] > 1e7 and row["tokens_per_second"] > 0 for row in parsed)
    left = [row["seconds_left"] for row in parsed]
    assert left[-1] == 0 and all(seconds > 0 for seconds in left[:-1])
    assert report.tokens == 3 * sum(len(row) for row in rows) and report.processes == 1
    # the system counts the two in slightly different ways
    assert report.resumed_from is None and report.peak_memory_bytes > 0.9 * parsed[-1]["memory_bytes"]


def test_epoch_losses_are_means_over_targets(tiny_folder: Path) -> None:
    """With weights that do not move, every epoch's loss is the base model's, each target counted once."""
    from transformers import AutoModelForCausalLM

    rows = make_rows()
    network = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    total, targets = 0.0, 0
    for row in rows:
        logits = network(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
        for position, label in enumerate(row.labels[1:]):
            if label != NO_LOSS:
                total -= logits[position, label].item()
                targets += 1
    report, _ = run(load(tiny_folder), settings("training.learning_rate=1e-12"), rows)
    assert report.epoch_losses == pytest.approx([total / targets] * 2, rel=1e-5)
    by_example = [network(torch.tensor([r.tokens]), labels=torch.tensor([r.labels])).loss.item() for r in rows]
    assert sum(by_example) / len(rows) != pytest.approx(total / targets, rel=1e-5), "cannot tell the two means apart"


# --- failures ---------------------------------------------------------------------------------------------------------


def test_divergence_is_said_and_leaves_the_model_clean(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_folder)
    base = base_logits(model)
    with pytest.raises(TrainingDivergedError, match=r"step \d+: loss (nan|inf)") as caught:
        run(model, settings("training.learning_rate=1e30", "training.warmup_fraction=0"))
    assert "training.learning_rate" in caught.value.next_step and caught.value.exit_code == 34
    assert torch.equal(base_logits(model), base) and not model.network.training

    config = settings()
    _, expected = run(load(tiny_folder), config)
    attach_adapter(model, "x", config.adapter, config.seed)
    whole = Model.loss_sum
    monkeypatch.setattr(Model, "loss_sum", lambda self, tokens, labels: whole(self, tokens, labels) * math.nan)
    with pytest.raises(TrainingDivergedError, match="step 1: loss nan"):
        train(model, "x", make_rows(), config)
    monkeypatch.undo()
    # the spoilt gradients of the failed step once stayed behind and spoilt the next run
    train(model, "x", make_rows(), config)
    assert distance(model.adapters["x"].tensors(), expected) == 0


def test_too_little_memory_is_said_before_the_work(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = load(tiny_folder), settings()
    monkeypatch.setattr("liftlm.memory.available_memory", lambda device: 123_000_000)
    steps: list[StepMetrics] = []
    with pytest.raises(NotEnoughMemoryError) as caught:
        run(model, config, on_step=steps.append)
    needed = predict_memory(model, model.adapters["x"].parameters(), make_rows(), config.training)
    assert caught.value.message == f"Training needs about {needed / 1e9:.1f} GB of memory and 0.1 GB are free."
    for setting in ("training.micro_batch_tokens", "segments.segment_tokens", "training.gradient_checkpointing"):
        assert setting in caught.value.next_step
    assert not steps and caught.value.exit_code == 32


def test_memory_that_runs_out_in_a_step_is_said(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "loss_sum", lambda self, tokens, labels: torch.empty(1 << 55))  # torch's own message
    with pytest.raises(NotEnoughMemoryError, match="ran out of memory"):
        run(load(tiny_folder), settings())


def test_predicted_memory_follows_the_settings(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liftlm.memory.keeps_little", lambda network: False)  # else two layers are no more than one
    model, rows = load(tiny_folder), [Example((7,) * 200, (7,) * 200)] * 40
    attach_adapter(model, "x", settings().adapter, 0)

    def predicted(rows: list[Example], *more: str) -> int:
        training = settings("training.batch_tokens=8000", *more).training
        return predict_memory(model, model.adapters["x"].parameters(), rows, training)

    assert predicted(rows) > predicted(rows, "training.micro_batch_tokens=2000")
    assert predicted(rows, "training.gradient_checkpointing=true") < predicted(rows)
    # not with the document: the same batches, ten times as many
    assert predicted(rows * 10) == predicted(rows)


# --- kinds and number formats -----------------------------------------------------------------------------------------


def test_full_training_moves_every_weight_and_leaves_the_base_alone(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    _, tensors = run(model, settings("adapter.kind=full"))
    assert set(tensors) == set(before)
    assert all(not torch.equal(tensors[name], before[name]) for name in before)
    assert all(torch.equal(p, before[name]) for name, p in model.network.named_parameters())
    assert not any(p.requires_grad for p in model.network.parameters())
    with use_adapter(model, "x"):
        assert all(torch.equal(p, tensors[name]) for name, p in model.network.named_parameters())


def _can_multiply_float16() -> bool:
    try:
        torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 4, 8, dtype=torch.float16)] * 3)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_learns(dtype: str, kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    if dtype == "float16" and not _can_multiply_float16():
        pytest.skip("this torch has no float16 on CPUs")
    model = load(tiny_folder, dtype)
    base = base_logits(model)
    wide = load(tiny_folder)
    config = settings(f"adapter.kind={kind}", "training.epochs=8", "training.learning_rate=2e-2")
    with attention_that_runs():
        report, tensors = run(model, config, folder=tmp_path / "w")
    expected, _ = run(wide, config)
    assert report.epoch_losses[-1] < 0.8 * report.epoch_losses[0]
    assert report.epoch_losses[0] == pytest.approx(expected.epoch_losses[0], rel=0.02)
    assert report.epoch_losses[-1] == pytest.approx(expected.epoch_losses[-1], rel=0.2)
    assert torch.equal(base_logits(model), base) and base.dtype == getattr(torch, dtype)
    stored = torch.float32 if kind == "lora" else getattr(torch, dtype)
    assert {tensor.dtype for tensor in tensors.values()} == {stored}
    for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # a skipped float16 step has an infinite norm, which JSON has not


# --- accelerate -------------------------------------------------------------------------------------------------------


def test_a_model_on_another_device_than_the_first_one(tiny_folder: Path) -> None:
    """accelerate keeps the first device a process trained on for ever (here as if that had been another one)."""
    from accelerate.state import AcceleratorState, PartialState

    _, expected = run(load(tiny_folder), settings())
    for state in (PartialState, AcceleratorState):
        state._shared_state["device"] = torch.device("meta")
    _, again = run(load(tiny_folder), settings())
    assert distance(expected, again) == 0


def test_the_launchers_mixed_precision_is_not_ours(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState

    _, expected = run(load(tiny_folder), settings())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    _, again = run(load(tiny_folder), settings())
    assert distance(expected, again) == 0


def test_a_second_document_is_not_disturbed_by_the_first(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "qwen3")
    _, expected = run(load(folder), settings(), make_rows(seed=5))
    model = load(folder)
    attach_adapter(model, "first", settings().adapter, 0)
    train(model, "first", make_rows(seed=1), settings())
    first = {name: tensor.clone() for name, tensor in model.adapters["first"].tensors().items()}
    _, second = run(model, settings(), make_rows(seed=5))
    assert distance(second, expected) == 0
    assert distance(model.adapters["first"].tensors(), first) == 0
