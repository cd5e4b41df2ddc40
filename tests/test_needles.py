"""Needles in a haystack: where they are hidden, how they are asked for, and what counts as found."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liftlm.documents import Document
from liftlm.errors import BenchmarkDataError, ConfigError, LiftError
from liftlm.evaluation.benchmark import Item
from liftlm.evaluation.needles import Needle, Needles, cut_at_a_sentence, hide, load_needles
from liftlm.prompts import Wording

DATA = Path(__file__).parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="the evaluation data is not beside the repository")

TEXT = " ".join(f"Sentence number {number} tells of nothing much." for number in range(400))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


def place(item: Item, sentence: str) -> float:
    """0 to 1, of the text without the sentence."""
    return item.document.text.index(sentence) / (len(item.document.text) - len(sentence) - 1)


# --- the needles that come along --------------------------------------------------------------------------------------


def test_the_published_needle_word_for_word() -> None:
    """The defaults of gkamradt/LLMTest_NeedleInAHaystack, run.py."""
    first = load_needles()[0]
    assert first.name == "san-francisco"
    assert first.sentence == (
        "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
    )
    assert first.questions[0] == "What is the best thing to do in San Francisco?"


@pytest.mark.parametrize("needle", load_needles(), ids=lambda needle: needle.name)
def test_needles_can_be_found_and_are_not_given_away(needle: Needle) -> None:
    assert len(needle.questions) >= 2 and needle.keywords and needle.distractors
    for keyword in needle.keywords:
        assert keyword in needle.sentence.lower()
        assert not any(keyword in question.lower() for question in needle.questions), "the question tells the answer"
        assert not any(keyword in look.lower() for look in needle.distractors), "a look-alike would count as found"


# --- hiding -----------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 40))
def test_hidden_sentences_break_no_other(one: float, other: float, count: int) -> None:
    text = " ".join(f"Sentence number {number} tells of nothing much." for number in range(count))
    hidden = hide(text, [(one, "Ada hid here."), (other, "So did Oswin.")])
    assert hidden.count("Ada hid here.") == hidden.count("So did Oswin.") == 1
    rest = hidden.replace("Ada hid here.", "").replace("So did Oswin.", "")
    assert rest.split() == text.split()
    for sentence in ("Ada hid here.", "So did Oswin."):
        before = hidden[: hidden.index(sentence)].rstrip()
        assert not before or before.endswith(".")


def test_a_haystack_ends_with_a_sentence() -> None:
    assert cut_at_a_sentence(TEXT, 100) == TEXT[:81] and TEXT[:81].endswith("much.")
    assert cut_at_a_sentence("Short text.", 100) == "Short text."
    assert cut_at_a_sentence("one word after another " * 2, 20) == "one word after anoth", "no sentence to end with"


@pytest.mark.parametrize("distractors", [False, True])
def test_grid(book: Path, distractors: bool) -> None:
    items = Needles(lengths=[500, 2000], depths=[0, 0.5, 1], distractors=distractors).load(book)
    assert len(items) == 2 * 3 * len(load_needles())
    assert len({item.document.id for item in items}) == len(items)
    for item in items:
        for question in item.questions:
            data = question.data
            sentence = question.evidence[0]
            assert place(item, sentence) == pytest.approx(data["depth"], abs=0.1 if distractors else 0.03)
            assert len(item.document.text) <= data["length"] * 4.2 + (400 if distractors else 120)
            assert len(item.document.text) >= data["length"] * 4.2 - 60
            needle = next(needle for needle in load_needles() if needle.name == data["needle"])
            assert all((look in item.document.text) == distractors for look in needle.distractors)
    cells = {(q.data["length"], q.data["depth"], q.data["needle"], q.kind) for item in items for q in item.questions}
    assert len(cells) == 2 * 3 * 3 * 2


def test_together_every_needle_comes_to_every_depth_once(book: Path) -> None:
    depths = [0, 0.2, 0.4, 0.6, 0.8, 1]
    items = Needles(lengths=[2000], depths=depths, together=True).load(book)
    assert len(items) == len(depths)
    cells = [(q.data["needle"], q.data["depth"]) for item in items for q in item.questions if q.kind == "phrasing 1"]
    assert sorted(cells) == sorted((needle.name, depth) for needle in load_needles() for depth in depths)
    for item in items:
        for question in item.questions:
            assert place(item, question.evidence[0]) == pytest.approx(question.data["depth"], abs=0.04)


def test_two_texts_have_a_needle_at_each_of_six_depths(book: Path) -> None:
    depths = [0, 0.2, 0.4, 0.6, 0.8, 1]
    both = Needles(lengths=[1000, 2000], depths=depths, together=True, texts=2).load(book)
    every = Needles(lengths=[1000, 2000], depths=depths, together=True).load(book)
    assert both == [*every[:2], *every[6:8]]
    for two in (both[:2], both[2:]):
        assert sorted({question.data["depth"] for item in two for question in item.questions}) == depths
    with pytest.raises(ConfigError, match="--together"):
        Needles(texts=2)


def test_together_at_one_depth_the_others_stand_apart(book: Path) -> None:
    (item,) = Needles(lengths=[2000], depths=[0.5], together=True).load(book)
    assert [question.data["depth"] for question in item.questions[::2]] == [0.5, 0.83, 0.17]


def test_the_seed_moves_only_the_look_alikes(book: Path) -> None:
    def load(seed: int) -> list[Item]:
        return Needles(lengths=[1000], depths=[0.5], needles=["password"], distractors=True).load(book, seed=seed)

    assert load(0) == load(0) and load(0)[0].document.id != load(1)[0].document.id
    assert load(0)[0].questions == load(1)[0].questions


def test_limit(book: Path) -> None:
    assert sum(len(item.questions) for item in Needles(lengths=[500]).load(book, limit=5)) == 5


# --- asking and scoring -----------------------------------------------------------------------------------------------


def test_golden_prompt(book: Path) -> None:
    benchmark = Needles(lengths=[500], depths=[0.5], needles=["san-francisco"])
    (item,) = benchmark.load(book)
    asked = 'Please answer the question based on "the text".\nQuestion: What is the best thing to do in San Francisco?'
    expected = Wording(asked, 'Here is text from "the text":\n\n', f"\n\n{asked}")
    assert benchmark.wording(item.document, item.questions[0]) == expected
    assert item.document == Document("the text", item.document.text, "needle 500 0.5")


@pytest.mark.parametrize(
    ("answer", "recall"),
    [
        ("Eat a SANDWICH and sit in Dolores Park.", 1),
        ("Have a sandwich.", 0.5),
        ("Sit in dolores\npark", 0),
        ("Rent a kayak.", 0),
        ("", 0),
        ("...", 0),
        ("sandwich sandwich sandwich", 0.5),  # repeated
        ("sandwiches near Dolores Parkway", 1),  # within longer words
        ("a sand wich in Dolores  Park", 0),  # two blanks
        ("a sand wich in Dolores Park", 0.5),
        ("Not a sandwich, nor Dolores Park!", 1),  # what is said of them is not looked at
        ("сэндвич в Долорес-парке", 0),
        ("The best thing to do in San Francisco is to " + "walk " * 200 + "to dolores park, sandwich in hand.", 1),
    ],
)
def test_found_means_every_keyword(answer: str, recall: float, book: Path) -> None:
    benchmark = Needles(lengths=[500], depths=[0.5], needles=["san-francisco"])
    question = benchmark.load(book)[0].questions[0]
    scores = benchmark.score(question, answer)
    assert (scores["keyword_recall"], scores["recalled"]) == (recall, float(recall == 1))
    assert set(scores) == set(Needles.metrics)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_refused(book: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkDataError, match="haystack is missing") as caught:
        Needles().load(None)
    assert "--data" in caught.value.next_step
    with pytest.raises(BenchmarkDataError, match="fewer than 32,000"):
        Needles(lengths=[500, 32000]).load(book)
    with pytest.raises(LiftError, match="There is no file"):
        Needles().load(tmp_path / "nowhere.txt")
    for wrong in ({"depths": [1.2]}, {"depths": [-0.1]}, {"lengths": [50]}, {"needles": ["hay"]}):
        with pytest.raises(ConfigError):
            Needles(**wrong)  # type: ignore[arg-type]


@real_data
def test_a_real_book_holds_the_whole_grid() -> None:
    depths = [0, 0.2, 0.4, 0.6, 0.8, 1]
    items = Needles(lengths=[1000, 8000, 32000], depths=depths, together=True).load(DATA / "pg19" / "52654.txt")
    assert len(items) == 18
    for item in items:
        for question in item.questions:
            assert place(item, question.evidence[0]) == pytest.approx(question.data["depth"], abs=0.08)
