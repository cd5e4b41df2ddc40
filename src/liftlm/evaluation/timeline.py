"""How well an answer puts events in order: LooGLE's four deviations and the LIFT authors' share of ordered pairs.

An order is a list of labels ("2", "1", "3"), the earliest event first. Pure: texts and lists in, numbers out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations

from liftlm.errors import BenchmarkDataError

Order = Sequence[str]

_LINE = re.compile(r"^[ \t]*[-•*(\[]*[ \t]*(\d+|[IVXLC]+|[A-Z])[.):\]]+[* \t]*([^\s*][^\n]*)$", re.MULTILINE)
_BETWEEN = r"(?:\.?\s*[,;<=>→|/–—-]+\s*|\.?\s*\n\s*|\s+)(?:(?:and|then)\s+){0,2}"  # two labels of one list

# --- scores -----------------------------------------------------------------------------------------------------------


def coordinate_score(answer: Order, reference: Order) -> float:
    """Share of all pairs of events that the answer puts in the right order; 0 unless it names each event once.

    The rule of the LIFT authors' "coordinate score", whose code is not public: wrong length = 0. An order of one is 1.
    """
    places = _places(answer, reference)
    if places is None:
        return 0.0
    pairs = list(combinations(places, 2))
    return sum(first < second for first, second in pairs) / len(pairs) if pairs else 1.0


def location_square_deviation(answer: Order, reference: Order) -> float:
    """LSD: mean square of how many places each event is off. 0 is right, (n² - 1) / 3 reversed."""
    return sum(off**2 for off in _distances(answer, reference)) / len(reference)


def location_mean_deviation(answer: Order, reference: Order) -> float:
    """LMD: mean of how many places each event is off. 0 is right, ⌊n² / 2⌋ / n the most."""
    return sum(_distances(answer, reference)) / len(reference)


def swap_deviation(answer: Order, reference: Order) -> float:
    """SD: the fewest swaps of any two events that make it right: n minus the cycles of the permutation. At most n - 1."""
    places = _places(answer, reference)
    if places is None:
        return float(len(reference) - 1)
    cycles, left = 0, set(places)
    while left:
        cycles += 1
        place = next(iter(left))
        while place in left:
            left.remove(place)
            place = places[place]
    return float(len(places) - cycles)


def swap_distance_deviation(answer: Order, reference: Order) -> float:
    """SDD: the sum of the distances over which LooGLE's greedy search swaps events until they are right.

    Half the sum of all displacements. For let i be the last event that stands too early (its place p(i) > i). Every later
    one stands at its place or too late, so one of those at i+1 … p(i), say j, belongs at i or before; swapping i and j
    brings both nearer by the whole j - i. While anything is wrong there is thus a swap that gains 2 (j - i) at the cost of
    j - i, which is the most a swap can gain, and the greedy search takes no other. At most ⌊n² / 4⌋.
    """
    return sum(_distances(answer, reference)) / 2


def timeline_scores(answer: str, question: str, reference: str) -> dict[str, float]:
    """All five for a model's text, with the events as the question lists them and a reference such as "2,1,3".

    An answer that is no order of these events gets the worst value of each. LooGLE's script means the same, but its
    condition is the wrong way round: as published, it replaces the deviation of every *readable* answer by the maximum.
    Raises BenchmarkDataError where the reference is empty.
    """
    wanted = re.findall(r"\w+", reference)
    if not wanted:
        raise BenchmarkDataError(f"The reference {reference[:40]!r} is no order of events.", "Check the data.")
    given = parse_order(answer, wanted, parse_events(question))
    return {
        "coordinate_score": coordinate_score(given, wanted),
        "location_square_deviation": location_square_deviation(given, wanted),
        "location_mean_deviation": location_mean_deviation(given, wanted),
        "swap_deviation": swap_deviation(given, wanted),
        "swap_distance_deviation": swap_distance_deviation(given, wanted),
    }


def _places(answer: Order, reference: Order) -> list[int] | None:
    """For each event of the reference its place in the answer, from 0; None if the answer is no order of these events."""
    if sorted(answer) != sorted(reference) or len(set(reference)) < len(reference):
        return None
    return [list(answer).index(label) for label in reference]


def _distances(answer: Order, reference: Order) -> list[int]:
    """How many places each event is off; those of the reversed order where the answer is no order."""
    places = _places(answer, reference)
    if places is None:
        places = list(range(len(reference)))[::-1]  # the maximum of LSD, LMD and SDD
    return [abs(place - index) for index, place in enumerate(places)]


# --- reading ----------------------------------------------------------------------------------------------------------


def parse_events(question: str) -> dict[str, str]:
    """Label → event of a question that lists them, one a line: "1. …", "II) …", "(A) …"."""
    events: dict[str, str] = {}
    for label, event in _LINE.findall(question):
        events.setdefault(label, event.strip())
    return events


def parse_order(text: str, labels: Sequence[str], events: Mapping[str, str] | None = None) -> list[str]:
    """The order that a model's text gives, as labels; [] where none can be read.

    Read in four ways, of which the first that names each label once counts, else the first that names two or more:

    1. Labels in a row, with only commas, arrows, dashes, blanks, "and", "then" or "event" between them, in brackets or
       not: the longest row. Labels may be in either case.
    2. All the `events` word for word (case, punctuation and numbering aside), in the order of the text. Models number
       lines anew, so what a line says comes before the number that it bears.
    3. Labels that begin lines, as in "2. …".
    4. Numbers among the labels, wherever they stand. (Letters and Roman numbers are words too: "I", "A".)

    A label named twice stays twice, so that a model that goes on for ever gives no order.
    """
    told = {label: events[label] for label in labels} if events and set(labels) <= set(events) else {}
    ways = [_row(text, labels), _event_order(text, told), _line_starts(text, labels), _numbers(text, labels)]
    readable = [found for found in ways if len(found) >= min(2, len(labels))]
    whole = [found for found in readable if sorted(found) == sorted(labels)]
    return next(iter(whole or readable), [])


def _row(text: str, labels: Sequence[str]) -> list[str]:
    """The longest row of labels, the first of several."""
    known = {label.lower(): label for label in labels}
    either = "|".join(sorted(map(re.escape, known), key=len, reverse=True))
    word = r"(?:(?:event|item|option|step|number)\s+|#)?"
    label = rf"[(\[<\"'*]*{word}(?<![\w.])(?:{either})(?!\w|\.\d)[)\]>\"'*]*"
    rows = [row.group() for row in re.finditer(rf"{label}(?:{_BETWEEN}{label})+", text, re.IGNORECASE)]
    found = [re.findall(rf"(?<!\w)(?:{either})(?!\w)", row, re.IGNORECASE) for row in rows]
    return [known[name.lower()] for name in max(found, key=len, default=[])]


def _line_starts(text: str, labels: Sequence[str]) -> list[str]:
    return [label for label, _ in _LINE.findall(text) if label in labels]


def _numbers(text: str, labels: Sequence[str]) -> list[str]:
    return [number for number in re.findall(r"(?<![\w.,-])\d+(?!\w|[.,]\d)", text) if number in labels]


def _event_order(text: str, events: Mapping[str, str]) -> list[str]:
    """The labels of the events in the order in which the text has them; [] unless it has them all."""
    rest = _plain(text)
    places: dict[str, int] = {}
    for label in sorted(events, key=lambda label: -len(_plain(events[label]))):  # one may be part of another
        event = _plain(events[label])
        place = rest.find(event)
        if place < 0 or not event.strip():
            return []
        places[label] = place
        rest = rest[:place] + " " + "\0" * (len(event) - 2) + " " + rest[place + len(event) :]
    return sorted(places, key=places.__getitem__)


def _plain(text: str) -> str:
    """Words in lower case with one blank before, between and after them."""
    words = re.findall(r"[^\W_]+", text.casefold())
    return f" {' '.join(words)} "
