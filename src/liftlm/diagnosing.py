"""Looks at an absorbed document for the failures that are known of LIFT, and says in sentences what it saw.

The signatures are the paper's (needle recall lost, irregular gains, over-fitting to the tasks, forgetting) and one seen in
this program's own trials: a text known verbatim that no question finds. Thresholds are rules of thumb, stated in each
sentence with the figure; `lift study failures` measures how often they hold. Knows nothing of benchmarks.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from liftlm.absorbing import Adapter
from liftlm.adapters import use_adapter
from liftlm.config import LiftConfig
from liftlm.display import console, note
from liftlm.examples import answer_example
from liftlm.generating import Prompt, generate
from liftlm.models import Model
from liftlm.prompts import question_prompt
from liftlm.rows import row_tensors
from liftlm.shelf import Shelf
from liftlm.tasks import Task, read_tasks_file
from liftlm.tasks.extractive import write_extractive_tasks
from liftlm.writing import TASKS_FILE

SIGNATURES = ("needles lost", "irregular gains", "over-fitted to tasks", "forgetting", "known but not found")
DETAILS = ("who", "where", "when", "how many")  # kinds of extractive tasks with short answers
_PIECES, _PIECE_TOKENS = 3, 192
_TASKS, _NEEDLES, _ANSWER_TOKENS = 16, 8, 32
_ROWS = 8  # questions at once
_OTHER_SEED = 7919  # of held-out questions
_KNOWN = 1.0  # nats a token: below it a text is known by heart
_SMALL_GAIN = 0.2  # nats a token
_WORSE = 0.3  # share of questions
_FORGOTTEN = 0.1  # relative rise of the loss
# Written for this program: about nothing that a document is likely to be about, so that what is lost shows.
UNRELATED = """A kettle that is filled to the brim takes longer to boil than one that is half full, because there is more
water to warm. When the water is hot enough, bubbles of steam form at the bottom, rise, and break at the surface. On a
high mountain this happens at a lower temperature, since the air presses less. People who live there cook their beans
for hours, or use a pot with a tight lid. A wooden spoon does not burn the hand, because wood carries heat slowly, while
a metal one is soon too hot to hold. Most kitchens have a window, and in winter the steam settles on the cold glass in
small drops, which run together and leave clear paths on their way down. If the window is opened for a few minutes, the
dry air from outside takes up the damp, and the glass is clear again. Bread keeps best in a box that is neither quite
closed nor quite open; in a closed one it grows soft and mouldy, in the open it turns hard within two days. Hard bread
is still good: cut into cubes and fried in a little butter it goes into soup, and grated it thickens a sauce."""


@dataclass(frozen=True)
class Finding:
    """One signature. seen: None where it cannot be told; figures: what was measured; sentence: for the user."""

    signature: str
    seen: bool | None
    figures: Mapping[str, float]
    sentence: str


@dataclass(frozen=True)
class Symptoms:
    """What is measured, before (base model) and after (all of the adapter), closed-book. NLLs in nats a token, of each task."""

    text_before: float
    text_after: float
    trained_before: Sequence[float]
    trained_after: Sequence[float]
    held_out_before: Sequence[float]
    held_out_after: Sequence[float]
    unrelated_before: float
    unrelated_after: float
    recalled_before: Sequence[bool]  # details that the answer names
    recalled_after: Sequence[bool]


def diagnose(
    model: Model, adapter: Adapter, config: LiftConfig, trained: Sequence[Task] | None = None
) -> list[Finding]:
    """All signatures, seen or not. trained: the tasks it was trained on, where the library has them."""
    return judge_symptoms(measure_symptoms(model, adapter, config, trained))


def warn_of_failures(model: Model, adapter: Adapter, config: LiftConfig) -> None:
    """On standard error: what looks wrong, each in a sentence, and how many signatures were looked for."""
    stored = Shelf().path / adapter.id / TASKS_FILE
    trained = read_tasks_file(stored, len(adapter.document.text)) if stored.is_file() and adapter.tasks else None
    findings = diagnose(model, adapter, config, trained)
    for finding in findings:
        if finding.seen:
            console.print(f"Warning ({finding.signature}): {finding.sentence}", style="yellow", markup=False)
    looked = sum(finding.seen is not None for finding in findings)
    note(f"Diagnosis: {sum(bool(each.seen) for each in findings)} of {looked} known failures seen (docs/studies.md).")


def measure_symptoms(
    model: Model, adapter: Adapter, config: LiftConfig, trained: Sequence[Task] | None = None
) -> Symptoms:
    """Of samples drawn with the config's seed. Held-out questions are the extractive writer's, with another seed."""
    document, draw, how = adapter.document, random.Random(config.seed), adapter.config.tasks
    if trained is None and how.writer == "extractive" and adapter.tasks:
        trained = write_extractive_tasks(document.text, how.per_sentence, adapter.config.seed, how.answers)
    trained = list(trained or ())
    asked = {task.question for task in trained}
    fresh = write_extractive_tasks(document.text, 3, _OTHER_SEED)
    like = fresh if how.answers == "auto" else write_extractive_tasks(document.text, 3, _OTHER_SEED, how.answers)
    held_out = [task for task in like if task.question not in asked and task.kind != "complete"]
    held_out = draw.sample(held_out, min(_TASKS, len(held_out)))
    needles = [task for task in fresh if task.kind in DETAILS and len(task.answer.split()) <= 8]
    needles = draw.sample(needles, min(_NEEDLES, len(needles)))
    trained = draw.sample(trained, min(_TASKS, len(trained)))
    tokens = model.encode(document.text)
    pieces = _pieces(tokens, min(_PIECE_TOKENS, model.window))
    unrelated = model.encode(UNRELATED)[: model.window]
    found = {}
    for when, name in (("before", None), ("after", adapter.id)):
        with use_adapter(model, name):
            found[when] = (
                statistics.fmean(_text_nll(model, piece) for piece in pieces) if pieces else math.nan,
                _task_nlls(model, document.title, trained),
                _task_nlls(model, document.title, held_out),
                _text_nll(model, unrelated),
                _recalled(model, document.title, needles, config),
            )
    (text, old, new, other, named), after = found["before"], found["after"]
    return Symptoms(text, after[0], old, after[1], new, after[2], other, after[3], named, after[4])


def judge_symptoms(found: Symptoms) -> list[Finding]:
    """The rules, one a signature."""
    return [_needles(found), _irregular(found), _over_fitted(found), _forgetting(found), _not_found(found)]


# --- the rules --------------------------------------------------------------------------------------------------------


def _needles(found: Symptoms) -> Finding:
    before, after, count = sum(found.recalled_before), sum(found.recalled_after), len(found.recalled_after)
    if not count:
        return Finding(SIGNATURES[0], None, {}, "The text has no names, dates or numbers whose recall could be tested.")
    seen = after <= before
    text = f"Without text in the window {after} of {count} details are recalled (the base model: {before})"
    advice = "; for exact names, dates and numbers use --context retrieve." if seen else "."
    return Finding(SIGNATURES[0], seen, {"before": before / count, "after": after / count}, text + advice)


def _irregular(found: Symptoms) -> Finding:
    gains = _gains(found.held_out_before, found.held_out_after)
    if not gains:
        return Finding(SIGNATURES[1], None, {}, "The text is too short for questions that were not trained on.")
    worse, mean = sum(gain < 0 for gain in gains) / len(gains), statistics.fmean(gains)
    seen = mean > 0 and worse >= _WORSE
    text = f"Of {len(gains)} questions that were not trained on, {worse:.0%} have less likely answers after absorbing"
    text += f" (on average the answers gained {mean:+.2f} nats a token)"
    text += "; what is known depends on the question: ask in other words." if seen else "."
    return Finding(SIGNATURES[1], seen, {"worse": worse, "mean_gain": mean}, text)


def _over_fitted(found: Symptoms) -> Finding:
    trained = _gains(found.trained_before, found.trained_after)
    held_out = _gains(found.held_out_before, found.held_out_after)
    if not trained or not held_out:
        return Finding(SIGNATURES[2], None, {}, "There are no tasks to compare: it was absorbed from segments only.")
    own, other = statistics.fmean(trained), statistics.fmean(held_out)
    seen = own > _SMALL_GAIN and other < own / 2
    text = f"Answers to the tasks it was trained on gained {own:.2f} nats a token, to others about the same text {other:.2f}"
    text += "; it learnt the questions rather than the text: more kinds of tasks or fewer epochs help." if seen else "."
    return Finding(SIGNATURES[2], seen, {"trained_gain": own, "held_out_gain": other}, text)


def _forgetting(found: Symptoms) -> Finding:
    rise = found.unrelated_after / max(found.unrelated_before, 1e-9) - 1
    seen = rise > _FORGOTTEN
    text = f"The loss on an unrelated text changed by {rise:+.1%}"
    text += "; lower training.learning_rate or training.epochs." if seen else "."
    return Finding(SIGNATURES[3], seen, {"rise": rise}, text)


def _not_found(found: Symptoms) -> Finding:
    gains = _gains(found.held_out_before, found.held_out_after)
    if not gains or math.isnan(found.text_after):
        return Finding(SIGNATURES[4], None, {}, "The text is too short to tell whether questions find it.")
    gain = statistics.fmean(gains)
    seen = found.text_after < _KNOWN and gain < _SMALL_GAIN
    text = f"The text itself has a loss of {found.text_after:.2f} nats a token (before: {found.text_before:.2f}), and answers "
    text += f"to new questions gained {gain:+.2f}"
    text += "; it is known by heart and not found by questions: use tasks (tasks.writer)." if seen else "."
    return Finding(SIGNATURES[4], seen, {"text_loss": found.text_after, "held_out_gain": gain}, text)


def _gains(before: Sequence[float], after: Sequence[float]) -> list[float]:
    return [old - new for old, new in zip(before, after, strict=True) if math.isfinite(old - new)]


# --- measuring --------------------------------------------------------------------------------------------------------


def _pieces(tokens: Sequence[int], length: int) -> list[list[int]]:
    """Runs of tokens spread evenly over the document."""
    if len(tokens) < 2:
        return []
    last = max(0, len(tokens) - length)
    starts = sorted({last * index // (_PIECES - 1) for index in range(_PIECES)})
    return [list(tokens[start : start + length]) for start in starts]


@torch.inference_mode()
def _text_nll(model: Model, tokens: Sequence[int]) -> float:
    """Nats a token, of raw text."""
    ids = torch.tensor([list(tokens)], device=model.device)
    return float(model.loss_sum(ids, ids)) / max(1, len(tokens) - 1)


@torch.inference_mode()
def _task_nlls(model: Model, title: str, tasks: Sequence[Task]) -> list[float]:
    """Nats a token of each answer, without text in the window; NaN where the question fills the window."""
    made = [answer_example(model.tokenizer, title, task.question, task.answer, model.window) for task in tasks]
    found = [math.nan] * len(tasks)
    known = sorted((index for index, example in enumerate(made) if example), key=lambda index: len(made[index] or ()))
    for start in range(0, len(known), _ROWS):
        chosen = known[start : start + _ROWS]
        rows = [example for index in chosen if (example := made[index])]
        ids, labels = row_tensors(model, rows)
        network: Any = model.network
        scores = network(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(scores.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
        for index, row, loss in zip(chosen, rows, losses.tolist(), strict=True):
            found[index] = loss / row.targets
    return found


def _recalled(model: Model, title: str, needles: Sequence[Task], config: LiftConfig) -> list[bool]:
    """Whether the words of each detail are in the greedy answer."""
    prompts = [Prompt(question_prompt(model.tokenizer, title, needle.question)) for needle in needles]
    fitting = [index for index, prompt in enumerate(prompts) if len(prompt.tokens) + _ANSWER_TOKENS <= model.window]
    settings = config.answering.model_copy(update={"max_new_tokens": _ANSWER_TOKENS, "temperature": 0.0})
    said = {
        fitting[text.index]: text.text.casefold()
        for text in generate(model, [prompts[index] for index in fitting], settings, config.seed)
    }
    return [_detail(needles[index]) in said[index] for index in fitting]


def _detail(task: Task) -> str:
    return task.answer.casefold().strip(" .")
