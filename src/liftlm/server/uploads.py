"""An uploaded file → Document, by a bounded worker process (`reading_worker`).

A client's file name is only ever a title and a hint at the format: the file is kept under our own name, in our own folder.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from liftlm import errors
from liftlm.documents import MAX_TITLE_CHARACTERS, Document
from liftlm.server_config import ServerConfig
from liftlm.storage import write_errors

_AT_ONCE = threading.BoundedSemaphore(2)  # worker processes
_NAME = "upload"


def read_upload(data: bytes, file_name: str, title: str | None, config: ServerConfig) -> Document:
    """Text and title of a file's content. Raises what `load_document` raises, TooLargeError and UnreadableDocumentError."""
    shown = clean_title(re.split(r"[/\\]", file_name)[-1]) or _NAME
    suffix = re.search(r"\.[A-Za-z0-9]{1,8}$", shown)
    with tempfile.TemporaryDirectory(prefix="liftlm-upload-") as folder, _AT_ONCE:
        path = Path(folder) / f"{_NAME}{suffix[0].lower() if suffix else ''}"
        with write_errors(path):
            path.write_bytes(data)
        result = _run(path, config)
    if "error" in result:
        raise _named(result, path.name, shown)
    given = clean_title(title or "")
    found = str(result["title"])
    if not given and found == _NAME:
        given = clean_title(re.sub(r"[-_]+", " ", shown.removesuffix(suffix[0] if suffix else "")))
    return Document(given or found, str(result["text"]), shown)


def clean_title(text: str) -> str:
    """One line that a page or a prompt can show."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line[:MAX_TITLE_CHARACTERS]


def _run(path: Path, config: ServerConfig) -> dict[str, Any]:
    limits = (config.reading_megabytes, config.reading_seconds, config.document_pages)
    command = [sys.executable, "-m", "liftlm.server.reading_worker", str(path), *map(str, limits)]
    # no keys and no proxies of ours; one thread, since every thread's stack counts as memory
    environment = {
        name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "PYTHONPATH", "VIRTUAL_ENV")
    }
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HOME": str(path.parent)}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=config.reading_seconds, cwd=path.parent,
            env=environment, check=False,
        )  # fmt: skip
        result = json.loads(done.stdout) if done.returncode == 0 else {"error": "MemoryError"}
    except (subprocess.TimeoutExpired, ValueError):
        result = {"error": "TimeoutError"}
    if not isinstance(result, dict) or result.get("error") in ("MemoryError", "TimeoutError"):
        raise errors.UnreadableDocumentError(
            f"Reading the file took more than {config.reading_seconds} seconds or {config.reading_megabytes} MB of memory, or "
            "broke the reader.",
            "Convert it to plain text, or upload it in parts.",
        )
    return result


def _named(result: dict[str, Any], name: str, shown: str) -> errors.LiftError:
    """The worker's failure, about the file as the client calls it."""
    kind = getattr(errors, str(result["error"]), errors.UnreadableDocumentError)
    error: errors.LiftError = kind(str(result["message"]).replace(name, shown), str(result["next_step"]))
    return error
