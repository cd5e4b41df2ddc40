"""How a judge's reply is read: True or False, or a number from 0 to 100, in whatever form a model puts it.

Pure. What cannot be read, or contradicts itself, is no verdict.
"""

from __future__ import annotations

import json
import re

Verdict = bool | float | None
LONGEST_REPLY = 4000  # characters that are looked at

_WORDS = {"true": True, "yes": True, "correct": True, "false": False, "no": False, "incorrect": False}
_WORD = "|".join(_WORDS)
_LABEL = r"(?:verdict|judge?ment|decision|conclusion|result)"
# "answer" labels a verdict only where the reply begins with it: elsewhere it may be the ground truth that is "yes"
_FIRST = re.compile(
    rf"\W*(?:(?:final |my )?(?:answer|{_LABEL})\W*[:=]\W*)?({_WORD})\b"
    r"(?!\s*(?:/|\||or\b|and\b))(?=\W*$|\s*[,.;:!*—–\n-]|\s+(?:the|they|it|both|this|that)\b)",
    re.I,
)
_LABELLED = re.compile(rf"\b{_LABEL}\b[\"'*\s]*(?:is|:|=)[\"'*\s:]*({_WORD})\b(?!\s*(?:/|or\b))", re.I)
_NEGATED = re.compile(r"(?:\bnot|n't)\s+(?:true|false)\b", re.I)
_SCALE = re.compile(r"\b(?:0|zero)\s*(?:-|–|—|to|and)\s*100\b", re.I)
_NUMBER = r"(?<![\d.,-])(\d+(?:\.\d+)?)(?!\d|[.,]\d)"
_OF = r"\s*(?:/|out of)\s*(100|20|10|5)\b"
_OVER = re.compile(_NUMBER + _OF, re.I)
_FINAL = re.compile(rf"\b(?:overall|final|total)\b[^\d\n-]{{0,30}}?{_NUMBER}(?:{_OF})?", re.I)
_SCORED = re.compile(rf"\b(?:score|rating|grade)\b[\"'*\s]*(?:is|of|:|=)?[\"'*\s:]*{_NUMBER}", re.I)


def read_verdict(text: str, rate: bool) -> Verdict:
    """The verdict of a reply: True or False, or with `rate` a number from 0 to 100. None where there is none.

    Reads through thoughts, code fences, JSON, labels, Markdown and explanations; what contradicts itself is no verdict.
    """
    text = re.sub(r"^.*</think(?:ing)?>", "", text, flags=re.DOTALL)[:LONGEST_REPLY].strip()
    found = _from_json(text)
    if rate:
        number = _rating(text) if found is None or isinstance(found, bool) else float(found)
        return number if number is not None and 0 <= number <= 100 else None
    if found is not None:
        return bool(found) if found in (0, 1) else None
    return _truth(text)


def _from_json(text: str) -> bool | float | None:
    """The one field of a JSON object that is a verdict; of several that differ, none."""
    start, end = text.find("{"), text.rfind("}")
    try:
        value = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):
        return None
    fields = list(value.values()) if isinstance(value, dict) else []
    read: set[tuple[bool, bool | float]] = set()
    for part in fields:
        if isinstance(part, str):
            word = _WORDS.get(part.strip().lower())
            part = word if word is not None else _rating(part) if len(part) < 10 else None
        if isinstance(part, bool | int | float):
            read.add((isinstance(part, bool), part))
    return read.pop()[1] if len(read) == 1 else None


def _truth(text: str) -> bool | None:
    first, labelled = _FIRST.match(text), _LABELLED.findall(text)
    if first or labelled:
        return _WORDS[(first[1] if first else labelled[-1]).lower()]
    said = {word.lower() for word in re.findall(r"\b(?:true|false)\b", text, re.I)}
    return _WORDS[said.pop()] if len(said) == 1 and not _NEGATED.search(text) else None


def _rating(text: str) -> float | None:
    """A number out of 100; one "out of 10" is made one of 100."""
    text = _SCALE.sub(" ", text)
    over = {_of_hundred(*found) for found in _OVER.findall(text)}
    final = _FINAL.findall(text)
    if len(over) != 1 and final:
        return _of_hundred(*final[-1])
    scored = {float(number) for number in _SCORED.findall(text)}
    everything = {float(number) for number in re.findall(_NUMBER, text)}
    numbers = over or scored or everything
    return numbers.pop() if len(numbers) == 1 else None


def _of_hundred(number: str, scale: str) -> float:
    return 100 * float(number) / float(scale or 100)
