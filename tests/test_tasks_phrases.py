"""Noun phrases asked for in their place: what is found, what is left alone, and how it is asked."""

import pytest

from liftlm.demo import load_demo
from liftlm.tasks.extractive import write_extractive_tasks
from liftlm.tasks.phrases import ask_phrases, in_place
from liftlm.tasks.sentences import split_into_sentences

CHRONICLE = load_demo()[0].text


def asked(text: str) -> dict[str, str]:
    """question by answer"""
    return {each.answer: each.question for each in ask_phrases(text)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "The spotted fever reached Corriden in October 1709 in a bale of second-hand coats.",
            {
                "The spotted fever": "What reached Corriden in October 1709 in a bale of second-hand coats?",
                "Corriden": "The spotted fever reached who or what in October 1709 in a bale of second-hand coats?",
                "a bale of second-hand coats": "The spotted fever reached Corriden in October 1709 in what?",
                "second-hand coats": "The spotted fever reached Corriden in October 1709 in a bale of what?",
            },
        ),
        (
            "The baker saw the miller's daughter at the ford.",
            {
                "The baker": "Who saw the miller's daughter at the ford?",
                "the miller": "The baker saw whose daughter at the ford?",
                "the ford": "The baker saw the miller's daughter at what?",
            },
        ),
        (
            'It was called the "first oil shock" by the papers.',
            {
                "first oil shock": 'It was called the "what" by the papers?',
                "the papers": 'It was called the "first oil shock" by what?',
            },
        ),
        ("The ox drank wine, cold water and milk.", {"cold water": "The ox drank wine, what and milk?"}),
    ],
)
def test_every_noun_phrase_is_asked_for_in_its_place(text: str, expected: dict[str, str]) -> None:
    found = asked(text)
    assert expected.items() <= found.items(), found


@pytest.mark.parametrize(
    "text",
    [
        "They took part in it for the rest of the time.",  # nothing that answers anything
        "He and she saw it.",
        "In 1841 and on 3 May 1888 it rained.",  # dates are asked for as such
        "| mill | 1841 | 3 |",  # a row of a table
        "But I'll take leave.",
        "It hasn't rained on the mill.",  # the parser takes it apart wrongly
        "",
    ],
)
def test_what_says_nothing_is_not_asked_for(text: str) -> None:
    assert not [answer for answer in asked(text) if answer != "it"]


def test_a_date_is_no_part_of_a_phrase() -> None:
    assert {"Mother Tench", "the sisters"} <= set(asked("In 1841 Mother Tench was recast by the sisters."))
    assert "zoologist Graham Twigg" in asked("In 1984 zoologist Graham Twigg wrote a book.")


def test_answers_are_phrases_of_the_sentence_that_their_questions_leave_out() -> None:
    count = 0
    for sentence in split_into_sentences(CHRONICLE):
        for each in ask_phrases(sentence.text):
            count += 1
            assert each.answer in sentence.text and each.question.endswith("?") and each.kind in ("who", "what")
            assert each.answer.lower() not in each.question.lower()
            assert 1 <= len(each.answer.split()) <= 10 and len(each.question.split()) >= 4
    assert count > 1000


@pytest.mark.parametrize(
    ("text", "there", "not_there"),
    [
        ("The monks kept the crown of the king's brother in the hall.", {"the king"}, {"the crown of the king"}),
        ("The abbot’s men sold the lake near the king’s horse.", {"The abbot", "the king’s horse"}, {"men", "horse"}),
        ("Mr. O'Connor and Mrs. D'Arcy sold the farm.", {"Mr. O'Connor", "Mrs. D'Arcy"}, {"Mr. O", "Mrs. D"}),
        ("Sales rose by 15 percent to €4.2 billion.", {"15 percent"}, {"€4.2", "4.2"}),
        ("Oil fell by 70% to $5.11 a barrel.", {"70%"}, {"5.11"}),
        ("Apollo 11 landed on the moon.", {"the moon"}, {"Apollo"}),
        ("The army crossed 2000 miles of desert.", {"2000 miles of desert"}, {"miles of desert"}),
        (
            "August Strindberg and April Jones met in the town.",
            {"August Strindberg", "April Jones"},
            {"Strindberg", "Jones"},
        ),
        ("The mill's closed and the miller's gone.", set(), {"The mill", "the miller"}),
        ("The council of the town and the mayor of the town met.", {"The council of the town"}, {"the town"}),
        ("What is the capital of the kingdom of France?", set(), {"France", "the kingdom of France"}),
        ("The dog that the man who lived in the house had sold came back.", {"the house"}, {"the man"}),
        ("The house of the miller", set(), {"The house of the miller"}),
    ],
)
def test_nothing_is_cut_in_two_or_given_away(text: str, there: set[str], not_there: set[str]) -> None:
    found = set(asked(text))
    assert there <= found and not (not_there & found), found


@pytest.mark.parametrize(
    "person", ["archduke", "co-founder", "great-grandfather", "schoolchildren", "shepherd", "policeman"]
)
def test_people_are_asked_for_with_who(person: str) -> None:
    assert asked(f"The {person} visited the town.")[f"The {person}"] == "Who visited the town?"


@pytest.mark.parametrize("thing", ["account", "season", "newspaper", "answer", "omen", "prison", "discount"])
def test_things_are_asked_for_with_what(thing: str) -> None:
    assert asked(f"The {thing} changed the town.")[f"The {thing}"] == "What changed the town?"


def test_no_phrase_begins_with_of() -> None:
    found = asked("There was a great ringing of glasses and a jolly round of laughter in the hall.")
    assert "the hall" in found and not any(answer.lower().startswith("of ") for answer in found)


def test_far_words_are_left_out() -> None:
    text = " ".join(f"w{n}" for n in range(50)) + "."
    assert in_place(text, text.index("w20"), text.index("w20") + 3, "what") == (
        "… " + " ".join(f"w{n}" for n in range(6, 20)) + " what " + " ".join(f"w{n}" for n in range(21, 35)) + " …?"
    )


def test_most_of_what_people_ask_for_is_among_the_answers() -> None:
    """The chronicle's questions have answers of few words in a sentence; three tasks a sentence ask for fewer of them."""
    document, rows = load_demo()
    facts = [row for row in rows if row["kind"] == "fact"]
    share = {}
    for per_sentence in (3, 12):
        answers = [task.answer.lower() for task in write_extractive_tasks(document.text, per_sentence, 0, "short")]
        short = [answer for answer in answers if len(answer.split()) <= 10]
        share[per_sentence] = sum(
            any(
                all(any(option.lower() in answer for option in key.split("|")) for key in row["keys"])
                for answer in short
            )
            for row in facts
        ) / len(facts)
    assert share[12] >= 0.8 and share[12] > share[3]
