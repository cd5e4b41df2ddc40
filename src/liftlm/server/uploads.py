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

CHARACTERS_A_TOKEN = 20  # a text with more of them than tokens are allowed is not even counted
_BYTES_A_CHARACTER = 12  # of JSON, at most: a pair of escapes
_NAME = "upload"


def read_upload(data: bytes, file_name: str, title: str | None, config: ServerConfig) -> Document:
    """Text and title of a file's content. Raises what `load_document` raises, TooLargeError and UnreadableDocumentError."""
    shown = clean_title(re.split(r"[/\\]", file_name)[-1]) or _NAME
    suffix = re.search(r"\.[A-Za-z0-9]{1,8}$", shown)
    with tempfile.TemporaryDirectory(prefix="liftlm-upload-") as folder:
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
    characters = config.document_tokens * CHARACTERS_A_TOKEN
    limits = (config.reading_megabytes, config.reading_seconds, config.document_pages, characters)
    command = [sys.executable, "-m", "liftlm.server.reading_worker", str(path), *map(str, limits)]
    # no keys and no proxies of ours; one thread, since every thread's stack counts as memory
    environment = {
        name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "PYTHONPATH", "VIRTUAL_ENV")
    }
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HOME": str(path.parent)}
    said = _output(command, environment, path.parent, config.reading_seconds, characters * _BYTES_A_CHARACTER + 2**16)
    try:
        result = json.loads(said)
    except ValueError:
        result = {"error": "MemoryError"}
    if not isinstance(result, dict) or result.get("error") in ("MemoryError", "TimeoutError"):
        raise errors.UnreadableDocumentError(
            f"Reading the file took more than {config.reading_seconds} seconds or {config.reading_megabytes} MB of memory, or "
            "broke the reader.",
            "Convert it to plain text, or upload it in parts.",
        )
    return result


def _output(command: list[str], environment: dict[str, str], folder: Path, seconds: int, most: int) -> bytes:
    """What the worker says, if it ends in time and does not say too much; else nothing."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env=environment
    ) as worker:  # fmt: skip
        clock = threading.Timer(seconds, worker.kill)
        clock.start()
        try:
            assert worker.stdout is not None
            said = worker.stdout.read(most + 1)
            if len(said) > most:
                worker.kill()
        finally:
            clock.cancel()
    return said if worker.returncode == 0 else b""


def _named(result: dict[str, Any], name: str, shown: str) -> errors.LiftError:
    """The worker's failure, about the file as the client calls it."""
    kind = getattr(errors, str(result["error"]), errors.UnreadableDocumentError)
    error: errors.LiftError = kind(str(result["message"]).replace(name, shown), str(result["next_step"]))
    return error
