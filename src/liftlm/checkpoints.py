"""An unfinished training run on disk: weights, optimiser moments, how far it got, and a row of numbers for each step.

safetensors and JSON only. Each checkpoint is a sealed folder that appears whole; the one before is deleted only then.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import Parameter

from liftlm.sharded import placed_like, whole
from liftlm.storage import new_folder, seal_problems, write_errors, write_file


@dataclass
class Progress:
    """How far a run got. sums: epoch → [loss summed over targets, targets]; taken: its steps, where they were not planned."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    sums: dict[str, list[float]] = field(default_factory=dict)
    taken: list[tuple[int, list[int]]] = field(default_factory=list)

    def advance(self, epoch: int, loss_sum: float, targets: int, tokens: int, seconds: float) -> None:
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        sums = self.sums.setdefault(str(epoch), [0.0, 0.0])
        sums[0] += loss_sum
        sums[1] += targets

    def epoch_means(self) -> tuple[float, ...]:
        return tuple(
            loss / max(targets, 1) for _, (loss, targets) in sorted(self.sums.items(), key=lambda item: int(item[0]))
        )


def write_checkpoint(
    folder: Path,
    fingerprint: str,
    progress: Progress,
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    main: bool = True,
) -> None:
    """Adds `checkpoint-STEP` to the folder and removes older ones. Raises DiskFullError, NoWritePermissionError.

    Every process of a run calls it, since sharded tensors are put together by all of them; the main one writes.
    """
    target = folder / f"checkpoint-{progress.step:07d}"
    weights = {name: whole(parameter.detach()).cpu().contiguous() for name, parameter in parameters.items()}
    moments = {
        f"{key}/{name}": whole(value.detach()).cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    if not main:
        return
    state = {"fingerprint": fingerprint, "progress": dataclasses.asdict(progress), "scaler": scaler.state_dict()}
    with new_folder(target) as draft:
        save_file(weights, draft / "weights.safetensors")
        save_file(moments, draft / "moments.safetensors")
        (draft / "state.json").write_text(json.dumps(state), encoding="utf-8")
    # also what killed processes left of checkpoints that were being written
    for old in [*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*")]:
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(folder: Path, fingerprint: str) -> Path | None:
    """The newest whole checkpoint of the run with this fingerprint."""
    for candidate in sorted(folder.glob("checkpoint-*"), reverse=True):
        if not seal_problems(candidate) and _state(candidate)["fingerprint"] == fingerprint:
            return candidate
    return None


def read_checkpoint(
    checkpoint: Path,
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Puts weights and optimiser back as they were, and tells how far the run had got."""
    weights = load_file(checkpoint / "weights.safetensors")
    moments = load_file(checkpoint / "moments.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(placed_like(parameter, weights[name]))
            for key in ("step", "exp_avg", "exp_avg_sq"):
                stored = moments.get(f"{key}/{name}")  # none before the first step that did not overflow (float16)
                if stored is not None:
                    # fused optimisers keep the step count beside the parameter, others on the CPU; both accept that
                    placed = stored.to(parameter.device) if key == "step" else placed_like(parameter, stored)
                    optimizer.state[parameter][key] = placed
    state = _state(checkpoint)
    if scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Adds one line of JSON; what is not a finite number becomes null. Raises DiskFullError, NoWritePermissionError."""
    finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
    with write_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def keep_rows(path: Path, count: int) -> None:
    """Drops all lines after the first `count`, also one that was being written when the process was killed."""
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    if len(rows) > count:
        write_file(path, "".join(rows[:count]))


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return state
