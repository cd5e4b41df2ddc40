"""Who does what: every job once, those of dead workers again, poisoned ones not for ever, and no more in memory than workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liftlm.errors import ClusterError, EmptyDocumentError, LibraryBusyError
from liftlm.worklist import Crew, CrewOfOne, Event, Job, Outcome, Tell, outcome_of, work_off

GOOD = Outcome(result="done")
WORSE = Outcome(error="not now", again=True)
POISON = Outcome(error="never", again=False)


class FakeCrew:
    """`behave(name, try)` says what becomes of a job: an outcome, or None where its worker dies of it."""

    def __init__(self, workers: int, behave: Callable[[str, int], Outcome | None]) -> None:
        self._behave, self._events = behave, [Event("ready", number) for number in range(workers)]
        self.begun: list[str] = []
        self.most_at_once = 0

    def begin(self, worker: int, payload: str, name: str) -> None:
        assert payload == f"text of {name}"
        self.begun.append(name)
        outcome = self._behave(name, self.begun.count(name))
        if outcome is None:
            self._events += [Event("died", worker, reason="killed"), Event("ready", worker)]
        else:
            self._events.append(Event("done", worker, outcome))
        self.most_at_once = max(self.most_at_once, len({event.worker for event in self._events}))

    def wait(self) -> list[Event]:
        return [self._events.pop(0)]


def jobs(names: str) -> list[Job]:
    return [Job(name, name, lambda name=name: f"text of {name}") for name in names]  # type: ignore[misc]


def run(crew: Crew, names: str, tries: int = 3) -> tuple[dict[str, Outcome], object]:
    ended: dict[str, Outcome] = {}

    def end(job: Job, outcome: Outcome) -> None:
        assert job.key not in ended
        ended[job.key] = outcome

    return ended, work_off(crew, jobs(names), tries, end)


def test_a_dead_workers_job_goes_to_the_next_that_is_free() -> None:
    crew = FakeCrew(2, lambda name, tried: None if (name, tried) == ("b", 1) else GOOD)
    ended, tally = run(crew, "abcdef")
    assert set(ended) == set("abcdef") and ended["b"].tries == 2 and ended["a"].tries == 1
    assert crew.begun.index("b", crew.begun.index("b") + 1) < crew.begun.index("e")  # before what has not begun
    assert (tally.done, tally.failed, tally.deaths) == (6, 0, 1)  # type: ignore[attr-defined]


def test_poisoned_jobs_are_told_and_block_nothing() -> None:
    outcomes = {"p": POISON, "k": None, "w": WORSE}
    crew = FakeCrew(1, lambda name, tried: outcomes.get(name, GOOD))
    ended, tally = run(crew, "kpwabc")
    assert {name for name in ended if not ended[name].error} == set("abc")
    assert {name: ended[name].tries for name in "kpw"} == {"k": 3, "p": 1, "w": 3}
    assert ended["k"].error == "Its worker died (killed)."
    assert crew.begun.index("c") < max(index for index, name in enumerate(crew.begun) if name == "k")
    assert tally.failures[0] == "p: never" and "k (3 tries)" in " ".join(tally.failures)  # type: ignore[attr-defined]


def test_no_job_is_taken_before_a_worker_is_free() -> None:
    taken = 0

    def many() -> Iterator[Job]:
        nonlocal taken
        for index in range(100_000):
            taken += 1
            yield Job(str(index), str(index), lambda index=index: f"text of {index}")  # type: ignore[misc]

    class Stopping(FakeCrew):
        def wait(self) -> list[Event]:
            if len(self.begun) == 50:
                raise ClusterError("all gone")
            return super().wait()

    with pytest.raises(ClusterError):
        work_off(Stopping(4, lambda name, tried: GOOD), many(), 3)
    assert taken <= 55


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.lists(st.lists(st.sampled_from(["good", "worse", "poison", "dies"]), min_size=1, max_size=5), max_size=20),
)
def test_every_job_ends_once_and_is_tried_as_often_as_it_may(workers: int, tries: int, fates: list[list[str]]) -> None:
    kinds = {"good": GOOD, "worse": WORSE, "poison": POISON, "dies": None}
    fate = {chr(97 + index): row for index, row in enumerate(fates)}

    def behave(name: str, tried: int) -> Outcome | None:
        row = fate[name]
        return kinds[row[min(tried, len(row)) - 1]]

    crew = FakeCrew(workers, behave)
    ended, tally = run(crew, "".join(fate), tries)
    assert set(ended) == set(fate)
    for name, row in fate.items():
        padded = [row[min(index, len(row) - 1)] for index in range(tries)]
        last = next((index for index, kind in enumerate(padded) if kind in ("good", "poison")), tries - 1)
        assert Counter(crew.begun)[name] == ended[name].tries == last + 1
        assert bool(ended[name].error) == (padded[last] != "good")
    assert tally.done + tally.failed == len(fate)  # type: ignore[attr-defined]


def test_what_may_pass_is_tried_again() -> None:
    assert outcome_of(LibraryBusyError("busy")).again and outcome_of(ValueError("odd")).again
    found = outcome_of(EmptyDocumentError("empty", "Give text."))
    assert (found.again, found.error, found.next_step) == (False, "empty", "Give text.")
    assert outcome_of(ValueError("odd")).error == "ValueError: odd"


def test_this_process_is_a_crew_too() -> None:
    class Upper:
        def describe(self) -> str:
            return "upper"

        def work(self, payload: str, tell: Tell) -> Outcome:
            tell({"step": 1})
            return Outcome(payload.upper())

    told: list[dict[str, object]] = []
    crew = CrewOfOne(Upper(), told.append)
    ended, _ = run(crew, "ab")
    assert {name: outcome.result for name, outcome in ended.items()} == {"a": "TEXT OF A", "b": "TEXT OF B"}
    assert told == [{"worker": 0, "name": name, "step": 1} for name in "ab"] and crew.describe() == "upper"
