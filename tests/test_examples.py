"""Examples hold what the loss needs; steps and micro-batches hold every example once, within their budgets, evenly."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_tokenizer
from liftlm.examples import NO_LOSS, Example, make_examples, plan_steps, split_step
from liftlm.segments import Segment, split_into_segments

PLAIN = make_tokenizer()
WITH_BOS = make_tokenizer(bos=True)


def examples_of(lengths: list[int]) -> list[Example]:
    return [Example(tuple(range(length)), tuple(range(length))) for length in lengths]


# --- examples ---------------------------------------------------------------------------------------------------------


def test_one_example_a_segment_with_loss_on_every_token() -> None:
    segments = split_into_segments(range(100, 200), 40, 10)
    examples = make_examples(segments, PLAIN)
    assert [example.tokens for example in examples] == [segment.tokens for segment in segments]
    assert [example.labels for example in examples] == [segment.tokens for segment in segments]
    assert [example.targets for example in examples] == [len(segment.tokens) - 1 for segment in segments]


def test_the_leading_token_is_seen_but_not_learnt() -> None:
    bos = WITH_BOS.bos_token_id
    (example,) = make_examples([Segment(0, 0, (9, 8, 7))], WITH_BOS)
    assert example.tokens == (bos, 9, 8, 7)
    assert example.labels == (NO_LOSS, 9, 8, 7)
    assert (len(example), example.targets) == (4, 3)


def test_a_lone_token_is_learnt_where_something_can_stand_before_it() -> None:
    lone = [Segment(0, 0, (9,))]
    (after_bos,) = make_examples(lone, WITH_BOS)
    assert (after_bos.tokens, after_bos.labels) == ((WITH_BOS.bos_token_id, 9), (NO_LOSS, 9))
    (after_eos,) = make_examples(lone, PLAIN)
    assert (after_eos.tokens, after_eos.labels, after_eos.targets) == ((PLAIN.eos_token_id, 9), (NO_LOSS, 9), 1)
    bare = make_tokenizer()
    bare.eos_token = None
    assert make_examples(lone, bare) == []


def test_no_segments_no_examples() -> None:
    assert make_examples([], PLAIN) == []


@pytest.mark.parametrize(
    ("labels", "targets"),
    [((5, 6, 7), 2), ((NO_LOSS, 6, 7), 2), ((5, NO_LOSS, NO_LOSS), 0), ((5, NO_LOSS, 7), 1), ((5,), 0), ((), 0)],
)
def test_targets_are_the_positions_that_are_predicted(labels: tuple[int, ...], targets: int) -> None:
    assert Example(tuple(range(len(labels))), labels).targets == targets


# --- steps ------------------------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(2, 60), max_size=40)
BUDGETS = st.integers(1, 300)


@settings(deadline=None)
@given(LENGTHS, BUDGETS, st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_a_step_plan_sees_each_example_once_within_the_budget(
    lengths: list[int], budget: int, epoch: int, seed: int
) -> None:
    steps = plan_steps(examples_of(lengths), budget, epoch, seed)
    assert sorted(index for step in steps for index in step) == list(range(len(lengths)))
    for step in steps:
        assert step and (len(step) == 1 or sum(lengths[index] for index in step) <= budget)
    # filled up: the first example of a step did not fit the step before
    for before, after in itertools.pairwise(steps):
        assert sum(lengths[index] for index in before) + lengths[after[0]] > budget
    assert plan_steps(examples_of(lengths), budget, epoch, seed) == steps


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    examples = examples_of([10] * 30)
    orders = {
        tuple(index for step in plan_steps(examples, 100, epoch, seed) for index in step)
        for epoch in range(3)
        for seed in range(3)
    }
    assert len(orders) == 9
    assert tuple(range(30)) not in orders


def test_the_order_is_the_same_on_every_machine() -> None:
    """Python's generator, seeded with text, is stable between versions and machines; this pins how it is used."""
    order = list(range(12))
    random.Random("7/2").shuffle(order)
    assert [index for (index,) in plan_steps(examples_of([10] * 12), 1, epoch=2, seed=7)] == order


def test_a_huge_budget_makes_an_epoch_one_step() -> None:
    assert len(plan_steps(examples_of([2048] * 50), 10**9, 0, 0)) == 1


# --- micro-batches ----------------------------------------------------------------------------------------------------


def padded(micro_batch: list[int], lengths: list[int]) -> int:
    return max((lengths[index] for index in micro_batch), default=0) * len(micro_batch)


STEPS = st.lists(st.integers(2, 60), max_size=24).flatmap(
    lambda lengths: (
        st.tuples(st.just(lengths), st.lists(st.sampled_from(range(len(lengths))), unique=True))
        if lengths
        else st.just((lengths, []))
    )
)


@settings(deadline=None)
@given(STEPS, BUDGETS, st.integers(1, 9))
def test_micro_batches_divide_a_step_within_the_budget(
    step: tuple[list[int], list[int]], budget: int, processes: int
) -> None:
    lengths, chosen = step
    micro_batches = split_step(chosen, examples_of(lengths), budget, processes)
    assert Counter(index for batch in micro_batches for index in batch) == Counter(chosen)
    assert len(micro_batches) % processes == 0
    for batch in micro_batches:
        assert len(batch) <= 1 or padded(batch, lengths) <= budget
    assert split_step(chosen, examples_of(lengths), budget, processes) == micro_batches
    assert split_step(chosen[::-1], examples_of(lengths), budget, processes) == micro_batches, "order plays no part"


@settings(deadline=None)
@given(STEPS, BUDGETS, st.integers(1, 9))
def test_no_process_is_idle_where_there_is_work_for_all(
    step: tuple[list[int], list[int]], budget: int, processes: int
) -> None:
    lengths, chosen = step
    micro_batches = split_step(chosen, examples_of(lengths), budget, processes)
    busy = [rank for rank in range(processes) if any(micro_batches[rank::processes])]
    assert len(busy) == min(processes, len(chosen))


@settings(deadline=None)
@given(STEPS, BUDGETS, st.integers(1, 9))
def test_work_of_one_size_is_shared_evenly(step: tuple[list[int], list[int]], budget: int, processes: int) -> None:
    lengths = [7] * len(step[0])
    micro_batches = split_step(step[1], examples_of(lengths), budget, processes)
    rounds = [micro_batches[start : start + processes] for start in range(0, len(micro_batches), processes)]
    for together in rounds[:-1]:  # all processes wait for the slowest at the end only
        assert len({len(batch) for batch in together}) == 1


def test_a_process_alone_gets_full_micro_batches() -> None:
    assert [len(batch) for batch in split_step(range(10), examples_of([10] * 10), 40, 1)] == [4, 4, 2]


def test_processes_share_what_one_of_them_could_do_alone() -> None:
    assert [len(batch) for batch in split_step(range(4), examples_of([10] * 4), 10**6, 2)] == [2, 2]
    assert [len(batch) for batch in split_step(range(10), examples_of([10] * 10), 60, 2)] == [5, 5]


def test_one_long_and_several_short_examples_leave_nobody_idle() -> None:
    """Regression: the short ones once shared a micro-batch, and the third process had nothing to do."""
    assert split_step([0, 1, 2], examples_of([10, 2, 2]), 10**6, 3) == [[0], [1], [2]]
