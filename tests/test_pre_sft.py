"""Pre-LIFT fine-tuning: gradients against plain PyTorch, resuming bit for bit, streaming, leakage, bad corpora, and use."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import save_model
from liftlm import Document, LiftConfig, load_config, load_model
from liftlm.adapters import attach_adapter, use_adapter
from liftlm.errors import ConfigError, CorpusError, TerminatedWorkError
from liftlm.examples import plan_steps
from liftlm.library import Library
from liftlm.likelihood import continuation_nlls
from liftlm.pre_sft.corpus import check_corpus, stream_corpus
from liftlm.pre_sft.gradients import document_gradient
from liftlm.pre_sft.leakage import find_leaks
from liftlm.pre_sft.lessons import Lesson, make_lesson
from liftlm.pre_sft.running import pre_sft
from liftlm.prompts import question_turn, render_prompt
from liftlm.studies.registry import make_study
from liftlm.studies.running import load_items
from liftlm.studies.study import Options
from liftlm.training import StepMetrics
from test_cli import Result, lift

NAMES = ("Oswin", "Mara", "Jonas", "Brigid", "Tobit", "Leonie", "Ivo")
SETTINGS = [
    "model.dtype=float32",
    "segments.segment_tokens=128",
    "tasks.per_sentence=1",
    "training.batch_tokens=256",
    "training.checkpoint_seconds=0",
    "adapter.rank=4",
    "adapter.alpha=8",
    "adapter.dropout=0.1",
    "pre_sft.documents_per_step=2",
    "pre_sft.document_tokens=512",
    "pre_sft.tasks=3",
    "pre_sft.inner_steps=2",
    "pre_sft.learning_rate=3e-3",
]


def story(number: int) -> str:
    name = NAMES[number]
    lines = [
        f"In {1700 + 10 * number + k} {name} of house {number} counted {k + 3} grey bells by the lake."
        for k in range(14)
    ]
    return " ".join(lines)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Seven documents: some with questions, one line each."""
    rows: list[dict[str, Any]] = []
    for number in range(7):
        row: dict[str, Any] = {"title": f"Story {number}", "text": story(number)}
        if number % 2:
            row["questions"] = [{"question": "Who counted bells?", "answer": NAMES[number]}]
        rows.append(row)
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", window=512)


def config(folder: Path, *more: str) -> LiftConfig:
    return load_config(None, [*SETTINGS, f"model.name={folder}", *more])


def start_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "start" / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


# --- gradients --------------------------------------------------------------------------------------------------------


def plain_loss(model: Any, examples: list[Any]) -> torch.Tensor:
    """Mean over all targets, from whole logits, one example at a time."""
    total, count = torch.zeros(()), 0
    for example in examples:
        logits = model.network(input_ids=torch.tensor([example.tokens])).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += example.targets
    return total / count


def reference(model: Any, lesson: Lesson, settings: LiftConfig, number: int) -> dict[str, torch.Tensor]:
    """FOMAML or Reptile written out, with torch's own AdamW."""
    parameters = model.adapters["x"].parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    training = settings.training
    optimizer = torch.optim.AdamW(
        list(parameters.values()),
        lr=settings.pre_sft.inner_learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.eps,
        weight_decay=training.weight_decay,
    )
    steps = [
        step
        for epoch in range(5)
        for step in plan_steps(lesson.absorb, training.batch_tokens, epoch, settings.seed + number)
    ][: settings.pre_sft.inner_steps]
    for examples in [*([lesson.absorb[i] for i in step] for step in steps), lesson.ask]:
        optimizer.zero_grad()
        plain_loss(model, examples).backward()
        if examples is lesson.ask and settings.pre_sft.algorithm == "fomaml":
            break
        torch.nn.utils.clip_grad_norm_(parameters.values(), training.max_grad_norm)
        optimizer.step()
    if settings.pre_sft.algorithm == "fomaml":
        found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    else:
        found = {name: start[name] - p.detach() for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(start[name])
            p.grad = None
    return found


@pytest.mark.parametrize("algorithm", ["fomaml", "reptile"])
def test_meta_gradients_are_those_of_plain_pytorch(algorithm: str, folder: Path, corpus: Path) -> None:
    settings = config(folder, f"pre_sft.algorithm={algorithm}", "adapter.dropout=0", "pre_sft.inner_learning_rate=5e-3")
    model = load_model(str(folder), settings.model)
    settings = model.resolve(settings)
    item = next(stream_corpus(check_corpus([str(corpus)]), 1))
    lesson = make_lesson(model, item, settings, 1)
    assert lesson.absorb and lesson.ask
    attach_adapter(model, "x", settings.adapter, 0)
    with use_adapter(model, "x", training=True):
        parameters = model.adapters["x"].parameters()
        with torch.no_grad():
            for number, p in enumerate(parameters.values()):  # B starts at zero, where A's gradient is zero too
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
        before = {name: p.detach().clone() for name, p in parameters.items()}
        found = document_gradient(model, parameters, lesson, settings, "meta", 1)
        assert found is not None
        assert all(torch.equal(before[name], p) for name, p in parameters.items()), "the start is as it was"
        expected = reference(model, lesson, settings, 1)
    for name, tensor in expected.items():
        assert float(tensor.norm()) > 0
        assert float((found.gradients[name] - tensor).norm()) < 2e-3 * float(tensor.norm()), name


def test_the_papers_gradient_is_that_of_all_examples(folder: Path, corpus: Path) -> None:
    settings = config(folder, "adapter.dropout=0")
    model = load_model(str(folder), settings.model)
    settings = model.resolve(settings)
    lesson = make_lesson(model, next(stream_corpus(check_corpus([str(corpus)]))), settings, 0)
    attach_adapter(model, "x", settings.adapter, 0)
    with use_adapter(model, "x", training=True):
        parameters = model.adapters["x"].parameters()
        found = document_gradient(model, parameters, lesson, settings, "sft", 0)
        plain_loss(model, lesson.absorb + lesson.ask).backward()
        assert found is not None
        for name, p in parameters.items():
            assert p.grad is not None
            assert torch.allclose(found.gradients[name], p.grad, atol=1e-5, rtol=1e-3), name


def test_what_is_asked_was_not_absorbed_where_there_are_no_questions(folder: Path, corpus: Path) -> None:
    settings = config(folder, "pre_sft.reading=0", "tasks.per_sentence=2", "pre_sft.tasks=50")
    model = load_model(str(folder), settings.model)
    item = next(stream_corpus(check_corpus([str(corpus)])))
    lesson = make_lesson(model, item, model.resolve(settings), 0)
    absorbed = {example.tokens for example in lesson.absorb}
    assert lesson.ask and not absorbed & {example.tokens for example in lesson.ask}


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "more"),
    [("sft", ()), ("meta", ()), ("meta", ("pre_sft.algorithm=reptile",)), ("sft", ("adapter.kind=full",))],
    ids=["sft", "fomaml", "reptile", "full"],
)
def test_stopped_and_crashed_it_ends_the_same_bit_for_bit(
    mode: Any, more: tuple[str, ...], folder: Path, corpus: Path, tmp_path: Path
) -> None:
    def run(out: Path, on_step: Any = lambda metrics: None) -> Any:
        return pre_sft([str(corpus)], out, config(folder, *more), mode=mode, on_step=on_step)

    heard: list[int] = []
    whole = run(tmp_path / "whole", lambda metrics: heard.append(metrics.step))
    assert heard == [1, 2, 3, 4] and whole.steps == 4, "seven documents, two a step"

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def crash(metrics: StepMetrics) -> None:
        if metrics.step == 4:
            raise RuntimeError("crash")

    with pytest.raises(TerminatedWorkError, match="step 2 of 4"):
        run(tmp_path / "parts", stop)
    assert not (tmp_path / "parts").exists() and (tmp_path / "parts.unfinished").is_dir()
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path / "parts", crash)
    resumed = run(tmp_path / "parts")
    assert resumed.resumed_from == 3 and not (tmp_path / "parts.unfinished").exists()
    model = "model.safetensors"
    assert same(load_file(tmp_path / "whole" / model), load_file(tmp_path / "parts" / model))
    assert not same(load_file(tmp_path / "whole" / model), load_file(folder / model)), "something was learnt"
    if "adapter.kind=full" not in more:
        assert same(start_of(tmp_path / "whole"), start_of(tmp_path / "parts"))
    rows = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_the_result_serves_as_model_and_as_start(
    folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = [part for setting in SETTINGS for part in ("--set", setting)]
    result: Result = lift(capsys, "pre-sft", corpus, "--out", out, "--mode", "meta", "--model", folder, *flags)
    assert result.code == 0 and result.out.strip() == str(out), result.err
    assert json.loads((out / "pre-sft.json").read_text())["mode"] == "meta"
    assert lift(capsys, "pre-sft", corpus, "--out", out, "--model", folder, *flags).code == 2, "nothing is overwritten"

    document = Document("Story", story(6))
    one_step = ["training.total_tokens=1", "training.learning_rate=1e-9", "training.warmup_fraction=0"]
    fresh, begun = config(folder, *one_step), config(folder, *one_step, f"adapter.start={out}")
    model = load_model(str(folder), fresh.model)
    library = Library()
    plain, _ = library.absorb_once(document, model, fresh)
    started, new = library.absorb_once(document, model, begun)
    assert new and plain.id != started.id, "the start is part of what decides an adapter"
    stored = start_of(out)
    kept = load_file(library.path / started.id / "adapter" / "adapter_model.safetensors")
    assert all(torch.allclose(kept[name], stored[name], atol=1e-6) for name in stored), "it began there"
    # the merged model says the same as the base model with the start on it
    ids = torch.tensor([model.encode(document.text)[:200]])
    merged = load_model(str(out), fresh.model)
    with torch.no_grad(), use_adapter(model, started.id):
        assert float(merged.loss_sum(ids, ids)) == pytest.approx(float(model.loss_sum(ids, ids)), rel=1e-4)
    with pytest.raises(ConfigError, match="rank 4"):
        library.absorb_once(document, model, config(folder, f"adapter.start={out}", "adapter.rank=8"))
    with pytest.raises(ConfigError, match="no starting adapter"):
        library.absorb_once(document, model, config(folder, f"adapter.start={tmp_path}"))
    (tmp_path / "book.txt").write_text(document.text)
    asked = lift(
        capsys, "ask", tmp_path / "book.txt", "Who?", "--start", out, "--model", folder, "--context", "none", *flags,
        "--set", "answering.max_new_tokens=4",
    )  # fmt: skip
    assert asked.code == 0, asked.err


@pytest.mark.parametrize("kind", ["gated-memory", "prefix"])
def test_what_cannot_be_merged_is_refused(
    kind: str, folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: one wrote a model without what was learnt, the other died of a RuntimeError."""
    out = tmp_path / "out"
    result = lift(capsys, "pre-sft", corpus, "--out", out, "--model", folder, "--set", f"adapter.kind={kind}")
    assert result.code == 2 and "Traceback" not in result.err, result.err
    assert f"adapter.kind={kind}" in result.err and "adapter.kind=lora or full" in " ".join(result.err.split())
    assert not list(tmp_path.glob("out*")), "nothing was begun"


@pytest.mark.parametrize("setting", ["tasks.teacher_weight", "training.drift_weight"])
def test_what_only_absorbing_knows_is_refused(
    setting: str, folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: the first was passed over in silence."""
    out = tmp_path / "out"
    result = lift(capsys, "pre-sft", corpus, "--out", out, "--model", folder, "--set", f"{setting}=0.5")
    assert result.code == 2 and setting in result.err and not list(tmp_path.glob("out*"))


def test_the_study_tells_practice_from_knowledge(
    folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The start as it is, before anything is absorbed, answers as it does without a study."""
    start, out, text = tmp_path / "start", tmp_path / "out", story(5).replace(NAMES[5], "Zelma")
    flags = [part for setting in SETTINGS for part in ("--set", setting)]
    assert lift(capsys, "pre-sft", corpus, "--out", start, "--mode", "meta", "--model", folder, *flags).code == 0
    data = tmp_path / "new.jsonl"
    asked = [{"question": "Who told it?", "answer": "the ferryman", "evidence": text[:40]}]
    data.write_text(json.dumps({"title": "New", "text": text, "questions": asked}))
    flags += ["--set", f"adapter.start={start}", "--set", "model.window=512"]
    study = ["study", "pre-sft", "--quick", "--out", out, "--data", data, "--model", folder, *flags]
    done = lift(capsys, *study)
    assert done.code == 0 and "nothing absorbed: " in done.out + done.err, done.err
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert {(row["arm"], row["method"]) for row in rows} == {
        *(("base model", method) for method in ("closed-book", "icl")),
        *((arm, method) for arm in ("with 0", "without 1", "with 1") for method in ("lift", "lift+icl")),
    }
    likelihood = {row["arm"]: row["likelihood"] for row in rows if row["method"] in ("closed-book", "lift")}
    settings = config(folder, "model.window=512").model
    model = load_model(str(folder), settings)
    prompt = render_prompt(model.tokenizer, [question_turn(model.tokenizer, "New", "Who told it?")])
    answer = model.encode("the ferryman")
    for arm, found in (("base model", model), ("with 0", load_model(str(start), settings))):
        (nll,) = continuation_nlls(found, prompt, [answer])
        assert likelihood[arm] == pytest.approx(-nll / len(answer), rel=1e-3), arm


def test_the_study_refuses_what_the_start_was_trained_on(
    folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, data = tmp_path / "start", tmp_path / "asked.jsonl"
    pre_sft([str(corpus)], start, config(folder))
    card = json.loads((start / "pre-sft.json").read_text())["corpus"]
    assert card["titles"] == [f"Story {number}" for number in range(7)]
    assert card["ids"] == [hashlib.sha256(story(number).encode()).hexdigest() for number in range(7)]
    new = story(5).replace(NAMES[5], "Zelma")

    def check(title: str, text: str, characters: int | None = None) -> list[Any]:
        asked = [{"question": "Who?", "answer": "Zelma", "evidence": text[:40]}]
        data.write_text(json.dumps({"title": title, "text": text, "questions": asked}))
        options = Options(sources=(("", str(data)),), characters=characters)
        return load_items(make_study("pre-sft"), config(folder, f"adapter.start={start}"), options)

    assert len(check("Another", new)) == 1 and len(check("Another", new, 200)) == 1
    for title in ("Story 5", "STORY  5", " story\t5. "):
        with pytest.raises(ConfigError, match="was trained on"):
            check(title, new)
    for characters in (None, 200):  # cut it is another text
        with pytest.raises(ConfigError, match="was trained on 'Another'"):
            check("Another", story(5), characters)
    del card["ids"]  # of a start that was made before they were noted
    whole = json.loads((start / "pre-sft.json").read_text()) | {"corpus": card}
    (start / "pre-sft.json").write_text(json.dumps(whole))
    assert len(check("Another", story(5))) == 1
    with pytest.raises(ConfigError, match="was trained on"):
        check("story 5", story(5))


# --- the corpus -------------------------------------------------------------------------------------------------------


def test_a_corpus_is_read_as_it_is_needed(corpus: Path) -> None:
    found = check_corpus([str(corpus)])
    assert (found.documents, found.questions) == (7, 3)
    with corpus.open("a") as file:
        file.write("not JSON\n")
    items = stream_corpus(found, 4)  # one line is read ahead, as the next may be about the same text
    assert [next(items).document.title, next(items).document.title] == ["Story 4", "Story 5"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file or folder"),
        ("", "not a document"),
        ("{}\n", "known format"),
        ('{"text": 3}\n', 'no text "text"'),
        ("nonsense\n", "not JSON"),
        ('{"title": "A", "text": "too short"}\n', "less than 50 words"),
        (json.dumps({"title": "A", "text": story(0)}) * 2, "not JSON"),
        ((json.dumps({"title": "A", "text": story(0)}) + "\n") * 2 + json.dumps({"text": story(1)}), ""),
    ],
)
def test_a_bad_corpus_is_refused(
    content: str | None, words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    if words:
        result = lift(capsys, "pre-sft", path, "--out", tmp_path / "out", "--model", folder)
        assert result.code == 26 and words in result.err and "Traceback" not in result.err
    else:  # lines of one text that follow each other are one document with several questions
        assert check_corpus([str(path)]).documents == 2


def test_a_document_twice_or_to_be_kept_out_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="twice"):
        check_corpus([str(corpus), str(corpus)])
    with pytest.raises(CorpusError, match="kept out"):
        check_corpus([f"{corpus}:0-3"], [f"{corpus}:3-6"])
    assert check_corpus([f"{corpus}:0-3"], [f"{corpus}:4-6"]).documents == 4


def test_leakage_by_title_and_by_text() -> None:
    words = [f"word{number}" for number in range(300)]
    kept = Document("The Old Mill", " ".join(words))
    clean = Document("Another", " ".join(f"other{number}" for number in range(300)))
    assert find_leaks([clean], [kept]) == []
    (title,) = find_leaks([Document("the_old  mill!", clean.text)], [kept])
    assert title.by == "title"
    part = Document("Copied", f"{clean.text} {' '.join(words[100:150]).upper()}.")  # 38 runs of 288
    (text,) = find_leaks([part], [kept])
    assert text.by == "text" and text.shared == pytest.approx(38 / 288)
    twelve = Document("Quoted", f"{clean.text} {' '.join(words[100:112])}")
    assert find_leaks([twelve], [kept]) == [], "twelve words are no run of thirteen"
    phrase = Document("Phrase", f"{clean.text} {' '.join(words[100:114])}")  # 2 runs of 288
    assert find_leaks([phrase], [kept]) == [] and find_leaks([phrase], [kept], most_shared=0.0)


SPLIT = Path(__file__).parent.parent / "configs" / "pre-sft-split.json"


def numbers(source: str) -> tuple[str, set[int]]:
    """PATH:N-M → the path, and the documents' numbers; without any a hundred."""
    path, _, span = source.partition(":")
    first, _, last = span.partition("-")
    return path, set(range(int(first), int(last or first) + 1)) if span else set(range(100))


def test_the_split_is_that_of_the_start_that_is_reported() -> None:
    split = json.loads(SPLIT.read_text())
    page = (SPLIT.parents[1] / "docs" / "results" / "pre-sft.md").read_text()
    command, study = page.replace("\\\n", " ").split("lift pre-sft ")[1].split("\n\n")[0].split("lift study pre-sft ")
    assert split["train"] == re.findall(r"DATA/(\S+)", command.split("--out")[0])
    asked: dict[str, set[int]] = {}
    for path, documents in map(numbers, split["evaluate"]):
        asked.setdefault(path, set()).update(documents)
    for path, documents in map(numbers, re.findall(r"--data DATA/(\S+)", study)):
        assert documents <= asked[path], f"{path} is asked in the study"
    for path, documents in map(numbers, split["train"]):
        assert not documents & asked.get(path, set()), f"{path} is trained on and asked"


@pytest.mark.skipif("LIFT_TEST_DATA" not in os.environ, reason="the documents are not part of the repository")
def test_the_split_that_was_trained_on_does_not_leak() -> None:
    data = Path(os.environ["LIFT_TEST_DATA"])
    split = json.loads(SPLIT.read_text())
    paths = {name: [str(data / path) for path in split[name]] for name in ("train", "evaluate")}
    assert check_corpus(paths["train"], paths["evaluate"]).documents > 20


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("mode", ["sft", "meta"])
def test_two_processes_make_the_start_of_one(mode: Any, folder: Path, corpus: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, "adapter.dropout=0", "model.device=cpu"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    command += ["-m", "liftlm", "pre-sft", str(corpus), "--out", str(tmp_path / "two"), "--mode", mode]
    command += ["--model", str(folder), *(part for setting in settings for part in ("--set", setting))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "two"), "one of them keeps the books"
    assert json.loads((tmp_path / "two" / "pre-sft.json").read_text())["report"]["processes"] == 2
    pre_sft([str(corpus)], tmp_path / "one", load_config(None, [*settings, f"model.name={folder}"]), mode=mode)
    one, two = start_of(tmp_path / "one"), start_of(tmp_path / "two")
    model = load_model(str(folder), config(folder).model)
    attach_adapter(model, "x", config(folder).adapter, 0)
    fresh = copy.deepcopy(dict(model.adapters["x"].tensors()))
    moved = sum(float((one[name] - fresh[name]).square().sum()) for name in one) ** 0.5
    apart = sum(float((one[name] - two[name]).square().sum()) for name in one) ** 0.5
    assert moved > 0 and apart < 0.02 * moved  # AdamW turns rounding of tiny gradients into steps of their own
