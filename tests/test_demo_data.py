"""Checks on the bundled demo: that the chronicle and its questions keep the promises the demo makes about them.

It knows the two data files only; it does not know how answers are scored, and it runs no model.
"""

from __future__ import annotations

import importlib.resources
import itertools
import json
import re
from collections import Counter
from typing import Any

import pytest

END_WORDS = 900  # what a truncated reader is assumed to see at either end
KIND_COUNTS = {"fact": 22, "multi-fact": 7, "timeline": 7}
SHOWN_COUNTS = {"fact": 7, "multi-fact": 1, "timeline": 2}
FIELDS = {"id", "kind", "question", "answer", "keys", "evidence", "shown"}


def _read(name: str) -> str:
    return (importlib.resources.files("liftlm") / "demo" / name).read_text(encoding="utf-8")


def _squeeze(text: str) -> str:
    return " ".join(text.lower().split())


TEXT = _read("chronicle.md")
DATA: dict[str, Any] = json.loads(_read("questions.json"))
QUESTIONS: list[dict[str, Any]] = DATA["questions"]
IDS = [str(question["id"]) for question in QUESTIONS]
TIMELINE = [question for question in QUESTIONS if question["kind"] == "timeline"]
WHICH_FIRST = [question for question in TIMELINE if len(question["keys"]) == 1]
IN_ORDER = [question for question in TIMELINE if len(question["keys"]) > 1]
NOT_TIMELINE = [question for question in QUESTIONS if question["kind"] != "timeline"]


def _each(questions: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("question", questions, ids=lambda question: str(question["id"]))


def _alternatives(key: str) -> list[str]:
    return [_squeeze(alternative) for alternative in key.split("|")]


def _found(key: str, text: str) -> bool:
    return any(alternative in _squeeze(text) for alternative in _alternatives(key))


def _key_positions(question: dict[str, Any], text: str) -> list[int]:
    squeezed = _squeeze(text)
    return [min(squeezed.index(alt) for alt in _alternatives(key) if alt in squeezed) for key in question["keys"]]


def _words_before(offset: int) -> int:
    return len(TEXT[:offset].split())


def _at_an_end(sentence: str) -> bool:
    """True when any part of the sentence lies in the first or the last END_WORDS words."""
    start = TEXT.index(sentence)
    words_after = len(TEXT[start + len(sentence) :].split())
    return _words_before(start) < END_WORDS or words_after < END_WORDS


def test_chronicle_has_the_promised_length_and_headings() -> None:
    assert 5000 <= len(TEXT.split()) <= 6200
    assert len(re.findall(r"^# \S", TEXT, flags=re.MULTILINE)) == 1
    assert 10 <= len(re.findall(r"^## \S", TEXT, flags=re.MULTILINE)) <= 14


def test_chronicle_is_plain_ascii_with_one_line_per_paragraph() -> None:
    assert TEXT.isascii()
    lines = TEXT.splitlines()
    assert all(not first or not second for first, second in itertools.pairwise(lines))


def test_header_names_the_chronicle() -> None:
    assert DATA["document"] == "chronicle.md"
    assert TEXT.startswith(f"# {DATA['title']}\n")


def test_question_counts() -> None:
    assert len(QUESTIONS) >= 30
    assert Counter(question["kind"] for question in QUESTIONS) == KIND_COUNTS


def test_ids_and_questions_are_unique() -> None:
    assert len(set(IDS)) == len(IDS)
    assert len({_squeeze(question["question"]) for question in QUESTIONS}) == len(QUESTIONS)


@_each(QUESTIONS)
def test_question_has_exactly_the_agreed_fields(question: dict[str, Any]) -> None:
    assert set(question) == FIELDS
    assert isinstance(question["shown"], bool)
    assert question["question"].strip()
    assert question["answer"].strip()
    assert question["keys"]
    assert all(all(_alternatives(key)) for key in question["keys"])


@_each(QUESTIONS)
def test_evidence_is_verbatim_and_stands_once_in_the_text(question: dict[str, Any]) -> None:
    minimum = 1 if question["kind"] == "fact" else 2
    assert len(question["evidence"]) >= minimum
    for sentence in question["evidence"]:
        assert TEXT.count(sentence) == 1, sentence


@_each(QUESTIONS)
def test_every_key_is_in_the_answer(question: dict[str, Any]) -> None:
    for key in question["keys"]:
        assert _found(key, question["answer"]), key


# A timeline question names its events, so its keys may stand in the question.
@_each(NOT_TIMELINE)
def test_fact_keys_are_in_the_evidence_and_not_in_the_question(question: dict[str, Any]) -> None:
    evidence = " ".join(question["evidence"])
    for key in question["keys"]:
        assert _found(key, evidence), key
        assert not _found(key, question["question"]), key


@_each(TIMELINE)
def test_timeline_evidence_is_dated(question: dict[str, Any]) -> None:
    for sentence in question["evidence"]:
        assert re.search(r"\b1[6-9]\d\d\b", sentence), sentence


@_each(IN_ORDER)
def test_order_keys_are_in_order_in_the_answer_but_not_in_the_question(question: dict[str, Any]) -> None:
    in_answer = _key_positions(question, question["answer"])
    in_question = _key_positions(question, question["question"])
    assert in_answer == sorted(in_answer)
    assert in_question != sorted(in_question)  # so that copying the list is a wrong answer


def test_which_came_first_answers_are_balanced() -> None:
    named_first = []
    for question in WHICH_FIRST:
        first_event, _, second_event = question["question"].partition(", or ")
        in_first, in_second = (_found(question["keys"][0], event) for event in (first_event, second_event))
        assert in_first != in_second, f"{question['id']}: the key must tell the two events apart"
        named_first.append(in_first)
    assert abs(named_first.count(True) - named_first.count(False)) <= 1


def test_shown_questions() -> None:
    shown = [question for question in QUESTIONS if question["shown"]]
    assert Counter(question["kind"] for question in shown) == SHOWN_COUNTS
    ends = [question["id"] for question in shown if any(_at_an_end(sentence) for sentence in question["evidence"])]
    assert len(ends) <= 2, ends


def test_a_reader_of_both_ends_alone_can_answer_few_questions() -> None:
    answerable = [q["id"] for q in QUESTIONS if all(_at_an_end(sentence) for sentence in q["evidence"])]
    assert len(answerable) <= 8, answerable
