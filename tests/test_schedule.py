"""Steps while tasks are still being written: what is taken, when it waits, and that a resumed run goes on alike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liftlm.config import LiftConfig, load_config
from liftlm.errors import ConfigError, WriterUnreachableError
from liftlm.examples import NO_LOSS, Example, draw_segments, plan_steps, plan_training
from liftlm.schedule import Schedule, Step

BATCH = 20


def config(*more: str) -> LiftConfig:
    return load_config(None, ["training.epochs=1", f"training.batch_tokens={BATCH}", *more])


def segment(length: int) -> Example:
    return Example((7,) * length, (7,) * length)


def task(length: int, shared: int = 0) -> Example:
    return Example((7,) * length, (*[NO_LOSS] * (length - 1), 7), group="tasks", shared=shared)


class Feed:
    """Lists of examples that arrive when the script says so: True = the next list is there at this poll.

    A poll that waits always gets the next list. The end shows only at a further poll, as with a real writer.
    """

    def __init__(
        self, lists: Sequence[list[Example]], script: Sequence[bool] = (), expected: int | None = None
    ) -> None:
        self._lists, self._script = list(lists), list(script)
        self.expected = sum(map(len, lists)) if expected is None else expected
        self.finished = False
        self.polls: list[tuple[bool, list[Example], bool]] = []  # waited, given, finished after it

    def poll(self, wait: bool) -> list[Example]:
        there = wait or not self._script or self._script.pop(0)
        given: list[Example] = []
        if there and self._lists:
            given = self._lists.pop(0)
        elif there:
            self.finished = True
        self.polls.append((wait, given, self.finished))
        return given


def run(schedule: Schedule) -> list[Step]:
    steps = []
    while (step := schedule.next()) is not None:
        steps.append((step[0], list(step[1])))
    return steps


def filled(tasks: Sequence[Example], first: int) -> list[list[int]]:
    """Tasks in their order, a new step where the next does not fit; what they share counts once a step."""
    steps: list[list[int]] = []
    room = 0
    for number, example in enumerate(tasks, first):
        fresh = len(example) - example.shared
        if steps and fresh <= room:
            steps[-1].append(number)
        else:
            steps.append([number])
            room = BATCH - example.shared
        room -= fresh
    return steps


# --- without tasks to wait for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["tasks.mix=0.5"], ["tasks.mix=1"], ["tasks.mix=0"], ["tasks.first_epoch=1"]])
def test_without_a_feed_all_is_planned(more: list[str]) -> None:
    examples = [*(segment(n) for n in (15, 9, 12, 4)), *(task(n) for n in (5, 8, 6, 7, 3, 9))]
    settings = config("training.epochs=3", *more)
    schedule, plan = Schedule(examples, settings), plan_training(examples, settings)
    assert schedule.steps == len(plan)
    assert schedule.tokens == sum(len(examples[index]) for _, step in plan for index in step)
    assert run(schedule) == plan == schedule.taken
    assert schedule.steps == len(plan)


# --- tasks that arrive, by hand ---------------------------------------------------------------------------------------

SEGMENTS = [segment(20), segment(20), segment(20)]
FIVES = [[task(10), task(10)] for _ in range(5)]  # each list fills a step


def test_segments_fill_the_waiting() -> None:
    order = [step for _, step in plan_training(SEGMENTS, config())]
    # the first list is there at once; a step is known to be full when the next task has come
    script = [True, False, True, False, False, True, True]
    feed = Feed(FIVES, script)
    assert run(Schedule(SEGMENTS, config(), feed)) == [
        (0, order[0]),  # one list is there, no second one
        (0, [3, 4]),  # and now it is
        (0, order[1]),
        (0, order[2]),
        (0, [5, 6]),  # from here on it waits, as there is nothing else to do
        (0, [7, 8]),
        (0, [9, 10]),
        (0, [11, 12]),
    ]
    assert [waited for waited, _, _ in feed.polls].index(True) == 5


def test_a_full_step_of_tasks_goes_before_segments_and_without_a_poll() -> None:
    feed = Feed([[*FIVES[0], *FIVES[1], *FIVES[2]]], [True, False, False, False])
    schedule = Schedule(SEGMENTS, config(), feed)
    assert [schedule.next(), schedule.next()] == [(0, [3, 4]), (0, [5, 6])]
    assert len(feed.polls) == 1
    assert schedule.next() == (0, plan_training(SEGMENTS, config())[0][1]), "the last two may not be all of a step"


def test_tasks_alone_take_no_segments() -> None:
    feed = Feed(FIVES, [False] * 3)
    schedule = Schedule(SEGMENTS, config("tasks.mix=1", "training.epochs=2"), feed)
    steps = run(schedule)
    assert steps[:5] == [(0, [n, n + 1]) for n in range(3, 13, 2)]
    assert {epoch for epoch, _ in steps[5:]} == {1}
    assert sorted(index for _, step in steps[5:] for index in step) == list(range(3, 13))


def test_where_no_task_comes_segments_are_learnt_all_the_same() -> None:
    """Regression: with tasks.mix=1 there was no step at all, and no epoch to report."""
    for more in (["tasks.mix=1"], ["tasks.mix=0.5"], []):
        settings = config("training.epochs=2", *more)
        plan = plan_training(SEGMENTS, settings)
        steps = run(Schedule(SEGMENTS, settings, Feed([])))
        assert steps == plan and {epoch for epoch, _ in plan} == {0, 1}
        for count in range(len(plan)):
            assert run(Schedule(SEGMENTS, settings, Feed([]), plan[:count])) == plan[count:]


def test_epochs_of_segments_come_first_and_tasks_gather_meanwhile() -> None:
    """Regression: the writer was asked for nothing, and stopped when it was too far ahead."""
    settings = config("training.epochs=4", "tasks.first_epoch=2")
    feed = Feed(FIVES, [True, False, True, True, False])
    schedule = Schedule(SEGMENTS, settings, feed)
    begun = [schedule.next() for _ in range(6)]
    assert begun == [step for step in plan_training(SEGMENTS, settings) if step[0] < 2]
    assert not any(waited for waited, _, _ in feed.polls) and sum(len(given) for _, given, _ in feed.polls) >= 6
    rest = run(schedule)
    assert rest[:2] == [(2, [3, 4]), (2, [5, 6])] and [epoch for epoch, _ in rest] == sorted(e for e, _ in rest)
    assert rest[-1][0] == 3


def test_what_the_writer_raises_is_raised_and_nothing_is_lost() -> None:
    class Dying(Feed):
        def poll(self, wait: bool) -> list[Example]:
            if not self._lists:
                raise WriterUnreachableError("gone", "start it")
            return super().poll(wait)

    schedule = Schedule(SEGMENTS, config(), Dying(FIVES[:2]))
    assert schedule.next() == (0, [3, 4])
    for _ in range(2):
        with pytest.raises(WriterUnreachableError, match="gone"):
            schedule.next()
    assert schedule.taken == [(0, [3, 4])]
    # a second run, with the server up again
    again = Schedule(SEGMENTS, config(), Feed(FIVES, [False] * 20), schedule.taken)
    run(again)
    assert [step for _, step in again.taken if step[0] > 2] == [[n, n + 1] for n in range(3, 13, 2)]


# --- estimates --------------------------------------------------------------------------------------------------------


def test_estimates_by_hand() -> None:
    """One epoch of segments, one with tasks, one after it; ten tasks are expected, of 100 tokens as long as none is known."""
    settings = config("training.epochs=3", "tasks.first_epoch=1")
    lists = [[task(14, shared=4), task(12, shared=4), task(14, shared=4)], [task(14, shared=4)] * 5]
    feed = Feed(lists, [True, False, False, False], expected=10)
    schedule = Schedule(SEGMENTS, settings, feed)
    # six steps of segments are certain, then ten tasks twice and the segments once more
    assert (schedule.tokens, schedule.steps) == (120 + 2 * 1000 + 60, 6 + (2 * 1000 + 60) // BATCH)
    for _ in range(3):
        schedule.next()
    assert (schedule.tokens, schedule.steps) == (120 + 2 * 1000 + 60, 6 + (2 * 1000 + 60) // BATCH)
    assert schedule.next() == (1, [3])  # 4 + 10 + 8 tokens are more than 20: the step has one task
    # that task of 14 tokens, of which 10 count in a step, stands for the nine to come and the ten of the last epoch
    assert (schedule.tokens, schedule.steps) == (134 + 19 * 14 + 60, 7 + round((19 * 10 + 60) / BATCH))
    run(schedule)
    assert schedule.tokens == 180 + 2 * (40 + 70) and schedule.steps == len(schedule.taken)


@pytest.mark.parametrize(("mix", "beside"), [("0.25", 3 * 1000), ("1", 0)])
def test_estimates_follow_the_mix(mix: str, beside: int) -> None:
    schedule = Schedule(SEGMENTS, config("training.epochs=2", f"tasks.mix={mix}"), Feed(FIVES, expected=10))
    assert schedule.tokens == 2 * (1000 + beside), "in the epoch of their arrival and in the one after it"


def test_a_run_longer_than_expected_still_has_steps_left() -> None:
    """The learning rate is that of a part of the run below 1."""
    feed = Feed(FIVES * 4, [False] * 9, expected=3)
    schedule = Schedule([], config("training.epochs=2"), feed)
    while schedule.next() is not None:
        assert schedule.steps >= len(schedule.taken)


# --- whatever the timing ----------------------------------------------------------------------------------------------


@dataclass
class Case:
    segments: list[Example]
    lists: list[list[Example]]
    settings: LiftConfig
    script: list[bool]
    other: int  # a seed for another timing
    tasks: list[Example] = field(init=False)

    def __post_init__(self) -> None:
        self.tasks = [example for some in self.lists for example in some]

    @property
    def arrival(self) -> int:
        return self.settings.tasks.first_epoch


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = st.integers(1, 26)  # some longer than a step
    segments = [segment(n) for n in draw(st.lists(lengths, min_size=1, max_size=6))]
    shared = draw(st.sampled_from([0, 0, 3]))
    tasks = st.lists(st.integers(shared + 2, 24).map(lambda n: task(n, shared)), min_size=1, max_size=4)
    lists = draw(st.lists(tasks, max_size=7))
    first = draw(st.integers(0, 2))
    epochs = first + draw(st.integers(1, 3))
    mix = draw(st.sampled_from(["null", "0.5", "1"]))
    settings = config(f"tasks.first_epoch={first}", f"training.epochs={epochs}", f"tasks.mix={mix}")
    return Case(segments, lists, settings, draw(st.lists(st.booleans(), max_size=40)), draw(st.integers(0, 2**32)))


class Watched(Feed):
    """Notes what there was to do when somebody waited."""

    schedule: Schedule
    idle: list[tuple[int, list[Step]]]  # examples received, steps taken

    def poll(self, wait: bool) -> list[Example]:
        if wait:
            self.idle.append((sum(len(given) for _, given, _ in self.polls), list(self.schedule.taken)))
        return super().poll(wait)


def beside_tasks(case: Case, expected: int) -> list[list[int]]:
    """The steps of segments in the epoch of arrival: all of them, or as many tokens as the mix leaves beside 100 a task."""
    mix, chosen = case.settings.tasks.mix, list(range(len(case.segments)))
    if mix is not None and case.tasks:  # where none came, and none was expected, all segments are planned at the end
        wanted = expected * 100 * (1 - mix) / mix
        chosen = draw_segments(chosen, case.segments, wanted, f"{case.settings.seed}/{case.arrival}")
        sizes = [len(case.segments[index]) for index in chosen]
        assert abs(sum(sizes) - wanted) <= max(map(len, case.segments)) / 2
    steps = plan_steps([case.segments[index] for index in chosen], BATCH, case.arrival, case.settings.seed)
    return [[chosen[place] for place in step] for step in steps]


@settings(deadline=None, max_examples=200)
@given(cases())
def test_every_epoch_is_complete_and_nothing_waits_without_need(case: Case) -> None:
    feed = Watched(case.lists, case.script)
    feed.idle = []
    feed.schedule = Schedule(case.segments, case.settings, feed)
    steps, count = run(feed.schedule), len(case.segments)
    everything = [*case.segments, *case.tasks]
    assert feed.schedule.examples == everything
    seed, mix = case.settings.seed, case.settings.tasks.mix
    arriving = [step for epoch, step in steps if epoch == case.arrival]
    # the epochs before it, and segments beside the tasks: as without any tasks
    for epoch in range(case.arrival):
        assert [step for e, step in steps if e == epoch] == plan_steps(case.segments, BATCH, epoch, seed)
    beside = beside_tasks(case, feed.expected)
    assert [step for step in arriving if step[0] < count] == beside
    # each task once, as they arrived, in steps that do not depend on when
    assert [step for step in arriving if step[0] >= count] == filled(case.tasks, count)
    later = [step for step in plan_training(everything, case.settings) if step[0] > case.arrival]
    assert [step for step in steps if step[0] > case.arrival] == later
    assert [epoch for epoch, _ in steps] == sorted(epoch for epoch, _ in steps)
    for received, taken in feed.idle:
        done = [step for epoch, step in taken if epoch == case.arrival]
        left = case.tasks[sum(len(step) for step in done if step[0] >= count) : received]
        planned_late = mix is not None and not case.tasks
        assert planned_late or [step for step in done if step[0] < count] == beside, "waited though segments were left"
        assert len(filled(left, 0)) < 2, "waited though a step was full"
    assert feed.schedule.steps == len(steps)
    assert feed.schedule.tokens == sum(len(everything[index]) for _, step in steps for index in step)


class Resumed:
    """What a run finds that was stopped after some polls of a feed: all that had arrived, then the same polls again."""

    def __init__(self, feed: Feed, polls: int, expected: int, draw: random.Random) -> None:
        self._had = [example for _, given, _ in feed.polls[:polls] for example in given]
        self._left = feed.polls[polls:]
        self._ended = polls > 0 and feed.polls[polls - 1][2]
        self.expected = expected
        self._draw = draw

    @property
    def finished(self) -> bool:
        return self._ended and not self._had

    def poll(self, wait: bool) -> list[Example]:
        if self._had:
            count = self._draw.randint(1, len(self._had)) if wait else len(self._had)
            given, self._had = self._had[:count], self._had[count:]
            return given
        waited, given, self._ended = self._left.pop(0)
        assert waited or not wait, "waits where the first run did not"
        return given


@settings(deadline=None, max_examples=150)
@given(cases())
def test_given_back_the_steps_the_run_goes_on_alike(case: Case) -> None:
    """After every step: the same steps follow at the same arrivals, with the same estimates all the way."""
    feed = Feed(case.lists, case.script)
    schedule = Schedule(case.segments, case.settings, feed)
    moments = [(schedule.steps, schedule.tokens, 0)]
    while schedule.next() is not None:
        moments.append((schedule.steps, schedule.tokens, len(feed.polls)))
    draw = random.Random(case.other)
    for count in range(len(moments)):
        again = Resumed(feed, moments[count][2], feed.expected, draw)
        taken = [(epoch, tuple(step)) for epoch, step in schedule.taken[:count]]
        resumed = Schedule(case.segments, case.settings, again, taken)  # type: ignore[arg-type]
        estimates = [(resumed.steps, resumed.tokens)]
        while resumed.next() is not None:
            estimates.append((resumed.steps, resumed.tokens))
        assert resumed.taken == schedule.taken
        assert estimates == [(steps, tokens) for steps, tokens, _ in moments[count:]]


@settings(deadline=None, max_examples=100)
@given(cases())
def test_estimates_depend_on_the_steps_alone(case: Case) -> None:
    """Other arrivals, here all at once or one by one: after the same steps there are as many to come."""
    draw = random.Random(case.other)
    known: dict[str, tuple[int, int]] = {}
    one_by_one = [[example] for example in case.tasks]
    timings = [(case.lists, case.script), ([case.tasks] if case.tasks else [], []), (one_by_one, [])]
    timings += [(one_by_one, [draw.random() < 0.5 for _ in range(99)]), (case.lists, [False] * 99)]
    for lists, script in timings:
        schedule = Schedule(case.segments, case.settings, Feed(lists, script))
        more = True
        while more:
            estimate = schedule.steps, schedule.tokens
            assert known.setdefault(repr(schedule.taken), estimate) == estimate
            more = schedule.next() is not None


def test_total_tokens_take_the_place_of_epochs() -> None:
    """Epochs go on until the next step would be more too many than too few; each is in its own order."""
    examples = [Example(tuple(range(10, 10 + 40)), tuple(range(10, 10 + 40))) for _ in range(5)]

    def taken(total: int | None, epochs: int = 2) -> list[tuple[int, list[int]]]:
        settings = [f"training.epochs={epochs}", "training.batch_tokens=80"]
        return plan_training(examples, load_config(None, [*settings, f"training.total_tokens={total or 'null'}"]))

    two = taken(None)
    assert taken(400) == two == taken(400, epochs=1), "as many as two epochs have"
    assert sum(len(step) for _, step in taken(1000)) * 40 == 1000 and taken(1000)[-1][0] == 4
    assert taken(280) == two[:4] and taken(1) == two[:1]
    assert LiftConfig().recipe()["training"].keys().isdisjoint({"total_tokens"})
    with pytest.raises(ConfigError, match="total_tokens"):
        load_config(None, ["training.total_tokens=100", "tasks.writer=self"])
