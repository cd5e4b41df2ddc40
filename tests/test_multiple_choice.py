"""Multiple choice, of the published sets and of a user's own: which option is right, and which one an answer names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liftlm.documents import Document
from liftlm.errors import BenchmarkDataError
from liftlm.evaluation.benchmark import Question
from liftlm.evaluation.multiple_choice import LongHealth, QuALITY, named_choice
from liftlm.evaluation.own_questions import OwnQuestions
from liftlm.prompts import Wording

DATA = Path(__file__).parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="the evaluation data is not beside the repository")

ASKED = "Who rang\nthe bell? \n\n (A) Oswin,  the ferryman \n (B) Ada\n(C) Ada and Oswin\n (D) A man in (a) boat "
CHOICES = ("Oswin, the ferryman", "Ada", "Ada and Oswin", "A man in (a) boat")
QUESTION = Question("1-1", "Who rang\nthe bell?", ("Ada",), choices=CHOICES)


def quality(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def story(asked: Any = ASKED, gold: Any = "(B) Ada ") -> dict[str, Any]:
    return {
        "input": "A story.",
        "instructions": [asked],
        "outputs": [gold],
        "source": "NLP dataset",
        "evaluation": "exam",
    }


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gold", ["(B) Ada ", "(B)", "B", "B.", "Ada", "(B)  Ada"])
def test_the_gold_is_one_option(gold: str, tmp_path: Path) -> None:
    (item,) = QuALITY().load(quality(tmp_path / "quality.jsonl", story(gold=gold)))
    assert item.questions == (QUESTION,) and item.document.title == "QuALITY story 1"
    assert QuALITY().load(tmp_path) == [item]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (story(gold="(B) Oswin, the ferryman"), "Line 1 of .*, question 1: .* is not exactly one of the options"),
        (story(gold="(E) Nobody"), "is not exactly one of the options"),
        (story(gold="Nobody"), "is not exactly one of the options"),
        (story(ASKED.replace("(C) Ada and Oswin", "(C) Ada"), "Ada"), "is not exactly one of the options"),
        (story("Who? (A) x (B) y"), "has no options"),
        (story("Who?\n(A) x\n(C) y"), "has no options"),
        (story("Who?\n(A) x\n(B) "), "has no options"),
        (story() | {"outputs": []}, "Line 1 of .* has not as many outputs as instructions"),
        (story() | {"input": ""}, 'Line 1 of .* has no text "input"'),
    ],
)
def test_a_wrong_row_is_named(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkDataError, match=words):
        QuALITY().load(quality(tmp_path / "a.jsonl", row))


@real_data
def test_every_gold_of_the_real_data_is_exactly_one_option() -> None:
    rows = [
        json.loads(line) for line in (DATA / "leval/quality.jsonl").read_text(encoding="utf-8").splitlines() if line
    ]
    items = QuALITY().load(DATA)
    assert len(items) == len(rows) == 8
    for item, row in zip(items, rows, strict=True):
        assert item.document.text == row["input"] and len(item.questions) == len(row["instructions"])
        for question, asked, gold in zip(item.questions, row["instructions"], row["outputs"], strict=True):
            assert len(set(question.choices)) == 4 and question.choices.count(question.answers[0]) == 1
            letter = re.match(r"\(([A-D])\)", gold)
            assert letter and question.choices["ABCD".index(letter[1])] == question.answers[0]
            again = question.question + "".join(
                f" ({letter}) {text}" for letter, text in zip("ABCD", question.choices, strict=True)
            )
            assert again.split() == asked.split(), "nothing of the instruction is lost"
            for named in (gold, letter[0], letter[1], question.answers[0]):
                assert QuALITY().score(question, named)["accuracy_generated"] == 1


def patient(**more: Any) -> dict[str, Any]:
    """As in LongHealth's benchmark_v5.json; all invented."""
    question = {"No": 0, "question": "What did she take? ", "correct": "Iron"}
    question |= {
        f"answer_{letter}": text for letter, text in zip("abcde", ("Zinc", "Iron", "None", "Tea", "All"), strict=True)
    }
    place = {"text_0": {"start": [0.0], "end": [0.5]}, "text_10": {"start": [], "end": []}}
    texts = {"text_10": "Last visit.", "text_0": "She took iron. Then none", "text_2": "She rested.", "text_3": " "}
    whole = {"name": "Mara Quill", "birthday": "1961-03-01", "diagnosis": "x", "texts": texts}
    return whole | {"questions": [question | {"answer_location": place} | more.pop("question", {})]} | more


def test_longhealth(tmp_path: Path) -> None:
    path = tmp_path / "benchmark_v5.json"
    path.write_text(json.dumps({"patient_01": patient(), "patient_02": patient(name="", texts={"text_0": "Alone."})}))
    first, second = LongHealth().load(tmp_path)
    assert first.document.title == "Medical file of Mara Quill" and second.document.title == "Medical file patient_02"
    assert first.document.text == "She took iron. Then none\n\nShe rested.\n\nLast visit.", (
        "in the order of their numbers"
    )
    choices = ("Zinc", "Iron", "None", "Tea", "All")
    assert first.questions == (
        Question("patient_01-1", "What did she take?", ("Iron",), ("She took iro",), choices=choices),
    )
    assert first.questions[0].evidence[0] in first.document.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not a JSON object of patients"),
        (json.dumps({"p": {"texts": {"text_0": "x"}}}), "p of .* has no texts or no questions"),
        (json.dumps({"p": patient(texts={"text_0": ""})}), "p of .* has no text"),
        (json.dumps({"p": patient(question={"correct": "Lead"})}), "p of .*, question 1: .* is not exactly one"),
        (json.dumps({"p": patient(question={"answer_b": None})}), 'question 1 has no text "answer_b"'),
        (json.dumps({"p": patient(questions=[3])}), "question 1 is not a JSON object"),
        (json.dumps({"p": patient(question={"answer_location": {"text_0": {"start": 1}}})}), "is not lists of numbers"),
    ],
)
def test_a_wrong_file_of_longhealth_is_named(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(BenchmarkDataError, match=words):
        LongHealth().load(path)


def test_longhealth_is_not_on_the_hub() -> None:
    with pytest.raises(BenchmarkDataError, match="not on the hub") as caught:
        LongHealth().load(None)
    assert "kbressem/LongHealth" in caught.value.next_step and "--data" in caught.value.next_step


# --- asking and scoring -----------------------------------------------------------------------------------------------

GOLDEN = (
    'Please answer the question based on "Corriden".\n'
    "Question: Who rang\nthe bell?\n"
    "Answer with the text of one of these:\n"
    "(A) Oswin, the ferryman\n"
    "(B) Ada\n"
    "(C) Ada and Oswin\n"
    "(D) A man in (a) boat"
)


def test_golden_prompt() -> None:
    expected = Wording(GOLDEN, 'Here is text from "Corriden":\n\n', f"\n\n{GOLDEN}")
    for benchmark in (QuALITY(), LongHealth()):
        assert benchmark.wording(Document("Corriden", "x"), QUESTION) == expected


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("(B)", 1),
        ("B", 1),
        ("b", 1),
        ("B.", 1),
        ("B) Ada", 1),
        ("**B**", 1),
        ("B: the rest is silence", 1),
        ("The correct answer is C: Ada and Oswin.", 2),
        ("Answer: D", 3),
        ("I think that it is (A), because he had the boat.", 0),
        ("(B) Oswin, the ferryman", 1),  # the letter counts
        ("Ada", 1),
        ("ada!", 1),
        ("It was Ada and Oswin.", 2),  # holds "Ada" too, as a part of it
        ("The ferryman did", 0),  # by its words
        ("A man in a boat", 3),  # "A" is a word here
        ("A big boat", 3),
        ("(A) or (B)", None),
        ("(A) Oswin, the ferryman\n(B) Ada\n(C) Ada and Oswin", None),
        ("Ada or a man in (a) boat", None),
        ("E", None),
        ("I", None),
        ("Nobody knows.", None),
        ("", None),
    ],
)
def test_which_option_an_answer_names(answer: str, named: int | None) -> None:
    assert named_choice(answer, CHOICES) == named
    expected = {"accuracy_generated": float(named == 1)}
    scores = QuALITY().score(QUESTION, answer)
    assert {name: scores[name] for name in expected} == expected and set(scores) == set(QuALITY.metrics)


@given(st.text(max_size=60), st.lists(st.text(min_size=1, max_size=20), max_size=10))
def test_any_text_names_one_option_or_none(answer: str, choices: list[str]) -> None:
    named = named_choice(answer, choices)
    assert named is None or 0 <= named < len(choices)


# --- a user's own -----------------------------------------------------------------------------------------------------


def own(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    base = {"document": "Ada rang the\nbell. Oswin left.", "question": "Who?", "answer": "Ada"}
    return quality(tmp_path / "own.jsonl", *(base | row for row in rows))


def test_own_choices_and_evidence(tmp_path: Path) -> None:
    path = own(
        tmp_path, {"choices": list(CHOICES), "evidence": "Ada rang the bell.", "kind": "who", "title": "Corriden"}
    )
    (item,) = OwnQuestions().load(path)
    (question,) = item.questions
    assert (question.choices, question.kind, item.document.title) == (CHOICES, "who", "Corriden")
    assert question.evidence == ("Ada rang the\nbell.",), "as the document has it"


def test_golden_prompt_of_own_questions(tmp_path: Path) -> None:
    (item,) = OwnQuestions().load(own(tmp_path, {}))
    asked = 'Please answer the question based on "the document".\nQuestion: Who?'
    expected = Wording(asked, 'Here is text from "the document":\n\n', f"\n\n{asked}")
    assert OwnQuestions().wording(item.document, item.questions[0]) == expected
    assert OwnQuestions().score(item.questions[0], "Ada") == {"token_f1": 1, "rouge_l": 1}


def test_one_text_is_one_document_whatever_its_titles(tmp_path: Path) -> None:
    """Two items of one text had the same ids, so that one's predictions replaced the other's."""
    (item,) = OwnQuestions().load(own(tmp_path, {"title": "One"}, {"title": "Two", "question": "When?"}))
    assert item.document.title == "One" and [question.id for question in item.questions] == ["0", "1"]


def test_a_text_may_be_as_long_as_no_file_name(tmp_path: Path) -> None:
    """A single line of 280 characters failed with "File name too long"."""
    (item,) = OwnQuestions().load(own(tmp_path, {"document": "Ada rang. " * 28}))
    assert item.document.text == "Ada rang. " * 28


@pytest.mark.parametrize("name", ["bell.md", "texts/the-bell.txt", "../bell.pdf"])
def test_a_path_without_a_file_is_no_text(name: str, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkDataError, match=f'Line 1 of .*: there is no file "{re.escape(name)}"'):
        OwnQuestions().load(own(tmp_path, {"document": name}))


def test_an_unreadable_document_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(BenchmarkDataError, match=r"Line 2 of .*: .*empty\.txt"):
        OwnQuestions().load(own(tmp_path, {}, {"document": "empty.txt"}))
