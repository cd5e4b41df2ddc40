"""Multiple choice: the options are named in the question, and the answer is the text of one.

Datasets: QuALITY as L-Eval cut it (L4NLP/LEval, quality), and LongHealth (github.com/kbressem/LongHealth,
data/benchmark_v5.json, the whole file of a patient as one document). Prompt: ours, the same for both, since upstream's
prompts ask for letters and the likelihood of an option is that of its text. Metric: accuracy, here of generated answers
(`accuracy_generated`); by likelihood it comes from the scorer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from liftlm.documents import Document
from liftlm.errors import BenchmarkDataError
from liftlm.evaluation import metrics
from liftlm.evaluation.benchmark import Benchmark, Item, Question, draw
from liftlm.evaluation.data_rows import gather_items, read_rows, text_of
from liftlm.evaluation.hub import DataSource, find_data_file
from liftlm.prompts import Wording, question_wording

_LETTERS = "ABCDEFGHIJ"
_OPTION = re.compile(r"\n\s*\(([A-J])\)\s*")
_MARKED = re.compile(r"\(([A-J])\)")
# "B", "B.", "(B) …", "B: …", "The correct answer is B", "Option B."; never the word "A" before another word
_LEADING = re.compile(
    r"\W*(?:(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:answer|option|choice)(?:\s+is|:)?\s*)*[(\[]?([A-J])(?=[)\].:,;*]|\s*$)",
    re.IGNORECASE,
)
_QUALITY_LINE = 'A line is {"input": story, "instructions": ["question\\n (A) … (D) …"], "outputs": ["(B) …"]}.'
_LONGHEALTH_FILE = (
    'The file is {"patient_01": {"texts": {"text_0": …}, "questions": [{"question": …, "answer_a": …}]}}.'
)


class MultipleChoice(Benchmark):
    """Wording and score; a set gives the data."""

    metrics = ("accuracy_generated", "token_f1", "rouge_l")
    max_new_tokens = 64

    def wording(self, document: Document, question: Question) -> Wording:
        return choice_wording(document, question)

    def score(self, question: Question, answer: str) -> dict[str, float]:
        return {"accuracy_generated": choice_accuracy(question, answer), **super().score(question, answer)}


class QuALITY(MultipleChoice):
    """Stories and articles of 2,000 to 8,000 words with questions that need the whole; four options."""

    name = "multiple-choice/quality"
    dataset = "L4NLP/LEval (quality, test)"
    source = "github.com/OpenLMLab/LEval"

    def load(self, data: Path | None, *, limit: int | None = None, seed: int = 0) -> list[Item]:
        source = DataSource(
            names=("quality.jsonl",),
            folders=("leval", "LEval-data/Closed-ended-tasks", "Closed-ended-tasks", "LEval/Exam"),
            hub_id="L4NLP/LEval",
            patterns=("*quality.jsonl",),
        )
        rows = read_rows(find_data_file(data, source), _QUALITY_LINE)
        return draw(gather_items(self._asked(rows)), limit, seed)

    def _asked(self, rows: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[tuple[Document, Question]]:
        for number, (where, row) in enumerate(rows, 1):
            document = Document(f"QuALITY story {number}", text_of(row, "input", where), self.dataset)
            asked, gold = row.get("instructions"), row.get("outputs")
            if not isinstance(asked, list) or not isinstance(gold, list) or len(asked) != len(gold):
                raise BenchmarkDataError(f"{where} has not as many outputs as instructions.", _QUALITY_LINE)
            for index, (instruction, output) in enumerate(zip(asked, gold, strict=True), 1):
                at = f"{where}, question {index}"
                question, choices = split_options(str(instruction), at)
                yield (
                    document,
                    Question(f"{number}-{index}", question, (right_choice(str(output), choices, at),), choices=choices),
                )


class LongHealth(MultipleChoice):
    """Invented patients' files with questions of five options, and where in the file the answer stands."""

    name = "multiple-choice/longhealth"
    dataset = "LongHealth, data/benchmark_v5.json"
    source = "github.com/kbressem/LongHealth"

    def load(self, data: Path | None, *, limit: int | None = None, seed: int = 0) -> list[Item]:
        source = DataSource(
            names=("benchmark_v5.json", "longhealth.json"),
            folders=("longhealth", "LongHealth", "data"),
            where="github.com/kbressem/LongHealth, folder data",
        )
        path = find_data_file(data, source)
        try:
            patients = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise BenchmarkDataError(f"{path} cannot be read as JSON: {error}.", _LONGHEALTH_FILE) from error
        if not isinstance(patients, dict) or not patients:
            raise BenchmarkDataError(f"{path} is not a JSON object of patients.", _LONGHEALTH_FILE)
        return draw(gather_items(self._asked(path, patients)), limit, seed)

    def _asked(self, path: Path, patients: Mapping[str, Any]) -> Iterator[tuple[Document, Question]]:
        for key, patient in patients.items():
            where = f"{key} of {path}"
            texts = patient.get("texts") if isinstance(patient, dict) else None
            if not isinstance(texts, dict) or not isinstance(patient.get("questions"), list):
                raise BenchmarkDataError(f"{where} has no texts or no questions.", _LONGHEALTH_FILE)
            held = [name for name, text in texts.items() if isinstance(text, str) and text.strip()]
            names = sorted(held, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
            if not names:
                raise BenchmarkDataError(f"{where} has no text.", _LONGHEALTH_FILE)
            title = f"Medical file of {patient['name']}" if patient.get("name") else f"Medical file {key}"
            document = Document(title, "\n\n".join(texts[name] for name in names), self.dataset)
            for index, row in enumerate(patient["questions"], 1):
                yield document, self._question(row, texts, names, f"{where}, question {index}", f"{key}-{index}")

    def _question(
        self, row: Any, texts: Mapping[str, str], names: Sequence[str], where: str, identity: str
    ) -> Question:
        if not isinstance(row, dict):
            raise BenchmarkDataError(f"{where} is not a JSON object.", _LONGHEALTH_FILE)
        keys = [f"answer_{letter}" for letter in _LETTERS.lower() if f"answer_{letter}" in row]
        choices = tuple(_plain(text_of(row, key, where)) for key in keys)
        right = right_choice(text_of(row, "correct", where), choices, where)
        evidence = _spans(row.get("answer_location"), texts, names, where)
        return Question(identity, text_of(row, "question", where).strip(), (right,), evidence, choices=choices)


def choice_wording(document: Document, question: Question) -> Wording:
    """The question with its options, lettered."""
    options = "\n".join(f"({letter}) {text}" for letter, text in zip(_LETTERS, question.choices, strict=False))
    return question_wording(document.title, f"{question.question}\nAnswer with the text of one of these:\n{options}")


def choice_accuracy(question: Question, answer: str) -> float:
    """1.0 if the answer names the right option."""
    named = named_choice(answer, question.choices)
    return float(named is not None and question.choices[named] == question.answers[0])


def named_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Which option an answer names: by its letter, by holding its text, or by the best token F1; None: no single one."""
    letters = {letter for letter in _MARKED.findall(answer) if _LETTERS.index(letter) < len(choices)}
    if len(letters) > 1:
        return None
    leading = _LEADING.match(answer)
    letter = next(iter(letters), leading[1].upper() if leading else "")
    if letter and _LETTERS.index(letter) < len(choices):
        return _LETTERS.index(letter)
    said = f" {_words(answer)} "
    held = [index for index, text in enumerate(choices) if _words(text) and f" {_words(text)} " in said]
    if held:
        longest = max(held, key=lambda index: len(_words(choices[index])))
        inside = all(_words(choices[index]) in _words(choices[longest]) for index in held)
        return longest if inside else None
    scores = [metrics.token_f1(answer, text) for text in choices]
    best = max(scores, default=0.0)
    return scores.index(best) if best > 0 and scores.count(best) == 1 else None


def split_options(instruction: str, where: str) -> tuple[str, tuple[str, ...]]:
    """("question", options) of a text with "(A) …" at the beginnings of lines."""
    question, *rest = _OPTION.split(instruction)
    letters, texts = "".join(rest[::2]), tuple(map(_plain, rest[1::2]))
    if len(texts) < 2 or letters != _LETTERS[: len(texts)] or not all(texts):
        raise BenchmarkDataError(f"{where} has no options (A), (B) … on lines of their own.", _QUALITY_LINE)
    return question.strip(), texts


def right_choice(gold: str, choices: tuple[str, ...], where: str) -> str:
    """The option that the gold means: its text, its letter, or both."""
    plain = _plain(gold)
    lettered = re.fullmatch(r"\(?([A-J])\)?[.:]?(?:\s+(.*))?", plain)
    found = {index for index, text in enumerate(choices) if text == plain}
    if not found and lettered and _LETTERS.index(lettered[1]) < len(choices):
        index = _LETTERS.index(lettered[1])
        found = {index} if lettered[2] in (None, choices[index]) else set()
    if len(found) != 1:
        raise BenchmarkDataError(f'{where}: the answer "{plain}" is not exactly one of the options.', "Mend the row.")
    return choices[found.pop()]


def _spans(location: Any, texts: Mapping[str, str], names: Sequence[str], where: str) -> tuple[str, ...]:
    """What LongHealth marks in each text, by shares of its length: {"text_0": {"start": [0.1], "end": [0.2]}}."""
    spans = []
    for name in names:
        place = location.get(name) if isinstance(location, dict) else None
        starts, ends = (place.get(side) or [] for side in ("start", "end")) if isinstance(place, dict) else ([], [])
        if not all(
            isinstance(side, list) and all(isinstance(at, int | float) for at in side) for side in (starts, ends)
        ):
            raise BenchmarkDataError(f"{where}: answer_location of {name} is not lists of numbers.", "Mend the file.")
        text = texts[name]
        spans += [
            text[int(start * len(text)) : int(end * len(text))].strip()
            for start, end in zip(starts, ends, strict=False)
        ]
    return tuple(dict.fromkeys(filter(None, spans)))


def _plain(text: str) -> str:
    return " ".join(text.split())


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
