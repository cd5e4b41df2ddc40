"""The writer that needs no model: tasks cut from the document's own sentences. Deterministic, quick, faithful.

Every answer is text of the document, or an order that its positions or dates give. Every sentence is asked for
`per_sentence` times (with short answers in the mean), each time in another way, since it is the variety of questions that
makes a fact findable (docs/tasks.md). Knows only text.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from liftlm.config import AnswerForm
from liftlm.pauses import pause
from liftlm.tasks.clause_questions import ClauseReader
from liftlm.tasks.details import (
    CAPITALISED,
    CJK_DATE,
    DATE,
    FUNCTION_WORDS,
    WORD,
    YEAR,
    Detail,
    capital,
    find_details,
    telling_phrases,
)
from liftlm.tasks.phrases import ask_phrases, in_place
from liftlm.tasks.scripts import Language, language_of, telling_runs, word_count
from liftlm.tasks.sentences import Sentence, split_into_sentences
from liftlm.tasks.task import Task
from liftlm.tasks.wordings import wordings_for

WRITER_VERSION = 3  # raise it where the same text gets other tasks: what was absorbed with others is another adapter
_YEAR_ALONE = re.compile(rf"(?<![\d,.])({YEAR})(?!\d|,\d)")
_SHORTEST = 4  # words
_LONGEST_STATEMENT = 24  # words
_PRONOUN = re.compile(r"(?:It|This|That|He|She|They|These|Those|We|I)\b")
_BETWEEN_ORDERS = 12  # tasks
_SENTENCES_BETWEEN_ORDERS = 4  # at least where answers are short: those of order are the longest
# of English text two fifths and more are function words; of Dutch or German a sixth look like one
_FUNCTION_SHARE = 0.3
_FEWEST = 2  # tasks a sentence, where they go to sentences by what these have
_ARTICLE = re.compile(r"^(?:the|an?) ")


def write_extractive_tasks(text: str, per_sentence: int, seed: int = 0, answers: AnswerForm = "auto") -> list[Task]:
    """Tasks for every sentence, in the order of the text: `per_sentence` for each, and one of order for about twelve of them.

    answers: `short` asks for details first and answers with these alone; of English text `per_sentence` is then a mean, at most:
    where a sentence has less to be asked for, others are asked for more, and one of order comes after four sentences or more.
    `sentence` answers with whole sentences; else half of a detail's answers are the detail, half its sentence.
    """
    sentences = split_into_sentences(text)
    draw = random.Random(f"{seed}/{len(text)}/{text[:1000]}")
    writer = _Writer(sentences, draw, language_of(text), answers)
    tasks: list[Task] = []
    every = max(_SENTENCES_BETWEEN_ORDERS if answers == "short" else 1, _BETWEEN_ORDERS // per_sentence)
    details: list[list[Task]] = []
    for index in range(len(sentences)):
        pause()
        details.append(writer.details_of(index))
    by_details = writer.clauses is not None and answers == "short"
    counts = _allotted(list(map(len, details)), per_sentence) if by_details else [per_sentence] * len(sentences)
    for index, count in enumerate(counts):
        pause()
        tasks += writer.tasks_of(index, count, details[index])
        if index % every == every - 1:
            tasks += writer.order()
    return tasks


@dataclass(frozen=True)
class _Event:
    sentence: Sentence
    words: str
    year: int | None


class _Writer:
    def __init__(
        self,
        sentences: Sequence[Sentence],
        draw: random.Random,
        language: Language = "en",
        answers: AnswerForm = "auto",
    ) -> None:
        self.sentences, self.draw, self.language, self.answers = sentences, draw, language, answers
        self.says = wordings_for(language)
        words = [{word.lower() for word in self._telling(sentence.text)} for sentence in sentences]
        self.frequency = Counter(word for some in words for word in some)
        often = max(8, len(sentences) / 12)
        self.dull = FUNCTION_WORDS | {word for word, count in self.frequency.items() if count > often}
        # a capital at the beginning of a sentence says nothing, unless the word has one elsewhere too
        self.names = {
            word for sentence in sentences for word in re.findall(rf"(?<=[\w,;] ){CAPITALISED}", sentence.text)
        }
        pool: dict[tuple[str, int], dict[str, None]] = {}  # sets that keep their order
        for sentence in sentences:
            for found in find_details(sentence.text, self.names, self.dull):
                text = sentence.text[found.start : found.end]
                pool.setdefault((found.kind, len(text.split())), {})[text] = None
        english = _is_english([word for sentence in sentences for word in WORD.findall(sentence.text)])
        self.clauses = ClauseReader(self.names) if language == "en" and english else None
        self.details = {key: list(texts) for key, texts in pool.items()}
        self.events = [event for sentence in sentences if (event := self._event(sentence)) is not None]
        self.dated = [event for event in self.events if event.year is not None]

    # --- one sentence -------------------------------------------------------------------------------------------------

    def tasks_of(self, index: int, count: int, details: Sequence[Task]) -> list[Task]:
        """`count` different tasks for a sentence: by its phrases, by its details (`details_of`), twice, by its place."""
        sentence = self.sentences[index]
        if not _is_askable(sentence):
            return []
        about, place = self._about(index), list(self._place(index))
        self.draw.shuffle(place)
        detail = iter(details)
        turns: list[Iterator[Task]] = [about, detail, detail, about, iter(place)]
        if self.answers == "short":
            turns = [detail] * count + turns
        tasks: list[Task] = []
        position = 0
        while len(tasks) < count and position < (count + 1) * len(turns):
            task = next(turns[position % len(turns)], None)
            position += 1
            if task is not None and all(task.question != other.question for other in tasks):
                tasks.append(task)
        return tasks

    def details_of(self, index: int) -> list[Task]:
        """All that can be asked of a sentence for a detail of it, what is to be asked first before the rest. In the text's order:
        what a pronoun stands for is remembered.

        With short answers that is every answer once, noun phrases last, before any is asked for in other words; else what people
        ask and what is cut out by turns.
        """
        sentence = self.sentences[index]
        if not _is_askable(sentence):
            return []
        asked, cut_out = list(self._asked(sentence)), list(self._details(sentence))
        whether = list(self._whether(sentence))
        if self.answers != "short":
            cut_out += whether
        self.draw.shuffle(asked)
        self.draw.shuffle(cut_out)
        if self.answers != "short":
            return [task for pair in itertools.zip_longest(asked, cut_out) for task in pair if task is not None]
        first: list[Task] = []
        again: list[Task] = []
        questions: set[str] = set()
        known: set[str] = set()
        for task in (*asked, *cut_out, *self._noun_phrases(sentence), *whether):
            if task.question in questions:
                continue
            questions.add(task.question)
            later = task.kind == "yes or no" or _bare(task.answer) in known
            (again if later else first).append(task)
            known.add(_bare(task.answer))
        return first + again

    def _task(self, kind: str, sentence: Sentence, question: str, answer: str | None = None) -> Task:
        answer = sentence.text if answer is None else answer
        return Task(question, capital(answer), kind, sentence.start, sentence.end)

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
        templates = list(self.says.about)
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

    def _telling(self, text: str) -> list[str]:
        """Words, or what is nearest to words where there are no blanks between them."""
        return WORD.findall(text) if self.language == "en" else telling_runs(text, self.language)

    def _phrases(self, text: str) -> list[str]:
        """Runs of telling words, the rarest in the document first."""
        return sorted(telling_phrases(text, self.language, self.dull), key=lambda phrase: -self._weight(phrase))

    def _weight(self, phrase: str) -> float:
        """Of its rarest word, and a little for its length."""
        words = phrase.split(" ") if self.language == "en" else [phrase]
        rarity = [math.log(len(self.sentences) / self.frequency[word.lower()] + 1) for word in words]
        return max(rarity) + (0.3 * len(words) if self.language == "en" else 0.1 * len(phrase))

    def _asked(self, sentence: Sentence) -> Iterator[Task]:
        """who, what, where, when, how many, why: as people ask, where the sentence's clauses are plain."""
        for asked in self.clauses.questions(sentence) if self.clauses is not None else ():
            yield self._task(asked.kind, sentence, asked.question, self._short(asked.answer, sentence.text))

    def _noun_phrases(self, sentence: Sentence) -> Iterator[Task]:
        """Whatever else the sentence names, asked for in its place, in any order."""
        phrases = list(ask_phrases(sentence.text)) if self.clauses is not None else []
        self.draw.shuffle(phrases)
        for asked in phrases:
            yield self._task(asked.kind, sentence, asked.question, self._short(asked.answer, sentence.text))

    def _details(self, sentence: Sentence) -> Iterator[Task]:
        """who, where, when, how many: the detail taken out of the sentence and asked for."""
        text = sentence.text
        for detail in find_details(text, self.names, self.dull):
            words, kind = text[detail.start : detail.end], detail.kind
            if kind != "when" and self.language != "en":
                continue  # the questions below are English
            if kind == "when":
                event = self._without(text, detail)
                if word_count(event) < 4:
                    continue
                question = self.draw.choice(self.says.when).format(event)
            elif kind == "how many":
                question, words = in_place(text, detail.start, detail.end, "how many"), f"{words} {detail.unit}"
            elif detail.start == 0 and re.match(r" [a-z]", text[detail.end :]):
                question = f"Who or what{in_place(text, 0, detail.end, '')}"
            else:
                question = in_place(text, detail.start, detail.end, "which place" if kind == "where" else "who or what")
            yield self._task(kind, sentence, question, self._short(words, text))

    def _without(self, text: str, date: Detail) -> str:
        """What happened at a date."""
        if self.language != "en":
            start, end = text[: date.start].rstrip("在于自至"), text[date.end :].lstrip("に、，")
            return (start + end).strip(" ，、。")
        start = re.sub(r"\b(?:in|on|by|of|since|from|until|during|to) $", "", text[: date.start], flags=re.IGNORECASE)
        return " ".join(f"{start} {text[date.end :]}".strip(" ,.;:").split()).replace(" ,", ",")

    def _whether(self, sentence: Sentence) -> Iterator[Task]:
        """A statement that the sentence makes, or one with another name, date or number of the document in it."""
        text = sentence.text
        plain = text.endswith(self.says.stop) and not re.search(r"[“”「」\"?!:;()？！：；（）]", text)
        if not plain or word_count(text) > _LONGEST_STATEMENT or _PRONOUN.match(text):
            return
        swaps = [
            (detail, other)
            for detail in find_details(text, self.names, self.dull)
            if not re.search(r"\b(?:a|an) $", text[: detail.start], re.IGNORECASE)  # a hundred, not "a 1,907"
            for other in self._others(text, detail)
        ]
        if not swaps:  # a sentence that is always asked for as it stands would teach to say yes
            return
        detail, other = self.draw.choice(swaps)
        true = self.draw.random() < 0.5
        said = text if true else text[: detail.start] + other + text[detail.end :]
        first = re.sub(r"['’]s$", "", said.split()[0])
        if first not in self.names and first != other.split()[0]:
            said = said[0].lower() + said[1:]
        question = self.draw.choice(self.says.whether).format(said.removesuffix(self.says.stop))
        yield self._task(
            "yes or no", sentence, question, self._short(self.says.yes if true else self.says.no, text, both=True)
        )

    def _others(self, text: str, detail: Detail) -> list[str]:
        """Some details of the document of the same kind and length that the sentence does not have."""
        words = text[detail.start : detail.end].split()
        pool = self.details.get((detail.kind, len(words)), [])
        some = self.draw.sample(pool, min(len(pool), 8))
        there = set(WORD.findall(text))
        apart = self.language == "en"  # else a word of the text may be a part of what is found as one
        return [each for each in some if not there & set(WORD.findall(each)) and (apart or each not in text)][:2]

    def _short(self, detail: str, sentence: str, both: bool = False) -> str:
        """The detail alone, or the sentence that holds it, with `both` behind the detail: half of each unless one is wanted."""
        alone = self.draw.random() < 0.5
        if self.answers == "short" or (self.answers != "sentence" and alone):
            return detail.removesuffix(self.says.stop) + self.says.stop
        blank = " " if self.language == "en" else ""
        return f"{detail}{self.says.stop}{blank}{sentence}" if both else sentence

    def _place(self, index: int) -> Iterator[Task]:
        """What follows: the rest of the sentence, or the next one."""
        sentence = self.sentences[index]
        if word_count(sentence.text) >= 8:
            begun, rest = self._in_two(sentence.text)
            question = self.draw.choice(self.says.complete).format(begun)
            yield self._task("complete", sentence, question, rest)
        before = self.sentences[index - 1] if index else None
        if before is not None and before.paragraph == sentence.paragraph:
            end = " ".join(before.text.split()[-24:]) if self.language == "en" else before.text[-48:]
            yield self._task("next", sentence, self.draw.choice(self.says.next).format(end))

    def _in_two(self, text: str) -> tuple[str, str]:
        """Parted near the middle: between words, or, without blanks, where one may pause if there is such a place."""
        words = text.split()
        if self.language == "en":
            cut = self.draw.randint(len(words) * 2 // 5, len(words) * 3 // 5)
            return " ".join(words[:cut]), " ".join(words[cut:])
        low, high = len(text) * 3 // 10, len(text) * 7 // 10
        pauses = [found.end() for found in re.compile(r"[，、；：\s]").finditer(text, low, high)]
        cut = self.draw.choice(pauses) if pauses else self.draw.randint(len(text) * 2 // 5, len(text) * 3 // 5)
        return text[:cut].strip(), text[cut:].strip()

    # --- order --------------------------------------------------------------------------------------------------------

    def _event(self, sentence: Sentence) -> _Event | None:
        """A sentence that can stand for an event: short enough, or its first clause, without its date."""
        years = {int(year) for year in _YEAR_ALONE.findall(sentence.text)}
        text = re.sub(rf"\b(?:[Oo]n|[Ii]n|[Bb]y)(?: the \w+ of)? (?:{DATE.pattern}|{YEAR}),? ?", "", sentence.text)
        text = re.sub(f"(?:在|于)?{CJK_DATE}に?[，、]?", "", text)
        clause = re.split(r"[;:；：]| [—–-] |, (?:and|but|which|who|where|when|as) ", text)[0].strip(
            " .,;:!?。，、！？"
        )
        if not 4 <= word_count(clause) <= 16 or _PRONOUN.match(clause):
            return None
        first = clause.split()[0]
        clause = clause if first in self.names else clause[0].lower() + clause[1:]
        return _Event(sentence, clause, years.pop() if len(years) == 1 else None)

    def order(self) -> list[Task]:
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
        where = "" if by_year else self.says.of_the_text
        if len(distinct) == 2:
            question = self.draw.choice(self.says.first).format(distinct[0].words, distinct[1].words) + where
            return [Task(question, capital(ordered[0].words) + self.says.stop, "first", *evidence)]
        listed = self.says.semicolon.join(event.words for event in distinct)
        question = self.draw.choice(self.says.order).format(n=len(distinct), events=listed) + where
        answer = self.says.semicolon.join(event.words for event in ordered)
        return [Task(question, capital(answer) + self.says.stop, "order", *evidence)]


def _is_askable(sentence: Sentence) -> bool:
    return word_count(sentence.text) >= _SHORTEST  # a number of a chapter, a lone word: not to be asked for


def _allotted(has: Sequence[int], mean: int) -> list[int]:
    """How many tasks each sentence gets, at most `mean` in the mean: all the details that it has, but none more than some number.

    One that has hardly any is asked for twice all the same, unless it has none because it is not to be asked for.
    """
    least = min(mean, _FEWEST)
    wanted, most = mean * sum(count > 0 for count in has), least
    while most < max(has) and sum(min(max(count, least), most + 1) for count in has if count) <= wanted:
        most += 1
    return [min(max(count, least), most) for count in has]


def _bare(answer: str) -> str:
    return _ARTICLE.sub("", answer.lower().rstrip("."))


def _is_english(words: Sequence[str]) -> bool:
    """Other languages with blanks between words are asked in English too, but their sentences cannot be turned round."""
    return sum(word.lower() in FUNCTION_WORDS for word in words) >= _FUNCTION_SHARE * len(words)
