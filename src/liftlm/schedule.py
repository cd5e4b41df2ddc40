"""Which examples each training step sees, in order, and how fast it learns; also where tasks are written while training runs.

Knows token counts only. `examples` plans an epoch; what is here is the order of epochs and the waiting.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from liftlm.config import LiftConfig, TrainingConfig
from liftlm.examples import Example, draw_segments, fill_steps, plan_steps, plan_training

_TASK_TOKENS = 100  # before any is known

Step = tuple[int, list[int]]  # epoch, indices of examples


class Feed(Protocol):
    """Examples that arrive while training runs."""

    @property
    def finished(self) -> bool:
        """Nothing more will come."""

    @property
    def expected(self) -> int:
        """How many there will be, roughly."""

    def poll(self, wait: bool) -> list[Example]:
        """What has arrived; with `wait` at least one, unless nothing more will come."""


class Schedule:
    """Steps one by one. Without a feed all are known at once: `plan_training`.

    With a feed, the first epoch with tasks takes them in the order of their arrival: a step of tasks whenever enough
    have arrived for a full one, else a step of segments (as many as `tasks.mix` asks for beside the tasks that are expected),
    and only without either does it wait (the ICML version's pipeline). The epochs after it are shuffled as ever. `taken` is
    what was done, and what a resumed run gives back.
    """

    def __init__(
        self, examples: Sequence[Example], config: LiftConfig, feed: Feed | None = None, taken: Sequence[Step] = ()
    ) -> None:
        self.examples = list(examples)
        self._config, self._feed = config, feed
        self._batch = config.training.batch_tokens
        self.taken: list[Step] = []
        self._total: int | None = None  # tokens, once all steps are known
        self._arrival = config.tasks.first_epoch  # the epoch in which tasks arrive
        self._arrived: deque[int] = deque()
        if feed is None:
            self._ahead: deque[Step] = deque(plan_training(self.examples, config))
            return
        self._ahead = deque(
            (epoch, [chosen[place] for place in step])
            for epoch in range(self._arrival + 1)  # the last one is shared with the tasks
            for chosen in [self._segments_of(epoch, feed.expected)]
            for step in plan_steps([self.examples[index] for index in chosen], self._batch, epoch, config.seed)
        )
        for step in taken:
            self._give_back(step)

    def _segments_of(self, epoch: int, tasks: int) -> list[int]:
        """All, or beside the tasks that are expected as many as `tasks.mix` says, by a rough count of those tasks' tokens."""
        everything, mix = list(range(len(self.examples))), self._config.tasks.mix
        if epoch < self._arrival or not mix:
            return everything
        beside = tasks * _TASK_TOKENS * (1 - mix) / mix
        return draw_segments(everything, self.examples, beside, f"{self._config.seed}/{epoch}")

    @property
    def steps(self) -> int:
        """Of the whole run. Where tasks are still being written an estimate, which depends on the steps taken only."""
        known = len(self.taken) + len(self._ahead)
        return known if self._feed is None else known + round(self._unknown(_cost) / self._batch)

    @property
    def tokens(self) -> int:
        if self._total is not None:
            return self._total
        known = sum(len(self.examples[index]) for _, step in [*self.taken, *self._ahead] for index in step)
        if self._feed is None:
            self._total = known  # asked for at every step of a run, which may have many
            return known
        return known + round(self._unknown(len))

    def _unknown(self, size: Callable[[Example], int]) -> float:
        """Size of the tasks not yet taken, and of the epochs after their arrival."""
        assert self._feed is not None
        seen = [size(self.examples[i]) for _, step in self.taken for i in step if self.examples[i].group]
        mean = sum(seen) / len(seen) if seen else _TASK_TOKENS
        segments = sum(len(example) for example in self.examples if not example.group)
        later = self._config.training.epochs - self._arrival - 1
        expected = max(self._feed.expected, len(seen)) * mean
        mix = self._config.tasks.mix
        beside = expected * (1 - mix) / mix if mix else segments
        return expected - len(seen) * mean + later * (expected + beside)

    def next(self) -> Step | None:
        """The next step; None after the last one. May wait, and raises what the writer of tasks raises."""
        step = self._next()
        if step is not None:
            self.taken.append(step)
        return step

    def _next(self) -> Step | None:
        if self._feed is not None and self._ahead and self._ahead[0][0] < self._arrival:
            while new := self._feed.poll(wait=False):  # or the writer stops when it is too far ahead
                self._receive(new)
        elif self._feed is not None:
            step = self._from_feed()
            if step is not None:
                return step
            if not self._ahead:
                self._plan_rest()
        return self._ahead.popleft() if self._ahead else None

    def _from_feed(self) -> Step | None:
        """A full step of tasks, or the last ones; None where segments are to be taken meanwhile, or all is taken."""
        assert self._feed is not None
        while True:
            full = self._full_step()
            if full or self._feed.finished:
                break
            new = self._feed.poll(wait=not self._ahead)
            if not new and self._ahead:
                return None
            self._receive(new)
        count = full or len(self._arrived)
        return (self._arrival, [self._arrived.popleft() for _ in range(count)]) if count else None

    def _full_step(self) -> int:
        """How many of the arrived tasks fill a step; 0 where they do not yet."""
        steps = fill_steps(([index] for index in self._arrived), self.examples, self._batch)
        return len(steps[0]) if len(steps) > 1 else 0

    def _receive(self, new: Sequence[Example]) -> None:
        self._arrived.extend(range(len(self.examples), len(self.examples) + len(new)))
        self.examples += new

    def _plan_rest(self) -> None:
        """All of the arrival's epoch has been seen: the epochs after it, and that one too if no task came and it is still empty.

        Not earlier: then `steps` would depend on when the writer's end was noticed, and a resumed run would not be the same.
        """
        self._feed = None
        first = self._arrival + any(epoch == self._arrival for epoch, _ in self.taken)
        self._ahead.extend(step for step in plan_training(self.examples, self._config) if step[0] >= first)

    def _give_back(self, step: Step) -> None:
        """Takes a step that an earlier run took, waiting for its examples; the writer gives them in the same order."""
        epoch, indices = step
        if self._ahead and list(self._ahead[0][1]) == list(indices) and self._ahead[0][0] == epoch:
            self._ahead.popleft()
        else:
            while self._feed is not None and not self._feed.finished and len(self.examples) <= max(indices):
                self._receive(self._feed.poll(wait=True))
            if self._feed is not None and (epoch > self._arrival or not self.examples[indices[0]].group):
                while not self._feed.finished:
                    self._receive(self._feed.poll(wait=True))
                self._arrived.clear()
                self._plan_rest()
                self._ahead.popleft()
            else:
                for index in indices:
                    self._arrived.remove(index)
        self.taken.append((epoch, list(indices)))


def _cost(example: Example) -> int:
    """Of one more in a step: what its group shares is computed once."""
    return len(example) - example.shared


def learning_rate(settings: TrainingConfig, step: int, steps: int) -> float:
    """Of step 0, 1, … : linear warm-up over a fraction of the steps, then constant, or linear or cosine to zero."""
    warmup = round(settings.warmup_fraction * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    part = (step - warmup) / max(1, steps - warmup)  # 0 … just below 1
    factor = {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}[settings.schedule]
    return settings.learning_rate * factor
