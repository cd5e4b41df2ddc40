"""What the base model, with the evidence in its window, would say next at each token of an answer: soft targets.

They are learnt in two places. Without the text (context distillation: `tasks.teacher_weight`, mixed with the answer itself),
to know the document as the base model reads it. And with the text (`tasks.reading`), to go on reading it as the base model
does: absorbing alone teaches to recite, even where the answer stands in the window. Computed once, before training.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from liftlm.adapters import use_adapter
from liftlm.config import LiftConfig
from liftlm.documents import Document
from liftlm.examples import Example, answer_example, make_task_examples, share_beginning
from liftlm.models import Model
from liftlm.reading import split_into_passages, with_head_and_tail, with_text
from liftlm.rows import SoftTargets, likeliest_tokens
from liftlm.storage import write_file
from liftlm.tasks import Task


def task_examples(
    model: Model, document: Document, tasks: Sequence[Task], config: LiftConfig, cache: Path | None = None
) -> tuple[list[Example], SoftTargets | None]:
    """Examples of all tasks, those of `tasks.reading` also with text, and the soft targets that they count in.

    `cache`, a safetensors file, keeps what the teacher said. Tasks whose evidence is in no passage have the plain label, and
    so have those that are shown other text than the passage. Raises DiskFullError, NoWritePermissionError.
    """
    settings, tokenizer, title = config.tasks, model.tokenizer, document.title
    draw = random.Random(f"{config.seed}/reading")
    reading = settings.reading if settings.show == "passage" else 0.0  # of the passage, with the teacher
    shown: list[Example] = []
    if settings.show == "retrieve":
        shown = with_text(model, document, tasks, config)
    elif settings.show == "truncate":
        shown = with_head_and_tail(model, document, draw.sample(list(tasks), round(settings.reading * len(tasks))))
    if not (reading or settings.teacher_weight):
        return make_task_examples(tasks, tokenizer, title, model.window) + shown, None
    passages = split_into_passages(document.text, tasks, settings.passage_characters)
    inside = {task for passage in passages for task in passage.tasks}
    examples = make_task_examples([task for task in tasks if task not in inside], tokenizer, title, model.window)
    taught: list[list[Example]] = []
    row = 0
    for number, passage in enumerate(passages):
        context = model.encode(document.text[passage.start : passage.end])
        teachers: list[Example] = []
        read: list[Example] = []
        for task in passage.tasks:
            for student in make_task_examples([task], tokenizer, title, model.window):
                examples.append(student)
                reads = draw.random() < reading
                teacher = answer_example(tokenizer, title, task.question, task.answer, model.window, context)
                if teacher is None or teacher.targets != student.targets or not (reads or settings.teacher_weight):
                    continue  # the passage leaves no room for the whole answer, or nobody wants to know
                if settings.teacher_weight:
                    examples[-1] = replace(student, soft=row, soft_weight=settings.teacher_weight)
                if reads:
                    read.append(replace(teacher, soft=row, soft_weight=1.0))
                teachers.append(teacher)
                row += teacher.targets
        taught.append(share_beginning(teachers, "passage"))
        examples += share_beginning(read, f"passage {number}", together=True)
    return examples + shown, _soft_targets(model, taught, config, cache) if row else None


def _soft_targets(
    model: Model, taught: Sequence[Sequence[Example]], config: LiftConfig, cache: Path | None
) -> SoftTargets:
    """The base model's likeliest tokens at all targets of these examples, in their order; one list holds one passage's."""
    if cache is not None and cache.is_file():
        stored = load_file(cache)
        return SoftTargets(stored["tokens"], stored["shares"])
    with use_adapter(model, None):
        said = [
            likeliest_tokens(model, rows, config.tasks.teacher_tokens, config.training.micro_batch_tokens)
            for rows in taught
            if rows
        ]
    tokens, shares = (torch.cat(parts).contiguous() for parts in zip(*said, strict=True))
    table = {"tokens": tokens, "shares": shares}
    if cache is not None:
        write_file(cache, save(table))
    return SoftTargets(table["tokens"], table["shares"])
