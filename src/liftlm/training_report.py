"""What training tells: a row for each step, and a report at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from liftlm.checkpoints import Progress
from liftlm.devices import peak_memory


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


def report_on(progress: Progress, processes: int, device: torch.device, resumed_from: int | None) -> TrainingReport:
    """Of a run that has ended."""
    return TrainingReport(
        steps=progress.step,
        tokens=progress.tokens,
        seconds=progress.seconds,
        epoch_losses=progress.epoch_means(),
        tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
        peak_memory_bytes=peak_memory(device),
        processes=processes,
        resumed_from=resumed_from,
    )


OnStep = Callable[[StepMetrics], None]
