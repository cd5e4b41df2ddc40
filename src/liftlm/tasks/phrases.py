"""The noun phrases of an English sentence, each asked for in its place: "The monks sold the lake for what?"

What a clause's own questions leave out: most of what people ask for is a noun phrase of the sentence that says it, and what no
task asks for is not recalled. English only, by the shallow parser of `chunks`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

from liftlm.tasks.chunks import NAMES, NOUNS, RELATIVE, Token, read_tokens, verb_root
from liftlm.tasks.clause_questions import Asked, question_word
from liftlm.tasks.clauses import TIMES
from liftlm.tasks.details import DATE, FUNCTION_WORDS, MONTH, YEAR, capital

_TIME = re.compile(rf"\b(?:{YEAR}\b(?! [a-z]+s\b)|(?:{MONTH})\b(?! [A-Z]))")  # not 1500 soldiers, not April Jones
_COMMA, _AND = re.compile(r", "), re.compile(r",? (?:and|or) ")
_POSSESSIVE = re.compile(r"['’]s?(?!\w)")
_MOST = 10  # words of a phrase
_FEWEST = 4  # words of a question
_REACH = 14  # words kept on each side of what is asked for
_OWNED = NOUNS | {"JJ", "JJR", "JJS", "CD"}
_WITHIN = _OWNED | {"DT", "POS", "PRP$", "VBN", "VBG", "RB", "$", "#", "PDT"}
_BEGINS_NOTHING = {"VBN", "VBG", "RB", "POS"}
# nouns that answer nothing by themselves
_EMPTY = TIMES | set(
    """
    way part end rest case fact example order addition response result use thing things one ones other others number amount
    kind sort lot terms course some any anyone anything nobody nothing somebody something everybody everything none all both other
    """.split()  # noqa: SIM905
)


def ask_phrases(text: str) -> Iterator[Asked]:
    """One question for each phrase of a sentence, for the parts of one ("the loft of the sawmill"), and for each list of them."""
    if "|" in text or text.rstrip("\"'”’)] ").endswith(("?", "!")):  # a row of a table; a question
        return
    tokens = read_tokens(text)
    phrases = list(_phrases(tokens, [match.span() for match in (*DATE.finditer(text), *_TIME.finditer(text))]))
    parts = [part for phrase in phrases for part in (phrase, _behind_of(phrase), _owner(phrase))]
    places = {token.start: index for index, token in enumerate(tokens)}
    for part in dict.fromkeys([*filter(_says_something, parts), *_lists(text, phrases)]):
        begin = places[part[0].start]
        before, behind = tokens[:begin], tokens[begin + len(part) :]
        start, end, word = part[0].start, part[-1].end, question_word(part)
        words = text[start:end]
        if len(words.split()) > _MOST or not _is_even(words) or not _is_whole(text, part, before, behind):
            continue
        if (possessive := _POSSESSIVE.match(text, end)) is not None:  # the miller's daughter: whose daughter
            end, word = possessive.end(), "whose"
            following = next((token for token in behind if token.tag != "POS"), None)
            if following is None or following.tag not in _OWNED:
                continue  # the mill's closed; it was John's
        question = capital(in_place(text, start, end, word))
        if len(question.split()) >= _FEWEST and words.lower() not in question.lower():
            yield Asked("who" if word in ("who", "whose") else "what", question, words)


def in_place(text: str, start: int, end: int, word: str) -> str:
    """The words around a detail, with `word` in its place, as a question: "… sent how many blocks down the valley …?"."""
    before, after = text[:start].split(), text[end:].split()
    left = " ".join(before) if len(before) <= _REACH else "… " + " ".join(before[-_REACH:])
    left += " " if text[:start][-1:].isspace() else ""  # not behind a bracket or a quotation mark
    right = " ".join(after).rstrip(".;:,") if len(after) <= _REACH else " ".join(after[:_REACH]) + " …"
    glue = "" if not after or text[end : end + 1].strip() else " "
    return f"{left}{word}{glue}{right}?"


def _phrases(tokens: Sequence[Token], dates: Sequence[tuple[int, int]]) -> Iterator[tuple[Token, ...]]:
    """Runs of words that can be a noun phrase, joined by "of". A date ends one."""
    run: list[Token] = []
    for index, token in enumerate([*tokens, None]):
        dated = token is not None and any(start < token.end and token.start < end for start, end in dates)
        fits = token is not None and not dated and token.tag in _WITHIN
        if token is not None and run:
            behind = tokens[index + 1].tag if index + 1 < len(tokens) else ""
            if (token.lower == "of" and behind in _WITHIN) or (fits and (run[-1].lower == "of" or not token.begins)):
                run.append(token)
                continue
        if phrase := _trimmed(run):
            yield phrase
        run = [token] if token is not None and fits and token.tag != "POS" else []


def _trimmed(run: Sequence[Token]) -> tuple[Token, ...]:
    """From its first word that can begin a noun phrase to its last that can end one; nothing where there is none."""
    while run and run[-1].tag not in NOUNS | {"CD"}:
        run = run[:-1]
    while run and (run[0].tag in _BEGINS_NOTHING or run[0].lower == "of"):
        run = run[1:]
    return tuple(run)


def _lists(text: str, phrases: Sequence[tuple[Token, ...]]) -> Iterator[tuple[Token, ...]]:
    """Phrases with nothing but "and", "or" or commas between them, as one."""
    run: tuple[Token, ...] = ()
    for phrase, following in itertools.zip_longest(phrases, phrases[1:]):
        run += phrase
        between = text[phrase[-1].end : following[0].start] if following else ""
        if _COMMA.fullmatch(between):
            continue
        if following and _AND.fullmatch(between):
            yield run + following
        run = ()


def _behind_of(phrase: tuple[Token, ...]) -> tuple[Token, ...]:
    """The last part of a phrase, or all of it where it has one."""
    at = max((index for index, token in enumerate(phrase) if token.lower == "of"), default=-1)
    return (_trimmed(phrase[at + 1 :]) or phrase) if at >= 0 else phrase


def _owner(phrase: tuple[Token, ...]) -> tuple[Token, ...]:
    """What stands before an apostrophe, from the last "of" on; the whole phrase where there is none."""
    at = next((index for index, token in enumerate(phrase) if token.tag == "POS"), len(phrase))
    return _behind_of(_trimmed(phrase[:at]) or phrase) if at < len(phrase) else phrase


def _is_whole(text: str, part: Sequence[Token], before: Sequence[Token], behind: Sequence[Token]) -> bool:
    """Whether nothing of it was cut off: not O of O'Connor, not €4.2 of €4.2 billion, not Apollo of Apollo 11."""
    start, end = part[0].start, part[-1].end
    if start > 0 and (text[start - 1].isalnum() or text[start - 1] in "'’$€£"):
        return False  # I'll
    if text[end : end + 1].isalnum() or (text[end : end + 1] in ("'", "’") and _POSSESSIVE.match(text, end) is None):
        return False
    if behind and (behind[0].tag == "CD" or behind[0].tag in RELATIVE - {"WDT", "WRB"}) and behind[0].start <= end + 1:
        return False  # "the man who lived": who who lived
    number_before = before and before[-1].tag == "CD" and before[-1].end >= start - 1
    return not (number_before and not _TIME.fullmatch(before[-1].text))


def _says_something(phrase: Sequence[Token]) -> bool:
    """Not "the rest", not "many of them", not a verb that was taken for a noun."""
    plain = phrase[: next((index for index, token in enumerate(phrase) if token.lower == "of"), len(phrase))]
    head = next((token for token in reversed(plain) if token.tag in NOUNS | {"CD"}), None)
    if head is None or not any(character.isalnum() for character in head.text):
        return False
    telling = [each for each in phrase if each.tag not in ("DT", "PRP$", "POS") and each.lower not in FUNCTION_WORDS]
    if all(each.lower in _EMPTY or each.lower.removesuffix("s") in _EMPTY for each in telling):
        return False
    if len(phrase) > 1 or head.tag in NAMES:
        return True
    return not head.text.isalnum() if head.tag == "CD" else verb_root(head.text) is None


def _is_even(words: str) -> bool:
    return (
        words.count("(") == words.count(")")
        and words.count("[") == words.count("]")
        and '"' not in words
        and "“" not in words
    )
