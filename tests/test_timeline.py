"""Orders of events: LooGLE's four deviations, the share of ordered pairs, and what counts as an order in a model's text."""

from __future__ import annotations

from itertools import permutations

import pytest

from liftlm.errors import BenchmarkDataError
from liftlm.evaluation.timeline import (
    coordinate_score,
    location_mean_deviation,
    location_square_deviation,
    parse_events,
    parse_order,
    swap_deviation,
    swap_distance_deviation,
    timeline_scores,
)

# reference 1 2 3 … unless given; with the places of the events in the answer, from 1, worked out by hand
ROWS = [
    # answer, reference, ordered pairs of all pairs, squares, absolute values, n, swaps, distance of the swaps
    ("123", "123", (3, 3), 0, 0, 3, 0, 0),
    ("213", "123", (2, 3), 2, 2, 3, 1, 1),  # places 2 1 3: 1² + 1², one swap over one place
    ("321", "123", (0, 3), 8, 4, 3, 1, 2),  # places 3 2 1: 2² + 0 + 2², one swap over two
    ("231", "123", (1, 3), 6, 4, 3, 2, 2),  # places 3 1 2: 4 + 1 + 1; one cycle of three takes two swaps of one place
    ("312", "123", (1, 3), 6, 4, 3, 2, 2),  # places 2 3 1: the same the other way round
    ("213", "213", (3, 3), 0, 0, 3, 0, 0),  # what counts is the reference, not the numbers
    ("123", "213", (2, 3), 2, 2, 3, 1, 1),
    ("2143", "1234", (4, 6), 4, 4, 4, 2, 2),
    ("4321", "1234", (0, 6), 20, 8, 4, 2, 4),  # 9 + 1 + 1 + 9 = (16 - 1) / 3 · 4; swaps over three places and one
    ("35142", "35142", (10, 10), 0, 0, 5, 0, 0),
    ("35124", "35142", (9, 10), 2, 2, 5, 1, 1),
    ("24135", "12345", (7, 10), 10, 6, 5, 3, 3),  # places 3 1 4 2 5: 4 + 1 + 1 + 4; a cycle of four
    ("A", "A", (1, 1), 0, 0, 1, 0, 0),  # one event: nothing to get wrong
    ("ba", "ab", (0, 1), 2, 2, 2, 1, 1),
]


@pytest.mark.parametrize(("answer", "reference", "pairs", "squares", "absolute", "n", "swaps", "distance"), ROWS)
def test_by_hand(
    answer: str, reference: str, pairs: tuple[int, int], squares: int, absolute: int, n: int, swaps: int, distance: int
) -> None:
    given, wanted = list(answer), list(reference)
    assert coordinate_score(given, wanted) == pytest.approx(pairs[0] / pairs[1])
    assert location_square_deviation(given, wanted) == pytest.approx(squares / n)
    assert location_mean_deviation(given, wanted) == pytest.approx(absolute / n)
    assert swap_deviation(given, wanted) == swaps
    assert swap_distance_deviation(given, wanted) == distance


NO_ORDERS = [
    ([], "123"),
    (list("12"), "123"),  # too short
    (list("1233"), "123"),  # too long
    (list("112"), "123"),  # one twice
    (list("124"), "123"),  # one that is not there
    (list("21321"), "123"),
]


@pytest.mark.parametrize(("answer", "reference"), NO_ORDERS)
def test_no_order_gets_the_worst_of_each(answer: list[str], reference: str) -> None:
    wanted = list(reference)
    assert coordinate_score(answer, wanted) == 0
    assert location_square_deviation(answer, wanted) == pytest.approx(8 / 3)
    assert location_mean_deviation(answer, wanted) == pytest.approx(4 / 3)
    assert swap_deviation(answer, wanted) == 2
    assert swap_distance_deviation(answer, wanted) == 2


# --- against the definitions, taken literally -------------------------------------------------------------------------


def fewest_swaps(places: tuple[int, ...]) -> int:
    """By trying them all, breadth first."""
    seen, front, count = {places}, [places], 0
    while tuple(sorted(places)) not in front:
        count += 1
        following = []
        for one in front:
            for i in range(len(one)):
                for j in range(i):
                    other = list(one)
                    other[i], other[j] = other[j], other[i]
                    if tuple(other) not in seen:
                        seen.add(tuple(other))
                        following.append(tuple(other))
        front = following
    return count


def greedy_distance(places: tuple[int, ...]) -> int:
    """LooGLE's search: always the swap that brings most, for each place that it goes over."""
    now, total = list(places), 0
    while now != sorted(now):
        gains = {
            (i, j): (abs(now[i] - i) + abs(now[j] - j) - abs(now[j] - i) - abs(now[i] - j)) / (j - i)
            for j in range(len(now))
            for i in range(j)
        }
        i, j = max(gains, key=gains.__getitem__)
        now[i], now[j] = now[j], now[i]
        total += j - i
    return total


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_all_orders_and_their_worst(n: int) -> None:
    wanted = [str(number) for number in range(n)]
    worst = {"square": 0.0, "mean": 0.0, "swap": 0, "distance": 0}
    for places in permutations(range(n)):
        given = [str(places.index(place)) for place in range(n)]
        off = [abs(place - index) for index, place in enumerate(places)]
        square, mean = sum(step * step for step in off) / n, sum(off) / n
        swap, distance = fewest_swaps(places), greedy_distance(places)
        assert location_square_deviation(given, wanted) == pytest.approx(square)
        assert location_mean_deviation(given, wanted) == pytest.approx(mean)
        assert swap_deviation(given, wanted) == swap
        assert swap_distance_deviation(given, wanted) == distance
        inversions = sum(places[i] > places[j] for j in range(n) for i in range(j))
        assert coordinate_score(given, wanted) == pytest.approx(1 - inversions / max(1, n * (n - 1) / 2))
        for name, value in zip(worst, (square, mean, swap, distance), strict=True):
            worst[name] = max(worst[name], value)
    assert location_square_deviation([], wanted) == pytest.approx(worst["square"])
    assert location_mean_deviation([], wanted) == pytest.approx(worst["mean"])
    assert swap_deviation([], wanted) == worst["swap"]
    assert swap_distance_deviation([], wanted) == worst["distance"]


# --- reading ----------------------------------------------------------------------------------------------------------

QUESTION = """Reorder the timeline of below events:?
1. the walls were demolished after protests.
2.The first wall was built
  3) a wall, of stone
(4) a wall
"""


def test_events_of_a_question() -> None:
    assert parse_events(QUESTION) == {
        "1": "the walls were demolished after protests.",
        "2": "The first wall was built",
        "3": "a wall, of stone",
        "4": "a wall",
    }
    assert parse_events("Which came first?\nI. One\nII) Two\n- B: Three\nC Four") == {
        "I": "One",
        "II": "Two",
        "B": "Three",
    }
    assert parse_events("no list") == {}


@pytest.mark.parametrize(
    ("text", "labels", "order"),
    [
        ("2,1,3", "1 2 3", "2 1 3"),
        ("  2, 1 and 3.", "1 2 3", "2 1 3"),
        ("The order is 3 -> 1 -> 2 because 1 came before 2.", "1 2 3", "3 1 2"),
        ("3→1→2", "1 2 3", "3 1 2"),
        ("3-1-2", "1 2 3", "3 1 2"),
        ("[3] [1] [2]", "1 2 3", "3 1 2"),
        ("(2), (1), and then (3)", "1 2 3", "2 1 3"),
        ('"2", "3", "1"', "1 2 3", "2 3 1"),
        ("Event 2, Event 3, event 1", "1 2 3", "2 3 1"),
        ("2\n3\n1", "1 2 3", "2 3 1"),
        ("II., I., III.", "I II III", "II I III"),
        ("ii, i, iii", "I II III", "II I III"),
        ("B, C, A", "A B C", "B C A"),
        ("2. the bell\n1. the lake\n3. the end", "1 2 3", "2 1 3"),
        ("**2.** the bell\n- 1. the lake\n3: the end in 1831", "1 2 3", "2 1 3"),
        ("2. in part 1\n1. in part 3\n3. in part 2", "1 2 3", "2 1 3"),  # 1 and 1, 3 and 3 are rows, but not whole ones
        ("First came 2 in 1831, next 1, at last 3 (in 1840).", "1 2 3", "2 1 3"),
        ("In 1831, 2, 1 and 3", "1 2 3", "2 1 3"),  # a year is no label
        ("12, 1, 2", "1 2 12", "12 1 2"),
        ("III, IV, I, II", "I II III IV", "III IV I II"),
        ("2, 1.5 hours", "1 2", ""),
        ("1 took 2.5 hours", "1 2", ""),  # a single label is no order of two
        ("I think A was the first", "A B I", ""),  # words, not labels
        ("2,1,3,2,1,3,2", "1 2 3", "2 1 3 2 1 3 2"),  # for ever: read as it is, and so wrong
        ("2, 1", "1 2 3", "2 1"),
        ("7, 8, 9", "1 2 3", ""),
        ("", "1 2 3", ""),
        ("???", "1 2 3", ""),
        ("二、一、三", "1 2 3", ""),
        ("1", "1", "1"),
    ],
)
def test_orders_of_labels(text: str, labels: str, order: str) -> None:
    assert parse_order(text, labels.split()) == order.split()


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("The first wall was built. A wall of stone; a wall, the walls were demolished after protests", "2 3 4 1"),
        (
            "1. A wall of stone\n2. a wall\n3. The First Wall was built\n4. The walls were demolished after protests",
            "3 4 2 1",
        ),
        ("a wall - a wall, of stone - the first wall was built - the walls were demolished after protests", "4 3 2 1"),
        ("The first wall was built, a wall of stone, the walls were demolished after protests.", ""),  # one is missing
        (
            "4, 3, 2, 1: a wall, of stone; the first wall was built; a wall; the walls were demolished after protests",
            "4 3 2 1",
        ),
        ("a wallet of stones", ""),
    ],
)
def test_orders_of_events(text: str, order: str) -> None:
    """Word for word; an event that is part of another one is looked for beside it; a row of labels comes first."""
    assert parse_order(text, ["1", "2", "3", "4"], parse_events(QUESTION)) == order.split()


def test_events_that_do_not_fit_the_reference_are_left_out() -> None:
    events = {"1": "one thing", "2": "two things"}
    assert parse_order("2. one thing\n1. two things\n3. three", ["1", "2", "3"], events) == ["2", "1", "3"]
    assert parse_order("2. one thing\n1. two things", ["1", "2"], {**events, "3": "more"}) == ["1", "2"]


def test_scores_of_a_text() -> None:
    question = "Reorder:\n1. Guardian reported.\n2. Nunez announced.\n3. A woman lost her thumb."
    right = timeline_scores("2,1,3", question, "2,1,3")
    assert right.pop("coordinate_score") == 1 and set(right.values()) == {0} and len(right) == 4
    told = timeline_scores("Guardian reported. Nunez announced. A woman lost her thumb.", question, " 2, 1, 3 ")
    assert told == pytest.approx(
        {
            "coordinate_score": 2 / 3,
            "location_square_deviation": 2 / 3,
            "location_mean_deviation": 2 / 3,
            "swap_deviation": 1,
            "swap_distance_deviation": 1,
        }
    )
    nothing = timeline_scores("I do not know.", question, "2,1,3")
    assert nothing["coordinate_score"] == 0 and nothing["location_square_deviation"] == pytest.approx(8 / 3)
    assert timeline_scores("III, I, II", "I. a\nII. b\nIII. c", "III,I,II")["coordinate_score"] == 1
    with pytest.raises(BenchmarkDataError, match="is no order of events"):
        timeline_scores("2,1,3", question, " , ")
