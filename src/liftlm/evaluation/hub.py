"""Where a benchmark's file is: in what the user gave with --data, else in the hub's dataset. Knows nothing of its rows."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs

from liftlm.embedded import hub_reachable
from liftlm.errors import BenchmarkDataError, LiftError
from liftlm.storage import write_errors, write_file


@dataclass(frozen=True)
class DataSource:
    """A file as upstream publishes it. hub_id "": it is not on the hub, and `where` says where it is."""

    names: tuple[str, ...]  # of the file, the usual one first
    folders: tuple[str, ...] = ()  # that upstream keeps it in
    hub_id: str = ""
    patterns: tuple[str, ...] = ()  # what to fetch of the hub's dataset
    where: str = ""

    @property
    def hint(self) -> str:
        """The next step for whoever has no file."""
        return f"Give it with --data: {self.names[0]} of {self.where or self.hub_id}, or the folder that holds it."


def find_data_file(data: Path | None, source: DataSource) -> Path:
    """The file itself, one of the source's names in the folder `data`, or (None) the hub's. Raises BenchmarkDataError."""
    if data is None:
        return _hub_file(source)
    if data.is_file():
        return data
    if not data.is_dir():
        raise BenchmarkDataError(f"There is no file or folder {data}.", source.hint)
    for folder in ("", *source.folders):
        for name in source.names:
            if (data / folder / name).is_file():
                return data / folder / name
    raise BenchmarkDataError(f"The folder {data} holds no {' or '.join(source.names)}.", source.hint)


def _hub_file(source: DataSource) -> Path:
    if not source.hub_id:
        raise BenchmarkDataError(f"{source.names[0]} is not on the hub.", source.hint)
    folder = _hub_folder(source)
    found = sorted(path for path in folder.rglob("*") if path.name in source.names)
    if found:
        return found[0]
    for archive in sorted(folder.rglob("*.zip")):
        for path in _unpacked(archive, source, folder.name):
            return path
    raise BenchmarkDataError(f"The dataset {source.hub_id} holds no {' or '.join(source.names)}.", source.hint)


def _hub_folder(source: DataSource) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        with write_errors(Path(constants.HF_HUB_CACHE)):
            return Path(
                snapshot_download(
                    source.hub_id,
                    repo_type="dataset",
                    allow_patterns=list(source.patterns),
                    local_files_only=not hub_reachable(),
                )
            )
    except LiftError:
        raise
    except Exception as error:  # the hub's client lets its HTTP library's own errors through
        raise BenchmarkDataError(
            f"The dataset {source.hub_id} is not on this machine and the hub did not deliver it"
            f" ({type(error).__name__}).",
            source.hint,
        ) from error


def _unpacked(archive: Path, source: DataSource, revision: str) -> Iterator[Path]:
    """The wanted member of an archive, written once to the user's cache."""
    cache = platformdirs.user_cache_path("liftlm") / "datasets" / source.hub_id.replace("/", "--") / revision
    try:
        with zipfile.ZipFile(archive) as members:
            for member in members.namelist():
                name = PurePosixPath(member).name
                if name in source.names:
                    if not (cache / name).is_file():
                        write_file(cache / name, members.read(member))
                    yield cache / name
    except (zipfile.BadZipFile, EOFError) as error:
        raise BenchmarkDataError(f"The archive {archive} is damaged: {error}.", source.hint) from error
