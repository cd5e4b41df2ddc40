"""Retrieval finds the sentence, stays in its budget, and shows text as it stands in the document."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liftlm.config import RetrievalConfig
from liftlm.demo import load_demo
from liftlm.retrieval import Retriever, _terms

TEXT = (
    "The mill stood by the river for a century. A fire took it in May 1871.\n\n"
    "Nobody rebuilt the mill. The miller, Jonas Vale, moved to Arden with two horses. He founded a school there.\n\n"
    "The school is still open. Its bell was cast from the mill's old iron."
)
SENTENCES = [s.strip() for s in re.split(r"(?<=\.)\s+", TEXT)]
MARK = [-1]


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def shown(question: str, text: str = TEXT, budget: int = 10_000, **options: object) -> list[str]:
    """The runs of text between the marks."""
    tokens = Retriever(text, characters, RetrievalConfig.model_validate(options)).select(question, budget, MARK).tokens
    assert len(tokens) <= max(budget, 0)
    runs: list[str] = [""]
    for token in tokens:
        if token == -1:
            runs.append("")
        else:
            runs[-1] += chr(token)
    return [run for run in runs if run]


@pytest.mark.parametrize(
    ("question", "index"),
    [
        ("When did the fire happen?", 1),
        ("Who was the miller?", 3),
        ("How many horses?", 3),
        ("School founders?", 4),  # by its stem
        ("BELL?", 6),
    ],
)
def test_finds_the_sentence(question: str, index: int) -> None:
    assert shown(question, count=1, neighbours=0) == [SENTENCES[index]]


def test_sources_are_the_found_sentences_word_for_word_the_best_first() -> None:
    retriever = Retriever(TEXT, characters, RetrievalConfig(count=2, neighbours=1))
    found = retriever.select("fire bell", 10_000, MARK).sources
    assert set(found) <= set(SENTENCES) and len(found) == 2
    assert found == tuple(" ".join(TEXT[slice(*piece.core)].split()) for piece in retriever.ranked("fire bell")[:2])
    last = found[1]
    backwards = retriever.select("fire bell", 10_000, MARK, lambda question, texts: [float(t == last) for t in texts])
    assert backwards.sources[0] == last
    assert retriever.select("fire bell", 0, MARK).sources == (), "what does not fit is not shown"


def test_neighbours_come_along_and_overlaps_become_one_run() -> None:
    assert shown("Jonas Vale?", count=1, neighbours=1) == [TEXT[TEXT.index("Nobody") : TEXT.index("\n\nThe school")]]
    runs = shown("fire bell", count=2, neighbours=0)
    assert runs == [SENTENCES[1], SENTENCES[6]], "in the document's order, parted by a mark"
    assert shown("fire nobody rebuilt", count=2, neighbours=0) == [
        TEXT[TEXT.index("A fire") : TEXT.index(" The miller")]
    ]


def test_scores_are_those_of_bm25() -> None:
    """Lucene's BM25 (k1 = 1.5, b = 0.75) by hand, on words without endings."""
    texts = ["red fox", "red red dog", "blue cat sat here"]
    words = [text.split() for text in texts]
    mean = sum(map(len, words)) / 3

    def score(query: list[str], doc: list[str]) -> float:
        total = 0.0
        for term in query:
            holding = sum(term in other for other in words)
            idf = math.log(1 + (3 - holding + 0.5) / (holding + 0.5))
            tf = doc.count(term)
            total += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(doc) / mean))
        return total

    text = "Red fox. Red red dog. Blue cat sat here."
    retriever = Retriever("\n\n".join(f"{t.capitalize()}." for t in texts), characters, RetrievalConfig(neighbours=0))
    assert len(retriever.pieces) == 3, text
    assert retriever._index is not None
    for query in (["red"], ["fox", "red"], ["blue", "dog"]):
        expected = [score(query, doc) for doc in words]
        assert list(retriever._index.get_scores(query)) == pytest.approx(expected, rel=1e-5)


def test_the_model_and_bm25_judge_together() -> None:
    """The sum of both, with six nats a point of BM25, over BM25's best alone; by hand from the scores of the index."""
    question, texts = "Who rang the iron bell of the school?", []
    retriever = Retriever(TEXT, characters, RetrievalConfig(neighbours=0, rerank=4))
    by_words = retriever.ranked(question)
    points = sorted(retriever._index.get_scores(_terms(question)), reverse=True)  # type: ignore[union-attr]
    nats = [0.0, 6 * (points[0] - points[1]) + 0.01, 6 * (points[0] - points[2]) - 0.01, -1000.0]

    def judge(asked: str, found: list[str]) -> list[float]:
        assert asked == question
        texts.extend(found)
        return nats

    expected = [by_words[1], by_words[0], by_words[2], by_words[3], *by_words[4:]]
    assert retriever.reranked(question, judge) == expected
    assert texts == [TEXT[slice(*piece.core)] for piece in by_words[:4]]
    assert retriever.reranked(question, None) == by_words
    assert retriever.reranked(question, lambda asked, found: [0.0] * len(found)) == by_words, "the model has no say"


def test_where_one_is_clearly_the_best_it_stands_alone() -> None:
    """`margin` is in nats, six of which are a point of BM25; as many as fit (no count) knows none."""
    question = "Who rang the iron bell of the school?"

    def shown_with(nats: list[float] | None, **settings: Any) -> list[int]:
        config = RetrievalConfig.model_validate({"count": 3, "neighbours": 0, "rerank": 4} | settings)
        retriever = Retriever(TEXT, characters, config)
        order = [" ".join(TEXT[slice(*piece.core)].split()) for piece in retriever.ranked(question)]
        judge = None if nats is None else lambda asked, found: nats
        return [order.index(source) for source in retriever.select(question, 10_000, [0], judge).sources]

    index = Retriever(TEXT, characters, RetrievalConfig(neighbours=0))._index
    assert index is not None
    points = [6 * float(score) for score in sorted(index.get_scores(_terms(question)), reverse=True)[:4]]
    level = [-score for score in points]  # what makes all four equally good
    assert shown_with([nats + gain for nats, gain in zip(level, (0, 5, 2, 0), strict=True)], margin=4) == [1, 2]
    assert shown_with([nats + gain for nats, gain in zip(level, (0, 5, 2, 0), strict=True)], margin=2) == [1]
    assert shown_with([nats + gain for nats, gain in zip(level, (0, 5, 2, 0), strict=True)], margin=None) == [1, 2, 0]
    assert shown_with(None, margin=points[0] - points[1] + 0.01)[:2] == [0, 1]
    assert shown_with(None, margin=max(0.0, points[0] - points[1] - 0.01)) == [0]
    assert len(shown_with(level, margin=0, count=None)) == len(SENTENCES), "all that fit"


def test_as_many_as_fit() -> None:
    assert len("".join(shown("school", count=None, neighbours=0))) >= len(TEXT) - 20
    short = shown("open school bell iron", count=None, neighbours=0, budget=len(SENTENCES[6]) + len(SENTENCES[5]) + 1)
    assert short == [TEXT[TEXT.index("The school is") :]]
    assert shown("Jonas bell", count=None, neighbours=0, budget=50) == [], (
        "the best does not fit, and nothing worse is shown"
    )


def test_a_piece_that_does_not_fit_makes_room_for_the_next() -> None:
    assert shown("Jonas horses bell cast", count=1, neighbours=0, budget=50) == [SENTENCES[6]]


def test_segments_are_runs_of_sentences() -> None:
    retriever = Retriever(TEXT, characters, RetrievalConfig(unit="segment", segment_tokens=90))
    pieces = [TEXT[piece.start : piece.end] for piece in retriever.pieces]
    assert pieces == [
        " ".join(SENTENCES[:2]),
        f"{SENTENCES[2]} {SENTENCES[3]}",
        TEXT[TEXT.index("He founded") : TEXT.index(" Its bell")],
        SENTENCES[6],
    ]
    assert shown("Jonas Vale?", unit="segment", segment_tokens=90, count=1) == [pieces[1]]


@pytest.mark.parametrize("question", ["", "???", "zebra", "的"])
def test_a_question_without_known_words_gets_the_beginning(question: str) -> None:
    assert shown(question, count=1, neighbours=0) == [SENTENCES[0]]


def test_scripts_without_spaces() -> None:
    text = "江南镇有一座老桥。\n\n磨坊在一八七一年被烧毁。\n\n校长叫李明。"
    assert shown("磨坊什么时候烧毁?", text=text, count=1, neighbours=0) == ["磨坊在一八七一年被烧毁。"]


@settings(deadline=None, max_examples=60)
@given(
    st.text("ab .\n的", max_size=80),
    st.text("ab ?", max_size=8),
    st.integers(-2, 60),
    st.sampled_from(["sentence", "segment"]),
    st.integers(0, 2),
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_any_text(text: str, question: str, budget: int, unit: str, neighbours: int, count: int | None) -> None:
    for run in shown(question, text, budget, unit=unit, neighbours=neighbours, count=count):
        assert run in text


def test_the_demo_evidence_is_found() -> None:
    """The evidence among the one or two sentences that are shown, by BM25 alone, without a model's judgement."""
    document, rows = load_demo()
    retriever = Retriever(document.text, characters, RetrievalConfig())
    found = 0
    for row in rows:
        text = "".join(chr(t) for t in retriever.select(row["question"], 100_000, MARK).tokens if t >= 0)
        evidence = [row["evidence"]] if isinstance(row["evidence"], str) else row["evidence"]
        found += any(sentence in text for sentence in evidence)
    assert found >= 0.8 * len(rows)
