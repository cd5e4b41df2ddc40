"""An English sentence as tagged words in chunks: noun phrases, verb groups, prepositions.

The parser is a shallow one (TextBlob's, which is Pattern's: a lexicon and rules, no model). What it gets wrong often is mended
here. Roots of verbs are lemminflect's, from its table of words.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from liftlm.tasks.details import MONTH, YEAR

# Penn Treebank's tags
NOUNS = {"NN", "NNS", "NNP", "NNPS"}
NAMES = {"NNP", "NNPS"}
VERBS = {"VB", "VBD", "VBZ", "VBP", "VBN", "VBG", "MD"}
FINITE = {"VBD", "VBZ", "VBP", "MD"}
RELATIVE = {"WDT", "WP", "WP$", "WRB"}

BE = {"is", "are", "was", "were", "am"}
HAVE = {"has", "have", "had"}
DO = {"does", "do", "did"}
_CONTRACTED = re.compile(r"n['’]t\b")
_COUNTRIES = {"US", "U.S.", "UK"}  # taken for pronouns
_BEFORE_NOUNS = {"DT", "PRP$", "CD", "JJ", "JJS", "JJR"}
_YEAR = re.compile(YEAR)
_MONTH = re.compile(MONTH)


@dataclass(frozen=True)
class Token:
    """start, end: characters of the sentence. chunk: NP, VP, PP, …, "" outside of any; begins: whether one begins here."""

    text: str
    tag: str
    chunk: str
    begins: bool
    start: int
    end: int

    @property
    def lower(self) -> str:
        return self.text.lower()


@functools.lru_cache(maxsize=8)  # a sentence is read for its clauses and for its phrases
def read_tokens(text: str) -> tuple[Token, ...]:
    """Of one sentence; none where the parser has changed its words, as it does to a few signs, or does not know them (hasn't)."""
    text = text.replace("’", "'")  # which it does not know
    if _CONTRACTED.search(text):
        return ()
    tokens: list[Token] = []
    at, before = 0, ""
    for piece in _parser()(text).split():
        parts = piece.rsplit("/", 3)
        if len(parts) != 4:
            return ()
        word, tag, chunk, _ = parts
        word = word.replace("&slash;", "/")
        start = text.find(word, at)
        if start < 0 or text[at:start].strip():
            return ()
        name = chunk[2:] if chunk != "O" else ""
        tokens.append(Token(word, tag, name, chunk.startswith("B-") or name != before, start, start + len(word)))
        before, at = name, start + len(word)
    return tuple(_with_verb(_mended(tokens)))


# both libraries read their tables when first asked, and a second thread would find them half read
_LOADING = threading.Lock()


@functools.cache
def _parser() -> Callable[[str], str]:
    def parsed(text: str) -> str:
        return str(parse(text, tokenize=True, tags=True, chunks=True))

    with _LOADING:
        from lemminflect import getLemma
        from textblob.en import parse  # half a second

        parsed("The dog barked.")
        getLemma("barked", "VERB", lemmatize_oov=False)
    return parsed


def _mended(tokens: Sequence[Token]) -> list[Token]:
    mended: list[Token] = []
    for index, token in enumerate(tokens):
        before = mended[-1] if mended else None
        foreign = index > 0 and tokens[index - 1].tag == "FW"
        if token.tag == "FW":  # Jerez de la Frontera
            token = replace(token, tag="NNP", chunk="NP", begins=before is None or before.tag != "NNP")
        elif foreign and token.tag == "NNP":
            token = replace(token, chunk="NP", begins=False)
        if token.text in _COUNTRIES:
            token = replace(token, tag="NNP", chunk="NP")
        if before is not None:
            token = _behind(before, token, tokens[index + 1] if index + 1 < len(tokens) else None)
        mended.append(token)
    return mended


def _behind(before: Token, token: Token, following: Token | None) -> Token:
    """What the word before says of this one."""
    if token.tag == "POS" or (token.lower == "s" and before.tag == "POS"):
        return replace(token, tag="POS", chunk=before.chunk, begins=False)  # Thrale's
    participle = token.tag in ("VBD", "VBN", "VBG") and before.tag in _BEFORE_NOUNS
    if participle and following is not None and following.tag in NOUNS:
        token = replace(token, tag="JJ", chunk="NP", begins=False)  # the spotted fever
    objects = following is not None and following.tag in ("DT", "PRP$", "PRP", "NNP")
    if token.tag == "NN" and before.tag == "MD" and verb_root(token.text) == token.lower:
        token = replace(token, tag="VB", chunk="VP", begins=False)  # shall purchase
    elif token.tag == "NN" and before.lower in HAVE and objects and verb_root(token.text) is not None:
        token = replace(token, tag="VBN", chunk="VP", begins=False)  # has broadcast the show
    elif token.tag == "VB" and before.lower in BE | HAVE:
        token = replace(token, tag="VBN")  # was recast
    elif token.tag == "VB" and before.tag in ("NNS", "NNPS") and token.begins:
        token = replace(token, tag="VBP")  # theories hold
    if token.tag in NOUNS and before.tag in _BEFORE_NOUNS | {"POS"}:
        token = replace(token, chunk="NP", begins=token.begins and before.chunk != "NP")
    new = (
        (token.tag in ("DT", "PRP", "PRP$") and before.tag != "PDT")
        or (token.tag == "NNP" and before.tag == "CD" and not _MONTH.match(token.text))  # in 1841 | Mother Tench
        or (token.tag == "CD" and (before.tag in ("NNS", "NNPS") or _YEAR.fullmatch(before.text) is not None))
    )
    return replace(token, begins=True) if token.chunk == "NP" and new else token


def _with_verb(tokens: list[Token]) -> list[Token]:
    """Where there is no verb up to the first comma or "that", what was taken for a plural: the Rhine *flows* into the lake."""
    ends = (
        index for index, token in enumerate(tokens) if token.lower in (",", ";", ":", "that") or token.tag in RELATIVE
    )
    end = min(next(ends, len(tokens)), len(tokens) - 1)
    if any(is_finite(tokens, at) for at in range(1, end)):
        return tokens
    for index in range(1, end):
        token, before, following = tokens[index], tokens[index - 1], tokens[index + 1]
        if before.tag == "RB" and index > 1:
            before = tokens[index - 2]
        follows = following.tag in ("DT", "IN", "TO", "RB", "PRP", "PRP$", "CD")
        plural = token.tag == "NNS" and before.tag in ("NN", "NNP", "CD")
        if plural and follows and verb_root(token.text) not in (None, token.lower):
            return [*tokens[:index], replace(token, tag="VBZ", chunk="VP", begins=True), *tokens[index + 1 :]]
    return tokens


def group(tokens: Sequence[Token], at: int) -> Sequence[Token]:
    """The verb group that begins here."""
    end = at + 1
    while end < len(tokens) and tokens[end].chunk == "VP" and not tokens[end].begins:
        end += 1
    return tokens[at:end]


def is_finite(tokens: Sequence[Token], at: int) -> bool:
    """Whether a verb group begins here that can be a clause's."""
    token = tokens[at]
    if token.chunk != "VP" or not token.begins or tokens[at - 1].tag in ("DT", "PRP$", "JJ", "TO"):
        return False
    verbs = [each for each in group(tokens, at) if each.tag in VERBS]
    if not verbs or verbs[0].tag in ("VB", "VBG"):
        return False
    if verbs[0].tag != "VBN":
        return True
    behind = at + len(
        group(tokens, at)
    )  # "OPEC issued a statement" is tagged so too, and "the price paid by" is no clause
    return behind < len(tokens) and (tokens[behind].chunk == "NP" or tokens[behind].tag in ("DT", "PRP$", "CD"))


def list_end(tokens: Sequence[Token], comma: int) -> int:
    """Behind the last member of a list that goes on at this comma: apples, pears and plums. The comma, where there is none."""
    at = comma
    while at < len(tokens) and tokens[at].text == ",":
        last = at + 1 < len(tokens) and tokens[at + 1].lower in ("and", "or")
        member = _member(tokens, at + 2 if last else at + 1)
        if member is None:
            return comma
        at = member
        if last:
            return at
        if at < len(tokens) and tokens[at].lower in ("and", "or"):
            return _member(tokens, at + 1) or comma
    return comma


def _member(tokens: Sequence[Token], at: int) -> int | None:
    """Behind the noun phrase that begins here, if it is not another clause's subject."""
    begin = at
    while at < len(tokens) and (tokens[at].chunk == "NP" or tokens[at].tag in NOUNS | {"DT", "JJ", "CD", "POS"}):
        if tokens[at].tag == "CC":
            break
        at += 1
    noun = at > begin and tokens[at - 1].tag in NOUNS | {"CD"}
    return at if noun and not (at < len(tokens) and is_finite(tokens, at)) else None


def noun_phrase(tokens: Sequence[Token]) -> int:
    """How many tokens at the beginning are a noun phrase, with what "of" and "and" add to it."""
    count = 0
    while count < len(tokens):
        token, following = tokens[count], tokens[count + 1] if count + 1 < len(tokens) else None
        plain = token.chunk == "NP" or token.tag in {"DT", "CD", "POS", "JJ"} | NOUNS
        plain = plain or (token.tag == "VBN" and following is not None and following.tag in NOUNS)
        joins = token.lower == "of" or (token.lower == "and" and following is not None and following.chunk == "NP")
        joins = joins or (token.text == "," and list_end(tokens, count) > count)
        if not plain and not (joins and count):
            break
        count += 1
    while count and tokens[count - 1].tag not in NOUNS | {"CD"}:
        count -= 1
    return count


@functools.cache
def verb_root(word: str) -> str | None:
    """proclaimed → proclaim; None for words that are no verbs."""
    from lemminflect import getLemma

    if word.lower() in HAVE | DO:
        return "have" if word.lower() in HAVE else "do"
    found = getLemma(word.lower(), "VERB", lemmatize_oov=False)  # with it, a pickled model would be read
    return str(found[0]) if found else None


@functools.cache
def is_noun(word: str) -> bool:
    """Whether a name's last word is a noun by itself: the Nixon *Administration*."""
    from lemminflect import getLemma

    return bool(getLemma(word.lower(), "NOUN", lemmatize_oov=False))
