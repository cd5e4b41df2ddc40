"""Predicted and real memory of training, one fresh process a row: `python benchmarks/memory.py`.

Prints a table: segment length, gradient checkpointing, bytes predicted beyond the loaded model, bytes taken at the peak.

With `--lengths FILE`: the peak of absorbing a document of 4,000 … 128,000 tokens, with tasks, drawn into that PNG. Each run is
the default recipe with segments of 512 tokens, so that all steps are alike, and ends after 12 steps; tasks and examples of the
whole document are made. One length alone: `--length 4000`.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LENGTHS = (512, 1024, 2048)
DOCUMENTS = (4000, 16000, 64000, 128000)  # tokens


def measure(tokens: int, checkpointing: str) -> None:
    """Two steps of one segment each, in this process."""
    from liftlm import load_config, load_model
    from liftlm.adapters import attach_adapter
    from liftlm.devices import current_memory, peak_memory
    from liftlm.examples import Example
    from liftlm.memory import predict_memory
    from liftlm.training import train

    model = load_model()
    settings = [
        f"training.batch_tokens={tokens}",
        "training.epochs=1",
        f"training.gradient_checkpointing={checkpointing}",
    ]
    config = load_config(None, settings)
    draw = random.Random(0)
    rows = [tuple(draw.randrange(100, 40000) for _ in range(tokens)) for _ in range(2)]
    examples = [Example(row, row) for row in rows]
    for parameter in model.network.parameters():
        parameter.sum()  # weights are read from disk when they are first touched
    before = current_memory(model.device)
    adapter = attach_adapter(model, "measured", config.adapter, 0)
    predicted = predict_memory(model, adapter.parameters(), examples, config.training)
    train(model, "measured", examples, config)
    print(json.dumps({"predicted": predicted, "taken": peak_memory() - before}))


def measure_length(tokens: int, steps: int = 12) -> None:
    """Absorbs a text of so many tokens for some steps, in this process."""
    from liftlm import Document, absorb, load_config, load_model
    from liftlm.demo import load_demo
    from liftlm.devices import current_memory, peak_memory

    model = load_model()
    config = load_config(None, ["segments.segment_tokens=512"])
    for parameter in model.network.parameters():
        parameter.sum()  # weights are read from disk when they are first touched
    loaded = current_memory(model.device)
    chronicle = load_demo()[0].text
    text, number = "", 0
    while len(text) < tokens * 6:
        number += 1
        text += f"Book {number} begins. {chronicle}\n\n"  # so that sentences differ at their beginnings at least
    document = Document("A long chronicle", model.decode(model.encode(text)[:tokens]))
    taken: list[int] = []

    class Enough(Exception):
        pass

    def note(metrics: Any) -> None:
        taken.append(metrics.steps)
        if len(taken) == steps:
            raise Enough

    began = peak_memory()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        absorb(document, model, config, folder=Path(folder), on_step=note)
    print(json.dumps({"tokens": tokens, "loaded": loaded, "before": began, "peak": peak_memory(), "steps": taken[0]}))


def draw_lengths(target: Path) -> None:
    rows = []
    print("| document | steps of the whole run | loaded GB | peak GB |\n|---|---|---|---|")
    for tokens in DOCUMENTS:
        command = [sys.executable, "-W", "ignore", __file__, "--length", str(tokens)]
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append(row)
        print(f"| {tokens:,} | {row['steps']:,} | {row['loaded'] / 1e9:.2f} | {row['peak'] / 1e9:.2f} |", flush=True)
    paint_lengths(rows, target)


def paint_lengths(rows: list[dict[str, Any]], target: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([row["tokens"] for row in rows], [row["peak"] / 1e9 for row in rows], "o-", label="peak of absorbing")
    axes.plot([row["tokens"] for row in rows], [row["loaded"] / 1e9 for row in rows], "o--", label="the model, loaded")
    axes.set(xscale="log", xlabel="tokens of the document", ylabel="GB of the process", ylim=(0, None))
    axes.set_xticks([row["tokens"] for row in rows], [f"{row['tokens']:,}" for row in rows])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, format="png", metadata={"Software": None})


def main() -> None:
    if sys.argv[1:2] == ["--length"]:
        measure_length(int(sys.argv[2]))
        return
    if sys.argv[1:2] == ["--lengths"]:
        draw_lengths(Path(sys.argv[2]))
        return
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]), sys.argv[2])
        return
    print("| segment | gradient checkpointing | predicted GB | taken GB | ratio |")
    print("|---|---|---|---|---|")
    for checkpointing in ("false", "true"):
        for tokens in LENGTHS:
            command = [sys.executable, "-W", "ignore", __file__, str(tokens), checkpointing]
            row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            ratio = row["predicted"] / row["taken"]
            print(
                f"| {tokens} | {checkpointing} | {row['predicted'] / 1e9:.2f} | {row['taken'] / 1e9:.2f} | {ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
