"""A user's question in the words that the extractive writer asks in: "What is said about the spare key and Corrin Head?"

What was absorbed is found by questions worded like the tasks (docs/results/questions.md). No text of the document is looked at.
"""

from __future__ import annotations

import itertools

from liftlm.tasks.details import FUNCTION_WORDS, telling_phrases
from liftlm.tasks.scripts import language_of
from liftlm.tasks.wordings import wordings_for

_MOST_PHRASES = 4  # of a question
_CAPITAL = 6  # as good as so many letters
_ASKING = frozenset(
    "according answer article book describe document explain list mentioned name passage story tell text".split()  # noqa: SIM905
)
_DULL = FUNCTION_WORDS | _ASKING


def reworded(question: str, most: int) -> list[str]:
    """At most so many other questions for what the question names: for three phrases of it, for two, for one, in this order.

    Names and long phrases first. Empty where it names nothing ("Why did she do it?").
    """
    language = language_of(question)
    phrases = telling_phrases(question, language, _DULL)
    first = question.lstrip()[:1]
    phrases.sort(key=lambda phrase: -_says(phrase, question.lstrip().startswith(phrase) and first.isupper()))
    phrases = phrases[:_MOST_PHRASES]
    templates = wordings_for(language).about
    turns = {places: itertools.cycle([t for t in templates if t.count("{") == places]) for places in (1, 2, 3)}
    chosen = [phrases[:3]] * (len(phrases) > 2)  # of a question with many, one for all would say too little of each
    chosen += [list(pair) for pair in itertools.combinations(phrases, 2)] + [[phrase] for phrase in phrases]
    found: dict[str, None] = {}
    for _ in templates:
        for some in chosen:
            found[next(turns[len(some)]).format(*some)] = None
    return [wording for wording in found if wording != question][:most]


def _says(phrase: str, begins: bool) -> int:
    """Letters, and capitals but for that of the question's beginning."""
    return len(phrase) + _CAPITAL * (sum(map(str.isupper, phrase)) - begins)
