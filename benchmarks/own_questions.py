"""Questions of a set as the lines that `lift evaluate jsonl` reads, each document cut at a sentence.

    python benchmarks/own_questions.py DATA/squad/articles.jsonl:8 DATA/squad/articles.jsonl:18 --characters 12000 > OWN.jsonl

Sources are those of `lift study --data`. Questions whose evidence the cut removes are left out; of the others `--questions` are
drawn for each document (seed 0).
"""

from __future__ import annotations

import argparse
import json
import random

from liftlm.evaluation.corpora import cut_item, parse_source, read_items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--characters", type=int)
    parser.add_argument("--questions", type=int, default=40)
    arguments = parser.parse_args()
    for source in arguments.sources:
        for whole in read_items(parse_source(source)):
            item = cut_item(whole, arguments.characters)
            draw = random.Random(0)
            for question in draw.sample(item.questions, min(arguments.questions, len(item.questions))):
                row = {"document": item.document.text, "title": item.document.title, "question": question.question}
                row |= {"answer": list(question.answers), "evidence": list(question.evidence)}
                row |= {"kind": question.kind} | ({"choices": list(question.choices)} if question.choices else {})
                print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
