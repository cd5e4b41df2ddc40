"""The papers' recipes, configs/lift-*.yaml: each absorbs a document for real, with its own numbers and a small model."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

import liftlm.writing
from conftest import save_model
from fake_server import FakeServer
from liftlm import Document, Library, load_config, load_model
from liftlm.absorbing import Adapter
from liftlm.generating import Generated, Prompt
from liftlm.models import Model
from liftlm.segments import split_into_segments
from liftlm.tasks.extractive import write_extractive_tasks
from liftlm.training import StepMetrics
from test_config import CONFIGS
from test_tasks_llm import document as sentences

SENTENCES = 12
DOCUMENT = Document(title="The mill", text=sentences(SENTENCES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for the papers' rank of 128."""
    return save_model(tmp_path_factory.mktemp("models") / "wide", window=4096, seed=1, width=160)


# arXiv 2412.13626 and 2502.14644 v4, and their authors' code: what is not the default, or must not follow a default that changes
SEGMENTS = {"segments.segment_tokens": 2048, "segments.stride_tokens": 768, "segments.overlap_tokens": 1280}
ONE_STEP = {"training.batch_tokens": 10**9, "training.schedule": "constant", "training.warmup_fraction": 0.0}
ADAMW = {"training.weight_decay": 1e-4, "training.beta1": 0.9, "training.beta2": 0.98, "training.eps": 1e-8}
ADAMW |= {"training.max_grad_norm": 1.0}
TASKS_ONLY = {"tasks.writer": "llm", "tasks.mix": 1.0, "tasks.reading": 0.0, "tasks.sentences_together": 1}
WIDE_LORA = {
    "adapter.kind": "lora",
    "adapter.rank": 128,
    "adapter.alpha": 256.0,
    "adapter.target_modules": "all-linear",
}
SHOWN = {"answering.context": "truncate"}
PAPERS: dict[str, dict[str, Any]] = {
    "lift-segments-v1": SEGMENTS
    | ONE_STEP
    | ADAMW
    | SHOWN
    | {"adapter.kind": "full", "tasks.writer": "none", "training.epochs": 5, "training.learning_rate": 3e-6},
    "lift-v1": SEGMENTS
    | ONE_STEP
    | ADAMW
    | SHOWN
    | {"tasks.writer": "self", "tasks.requests": 10, "tasks.sentences_together": 16, "tasks.per_sentence": 1}
    | {"tasks.first_epoch": 2, "tasks.reading": 1.0, "tasks.show": "truncate", "tasks.mix": None}
    | {"adapter.kind": "lora", "adapter.rank": 128, "adapter.alpha": 128.0, "adapter.initialization": "pissa"}
    | {"adapter.target_modules": "all-linear", "training.epochs": 5, "training.learning_rate": 1e-5},
    "lift-v4": TASKS_ONLY
    | WIDE_LORA
    | SHOWN
    | {"tasks.per_sentence": 10, "training.epochs": 5, "training.learning_rate": 5e-5},
    "lift-v4-fast": TASKS_ONLY
    | WIDE_LORA
    | SHOWN
    | {"tasks.per_sentence": 1, "training.epochs": 1, "training.learning_rate": 3e-4},
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_numbers_are_the_papers(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert {key: operator.attrgetter(key)(config) for key in PAPERS[name]} == PAPERS[name]


def test_every_recipe_of_the_papers_is_checked() -> None:
    assert {path.stem for path in CONFIGS.glob("lift-*.yaml")} == set(PAPERS)


def test_segments_begin_768_tokens_apart() -> None:
    """As the first version cuts them: so long a document that none has to be moved."""
    settings = load_config(CONFIGS / "lift-v1.yaml").segments
    made = split_into_segments(range(2048 + 3 * 768), settings.segment_tokens, settings.overlap_tokens)
    assert [(segment.tokens[0], len(segment.tokens)) for segment in made] == [(768 * n, 2048) for n in range(4)]


@pytest.mark.usefixtures("quick_asking")
@pytest.mark.parametrize(
    ("name", "per_sentence", "epochs", "rate"), [("lift-v4", 10, 5, 5e-5), ("lift-v4-fast", 1, 1, 3e-4)]
)
def test_the_icml_version(folder: Path, name: str, per_sentence: int, epochs: int, rate: float) -> None:
    """Tasks only, so many a sentence, from a server; rank 128, alpha 256."""
    seen: list[StepMetrics] = []
    model = load_model(str(folder))
    with FakeServer() as server:
        config = load_config(
            CONFIGS / f"{name}.yaml",
            [f"tasks.llm.base_url={server.url}", "tasks.llm.model=writer-1", "training.warmup_fraction=0"],
        )
        adapter, new = Library().absorb_once(DOCUMENT, model, config, on_step=seen.append)
        assert new
    assert len(server.requests) == SENTENCES
    assert adapter.tasks == per_sentence * SENTENCES
    assert adapter.config.tasks.mix == 1
    assert len(adapter.report.epoch_losses) == epochs
    assert max(step.learning_rate for step in seen) == pytest.approx(rate, rel=0.05)
    assert seen[-1].loss < seen[0].loss
    assert stored(adapter) == (128, 256)


@pytest.mark.usefixtures("quick_asking")
def test_the_recipe_for_answers_without_text(folder: Path) -> None:
    """Six pairs a sentence of both forms, from a server, beside the segments, four times."""
    with FakeServer() as server:
        config = load_config(
            CONFIGS / "recall-llm.yaml", [f"tasks.llm.base_url={server.url}", "tasks.llm.model=writer-1"]
        )
        adapter, _ = Library().absorb_once(DOCUMENT, load_model(str(folder)), config)
    assert len(server.requests) == SENTENCES and adapter.tasks == 6 * SENTENCES
    assert all("By turns, an answer is a few words" in body["messages"][0]["content"] for body in server.requests)
    assert len(adapter.report.epoch_losses) == 4 and adapter.report.epoch_losses[-1] < adapter.report.epoch_losses[0]


def test_the_recipe_for_answers_without_text_or_server(folder: Path) -> None:
    """Details alone as answers, four times; most of what a plain text is asked is asked as people would."""
    document = Document(
        "The mill",
        "The miller sold nine sacks to Mara Olsen in March 1702. The town built a wheel of oak near the ford. In 1710 the old "
        "wheel broke in the ice. Mara Olsen bought the mill for sixty marks. The council paid a boy to watch the weir.",
    )
    config = load_config(CONFIGS / "recall-short.yaml")
    tasks = write_extractive_tasks(document.text, config.tasks.per_sentence, config.seed, config.tasks.answers)
    adapter, _ = Library().absorb_once(document, load_model(str(folder)), config)
    assert adapter.tasks == len(tasks)
    short = [task for task in tasks if len(task.answer.split()) <= 4]
    assert len(short) > len(tasks) / 2
    assert (
        sum(task.question.split()[0] in ("Who", "What", "When", "Where", "How", "Which") for task in short)
        > len(short) / 2
    )
    assert len(adapter.report.epoch_losses) == 4 and adapter.report.epoch_losses[-1] < adapter.report.epoch_losses[0]


def test_the_first_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of segments, then three of both; ten tasks from runs of 16 sentences, written by the model itself."""
    document = Document(title="The mill", text=sentences(40))
    asked: list[Prompt] = []

    def write(model: Model, prompts: Sequence[Prompt], settings: Any, seed: int) -> Iterator[Generated]:
        asked.extend(prompts)
        for index, prompt in enumerate(prompts):
            words = model.decode(prompt.tokens).rpartition("Sentences: ")[2].split()
            yield Generated(index, f"Who carried {words[2]} sacks?", 9, 0.1, True)

    class Judge:
        def __init__(self, model: Model, title: str) -> None: ...

        def relevance(self, question: str, sentences: Sequence[str]) -> list[float]:
            return [9.0 if set(question.split()) & set(text.split()[2:3]) else 0.0 for text in sentences]

    monkeypatch.setattr(liftlm.writing, "generate", write)
    monkeypatch.setattr(liftlm.writing, "Ranker", Judge)
    seen: list[StepMetrics] = []
    model = load_model(str(folder))
    adapter, new = Library().absorb_once(document, model, load_config(CONFIGS / "lift-v1.yaml"), on_step=seen.append)
    assert new
    assert len(asked) == 10
    assert all(
        model.decode(prompt.tokens).rpartition("Sentences: ")[2].partition("\n")[0].count(".") == 16 for prompt in asked
    )
    assert adapter.tasks == 10
    assert {step.learning_rate for step in seen} == {1e-5}
    assert [step.epoch for step in seen] == [1, 2, 3, 3, 4, 5], "one step an epoch, and one more where tasks arrive"
    rank, alpha = stored(adapter)
    assert rank == 256 and alpha == 256, "PiSSA is kept as a plain LoRA of twice the rank, at the same scale"


def stored(adapter: Adapter) -> tuple[int, float]:
    """Rank and alpha, as PEFT reads them from the library."""
    config: Any = PeftConfig.from_pretrained(str(Library().path / adapter.id / "adapter"))
    return config.r, config.lora_alpha
