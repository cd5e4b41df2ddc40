"""Study: how good are written tasks, do they help, on which kinds of questions, and do they bias what is extracted?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from liftlm.config import LiftConfig
from liftlm.evaluation.benchmark import Item, Question
from liftlm.evaluation.blocks import Block, Heading, Paragraph
from liftlm.studies.bench import Bench, domain_of, with_settings
from liftlm.studies.drawing import bars
from liftlm.studies.grading import GRADES, agreement, read_sheet, write_sheet
from liftlm.studies.intervals import Verdict, difference, figure, gap, groups, share_above
from liftlm.studies.study import QUICK_SETTINGS, Arm, Conclusion, Drawing, Options, Row, Study
from liftlm.studies.tables import contrasts, in_words, shown, tabulate, where
from liftlm.studies.task_quality import question_class, set_row, task_row
from liftlm.tasks import Task
from liftlm.tasks.extractive import write_extractive_tasks
from liftlm.writing import ArrivingTasks

_JUDGED = 60  # tasks of each document and writer that are looked at one by one
_BLOCKS = 8  # of a document; every other one is asked about in the arm "tasks on one half"
_OF_A_TASK = ("faithful", "support", "answerable", "evidence_gain")
_OF_A_SET = (
    *("tasks", "covered", "distinct_questions", "distinct_pairs", "kind_entropy", "question_words", "answer_words"),
    *("share_factual", "share_causal", "share_temporal"),
)
_Select = Callable[[Mapping[str, Any]], bool]
ALL, EPOCHS, TOKENS, HALF = "tasks", "no tasks, equal epochs", "no tasks, equal tokens", "tasks on one half"


class Tasks(Study):
    """The extractive writer, and those of --writers (or tasks.writer). Arms are asked without and with text.

    Where there are two documents, every writer has its control: what was absorbed with tasks about the other document.
    """

    name = "tasks"
    title = "auxiliary tasks"
    claim = (
        "Training on questions written from the document makes it know the document better than its text alone does."
    )
    source = "2412.13626, section 3.2 (its own ablation: negligible or slightly worse), 2502.14644 v4 (central)"
    defaults: ClassVar[Mapping[str, Any]] = {"model.window": 2048}
    quick: ClassVar[Mapping[str, Any]] = QUICK_SETTINGS

    def prepare(self, item: Item, config: LiftConfig, options: Options) -> Item:
        """Questions with their class, and whether their evidence is in the half that the biased arm is asked about."""
        text = item.document.text
        return dataclasses.replace(item, questions=tuple(_marked(question, text) for question in item.questions))

    def measure(self, bench: Bench, index: int, seed: int) -> None:
        for writer in _writers(bench.config, bench.options):
            self._look(bench, index, seed, writer)
        super().measure(bench, index, seed)

    def arms(self, bench: Bench, item: Item, seed: int) -> Iterator[Arm]:
        index, methods = bench.items.index(item), ("lift", "lift+icl")
        control = ("lift-other",) if len(bench.items) > 1 else ()
        yield Arm("base model", ("closed-book", "icl"), once=True)
        for writer in _writers(bench.config, bench.options):
            values = {"writer": writer, "with": ALL}
            arm = Arm(f"{ALL} ({writer})", methods + control, _written_by(writer), values)
            yield arm
            if writer == "extractive":
                yield Arm(EPOCHS, methods, {"tasks.writer": "none"}, {"with": EPOCHS})
                budget = bench.training_tokens(arm, seed, index)
                settings = {"tasks.writer": "none", "training.total_tokens": budget}
                yield Arm(TOKENS, methods, settings, {"with": TOKENS})
                how = bench.config.tasks
                written = write_extractive_tasks(item.document.text, how.per_sentence, seed, how.answers)
                half = tuple(task for task in written if _in_asked_half(task.start, len(item.document.text)))
                if half:
                    yield Arm(HALF, ("lift",), {"tasks.writer": "extractive"}, {"with": HALF}, tasks=half)

    def _look(self, bench: Bench, index: int, seed: int, writer: str) -> None:
        """Rows about the tasks themselves."""
        item = bench.items[index]
        key = {"what": "set", "writer": writer, "seed": seed, "document_id": item.document.id}
        if bench.has(**key):
            return
        tasks = _written(bench, item, writer, seed)
        about = {"title": item.document.title, "domain": domain_of(item)}
        step = max(1, len(tasks) // (8 if bench.options.quick else _JUDGED))
        for number in range(0, len(tasks), step):
            own = key | {"what": "task", "number": number}
            if not bench.has(**own):
                row = task_row(bench.model, item.document, tasks[number])
                bench.add(own, about | row | {"unit": f"{writer}-{number}"})
        bench.add(key, about | set_row(tasks, item.document) | {"unit": "all"})  # last: it says that the tasks are done

    def conclude(self, rows: Sequence[Row], options: Options, folder: Path) -> Conclusion:
        tasks = [row for row in rows if row.get("what") == "task"]
        sets = [row for row in rows if row.get("what") == "set"]
        answers = [row for row in rows if row.get("what") is None]
        one, figures = tabulate(tasks, ("writer",), _OF_A_TASK)
        whole, more = tabulate(sets, ("writer",), _OF_A_SET)
        blocks: list[Block] = [Heading("Quality of the tasks"), one, whole, Paragraph(_EXPLAINED)]
        graded, of_graded = _graded(tasks, options, folder)
        blocks += graded
        table, of_arms = tabulate(answers, ("with", "writer", "method", "class"))
        pairs = {
            f"{kind}, {method}: {ALL} − {other}": (
                where(**{"with": ALL, "writer": "extractive", "method": method, "class": kind}),
                where(**{"with": other, "method": method, "class": kind}),
            )
            for method in ("lift", "lift+icl")
            for other in (EPOCHS, TOKENS)
            for kind in groups(answers, "class")
        }
        compared, of_pairs = contrasts(answers, pairs)
        between, of_writers = contrasts(answers, _of_writers(groups(answers, "writer")))
        bias, of_bias, words = _bias(answers)
        blocks += [Heading("Quality with and without tasks, by kind of question"), table, compared]
        blocks += [Heading("Writers, and knowledge against the control"), between]
        blocks += [Heading("Bias"), Paragraph(bias)]
        own = where(**{"with": ALL, "writer": "extractive", "method": "lift"})
        gain = difference(answers, "likelihood", own, where(**{"with": TOKENS, "method": "lift"}))
        outcome = share_above(gain, 0.0)
        verdict = Verdict(
            outcome, f"Tasks against none at equal tokens, no text: {in_words(outcome, gain, 'likelihood')}; {words}"
        )
        found = [*figures, *more, *of_graded, *of_arms, *of_pairs, *of_writers, *of_bias]
        return Conclusion(verdict, found, blocks, _drawings(answers))


_EXPLAINED = (
    "faithful: the writers' filters find the answer in its evidence. support: share of the answer's words that stand there. "
    "answerable: the evidence makes the base model likelier to give the answer, by evidence_gain nats a token. covered: share of "
    "the sentences that some task asks about. kind_entropy in bits."
)


def _writers(config: LiftConfig, options: Options) -> list[str]:
    """The extractive one, which all others are compared with, and those."""
    others = options.writers or (config.tasks.writer,)
    return list(dict.fromkeys(["extractive", *(writer for writer in others if writer != "none")]))


def _of_writers(writers: Sequence[str]) -> dict[str, tuple[_Select, _Select]]:
    """Each against the extractive one, and against its own control: the first is the worth of its tasks, the second knowledge."""

    def rows(writer: str, method: str) -> _Select:
        return where(**{"with": ALL, "writer": writer, "method": method})

    against = {
        f"{method}: {writer} − extractive": (rows(writer, method), rows("extractive", method))
        for method in ("lift", "lift+icl")
        for writer in writers
        if writer != "extractive"
    }
    control = {f"{writer}: lift − lift-other": (rows(writer, "lift"), rows(writer, "lift-other")) for writer in writers}
    return against | control


def _written(bench: Bench, item: Item, writer: str, seed: int) -> list[Task]:
    config = with_settings(bench.config, _written_by(writer) | {"seed": seed})
    with ArrivingTasks(item.document, bench.model, config, None, None) as arriving:
        return arriving.all()


def _written_by(writer: str) -> dict[str, Any]:
    """Settings; the `self` writer knows one form of answers only."""
    return {"tasks.writer": writer} | ({"tasks.answers": "auto"} if writer == "self" else {})


def _marked(question: Question, text: str) -> Question:
    at = text.find(question.evidence[0]) if question.evidence else -1
    asked = {} if at < 0 else {"asked": int(_in_asked_half(at, len(text)))}
    kind = question_class(question.kind, question.question)
    return dataclasses.replace(question, data={**question.data, **asked, "class": kind})


def _in_asked_half(start: int, characters: int) -> bool:
    return start * _BLOCKS // max(1, characters) % 2 == 0


def _bias(rows: Sequence[Row]) -> tuple[str, list[dict[str, Any]], str]:
    """Whether tasks about one half of the document help there and not, or to the cost of, the other half."""
    half = where(**{"with": HALF, "method": "lift"})
    none = where(**{"with": EPOCHS, "method": "lift"})
    found = {
        side: difference([row for row in rows if row.get("asked") == side], "likelihood", half, none) for side in (1, 0)
    }
    between = gap(rows, "likelihood", half, none, where(asked=1), where(asked=0))
    outcome = share_above(between, 0.0)
    text = (
        f"Tasks about every other eighth of the document only, against none: questions about the asked half gain "
        f"{shown('likelihood', found[1], sign=True)} nats a token (n = {found[1].units}), those about the other half "
        f"{shown('likelihood', found[0], sign=True)} (n = {found[0].units}); the difference is "
        f"{shown('likelihood', between, sign=True)}."
    )
    figures = [
        {"contrast": name, "metric": "likelihood"} | each.row()
        for name, each in (("asked half", found[1]), ("other half", found[0]), ("asked − other", between))
        if each.units
    ]
    words = {
        "confirmed": "what tasks ask about is learnt better than the rest (bias shown).",
        "not confirmed": "tasks about one half help the other as much (no bias shown).",
        "not decidable at this size": "whether tasks bias what is extracted is not decidable at this size.",
    }
    return text, figures, words[outcome]


def _graded(tasks: Sequence[Row], options: Options, folder: Path) -> tuple[list[Block], list[dict[str, Any]]]:
    """The sheet is written; where a person graded it, what that says."""
    path = write_sheet(folder, tasks, options.seeds[0])
    if options.graded is None:
        text = f"{path.name} holds tasks for a person to grade; the same command with --graded SHEET.csv reads it back."
        return [Heading("Graded by a person"), Paragraph(text)], []
    graded = read_sheet(options.graded, tasks)
    table, figures = tabulate(graded, ("writer",), [f"human_{name}" for name in GRADES])
    agreed = [
        f"{name}: {figure(agreement(graded, name), 'agreed').shown(2)}"
        for name in GRADES[:2]
        if agreement(graded, name)
    ]
    text = f"{len(graded)} tasks. Share on which the person and the program agree: {'; '.join(agreed) or 'none'}."
    return [Heading("Graded by a person"), table, Paragraph(text)], figures


def _drawings(rows: Sequence[Row]) -> list[Drawing]:
    chosen = [row for row in rows if row["method"] in ("lift", "closed-book")]
    arms = {name: {"with": name if name != "base model" else None} for name in ("base model", EPOCHS, TOKENS)}
    arms |= {f"{ALL} ({writer})": {"with": ALL, "writer": writer} for writer in groups(chosen, "writer")}
    arms[HALF] = {"with": HALF}
    series = {
        kind: {name: figure(chosen, "likelihood", where(**of, **{"class": kind})) for name, of in arms.items()}
        for kind in groups(rows, "class")
    }
    return [
        Drawing("classes", "Likelihood of the answers without text, by kind of question", bars(series, "nats a token"))
    ]
