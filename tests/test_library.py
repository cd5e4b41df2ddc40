"""Absorbed documents are found again, kept whole, never used when damaged, and standard enough for other programs."""

from __future__ import annotations

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
from typing import Any, get_args

import pytest
import torch

from conftest import save_model
from liftlm import Document, Library, Model, absorb, answer, load_config, load_model
from liftlm.absorbing import adapter_id
from liftlm.adapters import use_adapter
from liftlm.errors import (
    ConfigError,
    DamagedEntryError,
    EntryNotFoundError,
    LibraryBusyError,
    UnknownModelError,
)
from liftlm.exporting import Form, export
from liftlm.shelf import library_home
from liftlm.tasks import Task
from test_cli import SMALL, TEXT, lift, start
from test_cli import book as book  # a fixture

DOCUMENT = Document(title="Corriden", text=TEXT, source="corriden.txt")
SETTINGS = SMALL[1::2]
CONFIG = load_config(None, SETTINGS)
FULL = load_config(None, [*SETTINGS, "adapter.kind=full"])


def load(folder: Path, dtype: str = "float32") -> Model:
    return load_model(str(folder), CONFIG.model.model_copy(update={"dtype": dtype}))


@pytest.fixture(scope="module")
def shared(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A library with one entry, to be copied; and its id."""
    home = tmp_path_factory.mktemp("shared")
    adapter, new = Library(home).absorb_once(DOCUMENT, load(tiny_folder), CONFIG)
    assert new
    return home, adapter.id


@pytest.fixture
def model(tiny_folder: Path) -> Model:
    return load(tiny_folder)


@pytest.fixture
def library(shared: tuple[Path, str], home: Path) -> Library:
    shutil.copytree(shared[0], home)
    return Library()


@pytest.fixture
def entry_id(shared: tuple[Path, str]) -> str:
    return shared[1]


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liftlm.absorbing.train", lambda *arguments, **more: pytest.fail("trained"))


def logits(network: Any, model: Model) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = network(torch.tensor([model.encode(TEXT)[:60]])).logits
    return result


# --- absorbing once ---------------------------------------------------------------------------------------------------


def test_the_second_time_nothing_is_trained(
    library: Library, model: Model, entry_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_training(monkeypatch)
    adapter, new = library.absorb_once(DOCUMENT, model, CONFIG)
    assert (adapter.id, new) == (entry_id, False) and adapter.document == DOCUMENT
    assert adapter.config == model.resolve(CONFIG) and adapter.document_tokens == len(model.encode(TEXT))
    rows = (library.path / entry_id / "metrics.jsonl").read_text().splitlines()
    assert adapter.report.steps == len(rows) and len(adapter.report.epoch_losses) == CONFIG.training.epochs
    assert library.has(DOCUMENT, model, CONFIG) and library.unfinished() == []
    assert answer(model, adapter, "Who rang the bell?").method == "lift+rag"


def test_what_an_id_depends_on(model: Model, tmp_path: Path) -> None:
    def identify(document: Document = DOCUMENT, other: Model = model, *settings: str) -> str:
        return adapter_id(document, other, load_config(None, [*SETTINGS, *settings]))

    other = load(save_model(tmp_path / "other", seed=1))
    narrow = load_model(str(model.folder), CONFIG.model.model_copy(update={"window": 40}))
    different = [
        identify(Document("Corriden", TEXT + ".")),
        identify(Document("Another", TEXT)),
        identify(DOCUMENT, other),
        identify(DOCUMENT, narrow),  # which cuts segments shorter
        *(
            identify(DOCUMENT, model, setting)
            for setting in (
                *("seed=1", "training.epochs=3", "training.learning_rate=1e-4", "training.batch_tokens=64"),
                *("adapter.rank=8", "adapter.kind=full", "segments.overlap_tokens=8", "segments.segment_tokens=32"),
            )
        ),
    ]
    assert len({identify(), *different}) == 1 + len(different)
    same = [
        identify(Document("Corriden", TEXT, "elsewhere.md")),
        *(
            identify(DOCUMENT, model, setting)
            for setting in (
                *("training.micro_batch_tokens=64", "training.checkpoint_seconds=0", "model.threads=2"),
                *("training.gradient_checkpointing=true", "answering.max_new_tokens=3", "answering.temperature=1"),
                *("answering.context=none", "model.window=200", "segments.overlap_tokens=24"),
            )
        ),
    ]
    assert set(same) == {identify()}


def test_an_id_depends_on_given_tasks_and_on_how_they_are_trained_on(model: Model) -> None:
    tasks = [Task("Who rang?", "Oswin.", "who", 0, 9), Task("When?", "1743.", "when", 0, 9)]

    def identify(tasks: list[Task] | None, *settings: str) -> str:
        return adapter_id(DOCUMENT, model, load_config(None, [*SETTINGS, *settings]), tasks)

    different = [
        *(identify(None), identify([]), identify(tasks[:1]), identify(tasks[::-1])),
        identify([tasks[0], Task("When?", "1743.", "when", 0, 8)]),
        *(identify(tasks, f"tasks.{setting}") for setting in ("mix=0.5", "reading=0.5", "first_epoch=1")),
    ]
    assert len({identify(tasks), *different}) == 1 + len(different)
    # who might have written others does not matter; without any, nothing about tasks does
    for setting in ("writer=extractive", "writer=llm", "per_sentence=9", "llm.model=other"):
        assert identify(tasks, f"tasks.{setting}") == identify(tasks)
    assert identify(None, "tasks.mix=0.5") == identify(None)


def test_interrupted_work_is_no_entry_and_leaves_nothing_on_the_network(
    model: Model, home: Path, monkeypatch: pytest.MonkeyPatch, shared: tuple[Path, str]
) -> None:
    library, seen = Library(), []

    def stop(metrics: Any) -> None:
        seen.append(metrics)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        library.absorb_once(DOCUMENT, model, CONFIG, on_step=stop)
    entry_id = adapter_id(DOCUMENT, model, CONFIG)
    assert library.entries() == ([], []) and library.unfinished() == [entry_id]
    assert not library.has(DOCUMENT, model, CONFIG) and entry_id not in model.adapters
    # another process finishes it: this one must use that, not what it had half trained
    shutil.rmtree(home)
    shutil.copytree(shared[0], home)
    no_training(monkeypatch)
    adapter, new = library.absorb_once(DOCUMENT, model, CONFIG)
    assert not new
    fresh = load(model.folder)
    Library().open(entry_id, fresh)
    with use_adapter(model, adapter.id), use_adapter(fresh, adapter.id):
        assert torch.equal(logits(model.network, model), logits(fresh.network, model))


def test_a_failure_before_the_first_step_leaves_no_unfinished_work(
    model: Model, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise ConfigError("no")

    monkeypatch.setattr("liftlm.absorbing.train", fail)
    with pytest.raises(ConfigError):
        Library().absorb_once(DOCUMENT, model, CONFIG)
    assert Library().unfinished() == [] and Library().entries() == ([], [])


# --- finding ----------------------------------------------------------------------------------------------------------


def test_entries_are_found_by_the_beginning_of_their_id(library: Library, entry_id: str, model: Model) -> None:
    ((entry,), damaged) = library.entries()
    assert (entry.id, entry.title, damaged) == (entry_id, "Corriden", [])
    assert entry.size_bytes == sum(path.stat().st_size for path in entry.folder.rglob("*") if path.is_file())
    assert library.find(entry_id) == library.find(entry_id[:1]) == entry
    assert library.document(entry_id) == DOCUMENT and library.problems(entry_id) == []
    (library.path / f"{entry_id[:8]}00000000").mkdir()
    for prefix, count in ((entry_id[:8], "2 entries"), ("", "no entry ''"), ("zz", "no entry 'zz'")):
        with pytest.raises(EntryNotFoundError, match=count):
            library.find(prefix)
    assert library.find(entry_id) == entry
    for call in (library.document, library.problems, library.remove, lambda name: library.open(name, model)):
        for path in ("..", "../library", f"../library/{entry_id}", ".", "", str(library.path), "0" * 16):
            with pytest.raises(EntryNotFoundError):
                call(path)
    assert library.find(entry_id) == entry


def test_newest_first_and_what_is_no_entry_is_left_alone(library: Library, model: Model, entry_id: str) -> None:
    second, _ = library.absorb_once(Document("Later", TEXT), model, CONFIG)
    older = json.loads((library.path / entry_id / "entry.json").read_text())
    newer = json.loads((library.path / second.id / "entry.json").read_text())
    (library.path / ".half.writing-1").mkdir()
    (library.path / "note.txt").write_text("mine")
    entries, damaged = library.entries()
    expected = sorted([(older["created"], entry_id), (newer["created"], second.id)], reverse=True)
    assert {entry.id for entry in entries} == {entry_id, second.id} and damaged == []
    assert [entry.card["created"] for entry in entries] == [created for created, _ in expected]


@pytest.mark.parametrize("value", ["relative/home", "~/lift"])
def test_the_home_is_one_place(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LIFT_HOME", value)
    assert library_home() == tmp_path / value.removeprefix("~/")
    monkeypatch.setenv("LIFT_HOME", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert library_home() == tmp_path / "data" / "liftlm"


def test_an_entry_of_another_model(library: Library, entry_id: str, tmp_path: Path, tiny_folder: Path) -> None:
    other = load(save_model(tmp_path / "other", seed=1))
    with pytest.raises(UnknownModelError, match=f"absorbed by {tiny_folder}, not by {other.name}") as raised:
        library.open(entry_id, other)
    assert raised.value.next_step == f"Use --model {tiny_folder}."
    other.name = str(tiny_folder)  # the weights in that folder were replaced
    with pytest.raises(UnknownModelError, match="when that model had other weights"):
        library.open(entry_id, other)
    assert entry_id not in other.adapters


def test_an_entry_of_a_newer_version(library: Library, entry_id: str) -> None:
    from liftlm.storage import SEAL, checksums

    folder = library.path / entry_id
    card = json.loads((folder / "entry.json").read_text())
    (folder / "entry.json").write_text(json.dumps(card | {"format": 99}))
    (folder / SEAL).write_text(json.dumps(checksums(folder)))
    with pytest.raises(DamagedEntryError, match="newer version"):
        library.find(entry_id)
    assert library.entries() == ([], [entry_id])


# --- damage -----------------------------------------------------------------------------------------------------------

FILES = [
    "entry.json",
    "document.txt",
    "metrics.jsonl",
    "checksums.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = [
    *((f"flip {name}", name) for name in FILES),
    *((f"delete {name}", name) for name in FILES),
    ("truncate entry.json", "entry.json"),
    ("empty checksums.json", "checksums.json"),
    ("add adapter/pytorch_model.bin", "adapter/pytorch_model.bin"),
]


def test_these_are_all_files_of_an_entry(library: Library, entry_id: str) -> None:
    folder = library.path / entry_id
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == sorted(FILES)


@pytest.mark.parametrize(("damage", "name"), DAMAGES)
def test_a_damaged_entry_is_named_and_never_used(
    library: Library, entry_id: str, model: Model, monkeypatch: pytest.MonkeyPatch, damage: str, name: str
) -> None:
    path = library.path / entry_id / name
    match damage.split()[0]:
        case "flip":
            flip(path)
        case "delete":
            path.unlink()
        case "truncate":
            path.write_bytes(path.read_bytes()[:-30])
        case "empty":
            path.write_text("{}")
        case "add":
            path.write_text("extra")
    with monkeypatch.context() as patch:
        no_training(patch)
        for use in (
            lambda: library.absorb_once(DOCUMENT, model, CONFIG),
            lambda: library.open(entry_id, model),
            lambda: export(library.find(entry_id), library.home / "exported"),
        ):
            with pytest.raises(DamagedEntryError, match=f"Entry {entry_id} of the library is damaged") as raised:
                use()
            assert f"lift library remove {entry_id}" in raised.value.next_step
    problems = library.problems(entry_id)
    assert problems and (name == "checksums.json" or [p.split()[0] for p in problems] == [name])
    assert entry_id not in model.adapters and not (library.home / "exported").exists()
    unreadable = name == "entry.json" or damage in ("delete checksums.json", "empty checksums.json")
    if name == "document.txt" or unreadable:  # what a question to the bare model would use
        with pytest.raises(DamagedEntryError):
            library.document(entry_id)
    if unreadable:
        assert library.entries() == ([], [entry_id])
    library.remove(library.find_id(entry_id[:6]))
    adapter, new = library.absorb_once(DOCUMENT, model, CONFIG)
    assert new and adapter.id == entry_id and library.problems(entry_id) == []


def test_damage_through_the_command_line(
    capsys: pytest.CaptureFixture[str], book: Path, tiny_folder: Path, home: Path
) -> None:
    arguments = ["ask", book, "Who rang?", "--model", tiny_folder, *SMALL]
    assert lift(capsys, *arguments).code == 0
    (folder,) = (home / "library").iterdir()
    flip(folder / "adapter" / "adapter_model.safetensors")
    for command in (
        arguments,
        ["ask", folder.name, *arguments[2:]],
        ["export", folder.name, "--to", "peft", "--out", book.parent / "x"],
    ):
        result = lift(capsys, *command)
        assert (result.code, result.out) == (41, "") and "adapter_model.safetensors was changed" in result.err
    (folder / "entry.json").write_text("{")
    assert lift(capsys, "library", "show", folder.name).code == 41
    assert lift(capsys, "library", "list").out == f"{folder.name}  damaged; `lift library verify` says why\n"
    verified = lift(capsys, "library", "verify")
    assert (verified.code, verified.out) == (
        41,
        f"{folder.name}  adapter/adapter_model.safetensors was changed; entry.json was changed\n",
    )
    assert lift(capsys, "library", "remove", folder.name[:7]).code == 0
    again = lift(capsys, *arguments)
    assert again.code == 0 and "Absorbed" in again.err


# --- two processes ----------------------------------------------------------------------------------------------------

HOLDER = (
    "import sys, time\nfrom liftlm.shelf import Shelf\n"
    "with Shelf().lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


@pytest.fixture
def holder(shared: tuple[Path, str], home: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is at work on the document."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, shared[1]], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_two_processes_with_one_document(
    capsys: pytest.CaptureFixture[str], holder: subprocess.Popen[str], model: Model, entry_id: str, tmp_path: Path
) -> None:
    (tmp_path / "corriden.txt").write_text(TEXT)
    arguments = ["absorb", tmp_path / "corriden.txt", "--title", "Corriden", "--model", model.folder, *SMALL]
    busy = lift(capsys, *arguments)
    assert (busy.code, busy.out) == (40, "") and f"right now (entry {entry_id})" in busy.err and "Wait" in busy.err
    assert lift(capsys, *arguments, "--title", "Another").code == 0  # another document is free
    with pytest.raises(LibraryBusyError):
        Library().absorb_once(DOCUMENT, model, CONFIG)
    holder.kill()  # kill -9
    holder.wait()
    adapter, new = Library().absorb_once(DOCUMENT, model, CONFIG)
    assert new and adapter.id == entry_id


def test_who_is_willing_to_wait_does(holder: subprocess.Popen[str], model: Model, entry_id: str) -> None:
    waited: list[str] = []

    def on_wait() -> None:
        waited.append(entry_id)
        threading.Timer(0.3, holder.kill).start()

    adapter, new = Library().absorb_once(DOCUMENT, model, CONFIG, on_wait=on_wait)
    assert new and adapter.id == entry_id and waited == [entry_id], "told once, then it was free"
    assert Library().absorb_once(DOCUMENT, model, CONFIG, on_wait=on_wait)[1] is False and len(waited) == 1


def test_what_another_process_is_at_cannot_be_removed(
    holder: subprocess.Popen[str], shared: tuple[Path, str], home: Path, entry_id: str
) -> None:
    (home / "unfinished" / entry_id).mkdir(parents=True)
    (home / "unfinished" / entry_id / "metrics.jsonl").write_text("{}")
    shutil.copytree(shared[0] / "library", home / "library")
    with pytest.raises(LibraryBusyError):
        Library().remove(entry_id)
    assert Library().problems(entry_id) == []
    holder.kill()
    holder.wait()
    Library().remove(entry_id)
    assert not list((home / "library").iterdir()) and not list((home / "unfinished").iterdir())


def test_finished_by_another_process_while_this_one_waited_for_the_lock(
    model: Model, home: Path, shared: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import filelock

    library, acquire = Library(), filelock.FileLock.acquire

    def slow(self: Any, **more: Any) -> Any:
        shutil.copytree(shared[0] / "library", home / "library", dirs_exist_ok=True)
        return acquire(self, **more)

    monkeypatch.setattr(filelock.FileLock, "acquire", slow)
    no_training(monkeypatch)
    adapter, new = library.absorb_once(DOCUMENT, model, CONFIG)
    assert not new and library.unfinished() == [] and adapter.id == shared[1]


def test_a_killed_process_is_listed_as_unfinished_and_its_work_goes_on(
    capsys: pytest.CaptureFixture[str], book: Path, tiny_folder: Path, home: Path
) -> None:
    arguments = ["absorb", book, "--model", tiny_folder, *SMALL, "--set", "training.epochs=40"]
    process = start(*arguments, "--set", "training.checkpoint_seconds=0")
    while not list(home.glob("unfinished/*/checkpoint-*")) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (entry_id,) = Library().unfinished()
    listed = lift(capsys, "library", "list")
    assert listed.code == 0 and listed.out.startswith(f"{entry_id}  unfinished; ")
    done = lift(capsys, *arguments)
    assert done.code == 0 and done.out.startswith(entry_id)
    assert Library().find(entry_id).card["report"]["resumed_from"] >= 1 and Library().unfinished() == []
    (home / "unfinished" / "abcd").mkdir(parents=True)
    assert lift(capsys, "library", "remove", "abcd").code == 0 and Library().unfinished() == []


def test_removing_goes_on_after_an_interrupted_attempt(library: Library, entry_id: str) -> None:
    shutil.copytree(library.path / entry_id, library.path / f".{entry_id}.removing")
    library.remove(entry_id)
    assert list(library.path.iterdir()) == []


# --- for other programs -----------------------------------------------------------------------------------------------


def test_plain_peft_loads_an_adapter_and_computes_the_same(
    library: Library, entry_id: str, model: Model, tmp_path: Path, tiny_folder: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export(library.find(entry_id), tmp_path / "exported")
    stored = library.path / entry_id / "adapter"
    assert {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()} == {
        path.name: path.read_bytes() for path in stored.iterdir()
    }
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    bare = logits(plain, model)
    wrapped = PeftModel.from_pretrained(plain, tmp_path / "exported")
    library.open(entry_id, model)
    with use_adapter(model, entry_id):
        ours = logits(model.network, model)
    assert torch.equal(logits(wrapped, model), ours) and not torch.allclose(bare, ours, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gpt2"])  # tied, untied, tied and transposed layers
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_merged_weights_load_with_plain_transformers(family: str, kind: str, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, library = load(save_model(tmp_path / "m", family)), Library()
    settings = load_config(None, [*SETTINGS, f"adapter.kind={kind}", "training.learning_rate=5e-3"])
    adapter, _ = library.absorb_once(DOCUMENT, model, settings)
    with use_adapter(model, adapter.id):
        ours = logits(model.network, model)
    bare = logits(model.network, model)
    export(library.find(adapter.id), tmp_path / "merged", "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, model), ours, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(bare, ours, atol=1e-2)
    tied = family != "llama-untied"
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    assert len([name for name in names if name.startswith("lm_head")]) == (0 if tied else 1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("Oswin")["input_ids"] == model.tokenizer("Oswin")["input_ids"]
    assert tokenizer.chat_template == model.tokenizer.chat_template
    # the model in memory is as it was
    assert torch.equal(logits(model.network, model), bare)
    with use_adapter(model, adapter.id):
        assert torch.equal(logits(model.network, model), ours)


def test_full_weights_alone_are_one_file(model: Model, tmp_path: Path) -> None:
    adapter, _ = Library().absorb_once(DOCUMENT, model, FULL)
    export(Library().find(adapter.id), tmp_path / "exported")
    assert [path.name for path in (tmp_path / "exported").iterdir()] == ["model.safetensors"]


def test_nothing_is_exported_over_something(library: Library, entry_id: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "there", tmp_path / "file", Path(), Path("/")):
        for form in get_args(Form):
            with pytest.raises(ConfigError, match="exists already"):
                export(library.find(entry_id), target, form)
    assert (tmp_path / "file").read_text() == "mine" and not list((tmp_path / "there").iterdir())


def test_the_readme_of_an_entry_is_its_card(library: Library, entry_id: str, tiny_folder: Path) -> None:
    card = library.find(entry_id).card
    assert set(card) == {
        *("format", "id", "title", "source", "created"),
        *("document", "model", "config", "report", "machine"),
    }
    assert card["source"] == "corriden.txt" and card["model"]["name"] == str(tiny_folder)
    assert load_config(None, SETTINGS).recipe()["training"].items() <= card["config"]["training"].items()
    assert os.environ["LIFT_HOME"] not in json.dumps(card)


def test_absorbing_without_a_library_writes_nothing(model: Model, home: Path) -> None:
    absorb(DOCUMENT, model, CONFIG)
    assert not home.exists()
