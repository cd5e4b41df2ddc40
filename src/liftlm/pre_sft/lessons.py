"""What one document brings to a step of pre-LIFT fine-tuning: examples to absorb it by, and questions asked afterwards.

The questions that it came with are asked; the tasks that the writer makes are absorbed. Where it came with none, the
tasks are shared out, by the sentences that they are about, so that what is asked was not trained on.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from liftlm.config import LiftConfig
from liftlm.evaluation.benchmark import Item
from liftlm.examples import Example, answer_example, make_examples, make_task_examples
from liftlm.models import Model
from liftlm.segments import split_into_segments
from liftlm.tasks import Task
from liftlm.writing import ArrivingTasks

_ASKED_SHARE = 4  # of a document without questions one sentence in so many is asked about
_CONTEXT = 256  # tokens of text around the evidence, where a question is asked with text


@dataclass(frozen=True)
class Lesson:
    """absorb: segments and tasks; ask: questions, some with text in the window. Either may be empty."""

    title: str
    absorb: list[Example]
    ask: list[Example]


def make_lesson(model: Model, item: Item, config: LiftConfig, number: int) -> Lesson:
    """number: of the document in the corpus; with the seed it decides everything that is drawn."""
    draw = random.Random(f"{config.seed}/pre-sft/{number}")
    document, start, end = item.document, 0, len(item.document.text)
    tokens = model.encode(document.text)
    if len(tokens) > config.pre_sft.document_tokens:
        share = config.pre_sft.document_tokens / len(tokens)
        start = round(draw.random() * (1 - share) * end)
        end = start + round(share * end)
    part = dataclasses.replace(document, text=document.text[start:end])
    segments = split_into_segments(
        model.encode(part.text), config.segments.segment_tokens, config.segments.overlap_tokens
    )
    with ArrivingTasks(part, model, config, None, None) as arriving:
        written = arriving.all()
    given = [
        Task(question.question, question.answers[0], question.kind, *_place(question.evidence, part.text))
        for question in item.questions
        if not question.evidence or all(sentence in part.text for sentence in question.evidence)
    ]
    whole = start == 0 and end == len(document.text)
    asked = [task for task in given if whole or task.end > task.start]  # of a part, only what is known to be in it
    if not asked:
        mine = {task.start for task in written}
        chosen = {place for place in mine if random.Random(f"{config.seed}/{place}").randrange(_ASKED_SHARE) == 0}
        asked = [task for task in written if task.start in chosen]
        written = [task for task in written if task.start not in chosen]
    asked = draw.sample(asked, min(config.pre_sft.tasks, len(asked)))
    absorb = make_examples(segments, model.tokenizer)
    absorb += make_task_examples(written, model.tokenizer, document.title, model.window)
    return Lesson(document.title, absorb, _asked(model, document.title, part.text, asked, config, draw))


def _asked(
    model: Model, title: str, text: str, tasks: Sequence[Task], config: LiftConfig, draw: random.Random
) -> list[Example]:
    """Without text, and `pre_sft.reading` of them with text around the evidence: both ways in which questions are answered."""
    examples = []
    for task in tasks:
        context: list[int] = []
        if draw.random() < config.pre_sft.reading and task.end > task.start:
            room = 4 * min(_CONTEXT, model.window // 4)  # characters
            before = draw.randint(0, room)
            context = model.encode(text[max(0, task.start - before) : task.end + room - before])[: model.window // 2]
        example = answer_example(model.tokenizer, title, task.question, task.answer, model.window, context)
        if example is not None:
            examples.append(example)
    return examples


def _place(evidence: Sequence[str], text: str) -> tuple[int, int]:
    at = text.find(evidence[0]) if evidence else -1
    return (at, at + len(evidence[0])) if at >= 0 else (0, 0)
