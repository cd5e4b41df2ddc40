"""Answers do not depend on how they are batched, streamed or which adapter was on before; costs are counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FAMILIES, save_model
from liftlm import Conversation, Document, LiftConfig, answer, answer_all, load_config, load_model
from liftlm.answering import check_questions, method_name
from liftlm.errors import ConfigError, QuestionTooLongError
from liftlm.prompts import question_turn, render_prompt

DOCUMENT = Document(title="Corriden", text="The ferryman Oswin Tarrel rang the bell of Corriden on 3 May 1743. " * 40)
QUESTIONS = ["Who rang?", "When did the bell ring, and where was the ferryman then?", "Why?", "How many marks?"]


def settings(*more: str) -> LiftConfig:
    return load_config(None, ["answering.max_new_tokens=12", *more])


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """One token after the other from full forward passes: no cache, no padding, no generate()."""
    tokens, ends = list(prompt), {model.tokenizer.eos_token_id, 2}
    for _ in range(count):
        with torch.no_grad():
            token = int(model.network(torch.tensor([tokens])).logits[0, -1].argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("context", ["none", "truncate"])
def test_batched_answers_equal_naive_decoding(family: str, context: str, tmp_path: Path) -> None:
    model = load_model(str(save_model(tmp_path / "m", family)))
    config = settings(f"answering.context={context}")
    given = answer_all(model, None, QUESTIONS, document=DOCUMENT, config=config)
    assert [a.question for a in given] == QUESTIONS
    text = model.encode(DOCUMENT.text)
    mark = model.encode("\n...\n")
    for question, result in zip(QUESTIONS, given, strict=True):
        used = []
        if context == "truncate":
            half = result.context_tokens - len(mark)
            used = [*text[: half - half // 2], *mark, *text[-(half // 2) :]]
        prompt = render_prompt(model.tokenizer, [question_turn(model.tokenizer, "Corriden", question, used)])
        expected = greedy(model, prompt, 12)
        assert (result.answer, result.answer_tokens) == (model.decode(expected).strip(), len(expected))
        assert result.prompt_tokens == len(prompt)
        assert len(prompt) + 12 <= model.window


def test_the_window_is_used_well_but_never_exceeded(tiny_model: Any) -> None:
    results = answer_all(tiny_model, None, QUESTIONS, document=DOCUMENT, config=settings("answering.context=truncate"))
    for result in results:
        assert result.method == "icl"
        assert tiny_model.window - 12 - 64 <= result.prompt_tokens <= tiny_model.window - 12
    short = Document(title="Short", text="A bell.")
    (whole,) = answer_all(tiny_model, None, ["Who?"], document=short, config=settings("answering.context=truncate"))
    assert whole.context_tokens == len(tiny_model.encode(short.text))


def test_shared_text_is_computed_once_for_questions_of_like_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liftlm.batching import Network

    model = load_model(str(save_model(tmp_path / "m", window=512)))
    config = settings("answering.context=truncate")
    questions = ["Who rang?", "Who sang?", "Who rang it?"]
    alone = [answer(model, None, q, document=DOCUMENT, config=config) for q in questions]
    computed: list[int] = []
    for name in ("fill", "compute", "compute_apart"):
        _count_tokens(monkeypatch, Network, name, computed)
    together = answer_all(model, None, questions, document=DOCUMENT, config=config)
    assert [a.answer for a in together] == [a.answer for a in alone]
    text = alone[0].context_tokens
    assert text > 256 and text < sum(computed) < text + sum(a.prompt_tokens - text for a in alone)


def _count_tokens(monkeypatch: pytest.MonkeyPatch, network: Any, name: str, computed: list[int]) -> None:
    original = getattr(network, name)

    def counted(self: Any, tokens: Any, *rest: Any, **options: Any) -> Any:
        computed.append(sum(map(len, tokens)) if name == "compute_apart" else len(tokens))
        return original(self, tokens, *rest, **options)

    monkeypatch.setattr(network, name, counted)


def test_retrieved_text_is_chosen_for_each_question(tiny_model: Any) -> None:
    text = "The bell hung in Corriden. A storm broke it in spring. Mara Quill cast another one from old coins."
    document = Document(title="Bell", text=text)
    config = settings(
        "answering.context=retrieve", "answering.retrieval.count=1", "answering.retrieval.neighbours=0",
        "answering.retrieval.rerank=0",
    )  # fmt: skip
    first, second = answer_all(tiny_model, None, ["storm?", "Mara Quill?"], document=document, config=config)
    assert first.method == second.method == "rag" and first.context == "retrieve"
    assert first.context_tokens == len(tiny_model.encode("A storm broke it in spring."))
    assert second.context_tokens == len(tiny_model.encode("Mara Quill cast another one from old coins."))
    assert second == dataclasses.replace(
        answer(tiny_model, None, "Mara Quill?", document=document, config=config), seconds=second.seconds
    ), "alone as among others"
    talk = Conversation(tiny_model, None, document=document, config=config)
    assert talk.ask("storm?").context_tokens == first.context_tokens
    asked = talk.ask("Mara Quill?")
    assert asked.context_tokens == second.context_tokens, "chosen for the newest question"
    assert asked.sources == second.sources == ("Mara Quill cast another one from old coins.",)


def test_small_batches_give_the_same_answers(tiny_model: Any) -> None:
    together = answer_all(tiny_model, None, QUESTIONS, document=DOCUMENT, config=settings("answering.context=truncate"))
    apart = answer_all(
        tiny_model,
        None,
        QUESTIONS,
        document=DOCUMENT,
        config=settings("answering.context=truncate", "answering.batch_tokens=1"),
    )
    alone = [
        answer(tiny_model, None, q, document=DOCUMENT, config=settings("answering.context=truncate")) for q in QUESTIONS
    ]
    assert [a.answer for a in together] == [a.answer for a in apart] == [a.answer for a in alone]


def test_answers_are_told_as_they_end_and_streamed_text_adds_up(tiny_model: Any) -> None:
    heard: list[int] = []
    answer_all(
        tiny_model,
        None,
        QUESTIONS,
        document=DOCUMENT,
        config=settings("answering.context=none"),
        on_answer=lambda index, given: heard.append(index),
    )
    assert sorted(heard) == [0, 1, 2, 3]
    parts: list[str] = []
    given = answer(
        tiny_model, None, "Who?", document=DOCUMENT, config=settings("answering.context=none"), on_text=parts.append
    )
    assert "".join(parts).strip() == given.answer and len(parts) > 0
    with pytest.raises(ValueError):
        answer_all(tiny_model, None, QUESTIONS, document=DOCUMENT, on_text=parts.append)


def test_sampling_depends_on_the_seed_only(tiny_model: Any) -> None:
    def sample(seed: int) -> list[str]:
        config = settings("answering.temperature=1.5", "answering.context=none", f"seed={seed}")
        return [a.answer for a in answer_all(tiny_model, None, QUESTIONS, document=DOCUMENT, config=config)]

    torch.manual_seed(99)
    first = sample(1)
    torch.manual_seed(7)
    assert sample(1) == first
    assert sample(2) != first
    greedy_answers = answer_all(
        tiny_model, None, QUESTIONS, document=DOCUMENT, config=settings("answering.context=none")
    )
    assert first != [a.answer for a in greedy_answers]


def test_a_question_that_does_not_fit_is_refused_before_any_work(tiny_model: Any) -> None:
    long = "Why " * 300 + "?"
    for call in (
        lambda: check_questions(tiny_model, DOCUMENT, ["Who?", long], settings()),
        lambda: answer(tiny_model, None, long, document=DOCUMENT, config=settings()),
    ):
        with pytest.raises(QuestionTooLongError, match="more than the window of 256") as caught:
            call()
        assert "--window" in caught.value.next_step


def test_a_question_needs_something_to_be_about(tiny_model: Any) -> None:
    with pytest.raises(ConfigError):
        answer(tiny_model, None, "Who?")


def test_a_model_without_chat_template_stops_before_it_asks_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liftlm import generating

    model = load_model(str(save_model(tmp_path / "m", chat=False)))
    text = " The bell.\nQuestion: And then?"
    assert generating._finish(model, model.encode(text), ["\nQuestion:"])[0] == "The bell."


def test_conversation_keeps_turns_until_the_window_is_full(tiny_model: Any) -> None:
    talk = Conversation(tiny_model, None, document=DOCUMENT, config=settings("answering.context=truncate"))
    first = talk.ask("Who rang the bell?")
    assert (
        first.answer
        == answer(
            tiny_model, None, "Who rang the bell?", document=DOCUMENT, config=settings("answering.context=truncate")
        ).answer
    )
    second = talk.ask("And when?")
    assert second.context_tokens < first.context_tokens or second.prompt_tokens > first.prompt_tokens
    assert talk.turns == 2
    for index in range(8):
        given = talk.ask(f"And what came after number {index}?")
        assert given.prompt_tokens + 12 <= tiny_model.window
    assert 1 <= talk.turns < 10
    before = talk.turns
    with pytest.raises(QuestionTooLongError):
        talk.ask("Why " * 300)
    assert talk.turns == before  # the conversation goes on unchanged
    assert talk.ask("Who?").prompt_tokens + 12 <= tiny_model.window


def test_method_names() -> None:
    assert method_name(None, "none") == "closed-book"
    assert method_name(None, "truncate") == "icl"
    assert method_name(None, "retrieve") == "rag"
