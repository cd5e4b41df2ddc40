"""Fills the window: questions, their answers so far, room for the next answer, and as much text as is left for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from liftlm.errors import QuestionTooLongError
from liftlm.generating import Prompt
from liftlm.models import Model
from liftlm.prompts import Turn, Wording, answer_turn, encode_text, leading_tokens, render_prompt, worded_turn

_CONTEXT_STEP = 64  # tokens


@dataclass(frozen=True)
class FilledWindow(Prompt):
    """A prompt, and the text of the document (token ids) that is in it."""

    context: tuple[int, ...] = ()


def fill_window(
    model: Model,
    asked: Sequence[Wording],
    answered: Sequence[str],
    choose: Callable[[int], Sequence[int]],
    max_new_tokens: int,
    for_all: bool = True,
    chat: bool = True,
    system: str = "",
) -> FilledWindow:
    """The prompt of a conversation; `answered` is one shorter than `asked`. The text stands in the first turn.

    choose: at most so many token ids → those of the document that are to be shown; for_all: whether other questions get
    the same, which is then computed once; chat: through the model's chat template, if it has one, else a single question's
    words as they are; system: an instruction before all turns. Raises QuestionTooLongError where even no text leaves no room
    for the answer.
    """
    tokenizer = model.tokenizer

    def prompt(context: Sequence[int]) -> list[int]:
        turns: list[Turn] = [Turn("system", tuple(encode_text(tokenizer, system)))] if system else []
        for position, wording in enumerate(asked):
            turns.append(worded_turn(tokenizer, wording, context if position == 0 else ()))
            if position < len(answered):
                turns.append(answer_turn(tokenizer, answered[position]))
        if not chat:
            return [*leading_tokens(tokenizer), *turns[0].tokens]
        return render_prompt(tokenizer, turns)

    bare = prompt(())
    room = model.window - max_new_tokens - len(bare)
    if room < 0:
        raise QuestionTooLongError(
            f"The question takes {len(bare)} tokens and its answer may take {max_new_tokens}, more than the window of "
            f"{model.window}.",
            "Shorten the question, raise --window, or lower answering.max_new_tokens.",
        )
    # what the wording around the text costs, measured with one token of text
    room -= len(prompt([0])) - 1 - len(bare)
    # Rounded down, so that questions of about the same length get the very same text: it is then computed once for all of them,
    # and an answer does not depend on which other questions are asked with it.
    budget = room // _CONTEXT_STEP * _CONTEXT_STEP if room > 4 * _CONTEXT_STEP else room
    context = tuple(choose(budget)) if budget > 0 else ()
    if not context:
        return FilledWindow(bare)
    return FilledWindow(prompt(context), len(context) if for_all else None, context)
