"""Questions made from main clauses: what they ask, whom pronouns stand for, and what is better left alone."""

from __future__ import annotations

import re
import subprocess
import sys

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
        (
            "The company sold apples, pears and plums to the council.",
            {("What did the company sell to the council?", "apples, pears and plums")},
        ),
        ("The company shall purchase the land near Oslo.", {("What shall the company purchase near Oslo?", "the land")}),
        ("The abbot bought two old mills of oak.", {("How many old mills of oak did the abbot buy?", "two old mills")}),
        (
            "The jam gave way, and the river rose fourteen feet in an hour.",
            {("How many feet did the river rise in an hour?", "fourteen feet")},
        ),
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
        "The abbot hadn’t sold the lake in 1709.",
        "The king doesn't own the lake near Oslo.",
        "No monk sold the lake in 1709.",
        "| The abbot | sold | the lake |",
        "Every morning the abbot walks to the lake.",
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


def test_a_pronoun_that_may_stand_for_two_is_left_alone() -> None:
    assert asked("Tom Olsen bought the mill.", "Mara Tench met him in 1701.", "He sold the mill in 1702.") == []
    # what stands behind "in" is no person
    found = asked("Mara Olsen bought a house in Oslo.", "She sold the house in 1702.")
    assert ("When did Mara Olsen sell the house?", "1702") in {(each.question, each.answer) for each in found}


@pytest.mark.parametrize(
    "empty",
    ["It rained for ten days in 1710.", "It is important to use a large net.", "It was said that the bell rang in 1702.",
     "It took nine years to build the wall.", "It was the clerk who rang the bell."],
)  # fmt: skip
def test_an_it_that_stands_for_nothing_is_left_alone(empty: str) -> None:
    assert asked("The lake froze in the frost of 1701.", empty) == []
    assert asked("The lake froze in the frost of 1701.", "It feeds the mills of the valley in the spring.") != []


@pytest.mark.parametrize(
    ("sentence", "kind"),
    [
        ("Olsen died at the age of 56.", "where"),
        ("Mara Olsen was beaten in the Battle of Oslo.", "where"),
        ("Mara Olsen wrote the book in English.", "where"),
        ("The war of 1709 ended the peace.", "when"),
        ("The abbot sold the lake in late May 1709.", "when"),
        ("The abbot bought two mills and three lakes.", "how many"),
        ("The abbot left Oslo last year.", "what"),
    ],
)
def test_what_would_be_the_wrong_question_is_not_asked(sentence: str, kind: str) -> None:
    assert not [each for each in asked(sentence) if each.kind == kind and not each.question.startswith("Who")]


def test_a_word_with_a_capital_in_a_name_is_small_elsewhere() -> None:
    reader = ClauseReader({*NAMES, "The"})  # of "The New York Times", within a sentence
    found = reader.questions(Sentence(0, 34, 0, "", "The monks sold the lake in 1709."))
    assert ("When did the monks sell the lake?", "1709") in {(each.question, each.answer) for each in found}


def test_threads_that_begin_together_read_the_same() -> None:
    code = (
        "import threading\n"
        "from liftlm.tasks.chunks import read_tokens\n"
        "found = []\n"
        "read = lambda: found.append(tuple(token.tag for token in read_tokens('The monks of Oslo sold the lake.')))\n"
        "threads = [threading.Thread(target=read) for _ in range(4)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
        "assert len(found) == 4 and len(set(found)) == 1, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
