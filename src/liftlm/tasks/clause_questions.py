"""Questions as people ask them, made from main clauses: who did it, what was done, when, where, how many, why.

"In October 1973, the members of OPEC proclaimed an embargo." → "When did the members of OPEC proclaim an embargo?"

As in Heilman and Smith 2010, "Good question! Statistical ranking for question generation": a part of a clause is taken out, the
verb is turned round, a question word comes before it. Here a shallow parser and strict rules take the place of their ranking.
English only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from liftlm.tasks.chunks import BE, DO, HAVE, NAMES, NOUNS, VERBS, Token, is_noun, noun_phrase, verb_root
from liftlm.tasks.clauses import PRONOUNS, SUBORDINATE, TIMES, Clause, find_clauses
from liftlm.tasks.details import CAPITALISED, DATE, FUNCTION_WORDS, MONTH
from liftlm.tasks.sentences import Sentence

_POSSESSIVES = {"his": "he", "her": "she", "its": "it", "their": "they"}
_MOST_NAME = 8  # words of a subject that a pronoun may stand for
_FEWEST, _MOST = 5, 28  # words of a question
_MOST_LEAD = 10  # words
_DENIALS = {"not", "never", "no", "hardly", "scarcely", "neither", "nor", "nobody", "nothing"}
_EMPTY = {"rain", "snow", "seem", "appear", "take", "happen", "turn", "say", "argue", "think", "know"}
_SPAN = re.compile(rf"\b(?:between|before|after|from|to|than) (?:{DATE.pattern})")
_OF_A_THING = re.compile(  # the war of 1709, late May 1709: not when something was
    rf"\b(?:(?!(?:{MONTH}|spring|summer|autumn|winter|end|beginning|Day) )\w+ of|early|late|mid) (?:{DATE.pattern})"
)
_BEFORE_DATE = re.compile(r"\b(?:in|on|by|of|since|from|until|to|during|around) $")
_BEHIND_DATE = re.compile(r"\s*(?:,|$)| (?:in|at|by|with|for|near)\b")
_NAME = re.compile(rf"\b{CAPITALISED}(?: {CAPITALISED})*")
_BEFORE_PLACE = re.compile(r"\b(?:in|at|of|from|near|on|into|around|the|a|an)\s$", re.IGNORECASE)
_MONTH = re.compile(MONTH)
_REASON = re.compile(r"(?:because|in order to|due to|owing to)\b", re.IGNORECASE)
_PLACES = {"in", "at", "near", "inside", "outside", "beneath", "behind", "above", "below", "under"}
_PLACES_OF_THINGS = {"near", "beneath", "behind", "inside", "outside"}  # without a name "in" and "at" may say anything
_NO_PLACES = frozenset(
    """
    act age battle beginning championship conference cost cup election end era festival game games language league olympics
    organization party period rate revolution speed time treaty war series season year
    arabic chinese dutch english french german greek hebrew italian japanese latin russian spanish
    """.split()  # noqa: SIM905
)
_NOT_LEFT_BEHIND = {"as", "than", "like", "per", "without", "within"}
_MONEY = re.compile(r"[$£€]")
# nouns that "who" asks for: by their ending, or one of these
_PERSON = re.compile(
    r"(?:[a-z]{3,}(?:er|or|ist|ian|ee)|[a-z]*(?:men|man|women|woman|smith|wife|wives|boy|girl|bishop)|"
    r"(?:shep|goat|cow)herd|person|people|(?:grand|step|god|school)?child(?:ren)?|"
    r"(?:arch|grand|step|god|vis)?(?:king|queen|president|captain|pope|monk|nun|knight|soldier|husband|mother|father|son|daughter|"
    r"brother|sister|priest|student|chief|duke|count|earl|prince|princess|general|saint|abbot|guard|clerk))s?"
)
_NO_PERSON = frozenset(
    """
    behavior border career center century chapter charter cluster color committee computer copper corner cover degree dinner
    error factor feather fever fiber finger harbor labor layer letter manner master matter member motor number order paper power
    quarter register remainder river sector shelter shoulder silver summer supper theater timber tower tree vector water
    weather winter answer disaster server abdomen bitumen ramen acumen omen regimen specimen
    """.split()  # noqa: SIM905
)
_NO_PERSON_ENDS = ("water", "paper", "power", "tower", "meter", "metre", "number", "river", "flower")


@dataclass(frozen=True)
class Asked:
    """kind: who, what, when, where, how many, why."""

    kind: str
    question: str
    answer: str


class ClauseReader:
    """Reads the sentences of a document in their order, and remembers whom its pronouns stand for.

    names: words that have a capital within sentences.
    """

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self._paragraph = -1
        self._subjects: dict[str, str] = {}  # by the pronoun that would stand for it
        self._people: set[str] = set()  # all names of the paragraph so far: of people, for all that is known

    def questions(self, sentence: Sentence) -> list[Asked]:
        """All that the sentence's main clauses give. A pronoun stands for the last subject of its paragraph that fits."""
        if sentence.paragraph != self._paragraph:
            self._paragraph, self._subjects, self._people = sentence.paragraph, {}, set()
        known = self._subjects  # "it" and "they" stand for what the sentence before was about
        self._subjects = {pronoun: owner for pronoun, owner in known.items() if pronoun in ("he", "she")}
        found: list[Asked] = []
        for clause in find_clauses(sentence.text):
            subject = self._subject(sentence.text, clause, known)
            if subject is not None:
                found += filter(_is_good, _Asker(sentence.text, clause, subject, self._names).all())
        self._people |= set(_people(sentence.text, self._names))
        return found

    def _subject(self, text: str, clause: Clause, known: dict[str, str]) -> str | None:
        """As it is called within a question; None where a pronoun may stand for anything. known: as before the sentence."""
        tokens = clause.subject
        words, first = text[tokens[0].start : tokens[-1].end], tokens[0]
        pronoun = _POSSESSIVES.get(first.lower, first.lower)
        if pronoun not in PRONOUNS:
            words = _small(words, first, self._names)
            if len(words.split()) <= _MOST_NAME:
                self._subjects |= dict.fromkeys(_stands_for(tokens), words)
            return words
        owner = self._subjects.get(pronoun) or known.get(pronoun)
        if owner is None or not self._alone(pronoun, owner) or (first.lower == "it" and _is_empty(text, clause)):
            return None
        self._subjects[pronoun] = owner  # and of the next sentence's pronoun
        if first.lower in PRONOUNS:
            return owner
        return f"{owner}{'’' if owner.endswith('s') else '’s'} {words[len(first.text) :].strip()}"

    def _alone(self, pronoun: str, owner: str) -> bool:
        """Whether "he" or "she" can be nobody else: the paragraph has no other name."""
        return pronoun not in ("he", "she") or all(set(name.split()) & set(owner.split()) for name in self._people)


def _people(text: str, names: set[str]) -> Iterator[str]:
    """Names that may be a person's: not behind "in", "of", "the" and their like."""
    for match in _NAME.finditer(text):
        first = match.group().split()[0]
        if (
            first.lower() in FUNCTION_WORDS
            or (match.start() == 0 and match.group() == first and first not in names)
            or _MONTH.search(match.group())
        ):
            continue
        if not _BEFORE_PLACE.search(text[: match.start()]):
            yield match.group()


def _is_empty(text: str, clause: Clause) -> bool:
    """It rains, it is known that …, it took years to …"""
    behind = text[clause.verb[0].start :]
    says_what = clause.rest and clause.rest[0].tag in ("DT", "PRP$", "CD", "IN")
    verb = next((token for token in reversed(clause.verb) if token.tag in VERBS), clause.verb[-1])
    if clause.verb[0].lower in BE and len(clause.verb) == 1 and not says_what:
        return True  # it is important
    return verb_root(verb.text) in _EMPTY or re.search(r"\b(?:that|who|whether|to)\b", behind) is not None


def _is_good(asked: Asked) -> bool:
    """Of a fair length, not giving its answer away, without a lone quotation mark or bracket."""
    even = all(
        text.count("(") == text.count(")") and text.count('"') % 2 == 0 and text.count("“") == text.count("”")
        for text in (asked.question, asked.answer)
    )
    given = asked.answer.lower() in asked.question.lower()
    return even and not given and _FEWEST <= len(asked.question.split()) <= _MOST


def _small(words: str, first: Token, names: set[str]) -> str:
    """A sentence's first words as they are within one."""
    word = first.text
    name = word in names or first.tag in NAMES or (len(word) > 1 and not word[1:].islower())
    name = name and not (word.lower() in FUNCTION_WORDS and word[1:] == word[1:].lower())
    return words if name or not words else words[0].lower() + words[1:]


def _stands_for(subject: Sequence[Token]) -> tuple[str, ...]:
    """The pronouns that may take the place of a subject."""
    head = _head(subject)
    if head is None:
        return ()
    if head.tag in ("NNS", "NNPS") or any(token.lower == "and" for token in _plain(subject)):
        return ("they",)
    return ("he", "she") if question_word(subject) in ("who", "who or what") else ("it",)


def _plain(phrase: Sequence[Token]) -> Sequence[Token]:
    """Up to the first preposition."""
    return phrase[: next((index for index, token in enumerate(phrase) if token.tag in ("IN", "TO")), len(phrase))]


def _head(phrase: Sequence[Token]) -> Token | None:
    return next((token for token in reversed(_plain(phrase)) if token.tag in NOUNS), None)


def question_word(phrase: Sequence[Token]) -> str:
    """Names may be those of people or not; "the Nixon Administration" says which it is."""
    head, plain = _head(phrase), _plain(phrase)
    if head is None:
        return "what"
    if head.tag not in NAMES:
        return "who" if _is_person(head.lower) else "what"
    if any(token.tag == "NN" and _is_person(token.text) for token in plain):
        return "who"  # the historian Francis Gasquet
    if phrase[0].lower != "the":
        return "who or what"
    return f"which {head.lower}" if len(head.text) > 3 and len(plain) > 2 and is_noun(head.text) else "what"


def _is_person(word: str) -> bool:
    last = word.rsplit("-", 1)[-1].removesuffix("s")
    return _PERSON.fullmatch(last) is not None and last not in _NO_PERSON and not last.endswith(_NO_PERSON_ENDS)


class _Asker:
    """All questions of one clause. subject: as it is called in them."""

    def __init__(self, text: str, clause: Clause, subject: str, names: set[str]) -> None:
        self.text, self.clause, self.subject, self.names = text, clause, subject, names
        self.verbs = [token for token in clause.verb if token.tag in VERBS]
        self.first = self.verbs[0]

    def all(self) -> Iterator[Asked]:
        if self.clause.that:
            yield from self._that()
            return
        yield from self._who()
        if any(token.lower in _DENIALS for token in (*self.clause.verb, *self.clause.rest)):
            return  # "What did she not do?" has many answers
        yield from self._when()
        yield from self._object()
        yield from self._preposition()
        yield from self._why()

    # --- pieces of text -----------------------------------------------------------------------------------------------

    def _said(self, tokens: Sequence[Token]) -> str:
        return self.text[tokens[0].start : tokens[-1].end] if tokens else ""

    def _lead(self) -> str:
        """Where it can stand at a question's end."""
        lead = self.clause.lead
        if not lead or lead[0].tag not in ("IN", "TO") or len(lead) > _MOST_LEAD:
            return ""
        if lead[0].lower in SUBORDINATE - {"since", "until"}:
            return ""
        return _small(self._said(lead), lead[0], self.names) if lead[0].start == 0 else self._said(lead)

    def _inverted(self) -> tuple[str, str] | None:
        """("did", "proclaim") or ("had", "risen"): what stands before the subject, and behind it."""
        verb, word = self.clause.verb, self.first.lower
        at = verb.index(self.first)
        before, behind = self._said(verb[:at]), self._said(verb[at + 1 :])
        if word in BE or self.first.tag == "MD" or (word in HAVE | DO and len(self.verbs) > 1):
            return word, _joined(before, behind)
        root = verb_root(self.first.text)
        helper = {"VBZ": "does", "VBP": "do"}.get(self.first.tag, "did")
        return None if root is None else (helper, _joined(before, root, behind))

    def _ask(self, kind: str, word: str, rest: str, lead: str, answer: str) -> Iterator[Asked]:
        inverted = self._inverted()
        if inverted is not None:
            yield Asked(kind, _question(word, inverted[0], self.subject, inverted[1], rest, lead), answer)

    def _is(self) -> bool:
        """Whether the clause says what something is."""
        return len(self.verbs) == 1 and self.first.lower in BE

    def _is_passive(self) -> bool:
        """was built, has been built"""
        helped = self.first.lower in BE or any(token.lower == "been" for token in self.verbs)
        return helped and self.verbs[-1].tag == "VBN" and self.verbs[-1].lower != "been"

    # --- questions ----------------------------------------------------------------------------------------------------

    def _who(self) -> Iterator[Asked]:
        subject, rest = self.clause.subject, self.clause.rest
        if subject[0].lower in PRONOUNS | set(_POSSESSIVES):
            return  # the sentence does not say who
        if self.first.tag == "VBP" and self.first.lower not in BE:
            return  # "who have" is no question
        word = question_word(subject)
        if self._is() and rest and question_word(rest[: noun_phrase(rest)]) == "who":
            word = "who"
        question = _question(word, self._said(self.clause.verb), self._said(rest), self._lead())
        if len(question.split()) > len(word.split()) + len(self.clause.verb):  # more than "Who was seen?"
            yield Asked("who" if word == "who" else "what", question, self.subject)

    def _when(self) -> Iterator[Asked]:
        rest, lead = self._said(self.clause.rest), self._said(self.clause.lead)
        said = f"{lead} {rest}"
        if len(DATE.findall(f"{self.subject} {said}")) != 1 or _SPAN.search(said) or _OF_A_THING.search(said):
            return
        match = DATE.search(lead)
        if match is not None:
            yield from self._ask("when", "when", rest, "", match.group())
            return
        match = DATE.search(rest)
        if match is not None and _BEHIND_DATE.match(rest[match.end() :]):
            others = _joined(_BEFORE_DATE.sub("", rest[: match.start()]), rest[match.end() :])
            yield from self._ask("when", "when", others, self._lead(), match.group())

    def _object(self) -> Iterator[Asked]:
        """What follows the verb as a noun phrase."""
        rest = self.clause.rest
        count = noun_phrase(rest)
        thing, following = rest[:count], rest[count : count + 2]
        if not thing or thing[0].tag == "PRP":
            return
        to_do = len(following) == 2 and following[0].tag == "TO" and following[1].chunk == "VP"
        if to_do or (following and (following[0].tag in ("VBG", "VB", "CC", "VBN", "JJ") or following[0].text == ",")):
            return  # more of the object, or what it does
        if any(token.lower in TIMES for token in thing) or (
            len(thing) == 1 and thing[0].lower in ("place", "part", "way")
        ):
            return  # last year; take place
        passive = self.first.lower in BE and self.verbs[-1].tag == "VBN"
        if passive or (self.verbs[-1].lower in BE and len(thing) == 1 and thing[0].tag == "NN"):
            return
        behind = self._said(rest[count:])
        if thing[0].tag == "CD":
            yield from self._how_many(thing, behind)
            return
        person = self._is() and "who" in (question_word(thing), question_word(self.clause.subject))
        yield from self._ask("what", "who" if person else "what", behind, self._lead(), self._said(thing))

    def _how_many(self, thing: Sequence[Token], behind: str) -> Iterator[Asked]:
        """Of things that are counted, not of money and shares: "fifty blocks of ice"."""
        plain = _plain(thing)
        mixed = any(token.tag == "CC" or token.text == "," for token in thing)
        if len(plain) < 2 or plain[-1].tag != "NNS" or mixed or _MONEY.match(thing[0].text):
            return
        first = next(index for index, token in enumerate(plain) if token.tag != "CD")
        if all(token.tag in ("JJ", "NN", "NNP", "NNS") for token in plain[first:]):
            word = f"how many {self._said(thing[first:])}"
            yield from self._ask("how many", word, behind, self._lead(), self._said(plain))

    def _preposition(self) -> Iterator[Asked]:
        """The last preposition with its noun phrase: where, or what, with the preposition left behind."""
        rest = self.clause.rest
        at = self._last_preposition()
        if at is None:
            return
        preposition, thing = rest[at], rest[at + 1 :]
        if not thing or noun_phrase(thing) != len(thing) or thing[0].tag in ("PRP", "JJR"):
            return
        if preposition.tag == "TO" and thing[0].text.islower() and verb_root(thing[0].text) is not None:
            return  # to do something
        if any(token.tag == "VBG" and token.chunk == "VP" for token in rest[:at]) or rest[0].text == ",":
            return
        if DATE.search(self._said(rest[at:])) or _MONTH.search(self._said(thing)):
            return
        before, named = self._said(rest[:at]), any(token.tag in NAMES for token in thing)
        a_place = not any(token.lower in _NO_PLACES for token in thing)
        if preposition.lower in _PLACES and (named or preposition.lower in _PLACES_OF_THINGS) and a_place:
            yield from self._ask("where", "where", before, self._lead(), self._said(rest[at:]))
        elif preposition.lower not in _NOT_LEFT_BEHIND or (
            preposition.lower == "as" and at == 0 and self._is_passive()
        ):
            done_by = preposition.lower == "by" and self.first.lower in BE
            word = question_word(thing) if done_by else "what"
            yield from self._ask("what", word, _joined(before, preposition.lower), "", self._said(thing))

    def _last_preposition(self) -> int | None:
        """Whose noun phrase reaches to the end: "of" belongs to the one before."""
        rest = self.clause.rest
        places = [index for index, token in enumerate(rest) if token.tag in ("IN", "TO") and token.chunk == "PP"]
        while places:
            at = places.pop()
            if at == 0 or "of" not in (rest[at].lower, rest[at - 1].lower):
                return at
        return None

    def _that(self) -> Iterator[Asked]:
        """She said that …: what did she say?"""
        so = any(token.lower in ("so", "such") for token in self.clause.rest)
        if not so and not self._is_passive() and len(self.clause.that.split()) <= _MOST:
            yield from self._ask("what", "what", self._said(self.clause.rest), self._lead(), self.clause.that)

    def _why(self) -> Iterator[Asked]:
        reason = self.clause.after.strip(" ,.;")
        if _REASON.match(reason):
            yield from self._ask("why", "why", self._said(self.clause.rest), self._lead(), reason)


def _joined(*pieces: str) -> str:
    return " ".join(" ".join(piece.strip(" ,") for piece in pieces).split())


def _question(*pieces: str) -> str:
    question = _joined(*pieces)
    return f"{question[:1].upper()}{question[1:]}?"
