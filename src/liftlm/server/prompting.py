"""What a client asks → token ids, on the engine's thread: a conversation about a document, with the base model, or a raw prompt.

Questions about a document are worded and given text as `lift ask` does it (`answering`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from liftlm.answering import fill_question, window_text
from liftlm.config import AnsweringConfig
from liftlm.errors import InvalidRequestError, QuestionTooLongError
from liftlm.models import Model
from liftlm.prompts import Wording, leading_tokens
from liftlm.server.opened import Opened
from liftlm.windows import fill_window

Build = Callable[[Model, Opened | None], list[int]]


@dataclass(frozen=True)
class Conversation:
    """system: an instruction; questions: the client's turns; answers: the replies so far, one fewer."""

    questions: tuple[str, ...]
    answers: tuple[str, ...] = ()
    system: str = ""


def chat_prompt(talk: Conversation, settings: AnsweringConfig) -> Build:
    """About the entry where there is one, else plain talk with the base model. Raises QuestionTooLongError."""

    def build(model: Model, opened: Opened | None) -> list[int]:
        if opened is None:
            asked = [Wording(text, "", "") for text in talk.questions]
            room = settings.max_new_tokens
            return fill_window(model, asked, talk.answers, lambda budget: (), room, system=talk.system).tokens
        shared = settings.model_copy(update={"max_new_tokens": 1})  # which does not decide what the text is
        if shared not in opened.texts:
            opened.texts[shared] = window_text(model, opened.adapter, opened.adapter.document, shared)
        history = list(zip(talk.questions, talk.answers, strict=False))
        text, document = opened.texts[shared], opened.adapter.document
        return fill_question(model, document, talk.questions[-1], text, settings, history, talk.system).tokens

    return build


def text_prompt(prompt: str | Sequence[int], max_tokens: int) -> Build:
    """The prompt as it is. Raises QuestionTooLongError, and InvalidRequestError for token ids that do not exist."""

    def build(model: Model, opened: Opened | None) -> list[int]:
        vocabulary = model.network.get_input_embeddings().weight.shape[0]
        tokens = [*leading_tokens(model.tokenizer), *model.encode(prompt)] if isinstance(prompt, str) else list(prompt)
        if any(token >= vocabulary for token in tokens):
            raise InvalidRequestError(
                f"A token id of the prompt is not below {vocabulary}.",
                "Use the model's own tokenizer.",
                parameter="prompt",
            )
        if not tokens:  # as OpenAI's: an empty prompt begins a new text
            tokens = [model.tokenizer.bos_token_id or model.tokenizer.eos_token_id or 0]
        if len(tokens) + max_tokens > model.window:
            raise QuestionTooLongError(
                f"The prompt has {len(tokens)} tokens and max_tokens is {max_tokens}, together more than the window of "
                f"{model.window}.",
                "Shorten the prompt or lower max_tokens.",
            )
        return tokens

    return build


def shown(settings: AnsweringConfig, context: str | None, max_tokens: int) -> AnsweringConfig:
    """The server's settings as one request changes them. Sampling stands elsewhere, so that texts are shared."""
    update = {"max_new_tokens": max_tokens, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
    return settings.model_copy(update=update if context is None else update | {"context": context})
