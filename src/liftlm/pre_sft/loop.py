"""The outer loop: a step averages the gradients of several documents, over all processes. One pass, streamed, resumable.

Stopped at any point the same call continues from its last checkpoint and ends, on a CPU, with the same weights bit for
bit: what a document brings depends on its number and the seed alone. Knows nothing of files of documents.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from liftlm.adapters import AttachedAdapter, start_fingerprint, use_adapter
from liftlm.config import LiftConfig
from liftlm.devices import StopRequest, join_processes
from liftlm.errors import ConfigError, CorpusError, TrainingDivergedError
from liftlm.evaluation.benchmark import Item
from liftlm.models import Model
from liftlm.pre_sft.gradients import Mode, document_gradient
from liftlm.pre_sft.lessons import make_lesson
from liftlm.schedule import learning_rate
from liftlm.storage import canonical_json
from liftlm.training_report import OnStep, RunRecord, StepMetrics, TrainingReport


def run_outer_loop(
    model: Model,
    name: str,
    stream: Callable[[int], Iterator[Item]],
    documents: int,
    corpus: str,
    config: LiftConfig,
    mode: Mode,
    folder: Path,
    on_step: OnStep = lambda metrics: None,
) -> TrainingReport:
    """Trains the attached adapter `name`. stream: number of a document → it and those after; corpus: its fingerprint.

    Raises InterruptedWorkError (state saved), TrainingDivergedError, ConfigError (float16), and what the writer raises.
    """
    if model.dtype == torch.float16:
        raise ConfigError("Pre-LIFT fine-tuning is not done in float16.", "Use --set model.dtype=bfloat16, or float32.")
    devices = [model.device] if model.device.type == "cuda" else []
    # on throughout: of full weights it is the adapter's that are to be saved, not the base model's
    with torch.random.fork_rng(devices=devices), use_adapter(model, name, training=True), StopRequest() as stop:
        run = _Outer(model, model.adapters[name], documents, corpus, config, mode, folder)
        run.record.resume(run.fingerprint)
        items = stream(run.record.progress.step * config.pre_sft.documents_per_step)
        while chosen := list(itertools.islice(items, config.pre_sft.documents_per_step)):
            on_step(run.step(chosen))
            done, signal = run.record.progress.step, run.record.agree(stop.signal)
            # at the end too: the result is still to be written
            if run.record.is_due() or signal is not None or done == run.steps:
                run.record.save()
            if signal is not None:
                raise stop.error(signal, f"Stopped after step {done} of {run.steps}", folder)
        return run.record.report()


class _Outer:
    """The state of one run."""

    def __init__(
        self,
        model: Model,
        adapter: AttachedAdapter,
        documents: int,
        corpus: str,
        config: LiftConfig,
        mode: Mode,
        folder: Path,
    ) -> None:
        self.model, self.config, self.mode, self._corpus = model, config, mode, corpus
        self._documents = documents
        self.steps = -(-documents // config.pre_sft.documents_per_step)
        self.accelerator = join_processes(model.device)
        self.parameters = adapter.parameters()
        training = config.training
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.pre_sft.learning_rate,
            betas=(training.beta1, training.beta2),
            eps=training.eps,
            weight_decay=training.weight_decay,
        )
        scaler = torch.amp.GradScaler(model.device.type, enabled=False)
        state = (self.parameters, self.optimizer, scaler)
        self.record = RunRecord(folder, training.checkpoint_seconds, self.accelerator, model.device, *state)
        self._rates = training.model_copy(update={"learning_rate": config.pre_sft.learning_rate})

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self, items: list[Item]) -> StepMetrics:
        """One document after the other on each process; all then take the same step."""
        began, done, training = time.monotonic(), self.record.progress.step, self.config.training
        parameters = self.parameters
        total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        counts = torch.zeros(3, dtype=torch.float64)  # documents, sum of their losses, tokens
        for position in range(self.accelerator.process_index, len(items), self.accelerator.num_processes):
            number = done * self.config.pre_sft.documents_per_step + position
            torch.manual_seed(random.Random(f"{self.config.seed}/{number}").getrandbits(63))  # dropout
            lesson = make_lesson(self.model, items[position], self.config, number)
            self.model.network.train()
            found = document_gradient(self.model, parameters, lesson, self.config, self.mode, number)
            self.model.network.eval()
            if found is not None:
                for name in total:
                    total[name] += found.gradients[name]
                counts += torch.tensor([1, found.loss, found.tokens], dtype=torch.float64)
        counts = self._sum(counts.to(self.model.device) if self.model.device.type != "mps" else counts.float())
        taught = int(counts[0])
        if not taught:
            raise CorpusError(
                f"None of {len(items)} documents, '{items[0].document.title}' the first, has anything to teach.",
                "Give questions with them, or another writer (tasks.writer).",
            )
        for name, parameter in parameters.items():
            parameter.grad = self._sum(total[name]) / taught
        norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), training.max_grad_norm))
        loss = float(counts[1]) / taught
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingDivergedError(
                f"Pre-LIFT fine-tuning diverged at step {done + 1}: loss {loss}, gradient norm {norm}.",
                "Lower pre_sft.learning_rate or pre_sft.inner_learning_rate.",
            )
        rate = learning_rate(self._rates, done, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds, tokens = time.monotonic() - began, int(counts[2])
        self.record.progress.advance(0, loss * taught, taught, tokens, seconds)
        return self.record.log(
            steps=self.steps,
            epoch=0,
            loss=loss,
            rate=rate,
            norm=norm,
            tokens=tokens,
            seconds=seconds,
            left=(self.steps - done - 1) / (done + 1),
        )

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum") if self.accelerator.num_processes > 1 else tensor

    def fingerprint(self) -> str:
        """Two runs with the same one take the same steps."""
        parts = [
            self.mode,
            self.config.recipe(),
            self.config.pre_sft.model_dump(mode="json"),
            start_fingerprint(self.config.adapter),
            self._corpus,
            self._documents,
            self.config.training.micro_batch_tokens,
            self.accelerator.num_processes,
            str(self.model.dtype),
            self.model.fingerprint,
            self.model.window,
            torch.__version__,
        ]
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()
