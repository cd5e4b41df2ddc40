"""Sentences: nothing of a document is lost, spans are true, and what is no end of a sentence is not taken for one."""

from __future__ import annotations

import re
import textwrap
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liftlm.demo import load_demo
from liftlm.tasks.sentences import Sentence, split_into_sentences

# --- properties -------------------------------------------------------------------------------------------------------

WORD = st.text("abcdefghijklmnopqrstuvwxyzéßłж", min_size=1, max_size=9)
SENTENCE = st.tuples(
    st.lists(WORD, min_size=4, max_size=150), st.sampled_from(".!?"), st.sampled_from(["", ", ", "; ", " — "])
).map(lambda made: (made[2] or " ").join([" ".join(made[0][:3]), " ".join(made[0][3:])]).capitalize() + made[1])
PARAGRAPH = st.lists(SENTENCE, min_size=1, max_size=4).map(" ".join)
WRAPPED = st.tuples(PARAGRAPH, st.integers(12, 80)).map(lambda made: textwrap.fill(*made, break_long_words=False))
ITEMS = st.lists(st.lists(WORD, min_size=1, max_size=12).map(" ".join), min_size=1, max_size=5)
LIST = st.tuples(ITEMS, st.sampled_from(["- ", "* ", "• ", "1. ", "2) "]), st.booleans()).map(
    # a lone numbered line may be a heading, so those lists have no blank lines
    lambda made: ("\n\n" if made[2] and made[1][0] not in "12" else "\n").join(made[1] + item for item in made[0])
)
HEADING = st.lists(WORD, min_size=1, max_size=6).map(" ".join)
# (text, what of it must be in sentences, heading)
BLOCK = st.one_of(
    st.one_of(PARAGRAPH, WRAPPED).map(lambda text: (text, text, "")),
    LIST.filter(lambda text: text[0] not in "12" or "\n" in text).map(
        lambda text: (text, re.sub(r"(?m)^(?:[-*•]|[12][.)]) ", "", text), "")
    ),
    HEADING.map(lambda text: (f"# {text}", "", text)),
    HEADING.map(lambda text: (f"{text}\n{'=' * len(text)}", "", text)),
    HEADING.map(lambda text: (f"**{text}**", "", text)),
)


def check_spans(text: str, sentences: list[Sentence]) -> None:
    """What holds for any text: in range, in order, apart, as they say, and no longer than an answer may be."""
    end = 0
    for sentence in sentences:
        assert end <= sentence.start < sentence.end <= len(text)
        end = sentence.end
        span = text[sentence.start : sentence.end]
        assert span == span.strip() and sentence.text == re.sub(r"\s+", " ", span)
        assert len(sentence.text.split()) <= 60 and re.search(r"\w", span)
    assert [s.paragraph for s in sentences] == sorted(s.paragraph for s in sentences)


@settings(deadline=None, max_examples=150)
@given(st.lists(BLOCK, max_size=6), st.sampled_from(["\n\n", "\n \t\n", "\r\n\r\n", "\n\n\n\n"]))
def test_every_word_outside_headings_and_list_marks_is_in_a_sentence(
    blocks: list[tuple[str, str, str]], gap: str
) -> None:
    text = gap.join(block for block, _, _ in blocks)
    sentences = split_into_sentences(text)
    check_spans(text, sentences)
    wanted = [word for _, body, _ in blocks for word in re.findall(r"\w+", body)]
    # joined fragments of a list bring the marks between them along
    found = [word for s in sentences for word in re.findall(r"\w+", re.sub(r"(?<!\w)[12][.)] ", "", s.text))]
    assert found == wanted
    heading, expected = "", []
    for _, body, title in blocks:
        heading = title or heading
        expected += [heading] * len(re.findall(r"\w+", body))
    stood = [s.heading for s in sentences for _ in re.findall(r"\w+", re.sub(r"(?<!\w)[12][.)] ", "", s.text))]
    assert stood == expected


PIECES = [
    "a",
    "Bc",
    "mr.",
    "é",
    "牛",
    "。",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    ".",
    "! ",
    ", ",
    "- ",
    "12. ",
    "# ",
    "* ",
    "3)",
    "===",
]


@settings(deadline=None, max_examples=400)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=60).map("".join))
def test_any_text_gives_true_spans_and_loses_only_short_lines_and_marks(text: str) -> None:
    sentences = split_into_sentences(text)
    check_spans(text, sentences)
    covered = {index for s in sentences for index in range(s.start, s.end)}
    blocks = {  # characters of blocks that are a line, perhaps underlined
        index
        for block in re.finditer(r"(?s).+?(?=\n\s*\n|$(?!\n))", text)
        if len(re.sub(r"\n\s*[=-]+\s*$", "", block.group().strip()).split("\n")) == 1
        for index in range(*block.span())
    }
    for index, character in enumerate(text):
        if re.match(r"\w", character) and index not in covered and index not in blocks:
            assert re.match(r"\d*[.)]\s", text[index:]) or character.isdigit(), (index, text)


@pytest.mark.parametrize("glue", [" ", ", ", "; ", "\n"])
@pytest.mark.parametrize("count", [60, 61, 500])
def test_a_sentence_without_end_is_parted_at_clauses(count: int, glue: str) -> None:
    text = "Once " + " ".join(f"word{n}{glue.strip() if n % 7 == 0 else ''}" for n in range(count - 1)) + "."
    sentences = split_into_sentences(text)
    check_spans(text, sentences)
    assert " ".join(s.text for s in sentences) == text
    assert (len(sentences) == 1) == (count == 60)
    if glue.strip() and count > 60:
        assert all(s.text.endswith((glue.strip(), ".")) for s in sentences), "not parted at a clause"


def test_a_giant_word_in_the_middle_does_not_keep_a_sentence_whole() -> None:
    text = " ".join(f"w{n}" for n in range(70)) + " " + "x" * 5000 + " " + " ".join(f"v{n}" for n in range(70)) + "."
    sentences = split_into_sentences(text)
    check_spans(text, sentences)
    assert " ".join(s.text for s in sentences) == text


def test_fragments_join_up_to_the_longest_sentence_only() -> None:
    """Regression: a paragraph of single words became one sentence, however long."""
    text = "Yes. No. " * 300
    sentences = split_into_sentences(text)
    check_spans(text, sentences)
    assert len(sentences) == 10 and " ".join(s.text for s in sentences) == text.strip()


# --- examples ---------------------------------------------------------------------------------------------------------


def texts(text: str) -> list[str]:
    return [sentence.text for sentence in split_into_sentences(text)]


@pytest.mark.parametrize(
    "sentences",
    [
        ["Dr. J. K. Holm met Mrs. Vane at 5 p.m. on St. Orrin's Day.", "She paid 3.50 marks, i.e. too much."],
        ["Prof. A. B. Wex sold 1,140 saws vs. 900 before.", "He would not sharpen one!", "Would you have done so?"],
        [
            "The bell of the U.S. fleet rang at noon.",
            "“Who rang it?” asked Capt. R. Crull.",
            "Nobody answered him then.",
        ],
        ["She said (in Jan. 1643) that it was sweet.", "It lay near St. Orrin, ca. 4.5 miles off."],
    ],
)
def test_abbreviations_initials_and_numbers_end_no_sentence(sentences: list[str]) -> None:
    text = " ".join(sentences)
    assert texts(text) == sentences
    assert texts(textwrap.fill(text, 30)) == sentences, "hard-wrapped"


def test_headings_are_told_and_no_sentences() -> None:
    text = (
        "Before any heading there is this.\n\n# The Water\n\nThe lake froze in November.\n\n## Part *one* #\n\n"
        "It stayed frozen until spring.\n\n**Sawdust**\n\nA trade needs rules.\n\nMother Tench\n============\n\n"
        "Fog is a crop.\n\nFive arches\n\nThe bridge had five arches.\n\nThis one is a sentence!\n\nThe last line"
    )
    found = [(s.heading, s.text) for s in split_into_sentences(text)]
    assert found == [
        ("", "Before any heading there is this."),
        ("The Water", "The lake froze in November."),
        ("Part *one* #", "It stayed frozen until spring."),
        ("Sawdust", "A trade needs rules."),
        ("Mother Tench", "Fog is a crop."),
        ("Five arches", "The bridge had five arches."),
        ("Five arches", "This one is a sentence!"),
    ]


def test_items_of_a_list_are_sentences_of_their_own() -> None:
    text = (
        "- Bartol sold his saws here\n- The Company bought larch dust\n  from the sawmill. It was cheap then.\n"
        "- five words are here too"
    )
    assert texts(text) == [
        "Bartol sold his saws here",
        "The Company bought larch dust from the sawmill.",
        "It was cheap then.",
        "five words are here too",
    ]
    loose = "- a thin resentful char\n\n- nine miles of water\n\n* two"
    assert texts(loose) == ["a thin resentful char", "nine miles of water", "two"], "with blank lines between"
    assert texts("1. Cut the first block\n2. Bring it to the pit\n10) Cover it with dust") == [
        "Cut the first block",
        "Bring it to the pit",
        "Cover it with dust",
    ]


def test_paragraphs_are_counted_and_fragments_join_the_sentence_before() -> None:
    found = split_into_sentences("The bell rang at night. Twice. Nobody heard it there.\n\nNobody. The dog was deaf.")
    assert [(s.paragraph, s.text) for s in found] == [
        (1, "The bell rang at night. Twice."),
        (1, "Nobody heard it there."),
        (2, "Nobody."),
        (2, "The dog was deaf."),
    ]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Озеро лежит в долине. Лёд был очень толстым!", ["Озеро лежит в долине.", "Лёд был очень толстым!"]),
        ("यह एक झील है। वह बर्फ से ढकी थी।", ["यह एक झील है।", "वह बर्फ से ढकी थी।"]),
        ("هل رن الجرس في المدينة؟ نعم، رن الجرس مرتين.", ["هل رن الجرس في المدينة؟", "نعم، رن الجرس مرتين."]),
        ("Η λίμνη πάγωσε τον Νοέμβριο. Ποιος το είδε αυτό;", ["Η λίμνη πάγωσε τον Νοέμβριο.", "Ποιος το είδε αυτό;"]),
        (
            "«Le lac gela en novembre.» Il resta ainsi longtemps.",
            ["«Le lac gela en novembre.»", "Il resta ainsi longtemps."],
        ),
    ],
)
def test_other_scripts(text: str, sentences: list[str]) -> None:
    assert texts(text) == sentences
    for sentence in sentences:
        assert texts(f"{sentence}\n\n{sentence}") == [sentence] * 2, "a short paragraph is no heading"


def test_scripts_without_blanks_are_not_lost() -> None:
    """Regression: a paragraph without blanks is one word, and was taken for a heading."""
    text = "湖は谷の奥にある。氷は厚い。\n\n漁師は鐘を鳴らした。\n\nทะเลสาบอยู่ที่หัวหุบเขา" + "เหมือนจานที่วางอยู่บนขั้นบันได" * 4
    found = split_into_sentences(text)
    check_spans(text, found)
    assert "".join(s.text for s in found) == text.replace("\n\n", "")


@pytest.mark.parametrize("text", ["", " ", "\n", " \n\t\n ", "---", "...\n\n***\n\n- \n\n#", "Only a heading"])
def test_texts_without_a_sentence(text: str) -> None:
    assert split_into_sentences(text) == []


def test_the_chronicle_is_covered() -> None:
    text = load_demo()[0].text
    found = split_into_sentences(text)
    check_spans(text, found)
    body = "\n".join(line for line in text.split("\n") if not line.startswith("#"))
    assert " ".join(s.text for s in found).split() == body.split()
    headings = [line.strip("# ") for line in text.split("\n") if line.startswith("#")]
    assert list(dict.fromkeys(s.heading for s in found)) == [h for h in headings if h in {s.heading for s in found}]


def test_long_runs_of_blank_lines_take_no_time() -> None:
    """Regression: each line looked through all blank lines after it."""
    started = time.process_time()
    assert len(split_into_sentences("The bell rang twice." + "\n" * 200_000 + "Nobody heard it there.")) == 2
    assert time.process_time() - started < 5
