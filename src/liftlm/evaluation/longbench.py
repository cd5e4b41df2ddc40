"""LongBench (version 1): its sixteen English and code tasks.

Dataset: THUDM/LongBench, test split. Prompts and lengths of answers: upstream's config/dataset2prompt.json and
dataset2maxlen.json, word for word (longbench.json, "prompt"). Metric: `longbench_score`, upstream's eval.py and
metrics.py: F1, ROUGE-L, accuracy or edit similarity by task, the best over the references; of trec, triviaqa and samsum
only the first line of an answer counts. Token F1 and ROUGE-L stand beside it, so that all question-answering sets share
two metrics. Truncation is the methods' business; as upstream's, that of `icl` joins head and tail without a mark.

"alone" in longbench.json is ours: upstream never asks without the context. It is the prompt without the context and
its label ("Story:", "The following are given passages.").
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from liftlm.documents import Document
from liftlm.errors import BenchmarkDataError
from liftlm.evaluation import metrics
from liftlm.evaluation.benchmark import Benchmark, Item, Question, draw
from liftlm.evaluation.data_rows import answers_of, gather_items, read_rows, text_of, texts_of
from liftlm.evaluation.hub import DataSource, find_data_file
from liftlm.prompts import Wording

_LIKE_THIS = 'A line is {"input": question, "context": document, "answers": […], "_id": …, "all_classes": null}.'
_NO_CHAT = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")
_RETRIEVAL = "passage_retrieval_en"


class LongBench(Benchmark):
    """A task; `longbench_task` makes the class of one."""

    dataset = "THUDM/LongBench (test)"
    source = "github.com/THUDM/LongBench"
    metrics = ("longbench_score", "token_f1", "rouge_l")
    middle = ""
    task: ClassVar[str]
    prompt: ClassVar[str]
    alone: ClassVar[str]
    asks: ClassVar[str]  # shown as the question where the prompt has no place for one
    chat_template: ClassVar[bool] = True  # upstream gives few-shot and code prompts to chat models as plain text

    def load(self, data: Path | None, *, limit: int | None = None, seed: int = 0) -> list[Item]:
        path = find_data_file(
            data,
            DataSource(
                names=(f"{self.task}.jsonl",),
                folders=("longbench", "LongBench", "data"),
                hub_id="THUDM/LongBench",
                patterns=("data.zip", f"*{self.task}.jsonl"),
            ),
        )
        return draw(gather_items(self._asked(read_rows(path, _LIKE_THIS))), limit, seed)

    def _asked(self, rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[Document, Question]]:
        for number, (where, row) in enumerate(rows, 1):
            identity = str(row.get("_id") or number)
            # The data has no titles, and the file name of a document is what is true of it.
            document = Document(f"LongBench {self.task} {identity}", text_of(row, "context", where), self.dataset)
            answers = answers_of(row.get("answers"), where)
            if self.task == _RETRIEVAL and not all(re.search(r"Paragraph \d+", answer) for answer in answers):
                raise BenchmarkDataError(f'{where}: an answer must be like "Paragraph 7".', _LIKE_THIS)
            classes = texts_of(row.get("all_classes"), "all_classes", where)
            yield (
                document,
                Question(
                    id=identity,
                    question=self.asks or text_of(row, "input", where),
                    answers=answers,
                    data={"all_classes": list(classes)} if classes else {},
                ),
            )

    def wording(self, document: Document, question: Question) -> Wording:
        before, _, after = self.prompt.partition("{context}")
        return Wording(
            *(part.replace("{input}", question.question) for part in (self.alone, before, after)),
        )

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """The task's own score, and two that all tasks share, of what counts of the answer."""
        classes = question.data.get("all_classes", ())
        own = metrics.longbench_score(self.task, answer, question.answers, classes)
        if self.task in metrics.LONGBENCH_FIRST_LINE:
            answer = metrics.first_line(answer)
        return {"longbench_score": own, **super().score(question, answer)}


def longbench_tasks() -> dict[str, type[LongBench]]:
    """Task → its class."""
    text = (resources.files("liftlm.evaluation") / "longbench.json").read_text(encoding="utf-8")
    return {task: _longbench_task(task, settings) for task, settings in json.loads(text).items()}


def _longbench_task(task: str, settings: dict[str, Any]) -> type[LongBench]:
    attributes = {
        "__doc__": f"LongBench's {task}.",
        "name": f"longbench/{task}",
        "task": task,
        "prompt": settings["prompt"],
        "alone": settings["alone"],
        "asks": settings.get("question", ""),
        "max_new_tokens": settings["max_new_tokens"],
        "chat_template": task not in _NO_CHAT,
    }
    return type(f"LongBench_{task}", (LongBench,), attributes)
