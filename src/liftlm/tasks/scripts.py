"""Scripts that put no blanks between words: Chinese, Japanese, Thai and its neighbours. What counts as a word there. Pure."""

from __future__ import annotations

import re
from typing import Literal

Language = Literal["en", "zh", "ja", "unspaced"]

_KANA = "\u3040-\u30ff\u31f0-\u31ff"
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff々〆"
_SOUTH_EAST = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
UNSPACED = _SOUTH_EAST + _KANA + _HAN  # for a character class
HANGUL = "\uac00-\ud7af"  # has blanks, but between words with their endings
_CHARACTERS_OF_A_WORD = ((re.compile(f"[{_HAN}{_KANA}]"), 2), (re.compile(f"[{_SOUTH_EAST}]"), 5))  # about
_ANY = re.compile(f"[{UNSPACED}]")
_LOOKED_AT = 20_000  # characters
_MOSTLY = 0.3  # of the letters

# Chinese characters that mostly stand between words that tell something
_BETWEEN = (
    "的了是在和与及或而也都就不没有被把对从向以为于之其这那个们我你他她它着过吗呢吧啊并但因所则且将由到又很会能可要"
)
_TELLING = {
    "zh": re.compile(rf"(?:(?![{_BETWEEN}])[{_HAN}])+|[A-Za-z][A-Za-z0-9.-]*"),
    "ja": re.compile(rf"[{_HAN}]+|[ァ-ヴー]+|[A-Za-z][A-Za-z0-9.-]*"),
    "unspaced": re.compile(r"[^\s\d\W][^\s,.;:!?()\"“”]*"),
}
_NUMBER = re.compile(r"\d+[年月日]?")
_LONGEST_WORD = 24  # characters of one in Latin letters
_LONGEST_RUN = {"zh": 6, "ja": 8, "unspaced": 24}  # characters


def word_count(text: str) -> int:
    """Words between blanks; of scripts without blanks about as many as a translation would have."""
    if not _ANY.search(text):
        return len(text.split())
    count = 0
    for pattern, characters in _CHARACTERS_OF_A_WORD:
        text, found = pattern.subn(" ", text)
        count += -(-found // characters)
    return count + len(text.split())


def language_of(text: str) -> Language:
    """By its script: English stands for all that have blanks between words, "unspaced" for others than Chinese and Japanese."""
    text = text[:_LOOKED_AT]
    letters = max(1, sum(map(str.isalpha, text)))
    kana, han = (len(re.findall(f"[{script}]", text)) for script in (_KANA, _HAN))
    if kana + han > _MOSTLY * letters:
        return "ja" if kana > 0.1 * (kana + han) else "zh"
    return "unspaced" if len(re.findall(f"[{_SOUTH_EAST}]", text)) > _MOSTLY * letters else "en"


def telling_runs(text: str, language: Language) -> list[str]:
    """Of a script without blanks: short runs of characters that stand for things, by what stands between them."""
    longest = _LONGEST_RUN[language]
    runs = _TELLING[language].findall(_NUMBER.sub(" ", text))
    return [run for run in runs if 2 <= len(run) <= (_LONGEST_WORD if run.isascii() else longest)]
