"""Where recall without text fails: at the beginnings of answers. And what following many of them brings.

python benchmarks/recall.py BOOK.txt --lengths 1000 --depths 0.1,0.5,0.9 --config configs/recall.yaml --set model.window=1024

Absorbs the haystacks of `lift evaluate needle --together` (or takes them from the library) and prints, of all questions about
needles: the NLL of the needle's sentence as the answer at its first token, the next three and the others; how many greedy
answers hold the needle; among how many recited texts it is (by beams, and by other ways of asking beside the question);
and how often the base model, or the adapter, takes it for the best.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from liftlm import Library, LiftConfig, load_config, load_model
from liftlm.adapters import use_adapter
from liftlm.answering import answer_all, recite_about
from liftlm.devices import describe_machine
from liftlm.evaluation import metrics
from liftlm.evaluation.benchmark import Question
from liftlm.evaluation.needles import Needles
from liftlm.examples import NO_LOSS, answer_example
from liftlm.likelihood import Ranker
from liftlm.models import Model

_PARTS = {"first token": slice(0, 1), "second to fourth": slice(1, 4), "the others": slice(4, None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", type=Path)
    parser.add_argument("--lengths", default="1000")
    parser.add_argument("--depths", default="0.1,0.5,0.9")
    parser.add_argument("--only", type=int, help="so many of the haystacks")
    parser.add_argument("--beams", default="1,8,16,24,32")
    parser.add_argument(
        "--rewordings", default="0", help="ways of asking in the writer's words, tried with each of the beams"
    )
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    config = load_config(given.config, given.set)
    model = load_model(config.model.name, config.model)
    lengths, depths = ([*map(kind, text.split(","))] for kind, text in ((int, given.lengths), (float, given.depths)))
    items = Needles(lengths, depths, together=True).load(given.book)[: given.only]
    beams, rewordings = ([int(n) for n in numbers.split(",")] for numbers in (given.beams, given.rewordings))
    ways = [(number, more) for number in beams for more in rewordings]
    counts: dict[str, float] = defaultdict(int)
    nlls: dict[str, list[float]] = defaultdict(list)
    for item in items:
        adapter, _ = Library().absorb_once(item.document, model, config)
        questions, alone = list(item.questions), config.answering.model_copy(update={"context": "none"})
        told = answer_all(
            model, adapter, [q.question for q in questions], config=config.model_copy(update={"answering": alone})
        )
        for question, answer in zip(questions, told, strict=True):
            counts["questions"] += 1
            counts["greedy answer"] += _holds(question, answer.answer)
            with use_adapter(model, adapter.id):
                for part, values in _by_part(model, item.document.title, question).items():
                    nlls[part] += values
            _count_recited(model, adapter.id, item.document.title, question, config, ways, counts)
    row = {
        "counts": dict(counts),
        "nll": {part: sum(values) / len(values) for part, values in nlls.items()},
        "config": model.resolve(config).model_dump(mode="json"),
        "machine": describe_machine(model.device, model.dtype),
    }
    for name, value in [*row["counts"].items(), *row["nll"].items()]:
        print(f"{name:>44}  {value:.2f}" if isinstance(value, float) else f"{name:>44}  {value}")
    if given.out:
        given.out.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


def _holds(question: Question, text: str) -> bool:
    return metrics.keyword_recall(text, question.data["keywords"]) == 1


@torch.inference_mode()
def _by_part(model: Model, title: str, question: Question) -> dict[str, list[float]]:
    """NLL of each token of the needle's sentence as the answer, nats."""
    example = answer_example(model.tokenizer, title, question.question, question.answers[0], model.window)
    assert example is not None
    network: Any = model.network
    logits = network(input_ids=torch.tensor([example.tokens], device=model.device)).logits[0, :-1].float()
    labels = torch.tensor(example.labels[1:], device=model.device)
    asked = labels != NO_LOSS
    losses = torch.nn.functional.cross_entropy(logits[asked], labels[asked], reduction="none").tolist()
    return {part: losses[where] for part, where in _PARTS.items()}


def _count_recited(
    model: Model,
    name: str,
    title: str,
    question: Question,
    config: LiftConfig,
    ways: list[tuple[int, int]],
    counts: dict[str, float],
) -> None:
    for number, more in ways:
        how = config.answering.recitation.model_copy(update={"beams": number, "rewordings": more})
        settings = config.answering.model_copy(update={"recitation": how})
        began = time.monotonic()
        with use_adapter(model, name):
            texts = recite_about(model, title, question.question, settings)
        way = f"{number} beams" + (f" and {more} rewordings" if more else "")
        counts[f"seconds, {way}"] += time.monotonic() - began
        counts[f"texts of {way}"] += len(texts)
        counts[f"among what {way} recite"] += any(_holds(question, text) for text in texts)
        for judge, adapter in (("base model", None), ("adapter", name)):
            with use_adapter(model, adapter):
                nats = Ranker(model, title).relevance(question.question, texts)
            best = texts[max(range(len(texts)), key=nats.__getitem__)]
            counts[f"the {judge}'s best of {way}"] += _holds(question, best)


if __name__ == "__main__":
    main()
