"""The plain training loop: examples in, a trained adapter on the network out. Resumable, and for any number of devices.

accelerate exchanges gradients, so `accelerate launch` with DDP or FSDP runs this very loop. Stopped at any point, even
by `kill -9`, the same call continues from its last checkpoint and ends, on a CPU, with the same weights bit for bit:
the order of examples and the random numbers of a step depend only on seed and step. Knows nothing of documents.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from liftlm.adapters import AttachedAdapter, start_fingerprint, use_adapter
from liftlm.attention import fast_attention
from liftlm.checkpoints import Progress
from liftlm.config import LiftConfig, TrainingConfig
from liftlm.devices import StopRequest, join_processes, keep_freed_memory
from liftlm.errors import ConfigError, InterruptedWorkError, NotEnoughMemoryError, TrainingDivergedError
from liftlm.examples import NO_LOSS, Example, split_step
from liftlm.layers import fast_layers
from liftlm.memory import MEMORY_ADVICE, check_memory
from liftlm.models import Model
from liftlm.pauses import working_seconds
from liftlm.rows import DriftTexts, SoftTargets, row_tensors, soft_rows
from liftlm.schedule import Feed, Schedule, learning_rate
from liftlm.sharded import clip_gradients, whole
from liftlm.storage import canonical_json
from liftlm.training_report import OnStep as OnStep
from liftlm.training_report import RunRecord
from liftlm.training_report import StepMetrics as StepMetrics
from liftlm.training_report import TrainingReport as TrainingReport


def train(
    model: Model,
    name: str,
    examples: Sequence[Example],
    config: LiftConfig,
    *,
    feed: Feed | None = None,
    soft: SoftTargets | None = None,
    drift: DriftTexts | None = None,
    folder: Path | None = None,
    on_step: OnStep = lambda metrics: None,
) -> TrainingReport:
    """Trains the attached adapter `name` on `examples`. With a folder: checkpoints, metrics.jsonl and resuming.

    feed: more examples, which arrive while training runs (see `Schedule`); in one process only. soft: the rows that
    `Example.soft` counts in. drift: what `training.drift_weight` is measured on.
    on_step, and pauses, may raise InterruptedWorkError, as a signal would: the state is saved.
    Raises what the feed raises, InterruptedWorkError, NotEnoughMemoryError (predicted, or met), TrainingDivergedError.
    """
    if not examples and feed is None:
        raise ValueError("nothing to train on")
    with StopRequest() as stop, use_adapter(model, name, training=True), _training_mode(model, config.training):
        try:
            run = _Run(model, model.adapters[name], examples, config, folder, soft, drift)
            run.resume(feed)
            while True:
                with _interruptible(run, stop, feed):
                    chosen = run.schedule.next()
                if chosen is None:
                    return run.finish()
                try:
                    on_step(run.step(*chosen))
                except InterruptedWorkError:  # raised by on_step, or in a pause of the step
                    run.keep_what_is_done()
                    raise
                signal = run.record.agree(stop.signal)
                run.maybe_checkpoint(at_once=signal is not None)
                if signal is not None:
                    raise run.stopped(stop, signal)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY):
                raise NotEnoughMemoryError("The machine ran out of memory in training.", MEMORY_ADVICE) from error
            raise


@contextlib.contextmanager
def _interruptible(run: _Run, stop: StopRequest, feed: Feed | None) -> Iterator[None]:
    """Where a feed may wait for a silent writer, a signal does not have to wait with it."""
    if feed is None:
        yield
        return
    try:
        with stop.waiting():
            yield
    except KeyboardInterrupt:
        if stop.signal is None:
            raise
        run.keep_what_is_done()
        raise run.stopped(stop, stop.signal) from None


_ROUNDING = 2  # counted on when a step is divided or rounded otherwise: what an earlier version began is begun anew

# torch reports exhausted main memory (on Linux and elsewhere), and Apple's GPUs, through plain RuntimeErrors
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class _LossModule(torch.nn.Module):
    """The loss inside one module's forward pass, as DDP and FSDP need it."""

    def __init__(self, model: Model, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.network: torch.nn.Module = model.network
        self._model = model  # not a module: its tensors are the network's
        self._autocast = autocast
        self._no_split_modules = getattr(model.network, "_no_split_modules", None)  # FSDP shards these one by one

    def tie_weights(self) -> None:
        """accelerate loads shards name by name, which parts tied weights, and then asks for this."""
        tie = getattr(self.network, "tie_weights", None)
        if tie is not None:
            tie()

    def forward(self, tokens: Tensor, *rest: Any) -> Tensor:
        with torch.autocast(tokens.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            return self._model.loss_sum(tokens, *rest)


class _Run:
    """The state of one training run."""

    def __init__(
        self,
        model: Model,
        adapter: AttachedAdapter,
        examples: Sequence[Example],
        config: LiftConfig,
        folder: Path | None,
        soft: SoftTargets | None = None,
        drift: DriftTexts | None = None,
    ) -> None:
        self._soft, self._drift = soft, drift
        self.model, self.adapter, self.config = model, adapter, config
        self.settings = config.training
        self._given = examples
        seen = [*examples, *drift.examples] if drift is not None else examples
        check_memory(model, adapter.parameters(), seen, self.settings)
        self.accelerator = join_processes(model.device)
        self.device = self.accelerator.device if self._sharded else model.device
        # under tensor parallel all processes see all examples, each with a part of every layer
        alone = model.tensor_parallel
        self.shares: int = 1 if alone else self.accelerator.num_processes
        self.share: int = 0 if alone else self.accelerator.process_index
        # float16 gradients underflow without scaling; bfloat16 and float32 have the range
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=model.dtype == torch.float16)
        self._prepare()
        state = (self.parameters, self.optimizer, self.scaler)
        self.record = RunRecord(folder, self.settings.checkpoint_seconds, self.accelerator, self.device, *state)

    def _prepare(self) -> None:
        """The network as this process trains it, what of it may change (by the adapter's names), and the optimiser."""
        model = self.model
        if self._sharded:
            self._check_sharding()
            # measured on the whole network, by all processes or by none: one that has not done so would wait for the others
            model.has_plain_head()
            model.can_pack(1)
            # sharding a network cannot be undone; the adapter gets its weights back from the copy in the end
            model = dataclasses.replace(model, network=copy.deepcopy(model.network))
        low = model.dtype != torch.float32 and self.config.adapter.kind == "full"
        module = _LossModule(model, model.dtype if low else None)
        paths = {id(parameter): path for path, parameter in self.model.network.named_parameters()}
        held = dict(model.network.named_parameters())
        parameters = [held[paths[id(parameter)]] for parameter in self.adapter.parameters().values()]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self.settings.learning_rate,
            betas=(self.settings.beta1, self.settings.beta2),
            eps=self.settings.eps,
            weight_decay=self.settings.weight_decay,
            fused=self.device.type in ("cpu", "cuda") and not model.tensor_parallel,
            foreach=False
            if model.tensor_parallel
            else None,  # whole and divided parameters cannot be updated as one list
        )
        self.module: Any = module
        self.optimizer: torch.optim.Optimizer = optimizer
        if not model.tensor_parallel:
            self.module, prepared = self.accelerator.prepare(module, optimizer)
            self.optimizer = prepared.optimizer  # torch's own inside accelerate's
        self.optimizer.zero_grad(set_to_none=True)  # a run that failed may have left gradients
        # under FSDP the optimiser now holds shards, in the same order
        self.parameters: dict[str, Parameter] = dict(
            zip(self.adapter.parameters(), self.optimizer.param_groups[0]["params"], strict=True)
        )

    @property
    def _sharded(self) -> bool:
        return str(self.accelerator.distributed_type.value) == "FSDP"

    def _check_sharding(self) -> None:
        if not self.accelerator.is_fsdp2:
            raise ConfigError("Training cannot be sharded by version 1 of FSDP.", "Launch with --fsdp_version 2.")
        if self.scaler.is_enabled():
            raise ConfigError("Training in float16 cannot be sharded.", "Use --set model.dtype=bfloat16.")

    @property
    def progress(self) -> Progress:
        return self.record.progress

    @property
    def examples(self) -> list[Example]:
        return self.schedule.examples

    def step(self, epoch: int, chosen: list[int]) -> StepMetrics:
        started = working_seconds()
        done = self.progress.step
        # dropout: independent of where the run was resumed, and not the same on every process
        torch.manual_seed(random.Random(f"{self.config.seed}/{done}/{self.share}").getrandbits(63))
        rate = learning_rate(self.settings, done, self.schedule.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = [self.examples[index] for index in chosen]
        targets = max(1, sum(row.targets for row in rows))
        tokens = sum(len(row) for row in rows)
        texts = [] if self._drift is None else self._drift.of_step(done, tokens, self.config.seed)
        loss, drift = self._accumulate(rows, texts)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters.values(), self.settings.max_grad_norm)
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            lower = "training.learning_rate" + (" or training.drift_weight" if texts else "")
            raise TrainingDivergedError(
                f"Training diverged at step {done + 1}: loss {loss}, gradient norm {norm}.",
                f"Lower {lower}, or use model.dtype=float32.",
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = working_seconds() - started
        self.progress.advance(epoch, loss * targets, targets, tokens, seconds)
        return self.record.log(
            steps=max(self.schedule.steps, self.progress.step),
            epoch=epoch,
            loss=loss,
            rate=rate,
            norm=norm,
            drift=drift,
            tokens=tokens,
            seconds=seconds,
            left=(self.schedule.tokens - self.progress.tokens) / max(self.progress.tokens, 1),
        )

    def _accumulate(self, rows: Sequence[Example], texts: Sequence[Example]) -> tuple[float, float | None]:
        """Backward over this process's micro-batches; the step's mean loss over all processes, and its drift if measured."""
        targets = max(1, sum(row.targets for row in rows))
        micro_batches = [(part, self._soft, 1 / targets, 0) for part in self._mine(rows)]
        if self._drift is not None:
            weight = self.settings.drift_weight / sum(text.targets for text in texts)
            micro_batches += [(part, self._drift.soft, weight, 1) for part in self._mine(texts)]
        totals = torch.zeros(2, device=self.device)
        for index, (part, soft, weight, place) in enumerate(micro_batches):
            tensors = self._tensors(part, soft)
            last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                # gradients are averaged over processes, the loss is a mean over the targets of all of them
                loss = self.module(*tensors) * (self.shares * weight)
                self.scaler.scale(loss).backward()
            totals[place] += loss.detach() / self.shares
        told: Tensor = totals if self.model.tensor_parallel else self.accelerator.reduce(totals, "sum")
        if self._drift is None:
            return float(told[0]), None
        return float(told[0]), float(told[1]) / self.settings.drift_weight - self._drift.entropy(texts)

    def _mine(self, rows: Sequence[Example]) -> list[list[Example]]:
        """This process's micro-batches of these examples."""
        parts = split_step(range(len(rows)), rows, self.settings.micro_batch_tokens, self.shares, self.model.can_pack)
        return [[rows[index] for index in part] for part in parts[self.share :: self.shares]]

    def _tensors(self, rows: Sequence[Example], soft: SoftTargets | None) -> tuple[Tensor | None, ...]:
        """What `Model.loss_sum` takes. An empty micro-batch is two tokens without a label."""
        if not rows:
            return row_tensors(self.model, [Example(self.examples[0].tokens[:2], (NO_LOSS, NO_LOSS))])
        tensors = row_tensors(self.model, rows)
        if soft is None or all(row.soft is None for row in rows):
            return tensors
        shares = [tensor.to(self.device) for tensor in soft_rows(rows, soft)]
        return *tensors, *[None] * (4 - len(tensors)), *shares

    def finish(self) -> TrainingReport:
        if self._sharded:
            for name, parameter in self.adapter.parameters().items():
                parameter.data.copy_(whole(self.parameters[name].detach()))
        return self.record.report()

    # --- resuming -----------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Two runs with the same one take the same steps; a checkpoint of another run is not continued."""
        numbers = (self.settings.micro_batch_tokens, self.accelerator.num_processes)
        parts = [self.config.recipe(), *numbers, str(self.model.dtype), _ROUNDING]
        parts += ["tensor"] if self.model.tensor_parallel else []
        shapes = {name: list(parameter.shape) for name, parameter in self.parameters.items()}
        digest = hashlib.sha256(canonical_json([*parts, shapes, self.model.fingerprint, torch.__version__]).encode())
        if (start := start_fingerprint(self.config.adapter)) is not None:
            digest.update(start.encode())
        for example in self._given:
            digest.update(repr((tuple(example.tokens), tuple(example.labels))).encode())
        return digest.hexdigest()

    def resume(self, feed: Feed | None = None) -> None:
        """Takes up the last checkpoint of the same run, if there is one, and lays out the steps."""
        self.record.resume(self.fingerprint)
        self.schedule = Schedule(self._given, self.config, feed, self.progress.taken)
        for _ in range(0 if feed else self.progress.step):
            self.schedule.next()
        self._streams = feed is not None

    def maybe_checkpoint(self, at_once: bool) -> None:
        """Saves when it is time, always `at_once`; not at the end, where all is done."""
        due = self.record.is_due() and self.progress.step < self.schedule.steps
        if at_once or due:
            if self._streams:
                self.progress.taken = self.schedule.taken
            self.record.save()

    def keep_what_is_done(self) -> None:
        """Saves at once, without the step that was chosen and not done."""
        if self.progress.step:
            del self.schedule.taken[self.progress.step :]
            self.maybe_checkpoint(at_once=True)

    def stopped(self, stop: StopRequest, signal: int) -> InterruptedWorkError:
        """The error that says how far it got."""
        return stop.error(
            signal, f"Stopped after step {self.progress.step} of {self.schedule.steps}", self.record.folder
        )


@contextlib.contextmanager
def _training_mode(model: Model, settings: TrainingConfig) -> Iterator[None]:
    """Dropout, gradient checkpointing and what is fast on, and off again; the caller's random numbers are not touched."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), fast_attention(model.network), keep_freed_memory():
        try:
            model.network.train()
            if settings.gradient_checkpointing:
                model.recompute_activations(True)
            with fast_layers(model.network):
                yield
        finally:
            if settings.gradient_checkpointing:
                model.recompute_activations(False)
            model.network.eval()
