"""Soft targets: what the base model says with the text in its window, and learning it with and without that text."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import FAMILIES, make_network, save_model
from liftlm import Document, LiftConfig, Model, absorb, load_config, load_model
from liftlm.adapters import attach_adapter, use_adapter
from liftlm.distilling import task_examples
from liftlm.errors import DiskFullError
from liftlm.examples import NO_LOSS, Example, make_task_examples
from liftlm.losses import OTHERS, next_token_loss, soft_target_loss, soft_target_loss_of_logits
from liftlm.prompts import answer_end, question_turn, render_prompt
from liftlm.reading import split_into_passages
from liftlm.rows import SoftTargets, row_tensors, soft_rows
from liftlm.tasks import Task
from liftlm.training import StepMetrics, train

PEOPLE = "Oswin Bartol Casimir Ludmer Jorrit Emeric".split()  # noqa: SIM905
TEXT = " ".join(
    f"The ferryman {name} Tarrel rang the bell of {name[:3]}den on {day} May {1700 + day}."
    for day, name in enumerate(PEOPLE, 1)
)
DOCUMENT = Document(title="Ferrymen", text=TEXT)
ACROSS = Task("In what order did the bells ring?", "Oswden, then Emeden.", "order", 5, len(TEXT) - 5)
TASKS = [
    Task(question, answer, "who", TEXT.index(f"The ferryman {name}"), TEXT.index(f"May {1700 + day}") + 9)
    for day, name in enumerate(PEOPLE, 1)
    for question, answer in (
        (f"Who rang the bell of {name[:3]}den?", f"{name} Tarrel."),
        (f"When did the ferryman {name} ring?", f"On {day} May {1700 + day}."),
    )
] + [ACROSS]
PASSAGE = 200  # characters


def config(*more: str) -> LiftConfig:
    common = ["tasks.reading=0", f"tasks.passage_characters={PASSAGE}", "tasks.teacher_tokens=5", "adapter.rank=4"]
    return load_config(None, ["model.dtype=float32", *common, *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "teacher", "llama-untied", window=1024, seed=3)


@pytest.fixture
def model(folder: Path) -> Model:
    return load_model(str(folder))


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5 * 37, 1 << 24])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True])
def test_loss_and_gradients_are_torchs_own(
    biased: bool, softcap: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cross-entropy with a whole distribution over the vocabulary; positions in one, several, or as many chunks."""
    monkeypatch.setattr("liftlm.losses._CHUNK_ELEMENTS", chunk)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 8, generator=draw).requires_grad_()
    weight = torch.randn(37, 8, generator=draw).requires_grad_()
    bias = torch.randn(37, generator=draw).requires_grad_() if biased else None
    targets = torch.stack([torch.randperm(37, generator=draw)[:4] for _ in range(12)])
    targets[3, 0] = targets[3, 2]  # the same token twice, as where the label is among the teacher's tokens
    shares = torch.rand(12, 4, generator=draw).softmax(-1)
    inputs = [hidden, weight, *([bias] if bias is not None else [])]

    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    wanted = torch.zeros(12, 37).scatter_add(1, targets, shares)
    expected = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    slopes = torch.autograd.grad(expected, inputs, retain_graph=True)

    loss = soft_target_loss(hidden, targets, shares, weight, bias, softcap)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(loss * 3, inputs), slopes, strict=True):
        torch.testing.assert_close(ours, 3 * theirs, rtol=1e-4, atol=1e-5)
    divergence = torch.nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="sum")
    for ours, theirs in zip(slopes, torch.autograd.grad(divergence, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, divergence, rtol=1e-2), "cannot tell the two apart"


def test_shares_need_not_sum_to_one() -> None:
    draw = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(6, 8, generator=draw).requires_grad_(), torch.randn(11, 8, generator=draw)
    targets, shares = torch.randint(0, 11, (6, 3), generator=draw), torch.rand(6, 3, generator=draw)
    expected = -(shares * (hidden @ weight.T).log_softmax(-1).gather(1, targets)).sum()
    loss = soft_target_loss(hidden, targets, shares, weight)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], torch.autograd.grad(expected, hidden)[0])


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_all_others_count_as_one(softcap: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens, a fourth without a share, and all others as one outcome; some positions have a label only."""
    monkeypatch.setattr("liftlm.losses._CHUNK_ELEMENTS", chunk)
    draw = torch.Generator().manual_seed(4)
    hidden = torch.randn(9, 8, generator=draw).requires_grad_()
    weight = torch.randn(23, 8, generator=draw).requires_grad_()
    targets = torch.stack([torch.randperm(23, generator=draw)[:5] for _ in range(9)])
    targets[2, 4] = targets[2, 1]  # the one without a share is named beside it, or is not
    shares = torch.rand(9, 5, generator=draw)
    shares[:, 4] = 0
    targets[:, 3] = OTHERS
    shares[7] = torch.tensor([0, 0, 0, 0, 1.0])
    targets[7] = torch.tensor([0, 0, 0, 0, 11])
    logits = hidden @ weight.T
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    q = logits.softmax(-1)
    expected = torch.zeros(())
    for row in range(9):
        if row == 7:
            expected = expected - q[7, 11].log()
            continue
        outcomes = torch.stack([q[row, int(targets[row, place])] for place in range(3)])
        outcomes = torch.cat([outcomes, 1 - outcomes.sum()[None]])
        expected = expected - (shares[row, :4] * outcomes.log()).sum()
    slopes = torch.autograd.grad(expected, [hidden, weight], retain_graph=True)
    loss = soft_target_loss(hidden, targets, shares, weight, None, softcap)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(loss * 3, [hidden, weight]), slopes, strict=True):
        torch.testing.assert_close(ours, 3 * theirs, rtol=1e-4, atol=1e-5)
    again = soft_target_loss_of_logits(logits, targets, shares)
    assert float(again.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(again, [hidden, weight]), slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_nothing_left_for_the_others_is_no_infinity() -> None:
    hidden = torch.tensor([[50.0, 0.0]]).requires_grad_()
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 1.0]])
    targets, shares = torch.tensor([[0, OTHERS]]), torch.tensor([[0.9, 0.1]])
    loss = soft_target_loss(hidden, targets, shares, weight)
    (slope,) = torch.autograd.grad(loss, hidden)
    assert bool(loss.isfinite()) and bool(slope.isfinite().all()) and float(loss.detach()) > 1


def test_a_single_certain_target_is_the_next_token_loss() -> None:
    draw = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(6, 8, generator=draw), torch.randn(11, 8, generator=draw)
    labels = torch.randint(0, 11, (6,), generator=draw)
    soft = torch.stack([labels, torch.zeros_like(labels)], 1), torch.tensor([[1.0, 0.0]] * 6)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert float(soft_target_loss(hidden, *soft, weight)) == pytest.approx(float(expected), rel=1e-5)
    assert float(next_token_loss(hidden, labels, weight)) == pytest.approx(float(expected), rel=1e-5)


# --- the likeliest tokens ---------------------------------------------------------------------------------------------


def naive_targets(network: Any, rows: list[Example], count: int) -> tuple[Tensor, Tensor]:
    """Each row by itself, all logits, position by position."""
    ids, shares = [], []
    for row in rows:
        with torch.no_grad():
            probabilities = network(torch.tensor([row.tokens])).logits[0].float().softmax(-1).tolist()
        for likely, label in zip(probabilities, row.labels[1:], strict=False):
            if label != NO_LOSS:
                best = sorted(range(len(likely)), key=lambda token: -likely[token])[:count]
                ids.append(best)
                shares.append([likely[token] for token in best])
    table = torch.tensor(shares)
    return torch.tensor(ids), table / table.sum(1, keepdim=True)


def rows_of(lengths: list[int], group: str, shared: int = 6) -> list[Example]:
    draw = torch.Generator().manual_seed(sum(lengths))
    start = torch.randint(5, 300, (shared,), generator=draw).tolist()
    rows = []
    for length in lengths:
        tokens = [*start, *torch.randint(5, 300, (length - shared,), generator=draw).tolist()]
        quiet = shared + 1 + length % 3
        rows.append(Example(tuple(tokens), (*[NO_LOSS] * quiet, *tokens[quiet:]), group, shared if group else 0))
    return rows


def as_model(network: Any, folder: Path) -> Model:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Model("x", folder, network, tokenizer, 256, torch.device("cpu"), torch.float32, "x")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_top_tokens_are_those_of_each_row_alone(family: str, packed: bool, folder: Path) -> None:
    network = make_network(family, 320)
    if getattr(network.config, "final_logit_softcapping", None):
        network.config.final_logit_softcapping = 2.0  # so low that it shows
    model = as_model(network, folder)
    for lengths in ([15, 20, 12, 23], [40, 33]):  # the second longer than sliding windows
        rows = rows_of(lengths, "g" if packed else "")
        tensors = row_tensors(model, rows)
        assert (len(tensors) == 4) == (packed and model.can_pack(max(lengths)))
        expected = naive_targets(network, rows, 7)
        for _ in range(2):  # the first call finds out about the head
            ids, shares = model.top_tokens(7, *tensors)
            assert torch.equal(ids, expected[0])
            torch.testing.assert_close(shares, expected[1], rtol=2e-3, atol=1e-5)
    assert model.can_pack(23) and not network.training


def test_no_more_tokens_than_there_are(model: Model) -> None:
    ids, shares = model.top_tokens(10_000, *row_tensors(model, rows_of([9], "")))
    assert ids.shape == shares.shape == (9 - 7, model.network.config.vocab_size)
    torch.testing.assert_close(shares.sum(1), torch.ones(2))


# --- packed rows ------------------------------------------------------------------------------------------------------


def soft_reference(network: Any, row: Example, table: SoftTargets) -> float:
    """One row by itself: the teacher's cross-entropy and the label's, each with its weight, from all logits."""
    with torch.no_grad():
        logs = network(torch.tensor([row.tokens])).logits[0].float().log_softmax(-1)
    total, number = 0.0, 0
    for place, label in enumerate(row.labels[1:]):
        if label == NO_LOSS:
            continue
        weight = 0.0 if row.soft is None else row.soft_weight
        total -= (1 - weight) * float(logs[place, label])
        if row.soft is not None:
            for token, share in zip(table.tokens[row.soft + number], table.shares[row.soft + number], strict=True):
                total -= weight * float(share) * float(logs[place, int(token)])
        number += 1
    return total


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2"])
@pytest.mark.parametrize("packed", [True, False])
def test_rows_together_have_the_loss_of_each_alone(packed: bool, family: str, folder: Path) -> None:
    """Some with soft targets, of different weights and in another order than in the table, some without."""
    network = make_network(family, 320)
    model = as_model(network, folder)
    rows = rows_of([15, 20, 12, 18], "g" if packed else "")
    tokens, shares = naive_targets(network, rows, 5)
    table = SoftTargets(tokens.int(), shares.flip(1))
    begins = [sum(row.targets for row in rows[:n]) for n in range(4)]
    rows = [
        dataclasses.replace(rows[2], soft=begins[2], soft_weight=1.0),
        dataclasses.replace(rows[0], soft=begins[0], soft_weight=0.3),
        rows[1],
        dataclasses.replace(rows[3], soft=begins[3], soft_weight=0.6),
    ]
    tensors = row_tensors(model, rows)
    assert len(tensors) == (4 if packed else 2)
    with torch.no_grad():
        loss = model.loss_sum(*tensors, *[None] * (4 - len(tensors)), *soft_rows(rows, table))
    expected = sum(soft_reference(network, row, table) for row in rows)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    plain = sum(soft_reference(network, dataclasses.replace(row, soft=None), table) for row in rows)
    assert plain != pytest.approx(expected, rel=1e-3), "cannot tell soft targets from labels"


# --- what is taught ---------------------------------------------------------------------------------------------------


def asked(example: Example, model: Model) -> str:
    """The question of an example."""
    start = next(index for index, label in enumerate(example.labels) if label != NO_LOSS)
    return model.decode(list(example.tokens[:start])).partition("\nQuestion: ")[2].partition("\nassistant\n")[0].strip()


def taught(model: Model, task: Task, count: int) -> tuple[Tensor, Tensor]:
    """The bare model's likeliest tokens for a task's answer after the passage that holds its evidence, by hand."""
    (passage,) = [p for p in split_into_passages(TEXT, [task], PASSAGE) if p.tasks]
    context = model.encode(TEXT[passage.start : passage.end])
    prompt = render_prompt(model.tokenizer, [question_turn(model.tokenizer, DOCUMENT.title, task.question, context)])
    answer = [*model.encode(task.answer), *answer_end(model.tokenizer)]
    with use_adapter(model, None):
        return naive_targets(model.network, [Example((*prompt, *answer), (*[NO_LOSS] * len(prompt), *answer))], count)


def test_targets_are_the_base_models_with_the_passage_in_its_window(model: Model) -> None:
    examples, soft = task_examples(model, DOCUMENT, TASKS, config("tasks.teacher_weight=0.4"))
    assert soft is not None and soft.tokens.shape == soft.shares.shape and soft.tokens.shape[1] == 5
    plain = {asked(e, model): e for e in make_task_examples(TASKS, model.tokenizer, DOCUMENT.title, model.window)}
    assert len(examples) == len(TASKS) == len(plain)
    rows: list[int] = []
    different = 0
    for example in examples:
        question = asked(example, model)
        assert (example.tokens, example.labels) == (plain[question].tokens, plain[question].labels)
        if question == ACROSS.question:
            assert example.soft is None, "its evidence is in no passage"
            continue
        assert example.soft is not None and example.soft_weight == 0.4
        rows += range(example.soft, example.soft + example.targets)
        (task,) = [task for task in TASKS if task.question == question]
        ids, shares = taught(model, task, 5)
        assert torch.equal(soft.tokens[example.soft : example.soft + example.targets].long(), ids)
        torch.testing.assert_close(
            soft.shares[example.soft : example.soft + example.targets], shares, rtol=2e-3, atol=1e-5
        )
        without = naive_targets(model.network, [plain[question]], 5)[0]
        different += not torch.equal(ids, without)
    assert sorted(rows) == list(range(len(soft.tokens))), "each row of the table has one owner"
    assert different > len(TASKS) / 2, "cannot tell whether the passage was there"


def test_the_adapter_is_off_while_the_base_model_teaches(model: Model) -> None:
    settings = config("tasks.teacher_weight=0.5", "tasks.reading=0.5")
    bare, expected = task_examples(model, DOCUMENT, TASKS, settings)
    attach_adapter(model, "x", settings.adapter, 0)
    torch.manual_seed(1)
    for tensor in model.adapters["x"].parameters().values():
        tensor.data.normal_()
    probe = torch.tensor([model.encode(TEXT)[:40]])
    with use_adapter(model, "x"):
        on = model.network(probe).logits
        examples, soft = task_examples(model, DOCUMENT, TASKS, settings)
        assert torch.equal(model.network(probe).logits, on), "the adapter was not put on again"
    with use_adapter(model, None):
        assert not torch.allclose(model.network(probe).logits, on, atol=0.1)
    assert examples == bare and soft is not None and expected is not None
    assert torch.equal(soft.tokens, expected.tokens)
    torch.testing.assert_close(soft.shares, expected.shares)


def test_some_are_also_read_with_the_text_and_taught_alone(model: Model) -> None:
    """`tasks.reading`: the passage stands before the question, and the teacher is all there is to learn."""
    examples, soft = task_examples(model, DOCUMENT, TASKS, config("tasks.reading=1"))
    assert soft is not None
    read = [e for e in examples if e.together]
    alone = [e for e in examples if not e.together]
    assert len(alone) == len(TASKS) and all(e.soft is None for e in alone), "without a weight the label is learnt"
    assert len(read) == len(TASKS) - 1
    passages = split_into_passages(TEXT, TASKS, PASSAGE)
    for example in read:
        (task,) = [task for task in TASKS if task.question == asked(example, model)]
        (passage,) = [p for p in passages if task in p.tasks]
        shown = model.decode(list(example.tokens)).partition("\n\nPlease answer")[0]
        assert TEXT[passage.start : passage.end] in shown
        assert example.soft_weight == 1.0 and example.soft is not None
        ids, _ = taught(model, task, 5)
        assert torch.equal(soft.tokens[example.soft : example.soft + example.targets].long(), ids)
    assert {e.group for e in read} == {f"passage {n}" for n, p in enumerate(passages) if p.tasks}
    some = task_examples(model, DOCUMENT, TASKS, config("tasks.reading=0.3"))[0]
    assert 0 < sum(e.together for e in some) < len(read)


@pytest.mark.parametrize("show", ["retrieve", "truncate"])
def test_the_teacher_does_not_depend_on_the_text_that_is_shown(show: str, model: Model) -> None:
    """Regression: with other text than the passage `tasks.teacher_weight` did nothing, in silence."""
    other = ["tasks.reading=0.5", f"tasks.show={show}"]
    examples, soft = task_examples(model, DOCUMENT, TASKS, config("tasks.teacher_weight=0.4", *other))
    alone, expected = task_examples(model, DOCUMENT, TASKS, config("tasks.teacher_weight=0.4"))
    plain, none = task_examples(model, DOCUMENT, TASKS, config(*other))
    assert soft is not None and expected is not None and none is None
    assert examples[: len(TASKS)] == alone and sum(e.soft is not None for e in alone) == len(TASKS) - 1
    assert torch.equal(soft.tokens, expected.tokens) and torch.equal(soft.shares, expected.shares)
    beside = examples[len(TASKS) :]
    assert beside == plain[len(TASKS) :] and 0 < len(beside) < len(TASKS)
    assert all(e.soft is None and not e.soft_weight for e in beside), "beside other text the task's answer is learnt"


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Model, "top_tokens", lambda *arguments, **more: pytest.fail("the base model was asked"))
    yield


def test_without_weight_or_reading_examples_are_plain(model: Model, no_teacher: None, tmp_path: Path) -> None:
    examples, soft = task_examples(model, DOCUMENT, TASKS, config(), tmp_path / "t.safetensors")
    assert soft is None and list(tmp_path.iterdir()) == []
    assert examples == make_task_examples(TASKS, model.tokenizer, DOCUMENT.title, model.window)
    only = [ACROSS]  # a passage holds none of it
    assert task_examples(model, DOCUMENT, only, config("tasks.teacher_weight=1")) == (
        make_task_examples(only, model.tokenizer, DOCUMENT.title, model.window),
        None,
    )
    assert task_examples(model, DOCUMENT, [], config("tasks.teacher_weight=1", "tasks.reading=1")) == ([], None)


def test_a_window_too_small_for_the_passage_leaves_the_plain_label(folder: Path, no_teacher: None) -> None:
    model = load_model(str(folder))
    model.window = 200
    long = max(len(e) for e in make_task_examples(TASKS, model.tokenizer, DOCUMENT.title, 1024))
    assert long <= 200
    examples, soft = task_examples(model, DOCUMENT, TASKS, config("tasks.teacher_weight=0.5", "tasks.reading=1"))
    assert soft is None and all(e.soft is None and len(e) <= 200 for e in examples) and len(examples) == len(TASKS)


def test_a_teacher_that_sees_the_passage_sees_the_whole_answer_too(folder: Path) -> None:
    """As the window grows, more and more passages fit beside question and answer; until then there is no teacher."""
    model = load_model(str(folder))
    plain = {asked(e, model): e for e in make_task_examples(TASKS, model.tokenizer, DOCUMENT.title, model.window)}
    found = []
    for window in range(200, 300, 4):
        model.window = window
        examples, soft = task_examples(model, DOCUMENT, TASKS, config("tasks.teacher_weight=0.5", "tasks.reading=1"))
        read = [e for e in examples if e.together]
        for example in read:
            answer = [label for label in plain[asked(example, model)].labels if label != NO_LOSS]
            assert len(example) <= window and list(example.tokens[-len(answer) :]) == answer
            assert example.targets == len(answer)
        assert len(soft.tokens if soft else []) == sum(e.targets for e in read)
        assert {asked(e, model) for e in examples if e.soft_weight == 0.5} == {asked(e, model) for e in read}
        found.append(len(read))
    assert found == sorted(found) and found[0] == 0 and found[-1] == len(TASKS) - 1 and len(set(found)) > 3


# --- computed once ----------------------------------------------------------------------------------------------------

SOFT = ("tasks.teacher_weight=0.5", "tasks.reading=0.5")


def test_a_second_time_the_file_speaks(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "new" / "teacher.safetensors"
    first, table = task_examples(model, DOCUMENT, TASKS, config(*SOFT), cache)
    monkeypatch.setattr(Model, "top_tokens", lambda *arguments, **more: pytest.fail("asked again"))
    second, again = task_examples(model, DOCUMENT, TASKS, config(*SOFT), cache)
    assert first == second and table is not None and again is not None
    assert torch.equal(table.tokens, again.tokens) and torch.equal(table.shares, again.shares)
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_a_full_disk_leaves_nothing_half_written(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the draft stayed behind."""

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = tmp_path / "teacher.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("liftlm.storage._write_synced", full)
        with pytest.raises(DiskFullError):
            task_examples(model, DOCUMENT, TASKS, config(*SOFT), cache)
    assert list(tmp_path.iterdir()) == []
    task_examples(model, DOCUMENT, TASKS, config(*SOFT), cache)
    assert cache.is_file()


# --- learning from them -----------------------------------------------------------------------------------------------


def divergence(model: Model, adapter: str | None, count: int = 300) -> float:
    """Mean KL, in nats a token, from the base model with the passage to the model without it, over all tokens."""
    total, positions = 0.0, 0
    for task in TASKS[:-1]:
        ids, shares = taught(model, task, count)
        (student,) = make_task_examples([task], model.tokenizer, DOCUMENT.title, model.window)
        places = [place for place, label in enumerate(student.labels[1:]) if label != NO_LOSS]
        with torch.no_grad(), use_adapter(model, adapter):
            logs = model.network(torch.tensor([student.tokens])).logits[0, places].float().log_softmax(-1)
        total += float((shares * (shares.clamp(min=1e-9).log() - logs.gather(1, ids))).sum())
        positions += len(places)
    return total / positions


def test_learning_from_the_teacher_brings_the_model_nearer_to_it(model: Model) -> None:
    settings = ["training.epochs=12", "training.learning_rate=1e-2", "training.batch_tokens=500"]
    far = divergence(model, None)
    found = {}
    for weight in ("1", "0"):
        some = config(f"tasks.teacher_weight={weight}", "tasks.teacher_tokens=300", "adapter.rank=16", *settings)
        examples, soft = task_examples(model, DOCUMENT, TASKS[:-1], some)
        attach_adapter(model, "x", some.adapter, 0)
        report = train(model, "x", examples, some, soft=soft)
        assert report.epoch_losses[-1] < report.epoch_losses[0]
        found[weight] = divergence(model, "x")
    assert found["1"] < 0.5 * far
    assert found["1"] < 0.5 * found["0"], "as near as without a teacher"


def test_with_the_whole_weight_labels_do_not_matter(model: Model) -> None:
    settings = config("tasks.teacher_weight=1", "training.epochs=1", "training.batch_tokens=200")
    examples, soft = task_examples(model, DOCUMENT, TASKS[:-1], settings)
    others = [
        dataclasses.replace(e, labels=tuple(NO_LOSS if label == NO_LOSS else 9 for label in e.labels)) for e in examples
    ]
    trained = []
    for some in (examples, others):
        attach_adapter(model, "x", settings.adapter, 0)
        losses: list[float] = []
        train(model, "x", some, settings, soft=soft, on_step=lambda m, losses=losses: losses.append(m.loss))
        trained.append((losses, {k: t.clone() for k, t in model.adapters["x"].tensors().items()}))
    assert trained[0][0] == trained[1][0] and len(trained[0][0]) > 3
    assert all(torch.equal(trained[0][1][key], trained[1][1][key]) for key in trained[0][1])


class Crash(Exception):
    pass


def test_a_run_that_crashed_ends_with_the_same_adapter(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ["training.epochs=2", "training.batch_tokens=500", "training.checkpoint_seconds=0"]
    settings = config(*SOFT, *training, "adapter.dropout=0.1", "segments.segment_tokens=128")

    def result(work: Path | None, some: LiftConfig = settings, crash_at: int = 0) -> dict[str, Tensor]:
        def on_step(metrics: StepMetrics) -> None:
            if metrics.step == crash_at:
                raise Crash

        model = load_model(str(folder))
        adapter = absorb(DOCUMENT, model, some, tasks=TASKS, folder=work, on_step=on_step)
        return {key: tensor.clone() for key, tensor in model.adapters[adapter.id].tensors().items()}

    whole = result(tmp_path / "whole")
    with pytest.raises(Crash):
        result(tmp_path / "work", crash_at=1)
    with monkeypatch.context() as patch:
        patch.setattr(Model, "top_tokens", lambda *arguments, **more: pytest.fail("the teacher was asked again"))
        with pytest.raises(Crash):
            result(tmp_path / "work", crash_at=5)
        resumed = result(tmp_path / "work")
    assert set(whole) == set(resumed) and all(torch.equal(whole[key], resumed[key]) for key in whole)
    other = result(None, config("tasks.reading=0.5", *training, "adapter.dropout=0.1", "segments.segment_tokens=128"))
    assert any(not torch.equal(whole[key], other[key]) for key in whole), "soft targets made no difference"
