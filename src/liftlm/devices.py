"""The machine: which device and number format, how many threads, how much memory, the seed, and polite stopping.

Everything is chosen by capability and can be set. What runs on GPUs is written to the libraries' documentation and has
not been run there by the authors; the CPU paths are tested.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import psutil
import torch

from liftlm.config import ModelConfig
from liftlm.errors import ConfigError, DeviceError, InterruptedWorkError, TerminatedWorkError

if TYPE_CHECKING:
    from accelerate import Accelerator

# oneDNN keeps what it compiled for the last 1024 shapes of products, and so does the layer above it in PyTorch (ideep).
# Rows of all lengths pass through training, so that is a GB; a step needs some dozens. Read when they are first used.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")


def pick_device(config: ModelConfig) -> torch.device:
    """cuda, then mps, then cpu; or the one asked for. Raises DeviceError where that one is not there."""
    if config.device == "auto":
        if _sharding():
            join_processes(torch.device("cpu"))
            return torch.device("cpu")  # a network that needs several GPUs waits in main memory; training spreads it
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):  # accelerate launch --cpu
            return torch.device("cpu")
        if torch.cuda.is_available():
            # under `accelerate launch` every process has its own
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise ConfigError(f"'{config.device}' is not a device.", "Use auto, cpu, cuda, cuda:N or mps.") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    missing = not there.get(device.type, False) or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    )
    if missing:
        raise DeviceError(
            f"This machine has no device '{config.device}' that PyTorch can use.", "Use --set model.device=auto."
        )
    return device


def pick_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """bfloat16 where the processor computes it in hardware, else float16 on GPUs and float32 on CPUs."""
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bf16() else torch.float32
    return torch.float32  # mps: bfloat16 support depends on the chip and the system; float32 always works


def join_processes(device: torch.device) -> Accelerator:
    """accelerate's view of the processes that run this program together: one, or as many as a launcher started."""
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState

    cpu = device.type == "cpu" and not _sharding()
    if _sharding():
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # would leave the other processes' networks empty
    state = PartialState(cpu=cpu)
    if state.num_processes == 1 and state.device.type != device.type:
        # accelerate keeps its first device for ever; here a second model is on another one
        AcceleratorState._reset_state(reset_partial_state=True)
    # networks are where they belong already, and the number format is this program's own setting
    return Accelerator(cpu=cpu, device_placement=False, mixed_precision="no")


def leave_processes() -> tuple[int, int]:
    """(rank, number) of this process among those that a launcher started, which from now on works alone.

    For work whose documents are shared out: together they would average the gradients of different documents. To be called
    when the model is loaded, as `LOCAL_RANK` decides its GPU.
    """
    rank, number = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if number > 1:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    return rank, number


def tensor_parallel_loading(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told for transformers' own tensor parallel plan; nothing without it. Raises ConfigError."""
    if config.parallel != "tensor":
        return {}
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or _sharding():
        raise ConfigError(
            "model.parallel=tensor divides layers over several processes, and this is one, or FSDP's.",
            "Start with `accelerate launch --multi_gpu --num_processes N -m liftlm absorb …`.",
        )
    if config.quantization != "none":
        raise ConfigError("Quantised weights are not divided over processes.", "Use one of the two.")
    from transformers.distributed import DistributedConfig

    join_processes(device)
    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def largest(accelerator: Accelerator, number: int | None, device: torch.device) -> int | None:
    """The largest number of any process, None for zero. What one does all must do, or they wait for each other."""
    if accelerator.num_processes > 1:
        number = int(accelerator.gather(torch.tensor([number or 0], device=device)).max())
    return number or None


def _sharding() -> bool:
    """Whether `accelerate launch --use_fsdp` started this process. On CPUs accelerate does DDP instead."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and torch.cuda.is_available()


def set_threads(config: ModelConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken, on the GPU or in main memory (a container's limit counts)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    limit = _container_headroom()
    return free if limit is None else min(free, limit)


def peak_memory(device: torch.device | None = None) -> int:
    """The most bytes this process has held at once, on the GPU (where `device` is one) or in main memory; since its start or
    since `reset_peak_memory`.

    Not getrusage where /proc is there: what it says of a new process begins with the peak of the one that started it.
    """
    if device is not None and device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device | None = None) -> None:
    """`peak_memory` counts from now on. Where the system cannot do that (only Linux can, in main memory) nothing happens."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def current_memory(device: torch.device) -> int:
    """Bytes held now, on the GPU or in main memory."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[None]:
    """While active, memory that PyTorch frees on a CPU stays with the process; the next tensors take it up. Given back after.

    By default glibc maps each large tensor anew and returns it when freed, and the kernel fills every page with zeros again:
    a fifth of the time of a training step. Elsewhere than on Linux with glibc nothing happens.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_M_ARENA_MAX, 1)  # other threads' arenas are too small for tensors
    library.mallopt(_M_MMAP_THRESHOLD, (1 << 31) - 1)
    library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc itself chooses
        library.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        library.malloc_trim(0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def _glibc() -> ctypes.CDLL | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        library = ctypes.CDLL(None)
        library.mallopt, library.malloc_trim  # noqa: B018  # raises AttributeError where they are not there
    except (OSError, AttributeError):
        return None
    return library


def describe_machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a result ran on: saved with every adapter."""
    packages = ("liftlm", "torch", "transformers", "peft", "accelerate", "tokenizers")
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


class StopRequest:
    """While active, Ctrl-C and SIGTERM ask the running work to stop at its next safe point instead of tearing it apart.

    A second Ctrl-C stops at once (a SIGTERM after one does not: launchers send both). Outside the main thread (a
    server's worker) signals are left alone.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._waits = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: installed by something that is not Python, and out of reach
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = number == self.signal == signal.SIGINT
        self.signal = self.signal or number
        if again or self._waits:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, where nothing can be torn, either signal raises KeyboardInterrupt at once; so does one that came before."""
        self._waits = True
        try:
            if self.signal is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._waits = False

    @staticmethod
    def error(number: int, what: str, saved_in: Path | None) -> InterruptedWorkError:
        """The error to raise at the safe point, for the signal of that number."""
        kind = TerminatedWorkError if number == signal.SIGTERM else InterruptedWorkError
        if saved_in is None:
            return kind(f"{what}; nothing was to be saved.", "The same call starts again.")
        return kind(f"{what}; progress is saved.", "The same command continues from there.")


def _cpu_has_bf16() -> bool:
    """Not where PyTorch was told to do without AVX-512 (ATEN_CPU_CAPABILITY=avx2), as the tests do."""
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2") and platform.machine() != "aarch64":
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, name, lambda: False)() for name in checks):
        return True
    return platform.machine() == "aarch64" and "bf16" in _cpu_info()


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _processor_name() -> str:
    for line in _cpu_info().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _container_headroom() -> int | None:
    """What a cgroup (v2) still allows, or None where there is no limit."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        return None if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
