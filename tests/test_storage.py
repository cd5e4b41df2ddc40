"""Files and folders are whole or not there, checksums see every change, and a full or closed disk is said in words."""

from __future__ import annotations

import _thread
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from liftlm.errors import DiskFullError, LibraryBusyError, NoWritePermissionError
from liftlm.storage import (
    SEAL,
    canonical_json,
    file_lock,
    new_folder,
    remove_drafts,
    seal_problems,
    write_errors,
    write_file,
)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def dead_process() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    with new_folder(tmp_path / "entry") as draft:
        (draft / "a.txt").write_text("the bell of Corriden")
        (draft / "below").mkdir()
        (draft / "below" / "b.bin").write_bytes(bytes(range(256)))
    return tmp_path / "entry"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


# --- whole or not there -----------------------------------------------------------------------------------------------


def test_a_folder_appears_only_when_its_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "entry"
    with new_folder(target) as draft:
        (draft / "a").write_text("1")
        assert not target.exists() and draft.parent == target.parent
    assert names(target.parent) == ["entry", "entry/a", f"entry/{SEAL}"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "entry") as draft:
        (draft / "half").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_an_old_folder_is_replaced_only_by_a_complete_one(sealed: Path) -> None:
    before = names(sealed)
    with pytest.raises(ValueError), new_folder(sealed) as draft:
        (draft / "other").write_text("2")
        raise ValueError
    assert names(sealed) == before and not seal_problems(sealed)
    with new_folder(sealed) as draft:
        (draft / "other").write_text("2")
    assert names(sealed.parent) == ["entry", f"entry/{SEAL}", "entry/other"]


def test_the_old_folder_is_still_there_when_the_new_one_cannot_be_put_in_place(
    sealed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == sealed and "-old-" not in self.name:
            raise OSError(errno.EACCES, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(NoWritePermissionError), new_folder(sealed) as draft:
        (draft / "other").write_text("2")
    assert names(sealed.parent) == ["entry", "entry/a.txt", "entry/below", "entry/below/b.bin", f"entry/{SEAL}"]


def test_a_process_killed_while_writing_leaves_only_a_draft_that_the_next_one_removes(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom liftlm.storage import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as draft:\n"
        "    (draft / 'half').write_text('1')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "ent[r]y"  # brackets mean something to glob
    assert subprocess.run([sys.executable, "-c", code, str(target)], check=False).returncode == -9
    assert not target.exists() and len(names(tmp_path)) == 2
    with new_folder(target, sealed=False) as draft:
        (draft / "whole").write_text("2")
    assert names(tmp_path) == ["ent[r]y", "ent[r]y/whole"]


def test_drafts_of_living_processes_and_of_other_targets_stay(tmp_path: Path) -> None:
    living, dead = os.getppid(), dead_process()
    for name in (f".entry.writing-{living}", f".entry.writing-{dead}", f".entry2.writing-{dead}"):
        (tmp_path / name).mkdir()
    (tmp_path / f".entry.writing-{dead}" / "half").write_text("1")
    remove_drafts(tmp_path / "entry")
    assert names(tmp_path) == sorted([f".entry.writing-{living}", f".entry2.writing-{dead}"])
    remove_drafts(tmp_path / "missing" / "entry")  # nothing there, nothing to do


def test_a_process_killed_between_the_two_renames_loses_neither_folder(sealed: Path) -> None:
    sealed.rename(sealed.with_name(f".entry.writing-old-{dead_process()}"))
    remove_drafts(sealed)
    assert names(sealed.parent)[0] == "entry" and not seal_problems(sealed)


def test_a_file_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "below" / "answers.jsonl"
    write_file(target, "first ü")
    assert target.read_bytes() == "first ü".encode()

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(DiskFullError):
            write_file(target, "second")
    assert names(tmp_path) == ["below", "below/answers.jsonl"] and target.read_text(encoding="utf-8") == "first ü"
    (target.parent / f".answers.jsonl.writing-{dead_process()}").write_text("half")
    write_file(target, b"third")
    assert names(tmp_path) == ["below", "below/answers.jsonl"] and target.read_bytes() == b"third"


# --- checksums --------------------------------------------------------------------------------------------------------


def test_the_seal_is_the_sha256_of_every_file(sealed: Path) -> None:
    assert json.loads((sealed / SEAL).read_text()) == {
        "a.txt": hashlib.sha256(b"the bell of Corriden").hexdigest(),
        "below/b.bin": hashlib.sha256(bytes(range(256))).hexdigest(),
    }
    assert seal_problems(sealed) == []


def test_every_kind_of_damage_is_named(sealed: Path) -> None:
    (sealed / "a.txt").write_text("the bell of Corridem")
    (sealed / "below" / "b.bin").unlink()
    (sealed / "below" / SEAL).write_text("{}")  # not the seal, for all its name
    assert seal_problems(sealed) == [
        "below/b.bin is missing",
        "a.txt was changed",
        f"below/{SEAL} does not belong there",
    ]
    assert seal_problems(sealed, "a.txt") == ["a.txt was changed"]
    assert seal_problems(sealed, "below/b.bin") == ["below/b.bin is missing"]
    assert seal_problems(sealed, "never.txt") == ["never.txt is missing"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_damaged_or_missing_seal_is_damage(sealed: Path, content: bytes | None) -> None:
    (sealed / SEAL).unlink() if content is None else (sealed / SEAL).write_bytes(content)
    for only in (None, "a.txt"):
        (problem,) = seal_problems(sealed, only)
        assert problem.startswith(f"{SEAL} cannot be read")


def test_canonical_json_does_not_depend_on_order() -> None:
    assert (
        canonical_json({"b": 1, "a": ["ü", 0.5]})
        == canonical_json({"a": ["ü", 0.5], "b": 1})
        == '{"a":["ü",0.5],"b":1}'
    )


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_in_words_and_leaves_nothing(small_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    with pytest.raises(DiskFullError, match="No space is left"), new_folder(small_disk / "entry") as draft:
        (draft / "big").write_bytes(bytes(1 << 20))
    with pytest.raises(DiskFullError), new_folder(small_disk / "entry") as draft:  # an error of safetensors' own
        save_file({"a": torch.zeros(1 << 18)}, draft / "a.safetensors")
    (small_disk.parent / "big").mkdir()
    (small_disk.parent / "big" / "file").write_bytes(bytes(1 << 20))
    with pytest.raises(DiskFullError), new_folder(small_disk / "entry") as draft:  # shutil collects errors in one
        shutil.copytree(small_disk.parent / "big", draft, dirs_exist_ok=True)
    with pytest.raises(DiskFullError):
        write_file(small_disk / "file", bytes(1 << 20))
    assert names(small_disk) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFullError),
        (RuntimeError("I/O error: No space left on device (os error 28)"), DiskFullError),
        (OSError([("a", "b", "[Errno 28] No space left on device: 'b'")]), DiskFullError),
        (PermissionError(errno.EACCES, "Permission denied"), NoWritePermissionError),
        (OSError(errno.EROFS, "Read-only file system"), NoWritePermissionError),
        (RuntimeError("I/O error: Permission denied (os error 13)"), NoWritePermissionError),
        (OSError(errno.EIO, "Input/output error"), OSError),
        (ValueError("no 28 here"), ValueError),
        (LibraryBusyError("busy"), LibraryBusyError),
    ],
)
def test_what_the_system_says_while_writing(error: Exception, expected: type[Exception]) -> None:
    with pytest.raises(Exception) as raised, write_errors(Path("/somewhere/entry")):
        raise error
    assert type(raised.value) is expected
    assert raised.value is error or raised.value.__cause__ is error


def test_where_nothing_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places = [tmp_path / "file" / "below", tmp_path / ("x" * 300), Path("/proc/nowhere/entry")]
    for place in places:
        with pytest.raises(NoWritePermissionError, match="Cannot write to"), new_folder(place) as draft:
            (draft / "a").write_text("1")
        with pytest.raises(NoWritePermissionError, match="Cannot write to"):
            write_file(place, "1")
    with pytest.raises(NoWritePermissionError, match="Is a directory"):
        write_file(tmp_path, "1")
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_someone_else(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(NoWritePermissionError, match="Permission denied"):
        write_file(tmp_path / "a", "1")
    tmp_path.chmod(0o700)


# --- locks ------------------------------------------------------------------------------------------------------------


def test_a_lock_is_waited_for_and_ctrl_c_ends_the_wait(tmp_path: Path) -> None:
    path, begun, enough = tmp_path / "below" / "x.lock", threading.Event(), threading.Event()
    heard: list[str] = []

    def hold() -> None:
        with file_lock(path, lambda: None):
            begun.set()
            enough.wait(60)
            time.sleep(0.3)
            heard.append("let go")

    holder = threading.Thread(target=hold)
    holder.start()
    assert begun.wait(60)
    with pytest.raises(LookupError), file_lock(path, lambda: [][0]):
        heard.append("never")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt), file_lock(path, threading.Timer(0.2, _thread.interrupt_main).start):
            heard.append("never")
    finally:
        signal.signal(signal.SIGINT, before)
    with file_lock(path, enough.set):
        heard.append("got it")
    holder.join()
    assert heard == ["let go", "got it"]
    with file_lock(path, lambda: heard.append("never")):
        pass
    assert len(heard) == 2
