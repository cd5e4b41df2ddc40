"""Loads a causal language model once and describes it: network, tokenizer, window, device, identity.

`Model` is the bare model; what adapters change is in `adapters/`, which switches them on the same network. Any causal
LM that transformers loads will do. Only safetensors weights are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from liftlm.collecting import collect_as_usual
from liftlm.config import LiftConfig, ModelConfig
from liftlm.devices import available_memory, pick_device, pick_dtype, set_threads, tensor_parallel_loading
from liftlm.embedded import ALIAS, embedded_model_folder, hub_reachable
from liftlm.errors import (
    ConfigError,
    HubUnreachableError,
    LiftError,
    ModelWeightsMissingError,
    NotEnoughMemoryError,
    UnknownModelError,
)
from liftlm.losses import next_token_loss, soft_target_loss, soft_target_loss_of_logits
from liftlm.probes import head_is_plain, keeps_apart, softcap
from liftlm.prompts import Tokenizer, encode_text, leading_tokens
from liftlm.quantization import quantized_loading
from liftlm.storage import write_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Notify = Callable[[str], None]
_ASSUMED_WINDOW = 2048  # tokens, where a model does not state its limit


@dataclass(eq=False)
class Model:
    """A loaded base model. One per process; adapters come and go on it (see `liftlm.adapters`)."""

    name: str
    folder: Path
    network: PreTrainedModel
    tokenizer: Tokenizer
    window: int  # tokens
    device: torch.device
    dtype: torch.dtype
    fingerprint: str  # tells base weights apart
    adapters: dict[str, Any] = field(default_factory=dict)  # what is attached, by name; kept by liftlm.adapters
    sites: Any = None  # where the network computes attention, once an adapter asked; kept by liftlm.adapters
    peft: Any = None  # PEFT's view of the network once it has held a LoRA; kept by liftlm.adapters
    decoder: Any = None  # weights laid out for single tokens, False where that cannot be; kept by liftlm.decoding
    drift: Any = None  # texts of the base model's own, once they were needed; kept by liftlm.drift
    tensor_parallel: bool = False  # whether every layer is divided over the processes of a launcher
    tuned: Any = None  # and its layers that can hold one
    _plain_head: bool | None = None
    _packs: bool | None = None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return encode_text(self.tokenizer, text)

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def resolve(self, config: LiftConfig) -> LiftConfig:
        """The config as this model will use it."""
        return config.resolved(self.window, reserved=len(leading_tokens(self.tokenizer)))

    def loss_sum(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        targets: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Tensor:
        """Sum of losses over labelled positions: -log p of the label, or cross-entropy with soft targets.

        tokens, labels: (batch, tokens), padded on the right with label -100.
        Right padding needs no attention mask in a causal model: no real token looks at what comes after it.
        positions (batch, tokens) and mask (batch, 1, tokens, tokens), added to the attention scores: of rows that hold
        several examples (see `examples.pack_row`). targets, shares: (labelled positions, k), instead of the labels.
        """
        wanted = labels[:, 1:]
        keep = wanted != -100
        hidden, head = self._states(tokens, keep, positions, mask)
        if head is None:
            if targets is None or shares is None:
                return torch.nn.functional.cross_entropy(hidden, wanted[keep], reduction="sum")
            return soft_target_loss_of_logits(hidden, targets, shares)
        cap = softcap(self.network)
        if targets is None or shares is None:
            return next_token_loss(hidden, wanted[keep], head.weight, head.bias, cap)
        return soft_target_loss(hidden, targets, shares, head.weight, head.bias, cap)

    @torch.inference_mode()
    def top_tokens(
        self,
        count: int,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        whole: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """(labelled positions, count) the likeliest tokens at labelled positions, and their probabilities, made to sum to 1.

        whole=False: their probabilities as they are.
        """
        logits, head = self._states(tokens, labels[:, 1:] != -100, positions, mask)
        if head is not None:
            logits = torch.nn.functional.linear(logits, head.weight, head.bias).float()
            cap = softcap(self.network)
            logits = logits if cap is None else torch.tanh(logits / cap) * cap
        values, ids = logits.topk(min(count, logits.shape[-1]), dim=-1)
        return ids, values.softmax(-1) if whole else (values - logits.logsumexp(-1, keepdim=True)).exp()

    def _states(
        self, tokens: Tensor, keep: Tensor, positions: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Any]:
        """(positions kept, hidden size) states before the head, and the head; or float32 logits, and None."""
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        if mask is not None:
            inputs |= {"position_ids": positions, "attention_mask": mask}
        if not self.has_plain_head():
            return self.network(**inputs).logits[:, :-1][keep].float(), None
        head: Any = self.network.get_output_embeddings()
        return self.network.base_model(**inputs)[0][:, :-1][keep].to(head.weight.dtype), head

    def has_plain_head(self) -> bool:
        """Whether logits are the head's products of the last states; measured once."""
        if self._plain_head is None:
            self._plain_head = head_is_plain(self.network)
        return self._plain_head

    def can_pack(self, longest: int) -> bool:
        """Whether examples of up to `longest` tokens may share a row: a mask for all layers overrides their windows."""
        config: Any = self.network.config.get_text_config()
        limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        if any(limit and longest > int(limit) for limit in limits):
            return False
        if self._packs is None:
            self._packs = keeps_apart(self.network)
        return self._packs

    def recompute_activations(self, on: bool) -> None:
        """Gradient checkpointing: activations are computed again in the backward pass instead of kept. Raises ConfigError."""
        if not self.network.supports_gradient_checkpointing:
            if on:
                advice = "Use --set training.gradient_checkpointing=false."
                raise ConfigError(f"{self.name} does not support gradient checkpointing.", advice)
            return
        with quiet_transformers():  # the names are deprecated where there are newer ones
            if on:
                self.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            else:
                self.network.gradient_checkpointing_disable()


def load_model(name: str | None = None, config: ModelConfig | None = None, notify: Notify = lambda text: None) -> Model:
    """Loads a base model: a local folder, else the built-in default, else an id on the hub.

    config: its `name` is used where `name` is not given; `notify` is told of slow first-time work.
    Raises UnknownModelError, ModelWeightsMissingError, HubUnreachableError, ChecksumError, NotEnoughMemoryError,
    DeviceError, ConfigError (a window larger than the model's own).
    """
    config = config or ModelConfig()
    name = _absolute(name or config.name)
    device = pick_device(config)
    dtype = pick_dtype(config, device)
    set_threads(config)
    folder = _find_folder(name, notify)
    _check_memory(name, folder, device, dtype)
    divided = tensor_parallel_loading(config, device)
    network, tokenizer = _load(name, folder, dtype, **quantized_loading(config, device), **divided)
    if config.quantization == "none" and not divided:
        network.to(device)  # type: ignore[arg-type]
    network.eval()
    network.requires_grad_(False)
    window = _window(network, config.window, name)
    identity = fingerprint_weights(folder)
    if config.quantization != "none":  # what is learnt on rounded weights is of those
        identity = hashlib.sha256(f"{identity} {config.quantization}".encode()).hexdigest()[:32]
    model = Model(name, folder, network, tokenizer, window, device, dtype, identity, tensor_parallel=bool(divided))
    if divided:
        model._plain_head = False  # each process has a part of the head: the network puts the logits together
    collect_as_usual()
    return model


def fingerprint_weights(folder: Path) -> str:
    """An identity of a model's weights, quick for any size: config, file sizes, 64 samples of 64 KiB of each file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for index in range(64):
                file.seek(size * index // 64)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' progress bars and advice are not for the user of this program."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.set_verbosity(before)


def _absolute(name: str) -> str:
    """The whole path where the name is one: the library keeps it and finds the model again from any folder."""
    try:
        path = Path(name).expanduser()
        return str(path.absolute()) if path.exists() else name
    except (OSError, RuntimeError, ValueError):  # too long for a path, no such user's home, a NUL in it
        return name


def _find_folder(name: str, notify: Notify) -> Path:
    folder = Path(name)
    if folder.is_absolute() and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UnknownModelError(
                f"The folder {folder} holds no model: it has no config.json.", "Give a transformers folder."
            )
        _check_weights(folder)
        return folder
    if name == ALIAS:
        return embedded_model_folder(notify)
    if folder.is_absolute() and folder.exists():
        raise UnknownModelError(
            f"'{name}' is a file, not a model.", "Give the folder of config.json, weights and tokenizer."
        )
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise UnknownModelError(
            f"There is no model '{name}': no such folder, and not of the form owner/name.",
            f"Give a model folder, an id on the hub, or the built-in {ALIAS}.",
        )
    return _hub_folder(name)


def _hub_folder(name: str) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        with write_errors(Path(constants.HF_HUB_CACHE)):
            folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=not hub_reachable()))
    except LiftError:
        raise
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UnknownModelError(
            f"The hub has no model '{name}' that you may read.", "Check the spelling, or log in with `hf auth login`."
        ) from error
    except Exception as error:  # the hub's client lets its HTTP library's own errors through
        raise HubUnreachableError(
            f"The model '{name}' is not on this machine and the hub cannot be reached.",
            f"Connect to the network, give a local folder, or use the built-in {ALIAS}.",
        ) from error
    _check_weights(folder)
    return folder


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers will load: one, or the parts that an index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    try:
        parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / part for part in sorted(parts)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelWeightsMissingError(f"{index} is damaged: {error}.", "Fetch or save the model again.") from error


def _check_weights(folder: Path) -> None:
    """Raises ModelWeightsMissingError unless all files of weights are there."""
    missing = [path.name for path in _weight_files(folder) if not path.is_file()]
    if missing == ["model.safetensors"]:
        pickled = bool([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        raise ModelWeightsMissingError(
            f"The model folder {folder} has no weights in safetensors"
            + (" (pickled weights are never read)." if pickled else "."),
            "Add model.safetensors, for example with transformers' save_pretrained.",
        )
    if missing:
        raise ModelWeightsMissingError(
            f"The model folder {folder} lacks {len(missing)} of its files of weights, {missing[0]} first.",
            "Fetch or copy the model again.",
        )


def _load(name: str, folder: Path, dtype: torch.dtype, **options: Any) -> tuple[PreTrainedModel, Tokenizer]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with quiet_transformers():
            # code that comes with a model is never run, and the user never asked whether it may
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            network, loading = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
            )
    except SafetensorError as error:
        raise ModelWeightsMissingError(
            f"The weights in {folder} are damaged: {_first_line(error)}.", "Fetch or save the model again."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a folder of unknown origin makes transformers raise anything
        raise UnknownModelError(
            f"'{name}' cannot be loaded as a causal language model with its tokenizer: {_first_line(error)}.",
            "Check that the folder holds config.json, tokenizer files and weights that belong together.",
        ) from error
    absent = sorted(loading["missing_keys"])
    if absent:  # transformers would make them up
        raise ModelWeightsMissingError(
            f"The weights in {folder} lack {len(absent)} tensors of the network, {absent[0]} first.",
            "Fetch or save the model again, as a causal language model.",
        )
    if tokenizer.pad_token_id is None:
        # only ever used for padding, which is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.convert_ids_to_tokens(0)
    return network, tokenizer


def _window(network: PreTrainedModel, wanted: int | None, name: str) -> int:
    config: Any = network.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if wanted is not None and limit is not None and wanted > limit:
        raise ConfigError(
            f"A window of {wanted} tokens is more than {name} can see ({limit}).", f"Use --window {limit} or less."
        )
    return int(wanted or limit or _ASSUMED_WINDOW)


def _check_memory(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Before loading: the weights themselves must fit, with a tenth to spare."""
    stored = sum(path.stat().st_size for path in _weight_files(folder))
    needed = int(stored * _dtype_ratio(folder, dtype) * 1.1)
    free = available_memory(device)
    if needed > free:
        raise NotEnoughMemoryError(
            f"Loading {name} needs about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free.",
            "Close other programs, use --set model.dtype=bfloat16, or a smaller --model.",
        )


def _dtype_ratio(folder: Path, dtype: torch.dtype) -> float:
    from safetensors import safe_open

    try:
        with safe_open(_weight_files(folder)[0], framework="pt") as weights:
            first = next(iter(weights.keys()), None)
            stored = weights.get_slice(first).get_dtype() if first else "F32"
    except Exception:
        return 1.0  # damaged files are reported when they are loaded
    width = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}.get(stored, 4)
    return dtype.itemsize / width


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


__all__ = ["Model", "fingerprint_weights", "load_model", "quiet_transformers"]
