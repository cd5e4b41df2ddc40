"""Answering from an adapter beside answering from the text in the window: `python benchmarks/answer.py`; `--quick`, `--json`.

On the embedded model, for documents of 1024 … 8000 tokens (the window holds 8192). A question is asked in four ways:

    LIFT            the adapter, and no text in the window
    in context      the whole text in the window, read anew for each question
    text kept       the same, with the text's keys and values kept from question to question
    truncated       head and tail of it, as much as a window of 2048 holds, read anew

Printed for each: seconds to the first token, tokens a second after it, seconds of an answer of `TOKENS` tokens; and the
crossing: after how many questions absorbing the document has paid for itself. What absorbing takes is measured on a few steps
of the default recipe, and multiplied. The adapter is a fresh one: what it knows makes no difference here.

`batch_ratio`: 32 questions of the demonstration answered together, over the same one at a time, in tokens a second, all
answers `TOKENS` long. `batch_ratio_own_ends`: in answers a second, where each ends when the model ends it. `bandwidth_share`:
bytes of the weights and of the keys and values that a token reads, over the time it takes, over the speed of a plain sum over as
many bytes in the same minute. `decoder_ratio`: a token by transformers' own forward pass, over ours, both
merged. `--plot FILE` draws the crossing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

TOKENS = 48  # of an answer
LENGTHS = (1024, 2048, 4096, 8000)
ROWS = 32
TRUNCATED = 2048  # the window of that way
NAMES = {"lift": "LIFT", "in context": "in context", "kept": "in context, text kept", "truncated": "truncated"}


def best(measure: Callable[[], float], times: int) -> float:
    return min(measure() for _ in range(times))


def stream_bytes_per_second(size: int, times: int) -> float:
    """The fastest sum over so many bytes."""
    numbers = torch.ones(size // 4)

    def once() -> float:
        began = time.perf_counter()
        numbers.sum()
        return time.perf_counter() - began

    return size / best(once, times)


class Bench:
    """The model, an adapter, and prompts."""

    def __init__(self, quick: bool) -> None:
        from liftlm import load_config, load_model
        from liftlm.adapters import attach_adapter
        from liftlm.demo import load_demo

        self.quick = quick
        self.config = load_config(None, [f"answering.max_new_tokens={TOKENS}"])
        self.model = load_model(None, self.config.model)
        self.document, questions = load_demo()
        self.questions = [row["question"] for row in questions]
        attach_adapter(self.model, "lift", self.config.adapter, 0)
        text = self.model.encode(self.document.text)
        self.text = (text * (max(LENGTHS) // len(text) + 1))[: max(LENGTHS)]

    def prompt(self, question: str, shown: int) -> list[int]:
        """A question behind so many tokens of the text."""
        from liftlm.prompts import question_prompt

        return question_prompt(self.model.tokenizer, self.document.title, question, self.text[:shown])

    @contextlib.contextmanager
    def on(self, adapter: bool, merged: bool) -> Iterator[Any]:
        """A `Network` with or without the adapter."""
        from liftlm.adapters import merge_adapter, use_adapter
        from liftlm.batching import Network

        laid = self.model.decoder
        with use_adapter(self.model, "lift" if adapter else None):
            with merge_adapter(self.model) if merged else contextlib.nullcontext():
                network = Network(self.model)
                network.refresh()
                yield network
            if merged:
                self.model.decoder = laid

    def written(self, network: Any, prompts: list[list[int]], known: Any = None) -> tuple[float, list[float], Any]:
        """Seconds to the first token, seconds of each step after it, and the batch; nothing ends before TOKENS."""
        from liftlm.batching import Batch
        from liftlm.sequences import Sampling, Sequence

        sampling = Sampling(TOKENS, whole=True)
        rows = [Sequence(prompt, sampling, self.model.tokenizer, frozenset()) for prompt in prompts]
        began = time.perf_counter()
        batch = Batch.begin(network, rows[:8], known)
        for start in range(8, len(rows), 8):
            batch.merge(Batch.begin(network, rows[start : start + 8], known))
        first = time.perf_counter() - began
        steps = []
        while rows[0].ending is None:
            began = time.perf_counter()
            batch.step()
            steps.append(time.perf_counter() - began)
        return first, steps, batch


def asked(bench: Bench, network: Any, shown: int, keep: bool = False) -> dict[str, float]:
    """One question; with `keep` the text is known from an earlier one."""
    from liftlm.decoding import Beginning

    prompts = [bench.prompt(question, shown) for question in bench.questions[:2]]
    known = None
    if keep:
        length = next(i for i, (a, b) in enumerate(zip(*prompts, strict=False)) if a != b)
        cache = network.new_cache()
        with torch.inference_mode():
            network.fill(prompts[0][:length], cache)
        known = Beginning(length, [(layer.keys, layer.values) for layer in cache.layers])
    runs = [bench.written(network, prompts[:1], known)[:2] for _ in range(1 if shown > 2048 and not keep else 2)]
    first = min(run[0] for run in runs)
    step = min(statistics.median(run[1]) for run in runs)
    return {"first_seconds": first, "tokens_per_second": 1 / step, "seconds": first + step * (TOKENS - 1)}


def absorbing_seconds(bench: Bench, tokens: int) -> tuple[float, float]:
    """Seconds that the default recipe would take on so many tokens, and its tokens a second over a few steps."""
    from liftlm import Document
    from liftlm.adapters import attach_adapter, remove_adapter
    from liftlm.examples import make_examples, make_task_examples, plan_training
    from liftlm.segments import split_into_segments
    from liftlm.tasks.extractive import write_extractive_tasks
    from liftlm.training import train

    model, config = bench.model, bench.model.resolve(bench.config)
    document = Document(bench.document.title, model.decode(bench.text[:tokens]))
    pieces = split_into_segments(bench.text[:tokens], config.segments.segment_tokens, config.segments.overlap_tokens)
    tasks = write_extractive_tasks(document.text, config.tasks.per_sentence, config.seed)
    examples = make_examples(pieces, model.tokenizer)
    examples += make_task_examples(tasks, model.tokenizer, document.title, model.window)
    total = sum(len(examples[index]) for _, step in plan_training(examples, config) for index in step)
    steps, taken = (6 if bench.quick else 16), []

    class Enough(Exception):
        pass

    def note(metrics: Any) -> None:
        taken.append((metrics.tokens, metrics.tokens / metrics.tokens_per_second))
        if len(taken) == steps:
            raise Enough

    attach_adapter(model, "trained", config.adapter, 0)
    with contextlib.suppress(Enough):
        train(model, "trained", examples, config, on_step=note)
    remove_adapter(model, "trained")
    speed = sum(count for count, _ in taken[1:]) / sum(seconds for _, seconds in taken[1:])
    return total / speed, speed


def together(bench: Bench, shown: int) -> dict[str, float]:
    """32 questions at once and one at a time."""
    from liftlm.answering import answer, answer_all
    from liftlm.generating import _share_beginning
    from liftlm.sequences import Sampling, Sequence

    model, questions = bench.model, (bench.questions * 2)[:ROWS]
    prompts = [bench.prompt(question, shown) for question in questions]
    alone = prompts[: 4 if bench.quick else ROWS]
    with bench.on(True, True) as network:
        began = time.perf_counter()
        rows = [Sequence(prompt, Sampling(TOKENS), model.tokenizer, frozenset()) for prompt in prompts]
        bench.written(network, prompts, _share_beginning(network, rows))
        batch = time.perf_counter() - began
        began = time.perf_counter()
        for prompt in alone:
            bench.written(network, [prompt])
        single = (time.perf_counter() - began) / len(alone) * ROWS
    found = {"together_seconds": batch, "alone_seconds": single, "ratio": single / batch}
    if shown:
        return found
    config = bench.config.model_copy(
        update={"answering": bench.config.answering.model_copy(update={"context": "none"})}
    )
    options: dict[str, Any] = {"document": bench.document, "config": config}
    began = time.perf_counter()
    given = answer_all(model, None, questions, **options)
    batch = time.perf_counter() - began
    began = time.perf_counter()
    for question in questions[: len(alone)]:
        answer(model, None, question, **options)
    single = (time.perf_counter() - began) / len(alone) * ROWS
    mean = statistics.mean(each.answer_tokens for each in given)
    return found | {"own_ends_ratio": single / batch, "own_ends_tokens": mean}


def decoding(bench: Bench) -> dict[str, float]:
    """A token of one stream: in ms, beside transformers' own forward pass, and as a share of what memory allows."""
    model = bench.model
    prompt = bench.prompt(bench.questions[0], 0)
    heads = model.network.config.num_key_value_heads * 2 * model.network.config.num_hidden_layers
    kept = (len(prompt) + TOKENS / 2) * heads * bench.model.network.config.head_dim * model.dtype.itemsize
    weights = sum(p.nbytes for name, p in model.network.named_parameters() if ".lora_" not in name)
    stream = stream_bytes_per_second(weights, 20)
    with bench.on(True, True) as network:
        ours = statistics.median(bench.written(network, [prompt])[1])
        network._decoder = None
        theirs = statistics.median(bench.written(network, [prompt])[1])
    with bench.on(True, False) as network:
        beside = statistics.median(bench.written(network, [prompt])[1])
        network._decoder = None
        peft = statistics.median(bench.written(network, [prompt])[1])
    stream = max(stream, stream_bytes_per_second(weights, 20))
    return {
        "token_ms": ours * 1e3,
        "token_ms_adapter_beside": beside * 1e3,
        "token_ms_transformers": theirs * 1e3,
        "token_ms_transformers_adapter_beside": peft * 1e3,
        "stream_gigabytes_per_second": stream / 1e9,
        "share": (weights + kept) / ours / stream,
    }


def crossing(absorbing: float, ours: float, theirs: float) -> float | None:
    """Questions after which `ours` is ahead; None where it never is."""
    return absorbing / (theirs - ours) if theirs > ours else None


def measure(quick: bool) -> dict[str, Any]:
    from liftlm.devices import describe_machine

    bench = Bench(quick)
    rows: list[dict[str, Any]] = []
    with bench.on(True, True) as network:
        lift = asked(bench, network, 0)
    with bench.on(False, False) as network:
        truncated = asked(bench, network, TRUNCATED - 128 - TOKENS)
        ways = {tokens: (asked(bench, network, tokens), asked(bench, network, tokens, True)) for tokens in LENGTHS}
    for tokens in LENGTHS:
        seconds, speed = absorbing_seconds(bench, tokens)
        found = {"lift": lift, "in context": ways[tokens][0], "kept": ways[tokens][1]}
        if tokens >= TRUNCATED:
            found["truncated"] = truncated
        note = {name: crossing(seconds, lift["seconds"], way["seconds"]) for name, way in found.items() if way != lift}
        rows.append(
            {"tokens": tokens, "absorbing_seconds": seconds, "training_tokens_per_second": speed}
            | {"ways": found, "crossing": note}
        )
        print(f"{tokens} tokens measured", file=sys.stderr, flush=True)
    single, batch = decoding(bench), {"none": together(bench, 0), "1024": together(bench, 1024)}
    return {
        "batch_ratio": batch["none"]["ratio"],
        "batch_ratio_own_ends": batch["none"]["own_ends_ratio"],
        "batch_ratio_with_text": batch["1024"]["ratio"],
        "bandwidth_share": single["share"],
        "decoder_ratio": single["token_ms_transformers"] / single["token_ms"],
        "decoding": single,
        "together": batch,
        "lengths": rows,
        "answer_tokens": TOKENS,
        "machine": describe_machine(bench.model.device, bench.model.dtype),
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Seconds over questions for each length, absorbing included, with the crossings marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {"lift": "#0072b2", "in context": "#d55e00", "kept": "#009e73", "truncated": "#cc79a7"}
    figure = Figure(figsize=(9, 6.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, row in zip(figure.subplots(2, 2).flat, found["lengths"], strict=True):
        most = 3 * max([10, *(count for name, count in row["crossing"].items() if count and name != "kept")])
        for name, way in row["ways"].items():
            start = row["absorbing_seconds"] if name == "lift" else 0.0
            ends = [start + way["seconds"] * count for count in (0, most)]
            axes.plot((0, most), ends, color=colours[name], label=NAMES[name])
            count = row["crossing"].get(name)
            if count is not None and count <= most:
                axes.plot(count, count * way["seconds"], "o", color=colours[name])
                axes.annotate(f"{count:.0f}", (count, count * way["seconds"]), (4, -12), textcoords="offset points")
        axes.set(title=f"{row['tokens']:,} tokens", xlabel="questions", ylabel="seconds, absorbing included")
        axes.set_ylim(0, 2.2 * row["absorbing_seconds"])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, format="png", metadata={"Software": None})


def show(found: dict[str, Any]) -> None:
    print(
        "| document | way | first token | tokens/s | answer | absorbing | pays after |\n|---|---|---|---|---|---|---|"
    )
    for row in found["lengths"]:
        for name, way in row["ways"].items():
            count = row["crossing"].get(name)
            pays = "" if name == "lift" else "never" if count is None else f"{count:,.0f} questions"
            took = f"{row['absorbing_seconds']:.0f} s" if name == "lift" else ""
            print(
                f"| {row['tokens']:,} | {NAMES[name]} | {way['first_seconds']:.2f} s | {way['tokens_per_second']:.0f} | "
                f"{way['seconds']:.2f} s | {took} | {pays} |"
            )
    single = found["decoding"]
    print(
        f"\na token of one stream: {single['token_ms']:.1f} ms merged, {single['token_ms_adapter_beside']:.1f} with the adapter "
        f"beside; by transformers {single['token_ms_transformers']:.1f} and "
        f"{single['token_ms_transformers_adapter_beside']:.1f}; {found['bandwidth_share']:.2f} of "
        f"{single['stream_gigabytes_per_second']:.0f} GB/s"
    )
    print(f"{ROWS} questions together over one at a time, {TOKENS} tokens each: {found['batch_ratio']:.1f}")
    print(f"the same behind 1,024 tokens of text: {found['batch_ratio_with_text']:.1f}")
    mean = found["together"]["none"]["own_ends_tokens"]
    print(f"the same, ended by the model ({mean:.0f} tokens on average): {found['batch_ratio_own_ends']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and repetitions; ends within ten minutes")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--plot", type=Path, help="where to draw the crossing, as PNG")
    options = parser.parse_args()
    found = measure(options.quick)
    if options.plot is not None:
        draw(found, options.plot)
    if options.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
