"""`lift demo` with a tiny random model: what it trains on, what it prints and what it writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import save_model
from liftlm import load_config
from liftlm.demo import fitted, is_right
from test_cli import lift


def test_less_is_trained_where_training_is_slow(tiny_model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    slow, quick = (dataclasses.replace(tiny_model, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    config, told = load_config(None, []), load_config(None, ["training.total_tokens=700"])
    assert fitted(config, slow, full=False).training.total_tokens == 50_000
    assert "--full" in capsys.readouterr().err
    for settings, model, full in ((config, slow, True), (config, quick, False), (told, slow, False)):
        assert fitted(settings, model, full) is settings
    assert capsys.readouterr().err == ""


def test_six_ways_side_by_side(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIFT_HOME", str(tmp_path / "home"))
    flags = ["--model", save_model(tmp_path / "m", window=512), "--window", "512", "--out", tmp_path / "out.json"]
    for setting in ("training.total_tokens=2000", "segments.segment_tokens=256", "answering.max_new_tokens=3"):
        flags += ["--set", setting]
    first = lift(capsys, "demo", *flags)
    assert first.code == 0, first.err
    result = json.loads((tmp_path / "out.json").read_text())
    ways = ["plain model", "in-context, truncated", "LIFT alone", "LIFT + in-context", "retrieval", "LIFT + retrieval"]
    assert list(result["right"]) == ways and {len(rows) for rows in result["answers"].values()} == {10}
    assert 1500 < result["report"]["tokens"] < 2500
    for way in ways:
        assert f"{way:<21}   {result['right'][way]}/10" in first.out
        assert first.out.count(f"\n  {way:<21}  ") == 10  # under each question
    assert "from the library" not in first.out
    again = lift(capsys, "demo", *flags)
    assert again.code == 0 and "from the library" in again.out
    assert json.loads((tmp_path / "out.json").read_text())["right"] == result["right"]


@pytest.mark.parametrize(
    ("answer", "kind", "keys", "right"),
    [
        ("It was Oswin Hale, in 1742.", "fact", ["oswin|hale", "1742"], True),
        ("It was Oswin Hale.", "fact", ["oswin|hale", "1742"], False),
        ("Foswin came in 1742.", "fact", ["oswin", "1742"], False),  # a key begins a word
        ("The flood, then the fire.", "timeline", ["flood", "fire"], True),
        ("The fire came after the flood.", "timeline", ["flood", "fire"], False),
    ],
)
def test_what_counts_as_right(answer: str, kind: str, keys: list[str], right: bool) -> None:
    assert is_right(answer, {"kind": kind, "keys": keys}) is right
