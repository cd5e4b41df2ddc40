"""The main clauses of a sentence: what comes before, subject, verb, what follows.

Only where these stand plainly one after the other, which is so in half of an encyclopedia's sentences; what is not understood is
left alone. English only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from liftlm.tasks.chunks import (
    FINITE,
    NOUNS,
    RELATIVE,
    Token,
    group,
    is_finite,
    list_end,
    read_tokens,
    verb_root,
)

PRONOUNS = {"he", "she", "it", "they"}
SUBORDINATE = set("because although though while whereas unless if when where whereby since until as".split())  # noqa: SIM905
_MOST_SUBJECT = 14  # words
_AND = {"and", "or", "but", "then"}
_SHARES = {"most", "some", "all", "one", "many", "none", "each"}  # … of the monks
_POINTING = {"this", "that", "these", "those", "such", "there", "here", "another", "other", "others", "both", "much", "more",
             "nobody", "everything", "nothing", "no", "few", "little", "neither", "nor", "hardly", "not"} | _SHARES  # fmt: skip
TIMES = {"second", "minute", "hour", "day", "night", "morning", "evening", "week", "month", "year", "decade", "century", "spring",
         "summer", "autumn", "winter", "time"}  # fmt: skip
_STOPS = {";", ":", ".", "?", "!", "—", "–", "--", "(", "but", "which", "who", "whose", "whom"}
_WITHIN_SUBJECTS = NOUNS | {"DT", "CD", "POS", "JJ", "PRP$", "IN", "TO", "PRP"}


@dataclass(frozen=True)
class Clause:
    """lead: "In October 1973", before a comma or not; verb: the group, "had not risen"; rest: up to where another clause begins;
    after: the text behind it; that: "that government is best", where that is what the verb is about."""

    lead: tuple[Token, ...]
    subject: tuple[Token, ...]
    verb: tuple[Token, ...]
    rest: tuple[Token, ...]
    after: str
    that: str = ""


def find_clauses(text: str) -> Iterator[Clause]:
    """Of one sentence. "and" may bring another verb of the same subject, which is a clause of its own."""
    tokens = list(read_tokens(text)) if "|" not in text else []  # a row of a table
    while tokens and not re.search(r"\w", tokens[-1].text):
        tokens.pop()
    at = 0
    while at < len(tokens):
        found = _begin(tokens, at)
        if found is None:
            return
        lead, subject, verb_at = found
        while True:
            rest_at = verb_at + len(group(tokens, verb_at))
            stop = _end(tokens, rest_at)
            rest = tokens[rest_at:stop]
            if stop < len(tokens) and tokens[stop].lower == "that" and not any(token.tag in NOUNS for token in rest):
                verb, said = tuple(tokens[verb_at:rest_at]), text[tokens[stop].start : tokens[-1].end]
                yield Clause(tuple(lead), tuple(subject), verb, tuple(rest), "", said)
                return
            verb = tuple(tokens[verb_at:rest_at])
            yield Clause(tuple(lead), tuple(subject), verb, _whole(rest, tokens[stop:]), text[tokens[stop - 1].end :])
            at, joined = _next(tokens, stop)
            if not joined or at >= len(tokens) or not is_finite(tokens, at):
                break
            verb_at, lead = at, []


def _whole(rest: Sequence[Token], cut: Sequence[Token]) -> tuple[Token, ...]:
    """Without what only made sense with what was cut off: a communiqué *stating* that …"""
    while len(rest) > 1 and cut and rest[-1].tag in ("VBG", "IN", "TO", "CC"):
        rest = rest[:-1]
    return tuple(rest)


def _next(tokens: Sequence[Token], stop: int) -> tuple[int, bool]:
    """Where to go on behind a clause (the end, if nowhere), and whether another verb of the same subject may follow."""
    follows = [token.lower for token in tokens[stop : stop + 2]]
    if follows[:1] == [";"]:
        return stop + 1, False
    if follows and follows[0] in _AND:
        return stop + 1, True
    if len(follows) == 2 and follows[0] == "," and follows[1] in _AND:
        return stop + 2, False
    return len(tokens), False


def _begin(tokens: Sequence[Token], start: int) -> tuple[Sequence[Token], Sequence[Token], int] | None:
    """Lead, subject, and where the verb begins: the first verb that has a subject."""
    for verb_at in range(start + 1, len(tokens)):
        if not is_finite(tokens, verb_at):
            continue
        end = _before_aside(tokens, start, verb_at)
        begin = _subject_begin(tokens, start, end)
        if begin is None:
            continue
        lead, subject = _parted(tokens[start : max(start, begin - 1)], tokens[begin:end])
        if begin > start and (tokens[begin - 1].text != "," or not _is_lead(tokens[start : begin - 1])):
            if not _is_list(tokens[start:end]):
                return None
            lead, subject = [], tokens[start:end]
        return (lead, subject, verb_at) if _is_subject(subject) else None
    return None


def _parted(lead: Sequence[Token], subject: Sequence[Token]) -> tuple[Sequence[Token], Sequence[Token]]:
    """A lead without a comma: "In the spring of 1641 | the monks"."""
    if lead or not subject or subject[0].tag not in ("IN", "TO"):
        return lead, subject
    for at in range(2, len(subject)):
        token, before = subject[at], subject[at - 1]
        if not token.begins or token.chunk != "NP" or before.tag not in NOUNS | {"CD"} or before.lower in ("and", "or"):
            continue
        if token.tag in ("DT", "NNP", "PRP", "PRP$") or (token.tag == "CD" and before.tag in ("NNS", "CD")):
            return subject[:at], subject[at:]
    return lead, subject


def _before_aside(tokens: Sequence[Token], start: int, verb_at: int) -> int:
    """Where the subject ends, if a clause or another name between commas stands between it and the verb."""
    if verb_at - 1 <= start or tokens[verb_at - 1].text != ",":
        return verb_at
    commas = [index for index in range(start + 1, verb_at - 1) if tokens[index].text == ","]
    for at in reversed(commas):
        tag = tokens[at + 1].tag
        if tag in RELATIVE or (tag in ("NNP", "DT") and len(commas) == 1):
            return at
    return verb_at


def _subject_begin(tokens: Sequence[Token], start: int, verb_at: int) -> int | None:
    """Back from the verb over noun phrases, their prepositions and "and", to the beginning or a comma."""
    for at in range(verb_at, start, -1):
        token = tokens[at - 1]
        if token.text == ",":
            return at
        fits = token.chunk in ("NP", "PP", "ADJP") or token.tag in _WITHIN_SUBJECTS
        if not fits and token.lower not in ("and", '"', "“", "”"):
            return None
    return start


def _is_list(tokens: Sequence[Token]) -> bool:
    """Noun phrases with commas, and "and" before the last one."""
    plain = all(token.chunk == "NP" or token.tag in NOUNS | {"DT", "CC", ","} for token in tokens)
    return plain and any(token.lower == "and" for token in tokens)


def _is_lead(tokens: Sequence[Token]) -> bool:
    """What can stand before a main clause and a comma: a date, a place, "having lost his shop", "when the war began"."""
    if not tokens:
        return False
    first = tokens[0]
    if first.lower in SUBORDINATE:
        return first.lower not in ("if", "unless")
    if any(token.tag in FINITE for token in tokens):
        return False
    return first.chunk in ("PP", "ADVP") or first.tag in ("IN", "RB", "TO", "VBG", "VBN")


def _is_subject(tokens: Sequence[Token]) -> bool:
    if not tokens or len(tokens) > _MOST_SUBJECT:
        return False
    first, last = tokens[0], tokens[-1]
    if first.tag in RELATIVE | {"IN", "TO", "CC", "EX", "RB", "VBN", "VBG"} or first.lower in SUBORDINATE:
        return False
    if len(tokens) > 2 and first.lower in _SHARES and tokens[1].lower == "of":
        first = tokens[2]
    if first.lower in _POINTING or not first.text[0].isalnum():
        return False
    if first.lower in ("last", "next", "every", "each") and any(token.lower in TIMES for token in tokens):
        return False  # every morning the abbot
    if any(token.tag == "PRP" or token.lower in PRONOUNS for token in tokens):
        return len(tokens) == 1 and first.lower in PRONOUNS
    if last.tag not in NOUNS | {"CD"} and last.text not in ('"', "”"):
        return False
    if any(token.tag in RELATIVE or token.lower in ("that", "who", "which") for token in tokens):
        return False
    return any(token.tag in NOUNS for token in tokens)


def _end(tokens: Sequence[Token], at: int) -> int:
    """Where another clause, an aside or a list of more verbs begins."""
    listed = at  # a list of things reaches so far
    for index in range(at, len(tokens)):
        token, following = tokens[index], tokens[index + 1 : index + 3]
        word = token.lower
        if word in _STOPS or token.tag in RELATIVE - {"WRB"}:
            return index
        if index < listed:
            continue
        if word == ",":
            listed = list_end(tokens, index)
            if listed > index:
                continue
        if word == "," and (not following or _begins_aside(following)):
            return index
        verb_next = bool(following) and (
            following[0].chunk == "VP" or following[0].tag == "PRP" or _may_be_verb(following)
        )
        if word in ("and", "or", "then") and (verb_next or (word != "then" and _is_clause(tokens, index + 1))):
            return index
        if (word in SUBORDINATE or word == "that") and _has_verb(tokens[index + 1 :]):
            return index
    return len(tokens)


def _may_be_verb(following: Sequence[Token]) -> bool:
    """What was taken for a plural behind "and": and flows through Germany."""
    first, behind = following[0], following[1:2]
    follows = bool(behind) and behind[0].tag in ("IN", "DT", "TO", "PRP$")
    return first.tag == "NNS" and follows and verb_root(first.text) not in (None, first.lower)


def _is_clause(tokens: Sequence[Token], at: int) -> bool:
    """Whether a noun phrase and its verb follow."""
    begin = at
    while at < len(tokens) and (
        (tokens[at].lower == "and" and at > begin)
        or tokens[at].chunk in ("NP", "PP")
        or tokens[at].tag in NOUNS | {"DT", "JJ", "POS", "CD"}
    ):
        at += 1
    return begin < at < len(tokens) and is_finite(tokens, at)


def _has_verb(tokens: Sequence[Token]) -> bool:
    """Before the next comma."""
    stop = next((index for index, token in enumerate(tokens) if token.text in (",", ";")), len(tokens))
    return any(token.tag in FINITE | {"VBN"} for token in tokens[:stop])


def _begins_aside(following: Sequence[Token]) -> bool:
    """What comes behind a comma and does not belong to a date or an amount."""
    first = following[0]
    return not first.text[0].isdigit() or (len(following) > 1 and following[1].tag not in ("CD", ",", "IN"))
