"""The writer that needs no model: tasks cut from the document's own sentences. Deterministic, quick, faithful.

Every answer is text of the document, or an order that its positions or dates give. Every sentence is asked for
`per_sentence` times, each time in another way, since it is the variety of questions that makes a fact findable
(docs/tasks.md). Knows only text.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from liftlm.pauses import pause
from liftlm.tasks.sentences import Sentence, split_into_sentences
from liftlm.tasks.task import Task

# English function words; in any language, words of more than every twelfth sentence are counted among them
_FUNCTION_WORDS = frozenset(
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
_ACCENTS = "".join(chr(code) for code in range(0x300, 0x3100) if unicodedata.category(chr(code)).startswith("M"))
_WORD = re.compile(rf"[\w{_ACCENTS}]+(?:['’.-][\w{_ACCENTS}]+)*")
_BREAK = re.compile(rf"[^\w\s'’.{_ACCENTS}-]|\.\s|--|—|–")  # no phrase goes across
_NUMBER_WORDS = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen|twenty|"
    "thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|dozen"
)
_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_TIME = re.compile(rf"(?:{_MONTH}|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)days?)")  # names, but of nobody and no place
_YEAR = r"(?:1[0-9]|20)\d\d"
_DATE = re.compile(
    rf"\b(?:\d{{1,2}} (?:{_MONTH})(?:,? {_YEAR})?|(?:{_MONTH})(?: \d{{1,2}},?)? {_YEAR}|(?:{_MONTH}) \d{{1,2}}\b"
    rf"|(?<=\bin ){_YEAR}|(?<=\bof ){_YEAR}|(?<=\bby ){_YEAR}|(?<=\bsince ){_YEAR}|(?<=\bfrom ){_YEAR}|(?<=\bto ){_YEAR})\b"
)
_COUNT = re.compile(
    rf"\b(?:\d[\d,.]*\d|\d|(?:(?:{_NUMBER_WORDS})(?:[ -](?:and )?(?:{_NUMBER_WORDS}))*))(?= ([a-z]{{3,}}))",
    re.IGNORECASE,
)
_CAPITALS = "".join(chr(code) for code in range(0x41, 0x530) if chr(code).isupper())
_CAPITALISED = rf"[{_CAPITALS}][\w{_ACCENTS}’'-]+"
_NAME = re.compile(rf"\b{_CAPITALISED}(?:(?: of| the| de| von| van| du| la)* {_CAPITALISED})*")
_YEAR_ALONE = re.compile(rf"(?<![\d,.])({_YEAR})(?!\d|,\d)")
_PLACE_BEFORE = re.compile(r"\b(?:in|at|to|from|near|into|across|through|towards?)(?: the)?\s$")

_SHORTEST = 4  # words
_REACH = 14  # words kept on each side of a detail that is asked for

_ABOUT = (
    "What does the text say about {0}?",
    "What is said about {0} and {1}?",
    "What do we learn about {0}, {1} and {2}?",
    "What happened with {0}?",
    "How are {0} and {1} connected?",
    "Which sentence speaks of {0} and {1}?",
    "Tell me about {0} and {1}.",
    "What is known of {0}?",
    "What can you tell me about {0}, in connection with {1}?",
    "Where does {0} come up, together with {1} and {2}?",
)
_COMPLETE = ("Complete this sentence: {0} …", "How does this go on: {0} …", "Finish what the text says: {0} …")
_NEXT = ("What comes right after this: {0}", "After “{0}”, what does the text say next?")
_WHEN = ("When was it that {0}?", "On what date or in what year: {0}?", "When did this happen: {0}?")
_FIRST = (
    "Which came first: {0}, or {1}?",
    "Which happened earlier: {0}, or {1}?",
    "Which is earlier in time: {0}, or {1}?",
)
_ORDER = (
    "Put these {n} events in order, earliest first: {events}.",
    "In what order did these {n} things happen? {events}.",
    "Sort these events by time: {events}.",
)


def write_extractive_tasks(text: str, per_sentence: int, seed: int = 0) -> list[Task]:
    """Tasks for every sentence, in the order of the text: `per_sentence` for each, and about one of order for four sentences."""
    sentences = split_into_sentences(text)
    draw = random.Random(f"{seed}/{len(text)}/{text[:1000]}")
    writer = _Writer(sentences, draw)
    tasks: list[Task] = []
    for index, sentence in enumerate(sentences):
        pause()
        tasks += writer.tasks_of(index, per_sentence)
        if per_sentence > 1 and index % 4 == 3:
            tasks += writer.order(sentence)
    return tasks


@dataclass(frozen=True)
class _Event:
    sentence: Sentence
    words: str
    year: int | None


class _Writer:
    def __init__(self, sentences: Sequence[Sentence], draw: random.Random) -> None:
        self.sentences, self.draw = sentences, draw
        words = [{word.lower() for word in _WORD.findall(sentence.text)} for sentence in sentences]
        self.frequency = Counter(word for some in words for word in some)
        often = max(8, len(sentences) / 12)
        self.dull = _FUNCTION_WORDS | {word for word, count in self.frequency.items() if count > often}
        # a capital at the beginning of a sentence says nothing, unless the word has one elsewhere too
        self.names = {
            word for sentence in sentences for word in re.findall(rf"(?<=[\w,;] ){_CAPITALISED}", sentence.text)
        }
        self.events = [event for sentence in sentences if (event := self._event(sentence)) is not None]
        self.dated = [event for event in self.events if event.year is not None]

    # --- one sentence -------------------------------------------------------------------------------------------------

    def tasks_of(self, index: int, count: int) -> list[Task]:
        """`count` different tasks for a sentence: first by its phrases, then by its details, then by its place."""
        sentence = self.sentences[index]
        if (
            len(sentence.text.split()) < _SHORTEST
        ):  # a number of a chapter, a lone word: to be continued, not to be asked for
            return []
        about = self._about(index)
        details = list(self._details(sentence))
        self.draw.shuffle(details)
        place = list(self._place(index))
        self.draw.shuffle(place)
        tasks: list[Task] = []
        turns: list[Iterator[Task]] = [about, iter(details), about, iter(place)]
        position = 0
        while len(tasks) < count and position < 4 * count + 4:
            task = next(turns[position % 4], None)
            position += 1
            if task is not None and all(task.question != other.question for other in tasks):
                tasks.append(task)
        return tasks

    def _task(self, kind: str, sentence: Sentence, question: str, answer: str | None = None) -> Task:
        answer = sentence.text if answer is None else answer
        return Task(question, _capital(answer), kind, sentence.start, sentence.end)

    def _about(self, index: int) -> Iterator[Task]:
        """The sentence by its salient phrases: each time others of them, in other words.

        In a third of those with several phrases one is the sentence before's: real questions name what a pronoun stands for.
        """
        sentence = self.sentences[index]
        phrases = self._phrases(sentence.text)
        before = self.sentences[index - 1] if index else sentence
        nearby = self._phrases(before.text)[:4] if before.paragraph == sentence.paragraph and index else []
        nearby = [phrase for phrase in nearby if phrase not in phrases]
        if not phrases:
            return
        templates = list(_ABOUT)
        self.draw.shuffle(templates)
        for turn in range(3 * len(templates)):
            template = templates[turn % len(templates)]
            places = template.count("{")
            if places > len(phrases):
                continue
            # weight by rank: the most telling phrases come up most often, all of them in time
            chosen = sorted(phrases[: places + 4], key=lambda phrase: self.draw.random() * (phrases.index(phrase) + 2))[
                :places
            ]
            if places > 1 and nearby and self.draw.random() < 1 / 3:
                chosen[0] = self.draw.choice(nearby)
            yield self._task("about", sentence, template.format(*chosen))

    def _phrases(self, text: str) -> list[str]:
        """Runs of telling words, the rarest in the document first."""
        phrases: dict[str, float] = {}
        for piece in _BREAK.split(text):
            run: list[str] = []
            for word in [*_WORD.findall(piece), ""]:
                if word and word.lower() not in self.dull:
                    run.append(word)
                    continue
                while run:
                    part, run = run[:4], run[4:]
                    rarity = [math.log(len(self.sentences) / self.frequency[w.lower()] + 1) for w in part]
                    phrases.setdefault(" ".join(part), max(rarity) + 0.3 * len(part))
        return sorted(phrases, key=lambda phrase: -phrases[phrase])

    def _details(self, sentence: Sentence) -> Iterator[Task]:
        """who, where, when, how many: the detail taken out of the sentence and asked for."""
        text = sentence.text
        dates = list(_DATE.finditer(text))
        for match in _NAME.finditer(text):
            name = match.group()
            first = name.split()[0]
            if first.lower() in _FUNCTION_WORDS or (match.start() == 0 and first not in self.names):
                continue
            if _TIME.fullmatch(name):
                continue
            if any(match.start() < date.end() and date.start() < match.end() for date in dates):
                continue
            if match.start() == 0 and re.match(r" [a-z]", text[match.end() :]):
                question = f"Who or what{_around(text, 0, match.end(), '')}"
                yield self._task("who", sentence, question, self._short(name, text))
                continue
            kind, word = (
                ("where", "which place") if _PLACE_BEFORE.search(text[: match.start()]) else ("who", "who or what")
            )
            yield self._task(kind, sentence, _around(text, *match.span(), word), self._short(name, text))
        for match in dates:
            start = re.sub(r"\b(?:in|on|by|of|since|from|until) $", "", text[: match.start()], flags=re.IGNORECASE)
            event = " ".join(f"{start} {text[match.end() :]}".strip(" ,.;:").split()).replace(" ,", ",")
            if len(event.split()) >= 4:
                yield self._task(
                    "when", sentence, self.draw.choice(_WHEN).format(event), self._short(match.group(), text)
                )
        for match in _COUNT.finditer(text):
            if match.group(1) in self.dull or any(match.start() < d.end() and d.start() < match.end() for d in dates):
                continue
            question = _around(text, *match.span(), "how many")
            yield self._task("how many", sentence, question, self._short(f"{match.group()} {match.group(1)}", text))

    def _short(self, detail: str, sentence: str) -> str:
        """Half of the answers are the detail alone, half the sentence that holds it."""
        return f"{detail}." if self.draw.random() < 0.5 else sentence

    def _place(self, index: int) -> Iterator[Task]:
        """What follows: the rest of the sentence, or the next one."""
        sentence = self.sentences[index]
        words = sentence.text.split()
        if len(words) >= 8:
            cut = self.draw.randint(len(words) * 2 // 5, len(words) * 3 // 5)
            question = self.draw.choice(_COMPLETE).format(" ".join(words[:cut]))
            yield self._task("complete", sentence, question, " ".join(words[cut:]))
        before = self.sentences[index - 1] if index else None
        if before is not None and before.paragraph == sentence.paragraph:
            question = self.draw.choice(_NEXT).format(" ".join(before.text.split()[-24:]))
            yield self._task("next", sentence, question)

    # --- order --------------------------------------------------------------------------------------------------------

    def _event(self, sentence: Sentence) -> _Event | None:
        """A sentence that can stand for an event: short enough, or its first clause, without its date."""
        years = {int(year) for year in _YEAR_ALONE.findall(sentence.text)}
        text = re.sub(rf"\b(?:[Oo]n|[Ii]n|[Bb]y)(?: the \w+ of)? (?:{_DATE.pattern}|{_YEAR}),? ?", "", sentence.text)
        clause = re.split(r"[;:]| [—–-] |, (?:and|but|which|who|where|when|as) ", text)[0].strip(" .,;:!?")
        if not 4 <= len(clause.split()) <= 16 or re.match(r"(?:It|This|That|He|She|They|These|Those)\b", clause):
            return None
        first = clause.split()[0]
        clause = clause if first in self.names else clause[0].lower() + clause[1:]
        return _Event(sentence, clause, years.pop() if len(years) == 1 else None)

    def order(self, near: Sentence) -> list[Task]:
        """One task of order: by year where events have one, else by their place in the text."""
        by_year = len(self.dated) >= 6 and self.draw.random() < 0.7
        pool = self.dated if by_year else self.events
        key: Callable[[_Event], int] = (lambda e: e.year or 0) if by_year else (lambda e: e.sentence.start)
        wanted = self.draw.choice((2, 2, 3, 3, 4, 5, 6))
        picked = self.draw.sample(pool, min(wanted, len(pool)))
        distinct = list({key(event): event for event in picked}.values())
        if len(distinct) < 2:
            return []
        ordered = sorted(distinct, key=key)
        evidence = (min(e.sentence.start for e in ordered), max(e.sentence.end for e in ordered))
        where = "" if by_year else " (in the order of the text)"
        if len(distinct) == 2:
            question = self.draw.choice(_FIRST).format(distinct[0].words, distinct[1].words) + where
            return [Task(question, _capital(ordered[0].words) + ".", "first", *evidence)]
        listed = "; ".join(event.words for event in distinct)
        question = self.draw.choice(_ORDER).format(n=len(distinct), events=listed) + where
        answer = "; ".join(event.words for event in ordered)
        return [Task(question, _capital(answer) + ".", "order", *evidence)]


def _around(text: str, start: int, end: int, word: str) -> str:
    """The words around a detail, with `word` in its place, as a question: "… sent how many blocks down the valley …?"."""
    before, after = text[:start].split(), text[end:].split()
    left = " ".join(before) if len(before) <= _REACH else "… " + " ".join(before[-_REACH:])
    right = " ".join(after).rstrip(".;:,") if len(after) <= _REACH else " ".join(after[:_REACH]) + " …"
    glue = "" if not after or text[end : end + 1].strip() else " "
    return f"{left} {word}".lstrip() + f"{glue}{right}?"


def _capital(text: str) -> str:
    first = text[:1].upper()
    # ß and the ligatures of some PDFs have no single capital, and the micro sign's is another letter's
    return first + text[1:] if len(first) == 1 and first.lower() == text[:1].lower() else text
