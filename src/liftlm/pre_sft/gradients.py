"""What one document says the start should become, as a gradient: by supervised fine-tuning, first-order MAML or Reptile.

sft: the gradient of the loss on segments, tasks and questions alike (the paper's recipe). fomaml (arXiv 1703.03400, first
order): the document is absorbed in a few steps, and the gradient of its questions *there* is applied to the start. reptile
(arXiv 1803.02999): absorbed and asked in steps, and the start moves towards where that led. Leaves the weights as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from liftlm.config import LiftConfig
from liftlm.examples import Example, plan_steps, split_step
from liftlm.models import Model
from liftlm.pre_sft.lessons import Lesson
from liftlm.rows import row_tensors

Mode = Literal["sft", "meta"]
Parameters = Mapping[str, Parameter]


@dataclass(frozen=True)
class DocumentGradient:
    """gradients: by the adapter's names; loss: mean over what was asked (sft: over all), nats a token, where it was asked."""

    gradients: dict[str, Tensor]
    loss: float
    tokens: int


def document_gradient(
    model: Model, parameters: Parameters, lesson: Lesson, config: LiftConfig, mode: Mode, number: int
) -> DocumentGradient | None:
    """None where the document has nothing to teach in this mode. The adapter must be on, in training mode."""
    if mode == "sft":
        examples = lesson.absorb + lesson.ask
        if not examples:
            return None
        loss = _backward(model, examples, config)
        return DocumentGradient(_take_gradients(parameters), loss, _tokens(examples))
    if not lesson.absorb or not lesson.ask:
        return None
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        return _meta_gradient(model, parameters, lesson, config, number, before)
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
                parameter.grad = None


def _meta_gradient(
    model: Model,
    parameters: Parameters,
    lesson: Lesson,
    config: LiftConfig,
    number: int,
    before: Mapping[str, Tensor],
) -> DocumentGradient:
    settings, training = config.pre_sft, config.training
    optimizer = torch.optim.AdamW(
        list(parameters.values()),
        lr=settings.inner_learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.eps,
        weight_decay=training.weight_decay,
    )
    tokens = 0
    for step in _inner_steps(lesson.absorb, config, number):
        chosen = [lesson.absorb[index] for index in step]
        tokens += _tokens(chosen)
        _inner_step(model, parameters, optimizer, chosen, config)
    loss = _backward(model, lesson.ask, config)
    tokens += _tokens(lesson.ask)
    if settings.algorithm == "fomaml":
        return DocumentGradient(_take_gradients(parameters), loss, tokens)
    torch.nn.utils.clip_grad_norm_(parameters.values(), training.max_grad_norm)
    optimizer.step()
    moved = {name: before[name] - parameter.detach() for name, parameter in parameters.items()}
    return DocumentGradient(moved, loss, tokens)


def _inner_steps(examples: Sequence[Example], config: LiftConfig, number: int) -> list[list[int]]:
    """As absorbing would begin; where the document is short, from the beginning again."""
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < config.pre_sft.inner_steps:
        steps += plan_steps(examples, config.training.batch_tokens, epoch, config.seed + number)
        epoch += 1
    return steps[: config.pre_sft.inner_steps]


def _inner_step(
    model: Model,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    config: LiftConfig,
) -> None:
    _backward(model, examples, config)
    torch.nn.utils.clip_grad_norm_(parameters.values(), config.training.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _backward(model: Model, examples: Sequence[Example], config: LiftConfig) -> float:
    """Adds the gradient of the mean loss over all targets; returns that mean (nats a token)."""
    targets = max(1, sum(example.targets for example in examples))
    low = config.adapter.kind == "full" and model.dtype != torch.float32
    total = 0.0
    for part in split_step(range(len(examples)), examples, config.training.micro_batch_tokens, 1, model.can_pack):
        tensors = row_tensors(model, [examples[index] for index in part])
        with torch.autocast(model.device.type, dtype=model.dtype if low else None, enabled=low):
            loss = model.loss_sum(*tensors) / targets
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _take_gradients(parameters: Parameters) -> dict[str, Tensor]:
    taken = {}
    for name, parameter in parameters.items():
        taken[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
        parameter.grad = None
    return taken


def _tokens(examples: Sequence[Example]) -> int:
    return sum(map(len, examples))
