"""Which tasks are dropped and why, and what is kept; counts of a set of tasks against counting by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liftlm.tasks.extractive import write_extractive_tasks
from liftlm.tasks.filters import filter_tasks, task_statistics, words
from liftlm.tasks.sentences import split_into_sentences
from liftlm.tasks.task import Task

BEFORE = "Marta Vell was the last keeper of the lighthouse at Skarholm, and her brother Oskar the first to leave it."
EVIDENCE = (
    "In 1831 she carried forty-one silver marks and 1,200 nails across the frozen lake to the bell-founders, "
    "because the old bell had cracked."
)
AFTER = "The third winter was milder."
TEXT = f"{BEFORE} {EVIDENCE} {AFTER}"


def task(question: str, answer: str, evidence: str = EVIDENCE) -> Task:
    start = TEXT.index(evidence)
    return Task(question, answer, "fact", start, start + len(evidence))


def reason(question: str, answer: str, evidence: str = EVIDENCE) -> str | None:
    """Why it is dropped, or None."""
    kept, dropped = filter_tasks([task(question, answer, evidence)], TEXT)
    assert len(kept) + sum(dropped.values()) == 1
    return next(iter(dropped), None)


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What did she carry across the lake?", "Forty-one silver marks and 1,200 nails."),
        ("How many marks were there?", "41"),
        ("How many marks were there?", "forty one"),
        ("How many nails were there?", "1200 nails"),
        ("When did she cross the lake?", "In 1831."),
        ("Why did she need a bell-founder?", "Because the old bell was cracked."),
        ("Why was a new bell needed?", "The crack in the old bell."),
        ("How did she get the marks to the founders?", "By carrying them across a frozen lake."),
        ("What was crossed that year?", "The lakes"),
        ("Who crossed the frozen lake in 1831?", "Marta Vell"),  # "she" in the evidence
        ("Who crossed the frozen lake in 1831?", "Marta Vell herself carried the marks to the founders."),
        ("Was the lake frozen?", "Yes."),
        ("Was the lake frozen?", "Yes, the lake was frozen."),
        ("Had the bell survived?", "No."),
        ("Whose was it then?", "She"),  # function words, but those of the evidence
        ("Which came first, the cracking of the bell or the crossing of the lake?", "The cracking of the bell."),
        ("Put in order: crossing the lake; the bell cracking", "The bell cracking; crossing the lake."),
        ("In which order did they happen: lake, bell?", "Bell, lake."),
        ("Wer trug die silver marks?", "Marta Vell trug silver marks lake founders bell cracked across."),
    ],
)
def test_good_tasks_are_kept(question: str, answer: str) -> None:
    assert reason(question, answer) is None


def test_what_is_kept_is_kept_as_it_was_and_in_order() -> None:
    tasks = [
        task("When did she cross it?", "1831"),
        task("What did she carry?", "Silver"),
        task("What had cracked?", "A bell"),
    ]
    kept, dropped = filter_tasks(iter(tasks), TEXT)
    assert kept == tasks and dropped == {}
    assert filter_tasks([], TEXT) == ([], {})


# --- malformed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("", "1831"),
        ("When was it?", ""),
        ("When was it?", " … "),
        ("???", "1831"),
        ("1 2 3?", "1831"),
        ("Which year?", "1831"),
        ('{"question": "When was it?"', "1831"),
        ("When was it now?", '1831"}'),
        ("When was it now?", "{'answer': '1831'}"),
        ("Question: When was it?", "1831"),
        ("When was it?\nAnswer: 1831", "1831"),
        ("**Q1:** When was it then?", "1831"),
        ("When was it now?", "A: 1831"),
        ("When was it now?", "```1831```"),
        ("When was it now?", "1831<|im_end|>"),
        ("When was it now?", "<think>1831</think>"),
        ("When was it now?", "[/INST] 1831"),
        ("When was it now?", "answer"),
        ("When was it now?", "<your answer>"),
        ("When was it now?", "string"),
        ("When " * 3 + "was it, " * 70 + "then?", "1831"),
        ("When was it now?", "1831 " * 200),
        ("When was it, and was it, and was it, and was it, and was it, and was it?", "1831"),
        ("When was it now?", "bell " * 12),
    ],
)
def test_malformed(question: str, answer: str) -> None:
    assert reason(question, answer) == "malformed"


# --- says nothing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "As the text says.",
        "As stated in the text",
        "As mentioned above.",
        "Like the passage describes, it was so.",
        "The text does not say.",
        "The passage doesn’t mention this.",
        "The sentence did not explicitly state the year.",
        "The sentences do not say.",
        "No, the text does not say",
        "I don't know.",
        "I do not know the answer",
        "I'm sorry, but I cannot tell.",
        "I cannot determine that from the text.",
        "Not mentioned.",
        "It is not mentioned in the text.",
        "not specified",
        "This is not explicitly stated.",
        "It cannot be determined.",
        "There is no information about that.",
        "Not enough information",
        "See above.",
        "See the text above",
        "Refer to the passage.",
        "Same as above",
        "The answer is in the text.",
        "The text says so.",
        "Unknown",
        "N/A",
        "As an AI language model, I cannot answer.",
    ],
)
def test_answers_that_say_nothing(answer: str) -> None:
    assert reason("When did she cross the lake?", answer) == "says nothing"


@pytest.mark.parametrize(
    ("sentence", "question", "answer"),
    [
        ("Where he was born is not known.", "Where was he born, then?", "It is not known"),
        (
            "The author did not marry again.",
            "Did the author ever take a second wife?",
            "The author did not marry again.",
        ),
        ("The grave of the unknown sailor lies there.", "Whose grave lies there?", "Unknown"),
        ("He told the story as told by the ferryman.", "How was the tale given?", "As told by the ferryman."),
        (
            "The document was not given by the king but by his clerk.",
            "Who signed the paper?",
            "The document was not given by the king.",
        ),
        ("“I don't know,” said the ferryman.", "What did the ferryman say?", "I don't know"),
    ],
)
def test_words_about_texts_and_knowing_can_be_answers(sentence: str, question: str, answer: str) -> None:
    kept, dropped = filter_tasks([Task(question, answer, "fact", 0, len(sentence))], sentence)
    assert len(kept) == 1, dropped


# --- gives its answer away --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What colour had the silver marks?", "Silver"),
        ("In what year was 1831?", "1831"),
        ("What did the silver marks cross when the lake was frozen?", "The frozen lake."),
        ("How many are forty-one marks?", "41 marks"),
        ("Why did the bell founders cast a bell that cracked?", "Because of the cracking bell"),
    ],
)
def test_a_question_that_holds_its_answer(question: str, answer: str) -> None:
    assert reason(question, answer) == "gives its answer away"


def test_a_part_of_the_answer_in_the_question_is_no_harm() -> None:
    assert reason("What did she carry across the frozen lake?", "Silver marks across the frozen lake") is None


# --- unanswerable -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What did she carry across the lake?", "Gold"),
        ("What did she carry across the lake?", "Golden marks"),
        ("What did she carry across the lake?", "Silver marks and candles"),
        ("How many marks were there?", "42"),
        ("How many marks were there?", "Forty-two silver marks were carried across the lake"),  # numbers, however long
        ("When did she cross the lake?", "In 1832."),
        ("How many nails were there?", "200"),
        ("Who crossed the frozen lake?", "Anna"),
        ("Who was the keeper's brother?", "Oskar"),  # stands before, but nothing of the question in the evidence
        ("What did she do that year?", "She sailed home from the island after a long and stormy night."),
        ("What is the capital of France?", "Paris"),
        ("Were the marks of gold or of copper?", "Copper"),  # stands in the question only
        ("Was the lake frozen?", "Yes, since December."),
        ("Whose was it then?", "His"),  # function words, and not those of the evidence
    ],
)
def test_an_answer_that_is_not_in_the_evidence(question: str, answer: str) -> None:
    assert reason(question, answer) == "unanswerable"


def test_an_answer_from_elsewhere_in_the_document_is_not_in_the_evidence() -> None:
    assert reason("What was the third winter like?", "Milder", AFTER) is None
    assert reason("What was the third winter like?", "Milder") == "unanswerable"
    # a name from before the evidence, where that has no pronoun to stand for it
    assert reason("Who saw the third winter?", "Marta Vell", AFTER) == "unanswerable"


def test_a_longer_answer_may_have_a_word_of_its_own() -> None:
    assert reason("What happened then?", "Silver marks were carried across safely") is None  # 1 of 5
    assert reason("What happened then?", "Silver marks were carried home safely") == "unanswerable"  # 2 of 5


def test_scripts_without_blanks_are_compared_by_character() -> None:
    text = "水车在一八三一年烧毁了。"
    tasks = [
        Task("水车在什么时候烧毁了?", "一八三一年", "when", 0, len(text)),
        Task("水车在什么时候烧毁了?", "九七五四", "when", 0, len(text)),
    ]
    assert filter_tasks(tasks, text) == (tasks[:1], {"unanswerable": 1})


# --- duplicates -------------------------------------------------------------------------------------------------------


def test_the_same_question_about_the_same_evidence_is_asked_once() -> None:
    first = task("When did she cross the lake?", "1831")
    same = [task("when did she  cross the lake", "In 1831"), task("When did SHE cross the lake?!", "1831")]
    assert filter_tasks([first, *same], TEXT) == ([first], {"duplicate": 2})
    other = task("When did she cross the lake?", "The third winter", AFTER)
    assert filter_tasks([first, other], TEXT) == ([first, other], {})


def test_the_same_words_in_another_order_are_a_duplicate_if_the_answer_is_the_same() -> None:
    first = task("What did she carry across the lake?", "Silver marks")
    turned = task("Across the lake, what did she carry?", "silver marks.")
    another = task("Across the lake, what did she carry?", "Nails")
    assert filter_tasks([first, turned], TEXT) == ([first], {"duplicate": 1})
    assert filter_tasks([first, another], TEXT) == ([first, another], {})
    elsewhere = Task(turned.question, turned.answer, "fact", first.start - 20, first.end)
    assert filter_tasks([first, elsewhere], TEXT) == ([first], {"duplicate": 1})


def test_what_repeats_a_dropped_task_is_no_duplicate() -> None:
    bad, good = task("When did she cross the lake?", "1999"), task("When did she cross the lake?", "1831")
    assert filter_tasks([bad, bad, good, good], TEXT) == ([good], {"unanswerable": 2, "duplicate": 1})


# --- anything ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=60), st.text(max_size=60)), max_size=6))
def test_every_task_is_kept_or_counted_and_twice_filtered_is_once_filtered(pairs: list[tuple[str, str]]) -> None:
    tasks = [task(question, answer) for question, answer in pairs]
    kept, dropped = filter_tasks(tasks, TEXT)
    assert len(kept) + sum(dropped.values()) == len(tasks)
    assert set(dropped) <= {"malformed", "duplicate", "unanswerable", "gives its answer away", "says nothing"}
    assert filter_tasks(kept, TEXT) == (kept, {})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_words_of_the_evidence_in_its_order_always_answer(data: Any) -> None:
    """An extract is supported, whatever it is; it may be dropped for saying nothing but the question's words only."""
    own = EVIDENCE.split()
    start = data.draw(st.integers(0, len(own) - 1))
    answer = " ".join(own[start : data.draw(st.integers(start + 1, len(own)))])
    assert reason("Was geschah hier eigentlich?", answer) is None


# --- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_of_three_tasks() -> None:
    sentences = split_into_sentences(TEXT)
    assert len(sentences) == 3
    tasks = [
        task("When did she cross the lake?", "In 1831."),
        task("when did she cross the LAKE", "1831"),
        Task("What was milder than the others?", "The third winter", "who", TEXT.index(AFTER), len(TEXT)),
    ]
    found = task_statistics(tasks, sentences)
    assert (found.tasks, found.distinct_questions, found.sentences) == (3, 2, 3)
    assert found.by_kind == {"fact": 2, "who": 1} and list(found.by_kind) == ["fact", "who"]
    assert found.covered == pytest.approx(2 / 3)
    assert (found.question_words, found.answer_words) == (pytest.approx(6), pytest.approx((2 + 1 + 3) / 3))


def test_statistics_of_nothing() -> None:
    found = task_statistics([], [])
    assert (found.tasks, found.sentences, found.covered, found.question_words, found.by_kind) == (0, 0, 0, 0, {})
    assert task_statistics([], split_into_sentences(TEXT)).covered == 0


def test_evidence_that_is_the_whole_document_covers_no_sentence() -> None:
    text = " ".join(f"Sentence {n} of this long document speaks of {n} things." for n in range(100))
    sentences = split_into_sentences(text)
    whole = Task("What is it about?", "Things", "given", 0, len(text))
    assert task_statistics([whole], sentences).covered == 0
    few = Task("What is it about?", "Things", "given", sentences[3].start, sentences[7].end)
    assert task_statistics([whole, few], sentences).covered == pytest.approx(5 / 100)
    parts = Task("What is it about?", "Things", "given", sentences[3].end - 9, sentences[4].start + 9)
    assert task_statistics([parts], sentences).covered == pytest.approx(2 / 100)


def test_coverage_and_means_are_those_of_a_naive_count() -> None:
    text = "\n\n".join(
        f"In {1800 + n} the ferryman {n} crossed the lake {n + 2} times. He saw a bell. Nobody knew of it at all."
        for n in range(40)
    )
    sentences = split_into_sentences(text)
    tasks = write_extractive_tasks(text, per_sentence=2)[::3]
    found = task_statistics(tasks, sentences)
    covered = [
        any(task.start < s.end and s.start < task.end for task in tasks if task.end - task.start <= 2048)
        for s in sentences
    ]
    assert 0 < sum(covered) < len(sentences) or all(covered)
    assert found.covered == pytest.approx(sum(covered) / len(sentences))
    assert found.answer_words == pytest.approx(
        sum(len(re.findall(r"[a-z]+|\d+", t.answer.lower())) for t in tasks) / len(tasks), rel=0.02
    )


def test_words() -> None:
    assert words("The bell’s 1,200 marks,\nfor-ever: 3.5 at 10:30!") == re.split(
        " ", "the bell s 1,200 marks for ever 3.5 at 10:30"
    )
    assert words("水车 and ferry") == ["水", "车", "and", "ferry"]
    assert words("…") == []
