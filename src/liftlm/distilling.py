"""Context distillation: what the base model, with the evidence in its window, would say next at each token of an answer.

The student learns the same answer without the text. Its targets are the teacher's likeliest tokens with their shares (KL
divergence), mixed with the answer itself. Computed once, before training, and kept in a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from liftlm.adapters import use_adapter
from liftlm.config import LiftConfig
from liftlm.documents import Document
from liftlm.examples import Example, answer_example, make_task_examples, share_beginning, split_step
from liftlm.models import Model
from liftlm.reading import split_into_passages
from liftlm.rows import SoftTargets, row_tensors
from liftlm.storage import write_errors
from liftlm.tasks import Task


def distil(
    model: Model, document: Document, tasks: Sequence[Task], config: LiftConfig, cache: Path | None = None
) -> tuple[list[Example], SoftTargets | None]:
    """Task examples with soft targets where a passage of the document holds the task's evidence, and the targets.

    `cache`, a safetensors file, keeps what the teacher said. Raises DiskFullError, NoWritePermissionError.
    """
    if not config.tasks.teacher_weight:
        return make_task_examples(tasks, model.tokenizer, document.title, model.window), None
    students: list[Example] = []
    teachers: list[list[tuple[int, Example]]] = []
    passages = split_into_passages(document.text, tasks, config.tasks.passage_characters)
    for passage in passages:
        context = model.encode(document.text[passage.start : passage.end])
        taught = []
        for task in passage.tasks:
            for student in make_task_examples([task], model.tokenizer, document.title, model.window):
                teacher = answer_example(
                    model.tokenizer, document.title, task.question, task.answer, model.window, context
                )
                if teacher is not None and teacher.targets == student.targets:
                    taught.append((len(students), teacher))
                students.append(student)
        shared = share_beginning([teacher for _, teacher in taught], "passage")
        teachers.append([(index, teacher) for (index, _), teacher in zip(taught, shared, strict=True)])
    inside = {task for passage in passages for task in passage.tasks}
    students += make_task_examples(
        [task for task in tasks if task not in inside], model.tokenizer, document.title, model.window
    )
    row = 0
    order = [pair for group in teachers for pair in group]
    for index, teacher in order:
        students[index] = replace(students[index], soft=row)
        row += teacher.targets
    if not row:
        return students, None
    return students, _taught(model, teachers, config, cache)


def _taught(
    model: Model, teachers: Sequence[Sequence[tuple[int, Example]]], config: LiftConfig, cache: Path | None
) -> SoftTargets:
    if cache is not None and cache.is_file():
        stored = load_file(cache)
        return SoftTargets(stored["tokens"], stored["shares"], config.tasks.teacher_weight)
    tokens, shares = [], []
    with use_adapter(model, None):
        for group in teachers:
            rows = [teacher for _, teacher in group]
            said: dict[int, tuple[Tensor, Tensor]] = {}
            for batch in split_step(range(len(rows)), rows, config.training.micro_batch_tokens, 1):
                chosen = [rows[index] for index in batch]
                ids, probabilities = model.top_tokens(config.tasks.teacher_tokens, *row_tensors(model, chosen))
                counts = [row.targets for row in chosen]
                split = zip(batch, torch.split(ids, counts), torch.split(probabilities, counts), strict=True)
                for index, part, share in split:
                    said[index] = (part.int().cpu(), share.cpu())
            tokens += [said[index][0] for index in range(len(rows))]
            shares += [said[index][1] for index in range(len(rows))]
    table = {"tokens": torch.cat(tokens).contiguous(), "shares": torch.cat(shares).contiguous()}
    if cache is not None:
        draft = cache.with_name(f".{cache.name}")
        with write_errors(cache):
            save_file(table, draft)
            draft.replace(cache)
    return SoftTargets(table["tokens"], table["shares"], config.tasks.teacher_weight)
