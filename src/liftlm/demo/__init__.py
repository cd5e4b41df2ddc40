"""The demonstration: an invented chronicle that no model can know, absorbed and asked about in six ways.

The chronicle and its questions are original work made for this program.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from liftlm.config import LiftConfig
from liftlm.devices import describe_machine, peak_memory
from liftlm.display import TrainingDisplay, minutes, note
from liftlm.documents import Document
from liftlm.storage import write_file

if TYPE_CHECKING:
    from liftlm.answering import Answer
    from liftlm.models import Model

# Without bfloat16 training takes twice as long; then about half of it, so that the demonstration ends within ten minutes.
_SLOW_TOKENS = 50_000

# (column, whether the adapter is on, context policy)
_ARMS = (
    ("plain model", False, "none"),
    ("in-context, truncated", False, "truncate"),
    ("LIFT alone", True, "none"),
    ("LIFT + in-context", True, "truncate"),
    ("retrieval", False, "retrieve"),
    ("LIFT + retrieval", True, "retrieve"),
)


def load_demo() -> tuple[Document, list[dict[str, Any]]]:
    """The chronicle and its questions: rows of id, kind, question, answer, keys, evidence, shown."""
    folder = resources.files("liftlm") / "demo"
    data = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    text = (folder / data["document"]).read_text(encoding="utf-8")
    return Document(title=data["title"], text=text, source=data["document"]), data["questions"]


def is_right(answer: str, row: dict[str, Any]) -> bool:
    """Whether every key of the row (alternatives parted by |) is in the answer; for a timeline in the keys' order.

    A question that asks which of two comes first is right when its key comes before any other event's mention, so an answer that
    names both must name the right one first.
    """
    text = " ".join(answer.lower().split())
    positions = []
    for key in row["keys"]:
        found = [
            match.start()
            for option in key.lower().split("|")
            if (match := re.search(rf"(?<!\w){re.escape(option)}", text))
        ]
        if not found:
            return False
        positions.append(min(found))
    return row["kind"] != "timeline" or positions == sorted(positions)


def fitted(config: LiftConfig, model: Model, full: bool) -> LiftConfig:
    """The settings, with less training where the processor is slow at it, unless all of it is wanted or they say how much."""
    slow = model.device.type == "cpu" and model.dtype == torch.float32
    if not slow or full or config.training.total_tokens is not None:
        return config
    note(
        f"In float32, which is slow here, training takes {_SLOW_TOKENS:,} tokens, about half, "
        "to end within ten minutes (--full: on all)."
    )
    return config.model_copy(update={"training": config.training.model_copy(update={"total_tokens": _SLOW_TOKENS})})


def run_demo(
    model: Model, config: LiftConfig, *, every: bool = False, full: bool = False, out: Path | None = None
) -> None:
    """Absorbs the chronicle (or takes it from the library), asks in six ways, prints the answers side by side.

    every: ask all 36 questions instead of the ten shown ones (the counts then cover all; the ten are printed).

    full: the whole training also where `fitted` would take less.

    out: every answer with the resolved config and the machine, as JSON.
    """
    from liftlm.answering import answer_all
    from liftlm.library import Library

    document, rows = load_demo()
    rows = [row for row in rows if every or row["shown"]]
    config = fitted(config, model, full)
    tokens = len(model.encode(document.text))
    note(
        f"'{document.title}': {len(document.text.split()):,} words, {tokens:,} tokens; the window holds {model.window:,}."
    )
    with TrainingDisplay("Absorbing") as display:
        adapter, new = Library().absorb_once(document, model, config, on_step=display)
    report = adapter.report
    answers: dict[str, list[Answer]] = {}
    seconds: dict[str, float] = {}
    for name, absorbed, context in _ARMS:
        settings = config.model_copy(update={"answering": config.answering.model_copy(update={"context": context})})
        note(f"Answering {len(rows)} questions: {name}")
        started = time.monotonic()
        answers[name] = answer_all(
            model, adapter if absorbed else None, [row["question"] for row in rows], document=document, config=settings
        )
        seconds[name] = time.monotonic() - started
    right = {
        name: [is_right(given.answer, row) for given, row in zip(answers[name], rows, strict=True)]
        for name, _, _ in _ARMS
    }
    _print(rows, answers, right, seconds)
    quoted = _right_if_quoted(rows, answers)
    found = ", ".join(f"{name} {count}/{len(rows)}" for name, count in quoted.items())
    print(f"\nThe best sentence found, quoted instead of read, would be right: {found}.")
    print(
        f"\nAbsorbing: {tokens:,} tokens, {report.steps} steps, {minutes(report.seconds)}"
        f"{'' if new else ' (earlier; now from the library)'}, {report.tokens_per_second:.0f} tokens/s, mean loss "
        f"{report.losses}. Peak memory of the process: {peak_memory() / 1e9:.1f} GB."
    )
    if out is not None:
        result = {
            "config": adapter.config.model_dump(mode="json"),
            "machine": describe_machine(model.device, model.dtype),
            "report": dataclasses.asdict(report),
            "peak_memory_bytes": peak_memory(),
            "seconds": seconds,
            "right": {name: sum(values) for name, values in right.items()},
            "right_if_quoted": quoted,
            "answers": {name: [dataclasses.asdict(given) for given in answers[name]] for name in answers},
        }
        write_file(out, json.dumps(result, indent=1, ensure_ascii=False))


def _right_if_quoted(rows: list[dict[str, Any]], answers: dict[str, list[Answer]]) -> dict[str, int]:
    """Of the ways that retrieve: how many questions the best sentence found would answer."""
    return {
        name: sum(is_right(given.sources[0], row) for given, row in zip(answers[name], rows, strict=True))
        for name, _, context in _ARMS
        if context == "retrieve"
    }


def _print(
    rows: list[dict[str, Any]],
    answers: dict[str, list[Answer]],
    right: dict[str, list[bool]],
    seconds: dict[str, float],
) -> None:
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(name) for name in answers)
    for index, row in enumerate(rows):
        if row["shown"]:
            console.print(f"\n{row['question']}", style="bold", markup=False)
            console.print(f"  {'expected':<{width}}    {row['answer']}", markup=False)
            for name in answers:
                mark = "✓" if right[name][index] else "·"
                console.print(
                    f"  {name:<{width}}  {mark} {' '.join(answers[name][index].answer.split())}", markup=False
                )
    print(f"\n{'':<{width}}  right  seconds for all")
    for name in answers:
        print(f"{name:<{width}}  {sum(right[name]):>2}/{len(rows):<2}  {seconds[name]:>8.1f}")
