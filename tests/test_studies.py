"""Studies on a tiny model: a folder with everything that is promised, resumed row by row, and verdicts that follow intervals."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from conftest import save_model
from liftlm import Document, Model
from liftlm.config import ModelConfig, load_config
from liftlm.diagnosing import Symptoms
from liftlm.errors import BenchmarkDataError, ConfigError
from liftlm.evaluation.blocks import Table
from liftlm.evaluation.corpora import cut_item, parse_source, read_items
from liftlm.models import load_model
from liftlm.studies.grading import write_sheet
from liftlm.studies.registry import make_study
from liftlm.studies.running import load_items, run_study
from liftlm.studies.study import Conclusion, Options
from liftlm.studies.task_quality import task_row
from liftlm.study_commands import _writers
from liftlm.tasks import Task
from liftlm.tasks.replies import make_messages, make_requests
from test_cli import lift

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from recorded_server import conversation_key, make_server, read_replies


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", window=1024)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(str(folder), ModelConfig(dtype="float32"))


def run(name: str, model: Any, out: Path, *settings: str, **options: Any) -> Conclusion:
    study = make_study(name)
    config = load_config(None, [f"model.name={model.folder}", *settings], dict(study.defaults) | {"model.window": 1024})
    return run_study(study, out, config, Options(quick=True, **options), "lift study …", model)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["overlap", "tasks", "baseline", "domains", "failures", "adapters", "recipes"])
def test_a_study_leaves_a_whole_folder(name: str, model: Any, tmp_path: Path) -> None:
    seeds = (0, 1) if name == "baseline" else (0,)
    conclusion = run(name, model, tmp_path, seeds=seeds)
    there = {path.name for path in tmp_path.iterdir()}
    assert {"study.json", "rows.jsonl", "figures.csv", "verdict.json", "report.md", "report.html", "plots"} <= there
    report = (tmp_path / "report.md").read_text()
    assert conclusion.verdict.outcome in ("confirmed", "not confirmed", "not decidable at this size")
    assert conclusion.verdict.outcome in report and f"Seeds: {', '.join(map(str, seeds))}." in report
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").iterdir())
    figures = list(csv.DictReader((tmp_path / "figures.csv").open()))
    assert figures and all(row["seeds"] in ("0", "0 1") and int(row["units"]) > 0 for row in figures)
    assert all(row["low"] and row["high"] for row in figures if int(row["units"]) >= 3)
    assert {row["seed"] for row in rows(tmp_path)} == set(seeds)
    assert ("## Reading kept" in report) is (name in ("adapters", "recipes"))
    assert not list((tmp_path / "work").rglob("*.safetensors")), "adapters are gone once they were asked"


@pytest.mark.parametrize("name", ["adapters", "recipes"])
def test_reading_kept_is_what_the_adapter_leaves_of_f1_beside_the_evidence(name: str, tmp_path: Path) -> None:
    def answer(unit: int, arm: str, method: str, f1: float) -> dict[str, Any]:
        named = {"document_id": "d", "unit": str(unit), "seed": 0, "kind": "fact", "arm": arm, "method": method}
        return named | {"token_f1": f1, "likelihood": -f1, "seconds": 1.0}

    answers = [answer(unit, "base model", "oracle", 0.8 if unit % 2 else 0.4) for unit in range(12)]
    answers += [answer(unit, "small", "lift+oracle", 0.2 if unit % 2 else 0.4) for unit in range(12)]
    answers += [answer(unit, "large", "lift+oracle", 0.8 if unit % 2 else 0.4) for unit in range(6)]
    answers += [answer(unit, arm, "lift", 0.9) for unit in range(12) for arm in ("small", "large")]
    costs = [{"what": "costs", "arm": arm, "document_id": "d", "unit": "0", "seed": 0} for arm in ("small", "large")]
    conclusion = make_study(name).conclude([*costs, *answers], Options(), tmp_path)
    (table,) = [block for block in conclusion.blocks if isinstance(block, Table) and "reading kept" in block.header]
    assert [(line[0], line[1][:4], line[2]) for line in table.rows] == [("small", "0.50", "12"), ("large", "1.00", "6")]
    kept = {row["arm"]: row["mean"] for row in conclusion.figures if row["metric"] == "reading_kept"}
    assert kept == {"small": pytest.approx(0.5), "large": pytest.approx(1.0)}


def check_costs(model: Any, out: Path, **options: Any) -> Conclusion:
    conclusion = run("efficiency", model, out, **options)
    found = rows(out)
    points = [row for row in found if row["what"] in ("read", "absorb")]
    assert all(row["seconds"] > 0 and row["memory_bytes"] >= 0 and row["stopped"] is None for row in points)
    first = {(row["way"], row["tokens"]): row["seconds"] for row in found if row["what"] == "first"}
    assert {way for way, _ in first} == {"no wait", "without", "with"}
    assert {row["kind"] for row in found if row["what"] == "write"} == {"in context", "LIFT"}
    before = len(found)
    run("efficiency", model, out, **options)
    assert len(rows(out)) == before, "nothing is measured twice"
    return conclusion


def test_costs_are_measured_in_processes_of_their_own(model: Any, tmp_path: Path) -> None:
    conclusion = check_costs(model, tmp_path, lengths=(64, 256))
    assert conclusion.verdict.outcome == "not decidable at this size", "two lengths tell no line from a parabola"
    report = (tmp_path / "report.md").read_text()
    assert "Time to first token" in report and "too few lengths" in report and "Long answers" in report


@pytest.mark.slow
def test_growth_is_fitted_where_there_are_lengths_enough(model: Any, tmp_path: Path) -> None:
    check_costs(model, tmp_path, seeds=(0, 1))
    assert "exponent" in (tmp_path / "figures.csv").read_text()


# --- resuming, sharing out, refusing ----------------------------------------------------------------------------------


def without_times(out: Path) -> dict[str, dict[str, Any]]:
    clock = {"seconds", "absorb_seconds"}
    found = [json.loads(line) for path in sorted(out.glob("rows*.jsonl")) for line in path.read_text().splitlines()]
    return {row["id"]: {key: value for key, value in row.items() if key not in clock} for row in found}


@pytest.fixture
def two_documents(tmp_path: Path) -> tuple[tuple[str, str], ...]:
    lines = []
    for name in ("Mara", "Jonas"):
        text = " ".join(
            f"On day {day} {name} rang bell number {day + 3} of the old town by the lake." for day in range(1, 30)
        )
        asked = [
            {
                "question": f"Which bell rang on day {day}?",
                "answer": f"Number {day + 3}",
                "evidence": text.split(". ")[day - 1],
            }
            for day in (2, 5, 9)
        ]
        lines.append(json.dumps({"title": f"The bells of {name}", "text": text, "questions": asked}))
    path = tmp_path / "bells.jsonl"
    path.write_text("\n".join(lines))
    return (("narrative", str(path)),)


def test_an_interrupted_study_continues_row_by_row(
    model: Any, tmp_path: Path, two_documents: Any, monkeypatch: Any
) -> None:
    run("baseline", model, tmp_path / "whole", sources=two_documents)
    from liftlm.evaluation import predicting

    real, count = predicting.Predictor._likelihoods, 0

    def failing(self: Any, *given: Any) -> Any:
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return real(self, *given)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(predicting.Predictor, "_likelihoods", failing)
        run("baseline", model, tmp_path / "parts", sources=two_documents)
    before = without_times(tmp_path / "parts")
    (tmp_path / "parts" / "rows.jsonl").open("a").write('{"torn')
    run("baseline", model, tmp_path / "parts", sources=two_documents)
    rows_again = [
        line for line in (tmp_path / "parts" / "rows.jsonl").read_text().splitlines() if not line.startswith('{"torn')
    ]
    after = {row["id"]: row for row in map(json.loads, rows_again)}
    assert before and set(before) < set(after) == set(without_times(tmp_path / "whole"))
    assert len(rows_again) == len(after), "nothing was done twice"
    assert (tmp_path / "parts" / "figures.csv").read_text() == (tmp_path / "whole" / "figures.csv").read_text()


@pytest.mark.slow
def test_processes_share_the_documents(model: Any, tmp_path: Path, two_documents: Any) -> None:
    run("overlap", model, tmp_path / "one", sources=two_documents)
    run("overlap", model, tmp_path / "two", sources=two_documents, jobs=2)
    assert {path.name for path in (tmp_path / "two").glob("rows*")} == {"rows-0.jsonl", "rows-1.jsonl"}
    one, two = without_times(tmp_path / "one"), without_times(tmp_path / "two")
    assert set(one) == set(two)
    assert all(one[key].get("likelihood") == pytest.approx(two[key].get("likelihood"), rel=0.02) for key in one)


def test_a_document_is_absorbed_once_for_itself_and_as_the_control_of_another(
    model: Any, tmp_path: Path, two_documents: Any
) -> None:
    run("baseline", model, tmp_path, sources=two_documents)
    absorbs = [json.loads(line) for line in next((tmp_path / "arms").glob("*/absorbs.jsonl")).read_text().splitlines()]
    took = {(row["adapter_id"], row["seconds"]) for row in absorbs}
    assert len(absorbs) == 4 and len({adapter for adapter, _ in took}) == len(took) == 2
    methods = {row["method"] for row in rows(tmp_path)}
    assert methods >= {"lift-other", "lift-other+icl"}
    assert not list((tmp_path / "work").rglob("*.safetensors"))


def test_rows_of_other_settings_do_not_count(model: Any, tmp_path: Path, two_documents: Any) -> None:
    run("baseline", model, tmp_path, sources=two_documents)
    first = (tmp_path / "figures.csv").read_text()
    run("baseline", model, tmp_path, "training.learning_rate=5e-3", sources=two_documents)
    assert (tmp_path / "figures.csv").read_text() != first
    assert len({row["setup"] for row in rows(tmp_path)}) == 2
    run("baseline", model, tmp_path, sources=two_documents)
    assert (tmp_path / "figures.csv").read_text() == first


def test_what_cannot_be_studied_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"

    def refused(code: int, words: str, *arguments: Any) -> None:
        result = lift(capsys, "study", *arguments, "--out", out, "--model", folder)
        assert result.code == code and words in result.err and "Traceback" not in result.err, result.err

    refused(2, "no study 'overlaps'", "overlaps")
    refused(2, "--seeds cannot be 'x'", "overlap", "--seeds", "x")
    refused(2, "--graded goes with the study tasks", "overlap", "--graded", "sheet.csv")
    refused(2, "--writers goes with the study tasks", "overlap", "--writers", "llm")
    refused(2, "absorbs, and does not answer", "overlap", "--set", "model.parallel=tensor")
    refused(19, "no file or folder", "overlap", "--data", tmp_path / "none.jsonl")
    (tmp_path / "text.txt").write_text("Nobody asks about this. " * 40)
    refused(19, "No document has questions", "baseline", "--data", tmp_path / "text.txt")
    (tmp_path / "arms.yaml").write_text("fast: {training.speed: 9}\n")
    refused(2, "Unknown setting 'training.speed'", "adapters", "--arms", tmp_path / "arms.yaml", "--quick")
    refused(2, "compares with and without a start", "pre-sft", "--quick")
    out.mkdir(exist_ok=True)
    (out / "study.json").write_text('{"study": "tasks"}')
    refused(2, "holds the study 'tasks'", "overlap", "--quick")


def test_an_arm_may_not_change_behind_its_name(model: Any, tmp_path: Path, two_documents: Any) -> None:
    arms = tmp_path / "arms.yaml"

    def study(text: str) -> set[str]:
        arms.write_text(text)
        run("recipes", model, tmp_path / "out", sources=two_documents, documents=1, arms=arms)
        return {row["arm"] for row in rows(tmp_path / "out") if row.get("what") == "costs"}

    assert study("small: {adapter.rank: 2}\n") == {"small"}
    before = len(rows(tmp_path / "out"))
    with pytest.raises(ConfigError, match="'small' has other settings"):
        study("small: {adapter.rank: 3}\n")
    assert len(rows(tmp_path / "out")) == before
    assert study("small: {adapter.rank: 2}\nother: {adapter.rank: 3}\n") == {"small", "other"}
    with pytest.raises(ConfigError, match="'other'"):  # of a file that came later
        study("other: {adapter.rank: 8}\n")


def test_failures_keep_the_losses_on_tasks_before_and_after(
    model: Any, tmp_path: Path, two_documents: Any, monkeypatch: Any
) -> None:
    seen = Symptoms(3.0, 2.0, [4.0, 2.0, math.nan], [1.0, 1.0, math.nan], [5.0, 4.0], [4.5, 4.5], 3.0, 3.0, [], [])
    none = dataclasses.replace(seen, trained_before=[], trained_after=[])  # of segments alone there are no tasks
    monkeypatch.setattr(
        "liftlm.studies.failures.measure_symptoms",
        lambda model, adapter, config: none if config.tasks.writer == "none" else seen,
    )
    run("failures", model, tmp_path, sources=two_documents, documents=1)
    found = {row["arm"]: row for row in rows(tmp_path)}
    losses = ("trained_before", "trained_after", "held_out_before", "held_out_after")
    assert [found["default"][name] for name in losses] == [3.0, 1.0, 4.5, 4.5]
    assert [found["segments only"][name] for name in losses] == [None, None, 4.5, 4.5]
    assert found["default"]["trained_gain"] == 3.0 - 1.0, "the gain is their difference"
    figures = {(row["arm"], row["metric"]): row for row in csv.DictReader((tmp_path / "figures.csv").open())}
    assert float(figures["default", "trained_before"]["mean"]) == 3.0
    assert ("segments only", "trained_before") not in figures and ("segments only", "held_out_after") in figures
    assert "trained before" in (tmp_path / "report.md").read_text()


def test_named_settings_are_arms_without_new_code(model: Any, tmp_path: Path, two_documents: Any) -> None:
    (tmp_path / "arms.yaml").write_text(
        "small: {adapter.rank: 2}\nlarge: {adapter.rank: 8}\nwhole: {adapter.kind: full}\n"
    )
    run("adapters", model, tmp_path / "out", sources=two_documents, documents=1, arms=tmp_path / "arms.yaml")
    costs = {row["arm"]: row for row in rows(tmp_path / "out") if row.get("what") == "costs"}
    assert set(costs) == {"small", "large", "whole"}
    assert costs["small"]["adapter_megabytes"] < costs["large"]["adapter_megabytes"]
    assert costs["large"]["training_tokens"] > 0
    needles = [row for row in rows(tmp_path / "out") if row.get("kind") == "needle" and row["method"] == "lift"]
    assert needles and all(row["recalled"] in (0.0, 1.0) for row in needles)


def test_a_sheet_is_exported_graded_and_read_back(model: Any, tmp_path: Path, two_documents: Any) -> None:
    run("tasks", model, tmp_path, sources=two_documents)
    sheet = tmp_path / "sheet.csv"
    lines = list(csv.DictReader(sheet.open()))
    assert 3 <= len(lines) <= 50 and all(line["evidence"] and not line["faithful"] for line in lines)
    for number, line in enumerate(lines):
        line |= {"faithful": str(int(number > 0)), "answerable": "1", "useful": "5" if number else "1"}
    with (tmp_path / "graded.csv").open("w") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    before = sheet.read_text()
    run("tasks", model, tmp_path, sources=two_documents, graded=tmp_path / "graded.csv")
    assert sheet.read_text() == before, "a sheet that somebody may be filling in is left alone"
    found = {row["metric"]: row for row in csv.DictReader((tmp_path / "figures.csv").open())}
    assert float(found["human_faithful"]["mean"]) == pytest.approx(1 - 1 / len(lines), abs=1e-5)
    assert float(found["human_answerable"]["mean"]) == 1.0
    assert "Share on which the person and the program agree" in (tmp_path / "report.md").read_text()
    (tmp_path / "graded.csv").write_text((tmp_path / "graded.csv").read_text().replace(",1,1,5", ",2,1,5", 1))
    with pytest.raises(BenchmarkDataError, match="faithful cannot be '2'"):
        run("tasks", model, tmp_path, sources=two_documents, graded=tmp_path / "graded.csv")


def test_writers_are_compared_and_each_has_its_control(model: Any, tmp_path: Path, two_documents: Any) -> None:
    replies = tmp_path / "replies.jsonl"  # recorded, and replayed to the writer
    items = [item for _, source in two_documents for item in read_items(parse_source(source))]
    with replies.open("w") as file:
        for item in items:
            for request in make_requests(cut_item(item, 3000).document.text):
                pair = {"kind": "fact", "question": "What rang on that day?", "answer": request.sentence.text}
                key = conversation_key(make_messages(request, 1))
                file.write(json.dumps({"key": key, "reply": {"tasks": [pair | {"question": f"Say {key}?"}]}}) + "\n")
    recorded = read_replies([replies])
    with make_server(recorded, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        llm = [f"tasks.llm.base_url=http://127.0.0.1:{server.server_address[1]}/v1", "tasks.llm.model=recorded"]
        run("tasks", model, tmp_path / "out", *llm, sources=two_documents, writers=("self", "llm"), questions=4)
        server.shutdown()
    found = rows(tmp_path / "out")
    sets = {(row["writer"], row["document_id"]): row for row in found if row.get("what") == "set"}
    assert {writer for writer, _ in sets} == {"extractive", "self", "llm"}
    assert all(sets["llm", item.document.id]["tasks"] > 0 for item in items), "what was recorded passes the filters"
    asked = {(row["writer"], row["method"]) for row in found if row.get("with") == "tasks"}
    assert asked == {(w, m) for w in ("extractive", "self", "llm") for m in ("lift", "lift+icl", "lift-other")}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "lift: llm − extractive" in report and "self: lift − lift-other" in report
    with pytest.raises(ConfigError, match="no writer 'elm'"):
        _writers("self,elm")


def test_the_sheet_has_as_many_tasks_of_each_writer(tmp_path: Path) -> None:
    many = [{"id": f"e{n}", "writer": "extractive", "question": "?"} for n in range(300)]
    few = [{"id": f"l{n}", "writer": "llm", "question": "?"} for n in range(30)]
    shown = {"title": "x", "evidence": "e", "answer": "a", "kind": "k"}
    sheet = write_sheet(tmp_path, [row | shown for row in (*many, *few)], 0)
    drawn = [line["id"] for line in csv.DictReader(sheet.open())]
    assert len(set(drawn)) == 50 and sum(name.startswith("l") for name in drawn) == 25
    turns = [name[0] for name in drawn]
    assert turns != ["e", "l"] * 25, "the order tells nothing"


def test_questions_are_drawn_of_each_class_alike(model: Any, two_documents: Any, tmp_path: Path) -> None:
    data = tmp_path / "asked.jsonl"
    facts = [{"question": f"Which bell rang on day {day}?", "answer": f"{day}"} for day in range(20)]
    causes = [{"question": f"Why did bell {day} ring?", "answer": f"{day}"} for day in range(3)]
    text = "On day 3 the bell rang. " * 20
    data.write_text(json.dumps({"title": "x", "text": text, "questions": [*facts, *causes]}) + "\n")
    config = load_config(None, [f"model.name={model.folder}"], {})
    (item,) = load_items(make_study("tasks"), config, Options(sources=(("", str(data)),), questions=6))
    assert sorted(question.data["class"] for question in item.questions) == ["causal"] * 3 + ["factual"] * 3


def test_a_task_whose_evidence_does_not_fit_the_window_has_no_gain(tiny_model: Model) -> None:
    """Regression: NaN, which is no JSON, was written into rows.jsonl."""
    text = "The bell rang. " * 40 + "Oswin heard it."
    document = Document(title="x", text=text)
    fits, not_this = (
        Task("Who heard it?", "Oswin.", "who", 600, len(text)),
        Task("Who rang?", "It.", "who", 0, len(text)),
    )
    tiny_model.window = 200
    rows = [task_row(tiny_model, document, task) for task in (fits, not_this)]
    assert rows[0]["evidence_gain"] is not None and rows[0]["answerable"] in (0.0, 1.0)
    assert rows[1]["evidence_gain"] is None and rows[1]["answerable"] is None
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
