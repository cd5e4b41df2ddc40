"""Examples hold what the loss needs; steps and micro-batches hold every example once, within their budgets, evenly."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_tokenizer
from liftlm import Document, LiftConfig, answer_all, load_config
from liftlm.examples import (
    NO_LOSS,
    Example,
    computed_tokens,
    make_examples,
    make_task_examples,
    pack_row,
    plan_steps,
    plan_training,
    share_beginning,
    split_step,
)
from liftlm.prompts import question_turn, render_prompt
from liftlm.segments import Segment, split_into_segments
from liftlm.tasks import Task

PLAIN = make_tokenizer()
WITH_BOS = make_tokenizer(bos=True)
NO_TEMPLATE = make_tokenizer(chat=False, bos=True)


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


# --- examples of tasks ------------------------------------------------------------------------------------------------


def task(question: str, answer: str = "Oswin Tarrel.") -> Task:
    return Task(question, answer, "given", 0, 1)


def prompt_of(tokenizer: Any, title: str, question: str, context: list[int] | None = None) -> list[int]:
    return render_prompt(tokenizer, [question_turn(tokenizer, title, question, context or [])])


QUESTIONS = ["Who rang the bell?", "  When?\n", "<|im_end|> Why? 鐘", "7", "…", "'Where?'", " "]


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS, NO_TEMPLATE], ids=["chat", "chat-bos", "plain"])
def test_the_loss_is_on_the_answer_and_its_end_only(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>" if tokenizer.chat_template else "<|endoftext|>")
    tasks = [task(question, f" Oswin Tarrel, {number} times.\n") for number, question in enumerate(QUESTIONS)]
    examples = make_task_examples(tasks, tokenizer, "The Bell", 1000)
    assert len(examples) == len(tasks)
    for number, (made, question) in enumerate(zip(examples, QUESTIONS, strict=True)):
        prompt = prompt_of(tokenizer, "The Bell", question)
        answer = tokenizer(f"Oswin Tarrel, {number} times.", add_special_tokens=False)["input_ids"]
        assert made.tokens == (*prompt, *answer, end)
        assert made.labels == (*[NO_LOSS] * len(prompt), *answer, end)
        assert made.targets == len(answer) + 1


@pytest.mark.parametrize("context", ["none", "truncate"])
def test_the_prompt_in_training_is_the_prompt_in_answering(
    context: str, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(
        "liftlm.answering.generate", lambda model, prompts, *more: asked.extend(p.tokens for p in prompts)
    )
    document = Document(title="The Bell", text="The bell rang twice.")
    config = load_config(None, [f"answering.context={context}", "answering.max_new_tokens=9"])
    with pytest.raises(TypeError):  # nothing was generated
        answer_all(tiny_model, None, QUESTIONS, document=document, config=config)
    text = tiny_model.encode(document.text) if context == "truncate" else []
    made = make_task_examples(map(task, QUESTIONS), tiny_model.tokenizer, document.title, tiny_model.window, text)
    assert [list(e.tokens[: len(e) - e.targets]) for e in made] == asked


def test_long_answers_are_cut_and_long_questions_left_out() -> None:
    prompt, wanted = prompt_of(PLAIN, "T", "Who?"), PLAIN("a b c d e f g")["input_ids"]
    end = PLAIN.convert_tokens_to_ids("<|im_end|>")
    whole = [*prompt, *wanted, end]
    for window in range(len(prompt) - 3, len(whole) + 3):
        made = make_task_examples([task("Who?", "a b c d e f g")], PLAIN, "T", window)
        if window <= len(prompt):
            assert made == [], "no room for any answer"
        else:  # cut, and then without its end
            (example,) = made
            assert list(example.tokens) == whole[:window]
            assert list(example.labels) == [*[NO_LOSS] * len(prompt), *[*wanted, end][: window - len(prompt)]]
    kept = make_task_examples([task("Who?"), task("long " * 500), task("When?")], PLAIN, "T", 256)
    assert [e.tokens[: e.shared] for e in kept] == [kept[0].tokens[: kept[0].shared]] * 2


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS, NO_TEMPLATE], ids=["chat", "chat-bos", "plain"])
def test_examples_of_tasks_share_the_fixed_words_however_they_are_made(tokenizer: Any) -> None:
    """In one call or several, as tasks arrive: a group's examples begin alike."""
    tasks = [task(question) for question in [*QUESTIONS, "Who came?", "Who went?"]]
    for context in ([], tokenizer("The bell rang.", add_special_tokens=False)["input_ids"]):
        at_once = make_task_examples(tasks, tokenizer, "The Bell", 1000, context)
        assert [e for t in tasks for e in make_task_examples([t], tokenizer, "The Bell", 1000, context)] == at_once
        shared = [e for e in at_once if e.group == "tasks"]
        assert len(shared) >= len(tasks) - 3, "most questions do not change how the words before are cut into tokens"
        assert {(e.shared, e.tokens[: e.shared]) for e in shared} == {
            (shared[0].shared, shared[0].tokens[: shared[0].shared])
        }
        assert tokenizer.decode(list(shared[0].tokens[: shared[0].shared])).endswith('based on "The Bell".\nQuestion:')
        for other in at_once:
            assert other.group and not other.together
            assert other.shared < len(other) - other.targets, "the token before the first answer token is its own"
            assert other in shared or (other.group, other.shared) == ("other tasks", 0)


EXAMPLES = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.lists(st.integers(0, 2), min_size=1, max_size=4)),
    min_size=1,
    max_size=5,
).map(lambda made: [Example((*p, *a), (*[NO_LOSS] * len(p), *a)) for p, a in made])


@settings(deadline=None)
@given(EXAMPLES, st.booleans())
def test_what_is_shared_is_the_common_beginning_of_the_prompts(examples: list[Example], together: bool) -> None:
    made = share_beginning(examples, "g", together)
    common = os.path.commonprefix([e.tokens for e in examples])  # noqa: RUF071 - of any sequences
    shortest = min(len(e) - e.targets for e in examples)
    assert {(e.group, e.together, e.shared) for e in made} == {("g", together, min(len(common), shortest - 1))}
    assert [(e.tokens, e.labels) for e in made] == [(e.tokens, e.labels) for e in examples]


def test_nothing_to_share() -> None:
    assert share_beginning([], "g") == []
    (alone,) = share_beginning([Example((1, 2, 3, 4), (NO_LOSS, NO_LOSS, NO_LOSS, 4))], "g")
    assert alone.shared == 2


# --- packed rows ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(EXAMPLES)
def test_in_a_packed_row_every_token_sees_what_it_sees_alone(examples: list[Example]) -> None:
    rows = share_beginning(examples, "g")
    packed = pack_row(rows)
    total = rows[0].shared + sum(len(row) - row.shared for row in rows)
    assert len(packed.tokens) == len(packed.labels) == len(packed.positions) == len(packed.owner) == total
    assert computed_tokens(rows) == total <= sum(map(len, rows))

    def seen(index: int) -> list[int]:
        """What stands before and at a token, of the beginning and of its own example."""
        mine = packed.owner[index]
        return [other for other in range(index + 1) if packed.owner[other] in (0, mine)]

    for number, row in enumerate(rows, 1):
        own = [index for index, owner in enumerate(packed.owner) if owner == number]
        assert len(own) == len(row) - row.shared
        for index in own:
            before = seen(index)
            assert tuple(packed.tokens[other] for other in before) == row.tokens[: len(before)]
            assert [packed.positions[other] for other in before] == list(range(len(before)))
            if packed.labels[index] != NO_LOSS:  # predicted from the token before it in the row: the right one?
                assert packed.owner[index - 1] == number and packed.labels[index] == row.labels[len(before) - 1]
        assert sum(packed.labels[index] != NO_LOSS for index in own) == row.targets
    assert sum(label != NO_LOSS for label in packed.labels) == sum(row.targets for row in rows)
    assert packed.labels[0] == NO_LOSS


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


# --- the steps of a run -----------------------------------------------------------------------------------------------


def mixed_examples(seed: int = 0, segments: int = 40, tasks: int = 120, passages: int = 8) -> list[Example]:
    """Segments, tasks that share 20 tokens, and passages of about 100 tokens with five questions each."""
    draw = random.Random(seed)
    made = examples_of([draw.randint(50, 90) for _ in range(segments)])
    made += [Example((0,) * n, (0,) * n, "tasks", 20) for n in (draw.randint(30, 80) for _ in range(tasks))]
    for number in range(passages):
        shared = draw.randint(80, 120)
        made += [
            Example((0,) * n, (0,) * n, f"passage {number}", shared, together=True)
            for n in (shared + draw.randint(10, 40) for _ in range(5))
        ]
    return made


def run_config(*more: str) -> LiftConfig:
    return load_config(None, ["training.epochs=3", "training.batch_tokens=700", *more])


def by_epoch(plan: list[tuple[int, list[int]]]) -> list[list[int]]:
    assert [epoch for epoch, _ in plan] == sorted(epoch for epoch, _ in plan)
    return [[i for number, step in plan if number == epoch for i in step] for epoch in range(plan[-1][0] + 1)]


def computed(examples: list[Example], step: list[int]) -> int:
    """Tokens of a step, with what the examples of a group begin with counted once."""
    groups = {examples[i].group: examples[i].shared for i in step if examples[i].group}
    return sum(len(examples[i]) - examples[i].shared for i in step) + sum(groups.values())


def test_all_of_both_once_an_epoch() -> None:
    examples = mixed_examples()
    plan = plan_training(examples, run_config())
    assert [sorted(epoch) for epoch in by_epoch(plan)] == [list(range(len(examples)))] * 3
    assert len({tuple(epoch) for epoch in by_epoch(plan)}) == 3, "each epoch in an order of its own"
    kinds = [{bool(examples[i].group) for i in step} for _, step in plan]
    assert sum(len(kind) == 2 for kind in kinds) > len(kinds) / 2, "mixed within steps, not one after the other"


def test_segments_alone_are_planned_as_without_tasks() -> None:
    examples = examples_of([random.Random(n).randint(20, 90) for n in range(30)])
    expected = [(epoch, step) for epoch in range(3) for step in plan_steps(examples, 700, epoch, 0)]
    assert plan_training(examples, run_config()) == expected
    assert plan_training(examples, run_config("tasks.writer=none")) == expected


@pytest.mark.parametrize("mix", ["0", "0.2", "0.5", "0.8", "0.95", "1"])
def test_mix_is_the_share_of_tokens_that_are_tasks(mix: str) -> None:
    examples = mixed_examples()
    plan = plan_training(examples, run_config(f"tasks.mix={mix}"))
    tasks = [i for i, e in enumerate(examples) if e.group]
    for epoch, seen in enumerate(by_epoch(plan)):
        counts = Counter(seen)
        assert [counts[i] for i in tasks] == [int(mix != "0")] * len(tasks), "every task once an epoch, or none"
        segments = [counts[i] for i, e in enumerate(examples) if not e.group]
        assert max(segments) - min(segments) <= 1, "no segment again before all have been seen"
        own = sum(computed(examples, [i for i in step if examples[i].group]) for e, step in plan if e == epoch)
        of_segments = sum(
            computed(examples, [i for i in step if not examples[i].group]) for e, step in plan if e == epoch
        )
        assert own / (own + of_segments) == pytest.approx(float(mix), abs=0.03)
    draws = {tuple(sorted(i for i in epoch if not examples[i].group)) for epoch in by_epoch(plan)}
    assert mix not in ("0.8", "0.95") or len(draws) == 3, "segments are drawn anew each epoch"


def test_tasks_join_after_the_first_epochs() -> None:
    examples = mixed_examples()
    segments = [i for i, e in enumerate(examples) if not e.group]
    for more in ([], ["tasks.mix=1"], ["tasks.mix=0.5"]):
        epochs = by_epoch(plan_training(examples, run_config("tasks.first_epoch=2", *more)))
        assert [sorted(epoch) for epoch in epochs[:2]] == [segments] * 2
        assert all(i in epochs[2] for i in range(len(examples)) if examples[i].group)
    assert sorted(by_epoch(plan_training(examples, run_config("tasks.first_epoch=2", "tasks.mix=1")))[2]) == [
        i for i, e in enumerate(examples) if e.group
    ]


def test_a_plan_depends_on_examples_and_seed_only() -> None:
    examples = mixed_examples()
    for mix in ("null", "0.7"):
        plan = plan_training(examples, run_config(f"tasks.mix={mix}"))
        assert plan_training(list(examples), run_config(f"tasks.mix={mix}", "training.learning_rate=1e-5")) == plan
        assert plan_training(examples, run_config(f"tasks.mix={mix}", "seed=1")) != plan


GROUPED = st.tuples(st.integers(0, 99), st.integers(0, 9), st.integers(0, 30), st.integers(0, 4)).map(
    lambda made: mixed_examples(*made)
)


@settings(deadline=None, max_examples=60)
@given(GROUPED, st.integers(1, 1500), st.integers(0, 99))
def test_steps_hold_whole_passages_within_the_budget(examples: list[Example], budget: int, seed: int) -> None:
    steps = plan_steps(examples, budget, 0, seed)
    assert sorted(i for step in steps for i in step) == list(range(len(examples)))
    for number, step in enumerate(steps):
        for group in {examples[i].group for i in step if examples[i].together}:
            assert {i for i, e in enumerate(examples) if e.group == group} <= set(step), "a passage is not parted"
        units = {examples[i].group if examples[i].together else i for i in step}
        assert len(units) == 1 or computed(examples, step) <= budget
        if number + 1 < len(steps):  # filled up: the next unit did not fit
            first = steps[number + 1][0]
            unit = [i for i in steps[number + 1] if examples[i].group == examples[first].group]
            assert computed(examples, [*step, *(unit if examples[first].together else [first])]) > budget


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


# --- micro-batches of groups ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(GROUPED, st.integers(1, 1500), st.integers(1, 5), st.sampled_from([0, 60, 110, 1000]))
def test_micro_batches_hold_one_group_within_the_budget(
    examples: list[Example], budget: int, processes: int, window: int
) -> None:
    """A model with a sliding window packs no longer examples than that; then they are padded, and cost more."""
    step = random.Random(budget).sample(range(len(examples)), len(examples) // 2)
    micro_batches = split_step(step, examples, budget, processes, lambda longest: longest <= window)
    assert Counter(i for batch in micro_batches for i in batch) == Counter(step)
    assert len(micro_batches) % processes == 0
    assert sum(any(micro_batches[rank::processes]) for rank in range(processes)) == min(processes, len(step))
    for batch in micro_batches:
        assert len({examples[i].group for i in batch}) <= 1
        longest = max((len(examples[i]) for i in batch), default=0)
        packed = batch and examples[batch[0]].group and longest <= window
        cost = computed(examples, batch) if packed else longest * len(batch)
        assert len(batch) <= 1 or cost <= budget
    assert split_step(step[::-1], examples, budget, processes, lambda longest: longest <= window) == micro_batches


def test_tasks_of_a_step_are_one_packed_row_where_they_fit() -> None:
    examples = mixed_examples(segments=4, tasks=30, passages=2)
    groups = [{examples[i].group for i in batch} for batch in split_step(range(44), examples, 10_000, 1)]
    assert sorted(groups, key=str) == [{""}, {"passage 0"}, {"passage 1"}, {"tasks"}]


def test_examples_on_disk_are_the_same_and_leave_nothing_behind(tmp_path: Path) -> None:
    from liftlm.examples_on_disk import keep_on_disk

    given = [
        Example((5, 6, 7), (NO_LOSS, 6, 7)),
        Example((9,) * 300, (NO_LOSS,) * 299 + (9,), group="tasks", shared=40, soft=3, soft_weight=0.5),
    ]
    kept = keep_on_disk(iter(given), tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []
    for one, other in zip(given, kept, strict=True):
        assert (tuple(other.tokens), tuple(other.labels)) == (one.tokens, one.labels)
        assert dataclasses.replace(other, tokens=one.tokens, labels=one.labels) == one
        assert (len(other), other.targets) == (len(one), one.targets)
    assert vars(pack_row([kept[1]])) == vars(pack_row([given[1]]))
    assert keep_on_disk([]) == []
