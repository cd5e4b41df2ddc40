"""Examples that keep the model reading: questions with text in the window, answered as the base model answers them.

Absorbing alone teaches to recite, even where the answer stands in the window. So a share of the tasks is also shown
after a passage of the document that holds their evidence among other sentences, and the answer to learn is the base
model's own: what a reader says. Knows nothing of how examples are trained on.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from liftlm.adapters import use_adapter
from liftlm.config import AnsweringConfig, LiftConfig
from liftlm.documents import Document
from liftlm.examples import Example, answer_example, share_beginning
from liftlm.generating import Prompt, generate
from liftlm.models import Model
from liftlm.prompts import question_turn, render_prompt
from liftlm.storage import write_errors, write_file
from liftlm.tasks import Task
from liftlm.tasks.sentences import split_into_sentences

_READER_TOKENS = 40  # an answer that takes more is no answer
_FOR_READERS = (
    "about",
    "who",
    "where",
    "when",
    "how many",
)  # kinds that are questions; "complete" and the like are not


@dataclass(frozen=True)
class Passage:
    """A run of whole sentences, as characters of the text, and the tasks whose evidence lies inside."""

    start: int
    end: int
    tasks: tuple[Task, ...]


def split_into_passages(text: str, tasks: Sequence[Task], characters: int) -> list[Passage]:
    """The document in runs of sentences of about so many characters; tasks whose evidence is in none are left out."""
    spans: list[tuple[int, int]] = []
    for sentence in split_into_sentences(text):
        if spans and sentence.end - spans[-1][0] <= characters:
            spans[-1] = (spans[-1][0], sentence.end)
        else:
            spans.append((sentence.start, sentence.end))
    inside: list[list[Task]] = [[] for _ in spans]
    place = 0
    for task in sorted(tasks, key=lambda task: task.start):
        while place < len(spans) and spans[place][1] <= task.start:
            place += 1
        if place < len(spans) and spans[place][0] <= task.start and task.end <= spans[place][1]:
            inside[place].append(task)
    return [Passage(*span, tuple(held)) for span, held in zip(spans, inside, strict=True)]


def reading_examples(
    model: Model, document: Document, tasks: Sequence[Task], config: LiftConfig, cache: Path | None = None
) -> list[Example]:
    """With `tasks.reading` of the tasks: the reader's answer after its passage, and the same without any text.

    The base model answers here, once; with `cache`, a JSON file, a second call takes its answers from there.
    """
    settings = config.tasks
    draw = random.Random(f"{config.seed}/reading")
    passages = []
    for passage in split_into_passages(document.text, tasks, settings.passage_characters):
        asked = [task for task in passage.tasks if task.kind in _FOR_READERS]
        chosen = draw.sample(asked, round(settings.reading * len(asked)))
        passages.append(Passage(passage.start, passage.end, tuple(chosen)))
    read = _answers(model, document, passages, config.seed, cache)
    examples: list[Example] = []
    for number, passage in enumerate(passages):
        context = model.encode(document.text[passage.start : passage.end])
        made = [
            example
            for task in passage.tasks
            if (said := read.get(task.question))
            and (example := answer_example(model.tokenizer, document.title, task.question, said, model.window, context))
        ]
        examples += share_beginning(made, f"passage {number}", together=True)
    return examples


def read_with_passage(model: Model, document: Document, tasks: Sequence[Task], config: LiftConfig) -> list[Example]:
    """For tasks that a language model wrote: `tasks.reading` of them with their own answers, after text around their evidence.

    Such answers are in a good reader's words already, and nobody has to wait for the base model's.
    """
    draw = random.Random(f"{config.seed}/{tasks[0].start}" if tasks else "")
    chosen = [task for task in tasks if draw.random() < config.tasks.reading]
    examples = []
    for task in chosen:
        room = max(0, config.tasks.passage_characters - (task.end - task.start))
        before = draw.randint(0, room)
        start, end = max(0, task.start - before), min(len(document.text), task.end + room - before)
        context = model.encode(document.text[start:end])
        example = answer_example(model.tokenizer, document.title, task.question, task.answer, model.window, context)
        if example is not None:
            examples.append(dataclasses.replace(example, group="passages"))
    return examples


def _answers(
    model: Model, document: Document, passages: Sequence[Passage], seed: int, cache: Path | None
) -> dict[str, str]:
    """Question → the base model's answer with the passage in its window; those without an end or a word are left out."""
    if cache is not None and cache.is_file():
        return dict(json.loads(cache.read_text(encoding="utf-8")))
    asked = [(number, task) for number, passage in enumerate(passages) for task in passage.tasks]
    contexts = [model.encode(document.text[passage.start : passage.end]) for passage in passages]
    prompts = [
        Prompt(
            render_prompt(
                model.tokenizer, [question_turn(model.tokenizer, document.title, task.question, contexts[number])]
            ),
            group=number,
        )
        for number, task in asked
    ]
    settings = AnsweringConfig(max_new_tokens=_READER_TOKENS)
    read: dict[str, str] = {}
    with use_adapter(model, None):
        for said in generate(model, prompts, settings, seed):
            if said.ended and said.text.strip():
                read[asked[said.index][1].question] = said.text.strip()
    if cache is not None:
        with write_errors(cache):
            write_file(cache, json.dumps(read, ensure_ascii=False))
    return read
