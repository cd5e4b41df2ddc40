"""A library on any file system that fsspec knows (a folder, s3://, gs://, …), for workers that share nothing else.

    URL/library/<id>/       whole entries, as in LIFT_HOME (a local URL can be LIFT_HOME)
    URL/unfinished/<id>/    the last checkpoint of work that was interrupted
    URL/documents/<key>     which documents of which folder are done, one small file each
    URL/failures/<key>      which could not be done, and why

Object stores have no renaming: a folder counts as whole once its seal (checksums.json) is there, which is written last.
Knows nothing of models.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from liftlm.errors import ConfigError, LiftError, StoreError
from liftlm.storage import SEAL, new_folder, seal_problems, write_file

_DONE, _FAILED = "documents", "failures"


class Home:
    """url: as fsspec takes it. Raises ConfigError for one that it cannot open, StoreError for a bucket that is not there."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._files, self._root = open_url(url)
        self._root = self._root.rstrip("/")
        self.folder = Path(self._root) if _is_local(self._files) else None  # where it is a folder of this machine
        bucket = self._root.partition("/")[0]  # paths in object stores have no slash before it
        if self.folder is None and bucket:
            try:
                self._files.info(bucket)
            except FileNotFoundError as error:  # makedirs would make it
                raise StoreError(
                    f"There is no bucket '{bucket}' for '{url}'.", "Make it, or correct the address."
                ) from error

    # --- entries ------------------------------------------------------------------------------------------------------

    def has_entry(self, entry_id: str) -> bool:
        return bool(self._files.exists(self._at("library", entry_id, SEAL)))

    def store_entry(self, entry: Path) -> None:
        """Copies a whole entry there. Two workers that made the same one write the same."""
        if self.folder is not None:
            with new_folder(self.folder / "library" / entry.name, sealed=False) as draft:
                shutil.copytree(entry, draft, dirs_exist_ok=True)
            return
        self._put_sealed(entry, self._at("library", entry.name))

    def fetch_entry(self, entry_id: str, home: Path) -> bool:
        """Copies an entry into a local home; False where there is none, or none that is whole."""
        if not self.has_entry(entry_id):
            return False
        with new_folder(home / "library" / entry_id, sealed=False) as draft:
            self._get(self._at("library", entry_id), draft)
            whole = not seal_problems(draft)
        if not whole:
            shutil.rmtree(home / "library" / entry_id, ignore_errors=True)
        return whole

    def entry_ids(self) -> list[str]:
        """All that are there."""
        return sorted(name for name in self._names("library") if not name.startswith("."))

    # --- unfinished work ----------------------------------------------------------------------------------------------

    def save_unfinished(self, work: Path) -> None:
        """Keeps the newest checkpoint of a folder of unfinished work, and the files beside it; then drops older ones."""
        target = self._at("unfinished", work.name)
        newest = max(work.glob("checkpoint-*"), default=None)
        self._files.makedirs(target, exist_ok=True)
        for path in work.iterdir():
            if path.is_file() and not path.name.startswith("."):
                self._files.put_file(str(path), f"{target}/{path.name}")
        if newest is None:
            return
        self._put_sealed(newest, f"{target}/{newest.name}")
        for name in self._names("unfinished", work.name):
            if name.startswith("checkpoint-") and name != newest.name:
                self._files.rm(f"{target}/{name}", recursive=True)

    def fetch_unfinished(self, entry_id: str, home: Path) -> bool:
        """Brings unfinished work into a local home. What was torn in writing is seen by its seal, and not continued."""
        target = home / "unfinished" / entry_id
        if not self._names("unfinished", entry_id) or target.exists():
            return False
        target.mkdir(parents=True)
        self._get(self._at("unfinished", entry_id), target)
        return True

    def drop_unfinished(self, entry_id: str) -> None:
        path = self._at("unfinished", entry_id)
        if self._files.exists(path):
            self._files.rm(path, recursive=True)

    # --- documents ----------------------------------------------------------------------------------------------------

    def done(self) -> set[bytes]:
        """The keys of documents that are done, 16 bytes each: a million are a hundred megabytes."""
        return {bytes.fromhex(name) for name in self._names(_DONE) if len(name) == 32}

    def write_done(self, key: str, row: Mapping[str, Any]) -> None:
        self._write(self._at(_DONE, key), row)
        failure = self._at(_FAILED, key)
        if self._files.exists(failure):
            self._files.rm(failure)

    def write_failure(self, key: str, row: Mapping[str, Any]) -> None:
        self._write(self._at(_FAILED, key), row)

    def failures(self) -> list[dict[str, Any]]:
        return [json.loads(self._files.cat_file(self._at(_FAILED, name))) for name in sorted(self._names(_FAILED))]

    # --- inside -------------------------------------------------------------------------------------------------------

    def _at(self, *parts: str) -> str:
        return "/".join((self._root, *parts))

    def _names(self, *parts: str) -> list[str]:
        path = self._at(*parts)
        self._files.invalidate_cache()  # other workers write there
        try:
            found = self._files.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return [name.rstrip("/").rpartition("/")[2] for name in found]

    def _write(self, path: str, row: Mapping[str, Any]) -> None:
        content = json.dumps(row, ensure_ascii=False)
        if self.folder is not None:
            write_file(Path(path), content)
            return
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._files.pipe_file(path, content.encode())

    def _put_sealed(self, folder: Path, target: str) -> None:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / SEAL]
        for path in [*files, folder / SEAL]:
            place = f"{target}/{path.relative_to(folder).as_posix()}"
            self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(path), place)

    def _get(self, source: str, target: Path) -> None:
        for found in self._files.find(source):
            place = target / found.removeprefix(source).lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(found, str(place))


class _Remote:
    """fsspec's file system elsewhere. Each of its packages has exceptions of its own; here all but those for files that are
    not there are StoreError."""

    def __init__(self, files: Any, url: str) -> None:
        self._files, self._url = files, url

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._files, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            with self._failures():
                result = found(*arguments, **named)
            return self._each(result) if isinstance(result, Iterator) else result

        return call

    def _each(self, results: Iterator[Any]) -> Iterator[Any]:
        with self._failures():
            yield from results

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (LiftError, FileNotFoundError):
            raise
        except Exception as error:
            raise StoreError(
                f"'{self._url}' cannot be used: {_first_line(error)}.",
                "Check the address, the credentials and the network; the same command continues.",
            ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def open_url(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it; beyond this machine its calls raise StoreError.

    Raises ConfigError for a URL of no kind that is installed.
    """
    import fsspec

    try:
        files, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        raise ConfigError(
            f"'{url}' cannot be opened: {_first_line(error)}.",
            "Give a folder, or install fsspec's package for such addresses (s3fs for s3://, gcsfs for gs://).",
        ) from error
    return files if _is_local(files) else _Remote(files, url), str(path)


def _is_local(files: Any) -> bool:
    return "file" in (files.protocol if isinstance(files.protocol, tuple | list) else (files.protocol,))
