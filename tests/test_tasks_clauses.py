"""Questions made from main clauses: what they ask, whom pronouns stand for, and what is better left alone."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liftlm.demo import load_demo
from liftlm.tasks.clause_questions import Asked, ClauseReader
from liftlm.tasks.sentences import Sentence, split_into_sentences

NAMES = {"Mara", "Olsen", "Tench", "Nixon", "Britain", "Rhine", "Oslo", "Corriden", "Haverlock"}


def asked(*sentences: str, paragraphs: tuple[int, ...] | None = None) -> list[Asked]:
    """Of the last sentence, after the others were read."""
    reader = ClauseReader(NAMES)
    found: list[Asked] = []
    for index, text in enumerate(sentences):
        paragraph = paragraphs[index] if paragraphs else 0
        found = reader.questions(Sentence(0, len(text), paragraph, "", text))
    return found


def pairs(*sentences: str) -> set[tuple[str, str]]:
    return {(each.question, each.answer) for each in asked(*sentences)}


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (
            "On 11 December 1689 Mara Olsen rang the bell for twenty-two hours.",
            {
                ("When did Mara Olsen ring the bell for twenty-two hours?", "11 December 1689"),
                ("Who or what rang the bell for twenty-two hours on 11 December 1689?", "Mara Olsen"),
                ("What did Mara Olsen ring for twenty-two hours on 11 December 1689?", "the bell"),
            },
        ),
        (
            "The finished bell weighed 1,140 pounds.",
            {("How many pounds did the finished bell weigh?", "1,140 pounds")},
        ),
        (
            "To address this, the Nixon Administration began negotiations with the combatants.",
            {
                ("Which administration began negotiations with the combatants to address this?", "the Nixon Administration"),
                ("What did the Nixon Administration begin negotiations with?", "the combatants"),
            },
        ),
        (
            "Haverlock came to Corriden because he had prescribed himself cold air.",
            {("Why did Haverlock come to Corriden?", "because he had prescribed himself cold air")},
        ),
        ("The Rhine flows into the lake near Oslo.", {("Where does the Rhine flow into the lake?", "near Oslo")}),
        ("The price of oil had risen in March 1974.", {("When had the price of oil risen?", "March 1974")}),
        ("Fog is the lake's other crop.", {("What is the lake's other crop?", "fog")}),
        ("The first clerk was Mara Olsen.", {("Who was the first clerk?", "Mara Olsen")}),
        (
            "The crisis had an impact on trade and created a rift within NATO.",
            {
                ("What did the crisis have on trade?", "an impact"),
                ("What created a rift within NATO?", "the crisis"),
                ("What did the crisis create within NATO?", "a rift"),
            },
        ),
        (
            "The monks of Oslo, who owned the place, sold the lake to a glover.",
            {
                ("Who sold the lake to a glover?", "the monks of Oslo"),
                ("What did the monks of Oslo sell to a glover?", "the lake"),
            },
        ),
        ("The bell was cast by a founder of Oslo.", {("Who was the bell cast by?", "a founder of Oslo")}),
        (
            "The town's clerk admits that the council may be wrong, but not often.",
            {("What does the town's clerk admit?", "that the council may be wrong, but not often")},
        ),
        ("Mara's acts have been described as revolutionary.", set()),
        ("Mara's acts were seen as a plain revolt.", {("What were Mara's acts seen as?", "a plain revolt")}),
        ("Mara's chain stayed across the road for 187 days.", {("What stayed across the road for 187 days?", "Mara's chain")}),
    ],
)  # fmt: skip
def test_a_clause_is_asked_about_as_people_would(sentence: str, expected: set[tuple[str, str]]) -> None:
    assert expected <= pairs(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "It was his wife who looked at the thing properly.",
        "What has lasted longest is a book.",
        "Nobody was ill.",
        "There were 140 strokes on the first evening.",
        "If the lake froze, the cutters came.",
        "It is known that he kept the rope.",
        "Because oil was cheap.",
        "Rang, the bell.",
        "“Go home,” said the clerk.",
    ],
)
def test_what_does_not_fit_is_left_alone(sentence: str) -> None:
    assert asked(sentence) == []


def test_what_is_denied_is_asked_for_by_its_subject_only() -> None:
    found = asked("The town did not starve in the winter of 1709.")
    assert [each.answer for each in found] == ["the town"]


def test_dates_between_which_something_lasted_are_not_when_it_was() -> None:
    assert not [each for each in asked("The price of oil rose from 1947 to 1967.") if each.kind == "when"]


def test_a_pronoun_stands_for_the_last_subject_that_fits() -> None:
    before = "Mara Olsen kept the rope."
    found = asked(before, "She bought a house in 1701.")
    assert ("When did Mara Olsen buy a house?", "1701") in {(each.question, each.answer) for each in found}
    # the sentence itself does not say who
    assert "Mara Olsen" not in {each.answer for each in found}
    assert pairs("The clerk kept the rope.", "His brother sold the house.") == {
        ("What did the clerk’s brother sell?", "the house")
    }


def test_a_pronoun_without_a_subject_before_it_is_left_alone() -> None:
    assert asked("She bought a house in 1701.") == []
    assert asked("Mara Olsen kept the rope.", "She bought a house in 1701.", paragraphs=(0, 1)) == []
    assert asked("Mara Olsen kept the rope.", "It broke in 1701.") == []


CHRONICLE = split_into_sentences(load_demo()[0].text)


def test_half_of_the_chronicle_is_asked_about_and_answered_in_its_words() -> None:
    names = {word for each in CHRONICLE for word in re.findall(r"(?<=[\w,;] )[A-Z][\w’'-]+", each.text)}
    reader = ClauseReader(names)
    covered = 0
    for sentence in CHRONICLE:
        found = reader.questions(sentence)
        covered += bool(found)
        for each in found:
            assert each.answer.lower() in sentence.text.lower()
            assert each.answer.lower() not in each.question.lower()
            assert each.question.endswith("?") and each.question[0].isupper()
    assert covered >= len(CHRONICLE) / 2


@settings(max_examples=200, deadline=None)
@given(
    st.text(
        alphabet=st.sampled_from("The monks of Saint Orrin, who in 1641 sold it; and (was) had \"'’s/-.?!é\n\t"),
        max_size=120,
    )
)
def test_any_text_is_read(text: str) -> None:
    for each in asked(text):
        assert each.answer in " ".join(text.split()) or each.answer[1:] in text
