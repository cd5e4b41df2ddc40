"""Turns a question, a title and perhaps some text into token ids: the one place where prompts are worded.

Training on questions and answering them go through the same functions, so the two never drift apart. Works with any
tokenizer, with or without a chat template. Knows nothing of models, windows or where the text came from.

Text of a document or a question is always encoded as plain text: one that contains "<|im_end|>" cannot end the turn.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from liftlm.errors import UnknownModelError

Tokenizer = Any  # transformers' tokenizers have no common typed base worth naming

# Stands for a message while the chat template is rendered; private-use characters no document template would touch.
_HOLE = "\ue0ff{}\ue0fe"
_ASK = "Please answer the question based on"


@dataclass(frozen=True)
class Turn:
    """One message of a conversation, already encoded."""

    role: Literal["system", "user", "assistant"]
    tokens: tuple[int, ...]


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of plain text: no special tokens added, none recognised inside it."""
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    return list(encoded["input_ids"])


def leading_tokens(tokenizer: Tokenizer) -> list[int]:
    """What this tokenizer puts before any text (a beginning-of-sequence token, or nothing)."""
    marked = list(tokenizer("a")["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    return marked[: max(0, _find(marked, plain))]


@dataclass(frozen=True)
class Wording:
    """The user's turn as text: `alone`, or text of the document between `before` and `after`."""

    alone: str
    before: str
    after: str


def question_wording(title: str, question: str) -> Wording:
    """How this program asks about a document, in training and in answering.

    The authors' prompt (MuLabPKU/LIFT), `Please answer the question based on "{title}"`, with the text above it as in
    LooGLE's own long-text prompt.
    """
    ask = f'{_ASK} "{title}".\nQuestion: {question.strip()}'
    return Wording(ask, f'Here is text from "{title}":\n\n', f"\n\n{ask}")


def worded_turn(tokenizer: Tokenizer, wording: Wording, context: Sequence[int] = ()) -> Turn:
    """The user's turn, with `context` (token ids of the document's text) if there is any."""
    if not context:
        return Turn("user", tuple(encode_text(tokenizer, wording.alone)))
    before, after = encode_text(tokenizer, wording.before), encode_text(tokenizer, wording.after)
    return Turn("user", (*before, *context, *after))


def question_turn(tokenizer: Tokenizer, title: str, question: str, context: Sequence[int] = ()) -> Turn:
    """The user's turn that asks about a document, in this program's own wording."""
    return worded_turn(tokenizer, question_wording(title, question), context)


def answer_turn(tokenizer: Tokenizer, answer: str) -> Turn:
    """The assistant's turn."""
    return Turn("assistant", tuple(encode_text(tokenizer, answer.strip())))


def render_prompt(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    """Token ids of a conversation that waits for the assistant's next words.

    Through the model's chat template where it has one (thinking switched off where the template knows such a switch),
    else as plain "…\\nAnswer:" text.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return _render_plain(tokenizer, turns)
    messages = [{"role": turn.role, "content": _HOLE.format(index)} for index, turn in enumerate(turns)]
    try:
        rendered: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception as error:  # a template is a program of the model's authors and may fail in any way
        raise _unusable_template(f"fails: {error}") from error
    ids: list[int] = []
    for index, turn in enumerate(turns):
        fixed, hole, rendered = rendered.partition(_HOLE.format(index))
        if not hole or _HOLE[0] in fixed:
            raise _unusable_template("drops, repeats or reorders messages")
        ids += _encode_fixed(tokenizer, fixed)
        ids += turn.tokens
    if _HOLE[0] in rendered:
        raise _unusable_template("repeats messages")
    return ids + _encode_fixed(tokenizer, rendered)


def common_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all of these begin with."""
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    return [column[0] for column in columns]


def question_prompt(tokenizer: Tokenizer, title: str, question: str, context: Sequence[int] = ()) -> list[int]:
    """Token ids of a single question, perhaps after text of the document, up to where its answer begins."""
    return render_prompt(tokenizer, [question_turn(tokenizer, title, question, context)])


def answer_end(tokenizer: Tokenizer) -> list[int]:
    """What ends an answer: the first token of the template's words after an assistant's turn, else the end token."""
    if getattr(tokenizer, "chat_template", None) is not None:
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": _HOLE.format(index)} for index, role in enumerate(roles)]
        with contextlib.suppress(Exception):  # `render_prompt` explains what is wrong with a template
            rendered: str = tokenizer.apply_chat_template(messages, tokenize=False)
            after = rendered.partition(_HOLE.format(1))[2].partition(_HOLE.format(2))[0]
            if after.strip():
                return _encode_fixed(tokenizer, after.lstrip())[:1]
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def answer_stops(tokenizer: Tokenizer) -> list[str]:
    """Texts that end an answer besides the end token: a model without chat template would go on to ask itself more."""
    return [] if getattr(tokenizer, "chat_template", None) is not None else ["\nQuestion:", f"\n{_ASK}"]


def _unusable_template(what: str) -> UnknownModelError:
    return UnknownModelError(
        f"The model's chat template cannot be used: it {what.rstrip('.')}.",
        "Choose another model, or mend or remove chat_template.jinja in its folder.",
    )


def _render_plain(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    ids = leading_tokens(tokenizer)
    for turn in turns:
        if turn.role == "user":
            ids += [*turn.tokens, *encode_text(tokenizer, "\nAnswer:")]
        else:
            ids += [*turn.tokens, *encode_text(tokenizer, "\n\n")]
    return ids


def _encode_fixed(tokenizer: Tokenizer, text: str) -> list[int]:
    """The template's own words, in which special tokens are meant."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _find(sequence: list[int], part: list[int]) -> int:
    for start in range(len(sequence) - len(part) + 1):
        if sequence[start : start + len(part)] == part:
            return start
    return -1
