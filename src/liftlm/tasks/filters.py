"""Which written tasks are worth training on, and what a set of tasks looks like in numbers. Pure: tasks and text in, tasks out.

For tasks that a language model wrote, whichever writer asked it; the extractive writer needs none of this. It compares words with
words and does not know what they mean, so it leans towards keeping a task whose answer is at least said where it should be.
Function words are English; of other languages all words count, and of scripts without blanks every character.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from liftlm.tasks.scripts import HANGUL, UNSPACED
from liftlm.tasks.sentences import Sentence
from liftlm.tasks.task import Task

_LONGEST_QUESTION = 120  # words; putting six events in order takes about a hundred
_LONGEST_ANSWER = 150  # words; the longest sentence has 60
_NAMES_FROM = (
    2048  # characters before the evidence in which the name behind its "she" may stand; what writers are shown
)
_POINTS = 2048  # characters; longer evidence than this points to no sentence in particular

_UNSPACED = UNSPACED + HANGUL
_WORD = re.compile(rf"[{_UNSPACED}]|\d+(?:[.,:]\d+)*|(?:(?![{_UNSPACED}\d])\w)+")


def _list(text: str) -> list[str]:
    return re.findall(r"\w+", text)


_FUNCTION_WORDS = frozenset(
    _list(
        """a about all also an and any are as at be because been being but by can could did do does doing for from had
        has have having he her hers herself him himself his how i if in into is it its itself just me might my no nor
        not of on or our ours s so some such t st nd rd th than that the their theirs them themselves then there these
        they this those though to too upon us very was we were what when where which while who whom whose why will
        with would yes you your yours"""
    )
)
_PRONOUNS = frozenset(_list("he her hers herself him himself his it its itself she their them themselves they"))
_TEENS = _list("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
_VALUES = (
    {word: value for value, word in enumerate([*_list("zero one two three four five six seven eight nine"), *_TEENS])}
    | {word: 10 * tens for tens, word in enumerate(_list("twenty thirty forty fifty sixty seventy eighty ninety"), 2)}
    | {word: value for value, word in enumerate(_list("first second third fourth fifth sixth seventh eighth ninth"), 1)}
)
_ENDINGS = ("ations", "ation", "ings", "ing", "ied", "ies", "ers", "ed", "er", "es", "ly", "s", "e", "y")

_LEFTOVERS = re.compile(
    r"```|\{\s*\"|\"\s*[:}\]]|[{\[]\s*'\w+'\s*:|</?(?:think|answer|question|s)>|<\|\w+\|>|\[/?INST\]"
    r"|(?:^|\n)\W*(?:question|answer|q|a)\s*\d*\W{0,3}:",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(r"\W*(?:string|(?:(?:the|your) )?(?:question|answer)|insert .*)\W*", re.IGNORECASE)
_CHOICE = re.compile(
    r"\bor\b|\bin (?:what|which|the)(?: \w+)? order\b|^\W*(?:sort|arrange|rank|put|place|list|order)\b", re.IGNORECASE
)

_TEXT = (
    r"(?:the |this |that |above |given |provided )*"
    r"(?:text|passage|sentences?|document|context|excerpt|paragraph|article|story|author|question)"
)
_TELL = (
    r"(?:(?:mention|specif|stat|provid|indicat|describ|explain|contain|includ|answer|reveal|clarif|disclos)\w*"
    r"|note|notes|noted|say|says|said|tell|tells|told|give|gives|given|show|shown|written|known)"
)
_NOTHING = re.compile(
    "|".join(
        (
            rf"(?:just |exactly )?(?:as|like) {_TEXT} {_TELL}\b.*",
            rf"(?:just |exactly )?(?:as|like) (?:it is |is |was )?(?:{_TELL}|above)"
            rf"(?: above| here| earlier| (?:in|by) {_TEXT}.*)?",
            rf"(?:no,? )?{_TEXT} (?:itself )?(?:(?:does|do|did|is|was) not|(?:does|do|did|is|was)n't) (?:\w+ly )?{_TELL}\b.*",
            rf"(?:(?:it|this|that|the answer|the information) )?(?:(?:is|was|are|were) )?(?:not|never) (?:\w+ly )?"
            rf"(?:{_TELL}|clear|available|applicable|answerable)(?: here| above| (?:by|in|from) {_TEXT}.*)?",
            r"(?:i|we|you) (?:do not|don't|cannot|can't|could not|am not) (?:know|tell|say|answer|determine|find|sure|able)\b.*",
            r"i'm (?:not sure|sorry|unable)\b.*|sorry\b.*|as an ai\b.*",
            r"(?:(?:it|this|that|the answer) )?(?:cannot|can't|could not) be (?:determined|answered|said|known|inferred|found).*",
            r"(?:there is )?(?:no|not enough|insufficient|too little) (?:information|mention|details?|answer|data|context)\b.*",
            rf"(?:please )?(?:see|refer to|read) (?:above|below|{_TEXT}).*|(?:the )?same as (?:above|before)",
            rf"(?:the answer is |it is )?(?:(?:given|found|stated|mentioned) )?(?:in|from) {_TEXT}",
            rf"{_TEXT} {_TELL}(?: so| it| this| that)?",
            r"unknown|n ?/?a|none given|unspecified|not sure|no idea|unclear|undisclosed",
        )
    )
)


@dataclass(frozen=True)
class TaskStatistics:
    """What a set of tasks looks like. covered: share of the sentences that some task's evidence touches."""

    tasks: int
    by_kind: Mapping[str, int]  # the most frequent kind first
    distinct_questions: int
    sentences: int
    covered: float
    question_words: float  # mean
    answer_words: float  # mean


def filter_tasks(
    tasks: Iterable[Task], text: str, asked: set[object] | None = None
) -> tuple[list[Task], dict[str, int]]:
    """The tasks worth keeping, in their order, and how many were dropped for which reason.

    Each is dropped for the first reason that holds; what repeats a dropped task is no duplicate. asked: marks of the tasks
    that earlier calls kept, of which none is to be repeated; those of this call are added.
    """
    kept: list[Task] = []
    dropped: Counter[str] = Counter()
    asked = set() if asked is None else asked
    for task in tasks:
        reason = _objection(task, text)
        marks = _marks(task) if reason is None else ()
        if reason is None and any(mark in asked for mark in marks):
            reason = "duplicate"
        if reason is not None:
            dropped[reason] += 1
            continue
        asked.update(marks)
        kept.append(task)
    return kept, dict(dropped)


def task_statistics(tasks: Sequence[Task], sentences: Sequence[Sentence]) -> TaskStatistics:
    """Counts and means; all zero for no tasks."""
    spans = sorted({(task.start, task.end) for task in tasks if task.end - task.start <= _POINTS})
    covered, position = 0, 0
    for sentence in sorted(sentences, key=lambda sentence: sentence.start):
        while position < len(spans) and spans[position][0] < sentence.start - _POINTS:
            position += 1  # ends before every sentence still to come
        near = position
        while near < len(spans) and spans[near][0] < sentence.end:
            if spans[near][1] > sentence.start:
                covered += 1
                break
            near += 1
    return TaskStatistics(
        tasks=len(tasks),
        by_kind=dict(Counter(task.kind for task in tasks).most_common()),
        distinct_questions=len({_plain(task.question) for task in tasks}),
        sentences=len(sentences),
        covered=covered / max(1, len(sentences)),
        question_words=sum(len(words(task.question)) for task in tasks) / max(1, len(tasks)),
        answer_words=sum(len(words(task.answer)) for task in tasks) / max(1, len(tasks)),
    )


def words(text: str) -> list[str]:
    """The words of a text in lower case, without marks; a character each where a script has no blanks."""
    return _WORD.findall(_normal(text))


# --- the reasons ------------------------------------------------------------------------------------------------------


def _objection(task: Task, text: str) -> str | None:
    """Why a task is not worth keeping, looked at alone."""
    if _is_malformed(task.question, task.answer):
        return "malformed"
    evidence = text[task.start : task.end]
    if _says_nothing(task.answer, evidence):
        return "says nothing"
    if _gives_away(task.question, task.answer):
        return "gives its answer away"
    if not _is_supported(task, evidence, text[max(0, task.start - _NAMES_FROM) : task.start]):
        return "unanswerable"
    return None


def _is_malformed(question: str, answer: str) -> bool:
    asked, answered = words(question), words(answer)
    if len(asked) < 3 or not answered or not re.search(r"[^\W\d_]", question):
        return True
    if len(asked) > _LONGEST_QUESTION or len(answered) > _LONGEST_ANSWER or max(len(question), len(answer)) > 2000:
        return True
    if any(len(some) >= 12 and len(set(some)) < len(some) / 3 for some in (asked, answered)):
        return True  # a model that repeats itself without end
    return any(_LEFTOVERS.search(part) or _PLACEHOLDER.fullmatch(part) for part in (question, answer))


def _says_nothing(answer: str, evidence: str) -> bool:
    """Whether an answer only speaks of the text; "not known" is an answer where the document says just that."""
    plain = _normal(answer).strip(" .,;:!?…\"'()")
    said = re.sub(r"^(?:it|this|that|the answer) (?:is|was) ", "", plain)
    return _NOTHING.fullmatch(plain) is not None and said not in _normal(evidence)


def _gives_away(question: str, answer: str) -> bool:
    """Whether the question holds the whole answer. One that offers a choice, or asks yes or no, must, and tells nothing by it."""
    told = _content(answer)
    return (
        bool(told)
        and words(answer)[0] not in ("yes", "no")
        and not _CHOICE.search(question)
        and set(told) <= set(_with_values(question))
    )


def _is_supported(task: Task, evidence: str, before: str) -> bool:
    """Whether the answer's content stands in the evidence: all of it up to three words, three quarters of a longer one.

    Numbers (but one) must stand there whatever the length; 41 and "forty-one" are the same. Words of the question may be
    repeated, but something must come from the evidence. Where that says "she", the name may stand before it, if the question
    speaks of the same as the evidence.
    """
    told = _content(task.answer)
    if not told:  # "Yes.", "No.", or function words alone
        answer, own = words(task.answer), set(words(evidence))
        return answer[0] in ("yes", "no") or all(word in own for word in answer)
    own, asked = set(_with_values(evidence)), set(_with_values(task.question))
    if _PRONOUNS & set(words(evidence)) and (asked - _FUNCTION_WORDS) & own:
        own |= _names(before) & _names(task.answer)
    missing = [stem for stem in told if stem not in own and stem not in asked]
    if any(stem[0].isdigit() and stem != "1" for stem in missing) or not own.intersection(told):
        return False
    return len(missing) <= len(told) // 4


# --- words ------------------------------------------------------------------------------------------------------------


def _content(text: str) -> list[str]:
    """Stems of the words that are no function words; number words as digits."""
    return [stem for stem in _with_values(text) if stem not in _FUNCTION_WORDS]


def _names(text: str) -> set[str]:
    """Stems of the words with a capital, wherever they stand."""
    return {_stem(word.casefold()) for word in _WORD.findall(unicodedata.normalize("NFKC", text)) if word[0].isupper()}


def _with_values(text: str) -> list[str]:
    """Stems in order, with "forty-one" as "41" and "1,200" as "1200"."""
    found: list[str] = []
    tens = 0
    for word in words(text):
        value = _VALUES.get(word)
        if tens and value is not None and 0 < value < 10:
            found[-1] = str(tens + value)
        elif value is not None:
            found.append(str(value))
        elif word[0].isdigit():
            found.append(re.sub(r",(?=\d{3}\b)", "", word))
        else:
            found.append(word if word in _FUNCTION_WORDS else _stem(word))
        tens = value if value is not None and value >= 20 else 0
    return found


def _stem(word: str) -> str:
    """A word without its inflection, roughly: "carried" → "carr", "carries" → "carr"; both sides are cut alike."""
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word  # "stopp(ed)"


def _marks(task: Task) -> tuple[object, object]:
    """What no two kept tasks share: question and evidence; the question's words in any order, and the answer."""
    return (
        (_plain(task.question), task.start, task.end),
        (frozenset(words(task.question)), _plain(task.answer)),
    )


def _plain(text: str) -> str:
    return " ".join(words(text))


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("’", "'").split())
