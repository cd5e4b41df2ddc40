"""Segments and tasks → examples → batches: token ids with labels, and which of them one optimiser step sees.

Deterministic: the same examples, seed and budgets give the same steps on every machine and for any number of processes.
Knows nothing of models; PyTorch comes in only when `training` turns a micro-batch into tensors.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from liftlm.config import LiftConfig
from liftlm.prompts import Tokenizer, answer_end, answer_turn, common_beginning, leading_tokens, question_prompt
from liftlm.segments import Segment
from liftlm.tasks import Task

NO_LOSS = -100  # label of a position that is not trained on, as in PyTorch and transformers


@dataclass(frozen=True)
class Example:
    """Token ids and labels of equal length. labels[i] is the token tokens[i], or NO_LOSS; the loss shifts by one.

    Examples of one `group` begin with the same `shared` tokens (the prompt's fixed words, a passage that many tasks
    ask about): in one micro-batch those are computed once. Examples of a group that is `together` are all in one step.
    """

    tokens: Sequence[int]
    labels: Sequence[int]
    group: str = ""
    shared: int = 0  # tokens
    together: bool = False
    soft: int | None = None  # the first of its rows in a table of soft targets, one a target (see `distilling`)
    soft_weight: float = 0.0  # of the soft targets; the rest is the label's

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def targets(self) -> int:
        """How many positions are predicted (the first token never is)."""
        return sum(label != NO_LOSS for label in self.labels[1:])


def make_examples(segments: Iterable[Segment], tokenizer: Tokenizer) -> list[Example]:
    """One example a segment: loss on all its tokens (paper, eq. 2), after the tokenizer's own leading token if any.

    Without one, a lone token follows the end token, as otherwise it would have nothing to be predicted from.
    """
    lead = leading_tokens(tokenizer)
    examples = []
    for segment in segments:
        front = lead
        if not lead and len(segment.tokens) == 1 and tokenizer.eos_token_id is not None:
            front = [tokenizer.eos_token_id]
        example = Example((*front, *segment.tokens), (*[NO_LOSS] * len(front), *segment.tokens))
        if example.targets:
            examples.append(example)
    return examples


def make_task_examples(
    tasks: Iterable[Task],
    tokenizer: Tokenizer,
    title: str,
    window: int,
    context: Sequence[int] = (),
    group: str = "tasks",
) -> list[Example]:
    """One example a task: the question as it is asked when answering, loss on the answer and on what ends it.

    LIFT, section 3.2. An answer too long for the window is cut (and then not ended); a question too long is left out.
    Examples of one group, which may be made in several calls, must have the same context.
    """
    frame = _frame(tokenizer, title, tuple(context))
    examples = []
    for task in tasks:
        example = answer_example(tokenizer, title, task.question, task.answer, window, context)
        if example is not None:
            same = tuple(example.tokens[: len(frame)]) == frame and len(example) - example.targets > len(frame)
            examples.append(
                replace(example, group=group if same else f"other {group}", shared=len(frame) if same else 0)
            )
    return examples


@functools.lru_cache(maxsize=4)  # tasks that arrive are made into examples one by one
def _frame(tokenizer: Tokenizer, title: str, context: tuple[int, ...]) -> tuple[int, ...]:
    """What the prompts of all questions with this text begin with."""
    prompts = [question_prompt(tokenizer, title, question, context) for question in ("Who?", "7", "in", "’")]
    return tuple(common_beginning(prompts))


def answer_example(
    tokenizer: Tokenizer, title: str, question: str, answer: str, window: int, context: Sequence[int] = ()
) -> Example | None:
    """Question, perhaps after text of the document (token ids), and answer; None where the question fills the window."""
    prompt = question_prompt(tokenizer, title, question, context)
    wanted = [*answer_turn(tokenizer, answer).tokens, *answer_end(tokenizer)][: max(0, window - len(prompt))]
    if not wanted:
        return None
    return Example((*prompt, *wanted), (*[NO_LOSS] * len(prompt), *wanted))


def share_beginning(examples: Sequence[Example], group: str, together: bool = False) -> list[Example]:
    """The examples as one group, marked with the number of leading tokens that all have in common and none predicts."""
    if not examples:
        return []
    first = examples[0]
    limit = min(next((i for i, label in enumerate(e.labels) if label != NO_LOSS), len(e)) - 1 for e in examples)
    shared = 0
    while shared < limit and all(example.tokens[shared] == first.tokens[shared] for example in examples):
        shared += 1
    return [replace(example, group=group, shared=shared, together=together) for example in examples]


def plan_training(examples: Sequence[Example], config: LiftConfig) -> list[tuple[int, list[int]]]:
    """(epoch, indices of the step's examples) of every step of a training run, in order.

    Segments are the examples without a group. Tasks join after `tasks.first_epoch` epochs; then `tasks.mix` is their
    share of an epoch's tokens: all tasks are seen once, and as many segments, drawn anew each epoch, as that leaves room
    for (or several times). `training.total_tokens` takes the place of the number of epochs: steps go on until the next one
    would leave more tokens too many than too few.
    """
    segments = [index for index, example in enumerate(examples) if not example.group]
    tasks = [index for index, example in enumerate(examples) if example.group]
    task_tokens = sum(len(examples[index]) - examples[index].shared for index in tasks)
    task_tokens += sum({examples[i].group: examples[i].shared for i in tasks if examples[i].together}.values())
    mix = config.tasks.mix
    plan: list[tuple[int, list[int]]] = []
    most, used = config.training.total_tokens, 0
    for epoch in itertools.count() if most is not None and examples else range(config.training.epochs):
        chosen = segments if epoch < config.tasks.first_epoch else segments + tasks
        if tasks and mix is not None and epoch >= config.tasks.first_epoch:
            wanted = 0 if mix == 1 else task_tokens * (1 - mix) / mix if mix else None
            chosen = (
                segments
                if wanted is None
                else draw_segments(segments, examples, wanted, f"{config.seed}/{epoch}") + tasks
            )
        for places in plan_steps([examples[i] for i in chosen], config.training.batch_tokens, epoch, config.seed):
            step = [chosen[place] for place in places]
            tokens = sum(len(examples[index]) for index in step)
            if most is not None and plan and used + tokens / 2 > most:
                return plan
            plan.append((epoch, step))
            used += tokens
    return plan


def draw_segments(segments: Sequence[int], examples: Sequence[Example], tokens: float, seed: str) -> list[int]:
    """Segments of about so many tokens together: each once before any is drawn again."""
    draw = random.Random(seed)
    drawn: list[int] = []
    left = tokens
    while segments and left > 0:
        for index in draw.sample(list(segments), len(segments)):
            if left < len(examples[index]) / 2:  # the nearer of too much and too little
                return drawn
            drawn.append(index)
            left -= len(examples[index])
    return drawn


def plan_steps(examples: Sequence[Example], batch_tokens: int, epoch: int, seed: int) -> list[list[int]]:
    """Which examples (by index) each optimiser step of an epoch sees: shuffled, then filled up to `batch_tokens`.

    Every example is seen once an epoch; one longer than the budget is a step of its own, and so is a group that stays
    together. A beginning that a group shares counts once a step, as it is computed once.
    """
    units: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        units.setdefault(example.group if example.together else f"#{index}", []).append(index)
    order = list(units.values())
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return fill_steps(order, examples, batch_tokens)


def fill_steps(units: Iterable[Sequence[int]], examples: Sequence[Example], batch_tokens: int) -> list[list[int]]:
    """Units (indices that stay together) in steps of at most `batch_tokens`, in their order."""
    steps: list[list[int]] = []
    used = 0
    present: set[str] = set()
    for unit in units:
        group, shared = examples[unit[0]].group, examples[unit[0]].shared
        fresh = sum(len(examples[index]) for index in unit) - shared * len(unit)
        if not steps or used + fresh + (0 if group in present else shared) > batch_tokens:
            steps.append([])
            used, present = 0, set()
        steps[-1] += unit
        used += fresh + (0 if group in present else shared)
        present.add(group)
    return steps


def computed_tokens(rows: Sequence[Example], can_pack: Callable[[int], bool] = lambda longest: True) -> int:
    """What a micro-batch of these examples costs: one group in one row, its shared beginning once; else padded to the longest."""
    longest = max((len(row) for row in rows), default=0)
    if rows and rows[0].group and can_pack(longest):
        return rows[0].shared + sum(len(row) - row.shared for row in rows)
    return longest * len(rows)


@dataclass(frozen=True)
class PackedRow:
    """Examples of one group in one row, behind the beginning they share. Number 0 in `owner` is that beginning."""

    tokens: list[int]
    labels: list[int]
    positions: list[int]  # as if each example stood alone
    owner: list[int]  # which example a token belongs to; it sees the beginning and its own example's tokens before it


def pack_row(rows: Sequence[Example]) -> PackedRow:
    """No padding, and the beginning is computed once; the loss is that of the examples one by one."""
    shared = rows[0].shared
    packed = PackedRow(list(rows[0].tokens[:shared]), [NO_LOSS] * shared, list(range(shared)), [0] * shared)
    for number, row in enumerate(rows, 1):
        packed.tokens.extend(row.tokens[shared:])
        packed.labels.extend(row.labels[shared:])
        packed.positions.extend(range(shared, len(row)))
        packed.owner.extend([number] * (len(row) - shared))
    return packed


def split_step(
    step: Sequence[int],
    examples: Sequence[Example],
    micro_batch_tokens: int,
    processes: int,
    can_pack: Callable[[int], bool] = lambda longest: True,
) -> list[list[int]]:
    """A step's examples in micro-batches of one group and similar length, none above `micro_batch_tokens`.

    That is measured by `computed_tokens`, without what rows on a CPU are padded by. Their number is a multiple of `processes`
    (process r takes every r-th), so that all run the same number of forward passes. Empty ones fill up; with as many examples
    as processes, each process has at least one that is not empty.
    can_pack: whether the model takes examples of a group in one row, by their longest (`Model.can_pack`).
    """

    def beginning(index: int) -> int:
        return examples[index].shared if can_pack(len(examples[index])) else 0

    by_length = sorted(step, key=lambda index: (examples[index].group, -len(examples[index]), index))
    share = -(-sum(len(examples[index]) - beginning(index) for index in step) // processes)  # spreads the work
    micro_batches: list[list[int]] = []
    for index in by_length:
        current = micro_batches[-1] if micro_batches else None
        if current is not None and examples[current[0]].group == examples[index].group:
            cost = computed_tokens([examples[other] for other in [*current, index]], can_pack)
            alone = beginning(current[0])
            fair = processes == 1 or cost - alone <= max(share, len(examples[current[0]]) - alone)
            if cost <= micro_batch_tokens and fair:
                current.append(index)
                continue
        micro_batches.append([index])
    while len(micro_batches) < min(processes, len(step)):  # one long example, and several short ones together
        most = max(range(len(micro_batches)), key=lambda position: len(micro_batches[position]))
        middle = -(-len(micro_batches[most]) // 2)
        micro_batches[most : most + 1] = [micro_batches[most][:middle], micro_batches[most][middle:]]
    micro_batches += [[]] * (-len(micro_batches) % processes)
    return micro_batches
