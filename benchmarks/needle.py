"""Needle in a haystack: is a sentence hidden in a book recalled after absorbing, with no text in the window?

    python benchmarks/needle.py BOOK.txt --tokens 4000 --window 1024 --out docs/results/needle.json

For each depth the needle is put at a sentence's end, the text absorbed, and three things asked: whether the answer to the
question holds the key words (recall), whether the text itself is known (given the needle's first words as raw text, does the
model go on with the key words), and how surprising the needle is to the model (nats a token, before and after). Every figure
comes with the resolved config, seed, versions and machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from liftlm import Document, Model, absorb, answer, load_config, load_document, load_model
from liftlm.adapters import remove_adapter, use_adapter
from liftlm.devices import describe_machine, peak_memory
from liftlm.display import TrainingDisplay, console
from liftlm.storage import write_file

NEEDLE = "The key to the drying loft of Tamsin Orrock's ropewalk hung behind the third barrel of blue vinegar."
OPENING = "The key to the drying loft of Tamsin Orrock's ropewalk hung behind"
QUESTIONS = (
    "Where did the key to the drying loft of Tamsin Orrock's ropewalk hang?",
    "Tamsin Orrock had a ropewalk. Behind what was the key to its drying loft kept?",
)
KEY_WORDS = ("third barrel", "vinegar")


def hide(text: str, depth: float) -> str:
    """The text with the needle after the sentence that ends nearest to `depth` (0 … 1) of it."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"']?\s", text)] or [len(text)]
    place = min(ends, key=lambda end: abs(end - depth * len(text)))
    return f"{text[:place]}{NEEDLE} {text[place:]}"


def surprise(model: Model, adapter: str | None) -> float:
    """Mean next-token loss of the needle read as raw text (nats a token)."""
    ids = torch.tensor([model.encode("\n" + NEEDLE)], device=model.device)
    with torch.no_grad(), use_adapter(model, adapter):
        return float(model.loss_sum(ids, ids)) / (ids.shape[1] - 1)


def continuation(model: Model, adapter: str) -> str:
    ids = torch.tensor([model.encode("\n" + OPENING)], device=model.device)
    with torch.inference_mode(), use_adapter(model, adapter):
        network: Any = model.network
        out = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    return model.decode(out[0, ids.shape[1] :].tolist())


def recalled(text: str) -> bool:
    return all(word in text.lower() for word in KEY_WORDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("book")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    fixed = ["answering.context=none", "answering.max_new_tokens=40"]
    config = load_config(None, [*fixed, *options.settings, f"model.window={options.window}"])
    model = load_model(config=config.model)
    book = load_document(options.book)
    ids = model.encode(book.text)
    text = model.decode(ids[len(ids) // 10 :][: options.tokens])  # past the title pages and the table of contents
    rows = []
    for depth in options.depths:
        document = Document(title=book.title, text=hide(text, depth))
        with TrainingDisplay(f"depth {depth:.0%}") as display:
            adapter = absorb(document, model, config, on_step=display)
        answers = [answer(model, adapter, question, config=config).answer for question in QUESTIONS]
        going_on = continuation(model, adapter.id)
        rows.append(
            {
                "depth": depth,
                "recalled": [recalled(text) for text in answers],
                "answers": answers,
                "continued": recalled(going_on),
                "continuation": going_on,
                "surprise_before": surprise(model, None),
                "surprise_after": surprise(model, adapter.id),
                "report": dataclasses.asdict(adapter.report),
            }
        )
        remove_adapter(model, adapter.id)
        row = rows[-1]
        console.print(
            f"depth {depth:.0%}: recalled {row['recalled']}, text known {row['continued']}, {answers}", markup=False
        )
    result = {
        "command": " ".join(sys.argv),
        "config": model.resolve(config).model_dump(mode="json"),
        "machine": describe_machine(model.device, model.dtype),
        "peak_memory_bytes": peak_memory(),
        "needle": NEEDLE,
        "questions": QUESTIONS,
        "rows": rows,
    }
    print("| depth | question 1 | question 2 | text known | needle's loss before → after | seconds |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        marks = ["yes" if flag else "no" for flag in [*row["recalled"], row["continued"]]]
        change = f"{row['surprise_before']:.2f} → {row['surprise_after']:.2f}"
        print(f"| {row['depth']:.0%} | {' | '.join(marks)} | {change} | {row['report']['seconds']:.0f} |")
    if options.out is not None:
        write_file(options.out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
