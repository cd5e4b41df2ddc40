"""Where the evidence of each question stands among a document's sentences: by BM25, and as the adapter ranks BM25's best.

    python benchmarks/ranking.py demo --entry ID
    python benchmarks/ranking.py shortdep_qa.jsonl:0 --entry ID --candidates 30

Prints the share of questions whose evidence is the first sentence, among the first two, three, five; and the mean reciprocal
rank. The base model ranks too, as the control for what the adapter learnt. Evidence that is in no single sentence, or not among
the candidates, counts as not found by anybody.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from recipe import load_questions

from liftlm import Library, load_config, load_model
from liftlm.adapters import use_adapter
from liftlm.config import RetrievalConfig
from liftlm.likelihood import Ranker
from liftlm.retrieval import Retriever

_CUTS = (1, 2, 3, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="demo, or FILE.jsonl:INDEX")
    parser.add_argument("--entry", required=True, help="id of the library entry of that document")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--questions", type=int)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    config = load_config(None, arguments.set)
    model = load_model(config.model.name, config.model)
    adapter = Library().open(Library().find_id(arguments.entry), model)
    document, rows = load_questions(arguments.data, arguments.questions, 0)
    retriever = Retriever(document.text, model.encode, RetrievalConfig(neighbours=0))
    rankers = {
        "base model": (None, Ranker(model, document.title)),
        "adapter": (adapter.id, Ranker(model, document.title)),
    }
    ranks: dict[str, list[int | None]] = {"BM25": [], "base model": [], "adapter": []}
    for row in rows:
        best = retriever.ranked(row["question"])[: arguments.candidates]
        texts = [document.text[piece.start : piece.end] for piece in best]
        right = [" ".join(text.split()) in " ".join(row["evidence"].split()) for text in texts]
        ranks["BM25"].append(_rank(right, [-float(index) for index in range(len(texts))]))
        for name, (on, ranker) in rankers.items():
            with use_adapter(model, on):
                ranks[name].append(_rank(right, ranker.relevance(row["question"], texts)))
    print(
        f"{document.title}: {len(rows)} questions, {arguments.candidates} candidates of {len(retriever.pieces)} sentences"
    )
    print(f"{'':<12}" + "".join(f"  first {cut}" for cut in _CUTS) + "     MRR")
    for name, found in ranks.items():
        shares = [sum(rank is not None and rank <= cut for rank in found) / len(found) for cut in _CUTS]
        reciprocal = sum(1 / rank for rank in found if rank) / len(found)
        print(f"{name:<12}" + "".join(f"  {share:>7.2f}" for share in shares) + f"  {reciprocal:>6.3f}")


def _rank(right: Sequence[bool], scores: Sequence[float]) -> int | None:
    """From 1, of the best right one."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return next((place for place, index in enumerate(order, 1) if right[index]), None)


if __name__ == "__main__":
    main()
