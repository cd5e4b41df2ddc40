"""What a model says by heart: a beam search for beginnings like transformers' own, each followed greedily to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FAMILIES, load_in_float32, save_model
from liftlm import Document, absorb, answer, load_config
from liftlm.batching import end_tokens
from liftlm.config import AnsweringConfig
from liftlm.context import WindowText
from liftlm.generating import Prompt, generate
from liftlm.prompts import question_prompt
from liftlm.reciting import likeliest_beginnings, recite
from liftlm.tasks.rewording import reworded

TEXT = (
    "The bell of the old town rang on the lake. The ferryman counted forty-one silver marks in the snow. Nobody came."
)


def reciting(**how: int) -> AnsweringConfig:
    return AnsweringConfig.model_validate({"context": "recite", "recitation": how})


def prompt_of(model: Any) -> list[int]:
    tokens: list[int] = model.encode("Who rang the bell in the snow? Answer:")
    return tokens


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gpt2"]
)  # with a decoder of our own, packed, sliding windows
def test_beginnings_are_those_of_transformers_beam_search(family: str, tmp_path: Path) -> None:
    assert family in FAMILIES
    model = load_in_float32(save_model(tmp_path, family))
    prompt = prompt_of(model)
    for beams, length in ((1, 3), (4, 1), (5, 4)):
        expected: Any = model.network.generate(  # type: ignore[operator]
            input_ids=torch.tensor([prompt]),
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=length,
            min_new_tokens=length,  # there one that ends early leaves the beam
            length_penalty=0.0,
            do_sample=False,
        )
        found = likeliest_beginnings(model, prompt, beams, length)
        ends = end_tokens(model)
        assert not any(set(tokens) & ends for tokens in found)  # those go by another rule than transformers'
        assert found == [row[len(prompt) :].tolist() for row in expected]


def test_one_that_ends_stays_as_it_is(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """p(A) = 0.4, p(end) = 0.6 at once; after A the two again."""
    end, a = tiny_model.tokenizer.eos_token_id, 40

    def after(model: Any, network: Any, prompt: Any, beginnings: Any, cache: Any) -> torch.Tensor:
        logits = torch.full((len(beginnings), 320), -100.0)
        logits[:, end], logits[:, a] = torch.tensor([0.6, 0.4]).log()
        return logits

    monkeypatch.setattr("liftlm.reciting._after", after)
    found = likeliest_beginnings(tiny_model, [5, 6], 3, 3)
    assert found == [[end], [a, end], [a, a, end]]  # 0.6, 0.24, 0.096; [a, a, a] has 0.064
    assert likeliest_beginnings(tiny_model, [5, 6], 1, 3) == [[end]]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_each_is_followed_greedily(family: str, tmp_path: Path) -> None:
    model = load_in_float32(save_model(tmp_path, family))
    prompt = prompt_of(model)
    settings = reciting(beams=4, beginning_tokens=2, rest_tokens=6)
    texts = recite(model, prompt, settings)
    whole = []
    for begun in likeliest_beginnings(model, prompt, 4, 2):
        (told,) = generate(model, [Prompt([*prompt, *begun])], settings.model_copy(update={"max_new_tokens": 6}), 0)
        whole.append(" ".join(model.decode([*begun, *told.ids]).split()))
    assert texts == list(dict.fromkeys(text for text in whole if text))
    assert len(texts) > 1
    (greedy,) = generate(model, [Prompt(prompt)], settings.model_copy(update={"max_new_tokens": 8}), 0)
    (alone,) = recite(model, prompt, reciting(beams=1, beginning_tokens=2, rest_tokens=6))
    assert alone == " ".join(greedy.text.split())


def test_the_same_question_in_other_words_adds_a_few_texts(tiny_model: Any) -> None:
    prompt, other = prompt_of(tiny_model), tiny_model.encode("What is said about the bell? Answer:")
    settings = reciting(beams=4, beginning_tokens=2, rest_tokens=6)
    expected = [
        *recite(tiny_model, prompt, settings),
        *recite(tiny_model, other, reciting(beams=3, beginning_tokens=2, rest_tokens=6)),
    ]
    assert recite(tiny_model, prompt, settings, [other]) == list(dict.fromkeys(expected))
    assert len(set(expected)) > 4


def test_the_window_shows_what_was_recited_and_nothing_of_the_text() -> None:
    def characters(text: str) -> list[int]:
        return [ord(character) for character in text]

    said = ["The miller moved to Arden.", "A fire took the mill in May.", "Nobody came."]
    given = {said[0]: 3.0, said[1]: 14.0, said[2]: 9.0}

    def recited(question: str) -> list[str]:
        return said if "mill" in question else []

    def shown(
        budget: int = 1000, judge: Any = lambda question, texts: [given[text] for text in texts], **how: Any
    ) -> Any:
        settings = AnsweringConfig.model_validate({"context": "recite", "retrieval": how})
        text = WindowText("Quite another text about a mill.", characters, settings, judge, recited)
        assert not text.for_all
        chosen = "".join(map(chr, text.select("Where is the miller?", budget)))
        assert text.select("Who knows nothing?", 1000) == []
        return chosen, text.sources("Where is the miller?")

    assert shown(count=1) == (said[1], (said[1],))
    assert shown(count=2, margin=5) == (f"{said[1]}\n...\n{said[2]}", (said[1], said[2]))
    assert shown(count=2, margin=4.9) == (said[1], (said[1],))
    assert shown(count=None, margin=None)[1] == (said[1], said[2], said[0])
    assert shown(budget=len(said[1]) + 5, count=2)[1] == (said[1],)
    assert shown(budget=5, count=2) == ("", ())
    assert shown(judge=None, count=1) == (said[0], (said[0],))  # the likeliest beginning


def test_answers_come_from_the_adapter_alone(tiny_model: Any) -> None:
    training = [
        "training.epochs=4",
        "training.learning_rate=0.01",
    ]  # enough for this model to say something else than before
    recitation = ["answering.context=recite", "answering.max_new_tokens=8", "answering.recitation.beams=3"]
    config = load_config(None, [*recitation, *training])
    adapter = absorb(Document("bell", TEXT), tiny_model, config)
    given = answer(tiny_model, adapter, "Who counted?", config=config)
    other = Document("bell", "Something else entirely, which is never looked at.")
    again = answer(tiny_model, adapter, "Who counted?", document=other, config=config)
    assert (given.method, given.answer, given.sources) == ("lift+recite", again.answer, again.sources)
    assert given.context_tokens > 0 and given.sources
    base = answer(tiny_model, None, "Who counted?", document=other, config=config)
    assert base.method == "recite" and base.sources != given.sources


def test_an_answer_recites_after_rewordings_too(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recited(model: Any, prompt: Any, settings: Any, others: Any) -> list[str]:
        asked.extend([prompt, *others])
        return ["The ferryman counted."]

    monkeypatch.setattr("liftlm.answering.recite", recited)
    for rewordings in (0, 2):
        wanted = [
            "answering.context=recite",
            "answering.max_new_tokens=4",
            f"answering.recitation.rewordings={rewordings}",
        ]
        answer(
            tiny_model,
            None,
            "Who counted silver marks?",
            document=Document("bell", TEXT),
            config=load_config(None, wanted),
        )
    questions = ["Who counted silver marks?"] * 2 + reworded("Who counted silver marks?", 2)
    assert asked == [question_prompt(tiny_model.tokenizer, "bell", question) for question in questions]
    assert len(questions) == 4
