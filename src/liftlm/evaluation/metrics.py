"""Scores of one answer against one reference, as their authors compute them: texts in, numbers from 0 to 1 out.

Each function names the rule that it follows; docs/metrics.md says where that rule stands and what it was verified against.
Knows nothing of models, questions or files; the one thing it looks for on the machine is WordNet, for METEOR.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import io
import json
import os
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from liftlm.errors import BenchmarkDataError

WORDNET_VARIABLE = "LIFT_WORDNET"  # a folder with WordNet's data.noun, index.noun …
DEBIAN_WORDNET = Path("/usr/share/wordnet")  # of the package wordnet-base
_FILE_NAMES = 45  # of WordNet's lexicographers; the format lexnames(5WN) lists as many

# --- words in common: SQuAD -------------------------------------------------------------------------------------------


def token_f1(answer: str, reference: str) -> float:
    """F1 over words, by SQuAD v1.1's rule. No common word is 0, even where both are empty."""
    given, wanted = _squad_words(answer), _squad_words(reference)
    same = sum((Counter(given) & Counter(wanted)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(given), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def exact_match(answer: str, reference: str) -> float:
    """1 where both are the same words in the same order, by SQuAD v1.1's rule."""
    return float(_squad_words(answer) == _squad_words(reference))


def _squad_words(text: str) -> list[str]:
    """Lower case, without ASCII punctuation, then without articles. "U.S." is "us", "the-end" is "theend"."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


# --- ROUGE ------------------------------------------------------------------------------------------------------------


def rouge(answer: str, reference: str) -> dict[str, float]:
    """F-measures rouge_1, rouge_2 and rouge_l of Google's rouge-score, without stemmer. It sees a-z and 0-9 only."""
    scores = _rouge_scorer().score(reference, answer)
    return {f"rouge_{name[-1].lower()}": float(score.fmeasure) for name, score in scores.items()}


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


class Overlap(NamedTuple):
    """How much of two texts agrees: recall is the share of the reference, precision that of the answer."""

    recall: float
    precision: float
    f_measure: float


def set_rouge(answer: str, reference: str) -> dict[str, Overlap]:
    """rouge_1, rouge_2 and rouge_l by the rule of the PyPI package `rouge` 1.0.1, which LooGLE and LongBench use.

    It differs from rouge-score: every n-gram counts once, case and punctuation count, sentences end at each ".", and
    rouge_l unites what the sentences have in common. A text without anything but dots is an error there and 0 here.
    """
    given, wanted = _sentences(answer), _sentences(reference)
    if not given or not wanted:
        return dict.fromkeys(("rouge_1", "rouge_2", "rouge_l"), Overlap(0.0, 0.0, 0.0))
    answer_words, reference_words = list(chain.from_iterable(given)), list(chain.from_iterable(wanted))
    scores = {}
    for n in (1, 2):
        ours, theirs = _ngrams(answer_words, n), _ngrams(reference_words, n)
        scores[f"rouge_{n}"] = _overlap(len(ours & theirs), len(theirs), len(ours))
    common = {word for one in wanted for other in given for word in _longest_common(one, other)}
    scores["rouge_l"] = _overlap(len(common), len(set(reference_words)), len(set(answer_words)))
    return scores


def loogle_rouge(answer: str, reference: str) -> dict[str, float]:
    """What LooGLE's code reports as ROUGE-1, ROUGE-2 and ROUGE-L: recall, by the rule of `set_rouge`."""
    return {f"{name}_recall": overlap.recall for name, overlap in set_rouge(answer, reference).items()}


def longbench_rouge(answer: str, reference: str) -> float:
    """What LongBench's code reports as ROUGE-L: the F-measure, by the rule of `set_rouge`."""
    return set_rouge(answer, reference)["rouge_l"].f_measure


def _sentences(text: str) -> list[list[str]]:
    """Words between dots. Blanks between two dots are one empty word: the package splits "" at " "."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _ngrams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + n]) for start in range(len(words) - n + 1)}


def _overlap(common: int, wanted: int, given: int) -> Overlap:
    recall, precision = common / wanted if wanted else 0.0, common / given if given else 0.0
    return Overlap(recall, precision, 2 * precision * recall / (precision + recall + 1e-8))  # 1e-8 is the package's


def _longest_common(one: Sequence[str], other: Sequence[str]) -> Iterator[str]:
    """The words of a longest common subsequence; of several, the one that the package finds, read from the end."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for row, word in enumerate(one, 1):
        for column, second in enumerate(other, 1):
            above, left = table[row - 1][column], table[row][column - 1]
            table[row][column] = table[row - 1][column - 1] + 1 if word == second else max(above, left)
    row, column = len(one), len(other)
    while row and column:
        if one[row - 1] == other[column - 1]:
            row, column = row - 1, column - 1
            yield one[row]
        elif table[row - 1][column] > table[row][column - 1]:
            row -= 1
        else:
            column -= 1


# --- BLEU and METEOR, as LooGLE has them ------------------------------------------------------------------------------


def bleu(answer: str, reference: str) -> dict[str, float]:
    """bleu_1 and bleu_4 of nltk's sentence_bleu over words between blanks, no smoothing, weights as in LooGLE's code.

    Its BLEU-4 has the weights (0, 0, 0, 1): the share of 4-grams alone, not the mean over 1- to 4-grams.
    """
    from nltk.translate.bleu_score import sentence_bleu

    weights = {"bleu_1": (1, 0, 0, 0), "bleu_4": (0, 0, 0, 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk advises smoothing where no 4-gram agrees
        scores = {name: float(sentence_bleu([reference.split()], answer.split(), w)) for name, w in weights.items()}
    # nltk puts the smallest float, 2e-308, in place of 0, for its logarithm
    return {name: score if score > 1e-300 else 0.0 for name, score in scores.items()}


def meteor_available() -> bool:
    """Whether WordNet is on this machine. Where it is not, a report says so; there is no METEOR without it."""
    return _find_wordnet() is not None


def meteor(answer: str, reference: str) -> float:
    """METEOR of nltk over words between blanks, in lower case, with Porter stems and WordNet's synonyms.

    LooGLE's code hands over *sets* of words, whose order changes from run to run and with it METEOR's penalty for
    order; here the words stay in order. Raises LookupError without WordNet (see `meteor_available`).
    """
    from nltk.translate.meteor_score import single_meteor_score

    place = _find_wordnet()
    if place is None:
        raise LookupError(f"No WordNet: install Debian's wordnet-base, or name a folder with it in {WORDNET_VARIABLE}.")
    return float(single_meteor_score(reference.split(), answer.split(), wordnet=_wordnet(place)))


def _find_wordnet() -> Path | str | None:
    """The folder in LIFT_WORDNET (nothing else if it is set), nltk's name for its own copy, or Debian's folder."""
    import nltk

    named = os.environ.get(WORDNET_VARIABLE)
    if named:
        return Path(named).resolve() if _is_wordnet(Path(named)) else None
    for name in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
        with contextlib.suppress(LookupError, OSError):
            nltk.data.find(name)
            return name
    return DEBIAN_WORDNET if _is_wordnet(DEBIAN_WORDNET) else None


def _is_wordnet(folder: Path) -> bool:
    parts = ("noun", "verb", "adj", "adv")
    return all((folder / name).is_file() for part in parts for name in (f"data.{part}", f"index.{part}", f"{part}.exc"))


@functools.lru_cache(maxsize=2)
def _wordnet(place: Path | str) -> Any:
    """nltk's reader of WordNet; about two seconds."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):  # type: ignore[misc, unused-ignore]
        """Does without lexnames and index.sense, which Debian leaves out and METEOR has no use for."""

        def open(self, file: str) -> Any:
            try:
                return super().open(file)
            except OSError:
                if file != "lexnames":
                    raise
                return io.StringIO("".join(f"{number:02}\tfile-{number}\t1\n" for number in range(_FILE_NAMES)))

        def map_wn(self, version: str = "wordnet") -> None:
            """A table for other languages, made from index.sense."""

    if isinstance(place, Path):
        nltk.data.path.append(str(place))  # nltk opens files below this list only
    root = str(place) if isinstance(place, Path) else nltk.data.find(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no other languages
        return Reader(root, None)


# --- LooGLE's cloze ---------------------------------------------------------------------------------------------------

_MASK = r"[\"'*]*<?mask[-_ ]?\d+>?[\"'*]*"
_CLOZE_LINE = re.compile(rf"({_MASK})\s*(?:[:=]|->|→|is\b)(.*?)(?={_MASK}|$)", re.IGNORECASE | re.MULTILINE)


def parse_cloze(text: str) -> dict[str, str]:
    """What a model's text says of each mask, `{"<mask-0>": "Bob"}`; empty where it says nothing.

    Read as JSON or as a Python dict, anywhere in the text, else line by line as `<mask-0>: Bob`. `mask 0` and `MASK_0`
    mean `<mask-0>`. LooGLE's own code evaluates the whole text as Python and finds nothing if that fails.
    """
    for start in re.finditer(r"{", text):
        with contextlib.suppress(ValueError, RecursionError):
            values = _mask_values(json.JSONDecoder().raw_decode(text, start.start())[0])
            if values:
                return values
    for block in re.finditer(r"{[^{}]*}", text):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            values = _mask_values(ast.literal_eval(block.group()))
            if values:
                return values
    lines = _CLOZE_LINE.findall(text)
    return _mask_values({name: value for name, quoted in lines if (value := quoted.strip(" \t,;\"'*{}"))})


def _mask_values(found: Any) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, value in found.items() if isinstance(found, dict) else ():
        number = re.search(r"mask[-_ ]?(\d+)", str(name), re.IGNORECASE)
        if number:
            values.setdefault(f"<mask-{int(number.group(1))}>", str(value))
    return values


def cloze_exact(answer: str | Mapping[str, str], references: Mapping[str, str]) -> float:
    """Share of the masks whose value is the reference, letter for letter.

    LooGLE's figure for many questions is matches over masks: the mean of this, weighted with the number of masks.
    """
    given = parse_cloze(answer) if isinstance(answer, str) else answer
    return _share(given.get(mask) == wanted for mask, wanted in references.items())


def cloze_partial(answer: str | Mapping[str, str], references: Mapping[str, str]) -> float:
    """Share of the masks whose value has at least one word (between blanks, case counts) of the reference."""
    given = parse_cloze(answer) if isinstance(answer, str) else answer
    return _share(bool(set(given.get(mask, "").split()) & set(wanted.split())) for mask, wanted in references.items())


def _share(outcomes: Iterable[bool]) -> float:
    counted = list(outcomes)
    return sum(counted) / len(counted) if counted else 0.0


# --- needles ----------------------------------------------------------------------------------------------------------


def keyword_recall(answer: str, keywords: Sequence[str]) -> float:
    """Share of the keywords that stand in the answer, whatever their case. LIFT's own code asks whether this is 1."""
    return _share(keyword.casefold() in answer.casefold() for keyword in keywords)


# --- LongBench --------------------------------------------------------------------------------------------------------

qa_f1 = token_f1  # LongBench normalises and counts as SQuAD does


def first_line(answer: str) -> str:
    """All that counts of an answer in the tasks of LONGBENCH_FIRST_LINE."""
    return answer.lstrip("\n").split("\n")[0]


def classification_score(answer: str, reference: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the answer names, if the right one is among them.

    A class that is part of the right one's name does not count. LongBench's loop takes such a class out of the list that
    it walks over, and so skips the next one; kept.
    """
    named = [name for name in classes if name in answer]
    position = 0
    while position < len(named):
        if named[position] in reference and named[position] != reference:
            del named[position]
        position += 1  # also after taking one out
    return 1 / len(named) if reference in named else 0.0


def retrieval_score(answer: str, reference: str) -> float:
    """Share of the numbers in the answer that are the reference's ("Paragraph 7"). Raises BenchmarkDataError."""
    wanted = re.search(r"Paragraph (\d+)", reference)
    if wanted is None:
        raise BenchmarkDataError(f'The reference {reference[:40]!r} is not "Paragraph N".', "Check the data.")
    return count_score(answer, wanted.group(1))


def count_score(answer: str, reference: str) -> float:
    """Share of the numbers in the answer that are the reference, digit for digit; 0 without any number."""
    return _share(number == reference for number in re.findall(r"\d+", answer))


def code_sim_score(answer: str, reference: str) -> float:
    """Likeness of the first line that is no comment, by difflib, in whole hundredths.

    LongBench calls fuzzywuzzy, whose `ratio` is difflib's unless python-Levenshtein is installed, which LongBench does
    not ask for. rapidfuzz and Levenshtein count edits, and give other numbers.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


LONGBENCH_FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})
_LONGBENCH: Mapping[str, Callable[[str, str], float]] = (
    dict.fromkeys(["narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"], qa_f1)
    | dict.fromkeys(["gov_report", "qmsum", "multi_news", "samsum"], longbench_rouge)
    | {"passage_retrieval_en": retrieval_score, "passage_count": count_score}
    | {"lcc": code_sim_score, "repobench-p": code_sim_score}
)
LONGBENCH_TASKS = (*_LONGBENCH, "trec")


def longbench_score(task: str, answer: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The score of one answer in an English task of LongBench: the best over the references.

    classes: of `trec`, all class names. Raises KeyError for a task that is not in LONGBENCH_TASKS.
    """
    if task in LONGBENCH_FIRST_LINE:
        answer = first_line(answer)
    if task == "trec":
        return max((classification_score(answer, reference, classes) for reference in references), default=0.0)
    return max((_LONGBENCH[task](answer, reference) for reference in references), default=0.0)
