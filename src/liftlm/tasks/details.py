"""What a sentence states in few words: names, places, dates, numbers. Where they stand, and of which kind. Knows only text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from liftlm.tasks.scripts import Language, telling_runs

Kind = Literal["who", "where", "when", "how many"]

# English function words; in any language, words of more than every twelfth sentence are counted among them
FUNCTION_WORDS = frozenset(
    """
    a about above after again against all almost along already also although always am among an and another any are
    as at away back be because been before being below between both but by came can cannot come could did do does
    doing done down during each either else enough even ever every few first for from further get go going gone got
    had has have having he hence her here hers herself him himself his how however i if in indeed instead into is it
    its itself just last least less let like made make many may me might mine more most much must my myself near
    neither never next no nor not nothing now of off often on once one only onto or other others our out over own
    per perhaps put quite rather really said same say see seem seemed several shall she should since so some
    something soon still such take than that the their them themselves then there therefore these they thing things
    this those though through thus till to together too took toward towards two under until up upon us very was way
    we well went were what whatever when where whether which while who whole whom whose why will with within without
    would yet you your
    """.split()  # noqa: SIM905
)
# vowel signs and accents that are characters of their own: parts of words, though \w does not match them
ACCENTS = "".join(chr(code) for code in range(0x300, 0x3100) if unicodedata.category(chr(code)).startswith("M"))
WORD = re.compile(rf"[\w{ACCENTS}]+(?:['’.-][\w{ACCENTS}]+)*")
_BREAK = re.compile(rf"[^\w\s'’.{ACCENTS}-]|\.\s|--|—|–")  # no phrase goes across
_MOST_OF_A_PHRASE = 4  # words
_NUMBER_WORDS = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen|twenty|"
    "thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|dozen"
)
MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_TIME = re.compile(rf"(?:{MONTH}|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)days?)")  # names, but of nobody and no place
YEAR = r"(?:1[0-9]|20)\d\d"
DATE = re.compile(
    rf"\b(?:\d{{1,2}} (?:{MONTH})(?:,? {YEAR})?|(?:{MONTH})(?: \d{{1,2}},?)? {YEAR}|(?:{MONTH}) \d{{1,2}}\b"
    + "".join(
        rf"|(?<=\b{word} ){YEAR}"
        for word in ("[Ii]n", "of", "[Bb]y", "[Ss]ince", "[Ff]rom", "to", "[Uu]ntil", "[Dd]uring")
    )
    + r")\b"
)
CJK_DATE = r"\d{4}年(?:\d{1,2}月(?:\d{1,2}日)?)?"
_CJK_DATE = re.compile(CJK_DATE)
_COUNT = re.compile(
    rf"\b(?:\d[\d,.]*\d|\d|(?:(?:{_NUMBER_WORDS})(?:[ -](?:and )?(?:{_NUMBER_WORDS}))*))(?= ([a-z]{{3,}}))",
    re.IGNORECASE,
)
_CAPITALS = "".join(chr(code) for code in range(0x41, 0x530) if chr(code).isupper())
CAPITALISED = rf"[{_CAPITALS}][\w{ACCENTS}’'-]+"
_NAME = re.compile(rf"\b{CAPITALISED}(?:(?: of| the| de| von| van| du| la)* {CAPITALISED})*")
_PLACE_BEFORE = re.compile(r"\b(?:in|at|to|from|near|into|across|through|towards?)(?: the)?\s$")


@dataclass(frozen=True)
class Detail:
    """Characters of a sentence. unit: of a number, the word after it."""

    kind: Kind
    start: int
    end: int
    unit: str = ""


def telling_phrases(text: str, language: Language, dull: frozenset[str]) -> list[str]:
    """Different runs of telling words, in the text's order; without blanks between words what is nearest to words."""
    phrases: dict[str, None] = {}
    for piece in _BREAK.split(text):
        if language != "en":
            phrases |= dict.fromkeys(word for word in telling_runs(piece, language) if word.lower() not in dull)
            continue
        run: list[str] = []
        for word in [*WORD.findall(piece), ""]:
            if word and word.lower() not in dull:
                run.append(word)
                continue
            while run:
                part, run = run[:_MOST_OF_A_PHRASE], run[_MOST_OF_A_PHRASE:]
                phrases[" ".join(part)] = None
    return list(phrases)


def find_details(text: str, names: set[str], dull: frozenset[str]) -> Iterator[Detail]:
    """Of one sentence: names, then dates, then numbers. names: words that have a capital within sentences; dull: say nothing."""
    dates = [*DATE.finditer(text), *_CJK_DATE.finditer(text)]
    for match in _NAME.finditer(text):
        first = match.group().split()[0]
        if first.lower() in FUNCTION_WORDS or (match.start() == 0 and first not in names):
            continue
        if _TIME.fullmatch(match.group()) or any(match.start() < d.end() and d.start() < match.end() for d in dates):
            continue
        place = _PLACE_BEFORE.search(text[: match.start()])
        yield Detail("where" if place else "who", *match.span())
    for match in dates:
        yield Detail("when", *match.span())
    for match in _COUNT.finditer(text):
        if match.group(1) not in dull and not any(match.start() < d.end() and d.start() < match.end() for d in dates):
            yield Detail("how many", *match.span(), match.group(1))


def capital(text: str) -> str:
    """Its first letter as a capital, where it has one."""
    first = text[:1].upper()
    # ß and the ligatures of some PDFs have no single capital, and the micro sign's is another letter's
    return first + text[1:] if len(first) == 1 and first.lower() == text[:1].lower() else text
