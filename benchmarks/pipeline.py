"""How far writing and training overlap: `python benchmarks/pipeline.py`, or `--tiny` for a quick check.

A local server of the OpenAI protocol writes as fast as the model trains: training alone is measured first, and the server's
delay set accordingly. Then (a) writing alone, (b) training alone on what was written, (c) both through `absorb`, as
`lift absorb --set tasks.writer=llm` does it. Prints a table and (c) / max(a, b), wanted: at most 1.15.

Writing overlaps with the epoch in which tasks arrive, so a single one is measured. With more (--set training.epochs=3) the later
ones follow when all is written, and (c) is longer by them; `--pace epoch` makes writing as long as one of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liftlm import Document, LiftConfig, Model

TESTS = Path(__file__).resolve().parent.parent / "tests"
WANTED = 1.15


def serve(delay: float, slots: int) -> None:
    """The server, in a process of its own so that it takes nothing from the trainer; ends with its standard input."""
    sys.path.insert(0, str(TESTS))
    from fake_server import FakeServer

    with FakeServer(delay_seconds=delay, slots=slots) as server:
        print(server.url, flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def running_server(delay: float, slots: int) -> Iterator[str]:
    command = [sys.executable, __file__, "--serve", str(delay), str(slots)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


def excerpt(sentences: int) -> Document:
    """So many sentences from the beginning of the demonstration's chronicle."""
    from liftlm import Document
    from liftlm.demo import load_demo
    from liftlm.tasks.sentences import split_into_sentences

    chronicle = load_demo()[0]
    end = split_into_sentences(chronicle.text)[sentences - 1].end
    return Document(title=chronicle.title, text=chronicle.text[:end], source=chronicle.source)


def write(document: Document, config: LiftConfig, folder: Path) -> tuple[float, int]:
    """Seconds of writing alone, and tasks."""
    from liftlm.writing import ArrivingTasks

    began = time.monotonic()
    with ArrivingTasks(document, None, config, folder, None) as arriving:
        count = len(arriving.all())
    return time.monotonic() - began, count


def train(document: Document, model: Model, config: LiftConfig, folder: Path) -> tuple[float, Any]:
    """Seconds of `absorb`, with whatever the folder holds already, and the report on training."""
    from liftlm import absorb
    from liftlm.adapters import remove_adapter

    began = time.monotonic()
    adapter = absorb(document, model, config, folder=folder)
    seconds = time.monotonic() - began
    remove_adapter(model, adapter.id)
    return seconds, adapter.report


def clear(folder: Path) -> Path:
    """The same folder with the tasks alone: training starts anew."""
    import shutil

    for old in folder.glob("checkpoint-*"):
        shutil.rmtree(old)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    return folder


def measure(
    document: Document, model: Model, settings: list[str], options: argparse.Namespace, work: Path
) -> dict[str, Any]:
    from liftlm import load_config
    from liftlm.display import note

    def config(url: str) -> LiftConfig:
        return load_config(None, [*settings, f"tasks.llm.base_url={url}"])

    slots, epochs = config("x").tasks.llm.concurrency, config("x").training.epochs
    rounds = 1 + -(-(options.sentences - 1) // slots)  # one request alone, then `slots` at a time
    rows = []
    with running_server(0.0, slots) as url:
        _, tasks = write(document, config(url), work / "written")
        train(document, model, config(url), work / "warm-up")  # imports, and the weights are touched for the first time
    for number in range(options.repeat):
        training, report = train(document, model, config("http://127.0.0.1:9"), clear(work / "written"))
        delay = training / rounds / (epochs if options.pace == "epoch" else 1)
        with running_server(delay, slots) as url:
            writing, _ = write(document, config(url), work / f"a{number}")
            both, _ = train(document, model, config(url), work / f"c{number}")
        ratio = both / max(writing, training)
        note(f"{number + 1}: writing {writing:.1f} s, training {training:.1f} s, both {both:.1f} s ({ratio:.2f})")
        rows.append({"delay": delay, "writing": writing, "training": training, "both": both, "ratio": ratio})
    return {
        "sentences": options.sentences,
        "tasks": tasks,
        "steps": report.steps,
        "training_tokens": report.tokens,
        "rounds": rounds,
        "rows": rows,
        "ratio": statistics.median(row["ratio"] for row in rows),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sentences", type=int, help="of the demonstration's chronicle; default: 60, with --tiny 40")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model")
    parser.add_argument("--repeat", type=int, default=1, help="the median ratio counts")
    parser.add_argument("--pace", choices=("run", "epoch"), default="run", help="writing takes as long as that")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--json", action="store_true", help="print one object instead of a table")
    parser.add_argument("--serve", nargs=2, type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve is not None:
        serve(options.serve[0], int(options.serve[1]))
        return
    options.sentences = options.sentences or (40 if options.tiny else 60)
    from liftlm import load_config, load_model
    from liftlm.devices import describe_machine

    fixed = ["tasks.writer=llm", "tasks.llm.model=local", "tasks.per_sentence=2", "tasks.llm.concurrency=4"]
    fixed += ["training.epochs=1"]
    with tempfile.TemporaryDirectory(prefix="liftlm-") as work:
        if options.tiny:
            sys.path.insert(0, str(TESTS))
            from conftest import save_model

            fixed += [f"model.name={save_model(Path(work) / 'model', window=2048)}", "segments.segment_tokens=512"]
        settings = [*fixed, *options.settings]
        model = load_model(config=load_config(None, settings).model)
        found = measure(excerpt(options.sentences), model, settings, options, Path(work))
        found["machine"] = describe_machine(model.device, model.dtype)
        found["config"] = model.resolve(load_config(None, settings)).model_dump(mode="json")
    if options.json:
        print(json.dumps(found, ensure_ascii=False))
        return
    print(f"{found['sentences']} sentences, {found['tasks']} tasks, {found['steps']} steps of training\n")
    print("| a sentence takes the server | writing alone (a) | training alone (b) | both (c) | c / max(a, b) |")
    print("|---|---|---|---|---|")
    for row in found["rows"]:
        seconds = " | ".join(f"{row[name]:.1f} s" for name in ("writing", "training", "both"))
        print(f"| {row['delay']:.2f} s | {seconds} | {row['ratio']:.2f} |")
    print(f"\nc / max(a, b) = {found['ratio']:.2f}, wanted: at most {WANTED}")


if __name__ == "__main__":
    main()
