"""Writing that is whole or not there: files and folders get their final name only when they are complete on disk.

A folder is written beside its target, every file flushed to disk, then renamed; the same for single files. A sealed
folder also holds the SHA-256 of its files. Running out of space or of permission becomes one clear error, and nothing
half-written stays. Knows nothing of what is in the files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from liftlm.errors import DiskFullError, LiftError, NoWritePermissionError

SEAL = "checksums.json"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP),
)
_MARK = ".writing-"  # .<final name>.writing-<process id> is a draft
_ASIDE = "old-"  # .<final name>.writing-old-<process id> is what a finished draft is about to replace


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's failures while writing `path` into DiskFullError or NoWritePermissionError."""
    try:
        yield
    except LiftError:
        raise
    except Exception as error:
        code = _system_code(error)
        if code in _NO_SPACE:
            raise DiskFullError(
                f"No space is left on the disk of {path.parent}.",
                "Nothing half-written was kept; free some space (`lift library list` shows what is stored) and repeat.",
            ) from error
        if code in _NO_PERMISSION:
            raise NoWritePermissionError(
                f"Cannot write to {path}: {os.strerror(code)}.",
                "Choose a place you may write to (LIFT_HOME moves the library, XDG_CACHE_HOME the built-in model).",
            ) from error
        raise


@contextlib.contextmanager
def new_folder(target: Path, *, sealed: bool = True) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well and vanishes when it does not.

    An existing `target` is replaced only then. With `sealed`, checksums of all files are written into it.
    """
    target = target.resolve()  # "." has no name
    draft = _draft(target)
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


@contextlib.contextmanager
def file_lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Within the block no other process holds this lock; a killed one holds none.

    on_wait is called once where another holds it, which is then waited for (Ctrl-C ends that), unless on_wait raises.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            on_wait()
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_file(path: Path, content: str | bytes) -> None:
    """Writes one file, whole or not at all."""
    draft = _draft(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_drafts(path)
        try:
            _write_synced(draft, content.encode() if isinstance(content, str) else content)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a line; what a killed process tore stays a line of its own. Raises DiskFullError, NoWritePermissionError."""
    with write_errors(path), path.open("a+b") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            file.write(b"\n")
        file.write(json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n")


def remove_drafts(target: Path) -> None:
    """Deletes what killed processes left while writing `target`; what a living process is writing stays.

    If one died between taking the old one away and putting the new one there, the old one comes back.
    """
    if not target.parent.is_dir():
        return
    import psutil

    prefix = f".{target.name}{_MARK}"
    with os.scandir(target.parent) as found:
        left = [Path(entry.path) for entry in found if entry.name.startswith(prefix)]
    for path in left:
        process = path.name.removeprefix(prefix).removeprefix(_ASIDE)
        if process.isdecimal() and int(process) != os.getpid() and psutil.pid_exists(int(process)):
            continue
        if path.name.startswith(prefix + _ASIDE) and not target.exists():
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` but the seal itself, by relative path."""
    return {
        str(path.relative_to(folder)): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / SEAL
    }


def seal_problems(folder: Path, only: str | None = None) -> list[str]:
    """What is wrong with a sealed folder, in words; with `only`, what is wrong with that one file."""
    try:
        expected = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        if not isinstance(expected, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        return [f"{SEAL} cannot be read ({error})"]
    try:
        if only is None:
            found = checksums(folder)
        else:
            expected = {only: expected.get(only)}
            found = {only: file_sha256(folder / only)} if (folder / only).is_file() else {}
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


def _system_code(error: Exception) -> int | None:
    """The operating system's error number; safetensors and shutil carry it in their text only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))
    return int(found[1] or found[2]) if found else None


def _draft(target: Path) -> Path:
    return target.with_name(f".{target.name}{_MARK}{os.getpid()}")


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
        draft.rename(target)
        return
    aside = target.with_name(f".{target.name}{_MARK}{_ASIDE}{os.getpid()}")
    target.rename(aside)
    try:
        draft.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
