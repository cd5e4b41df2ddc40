"""Writing that is whole or not there: files and folders appear under their final name only when they are complete on disk.

A folder is written beside its target, every file flushed to disk, then renamed; the same for single files. A sealed folder also
holds the SHA-256 of its files. Running out of space or of permission becomes one clear error, and nothing half-written stays.
Knows nothing of what is in the files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from liftlm.errors import DiskFullError, LiftError, NoWritePermissionError

SEAL = "checksums.json"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's failures while writing `path` into DiskFullError or NoWritePermissionError."""
    try:
        yield
    except LiftError:
        raise
    except Exception as error:
        # safetensors reports through an exception of its own, with the system's code only in the text
        code = error.errno if isinstance(error, OSError) else None
        text = str(error)
        if code in _NO_SPACE or any(f"os error {number})" in text for number in _NO_SPACE):
            raise DiskFullError(
                f"No space is left on the disk of {path.parent}.",
                "Nothing half-written was kept; free some space (`lift library list` shows what is stored) and repeat.",
            ) from error
        if code in _NO_PERMISSION or any(f"os error {number})" in text for number in _NO_PERMISSION):
            raise NoWritePermissionError(
                f"Cannot write to {path}: {os.strerror(code) if code else text}.",
                "Choose a folder you may write to (LIFT_HOME for the library).",
            ) from error
        raise


@contextlib.contextmanager
def new_folder(target: Path, *, sealed: bool = True) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well and vanishes when it does not.

    An existing `target` is replaced only then. With `sealed`, checksums of all files are written into it.
    """
    draft = target.with_name(f".{target.name}.writing-{os.getpid()}")
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_drafts(target)
        draft.mkdir()
        try:
            yield draft
            if sealed:
                _write_synced(draft / SEAL, json.dumps(checksums(draft), indent=1).encode())
            for path in [p for p in draft.rglob("*") if p.is_file()]:
                _sync(path)
            for path in [*(p for p in draft.rglob("*") if p.is_dir()), draft]:
                _sync(path)
            _replace_folder(draft, target)
            _sync(target.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes one file, whole or not at all."""
    draft = path.with_name(f".{path.name}.writing-{os.getpid()}")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_synced(draft, content.encode() if isinstance(content, str) else content)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def remove_drafts(target: Path) -> None:
    """Deletes what a killed process left while writing `target`. Call it only where no other process may be writing it."""
    for left in target.parent.glob(f".{target.name}.writing-*"):
        shutil.rmtree(left, ignore_errors=True)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` but the seal itself, by relative path."""
    return {
        str(path.relative_to(folder)): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL
    }


def seal_problems(folder: Path) -> list[str]:
    """What is wrong with a sealed folder, in words; empty when every file is as it was written."""
    try:
        expected = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        if not isinstance(expected, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        return [f"{SEAL} cannot be read ({error})"]
    try:
        found = checksums(folder)
    except OSError as error:
        return [f"files cannot be read ({error})"]
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} was changed" for name in expected if name in found and found[name] != expected[name]]
    problems += [f"{name} does not belong there" for name in found if name not in expected]
    return problems


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """One text for one value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_folder(draft: Path, target: Path) -> None:
    """rename() cannot replace a folder that has files, so an old one steps aside first."""
    if not target.exists():
        os.rename(draft, target)
        return
    aside = target.with_name(f".{target.name}.writing-old-{os.getpid()}")
    os.rename(target, aside)
    try:
        os.rename(draft, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
