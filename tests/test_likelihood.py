"""Likelihoods equal a plain forward pass, and an adapter that learnt a document ranks its sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import FAMILIES, save_model
from liftlm import Document, LiftConfig, absorb, answer_all, load_config, load_model
from liftlm.adapters import use_adapter
from liftlm.likelihood import Ranker, continuation_nlls
from liftlm.prompts import question_turn, render_prompt
from liftlm.tasks import Task


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_one_plain_forward_pass_each(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(save_model(tmp_path / "m", family)))
    prompt = [5, 17, 40, 3, 99, 12]
    texts = [[7, 8], [9], [30, 31, 32, 33, 34], *([[index % 90 + 5, 11, 12] for index in range(20)])]
    got = continuation_nlls(model, prompt, texts)
    for tokens, value in zip(texts, got, strict=True):
        with torch.no_grad():
            logits = model.network(input_ids=torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
        expected = -sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens))
        assert value == pytest.approx(expected, rel=1e-4), tokens
    assert continuation_nlls(model, prompt, []) == []
    monkeypatch.setattr("liftlm.likelihood._ROW_TOKENS", 8)  # several rows, and a text that fills more than one
    monkeypatch.setattr("liftlm.likelihood._HEAD_TOKENS", 3)
    again = continuation_nlls(model, prompt, [*texts, list(range(20, 32))])
    assert again[: len(got)] == pytest.approx(got, rel=1e-4) and again[-1] > 0


SENTENCES = [
    "Mara Quill cast the bell from old coins.",
    "The storm of May broke the north tower.",
    "Oswin Tarrel rowed the ferry for nine years.",
    "Nobody mended the bridge before autumn.",
]
QUESTIONS = ["Who cast it?", "What broke?", "Who rowed?", "What of the bridge?"]


def test_an_adapter_ranks_by_what_it_learnt(tiny_folder: Path) -> None:
    """Questions and sentences share no words that BM25 could use; the pairs were trained on."""
    model = load_model(str(tiny_folder))
    text = " ".join(SENTENCES)
    tasks = []
    for question, sentence in zip(QUESTIONS, SENTENCES, strict=True):
        start = text.index(sentence)
        tasks.append(Task(question, sentence, "given", start, start + len(sentence)))
    config = load_config(
        None,
        [
            "training.epochs=60", "training.learning_rate=0.01", "training.batch_tokens=4096", "tasks.mix=1",
            "answering.context=retrieve", "answering.retrieval.count=1", "answering.retrieval.neighbours=0",
            "answering.max_new_tokens=4",
        ],
    )  # fmt: skip
    adapter = absorb(Document(title="Bell", text=text), model, config, tasks=tasks)
    with use_adapter(model, adapter.id):
        for index, question in enumerate(QUESTIONS):
            scores = Ranker(model, "Bell").relevance(question, SENTENCES)
            assert max(range(4), key=scores.__getitem__) == index, (question, scores)
    asked = "Zyx?"  # BM25 knows nothing, and would show the beginning
    off = load_config(None, ["answering.retrieval.rerank=0"]).answering.retrieval
    plain = config.model_copy(
        update={
            "answering": config.answering.model_copy(
                update={"retrieval": off.model_copy(update={"count": 1, "neighbours": 0})}
            )
        }
    )
    for index, question in enumerate(["Who rowed?", "What of the bridge?"], 2):
        (with_adapter,) = answer_all(model, adapter, [question], config=config)
        assert with_adapter.context_tokens == len(model.encode(SENTENCES[index]))
    (without,) = answer_all(model, adapter, [asked], config=plain)
    assert without.context_tokens == len(model.encode(SENTENCES[0]))
    assert LiftConfig().answering.retrieval.rerank > 0


def test_relevance_is_the_difference_of_two_likelihoods(tiny_model: object) -> None:
    model: object = tiny_model
    texts = ["A bell.", "The ferry was late again."]
    ranker = Ranker(model, "T")  # type: ignore[arg-type]
    assert ranker.relevance("What?", texts[:1]) != ranker.relevance("Who?", texts[:1])
    got = ranker.relevance("Who?", texts)
    for text, value in zip(texts, got, strict=True):
        parts = []
        for question in ("Who?", "What does the text say?"):
            prompt = render_prompt(model.tokenizer, [question_turn(model.tokenizer, "T", question)])  # type: ignore[attr-defined]
            parts.append(continuation_nlls(model, prompt, [model.encode(text)])[0])  # type: ignore[arg-type, attr-defined]
        assert value == pytest.approx(parts[1] - parts[0], rel=1e-3, abs=1e-3)
