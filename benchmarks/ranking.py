"""Where the evidence of each question stands among a document's sentences: by BM25, as the model ranks BM25's best, and by both.

    python benchmarks/ranking.py demo --entry ID
    python benchmarks/ranking.py shortdep_qa.jsonl:0 --entry ID --candidates 30
    python benchmarks/ranking.py shortdep_qa.jsonl:0            # nothing absorbed: the base model is the judge
    python benchmarks/ranking.py demo --entry ID --shown        # how much of what was found should be shown

Prints the share of questions whose evidence is the first sentence, among the first two, three, five; and the mean reciprocal
rank. "adapter, BM25" is what `answering.context=retrieve` does. The base model ranks too, as the control for what the adapter
learnt. Evidence that is in no single sentence, or not among the candidates, counts as not found by anybody. Then how well fewer
candidates do (`answering.retrieval.rerank`), and for how many questions they show the same sentences.

With --shown: for several numbers of sentences and of neighbours, with and without a margin, by the adapter's ranking, how often
the evidence is in the window, and what the model answers then, greedy, with `answering.strength_with_text` of the adapter: token
F1 (SQuAD's rule), NLL of the expected answer in nats a token, and, for the demo, right answers. --out appends the rows as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from recipe import load_questions, read_answers, token_f1

from liftlm import Adapter, Document, Library, LiftConfig, load_config, load_model
from liftlm.adapters import use_adapter
from liftlm.config import RetrievalConfig
from liftlm.context import MARK
from liftlm.demo import is_right
from liftlm.devices import describe_machine
from liftlm.likelihood import Ranker
from liftlm.models import Model
from liftlm.retrieval import Rerank, Retriever

_CUTS = (1, 2, 3, 5)
_DEPTHS = (0, 3, 5, 8, 12, 20)  # candidates that are judged
_FRAME = 192  # tokens of the window left for the prompt's words and the answer
# sentences, neighbours of each on either side, nats that the others may be behind the best
_SHOWN = ((1, 0, None), (2, 0, None), (2, 0, 10.0), (3, 0, None), (3, 0, 10.0), (3, 1, None))


def main() -> None:
    arguments = _arguments()
    config = load_config(None, arguments.set)
    model = load_model(config.model.name, config.model)
    adapter = Library().open(Library().find_id(arguments.entry), model) if arguments.entry else None
    document, rows = load_questions(arguments.data, arguments.questions, 0, arguments.characters)
    if arguments.shown:
        if adapter is None:
            raise SystemExit("--shown needs --entry.")
        _compare_shown(model, adapter, document, rows, config, arguments.out)
        return
    settings = RetrievalConfig(neighbours=0, rerank=arguments.candidates)
    retriever = Retriever(document.text, model.encode, settings)
    judges = {"base model": _remembered(model, document, None)}
    if adapter is not None:
        judges["adapter"] = _remembered(model, document, adapter.id)
    default = judges["adapter" if adapter else "base model"]
    ranks: dict[str, list[int | None]] = {name: [] for name in ("BM25", *judges, *(f"{name}, BM25" for name in judges))}
    alone: dict[bool, list[bool]] = {True: [], False: []}  # is the best far ahead? → is it right?
    for row in rows:
        question, evidence = row["question"], " ".join(row["evidence"].split())
        sources = retriever.select(question, model.window, [0], default).sources
        alone[len(sources) == 1].append(sources[0] in evidence)
        candidates = retriever.ranked(question)[: arguments.candidates]
        orders = {"BM25": candidates}
        for name, judge in judges.items():
            nats = judge(question, [document.text[slice(*piece.core)] for piece in candidates])
            order = sorted(range(len(candidates)), key=lambda place: -nats[place])
            orders[name] = [candidates[place] for place in order]
            orders[f"{name}, BM25"] = retriever.reranked(question, judge)[: arguments.candidates]
        for name, pieces in orders.items():
            found = (" ".join(document.text[slice(*piece.core)].split()) in evidence for piece in pieces)
            ranks[name].append(next((place for place, right in enumerate(found, 1) if right), None))
    print(
        f"{document.title}: {len(rows)} questions, {arguments.candidates} candidates of {len(retriever.pieces)} sentences"
    )
    print(f"{'':<17}" + "".join(f"  first {cut}" for cut in _CUTS) + "     MRR")
    for name, places in ranks.items():
        shares = [sum(rank is not None and rank <= cut for rank in places) / len(places) for cut in _CUTS]
        reciprocal = sum(1 / rank for rank in places if rank) / len(places)
        print(f"{name:<17}" + "".join(f"  {share:>7.2f}" for share in shares) + f"  {reciprocal:>6.3f}")
    print(
        f"{list(ranks)[-1]}: {len(alone[True])} sentences lead by over {settings.margin:g} nats, {sum(alone[True])} of them "
        f"right; of the {len(alone[False])} others {sum(alone[False])}"
    )
    _compare_depths(document, rows, model, settings, default)


def _compare_depths(
    document: Document, rows: list[dict[str, Any]], model: Model, settings: RetrievalConfig, judge: Rerank
) -> None:
    """What is lost where fewer candidates are judged; `judge` remembers all of them."""
    print("judged  first 1  first 2     MRR  the same shown  evidence shown")
    full = Retriever(document.text, model.encode, settings)
    wanted = [full.select(row["question"], model.window, [0], judge).sources for row in rows]
    for count in sorted({*_DEPTHS, settings.rerank} & set(range(settings.rerank + 1))):
        retriever = Retriever(document.text, model.encode, settings.model_copy(update={"rerank": count}))
        places, same, held = [], 0, 0
        for row, sources in zip(rows, wanted, strict=True):
            evidence = " ".join(row["evidence"].split())
            order = retriever.reranked(row["question"], judge)[: settings.rerank]
            found = (" ".join(document.text[slice(*piece.core)].split()) in evidence for piece in order)
            places.append(next((place for place, right in enumerate(found, 1) if right), None))
            here = retriever.select(row["question"], model.window, [0], judge).sources
            same += set(here) == set(sources)
            held += any(source in evidence for source in here)
        first, two = (sum(rank is not None and rank <= cut for rank in places) for cut in (1, 2))
        reciprocal = sum(1 / rank for rank in places if rank) / len(places)
        print(f"{count:>6}  {first:>7}  {two:>7}  {reciprocal:>6.3f}  {same:>14}  {held:>14}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="demo, or FILE.jsonl:INDEX")
    parser.add_argument("--entry", help="id of the library entry of that document; without it the base model ranks")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--questions", type=int)
    parser.add_argument("--characters", type=int, help="the document's beginning only, as it was absorbed")
    parser.add_argument("--shown", action="store_true")
    parser.add_argument("--out", help="of --shown: a JSONL file")
    parser.add_argument("--set", action="append", default=[])
    return parser.parse_args()


def _compare_shown(
    model: Model, adapter: Adapter, document: Document, rows: list[dict[str, Any]], config: LiftConfig, out: str | None
) -> None:
    print(f"{document.title}: {len(rows)} questions")
    print("sentences  neighbours  margin  evidence shown     F1    NLL  right")
    remembered = _remembered(model, document, adapter.id)
    for count, neighbours, margin in _SHOWN:
        setting = {"count": count, "neighbours": neighbours, "margin": margin}
        retrieval = config.answering.retrieval.model_copy(update=setting)
        retriever = Retriever(document.text, model.encode, retrieval)
        found = []
        for row in rows:
            budget = model.window - _FRAME - len(model.encode(row["question"] + row["answer"]))
            found.append(retriever.select(row["question"], budget, model.encode(MARK), remembered).tokens)
        figures = _read(model, adapter, document, rows, found, config)
        right = figures["right"]
        print(
            f"{count:>9}  {neighbours:>10}  {margin or '':>6}  {figures['evidence_shown']:>14}  {figures['token_f1']:>5.1f}  "
            f"{figures['answer_nll']:>5.2f}  {'' if right is None else right:>5}",
            flush=True,
        )
        if out:
            row = {"document": document.title, "questions": len(rows)} | setting | figures
            row |= {"config": config.model_dump(mode="json"), "machine": describe_machine(model.device, model.dtype)}
            with Path(out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


@torch.inference_mode()
def _read(
    model: Model,
    adapter: Adapter,
    document: Document,
    rows: list[dict[str, Any]],
    found: list[list[int]],
    config: LiftConfig,
) -> dict[str, Any]:
    """What the adapter makes of the text that is shown (token ids) for each question."""
    shown = [" ".join(model.tokenizer.decode(tokens).split()) for tokens in found]
    with use_adapter(model, adapter.id, strength=config.answering.strength_with_text):
        nlls, said = read_answers(model, document.title, rows, found, config.answering)
    scores = [token_f1(text, row["answer"]) for text, row in zip(said, rows, strict=True)]
    return {
        "evidence_shown": sum(" ".join(r["evidence"].split()) in text for r, text in zip(rows, shown, strict=True)),
        "token_f1": 100 * sum(scores) / len(rows),
        "answer_nll": sum(nlls) / len(rows),
        "right": sum(map(is_right, said, rows)) if "keys" in rows[0] else None,
        "answers": said,
    }


def _remembered(model: Model, document: Document, adapter: str | None) -> Rerank:
    """What the model, with that adapter, thinks of candidates; computed once for each question."""
    ranker = Ranker(model, document.title)
    known: dict[tuple[str, str], float] = {}

    def judge(question: str, texts: list[str]) -> Sequence[float]:
        fresh = [text for text in dict.fromkeys(texts) if (question, text) not in known]
        if fresh:
            with use_adapter(model, adapter):
                nats = ranker.relevance(question, fresh)
            known.update({(question, text): each for text, each in zip(fresh, nats, strict=True)})
        return [known[question, text] for text in texts]

    return judge


if __name__ == "__main__":
    main()
