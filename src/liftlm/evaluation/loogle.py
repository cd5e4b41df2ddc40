"""LooGLE: questions about Wikipedia articles and film scripts, summaries of papers; all texts newer than 2022.

Dataset: bigai-nlco/LooGLE, test split; one document a row, `qa_pairs` a Python literal (the hub's newer copy: one
question a row). Metrics: the authors' automatic ones (Evaluation/automatic_metrics.py; for timelines Reorder/), with
token F1 beside them; BERTScore and the judge work on the written predictions. Prompts: config/task2prompt.json of the
authors; the two question-answering sets ask in this program's own words unless told otherwise, which are those of the
LIFT authors' LooGLE runs and of training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from liftlm.documents import Document
from liftlm.errors import BenchmarkDataError, ConfigError
from liftlm.evaluation import metrics, timeline
from liftlm.evaluation.benchmark import Benchmark, Item, Question, draw
from liftlm.evaluation.data_rows import answers_of, gather_items, read_literal, read_rows, text_of, texts_of
from liftlm.evaluation.evidence import EvidenceFinder
from liftlm.evaluation.hub import DataSource, find_data_file
from liftlm.prompts import Wording, question_wording

TIMELINE, COMPREHENSION = "timeline reorder", "comprehension and reasoning"
KINDS = (COMPREHENSION, "multiple information retrieval", "computation", TIMELINE)
_LIKE_THIS = 'A line is {"input": document, "title": …, "qa_pairs": "[{\'Q\': …, \'A\': …, \'S\': …}]", "output": …}.'
_SIMILARITY = (
    *("token_f1", "rouge_l", "rouge_1", "rouge_2", "rouge_1_recall", "rouge_2_recall", "rouge_l_recall"),
    *("bleu_1", "bleu_4", "meteor"),
)
_TIMELINE = (
    *("coordinate_score", "location_square_deviation", "location_mean_deviation"),
    *("swap_deviation", "swap_distance_deviation"),
)


class LooGLE(Benchmark):
    """What the four sets share: the file and its rows."""

    dataset = "bigai-nlco/LooGLE (test)"
    source = "github.com/bigai-nlco/LooGLE"
    file_names: ClassVar[tuple[str, ...]]

    def load(self, data: Path | None, *, limit: int | None = None, seed: int = 0) -> list[Item]:
        path = find_data_file(
            data,
            DataSource(
                names=self.file_names,
                folders=("loogle", "LooGLE-testdata", "data"),
                hub_id="bigai-nlco/LooGLE",
                patterns=tuple(f"*{name}" for name in self.file_names),
            ),
        )
        return draw(gather_items(self._asked(read_rows(path, _LIKE_THIS))), limit, seed)

    def _asked(self, rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[Document, Question]]:
        counts: dict[str, int] = {}
        finder = EvidenceFinder("")
        for where, row in rows:
            text = text_of(row, "input" if "input" in row else "context", where)
            title = text_of(row, "title" if "title" in row else "doc_id", where)
            document = Document(title=title, text=text, source=self.dataset)
            if finder.text != text:  # the hub's copy repeats a document for each of its questions
                finder = EvidenceFinder(text)
            for question in self._questions(row, finder, where):
                number = counts.get(document.id, 0)
                counts[document.id] = number + 1
                yield document, replace(question, id=str(number))

    def _questions(self, row: Mapping[str, Any], finder: EvidenceFinder, where: str) -> Iterator[Question]:
        for index, pair in enumerate(_pairs(row, where), 1):
            at = f"{where}, question {index}"
            if not isinstance(pair, dict):
                raise BenchmarkDataError(f"{at} is not a dictionary.", _LIKE_THIS)
            yield self._question(pair, finder, at)

    def _question(self, pair: Mapping[str, Any], finder: EvidenceFinder, where: str) -> Question:
        raise NotImplementedError


class _QuestionAnswering(LooGLE):
    metrics: ClassVar[tuple[str, ...]] = _SIMILARITY
    bert_score = True

    def __init__(self, prompt: Literal["lift", "loogle"] = "lift") -> None:
        """prompt: whose words ask, this program's (which name the document) or the LooGLE authors'."""
        if prompt not in ("lift", "loogle"):
            raise ConfigError(f"There is no prompt '{prompt}' of LooGLE.", "Choose lift or loogle.")
        self.prompt = prompt

    def wording(self, document: Document, question: Question) -> Wording:
        if self.prompt == "lift":
            return question_wording(document.title, question.question)
        ask = f"\nQuestion: {question.question}\nAnswer: "
        return Wording(
            f'Please answer the question based on "{document.title}".{ask}',
            "Please answer the question based on the long texts below. \n",
            ask,
        )

    def _question(self, pair: Mapping[str, Any], finder: EvidenceFinder, where: str) -> Question:
        return Question(
            id="",
            question=text_of(pair, "Q", where).strip(),
            answers=answers_of(pair.get("A"), where),
            evidence=finder.find(texts_of(read_evidence(pair.get("S")), "the evidence", where)),
            kind=kind_of(pair.get("type")),
        )

    def score(self, question: Question, answer: str) -> dict[str, float]:
        return _similarity(question, answer)


class ShortQA(_QuestionAnswering):
    """Questions whose evidence stands in one place."""

    name = "loogle-shortqa"
    file_names = ("shortdep_qa.jsonl",)
    max_new_tokens = 300


class LongQA(_QuestionAnswering):
    """Questions whose evidence is scattered: four kinds."""

    name = "loogle-longqa"
    file_names = ("longdep_qa.jsonl",)
    metrics = (*_SIMILARITY, *_TIMELINE)
    max_new_tokens = 500

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """For timelines also the coordinate score (higher is better) and the authors' deviations (lower is better)."""
        scores = _similarity(question, answer)
        if question.kind == TIMELINE:
            scores |= timeline.timeline_scores(answer, question.question, question.answers[0])
        return scores


class Cloze(LooGLE):
    """Names hidden behind <mask-n> in a retold part of a film script.

    The evidence field `S` is the same part with its names, which is the answer and not in the document: there is no
    oracle. Scores are a question's share of right masks; as the authors divide all right masks by all masks, a question
    counts in the means as often as it has masks.
    """

    name = "loogle-cloze"
    file_names = ("shortdep_cloze.jsonl",)
    metrics = ("exact_match", "partial_match")
    max_new_tokens = 50

    def wording(self, document: Document, question: Question) -> Wording:
        start = "Please fill in the clozes based on "
        rules = (
            " Each of the placeholder '<mask-n>' in the question could be an entity of Person, Location or Organiocation."
            " The same masks represent the same entity. Output a json format answer, for example:"
            " {'<mask-0>': 'Bob', '<mask-1>': 'Gorrosion Magazine','<mask-2>': 'Bethel Horizon'}\n"
        )
        ask = f"\n Question: {question.question} What are the masked entities? \nAnswer:"
        return Wording(
            f'{start}"{document.title}".{rules}{ask.lstrip()}', f"{start}the given long texts below.{rules}", ask
        )

    def _question(self, pair: Mapping[str, Any], finder: EvidenceFinder, where: str) -> Question:
        masks = read_literal(pair.get("A"), "the answer", where)
        if not isinstance(masks, dict) or not masks:
            raise BenchmarkDataError(f"{where}: the answer is not a dictionary of masks.", "Mend the row.")
        texts = {str(mask): str(name) for mask, name in masks.items()}
        return Question("", text_of(pair, "Q", where).strip(), (str(texts),), data={"masks": texts})

    def score(self, question: Question, answer: str) -> dict[str, float]:
        masks: Mapping[str, str] = question.data["masks"]
        return {
            "exact_match": metrics.cloze_exact(answer, masks),
            "partial_match": metrics.cloze_partial(answer, masks),
        }

    def weight(self, question: Question, metric: str) -> float:
        return float(len(question.data["masks"])) if metric in self.metrics else 1.0


class Summarization(LooGLE):
    """The abstract of a paper from arXiv. The titles in the data are the papers' numbers."""

    name = "loogle-summarization"
    file_names = ("longdep_summarization.jsonl", "summarization.jsonl")
    metrics = _SIMILARITY
    bert_score = True
    max_new_tokens = 500

    def wording(self, document: Document, question: Question) -> Wording:
        return Wording(
            f'Please generate a summary of the paper "{document.title}". \n Summarization: ',
            "Please generate a summary of the below paper. \n",
            "\n Summarization: ",
        )

    def _questions(self, row: Mapping[str, Any], finder: EvidenceFinder, where: str) -> Iterator[Question]:
        reference = row["output"] if "output" in row else row.get("answer")
        if isinstance(reference, str) and reference.strip().lower() == "none":
            raise BenchmarkDataError(
                f"{where} has no summary (its output is none).", "This is not the summarisation set."
            )
        yield Question("", "Please generate a summary of the paper.", answers_of(reference, where))

    def score(self, question: Question, answer: str) -> dict[str, float]:
        return _similarity(question, answer)


def read_evidence(value: Any) -> Any:
    """A list of sentences that was written as text becomes one; any other text is a sentence."""
    if isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]"):
        try:
            return read_literal(value, "the evidence", "")
        except BenchmarkDataError:
            return value
    return value


def _pairs(row: Mapping[str, Any], where: str) -> list[Any]:
    """The questions of a row: a Python literal, a list, or the row itself where it is one question."""
    if "qa_pairs" not in row and "question" in row:
        kind = row.get("type", row.get("task"))
        return [{"Q": row["question"], "A": row.get("answer"), "S": row.get("evidence"), "type": kind}]
    pairs = row.get("qa_pairs")
    if isinstance(pairs, str) and pairs.strip().lower() != "none":
        pairs = read_literal(pairs, "qa_pairs", where)
    if not isinstance(pairs, list) or not pairs:
        raise BenchmarkDataError(f"{where} has no questions (qa_pairs).", _LIKE_THIS)
    return pairs


def kind_of(value: Any) -> str:
    """One of KINDS in whatever spelling ("timeline_reorder", "Timeline Reorder"), "" where the set has none."""
    first = str(value).lower().replace("_", " ").split()[:1]
    return next((kind for kind in KINDS if kind.split()[:1] == first), "")


def _similarity(question: Question, answer: str) -> dict[str, float]:
    """The authors' automatic metrics; METEOR only where WordNet is installed."""
    reference = question.answers[0]
    scores = {
        "token_f1": metrics.token_f1(answer, reference),
        **metrics.rouge(answer, reference),
        **metrics.loogle_rouge(answer, reference),
        **metrics.bleu(answer, reference),
    }
    if metrics.meteor_available():
        scores["meteor"] = metrics.meteor(answer, reference)
    return scores
