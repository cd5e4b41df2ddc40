"""A whole evaluation on a tiny model: every method, resuming, failing rows, processes, and the commands around it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import save_model
from fake_server import FakeServer
from liftlm import load_config, load_model
from liftlm.absorbing import adapter_id
from liftlm.adapters import use_adapter
from liftlm.cli import app
from liftlm.config import LiftConfig
from liftlm.demo import load_demo
from liftlm.documents import Document
from liftlm.errors import BenchmarkDataError, ConfigError
from liftlm.evaluation import scoring
from liftlm.evaluation.benchmark import Item, Question
from liftlm.evaluation.interference import measure_interference
from liftlm.evaluation.needles import Needles, hide
from liftlm.evaluation.own_questions import OwnQuestions
from liftlm.evaluation.predicting import METHODS, Predictor, control_of
from liftlm.evaluation.registry import benchmark_classes, make_benchmark
from liftlm.evaluation.scoring import score_folder
from liftlm.likelihood import continuation_nlls
from liftlm.models import Model
from liftlm.shelf import Shelf
from liftlm.windows import fill_window

QUICK = [
    "tasks.per_sentence=1", "training.batch_tokens=512", "answering.retrieval.count=1", "answering.retrieval.neighbours=0",
    "answering.retrieval.rerank=3", "segments.segment_tokens=64",
]  # fmt: skip
FIRST = "The ferryman Oswin Tarrel rang the bell. Mara Quill cast it from old coins. It hung for a hundred years. " * 3
SECOND = "Nobody mended the bridge before autumn. The miller Jonas Vale paid for the stones. " * 4


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"document": FIRST, "title": "Bell", "question": "Who cast the bell?", "answer": ["Mara Quill", "Quill"],
         "evidence": "Mara Quill cast it from old coins."},
        {"document": FIRST, "title": "Bell", "question": "How long did it hang?", "answer": "a hundred years",
         "choices": ["a day", "a hundred years"]},
        {"document": SECOND, "title": "Bridge", "question": "Who paid?", "answer": "Jonas Vale",
         "evidence": ["The miller Jonas Vale paid for the stones."]},
    ]  # fmt: skip
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv("LIFT_HOME", str(tmp_path / "home"))
    return load_model(str(save_model(tmp_path / "m", window=512)))


def config() -> LiftConfig:
    return load_config(None, QUICK)


def predict(model: Model, data: Path, folder: Path, methods: list[str], **options: Any) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    benchmark = OwnQuestions()
    benchmark.max_new_tokens = 8  # type: ignore[misc]
    Predictor(model, config(), benchmark, folder, on_row=rows.append, **options).predict(benchmark.load(data), methods)
    return rows


def test_every_method_is_predicted_once_and_scored(model: Model, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    rows = predict(model, data, folder, list(METHODS))
    by_method = {name: [row for row in rows if row["method"] == name] for name in METHODS}
    for name, way in METHODS.items():
        assert len(by_method[name]) == (2 if way.text == "evidence" else 3), name
        for row in by_method[name]:
            assert row["error"] is None and row["answer_nll"] > 0 and row["prompt_tokens"] > 0
            assert (row["context_tokens"] == 0) == (way.text == "none") == (row["context_id"] is None)
    texts = {row["id"]: row["text"] for row in map(json.loads, (folder / "contexts.jsonl").open())}
    shown = {name: [texts.get(row["context_id"]) for row in by_method[name]] for name in METHODS}
    assert shown["oracle"] == ["Mara Quill cast it from old coins.", "The miller Jonas Vale paid for the stones."]
    assert shown["icl-full"] == shown["icl"] == [FIRST, FIRST, SECOND]
    assert "miller Jonas Vale paid" in str(shown["rag-sentences"][2])
    for text in ("icl", "rag", "oracle"):
        assert shown[f"lift-other+{text}"] == shown[f"lift+{text}"] == shown[text], "the control reads the same text"
    choice = next(row for row in by_method["closed-book"] if row["choices"])
    assert [tokens for _, tokens in choice["choice_nlls"]] == [len(model.encode(text)) for text in choice["choices"]]
    # the likelihood is that of a plain forward pass over prompt and answer
    prompt_of = {row["question"]: row for row in by_method["closed-book"]}
    from liftlm.prompts import question_turn, render_prompt

    for question, row in prompt_of.items():
        prompt = render_prompt(model.tokenizer, [question_turn(model.tokenizer, row["title"], question)])
        answer = model.encode(row["answers"][0])
        with torch.no_grad():
            logits = model.network(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected = -sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)) / len(answer)
        assert row["answer_nll"] == pytest.approx(expected, rel=1e-4)
    absorbed = list(map(json.loads, (folder / "absorbs.jsonl").open()))
    assert [(row["title"], row["absorbed_title"], row["control"]) for row in absorbed] == [
        ("Bell", "Bell", False), ("Bell", "Bridge", True), ("Bridge", "Bridge", False), ("Bridge", "Bell", True),
    ]  # fmt: skip
    assert all((row["interference"] is None) == row["control"] for row in absorbed)
    # the control beside text is the other document's adapter at the strength that lift has there
    ask = next(row for row in by_method["lift-other+icl"] if row["title"] == "Bell")
    adapter_of = {(row["title"], row["control"]): row["adapter_id"] for row in absorbed}
    filled = fill_window(
        model,
        [OwnQuestions().wording(Document("Bell", FIRST), Question("", ask["question"], ("",)))],
        [],
        lambda budget: model.encode(FIRST)[:budget],
        8,
        True,
        chat=True,
    )
    with use_adapter(model, adapter_of["Bell", True], strength=config().answering.strength_with_text):
        (own,) = continuation_nlls(model, filled.tokens, [model.encode(ask["answers"][0])])
    assert ask["answer_nll"] == pytest.approx(own / ask["answer_nll_tokens"], rel=1e-5)
    scores = score_folder(folder, OwnQuestions()).methods
    assert set(scores) == set(METHODS) == set(scoring.METHODS) and scores["lift"]["n"] == 3
    # again: nothing is missing; a method more predicts only itself
    assert predict(model, data, folder, list(METHODS)) == []


def test_resumes_after_a_torn_line_and_tries_failed_rows_again(model: Model, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    first = predict(model, data, folder, ["closed-book"])
    path = folder / "predictions.jsonl"
    kept = path.read_text().splitlines()
    failed = json.loads(kept[1]) | {"error": "it was too dark"}
    path.write_text(kept[0] + "\n" + json.dumps(failed) + "\n" + kept[2][:40])  # killed while writing
    again = predict(model, data, folder, ["closed-book"])
    assert sorted(row["id"] for row in again) == sorted(row["id"] for row in first[1:])
    assert predict(model, data, folder, ["closed-book"]) == []
    assert score_folder(folder, OwnQuestions()).methods["closed-book"]["n"] == 3


def test_answers_of_another_length_are_predicted_anew(model: Model, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    predict(model, data, folder, ["closed-book"])
    benchmark = OwnQuestions()
    benchmark.max_new_tokens = 2  # type: ignore[misc]
    rows: list[dict[str, Any]] = []
    Predictor(model, config(), benchmark, folder, on_row=rows.append).predict(benchmark.load(data), ["closed-book"])
    assert [row["answer_tokens"] <= 2 for row in rows] == [True] * 3
    assert score_folder(folder, OwnQuestions()).methods["closed-book"]["n"] == 3


def test_the_chronicle_alone_has_no_control(model: Model, tmp_path: Path) -> None:
    """Regression: it was its own control."""
    row = {"document": load_demo()[0].text, "question": "Who rang?", "answer": "Oldacre"}
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ConfigError, match="no other document to absorb") as caught:
        predict(model, path, tmp_path / "out", ["closed-book", "lift-other"])
    assert "--methods" in caught.value.next_step and not list((tmp_path / "out").glob("predictions*"))


def test_no_control_has_learnt_the_needle(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"Sentence number {number} tells of nothing much." for number in range(400)))
    together = Needles(lengths=[1000], depths=[0.1, 0.5, 0.9], together=True).load(book)
    depths = Needles(lengths=[1000], depths=[0.1, 0.9], needles=["password"]).load(book)
    two = Needles(lengths=[1000], depths=[0.1, 0.9], needles=["password", "san-francisco"]).load(book)
    for items in (together, depths, two):
        for index, item in enumerate(items):
            assert control_of(items, index).text != item.document.text
            for question in item.questions:
                assert question.evidence[0] not in control_of(items, index).text
    assert {control_of(together, index).title for index in range(3)} == {load_demo()[0].title}, "all hold the needles"
    assert control_of(two, 0) == two[1].document, "the next haystack hides the other needle"


def test_the_control_is_the_next_document_without_the_evidence() -> None:
    def item(text: str, *evidence: str) -> Item:
        return Item(Document(text[:3], text), (Question("0", "Who?", ("x",), evidence),))

    asked = item("A man rang. He left.", "A man rang.")
    copy, line_break, other = item("A man  rang. He left."), item("So a man sat. A man\nrang."), item("A woman rang.")
    assert control_of([asked, copy, line_break, other], 0) == other.document, "white space makes no other text"
    assert control_of([other, asked, line_break], 1) == other.document, "after the last comes the first"
    assert control_of([item("A man rang. He left."), line_break], 0) == line_break.document, (
        "no evidence, nothing to skip"
    )
    chronicle = load_demo()[0]
    part = chronicle.text[:200]
    with pytest.raises(ConfigError, match="no other document"):
        control_of([item(part, part)], 0)


def test_another_control_is_asked_anew(model: Model, data: Path, tmp_path: Path) -> None:
    """As when --limit grows, and with it what stands next to a document."""
    folder = tmp_path / "out"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    (tmp_path / "alone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert len(predict(model, tmp_path / "alone.jsonl", folder, ["lift", "lift-other"])) == 4
    again = predict(model, data, folder, ["lift", "lift-other"])
    assert sorted((row["title"], row["method"]) for row in again) == [
        ("Bell", "lift-other"), ("Bell", "lift-other"), ("Bridge", "lift"), ("Bridge", "lift-other"),
    ]  # fmt: skip
    absorbed = [json.loads(line) for line in (folder / "absorbs.jsonl").read_text().splitlines()]
    controls = [row["absorbed_title"] for row in absorbed if row["title"] == "Bell" and row["control"]]
    assert controls == [load_demo()[0].title, "Bridge"]


def test_longbench_is_cut_without_a_mark_and_asked_whole(model: Model, tmp_path: Path) -> None:
    text = " ".join(f"Number {number} is told here." for number in range(300))
    row = {"input": "Which number is the last?", "context": text, "answers": ["299"], "_id": "a", "all_classes": None}
    (tmp_path / "multifieldqa_en.jsonl").write_text(json.dumps(row))
    rows: list[dict[str, Any]] = []
    benchmark = make_benchmark("longbench/multifieldqa_en")
    out = tmp_path / "out"
    out.mkdir()
    items = benchmark.load(tmp_path / "multifieldqa_en.jsonl")
    Predictor(model, config(), benchmark, out, on_row=rows.append).predict(items, ["icl"])
    (shown,) = (json.loads(line)["text"] for line in (out / "contexts.jsonl").read_text().splitlines())
    ids, tokens = model.encode(text), rows[0]["context_tokens"]
    assert 100 < tokens < len(ids) and rows[0]["error"] is None
    assert shown == model.decode([*ids[: tokens - tokens // 2], *ids[-(tokens // 2) :]])
    bare = fill_window(
        model, [benchmark.wording(items[0].document, items[0].questions[0])], [], lambda budget: [0], 64, True
    )
    assert rows[0]["prompt_tokens"] == len(bare.tokens) - 1 + tokens, "nothing of instruction and question is cut"


def test_without_the_extra_it_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liftlm.evaluation_commands.find_spec", lambda name: None if name == "matplotlib" else name)
    for command in (["evaluate", "jsonl", "--out", str(tmp_path / "out")], ["score", str(tmp_path)]):
        with pytest.raises(ConfigError, match="needs matplotlib, which") as caught:
            app(command, standalone_mode=False)
        assert "[eval]" in caught.value.next_step
    assert not (tmp_path / "out").exists()


def test_documents_are_shared_over_processes(model: Model, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shares = [predict(model, data, folder, ["closed-book"], part=(part, 2)) for part in range(2)]
    assert [len(share) for share in shares] == [2, 1]
    assert {path.name for path in folder.glob("pred*")} == {"predictions-0.jsonl", "predictions-1.jsonl"}
    assert score_folder(folder, OwnQuestions()).methods["closed-book"]["n"] == 3
    assert predict(model, data, folder, ["closed-book"]) == []


def test_a_question_that_does_not_fit_is_a_failed_row(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows = [
        {"document": FIRST, "question": "who " * 600, "answer": "x"},
        {"document": FIRST * 20, "question": "Who?", "answer": "x"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    long, whole = predict(model, path, tmp_path / "out", ["icl-full"])
    assert "more than the window" in long["error"] and "longer than the model's limit of 512" in whole["error"]
    assert predict(model, path, tmp_path / "out", ["closed-book"])[1]["error"] is None


def test_interference_of_an_adapter_that_does_nothing_is_none(model: Model) -> None:
    from liftlm.adapters import attach_adapter

    before = measure_interference(model, None, config())
    attach_adapter(model, "fresh", config().adapter, 0)
    assert measure_interference(model, "fresh", config()) == before
    assert before.general_questions == 20 and 0 <= before.general_right <= 20


def test_processes_of_a_launch_absorb_each_for_itself(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Model
) -> None:
    """As torchrun starts them, but one after the other: none may wait for the other or take its gradients."""

    def run(out: str) -> list[dict[str, Any]]:
        methods = ["--methods", "closed-book,lift,lift+recite", "--max-new-tokens", "4"]
        sets = [part for setting in QUICK for part in ("--set", setting)]
        where = ["--data", str(data), "--out", str(tmp_path / out), "--model", str(model.folder), "--window", "256"]
        app(["evaluate", "jsonl", *where, *methods, *sets], standalone_mode=False)
        found = scoring.read_predictions(tmp_path / out)[0]
        return sorted(({k: v for k, v in row.items() if k in ("id", "answer", "answer_nll")} for row in found), key=str)

    alone = run("alone")
    for rank in (0, 1):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("LIFT_HOME", str(tmp_path / f"home{rank}"))
        shared = run("shared")
        assert len(shared) == (6, 9)[rank]  # two questions of the first document by three methods, one of the second
    assert shared == alone


def test_processes_share_one_library_and_the_last_leaves_the_whole_report(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Model
) -> None:
    out = tmp_path / "shared"
    sets = [part for setting in QUICK for part in ("--set", setting)]
    command = [
        "evaluate", "jsonl", "--data", str(data), "--out", str(out), "--model", str(model.folder), "--window", "256",
        "--methods", "lift,lift-other", "--max-new-tokens", "4", *sets,
    ]  # fmt: skip
    asked, counted = [], []
    with FakeServer(reply=lambda body: "True") as server:
        for rank in (0, 1):
            for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
                monkeypatch.setenv(name, str(value))
            app([*command, "--judge-url", server.url, "--judge-model", "judge-1"], standalone_mode=False)
            asked.append(len(server.requests))
            counted.append({name: each["n"] for name, each in json.loads((out / "scores.json").read_text()).items()})
    assert counted == [{"lift-other": 2, "lift": 2}, {"lift-other": 3, "lift": 3}]
    assert asked == [4, 6], "two questions by two methods, then one more: none twice"
    assert "Jonas Vale" in (out / "report.md").read_text() and (out / "run.json").exists()
    assert len(list((tmp_path / "home" / "library").iterdir())) == 2, "the second found both adapters"


def test_an_adapter_that_another_process_is_making_is_waited_for(model: Model, data: Path, tmp_path: Path) -> None:
    """Regression: the process died of LibraryBusyError."""
    items = OwnQuestions().load(data)
    entry_id = adapter_id(items[0].document, model, config())
    held, waiting = threading.Event(), threading.Event()

    def hold() -> None:
        with Shelf().lock(entry_id):
            held.set()
            waiting.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    heard: list[str] = []

    def on_wait(document: Document) -> None:
        heard.append(document.title)
        waiting.set()

    rows = predict(model, data, tmp_path / "out", ["lift"], on_wait=on_wait)
    holder.join()
    assert heard == ["Bell"] and len(rows) == 3 and not any(row["error"] for row in rows)


def test_on_a_terminal_the_scores_stay_in_sight(data: Path, tmp_path: Path, model: Model) -> None:
    """The whole command as a person sees it: bar and table are drawn again and again, and the last table stays."""
    out = tmp_path / "out"
    sets = [part for setting in QUICK for part in ("--set", setting)]
    command = [
        sys.executable, "-m", "liftlm", "evaluate", "jsonl", "--data", str(data), "--out", str(out), "--model", str(model.folder),
        "--window", "256", "--methods", "closed-book,lift", "--max-new-tokens", "4", *sets,
    ]  # fmt: skip
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while select.select([screen], [], [], 120)[0] and (piece := os.read(screen, 1 << 16)):
                shown += piece
        if process.poll() is None and not select.select([screen], [], [], 1)[0]:
            process.kill()
        assert process.wait(120) == 0, shown.decode()
    os.close(screen)
    text = shown.decode()
    assert text.count("Absorbing") > 2 and "\x1b[1A" in text  # drawn over what was there
    tables = re.findall(r"closed-book .*?(\d) of 3", text)
    assert len(tables) > 2 and tables == sorted(tables) and tables[-1] == "3", "means as they come in"
    seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert seen.rstrip().endswith(str(out / "report.md")), seen[-300:]
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is back"


def test_the_command_from_predictions_to_report(
    model: Model, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    sets = [part for setting in QUICK for part in ("--set", setting)]
    command = [
        "evaluate", "jsonl", "--data", str(data), "--out", str(out), "--methods", "closed-book,lift,lift-other,oracle",
        "--max-new-tokens", "4", "--model", str(model.folder), "--window", "256", *sets, "--set", "seed=3", "--seed", "5",
    ]  # fmt: skip
    app(command, standalone_mode=False)
    assert capsys.readouterr().out.strip() == str(out / "report.md")
    scores = (out / "scores.json").read_bytes()
    assert set(json.loads(scores)) == {"closed-book", "lift", "lift-other", "oracle"}
    run = json.loads((out / "run.json").read_text())
    assert run["seed"] == run["config"]["seed"] == 5, "the flag comes after --set"
    assert run["benchmark"] == "jsonl" and run["config"]["model"]["window"] == 256 and run["machine"]
    assert "Who cast the bell?" in (out / "report.html").read_text() and "lift-other" in (out / "report.md").read_text()
    (out / "scores.json").unlink()
    app(["score", str(out)], standalone_mode=False)
    assert (out / "scores.json").read_bytes() == scores, "scoring can be redone, without a model"
    for wrong, words in (
        (["evaluate", "loogle-shortq", "--out", str(out)], "loogle-shortqa"),
        (["evaluate", "jsonl", "--out", str(out), "--data", str(data), "--methods", "icl,magic"], "magic"),
        (["evaluate", "jsonl", "--out", str(out), "--depths", "0.5"], "has no depths"),
        (["evaluate", "jsonl", "--out", str(out), "--together"], "has no together"),
        (["evaluate", "jsonl", "--out", str(out), "--set", "model.parallel=tensor"], "absorbs, and does not answer"),
        (["score", str(tmp_path)], "no folder of an evaluation"),
    ):
        with pytest.raises(ConfigError, match=words):
            app(wrong, standalone_mode=False)
    with pytest.raises(BenchmarkDataError, match="no data of its own"):
        app(["evaluate", "jsonl", "--out", str(out)], standalone_mode=False)


def test_running_means_are_shown_at_the_end_and_count_what_was_there(
    model: Model, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "evaluate", "jsonl", "--data", str(data), "--out", str(tmp_path / "out"), "--max-new-tokens", "4",
        "--model", str(model.folder), "--window", "256",
    ]  # fmt: skip

    def shown(methods: str) -> list[str]:
        app([*command, "--methods", methods], standalone_mode=False)
        lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
        return [line for line in lines if re.search(r"^(closed-book|icl) .* of ", line)]

    (only,) = shown("closed-book")
    assert " 3 of 3 0 " in only
    assert shown("closed-book") == [only], "nothing new, and all was there"
    path = tmp_path / "out" / "predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    both = shown("closed-book,icl")
    assert [line.split()[0] for line in both] == ["closed-book", "icl"] and all(" 3 of 3 0 " in line for line in both)
    for name, value in (("RANK", 1), ("LOCAL_RANK", 1), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    (share,) = shown("closed-book")
    assert " 1 of 1 0 " in share, "the second process's one document has one question"


def test_a_folder_is_of_one_benchmark_and_one_configuration(model: Model, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def run(*more: str, benchmark: str = "jsonl", window: str = "256", tokens: str = "4") -> None:
        asked = ["--methods", "closed-book", "--model", str(model.folder), "--window", window]
        asked += ["--max-new-tokens", tokens]
        app(["evaluate", benchmark, "--data", str(data), "--out", str(out), *asked, *more], standalone_mode=False)

    run("--limit", "2")
    files = ("predictions.jsonl", "run.json", "report.md", "scores.json")
    before = {name: (out / name).read_bytes() for name in files}
    for refused, words in (
        (lambda: run(benchmark="needle"), "holds an evaluation of jsonl, not of needle"),
        (lambda: run(window="512"), "other settings: .*window is 256 there and 512 here"),
        (lambda: run(tokens="5"), "other settings: max_new_tokens is 4 there and 5 here. Give"),
        (lambda: run("--seed", "1"), "other settings: seed is 0 there and 1 here. Give"),
        (lambda: run("--set", "training.epochs=7"), r"other settings: training.epochs is \d+ there and 7 here. Give"),
        (lambda: run("--set", "answering.temperature=0.5"), "other settings: answering.temperature is"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            refused()
        assert "another --out" in caught.value.next_step and caught.value.exit_code == 2
        assert {name: (out / name).read_bytes() for name in files} == before
    run("--methods", "icl", "--set", "answering.batch_tokens=512")  # how it is done, and more of it, may change
    assert {name: each["n"] for name, each in json.loads((out / "scores.json").read_text()).items()} == {
        "closed-book": 2, "icl": 3
    }  # fmt: skip
    run_card = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({name: run_card[name] for name in run_card if name != "settings"}))
    with pytest.raises(ConfigError, match="of an earlier version, which did not note its settings"):
        run()
    (out / "predictions.jsonl").unlink()
    run(window="128")  # a run.json without any row binds nobody


def test_needles_hidden_together_and_among_look_alikes(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = tmp_path / "book.txt"
    book.write_text("It rained on the harbour all day long. " * 40)
    names, depths = "san-francisco,password", "0.1,0.9"
    documents = {}
    for flags in ([], ["--together"], ["--together", "--distractors"]):
        out = tmp_path / f"out{len(flags)}"
        app(
            [
                "evaluate", "needle", "--data", str(book), "--out", str(out), "--methods", "closed-book", *flags,
                "--lengths", "300", "--depths", depths, "--needles", names, "--max-new-tokens", "2",
                "--model", str(model.folder), "--window", "256",
            ],
            standalone_mode=False,
        )  # fmt: skip
        rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        assert {(row["data"]["needle"], row["data"]["depth"]) for row in rows} == {
            (needle, depth) for needle in names.split(",") for depth in (0.1, 0.9)
        }
        documents[len(flags)] = {row["document_id"]: row["document_tokens"] for row in rows}
    assert [len(texts) for texts in documents.values()] == [4, 2, 2]
    assert min(documents[1].values()) > max(documents[0].values()), "more is hidden in each"
    assert min(documents[2].values()) > max(documents[1].values())


# --- benchmarks of our own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "Who?", "answer": "x"}', "Line 1 .* has no document"),
        ('{"document": "A b.", "answer": "x"}', "has no question"),
        ('{"document": "A b.", "question": "Who?"}', "has no answer"),
        ('{"document": "A b.", "question": "Who?", "answer": [1]}', "neither a text nor a list"),
        ('{"document": "A b.", "question": "Who?", "answer": "x", "choices": ["y"]}', "choices without the answer"),
        ("nonsense", "is not JSON"),
    ],
)
def test_wrong_rows_of_own_questions(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(BenchmarkDataError, match=words):
        OwnQuestions().load(path)


def test_own_documents_may_be_files(tmp_path: Path) -> None:
    (tmp_path / "bell.md").write_text("# The Bell\n\nMara Quill cast it.")
    path = tmp_path / "own.jsonl"
    path.write_text('{"document": "bell.md", "question": "Who?", "answer": "Mara Quill"}\n')
    (item,) = OwnQuestions().load(path)
    assert item.document.title == "The Bell" and "Mara Quill" in item.document.text


def test_needles_stand_at_their_depth_at_the_end_of_a_sentence(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"Sentence number {number} tells of nothing much." for number in range(400)))
    benchmark = make_benchmark("needle", lengths=[1000], depths=[0, 0.5, 1], needles=["password"])
    items = benchmark.load(book)
    assert len(items) == 3
    for item, depth in zip(items, (0, 0.5, 1), strict=True):
        sentence = item.questions[0].evidence[0]
        at = item.document.text.index(sentence)
        assert abs(at / (len(item.document.text) - len(sentence)) - depth) < 0.02
        before = item.document.text[:at].rstrip()
        assert not before or before.endswith("much.") or depth == 1
        assert [question.data["depth"] for question in item.questions] == [depth] * 2
    question = items[0].questions[0]
    assert benchmark.score(question, "It is Marigold Seventeen.")["recalled"] == 1
    half = benchmark.score(question, "marigold")
    assert half["recalled"] == 0 and half["keyword_recall"] == 0.5
    together = Needles(lengths=[1000], depths=[0.5], together=True, distractors=True).load(book)
    assert len(together) == 1 and len(together[0].questions) == 6
    for text in ("Dolores Park", "enamel kettle", "marigold", "juniper forty", "Morrow Point"):
        assert text in together[0].document.text
    with pytest.raises(BenchmarkDataError, match="fewer than 90,000"):
        Needles(lengths=[90000]).load(book)
    with pytest.raises(ConfigError, match="no needle 'pin'"):
        Needles(needles=["pin"])


def test_hide_in_letters() -> None:
    text = "One two three four. Five six seven eight. Nine ten eleven twelve."
    assert hide(text, [(0.0, "X.")]) == f"X. {text}"
    assert hide(text, [(1.0, "X.")]).strip() == f"{text} X."
    assert hide(text, [(0.3, "X.")]) == "One two three four. X. Five six seven eight. Nine ten eleven twelve."
    assert hide(text, [(0.3, "X."), (0.6, "Y.")]) == (
        "One two three four. X. Five six seven eight. Y. Nine ten eleven twelve."
    )


def test_all_names_make_a_benchmark() -> None:
    for name, kind in benchmark_classes().items():
        benchmark = make_benchmark(name)
        assert type(benchmark) is kind and benchmark.name == name
        assert benchmark.dataset and benchmark.source and benchmark.metrics and benchmark.max_new_tokens > 0
    with pytest.raises(ConfigError, match="no benchmark"):
        make_benchmark("loogle")
