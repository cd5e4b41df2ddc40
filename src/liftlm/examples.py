"""Segments → examples → batches: token ids with labels, and which of them one optimiser step sees.

Deterministic: the same examples, seed and budgets give the same steps on every machine and for any number of processes.
Knows nothing of models; PyTorch comes in only when `training` turns a micro-batch into tensors.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from liftlm.prompts import Tokenizer, leading_tokens
from liftlm.segments import Segment

NO_LOSS = -100  # label of a position that is not trained on, as in PyTorch and transformers


@dataclass(frozen=True)
class Example:
    """Token ids and labels of equal length. labels[i] is the token tokens[i], or NO_LOSS; the loss shifts by one."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]

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


def plan_steps(examples: Sequence[Example], batch_tokens: int, epoch: int, seed: int) -> list[list[int]]:
    """Which examples (by index) each optimiser step of an epoch sees: shuffled, then filled up to `batch_tokens`.

    Every example is seen once an epoch; an example longer than the budget is a step of its own.
    """
    order = list(range(len(examples)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return _fill(order, examples, batch_tokens)


def split_step(
    step: Sequence[int], examples: Sequence[Example], micro_batch_tokens: int, processes: int
) -> list[list[int]]:
    """A step's examples in micro-batches of similar length, none above `micro_batch_tokens` padded tokens.

    Their number is a multiple of `processes` (process r takes every r-th), so that all run the same number of forward
    passes. Empty ones fill up; with as many examples as processes, each process has at least one that is not empty.
    """
    by_length = sorted(step, key=lambda index: (-len(examples[index]), index))
    share = -(-sum(len(examples[index]) for index in step) // processes)  # spreads the work
    micro_batches: list[list[int]] = []
    for index in by_length:
        current = micro_batches[-1] if micro_batches else None
        if current is not None:
            padded = len(examples[current[0]]) * (len(current) + 1)
            if padded <= min(micro_batch_tokens, max(share, len(examples[current[0]]))):
                current.append(index)
                continue
        micro_batches.append([index])
    while len(micro_batches) < min(processes, len(step)):  # one long example, and several short ones together
        most = max(range(len(micro_batches)), key=lambda position: len(micro_batches[position]))
        middle = -(-len(micro_batches[most]) // 2)
        micro_batches[most : most + 1] = [micro_batches[most][:middle], micro_batches[most][middle:]]
    micro_batches += [[]] * (-len(micro_batches) % processes)
    return micro_batches


def _fill(order: Iterable[int], examples: Sequence[Example], budget: int) -> list[list[int]]:
    steps: list[list[int]] = []
    used = 0
    for index in order:
        if steps and used + len(examples[index]) <= budget:
            steps[-1].append(index)
            used += len(examples[index])
        else:
            steps.append([index])
            used = len(examples[index])
    return steps
