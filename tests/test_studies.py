"""Studies on a tiny model: a folder with everything that is promised, resumed row by row, and verdicts that follow intervals."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from conftest import save_model
from liftlm.config import load_config
from liftlm.models import load_model
from liftlm.studies.registry import make_study
from liftlm.studies.running import run_study
from liftlm.studies.study import Conclusion, Options


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", window=1024)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(str(folder))


def run(name: str, model: Any, out: Path, *settings: str, **options: Any) -> Conclusion:
    study = make_study(name)
    config = load_config(None, [f"model.name={model.folder}", *settings], dict(study.defaults) | {"model.window": 1024})
    return run_study(study, out, config, Options(quick=True, **options), "lift study …", model)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["overlap", "tasks", "baseline", "domains", "failures", "adapters"])
def test_a_study_leaves_a_whole_folder(name: str, model: Any, tmp_path: Path) -> None:
    conclusion = run(name, model, tmp_path, seeds=(0, 1))
    there = {path.name for path in tmp_path.iterdir()}
    assert {"study.json", "rows.jsonl", "figures.csv", "verdict.json", "report.md", "report.html", "plots"} <= there
    report = (tmp_path / "report.md").read_text()
    assert conclusion.verdict.outcome in ("confirmed", "not confirmed", "not decidable at this size")
    assert conclusion.verdict.outcome in report and "Seeds: 0, 1." in report
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").iterdir())
    figures = list(csv.DictReader((tmp_path / "figures.csv").open()))
    assert figures and all(row["seeds"] in ("0", "0 1") and int(row["units"]) > 0 for row in figures)
    assert all(row["low"] and row["high"] for row in figures if int(row["units"]) >= 3)
    assert {row["seed"] for row in rows(tmp_path)} == {0, 1}
    assert not list((tmp_path / "work").rglob("*.safetensors")), "adapters are gone once they were asked"


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
