"""A user's question in the words that the extractive writer asks in."""

from __future__ import annotations

from liftlm.tasks.details import FUNCTION_WORDS, telling_phrases
from liftlm.tasks.rewording import reworded
from liftlm.tasks.wordings import wordings_for


def test_what_a_question_names_is_asked_for_together_then_in_pairs_then_alone() -> None:
    found = reworded("Where does the lamp keeper of Corrin Head hide a spare key?", 7)
    assert found == [
        "What do we learn about Corrin Head hide, lamp keeper and spare key?",
        "What is said about Corrin Head hide and lamp keeper?",
        "How are Corrin Head hide and spare key connected?",
        "Which sentence speaks of lamp keeper and spare key?",
        "What does the text say about Corrin Head hide?",
        "What happened with lamp keeper?",
        "What is known of spare key?",
    ]
    assert reworded("Where does the lamp keeper of Corrin Head hide a spare key?", 3) == found[:3]


def test_names_come_first_whatever_a_question_begins_with() -> None:
    assert reworded("Mills near the Rhine?", 1) == ["What is said about Rhine and Mills?"]
    assert reworded("mills near the Rhine?", 1) == ["What is said about Rhine and mills?"]


def test_one_phrase_is_asked_for_in_every_wording_that_takes_one() -> None:
    found = reworded("According to the text, what is gold?", 8)
    assert found == [t.format("gold") for t in wordings_for("en").about if t.count("{") == 1]
    assert reworded("What does the text say about gold?", 8) == found[1:]  # itself is asked anyway


def test_a_question_that_names_nothing_has_no_other_words() -> None:
    assert reworded("Why did she do it?", 8) == reworded("", 8) == reworded("Who was it?", 0) == []


def test_other_languages_are_asked_in_their_own_words() -> None:
    one_place = [t for t in wordings_for("zh").about if t.count("{") == 1]
    assert reworded("明治天皇？", 8) == [t.format("明治天皇") for t in one_place]
    assert len(set(reworded("東京に住んだ天皇は誰ですか。", 8))) == len(reworded("東京に住んだ天皇は誰ですか。", 8)) > 1


def test_phrases_end_at_dull_words_marks_and_after_four_words() -> None:
    text = "The old stone mill near Arden burned down: Dr Tench, a fire-warden, saw red green blue white black smoke."
    assert telling_phrases(text, "en", FUNCTION_WORDS) == [
        "old stone mill",
        "Arden burned",
        "Dr Tench",
        "fire-warden",
        "saw red green blue",
        "white black smoke",
    ]
