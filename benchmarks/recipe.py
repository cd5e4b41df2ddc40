"""One recipe on one document: what is known without any text, and whether the model still reads. Appends a JSON row.

    python benchmarks/recipe.py demo --out rows.jsonl --set training.learning_rate=5e-4
    python benchmarks/recipe.py shortdep_qa.jsonl:0 --out rows.jsonl        # LooGLE's own format, the first document
    python benchmarks/recipe.py articles.jsonl:10 --questions 40 --out …    # SQuAD by article: title, document, qas

Measured before and after absorbing, greedy: mean NLL a token of the expected answer and token F1 (SQuAD's rule), without any
text ("closed"), with the evidence sentence in the window ("oracle") and, with --icl, with head and tail of the document in a
window of `model.window` tokens ("icl"); beside text `answering.strength_with_text` of the adapter acts. NLL of an unrelated
text, with all of the adapter and with that part; for the demo also how many answers are right.
Reading kept = oracle F1 after / before. A control absorbs another document instead (--other FILE, or --entry of one).

With --own N, where what was learnt is lost: N of the tasks that the adapter was trained on, in their own words ("own"), and
the questions of the data apart by whether some task of their evidence has their answer (token F1 of 0.6 and more).
"""

from __future__ import annotations

import argparse
import ast
import collections
import dataclasses
import json
import random
import re
import string
import time
from pathlib import Path
from typing import Any

import torch

from liftlm import Document, Library, LiftConfig, absorb, load_config, load_document, load_model
from liftlm.adapters import use_adapter
from liftlm.config import AnsweringConfig
from liftlm.context import MARK, cut_out_middle
from liftlm.demo import is_right, load_demo
from liftlm.devices import describe_machine
from liftlm.examples import answer_example
from liftlm.generating import Prompt, generate
from liftlm.models import Model
from liftlm.prompts import encode_text, question_turn, render_prompt
from liftlm.tasks import Task
from liftlm.tasks.sentences import split_into_sentences
from liftlm.tasks.task import read_tasks_file
from liftlm.training_report import StepMetrics
from liftlm.writing import TASKS_FILE

_UNRELATED = 1024  # tokens
_SHORT = 8  # words
_SAME = 0.6  # token F1
_BEGINNING = 60  # characters of the evidence, by which it is found
_FRAME = 192  # tokens of the window left for the prompt's words and the answer
_STEP = 64  # tokens; so most questions get the same text, which is then computed once


def main() -> None:
    arguments = _arguments()
    config = load_config(arguments.config, arguments.set)
    model = load_model(config.model.name, config.model)
    document, rows = load_questions(arguments.data, arguments.questions, arguments.seed, arguments.characters)
    absorbed = document if arguments.other is None else load_document(arguments.other)
    unrelated = (
        model.encode(Path(arguments.unrelated).read_text(encoding="utf-8"))[:_UNRELATED] if arguments.unrelated else []
    )
    before = _measure(model, None, config, document, rows, unrelated, arguments.icl)
    started, new = time.monotonic(), arguments.entry is None
    if arguments.entry:
        adapter = Library().open(Library().find_id(arguments.entry), model)
        absorbed = adapter.document
    else:

        def tell(step: StepMetrics) -> None:
            print(f"{step.step}/{step.steps} {step.loss:.3f}")

        if arguments.own:  # the library keeps the tasks
            adapter, new = Library().absorb_once(absorbed, model, config, on_step=tell)
        else:
            adapter = absorb(absorbed, model, config, on_step=tell)
    seconds = time.monotonic() - started if new else adapter.report.seconds
    after = _measure(model, adapter.id, config, document, rows, unrelated, arguments.icl)
    if arguments.own and adapter.document.text != document.text:
        raise SystemExit(f"Entry {adapter.id} is of another document; --own asks about the one that was absorbed.")
    if arguments.own:
        tasks = read_tasks_file(Library().path / adapter.id / TASKS_FILE, len(adapter.document.text))
        after |= _measure_own(model, adapter.id, document, rows, tasks, after, arguments.own, arguments.seed)
    row = {
        "name": arguments.name,
        "document": document.title,
        "absorbed": absorbed.title,
        "questions": len(rows),
        "seconds": seconds,
        "report": dataclasses.asdict(adapter.report),
        "tasks": adapter.tasks,
        "before": before,
        "after": after,
        "reading_kept": after["oracle_f1"] / max(before["oracle_f1"], 1e-9),
        "config": adapter.config.model_dump(mode="json"),
        "machine": describe_machine(model.device, model.dtype),
    }
    with Path(arguments.out).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    for key in sorted(k for k in after if k != "answers"):
        earlier = before.get(key, before["unrelated_nll"] if key.startswith("unrelated") else None)
        print(f"{key:<26} {'' if earlier is None else f'{earlier:8.3f}':>8} → {after[key]:8.3f}")
    print(
        f"reading kept   {row['reading_kept']:.2f}, {seconds:.0f} s, peak {adapter.report.peak_memory_bytes / 1e9:.1f} GB"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="demo, or FILE.jsonl:INDEX")
    parser.add_argument("--out", required=True)
    parser.add_argument("--name", default="")
    parser.add_argument("--config")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--questions", type=int, help="at most so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--characters", type=int, help="only the document's beginning, and the questions whose evidence is in it"
    )
    parser.add_argument("--icl", action="store_true", help="measure truncated in-context learning too")
    parser.add_argument("--unrelated", help="a text whose NLL is measured too")
    parser.add_argument("--entry", help="id of a library entry to measure, instead of absorbing")
    parser.add_argument("--own", type=int, metavar="N", help="ask N of the adapter's own tasks with short answers too")
    parser.add_argument("--other", help="a document to absorb instead (control)")
    arguments = parser.parse_args()
    if arguments.own and arguments.other:
        parser.error("--own asks about the document that was absorbed; leave --other out")
    return arguments


def load_questions(
    name: str, most: int | None, seed: int, characters: int | None = None
) -> tuple[Document, list[dict[str, Any]]]:
    if name == "demo":
        document, rows = load_demo()
    else:
        path, _, index = name.rpartition(":")
        data = json.loads(Path(path).read_text(encoding="utf-8").splitlines()[int(index)])
        document, rows = _loogle(data) if "qa_pairs" in data else _squad(data)
    if characters is not None:
        document = dataclasses.replace(document, text=document.text[:characters])
        rows = [row for row in rows if all(piece in document.text for piece in _listed(row["evidence"]))]
    rows = [row | {"evidence": " ".join(_listed(row["evidence"]))} for row in rows]
    if most is not None and most < len(rows):
        rows = random.Random(seed).sample(rows, most)
    return document, rows


def _loogle(data: dict[str, Any]) -> tuple[Document, list[dict[str, Any]]]:
    pairs = data["qa_pairs"] if isinstance(data["qa_pairs"], list) else ast.literal_eval(data["qa_pairs"])
    rows = [{"question": p["Q"], "answer": p["A"], "evidence": _listed(p["S"])} for p in pairs]
    return Document(title=data["title"], text=data["input"], source=data["title"]), rows


def _squad(data: dict[str, Any]) -> tuple[Document, list[dict[str, Any]]]:
    text = data["document"]
    sentences = split_into_sentences(text)
    paragraphs = [match.span() for match in re.finditer(r"(?:[^\n]|\n(?!\n))+", text)]
    rows = []
    for qa in data["qas"]:
        start, end = paragraphs[qa["paragraph"]]
        at = text.find(qa["answer"], start, end)
        held = [sentence.text for sentence in sentences if sentence.start <= at < sentence.end]
        if at >= 0 and held:
            rows.append({"question": qa["question"], "answer": qa["answer"], "evidence": held[0]})
    return Document(title=data["title"].replace("_", " "), text=text, source=data["title"]), rows


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


@torch.inference_mode()
def _measure(
    model: Model,
    adapter: str | None,
    config: LiftConfig,
    document: Document,
    rows: list[dict[str, Any]],
    unrelated: list[int],
    icl: bool,
) -> dict[str, Any]:
    """With text in the window so much of the adapter acts as in answering."""
    measured: dict[str, Any] = {}
    answers: dict[str, list[str]] = {}
    strengths = {"closed": 1.0, "oracle": config.answering.strength_with_text}
    if icl:
        strengths["icl"] = config.answering.strength_with_text
    for way, strength in strengths.items():
        with use_adapter(model, adapter, strength=strength):
            answers[way] = _measure_way(model, way, document, rows, measured)
    if unrelated:
        ids = torch.tensor([unrelated])
        for strength in sorted({*strengths.values()}) if adapter else [1.0]:
            with use_adapter(model, adapter, strength=strength):
                loss = float(model.loss_sum(ids, ids)) / (len(unrelated) - 1)
                measured["unrelated_nll" + ("" if strength == 1 else f"_{strength}")] = loss
    return measured | {"answers": answers}


@torch.inference_mode()
def _measure_own(
    model: Model,
    adapter: str,
    document: Document,
    rows: list[dict[str, Any]],
    tasks: list[Task],
    after: dict[str, Any],
    count: int,
    seed: int,
) -> dict[str, Any]:
    short = [task for task in dict.fromkeys(tasks) if len(task.answer.split()) <= _SHORT and task.kind != "yes or no"]
    drawn = random.Random(seed).sample(short, min(count, len(short)))
    asked = [{"question": task.question, "answer": task.answer} for task in drawn]
    measured: dict[str, Any] = {}
    with use_adapter(model, adapter):
        _measure_way(model, "own", document, asked, measured)
    parted: dict[str, list[float]] = {"asked for": [], "not asked for": []}
    for row, said in zip(rows, after["answers"]["closed"], strict=True):
        at = document.text.find(row["evidence"][:_BEGINNING])
        its = [task for task in tasks if task.start < at + len(row["evidence"]) and task.end > at] if at >= 0 else tasks
        known = any(token_f1(task.answer, row["answer"]) >= _SAME for task in its)
        parted["asked for" if known else "not asked for"].append(100 * token_f1(said, row["answer"]))
    for name, scores in parted.items():
        measured[f"closed_f1, {name}"] = sum(scores) / max(1, len(scores))
        measured[f"questions {name}"] = len(scores)
    return measured


def _measure_way(
    model: Model, way: str, document: Document, rows: list[dict[str, Any]], measured: dict[str, Any]
) -> list[str]:
    contexts = [_context(model, way, document, row) for row in rows]
    settings = load_config(None, ["answering.max_new_tokens=40"]).answering
    nlls, answers = read_answers(model, document.title, rows, contexts, settings)
    measured[f"{way}_nll"] = sum(nlls) / len(nlls)
    scores = [token_f1(text, row["answer"]) for text, row in zip(answers, rows, strict=True)]
    measured[f"{way}_f1"] = 100 * sum(scores) / len(scores)
    if "keys" in rows[0]:
        measured[f"{way}_right"] = sum(map(is_right, answers, rows))
    return answers


def read_answers(
    model: Model,
    title: str,
    rows: list[dict[str, Any]],
    contexts: list[list[int]],
    settings: AnsweringConfig,
) -> tuple[list[float], list[str]]:
    """Of each question with its text in the window (token ids), as the adapter that is on has it: nats a token of the expected
    answer, its end not counted, and the answer generated."""
    tokenizer = model.tokenizer
    nlls = []
    for row, context in zip(rows, contexts, strict=True):
        example = answer_example(tokenizer, title, row["question"], row["answer"], model.window, context)
        assert example is not None, "the question fills the window"
        loss = model.loss_sum(torch.tensor([example.tokens[:-1]]), torch.tensor([example.labels[:-1]]))
        nlls.append(float(loss) / (example.targets - 1))
    turns = [question_turn(tokenizer, title, row["question"], c) for row, c in zip(rows, contexts, strict=True)]
    prompts = [Prompt(render_prompt(tokenizer, [turn]), "asked") for turn in turns]
    said = {text.index: text.text for text in generate(model, prompts, settings, 0)}
    return nlls, [said[index] for index in range(len(rows))]


def _context(model: Model, way: str, document: Document, row: dict[str, Any]) -> list[int]:
    if way in ("closed", "own"):
        return []
    if way == "oracle":
        return encode_text(model.tokenizer, row["evidence"])
    rest = len(model.encode(row["question"] + row["answer"])) + _FRAME
    tokens = model.encode(document.text)
    return cut_out_middle(tokens, (model.window - rest) // _STEP * _STEP, model.encode(MARK))


def token_f1(answer: str, expected: str) -> float:
    """SQuAD's: lower case, without punctuation and articles; the harmonic mean of precision and recall of tokens."""
    given, wanted = _tokens(answer), _tokens(expected)
    common = sum((collections.Counter(given) & collections.Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


def _tokens(text: str) -> list[str]:
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


if __name__ == "__main__":
    main()
