"""What a training run tells and keeps: a row for each step, checkpoints to continue from, and a report at the end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import Parameter

from liftlm.checkpoints import (
    Progress,
    append_row,
    keep_rows,
    latest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from liftlm.devices import current_memory, largest, peak_memory
from liftlm.storage import write_errors

if TYPE_CHECKING:
    from accelerate import Accelerator

_METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    """One optimiser step, as written to metrics.jsonl. loss: mean over the step's targets (nats a token)."""

    step: int
    steps: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float  # before clipping
    tokens: int  # in this step
    tokens_per_second: float
    memory_bytes: int
    seconds_left: float
    drift: float | None = None  # KL divergence from the base model where it is measured (nats a token), before the step


@dataclass(frozen=True)
class TrainingReport:
    """What a training run did. seconds and tokens include those of earlier, interrupted parts."""

    steps: int
    tokens: int
    seconds: float
    epoch_losses: tuple[float, ...]  # mean next-token loss of each epoch (nats a token)
    tokens_per_second: float
    peak_memory_bytes: int  # of the process, on the device that trained
    processes: int
    resumed_from: int | None  # step

    @property
    def losses(self) -> str:
        """The mean loss of the first and of the last epoch, or of the only one, for people."""
        shown = self.epoch_losses[:1] + self.epoch_losses[1:][-1:]
        return " → ".join(f"{loss:.2f}" for loss in shown)


OnStep = Callable[[StepMetrics], None]


class RunRecord:
    """How far a run got, and, where it has a folder, what the same call continues from. All processes of a run have one."""

    def __init__(
        self,
        folder: Path | None,
        checkpoint_seconds: float,
        accelerator: Accelerator,
        device: torch.device,
        parameters: Mapping[str, Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.folder = folder
        self.progress = Progress()
        self.resumed_from: int | None = None
        self._accelerator, self._device = accelerator, device
        self._parameters, self._optimizer, self._scaler = parameters, optimizer, scaler
        self._every, self._saved_at = checkpoint_seconds, time.monotonic()
        self._fingerprint = ""

    def resume(self, fingerprint: Callable[[], str]) -> None:
        """Takes up the last checkpoint of the run with this fingerprint, if there is one."""
        if self.folder is None:
            return
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._fingerprint = fingerprint()
        found = latest_checkpoint(self.folder, self._fingerprint)
        if found is not None:
            self.progress = read_checkpoint(found, self._parameters, self._optimizer, self._scaler)
            self.resumed_from = self.progress.step
        if self._accelerator.is_main_process:
            keep_rows(self.folder / _METRICS, self.progress.step)  # the steps after it will be taken again

    def log(
        self,
        *,
        steps: int,
        epoch: int,
        loss: float,
        rate: float,
        norm: float,
        tokens: int,
        seconds: float,
        left: float,
        drift: float | None = None,
    ) -> StepMetrics:
        """A row about the step that was just counted. epoch: from 0; left: work to be done / work done."""
        metrics = StepMetrics(
            step=self.progress.step,
            steps=steps,
            epoch=epoch + 1,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=tokens,
            tokens_per_second=tokens / max(seconds, 1e-9),
            memory_bytes=current_memory(self._device),
            seconds_left=left * self.progress.seconds,
            drift=drift,
        )
        if self.folder is not None and self._accelerator.is_main_process:
            row = {name: value for name, value in dataclasses.asdict(metrics).items() if value is not None}
            append_row(self.folder / _METRICS, row)
        return metrics

    def agree(self, number: int | None) -> int | None:
        """What one process does all must do."""
        return largest(self._accelerator, number, self._device)

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint, on any process."""
        return self.agree(int(time.monotonic() - self._saved_at >= self._every)) is not None

    def save(self) -> None:
        """A checkpoint, by all processes together; nothing without a folder."""
        if self.folder is None:
            return
        state = (self.progress, self._parameters, self._optimizer, self._scaler)
        write_checkpoint(self.folder, self._fingerprint, *state, main=self._accelerator.is_main_process)
        self._accelerator.wait_for_everyone()
        self._saved_at = time.monotonic()

    def report(self) -> TrainingReport:
        """Of a run that has ended, once all processes have."""
        self._accelerator.wait_for_everyone()
        return TrainingReport(
            steps=self.progress.step,
            tokens=self.progress.tokens,
            seconds=self.progress.seconds,
            epoch_losses=self.progress.epoch_means(),
            tokens_per_second=self.progress.tokens / max(self.progress.seconds, 1e-9),
            peak_memory_bytes=peak_memory(self._device),
            processes=self._accelerator.num_processes,
            resumed_from=self.resumed_from,
        )
