"""Bad input: each has its own class, exit code and sentence, on standard error, and nothing on standard output."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import make_network, make_tokenizer, save_model
from liftlm import errors
from test_cli import SMALL, Result, lift
from test_cli import book as book  # a fixture
from test_documents import make_pdf
from test_storage import small_disk as small_disk  # a fixture

PAGE = Path(__file__).parent.parent / "docs" / "errors.md"
CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.LiftError) and kind is not errors.LiftError
]


def fails(result: Result, code: int, *words: str) -> None:
    """Ends with the code, the words in its message, a next step, and neither an answer nor a traceback."""
    assert result.code == code, result.err
    lines = result.err.strip().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("Error: "))
    for word in words:
        assert word in " ".join(lines[start:]), result.err
    assert lines[start][-1] in ".?" and len(lines) == start + 2 and lines[start + 1].startswith("       ")
    assert result.out == "" and "Traceback" not in result.err and "defect" not in result.err


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_page_lists_exactly_the_classes() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| .+\. \| .+\. \| (\d+) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    listed = {name: (int(code), int(status)) for code, name, status in rows}
    assert listed == {kind.__name__: (kind.exit_code, kind.http_status) for kind in CLASSES}
    assert [int(code) for code, _, _ in rows] == sorted(int(code) for code, _, _ in rows)


def test_no_two_classes_share_an_exit_code() -> None:
    codes = [kind.exit_code for kind in CLASSES]
    assert len(set(codes)) == len(codes) == 39
    assert not {0, 1, 141} & set(codes)  # success, a defect, a broken pipe
    assert all(400 <= kind.http_status < 600 and kind.__doc__ for kind in CLASSES)


def test_an_error_is_its_sentence_and_the_next_step() -> None:
    error = errors.EmptyDocumentError("It is empty.", "Give another.")
    assert (error.message, error.next_step, str(error)) == (
        "It is empty.",
        "Give another.",
        "It is empty. Give another.",
    )
    assert str(errors.LiftError("Alone.")) == "Alone."


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "code", "word"),
    [
        ("missing.txt", None, 10, "There is no file"),
        ("", None, 10, "is a folder"),
        ("empty.txt", b"", 11, "is empty"),
        ("blank.txt", b" \n\t\n", 11, "only white space"),
        ("noise.dat", bytes(range(256)) * 40, 12, "neither text nor a document"),
        ("cut.pdf", make_pdf(["a page"] * 9)[:300], 13, "damaged PDF"),
        ("locked.pdf", make_pdf(["secret"], password="x"), 14, "needs a password"),
        ("photo.png", b"\x89PNG\r\n\x1a\n" + bytes(64), 15, "a PNG image"),
        ("book.zip", b"PK\x05\x06" + bytes(18), 15, "a ZIP archive"),
    ],
)
def test_documents(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, content: bytes | None, code: int, word: str
) -> None:
    document = tmp_path / name
    if content is not None:
        document.write_bytes(content)
    fails(lift(capsys, "ask", document, "Who rang?"), code, word)  # before any model is loaded
    if name:  # all documents of a folder are absorbed
        fails(lift(capsys, "absorb", document), code, word)


def test_a_document_that_may_not_be_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")

    def denied(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)  # root may read everything
    fails(lift(capsys, "ask", tmp_path / "a.txt", "Who?"), 13, "Permission to read", "was denied")


def test_a_single_token(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_model(tmp_path / "m", bos=False)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None  # nothing at all stands in front of the token
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "a.txt").write_text("a")
    fails(lift(capsys, "absorb", tmp_path / "a.txt", "--model", tmp_path / "m"), 11, "single token")


# --- questions --------------------------------------------------------------------------------------------------------


def test_a_question_longer_than_the_window_fails_before_training(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, book: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setattr("liftlm.absorbing.train", lambda *arguments, **more: pytest.fail("trained"))
    long = "Who rang the bell? " * 100
    fails(lift(capsys, "ask", book, long, "--model", tiny_folder, *SMALL), 16, "more than the window of 256")
    (book.parent / "q.jsonl").write_text(
        json.dumps({"question": "Who?"}) + "\n" + json.dumps({"question": long}) + "\n"
    )
    arguments = ["ask", book, "--questions", book.parent / "q.jsonl", "--model", tiny_folder, *SMALL]
    fails(lift(capsys, *arguments), 16, "more than the window of 256")
    assert not home.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("does not exist",)),
        ("", ("holds no questions",)),
        ("\n \n", ("holds no questions",)),
        ('{"question": "Who?"}\n\n{"question": Who?}\n', ("Line 3 of", "is not JSON")),
        ('{"question": "Who?"}\n["Who?"]\n', ("Line 2 of", "is not a JSON object")),
        ('{"ask": "Who?"}', ("Line 1 of", "has no question")),
        ('{"question": " "}', ("Line 1 of", "has no question")),
        ('{"question": 7}', ("Line 1 of", "has no question")),
        ('{"question": "Who?", "answer": "Oswin"}', ("Line 1 of", "'answer'", "overwritten", "given_answer")),
        ('{"question": "Who?", "seconds": 3}', ("Line 1 of", "'seconds'", "overwritten")),
        ('{"question": "\\ud800"}', ("Line 1 of", "surrogate")),
        ("[" * 100_000, ("Line 1 of", "is not JSON")),
    ],
)
def test_questions_files(
    capsys: pytest.CaptureFixture[str], book: Path, content: str | None, words: tuple[str, ...]
) -> None:
    path = book.parent / "q.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    fails(lift(capsys, "ask", book, "--questions", path), 17, *words)


def test_a_questions_file_that_is_no_text(capsys: pytest.CaptureFixture[str], book: Path) -> None:
    (book.parent / "q.jsonl").write_bytes(b"\xff\xfe\x00")
    fails(lift(capsys, "ask", book, "--questions", book.parent / "q.jsonl"), 17, "cannot be read")
    fails(lift(capsys, "ask", book, "--questions", book.parent), 17, "cannot be read")


# --- settings and flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "training.epoch=2"], ("Unknown setting 'training.epoch'", "did you mean 'training.epochs'")),
        (["--set", "segments.segment_tokens=64", "--set", "segments.overlap_tokens=64"], ("must be smaller than",)),
        (["--set", "segments.overlap_tokens=9", "--set", "segments.stride_tokens=9"], ("contradicts",)),
        (["--set", "segments.segment_tokens=64", "--set", "segments.stride_tokens=65"], ("would skip text",)),
        (["--context", "all"], ("'answering.context'", "'all'")),
        (["--window", "4"], ("'model.window'",)),
        (["--set", "epochs"], ("not of the form key=value",)),
        (["--config", "nowhere.yaml"], ("does not exist",)),
        (["--title", "\x07"], ("title is blank",)),
        (["--set", "model.device=abacus"], ("'abacus' is not a device",)),
        (["--out", "answers.jsonl"], ("--out goes with --questions",)),
        (["--questions", "q.jsonl"], ("either a QUESTION or --questions",)),
    ],
)
def test_settings(
    capsys: pytest.CaptureFixture[str], book: Path, more: list[str], words: tuple[str, ...], home: Path
) -> None:
    fails(lift(capsys, "ask", book, "Who?", *more), 2, *words)
    assert not home.exists()


def test_flags(capsys: pytest.CaptureFixture[str], book: Path) -> None:
    for arguments in (["--wrong"], ["ask", book, "Who?", "--widow", "3"], ["ask"], ["nonsense"], ["library", "burn"]):
        result = lift(capsys, *arguments)
        assert (result.code, result.out) == (2, "") and "Usage: lift" in result.err, arguments
    assert "--window" in lift(capsys, "ask", book, "Who?", "--widow", "3").err  # the nearest flag
    fails(lift(capsys, "ask", book), 2, "either a QUESTION or --questions")
    fails(lift(capsys, "ask", book, " "), 2, "The question is empty")


def test_where_the_demo_cannot_write(capsys: pytest.CaptureFixture[str], book: Path) -> None:
    fails(lift(capsys, "demo", "--out", book.parent), 2, "is a folder")
    fails(lift(capsys, "demo", "--out", book / "below.json"), 31, "Cannot write to")


def test_a_window_larger_than_the_models(capsys: pytest.CaptureFixture[str], book: Path, tiny_folder: Path) -> None:
    result = lift(capsys, "ask", book, "Who?", "--model", tiny_folder, "--window", 257)
    fails(result, 2, "A window of 257 tokens", "(256)", "--window 256")


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [
        ("no-such-model", 20, "no such folder"),
        ("a/b/c", 20, "no such folder"),
        ("./nowhere", 20, "no such folder"),
        ("~nobody-of-that-name/x", 20, "no such folder"),
        ("x" * 5000, 20, "no such folder"),
        ("no spaces/in names", 20, "The hub has no model"),
        ("owner/name", 22, "the hub cannot be reached"),  # HF_HUB_OFFLINE=1
    ],
)
def test_model_names(capsys: pytest.CaptureFixture[str], book: Path, name: str, code: int, word: str) -> None:
    fails(lift(capsys, "ask", book, "Who?", "--model", name), code, word)


def break_model(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "no config":
        (folder / "config.json").unlink()
    elif how in ("no weights", "pickled"):
        weights.rename(folder / "pytorch_model.bin") if how == "pickled" else weights.unlink()
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "garbage":
        weights.write_bytes(b"\xff" * 100)
    elif how == "part missing":
        weights.unlink()
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "index damaged":
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text("[]")
    elif how == "tensors missing":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "no tokenizer":
        for path in folder.glob("*token*"):
            path.unlink()
    elif how == "no causal model":
        (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    elif how == "config is no JSON":
        (folder / "config.json").write_text("{")
    elif how == "own code":
        config = json.loads((folder / "config.json").read_text())
        config["model_type"] = "mine"
        config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "mine.py").write_text("raise SystemExit('ran')")


@pytest.mark.parametrize(
    ("how", "code", "word"),
    [
        ("no config", 20, "no config.json"),
        ("no weights", 21, "no weights in safetensors."),
        ("pickled", 21, "pickled weights are never read"),
        ("cut", 21, "are damaged"),
        ("garbage", 21, "are damaged"),
        ("part missing", 21, "lacks 2 of its files of weights"),
        ("index damaged", 21, "index.json is damaged"),
        ("tensors missing", 21, "lack 1 tensors of the network, model.layers.1.mlp.up_proj.weight"),
        ("no tokenizer", 20, "cannot be loaded"),
        ("no causal model", 20, "cannot be loaded"),
        ("config is no JSON", 20, "cannot be loaded"),
        ("own code", 20, "cannot be loaded"),
    ],
)
def test_model_folders(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, book: Path, tiny_folder: Path, how: str, code: int, word: str
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    break_model(folder, how)
    fails(lift(capsys, "ask", book, "Who?", "--model", folder), code, word)


def test_a_file_as_model(capsys: pytest.CaptureFixture[str], book: Path, tiny_folder: Path) -> None:
    fails(lift(capsys, "ask", book, "Who?", "--model", tiny_folder / "model.safetensors"), 20, "is a file, not a model")


def test_weights_in_several_files_load_and_extra_files_do_not_count(tmp_path: Path) -> None:
    import torch

    from liftlm.models import _weight_files, load_model

    tokenizer = make_tokenizer()
    network = make_network("llama", len(tokenizer))
    network.save_pretrained(tmp_path, max_shard_size="100kB")
    tokenizer.save_pretrained(tmp_path)
    parts = sorted(tmp_path.glob("*.safetensors"))
    assert len(parts) > 1
    (tmp_path / "consolidated.safetensors").write_bytes(b"of another program")
    assert _weight_files(tmp_path) == parts
    loaded = load_model(str(tmp_path)).network
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("liftlm.models.available_memory", ("Loading", "GB of memory and 0.0 GB are free", "model.dtype=bfloat16")),
        ("liftlm.memory.available_memory", ("Training needs about", "micro_batch_tokens", "segment_tokens")),
    ],
)
def test_too_little_memory_is_predicted(
    capsys: pytest.CaptureFixture[str],
    book: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    words: tuple[str, ...],
    home: Path,
) -> None:
    monkeypatch.setattr(where, lambda device: 1000)
    result = lift(capsys, "ask", book, "Who?", "--model", tiny_folder, *SMALL)
    fails(result, 32, *words)
    assert not list(home.glob("*/*[!k]"))  # no entry, no unfinished work; a lock file stays


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_while_answering(
    capsys: pytest.CaptureFixture[str],
    book: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def generate(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("liftlm.batching.Network.compute", generate)
    result = lift(capsys, "ask", book, "Who?", "--base", "--model", tiny_folder, *SMALL)
    fails(result, 32, "ran out of memory", "answering.batch_tokens")


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str], book: Path) -> None:
    fails(lift(capsys, "ask", book, "Who?", "--set", "model.device=cuda:99"), 33, "no device 'cuda:99'")


@pytest.mark.parametrize("place", ["a file", "/proc/nowhere"])
def test_a_library_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], book: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("LIFT_HOME", str(book / "below") if place == "a file" else place)
    monkeypatch.setattr("liftlm.absorbing.train", lambda *arguments, **more: pytest.fail("trained"))
    result = lift(capsys, "ask", book, "Who?", "--model", tiny_folder, *SMALL)
    fails(result, 31, "Cannot write to", "LIFT_HOME")


@pytest.mark.parametrize("when", ["saving", "at a checkpoint", "from the start"])
def test_a_disk_that_is_full(
    capsys: pytest.CaptureFixture[str],
    book: Path,
    tiny_folder: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    monkeypatch.setenv("LIFT_HOME", str(small_disk / "home"))
    if when == "from the start":
        with (small_disk / "filling").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
    seconds = 0 if when == "at a checkpoint" else 100
    more = ["--set", "adapter.rank=64", "--set", f"training.checkpoint_seconds={seconds}"]
    arguments = ["ask", book, "Who?", "--model", tiny_folder, *SMALL, *more]
    fails(lift(capsys, *arguments), 30, "No space is left", "free some space")
    home = small_disk / "home"
    assert list((home / "library").iterdir()) == []  # nothing half-written
    assert not [path for path in (home / "unfinished").rglob("*") if "writing" in path.name]
    monkeypatch.setenv("LIFT_HOME", str(book.parent / "elsewhere"))
    assert lift(capsys, *arguments).code == 0


# --- defects and stopping ---------------------------------------------------------------------------------------------


def test_debug_shows_the_traceback_and_nothing_else_does(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plain = lift(capsys, "ask", tmp_path / "missing.txt", "Who?")
    debug = lift(capsys, "ask", "--debug", tmp_path / "missing.txt", "Who?")
    assert plain.code == debug.code == 10
    assert "Traceback" not in plain.err and "Traceback" in debug.err and "DocumentNotFoundError" in debug.err
    assert plain.err in debug.err


def test_an_unexpected_exception_is_called_a_defect(
    capsys: pytest.CaptureFixture[str], book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **more: Any) -> None:
        raise ZeroDivisionError("oh [bold]no")

    monkeypatch.setattr("liftlm.models.load_model", broken)
    result = lift(capsys, "ask", book, "Who?")
    assert result.code == 1 and "Error: ZeroDivisionError: oh [bold]no" in result.err and "defect" in result.err
    assert "Traceback" not in result.err
    assert "Traceback" in lift(capsys, "ask", book, "Who?", "--debug").err


def test_ctrl_c(capsys: pytest.CaptureFixture[str], book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("liftlm.models.load_model", interrupted)
    result = lift(capsys, "ask", book, "Who?")
    assert result.code == 130 and result.err == "Error: Interrupted.\n"


def test_sigterm_while_answering_is_not_swallowed(
    capsys: pytest.CaptureFixture[str], book: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*arguments: Any, **options: Any) -> None:
        try:
            os.kill(os.getpid(), 15)
            for _ in range(1000):
                pass
        except Exception:
            pytest.fail("an `except Exception` of some library would stop the stopping")

    monkeypatch.setattr("liftlm.batching.Network.compute", generate)
    result = lift(capsys, "ask", book, "Who?", "--base", "--model", tiny_folder, *SMALL)
    fails(result, 143, "Stopped by SIGTERM")
