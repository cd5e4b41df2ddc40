"""Questions → answers: prompt, generate, report. One question or many at once, streamed or not, with or without an adapter.

Knows nothing of how adapters are made or stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from liftlm.absorbing import Adapter
from liftlm.adapters import use_adapter
from liftlm.config import AnsweringConfig, ContextPolicy, LiftConfig
from liftlm.context import MARK, WindowText
from liftlm.documents import Document
from liftlm.errors import ConfigError, QuestionTooLongError
from liftlm.generating import Generated, OnText, generate
from liftlm.likelihood import Ranker
from liftlm.models import Model
from liftlm.prompts import question_prompt, question_wording
from liftlm.reciting import recite
from liftlm.tasks.rewording import reworded
from liftlm.windows import FilledWindow, fill_window

Method = Literal["closed-book", "icl", "rag", "recite", "lift", "lift+icl", "lift+rag", "lift+recite"]


@dataclass(frozen=True)
class Answer:
    """An answer and what it took. seconds: of a batch, this answer's equal share."""

    question: str
    answer: str
    method: Method
    context: ContextPolicy
    prompt_tokens: int
    context_tokens: int  # of the document, inside the prompt
    answer_tokens: int
    seconds: float
    sources: tuple[str, ...] = ()  # sentences (or segments) that `retrieve` found or `recite` said, the best first


def answer(
    model: Model,
    adapter: Adapter | None,
    question: str,
    *,
    document: Document | None = None,
    config: LiftConfig | None = None,
    on_text: OnText | None = None,
) -> Answer:
    """Answers one question. Without an adapter the base model answers (about `document`); `on_text` hears the text as it comes.

    Raises QuestionTooLongError where the question alone does not fit the window.
    """
    return answer_all(model, adapter, [question], document=document, config=config, on_text=on_text)[0]


def answer_all(
    model: Model,
    adapter: Adapter | None,
    questions: Sequence[str],
    *,
    document: Document | None = None,
    config: LiftConfig | None = None,
    on_text: OnText | None = None,
    on_answer: Callable[[int, Answer], None] = lambda index, answer: None,
) -> list[Answer]:
    """Answers many questions in batches; answers come back in the order of the questions (`on_answer` hears them as they end)."""
    if on_text is not None and len(questions) != 1:
        raise ValueError("on_text streams a single answer")
    document = _document(adapter, document)
    settings = (config or (adapter.config if adapter else LiftConfig())).answering
    seed = (config or LiftConfig()).seed
    text = window_text(model, adapter, document, settings)
    prompts = [fill_question(model, document, question, text, settings) for question in questions]
    answers: dict[int, Answer] = {}
    with use_adapter(model, adapter.id if adapter else None, strength=acting_strength(settings)):
        for generated in generate(model, prompts, settings, seed, on_text):
            index = generated.index
            answers[index] = _answer(questions[index], prompts[index], generated, adapter, settings, text)
            on_answer(index, answers[index])
    return [answers[index] for index in range(len(questions))]


def check_questions(model: Model, document: Document, questions: Sequence[str], config: LiftConfig) -> None:
    """Raises QuestionTooLongError for a question that will not fit the window, before any work is done for it."""
    nothing = WindowText("", model.encode, config.answering)
    for question in questions:
        fill_question(model, document, question, nothing, config.answering)


class Conversation:
    """Questions and answers that refer to each other. Old turns leave when the window is full; the text gets what is left."""

    def __init__(
        self,
        model: Model,
        adapter: Adapter | None,
        *,
        document: Document | None = None,
        config: LiftConfig | None = None,
    ) -> None:
        self._model, self._adapter = model, adapter
        self._document = _document(adapter, document)
        self._config = config or (adapter.config if adapter else LiftConfig())
        self._text = window_text(model, adapter, self._document, self._config.answering)
        self._history: list[tuple[str, str]] = []

    @property
    def turns(self) -> int:
        """How many earlier questions the next prompt will hold."""
        return len(self._history)

    def ask(self, question: str, on_text: OnText | None = None) -> Answer:
        """Answers in the light of the turns before. Raises QuestionTooLongError (the conversation goes on unchanged)."""
        settings = self._config.answering
        kept = list(self._history)
        while True:
            try:
                prompt = fill_question(self._model, self._document, question, self._text, settings, kept)
                break
            except QuestionTooLongError:
                if not kept:
                    raise
                kept.pop(0)
        name = self._adapter.id if self._adapter else None
        with use_adapter(self._model, name, strength=acting_strength(settings)):
            (generated,) = generate(self._model, [prompt], settings, self._config.seed, on_text)
        self._history = [*kept, (question, generated.text)]
        return _answer(question, prompt, generated, self._adapter, settings, self._text)


def _answer(
    question: str,
    prompt: FilledWindow,
    generated: Generated,
    adapter: Adapter | None,
    settings: AnsweringConfig,
    text: WindowText,
) -> Answer:
    return Answer(
        question=question,
        answer=generated.text,
        method=method_name(adapter, settings.context),
        context=settings.context,
        prompt_tokens=len(prompt.tokens),
        context_tokens=len(prompt.context),
        answer_tokens=generated.tokens,
        seconds=generated.seconds,
        sources=text.sources(question),
    )


def acting_strength(settings: AnsweringConfig) -> float:
    """How much of an adapter acts, by what is in the window."""
    return 1.0 if settings.context == "none" else settings.strength_with_text


def method_name(adapter: Adapter | None, context: ContextPolicy) -> Method:
    """The row of an evaluation that this way of answering is."""
    if adapter is None:
        names: dict[ContextPolicy, Method] = {
            "none": "closed-book", "truncate": "icl", "retrieve": "rag", "recite": "recite"
        }  # fmt: skip
    else:
        names = {"none": "lift", "truncate": "lift+icl", "retrieve": "lift+rag", "recite": "lift+recite"}
    return names[context]


def _document(adapter: Adapter | None, document: Document | None) -> Document:
    if document is None and adapter is None:
        raise ConfigError("A question needs a document or an adapter to be about.", "Pass document=… or adapter=….")
    return document if document is not None else adapter.document  # type: ignore[union-attr]


def window_text(
    model: Model, adapter: Adapter | None, document: Document, settings: AnsweringConfig, middle: str = MARK
) -> WindowText:
    """The document as the context policy shows it.

    The model ranks what `retrieve` finds, with the adapter if there is one. What `recite` shows comes from the adapter alone (the
    document's text is not looked at), and the model without it is the judge. middle: what `truncate` puts where it cuts.
    """
    name, ranker = adapter.id if adapter else None, Ranker(model, document.title)
    judge = None if settings.context == "recite" else name

    def rerank(question: str, texts: list[str]) -> list[float]:
        with use_adapter(model, judge):
            return ranker.relevance(question, texts)

    def recited(question: str) -> list[str]:
        with use_adapter(model, name):
            return recite_about(model, document.title, question, settings)

    return WindowText(document.text, model.encode, settings, rerank, recited, middle)


def recite_about(model: Model, title: str, question: str, settings: AnsweringConfig) -> list[str]:
    """What the adapter that is on says by heart to the question, and to as many rewordings of it as `recitation` asks for."""
    asked = [question, *reworded(question, settings.recitation.rewordings)]
    prompt, *others = (question_prompt(model.tokenizer, title, each) for each in asked)
    return recite(model, prompt, settings, others)


def fill_question(
    model: Model,
    document: Document,
    question: str,
    text: WindowText,
    settings: AnsweringConfig,
    history: Sequence[tuple[str, str]] = (),
    system: str = "",
) -> FilledWindow:
    """A prompt. The text stands before the first question, and is chosen for the last; system: an instruction before all.

    Raises QuestionTooLongError.
    """
    asked = [question_wording(document.title, earlier) for earlier, _ in history]
    asked.append(question_wording(document.title, question))
    answered = [answer for _, answer in history]
    return fill_window(
        model,
        asked,
        answered,
        lambda budget: text.select(question, budget),
        settings.max_new_tokens,
        text.for_all,
        system=system,
    )
