"""The state of an unfinished training run on disk: weights, optimiser moments, and how far it got. safetensors and JSON only.

Each checkpoint is a sealed folder that appears whole; the one before is deleted only then.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from liftlm.storage import new_folder, seal_problems


@dataclass
class Progress:
    """How far a run got. sums: epoch → [loss summed over targets, targets]."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    sums: dict[str, list[float]] = field(default_factory=dict)

    def advance(self, epoch: int, loss_sum: float, targets: int, tokens: int, seconds: float) -> None:
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        sums = self.sums.setdefault(str(epoch), [0.0, 0.0])
        sums[0] += loss_sum
        sums[1] += targets

    def epoch_means(self) -> tuple[float, ...]:
        return tuple(loss / max(targets, 1) for _, (loss, targets) in sorted(self.sums.items(), key=lambda item: int(item[0])))


def write_checkpoint(
    folder: Path,
    fingerprint: str,
    progress: Progress,
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Adds `checkpoint-STEP` to the folder and removes older ones. Raises DiskFullError, NoWritePermissionError."""
    target = folder / f"checkpoint-{progress.step:07d}"
    moments: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{key}/{name}"] = value.detach().cpu().contiguous()
    state = {"fingerprint": fingerprint, "progress": dataclasses.asdict(progress), "scaler": scaler.state_dict()}
    with new_folder(target) as draft:
        save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, draft / "weights.safetensors")
        save_file(moments, draft / "moments.safetensors")
        (draft / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for old in folder.glob("checkpoint-*"):
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
            parameter.copy_(weights[name])
            keys = [key for key in moments if key.endswith(f"/{name}")]
            optimizer.state[parameter] = {
                # fused optimisers keep the step count beside the parameter, others on the CPU; both accept the former
                key.removesuffix(f"/{name}"): moments[key].to(parameter.device)
                for key in keys
            }
    state = _state(checkpoint)
    if scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return state
