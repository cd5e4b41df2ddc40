"""The command line as a user meets it: its surface, answers on standard output, everything else on standard error."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import save_model
from liftlm import __version__
from liftlm.cli import app, main

TEXT = "The ferryman Oswin Tarrel rang the bell of Corriden on 3 May 1743. " * 8
# a recipe for tiny models; one thread, since many wait for each other on a busy machine
SMALL = [
    part
    for setting in (
        "model.threads=1",
        "tasks.writer=none",
        "segments.segment_tokens=64",
        "adapter.rank=4",
        "training.epochs=2",
        "training.batch_tokens=128",
        "answering.max_new_tokens=8",
    )
    for part in ("--set", setting)
]
HEX_ID = r"[0-9a-f]{16}"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def lift(capsys: pytest.CaptureFixture[str], *arguments: object, stdin: bytes = b"") -> Result:
    """One call of the command line in this process."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lift", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ending:
                main()
        finally:
            signal.signal(signal.SIGTERM, before)
    out, err = capsys.readouterr()
    assert isinstance(ending.value.code, int)
    return Result(ending.value.code, out, err)


def start(*arguments: object, **more: Any) -> subprocess.Popen[bytes]:
    """One call of the command line in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more.pop("env", {})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    return subprocess.Popen([sys.executable, "-m", "liftlm", *map(str, arguments)], env=environment, **pipes)


def only_id(home: Path) -> str:
    (folder,) = (home / "library").iterdir()
    return folder.name


@pytest.fixture
def book(tmp_path: Path) -> Path:
    (tmp_path / "book").mkdir()
    path = tmp_path / "book" / "corriden.md"
    path.write_text(f"# The bell of Corriden\n\n{TEXT}", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model whose answers have letters in them and differ from question to question."""
    return save_model(tmp_path_factory.mktemp("talker") / "tiny-talker", "llama-untied", seed=7)


# --- the surface ------------------------------------------------------------------------------------------------------

DOCUMENT, ENTRY = ("DOCUMENT", True, None), ("ID", True, None)
MODEL = {"--model": None, "--window": None, "--config": None, "--set": None}
JUDGE = {"--judge-url": None, "--judge-model": None, "--bert-score": False}
SURFACE: dict[str, tuple[list[tuple[str, bool, Any]], dict[str, Any]]] = {
    # command: arguments (name, required, default), options with defaults
    "absorb": (
        [DOCUMENT],
        {"--tasks": None, "--start": None, "--title": None, "--ray": None, "--library": None, **MODEL},
    ),
    "ask": (
        [DOCUMENT, ("[QUESTION]", False, None)],
        {
            "--questions": None,
            "--out": None,
            "--context": None,
            "--base": False,
            "--diagnose": False,
            "--tasks": None,
            "--start": None,
            "--title": None,
            **MODEL,
        },
    ),
    "chat": ([DOCUMENT], {"--context": None, "--base": False, "--tasks": None, "--title": None, **MODEL}),
    "tasks": (
        [DOCUMENT],
        {"--out": None, "--sample": 10, "--title": None, "--model": None, "--config": None, "--set": None},
    ),
    "demo": ([], {**MODEL, "--window": 2048, "--all": False, "--full": False, "--out": None}),
    "export": ([ENTRY], {"--to": "required", "--out": "required"}),
    "evaluate": (
        [("BENCHMARK", True, None)],
        {
            **MODEL,
            **JUDGE,
            "--out": "required",
            "--data": None,
            "--methods": "closed-book,icl,rag,rag-sentences,lift,lift+icl,lift+rag-sentences,oracle,lift+oracle,"
            "lift-other,lift-other+icl,lift-other+rag-sentences",
            "--limit": None,
            "--seed": None,
            "--lengths": "",
            "--depths": "",
            "--needles": "",
            "--together": False,
            "--distractors": False,
            "--texts": None,
            "--max-new-tokens": None,
            "--ray": None,
            "--library": None,
        },
    ),
    "score": ([("FOLDER", True, None)], {**JUDGE, "--against": None}),
    "serve": (
        [],
        {
            **MODEL,
            "--host": "127.0.0.1",
            "--port": 8321,
            "--name": None,
            "--log-content": False,
            "--ray": None,
            "--library": None,
        },
    ),
    "keys add": ([("NAME", True, None)], {}),
    "keys list": ([], {}),
    "keys remove": ([("ID", True, None)], {"--give-to": None, "--delete-documents": False}),
    "keys give": ([("FROM", True, None), ("TO", True, None)], {}),
    "study": (
        [("NAME", True, None)],
        {
            **MODEL,
            "--out": "required",
            "--data": None,
            "--quick": False,
            "--seeds": "0",
            "--documents": None,
            "--questions": None,
            "--characters": None,
            "--jobs": 0,
            "--keep": False,
            "--arms": None,
            "--lengths": "",
            "--graded": None,
            "--writers": "",
            "--ray": None,
        },
    ),
    "pre-sft": (
        [("CORPUS…", True, None)],
        {**MODEL, "--out": "required", "--mode": "sft", "--keep-out": None},
    ),
    "config": ([], {"--config": None, "--set": None}),
    "library list": ([], {}),
    "library show": ([ENTRY], {}),
    "library remove": ([ENTRY], {}),
    "library verify": ([("[ID]", False, None)], {}),
}


def found_surface() -> dict[str, Any]:
    import typer

    surface: dict[str, Any] = {}

    def walk(command: Any, name: str) -> None:
        for below, child in getattr(command, "commands", {}).items():
            walk(child, f"{name} {below}".strip())
        if hasattr(command, "commands"):
            return
        arguments, options = [], {}
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                arguments.append((parameter.metavar, parameter.required, parameter.default))
            else:
                (flag,) = parameter.opts
                assert not parameter.secondary_opts, "no --no-… twins"
                options[flag] = "required" if parameter.required else parameter.default
        surface[name] = (arguments, options)

    walk(typer.main.get_command(app), "")
    return surface


def test_the_surface_is_what_it_was() -> None:
    assert found_surface() == SURFACE


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for command, (_, options) in SURFACE.items():
        result = lift(capsys, *command.split(), "--help")
        assert (result.code, result.err) == (0, "")
        lines = [line for line in result.out.splitlines() if line.strip().startswith("--")]
        assert {line.split()[0].rstrip(",") for line in lines} == {*options, "--help"}, command
        assert f"Usage: lift {command} " in result.out


def test_version_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert lift(capsys, "--version") == Result(0, f"{__version__}\n", "")
    assert "Usage: lift" in "".join([lift(capsys).out, lift(capsys).err])


def test_light_commands_do_not_load_torch(home: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom liftlm.cli import main\n"
        "for line in sys.argv.pop().split(';'):\n"
        "    sys.argv = ['lift', *line.split()]\n"
        "    try:\n        main()\n    except SystemExit:\n        pass\n"
        "print(sorted(set('torch transformers peft accelerate fastapi uvicorn'.split()) & set(sys.modules)))\n"
    )
    commands = "--help;ask --help;serve --help;keys list;config;library list;library verify;library show abc"
    commands += f";ask {tmp_path}/missing Who?"
    done = subprocess.run([sys.executable, "-c", code, commands], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["--help", "ask --help", "serve --help"])
def test_help_loads_little(command: str) -> None:
    """It is shown in a third of a second because little is loaded; modules are counted, as seconds depend on the machine."""
    code = (
        "import sys\nfrom liftlm.cli import main\nsys.argv = ['lift', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(len(sys.modules), *{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=True)
    count, *names = done.stdout.splitlines()[-1].split()
    heavy = {"rich", "yaml", "psutil", "torch", "numpy", "filelock"}
    if command == "--help":
        heavy.add("pydantic")  # typer wants it where options are shown
    assert heavy & set(names) == set()
    assert int(count) < (250 if command == "--help" else 450)


def test_an_answer_from_the_library_loads_nothing_that_it_does_not_need(
    capsys: pytest.CaptureFixture[str], book: Path, talker: Path, home: Path
) -> None:
    assert lift(capsys, "absorb", book, "--model", talker, *SMALL).code == 0
    code = (
        "import sys\nfrom liftlm.cli import main\nsys.argv = ['lift', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    line = ["ask", only_id(home), "Who?", "--context", "truncate", "--model", talker, *SMALL]
    done = subprocess.run([sys.executable, "-c", code, *map(str, line)], capture_output=True, text=True, check=True)
    unwanted = {
        "openai",
        "markitdown",
        "bm25s",
        "fastapi",
        "nltk",
        "matplotlib",
        "pandas",
        "scipy",
        "sklearn",
        "datasets",
    }
    names = set(done.stdout.splitlines()[-1].split())
    assert "torch" in names and unwanted & names == set()


# --- ask --------------------------------------------------------------------------------------------------------------


def test_ask_absorbs_once_and_answers_on_standard_output(
    capsys: pytest.CaptureFixture[str], book: Path, talker: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    from liftlm import answer, load_config, load_document, load_model
    from liftlm.library import Library

    arguments = ["ask", book, "Who rang the bell?", "--model", talker, *SMALL]
    first = lift(capsys, *arguments)
    assert first.code == 0 and f"Library id {only_id(home)}." in first.err and "tokens/s" in first.err
    monkeypatch.setattr("liftlm.absorbing.train", lambda *arguments, **more: pytest.fail("trained again"))
    second = lift(capsys, *arguments)
    assert (second.code, second.out) == (0, first.out)
    assert f"From the library: 'The bell of Corriden' (id {only_id(home)})." in second.err
    assert "lift+rag · " in second.err and "answer tokens" in second.err
    # the same through the Python API
    model = load_model(str(talker))
    config = load_config(None, SMALL[1::2])
    adapter = Library().open(only_id(home), model)
    given = answer(model, adapter, "Who rang the bell?", document=load_document(book), config=config)
    assert first.out.strip() == given.answer != ""


def test_without_the_text_and_without_the_adapter(
    capsys: pytest.CaptureFixture[str], book: Path, talker: Path, home: Path
) -> None:
    arguments = ["ask", book, "Who rang the bell?", "--model", talker, *SMALL]
    base = lift(capsys, *arguments, "--base")
    assert base.code == 0 and "\nrag · " in base.err and "lift" not in base.err and not home.exists()
    closed = lift(capsys, *arguments, "--base", "--context", "none")
    assert "closed-book · " in closed.err and "(0 of the document)" in closed.err and closed.out != base.out
    recited = lift(capsys, *arguments, "--context", "recite")
    assert (
        "lift+recite · " in recited.err
        and " recited) · " in recited.err
        and "From memory, perhaps wrong: “" in recited.err
    )
    assert "Best match" not in recited.err
    alone = lift(capsys, *arguments, "--context", "none")
    assert "lift · " in alone.err and alone.out != closed.out


def test_a_document_from_standard_input_is_the_same_document(
    capsys: pytest.CaptureFixture[str], book: Path, tiny_folder: Path, home: Path
) -> None:
    more = ["--model", tiny_folder, *SMALL]
    absorbed = lift(capsys, "absorb", "-", *more, stdin=book.read_bytes())
    assert (absorbed.code, absorbed.out) == (0, f"{only_id(home)}  The bell of Corriden\n")
    again = lift(capsys, "absorb", book, *more)
    assert again.out == f"{only_id(home)}  The bell of Corriden  (was in the library)\n"
    assert lift(capsys, "ask", "-", "Who?", *more, stdin=book.read_bytes()).err.startswith("From the library")
    titled = lift(capsys, "absorb", "-", "--title", "Another", *more, stdin=book.read_bytes())
    assert titled.out.endswith("  Another\n") and len(list((home / "library").iterdir())) == 2


def test_a_document_shorter_than_a_segment_works_with_a_note(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_folder: Path
) -> None:
    (tmp_path / "short.txt").write_text("Oswin rang.")
    arguments = ["ask", tmp_path / "short.txt", "Who rang?", "--model", tiny_folder, *SMALL]
    result = lift(capsys, *arguments)
    assert result.code == 0 and "less than one segment of 64: it is one piece" in result.err
    assert "in 1 segments" in result.err
    assert "less than one segment" not in lift(capsys, *arguments).err  # said when it is absorbed


def test_ask_by_library_id_from_any_folder(
    capsys: pytest.CaptureFixture[str], book: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.chdir(tiny_folder.parent)
    more = SMALL[:2] + SMALL[-2:]
    lift(capsys, "absorb", book, "--model", tiny_folder.name, *SMALL)  # a relative path
    by_file = lift(capsys, "ask", book, "Who rang?", "--model", tiny_folder.name, *SMALL)
    monkeypatch.chdir(book.parent)
    entry_id = only_id(home)
    result = lift(capsys, "ask", entry_id[:6], "Who rang?", *more)  # model and text come from the entry
    assert (result.code, result.out) == (0, by_file.out)
    assert f"From the library: 'The bell of Corriden' (id {entry_id})." in result.err
    assert lift(capsys, "ask", entry_id, "Who rang?", "--base", *more).code == 0
    # what would be ignored is refused; what was used then may be said again
    other = lift(capsys, "ask", entry_id, "Who?", "--set", "training.epochs=9", *more)
    assert other.code == 2 and "absorbed with another training.epochs than 9" in other.err
    assert lift(capsys, "ask", entry_id, "Who?", *SMALL).code == 0
    assert lift(capsys, "ask", entry_id, "Who?", "--set", "seed=3", *more).code == 0  # of sampling
    # a file of that name comes first
    Path(entry_id).write_text("Another text altogether.")
    named = lift(capsys, "ask", entry_id, "Who rang?", "--model", tiny_folder, *SMALL)
    assert named.code == 0 and "Absorbed" in named.err


def test_ids_that_are_none_several_or_of_another_model(
    capsys: pytest.CaptureFixture[str], book: Path, tiny_folder: Path, home: Path, tmp_path: Path
) -> None:
    lift(capsys, "absorb", book, "--model", tiny_folder, *SMALL)
    entry_id = only_id(home)
    (home / "library" / (entry_id[:-1] + "x")).mkdir()
    several = lift(capsys, "ask", entry_id[:8], "Who?")
    assert several.code == 42 and f"2 entries of the library begin with '{entry_id[:8]}'" in several.err
    missing = "0" * 16 if entry_id[0] != "0" else "1" * 16
    assert lift(capsys, "library", "show", missing).code == 42
    assert lift(capsys, "ask", missing, "Who?").code == 10
    other = save_model(tmp_path / "other", seed=1)
    result = lift(capsys, "ask", entry_id, "Who?", "--model", other)
    assert result.code == 20 and f"was absorbed by {tiny_folder}, not by {other}" in result.err


def test_unicode_goes_in_and_out(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "kühe.txt").write_text("Ωμέγα — 牛 🐄\u2028" * 30, encoding="utf-8")
    typed = "wer läutete? 牛".encode("latin-1", "replace").decode("utf-8", "surrogateescape")  # in a Latin-1 terminal
    arguments = ["ask", tmp_path / "kühe.txt", typed, "--model", tiny_folder, *SMALL]
    assert lift(capsys, *arguments).code == 0
    assert "kühe" in lift(capsys, *arguments).err
    poor = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", poor)
        assert lift(capsys, "library", "list").code == 0
    assert poor.seek(0) == 0 and "MB  k?he" in poor.read()
    folder = tmp_path / "modèle 🐄"
    folder.symlink_to(tiny_folder)
    assert lift(capsys, "ask", tmp_path / "kühe.txt", "牛?", "--model", folder, *SMALL).code == 0


# --- tasks ------------------------------------------------------------------------------------------------------------

GIVEN = [
    ("Who rang the bell?", "Oswin Tarrel."),
    ("When was that?", "On 3 May 1743."),
    ("Wo läutete es? 鐘", "In Corriden."),
]


def write_given(path: Path, count: int = 3) -> Path:
    rows = [{"question": question, "answer": answer} for question, answer in GIVEN[:count]]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_absorbing_with_given_tasks_trains_on_them(
    capsys: pytest.CaptureFixture[str], book: Path, tiny_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import liftlm.absorbing
    from liftlm.examples import NO_LOSS, make_task_examples
    from liftlm.tasks import Task

    seen: list[Any] = []
    real = liftlm.absorbing.train

    def train(model: Any, name: str, examples: Any, *more: Any, **options: Any) -> Any:
        tasks = [Task(question, answer, "given", 0, 1) for question, answer in GIVEN]
        expected = make_task_examples(tasks, model.tokenizer, "The bell of Corriden", model.window)
        # their numbers lie on disk, as a view that equals no tuple
        asked = [
            dataclasses.replace(example, tokens=tuple(example.tokens), labels=tuple(example.labels))
            for example in examples
            if NO_LOSS in example.labels
        ]
        seen.append(asked == expected)
        return real(model, name, examples, *more, **options)

    monkeypatch.setattr("liftlm.absorbing.train", train)
    tasks, more = write_given(book.parent / "tasks.jsonl"), ["--model", tiny_folder, *SMALL, "--set", "tasks.reading=0"]
    plain = lift(capsys, "absorb", book, *more)
    first = lift(capsys, "absorb", book, "--tasks", tasks, *more)
    assert plain.code == first.code == 0 and seen == [False, True]
    assert "and 3 tasks" in first.err and "and 0 tasks" in plain.err

    def card(result: Result) -> Any:
        return json.loads((home / "library" / result.out.split()[0] / "entry.json").read_text())

    assert (card(plain)["document"]["tasks"], card(first)["document"]["tasks"]) == (0, 3)
    assert plain.out.split()[0] != first.out.split()[0]
    # the same tasks are the same entry, whatever command and setting of writers; others are not
    for writer in ("none", "extractive"):
        again = lift(capsys, "absorb", book, "--tasks", tasks, *more, "--set", f"tasks.writer={writer}")
        assert again.out == first.out.rstrip("\n") + "  (was in the library)\n"
    asked = lift(capsys, "ask", book, "Who?", "--tasks", tasks, *more)
    talked = lift(capsys, "chat", book, "--tasks", tasks, *more, stdin=b"/quit\n")
    for result in (asked, talked):
        assert result.code == 0 and f"(id {first.out.split()[0]})" in result.err
    fewer = lift(capsys, "absorb", book, "--tasks", write_given(book.parent / "two.jsonl", 2), *more)
    assert fewer.code == 0 and card(fewer)["document"]["tasks"] == 2
    # how they are mixed is part of the recipe, also where no writer is on
    mixed = lift(capsys, "absorb", book, "--tasks", tasks, *more, "--set", "tasks.mix=1")
    ids = {result.out.split()[0] for result in (plain, first, fewer, mixed)}
    assert len(ids) == 4 == len(list((home / "library").iterdir()))


def test_absorbing_writes_tasks_by_itself(
    capsys: pytest.CaptureFixture[str], book: Path, tiny_folder: Path, home: Path
) -> None:
    """As it is without any setting of tasks: extractive, all of them asked without text."""
    from liftlm import LiftConfig, load_document
    from liftlm.tasks import read_tasks_file
    from liftlm.tasks.extractive import write_extractive_tasks

    settings = [setting for setting in SMALL[1::2] if setting != "tasks.writer=none"]
    more = ["--model", tiny_folder, *(part for setting in settings for part in ("--set", setting))]
    result = lift(capsys, "absorb", book, *more, "--set", "training.epochs=1")
    assert result.code == 0, result.err
    text = load_document(book).text
    expected = write_extractive_tasks(text, LiftConfig().tasks.per_sentence)
    entry = home / "library" / only_id(home)
    assert json.loads((entry / "entry.json").read_text())["document"]["tasks"] == len(expected) > 20
    assert read_tasks_file(entry / "tasks.jsonl", len(text)) == expected
    given = lift(capsys, "absorb", book, "--tasks", entry / "tasks.jsonl", *more)
    assert given.code == 0 and f"and {len(expected)} tasks" in given.err
    assert not list((home / "unfinished").iterdir())


@pytest.mark.parametrize("command", ["absorb", "ask", "ask a file", "chat"])
def test_a_bad_tasks_file_fails_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
    book: Path,
    tiny_folder: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr("liftlm.models.load_model", lambda *arguments, **more: pytest.fail("loaded"))
    bad = write_given(book.parent / "tasks.jsonl", 1)
    with bad.open("a") as file:
        file.write('\n{"question": "Why?"}\n')
    (book.parent / "q.jsonl").write_text('{"question": "Who?"}\n')
    rest = {"ask": ["Who?"], "ask a file": ["--questions", book.parent / "q.jsonl"]}.get(command, [])
    for path, words in ((bad, f"Line 3 of {bad} has no answer."), (book.parent / "none.jsonl", "does not exist")):
        arguments = [command.split()[0], book, *rest, "--tasks", path, "--model", tiny_folder, *SMALL]
        result = lift(capsys, *arguments, stdin=b"Who?\n")
        assert (result.code, result.out) == (18, "") and words in result.err and "Traceback" not in result.err
    assert not home.exists()


# --- chat -------------------------------------------------------------------------------------------------------------


def test_chat(capsys: pytest.CaptureFixture[str], book: Path, talker: Path) -> None:
    more = ["--model", talker, *SMALL]
    long = "long " * 300
    lines = f"Who rang the bell?\n\n{long}\nWhen?\n/quit\nnever asked\n".encode()
    result = lift(capsys, "chat", book, *more, stdin=lines)
    assert result.code == 0 and "About 'The bell of Corriden'." in result.err
    assert result.err.count("Error: The question takes") == 1 and ">" not in result.err  # no prompt without a terminal
    first = lift(capsys, "ask", book, "Who rang the bell?", *more)
    assert result.out.startswith(first.out) and len(result.out) > len(first.out)  # and the second answer
    assert lift(capsys, "chat", book, "--base", *more, stdin=b"").out == ""  # Ctrl-D
    assert lift(capsys, "chat", book, "--base", *more, stdin=b"Wer l\xe4utete?").code == 0  # Latin-1
    result = lift(capsys, "chat", "-", stdin=b"text")
    assert result.code == 2 and "standard input" in result.err


# --- library, export, config ------------------------------------------------------------------------------------------


def test_library_commands(
    capsys: pytest.CaptureFixture[str], book: Path, tiny_folder: Path, home: Path, tmp_path: Path
) -> None:
    for command in ("list", "verify"):
        empty = lift(capsys, "library", command)
        assert empty == Result(0, "", f"The library at {home} is empty.\n")
    lift(capsys, "absorb", book, "--model", tiny_folder, *SMALL)
    entry_id = only_id(home)
    (line,) = lift(capsys, "library", "list").out.splitlines()
    assert line.startswith(f"{entry_id}  20") and line.endswith("  The bell of Corriden") and "tiny-llama" in line
    card = json.loads(lift(capsys, "library", "show", entry_id[:4]).out)
    assert card["title"] == "The bell of Corriden" and card["config"]["training"]["epochs"] == 2
    assert card["model"]["folder"] == str(tiny_folder) and card["machine"]["packages"]["torch"]
    assert lift(capsys, "library", "verify") == Result(0, f"{entry_id}  whole\n", "")
    (home / "library" / entry_id / "document.txt").write_text("forged")
    result = lift(capsys, "library", "verify", entry_id[:8])
    assert (result.code, result.out) == (41, f"{entry_id}  document.txt was changed\n")
    assert "Damaged entries: 1 of 1" in result.err
    for target in ("..", ".", "", "../unfinished", str(tmp_path), "*", f"{entry_id}/adapter"):
        for command in ("remove", "show", "verify"):
            assert lift(capsys, "library", command, target).code == 42
    assert lift(capsys, "library", "remove", entry_id[:8]) == Result(0, "", f"Removed {entry_id}.\n")
    assert book.exists() and list((home / "library").iterdir()) == []


def test_export_commands(
    capsys: pytest.CaptureFixture[str], book: Path, tiny_folder: Path, home: Path, tmp_path: Path
) -> None:
    lift(capsys, "absorb", book, "--model", tiny_folder, *SMALL)
    target = tmp_path / "new" / "adapter"
    done = lift(capsys, "export", only_id(home)[:5], "--to", "peft", "--out", target)
    assert done.code == 0
    serve = f"vllm serve {tiny_folder} --enable-lora --max-lora-rank 8 --lora-modules {only_id(home)}={target}"
    assert serve in done.err
    assert sorted(path.name for path in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    for existing in (target, tmp_path, "."):
        again = lift(capsys, "export", only_id(home), "--to", "peft", "--out", existing)
        assert again.code == 2 and "exists already" in again.err
    assert lift(capsys, "export", only_id(home), "--to", "merged", "--out", tmp_path / "merged").code == 0
    assert lift(capsys, "ask", book, "Who?", "--base", "--model", tmp_path / "merged", *SMALL).code == 0
    assert lift(capsys, "export", only_id(home), "--to", "gguf", "--out", tmp_path / "a.gguf").code == 0
    assert (tmp_path / "a.gguf").read_bytes()[:4] == b"GGUF"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert lift(capsys, "export", only_id(home), "--to", "peft", "--out", book / "below").code == 31
    unknown = lift(capsys, "export", only_id(home), "--to", target, "--out", tmp_path / "b")
    assert unknown.code == 2 and "--to peft, --to merged or --to gguf" in unknown.err


def test_config_prints_what_it_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from liftlm import LiftConfig, load_config

    assert load_config(None) == LiftConfig()
    printed = lift(capsys, "config", "--set", "training.epochs=7", "--set", "adapter.target_modules=[q_proj]")
    (tmp_path / "a.yaml").write_text(printed.out)
    config = load_config(tmp_path / "a.yaml")
    assert config.training.epochs == 7 and config.adapter.target_modules == ("q_proj",)
    assert lift(capsys, "config", "--config", tmp_path / "a.yaml") == printed
    assert lift(capsys, "config", "--set", "training.epoch=7").code == 2


# --- terminals, pipes and signals -------------------------------------------------------------------------------------


def metrics(step: int, steps: int = 40) -> Any:
    from liftlm.training import StepMetrics

    return StepMetrics(
        step=step,
        steps=steps,
        epoch=1,
        loss=2.5,
        learning_rate=1e-3,
        grad_norm=1.0,
        tokens=128,
        tokens_per_second=512.4,
        memory_bytes=1_500_000_000,
        seconds_left=75.0,
    )


@pytest.mark.parametrize("title", ["[/red] and [bold]brackets[/bold] :smile:", "x" * 200])
def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, title: str) -> None:
    from rich.console import Console

    from liftlm import display

    screen = io.StringIO()
    screened = Console(file=screen, force_terminal=True, width=120, emoji=False)
    monkeypatch.setattr(display.console, "rich", screened, raising=False)
    with display.TrainingDisplay(title) as shown:
        shown(metrics(1))
        shown(metrics(40))
    text = screen.getvalue()
    assert (
        title[:35] in text and "40/40" in text and "512 tokens/s" in text and "1:15 left" in text and "1.5 GB" in text
    )
    assert "\n\n" not in text  # the bar fits on its line


def test_what_stands_under_the_bar_is_drawn_anew_and_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from liftlm import display

    screen, scores = io.StringIO(), ["nothing yet"]
    screened = Console(file=screen, force_terminal=True, width=120, emoji=False)
    monkeypatch.setattr(display.console, "rich", screened, raising=False)
    with display.TrainingDisplay("Absorbing", below=lambda: scores[0]) as shown:
        shown.draw()  # before any step
        assert "nothing yet" in screen.getvalue() and "Absorbing" not in screen.getvalue()
        shown(metrics(40))
        scores[0] = "two answers"
        shown.draw()
        assert screen.getvalue().rindex("two answers") > screen.getvalue().rindex("40/40")
    erased = screen.getvalue().rpartition("two answers")[2]
    assert erased.count("\x1b[2K") >= 2, "left on the screen, where the final table follows"
    monkeypatch.setattr(display.console, "rich", Console(file=(log := io.StringIO()), width=120), raising=False)
    with display.TrainingDisplay("Absorbing", below=lambda: scores[0]) as shown:
        shown.draw()
    assert log.getvalue() == "", "no terminal"


def test_progress_elsewhere_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from liftlm import display

    clock = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    with display.TrainingDisplay("Absorbing 'a [b] :smile:'") as shown:
        for step in range(1, 41):
            shown(metrics(step))
            clock[0] += 1.0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and [line.split(" step ")[1].split("/")[0] for line in lines] == ["1", "11", "21", "31", "40"]
    assert lines[0].startswith("Absorbing 'a [b] :smile:': step 1/40 · epoch 1 · loss 2.500 · 512 tokens/s")


def test_times_are_readable() -> None:
    from liftlm.display import minutes

    assert [minutes(seconds) for seconds in (0, 59.4, 59.6, 3599.4, 3600, 90061)] == [
        *("0:00", "0:59", "1:00", "59:59", "1:00:00", "25:01:01"),
    ]


@pytest.mark.parametrize("command", ["config", "ask"])
def test_a_reader_that_stops_reading(
    capsys: pytest.CaptureFixture[str], command: str, book: Path, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lift … | head -0`: short output fails when it is flushed, streamed output at once."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    more = [book, "Who rang?", "--base", "--model", talker, *SMALL] if command == "ask" else []
    result = lift(capsys, command, *more)
    assert result == Result(141, "", "")


def test_other_processes_of_a_launch_are_silent(
    capsys: pytest.CaptureFixture[str], book: Path, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liftlm.display import console

    arguments = [book, "--model", talker, *SMALL]
    assert lift(capsys, "absorb", *arguments).code == 0
    monkeypatch.setenv("RANK", "1")
    try:
        assert lift(capsys, "absorb", *arguments) == Result(0, "", "")
        assert lift(capsys, "ask", book, "Who?", *arguments[1:]) == Result(0, "", "")
    finally:
        console.quiet = False


def test_a_process_of_its_own(book: Path, talker: Path) -> None:
    """`python -m liftlm` in a Latin-1 terminal, ended by SIGTERM between two turns."""
    process = start("chat", book, "--base", "--model", talker, *SMALL, env={"PYTHONIOENCODING": "latin-1"})
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("Wer läutete?\n".encode("latin-1"))
    process.stdin.flush()
    assert process.stdout.readline() != b""
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and b"Stopped by SIGTERM" in err and b"Traceback" not in err
