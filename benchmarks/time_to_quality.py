"""Seconds of training until the demonstration's questions are answered well: ours beside the authors' recipes on their stack.

    python benchmarks/time_to_quality.py --out quality.json

Quality is the NLL of the expected answers of the chronicle's 36 questions, nats a token, with no text in the window; the
goal (`--target`) is a stated value of it. Every run is a process of its own, takes its tasks from the extractive writer, and
starts from the same weights; the clock stands still while quality is measured, and counts writing tasks, not loading the model.
A peer is stopped when it has taken `--times` the seconds that ours took. The runs:

    ours       `lift absorb` as it is by default; more with --arm NAME:SETTING,SETTING
    v4         the ICML version's recipe (configs/lift-v4.yaml) on transformers' Trainer with PEFT: tasks only, ten a sentence,
               LoRA of rank 128 and alpha 256 on all linear layers, batches of four, AdamW (0.9, 0.98), weight decay 1e-4, clipped
               at 1, learning rate 5e-5, falling to zero over five epochs
    v4-fast    one task a sentence, learning rate 3e-4, falling to zero over one epoch

Their tasks are the large model's, ours here for all: what is compared is the recipe and the stack, not the writer. Quality is
looked at after every so many seconds (a fortieth of what ours takes in all), the same for all runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parents[1] / "configs"
PEERS = ("v4", "v4-fast")  # configs/lift-….yaml
BATCH = 4  # tasks
ROWS = 12  # questions measured at once
LOOKS = 40  # at quality in the time that our run takes


class Enough(Exception):
    """The goal is reached, or the time is over."""


class Clock:
    """Seconds of work, and what quality was then. Raises Enough.

    every: seconds from one look at quality to the next (None: a fortieth of the steps); most: seconds after which it is enough.
    """

    def __init__(self, quality: Callable[[], float], target: float, every: float | None, most: float | None) -> None:
        self._quality, self._target, self._every, self._most = quality, target, every, most
        self._began = time.monotonic()
        self._stood = 0.0
        self.curve: list[tuple[float, int, float]] = []  # seconds, steps, nats a token

    def seconds(self) -> float:
        return time.monotonic() - self._began - self._stood

    def look(self, step: int, steps: int) -> None:
        """After a step: measures quality from time to time, and at the end."""
        now = self.seconds()
        over = self._most is not None and now > self._most
        since = now - (self.curve[-1][0] if self.curve else 0.0)
        due = step % max(1, steps // LOOKS) == 0 if self._every is None else since >= self._every
        if not (due or over or step == steps):
            return
        stopped = time.monotonic()
        self.curve.append((now, step, self._quality()))
        self._stood += time.monotonic() - stopped
        if over or (self._most is not None and self.curve[-1][2] <= self._target):
            raise Enough

    def reached(self) -> float | None:
        return next((seconds for seconds, _, nats in self.curve if nats <= self._target), None)


def quality_of(model: Any) -> Callable[[], float]:
    """Measures the model as it is, whatever adapter is on."""
    from liftlm.demo import load_demo
    from liftlm.examples import answer_example

    document, rows = load_demo()
    found = [answer_example(model.tokenizer, document.title, r["question"], r["answer"], model.window) for r in rows]
    examples = sorted((example for example in found if example is not None), key=len)
    batches = []
    for start in range(0, len(examples), ROWS):
        part = examples[start : start + ROWS]
        longest = max(map(len, part)) - 1  # without the token that ends an answer
        tokens = [[*each.tokens[:-1], *[0] * (longest + 1 - len(each))] for each in part]
        labels = [[*each.labels[:-1], *[-100] * (longest + 1 - len(each))] for each in part]
        batches.append((torch.tensor(tokens), torch.tensor(labels)))
    count = sum(example.targets - 1 for example in examples)

    def measure() -> float:
        training = model.network.training
        model.network.eval()
        with torch.no_grad():
            nats = sum(float(model.loss_sum(tokens, labels)) for tokens, labels in batches)
        model.network.train(training)
        return nats / count

    return measure


def run_ours(changes: list[str], target: float, every: float | None, most: float | None) -> Clock:
    from liftlm import absorb, load_config, load_model
    from liftlm.demo import load_demo

    config = load_config(None, changes)
    model = load_model(None, config.model)
    clock = Clock(quality_of(model), target, every, most)
    absorb(load_demo()[0], model, config, on_step=lambda metrics: clock.look(metrics.step, metrics.steps))
    return clock


def run_peer(name: str, changes: list[str], target: float, every: float | None, most: float | None) -> Clock:
    import transformers
    from absorb import arguments, lora, padded
    from peft import get_peft_model

    from liftlm import load_config, load_model
    from liftlm.demo import load_demo
    from liftlm.examples import make_task_examples
    from liftlm.tasks.extractive import write_extractive_tasks

    config = load_config(CONFIGS / f"lift-{name}.yaml", [*changes, "tasks.writer=extractive"])
    model = load_model(None, config.model)
    document = load_demo()[0]
    clock = Clock(quality_of(model), target, every, most)
    tasks = write_extractive_tasks(document.text, config.tasks.per_sentence, config.seed)
    examples = make_task_examples(tasks, model.tokenizer, document.title, model.window)

    class Looks(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            clock.look(state.global_step, state.max_steps)

    torch.manual_seed(config.seed)
    batches = {"per_device_train_batch_size": BATCH, "num_train_epochs": config.training.epochs}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        options = arguments(config, folder, str(model.dtype).removeprefix("torch."))
        transformers.Trainer(
            model=get_peft_model(model.network, lora(config)),
            args=transformers.TrainingArguments(**options | batches | {"lr_scheduler_type": "linear"}),
            train_dataset=examples,
            data_collator=lambda rows: padded(rows, model.tokenizer.pad_token_id),
            callbacks=[Looks()],
        ).train()
    return clock


def run(name: str, changes: list[str], target: float, every: float | None, most: float | None) -> dict[str, Any]:
    """One run in a process of its own."""
    settings = [part for change in changes for part in ("--set", change)]
    times = [
        part for key, value in (("--every", every), ("--most", most)) if value is not None for part in (key, str(value))
    ]
    command = [sys.executable, "-W", "ignore", __file__, "--run", name, "--target", str(target), *settings, *times]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{name} failed:\n{process.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(process.stdout.splitlines()[-1]) | {"name": name, "settings": changes}
    when = "not reached" if row["reached"] is None else f"reached after {row['reached']:.0f} s"
    best = min(nats for _, _, nats in row["curve"])
    print(f"{name}: {when}; {row['curve'][-1][0]:.0f} s in all, at best {best:.2f} nats", flush=True)
    return row


def told(row: dict[str, Any], ours: float, most: float) -> str:
    """How a peer's time compares with ours."""
    if row["reached"] is not None:
        return f"{row['reached'] / ours:.1f} times"
    ended = row["curve"][-1][0]
    return f"more than {ended / ours:.1f} times" if ended > most else f"never (its recipe ended after {ended:.0f} s)"


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=3.0, help="nats a token (3.0)")
    parser.add_argument("--times", type=float, default=8.0, help="of our seconds, which a peer may take (8)")
    parser.add_argument("--arm", action="append", default=[], help="NAME:SETTING=VALUE,… another run of ours")
    parser.add_argument("--set", action="append", default=[], help="a setting of all runs, such as model.threads=1")
    parser.add_argument("--peers", default=",".join(PEERS), help="of those above")
    parser.add_argument("--out", type=Path, help="a JSON file with the curves, written after every run")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--every", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--most", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(filter(None, options.peers.split(","))) - set(PEERS):
        parser.error(f"no peer is called {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    return options


def main() -> None:
    options = options_of()
    if options.run:
        rest = (options.set, options.target, options.every, options.most)
        clock = run_peer(options.run, *rest) if options.run in PEERS else run_ours(*rest)
        print(json.dumps({"curve": clock.curve, "reached": clock.reached()}))
        return
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        rows.append(row)
        if options.out:
            write(options.out, options.target, rows, options.set)
        return row

    first = keep(run("ours", options.set, options.target, None, None))
    every = first["curve"][-1][0] / LOOKS
    for arm in options.arm:
        name, _, settings = arm.partition(":")
        keep(run(name, [*options.set, *filter(None, settings.split(","))], options.target, every, None))
    if first["reached"] is None:
        raise SystemExit(f"Our own run does not reach {options.target} nats; give a higher --target.")
    most = options.times * first["reached"]
    for name in filter(None, options.peers.split(",")):
        row = keep(run(name, options.set, options.target, every, most))
        print(f"  {name} / ours: {told(row, first['reached'], most)}", flush=True)


def write(path: Path, target: float, rows: list[dict[str, Any]], changes: list[str]) -> None:
    from liftlm import load_config, load_model
    from liftlm.devices import describe_machine

    model = load_model(None, load_config(None, changes).model)
    found = {"target": target, "rows": rows, "machine": describe_machine(model.device, model.dtype)}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
