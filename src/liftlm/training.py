"""The plain training loop: examples in, a trained adapter on the network out. Resumable, and the same for any number of devices.

accelerate places the network and exchanges gradients, so `accelerate launch` with DDP or FSDP runs this very loop. Stopped at
any point, even by `kill -9`, the same call continues from its last checkpoint and ends, on a CPU, with the same weights bit for
bit: the order of examples and the random numbers of a step depend only on the seed and the step. Knows nothing of documents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from liftlm.adapters import AttachedAdapter, use_adapter
from liftlm.checkpoints import Progress, latest_checkpoint, read_checkpoint, write_checkpoint
from liftlm.config import LiftConfig, TrainingConfig
from liftlm.devices import StopRequest, available_memory, current_memory, peak_memory
from liftlm.errors import NotEnoughMemoryError, TrainingDivergedError
from liftlm.examples import NO_LOSS, Example, plan_steps, split_step
from liftlm.models import Model
from liftlm.storage import canonical_json


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
    peak_memory_bytes: int  # of the process
    processes: int
    resumed_from: int | None  # step


OnStep = Callable[[StepMetrics], None]


def train(
    model: Model,
    name: str,
    examples: Sequence[Example],
    config: LiftConfig,
    *,
    folder: Path | None = None,
    on_step: OnStep = lambda metrics: None,
) -> TrainingReport:
    """Trains the attached adapter `name` on `examples`. With a folder: checkpoints and metrics.jsonl there, and resuming.

    Raises InterruptedWorkError (Ctrl-C; state saved), NotEnoughMemoryError (predicted, or met), TrainingDivergedError.
    """
    if not examples:
        raise ValueError("nothing to train on")
    with use_adapter(model, name, training=True), _training_mode(model, config.training), StopRequest() as stop:
        run = _Run(model, model.adapters[name], examples, config, folder)
        run.resume()
        try:
            while run.progress.step < run.total_steps:
                on_step(run.step())
                run.maybe_checkpoint()
                if run.any_process(stop.signal is not None) and run.progress.step < run.total_steps:
                    run.checkpoint()
                    raise stop.error(f"Stopped after step {run.progress.step} of {run.total_steps}" + run.kept())
            return run.finish()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
                raise NotEnoughMemoryError("The machine ran out of memory in training.", _MEMORY_ADVICE) from error
            raise


class _LossModule(torch.nn.Module):
    """The loss inside one module's forward pass, as DDP and FSDP need it."""

    def __init__(self, model: Model, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.network: torch.nn.Module = model.network
        self._model = model  # not a module: its tensors are the network's
        self._autocast = autocast

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            return self._model.loss_sum(tokens, labels)


class _Run:
    """The state of one training run."""

    def __init__(
        self, model: Model, adapter: AttachedAdapter, examples: Sequence[Example], config: LiftConfig, folder: Path | None
    ) -> None:
        self.model, self.adapter, self.examples, self.config, self.folder = model, adapter, examples, config, folder
        self.settings = config.training
        self.parameters = adapter.parameters()
        _check_memory(model, self.parameters, examples, self.settings)
        self.accelerator = Accelerator(cpu=model.device.type == "cpu")
        low = model.dtype != torch.float32
        full = config.adapter.kind == "full"
        optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=self.settings.learning_rate,
            betas=(self.settings.beta1, self.settings.beta2),
            eps=self.settings.eps,
            weight_decay=self.settings.weight_decay,
            fused=model.device.type in ("cpu", "cuda"),
        )
        self.module, self.optimizer = self.accelerator.prepare(_LossModule(model, model.dtype if low and full else None), optimizer)
        # float16 gradients underflow without scaling; bfloat16 and float32 have the range
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)
        self.epochs = [plan_steps(examples, self.settings.batch_tokens, epoch, config.seed) for epoch in range(self.settings.epochs)]
        self.plan = [(epoch, step) for epoch, steps in enumerate(self.epochs) for step in steps]
        self.total_steps = len(self.plan)
        self.progress = Progress()
        self.resumed_from: int | None = None
        self._saved_at = time.monotonic()

    # --- one step ---------------------------------------------------------------------------------------------------------

    def step(self) -> StepMetrics:
        started = time.monotonic()
        done = self.progress.step
        epoch, chosen = self.plan[done]
        torch.manual_seed((self.config.seed << 32) + done)  # dropout; independent of where the run was resumed
        rate = learning_rate(self.settings, done, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        targets = sum(self.examples[index].targets for index in chosen)
        loss = self._accumulate(chosen, targets)
        self.scaler.unscale_(_plain(self.optimizer))
        norm = float(self.accelerator.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm) or 0.0)
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise TrainingDivergedError(
                f"Training diverged at step {done + 1}: loss {loss}, gradient norm {norm}.",
                "Lower training.learning_rate, or use model.dtype=float32.",
            )
        self.scaler.step(_plain(self.optimizer))
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(self.examples[index]) for index in chosen)
        self.progress.advance(epoch, loss * targets, targets, tokens, time.monotonic() - started)
        metrics = self._metrics(epoch, loss, rate, norm, tokens, time.monotonic() - started)
        self._log(metrics)
        return metrics

    def _accumulate(self, chosen: list[int], targets: int) -> float:
        """Backward over this process's micro-batches; returns the step's mean loss over all processes."""
        processes = self.accelerator.num_processes
        micro_batches = split_step(chosen, self.examples, self.settings.micro_batch_tokens, processes)
        mine = micro_batches[self.accelerator.process_index :: processes]
        total = torch.zeros((), device=self.model.device)
        for index, micro_batch in enumerate(mine):
            tokens, labels = self._tensors(micro_batch)
            last = index == len(mine) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                # gradients are averaged over processes, the loss is a mean over the targets of all of them
                loss = self.module(tokens, labels) * (processes / targets)
                self.scaler.scale(loss).backward()
            total += loss.detach() / processes
        return float(self.accelerator.reduce(total, "sum"))

    def _tensors(self, micro_batch: list[int]) -> tuple[Tensor, Tensor]:
        """(batch, tokens) ids and labels, padded on the right; an empty micro-batch is two tokens without a label."""
        rows = [self.examples[index] for index in micro_batch] or [Example(self.examples[0].tokens[:2], (NO_LOSS, NO_LOSS))]
        longest = max(len(row) for row in rows)
        pad = self.model.tokenizer.pad_token_id
        tokens = [[*row.tokens, *[pad] * (longest - len(row))] for row in rows]
        labels = [[*row.labels, *[NO_LOSS] * (longest - len(row))] for row in rows]
        device = self.model.device
        return torch.tensor(tokens, device=device), torch.tensor(labels, device=device)

    # --- measuring --------------------------------------------------------------------------------------------------------

    def _metrics(self, epoch: int, loss: float, rate: float, norm: float, tokens: int, seconds: float) -> StepMetrics:
        done = self.progress.step
        left = sum(len(self.examples[index]) for _, step in self.plan[done:] for index in step)
        return StepMetrics(
            step=done,
            steps=self.total_steps,
            epoch=epoch + 1,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=tokens,
            tokens_per_second=tokens / max(seconds, 1e-9),
            memory_bytes=current_memory(self.model.device),
            seconds_left=left * self.progress.seconds / max(self.progress.tokens, 1),
        )

    def _log(self, metrics: StepMetrics) -> None:
        if self.folder is not None and self.accelerator.is_main_process:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(metrics)) + "\n")

    def finish(self) -> TrainingReport:
        self.accelerator.wait_for_everyone()
        progress = self.progress
        return TrainingReport(
            steps=progress.step,
            tokens=progress.tokens,
            seconds=progress.seconds,
            epoch_losses=progress.epoch_means(),
            tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
            peak_memory_bytes=peak_memory(),
            processes=self.accelerator.num_processes,
            resumed_from=self.resumed_from,
        )

    # --- resuming ---------------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Two runs with the same one take the same steps; a checkpoint of another run is not continued."""
        parts = [self.config.recipe(), self.settings.micro_batch_tokens, self.accelerator.num_processes, str(self.model.dtype)]
        digest = hashlib.sha256(canonical_json([*parts, self.model.fingerprint, torch.__version__]).encode())
        for example in self.examples:
            digest.update(repr((example.tokens, example.labels)).encode())
        return digest.hexdigest()

    def resume(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._fingerprint = self.fingerprint()
        found = latest_checkpoint(self.folder, self._fingerprint)
        if found is not None and not self._sharded:
            self.progress = read_checkpoint(found, self.parameters, _plain(self.optimizer), self.scaler)
            self.resumed_from = self.progress.step
        if self.accelerator.is_main_process:
            self._trim_metrics()

    def _trim_metrics(self) -> None:
        """Drops the rows of steps that will be taken again."""
        path = self.folder / "metrics.jsonl" if self.folder else None
        if path is not None and path.exists():
            rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(rows[: self.progress.step]), encoding="utf-8")

    @property
    def _sharded(self) -> bool:
        """Under FSDP no process holds all of the state, and checkpoints in mid-run are not written."""
        return self.accelerator.distributed_type == DistributedType.FSDP

    def maybe_checkpoint(self) -> None:
        due = time.monotonic() - self._saved_at >= self.settings.checkpoint_seconds
        if self.any_process(due) and self.progress.step < self.total_steps:
            self.checkpoint()

    def checkpoint(self) -> None:
        if self.folder is not None and not self._sharded and self.accelerator.is_main_process:
            write_checkpoint(
                self.folder, self._fingerprint, self.progress, self.parameters, _plain(self.optimizer), self.scaler
            )
        self.accelerator.wait_for_everyone()
        self._saved_at = time.monotonic()

    def kept(self) -> str:
        return "; progress is saved." if self.folder is not None and not self._sharded else "; nothing was to be saved."

    def any_process(self, mine: bool) -> bool:
        """Whether it is so on any process; all must agree, or they would wait for each other for ever."""
        if self.accelerator.num_processes == 1:
            return mine
        flag = torch.tensor(float(mine), device=self.model.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)


def learning_rate(settings: TrainingConfig, step: int, steps: int) -> float:
    """Of step 0, 1, … : linear warm-up over a fraction of the steps, then constant, or linear or cosine down to zero."""
    warmup = round(settings.warmup_fraction * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    part = (step - warmup) / max(1, steps - warmup)  # 0 … just below 1
    factor = {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}[settings.schedule]
    return settings.learning_rate * factor


_MEMORY_ADVICE = (
    "Lower training.micro_batch_tokens or segments.segment_tokens, or set training.gradient_checkpointing=true; "
    "a smaller adapter.rank helps a little."
)


def predict_memory(model: Model, parameters: dict[str, Any], examples: Sequence[Example], settings: TrainingConfig) -> int:
    """Bytes that training takes beyond the loaded model; an estimate from above, calibrated in docs/results/memory.md.

    Optimiser: gradient and two moments for each trainable number. Activations: what the linear layers take in and give out,
    kept for the backward pass, with a factor for norms, activations and attention between them.
    """
    trainable = sum(p.numel() for p in parameters.values())
    longest = max(len(example) for example in examples)
    tokens = max(longest, min(settings.micro_batch_tokens, settings.batch_tokens))
    shapes = [p.shape for name, p in model.network.named_parameters() if p.dim() == 2 and ".lora_" not in name]
    head = model.network.get_output_embeddings()
    vocabulary = head.weight.shape[0] if head is not None else 0
    through = sum(sum(shape) for shape in shapes if vocabulary not in shape)
    layers = int(getattr(model.network.config.get_text_config(), "num_hidden_layers", 1))
    hidden = int(getattr(model.network.config.get_text_config(), "hidden_size", 1024))
    width = model.dtype.itemsize
    kept = through * width * 1.6
    if settings.gradient_checkpointing:
        kept = layers * hidden * width + kept / layers
    return int(trainable * 12 + tokens * kept + 5 * (1 << 26))


def _check_memory(model: Model, parameters: dict[str, Any], examples: Sequence[Example], settings: TrainingConfig) -> None:
    needed, free = predict_memory(model, parameters, examples, settings), available_memory(model.device)
    if needed > free:
        raise NotEnoughMemoryError(
            f"Training needs about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free.", _MEMORY_ADVICE
        )


@contextlib.contextmanager
def _training_mode(model: Model, settings: TrainingConfig) -> Any:
    """Dropout and gradient checkpointing on, and off again."""
    model.network.train()
    if settings.gradient_checkpointing:
        model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if settings.gradient_checkpointing:
            model.network.gradient_checkpointing_disable()
        model.network.eval()


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """torch's own optimiser inside accelerate's."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
