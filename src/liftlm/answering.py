"""Questions → answers: prompt, generate, report. One question or many at once, streamed or not, with or without an adapter.

Knows nothing of how adapters are made or stored.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.generation.streamers import TextStreamer

from liftlm.absorbing import Adapter
from liftlm.adapters import use_adapter
from liftlm.config import AnsweringConfig, ContextPolicy, LiftConfig
from liftlm.context import select_context
from liftlm.documents import Document
from liftlm.errors import ConfigError, QuestionTooLongError
from liftlm.models import Model, quiet_transformers
from liftlm.prompts import Turn, answer_stops, answer_turn, question_turn, render_prompt

Method = Literal["closed-book", "icl", "rag", "lift", "lift+icl", "lift+rag"]
OnText = Callable[[str], None]
_CONTEXT_STEP = 64  # tokens


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


@dataclass(frozen=True)
class _Prompt:
    index: int
    tokens: list[int]
    context_tokens: int


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
    tokens = model.encode(document.text) if settings.context != "none" else []
    prompts = [
        _build_prompt(model, document.title, index, question, tokens, settings, history=())
        for index, question in enumerate(questions)
    ]
    answers: dict[int, Answer] = {}
    with use_adapter(model, adapter.id if adapter else None):
        for batch, prefix in _plan(model, prompts, settings.batch_tokens):
            started = time.monotonic()
            texts = _generate(model, [prompt.tokens for prompt in batch], settings, seed, on_text, prefix)
            seconds = (time.monotonic() - started) / len(batch)
            for prompt, (text, count) in zip(batch, texts, strict=True):
                answers[prompt.index] = Answer(
                    question=questions[prompt.index],
                    answer=text,
                    method=method_name(adapter, settings.context),
                    context=settings.context,
                    prompt_tokens=len(prompt.tokens),
                    context_tokens=prompt.context_tokens,
                    answer_tokens=count,
                    seconds=seconds,
                )
                on_answer(prompt.index, answers[prompt.index])
    return [answers[index] for index in range(len(questions))]


def check_questions(model: Model, document: Document, questions: Sequence[str], config: LiftConfig) -> None:
    """Raises QuestionTooLongError for a question that will not fit the window, before any work is done for it."""
    for question in questions:
        _build_prompt(model, document.title, 0, question, (), config.answering, history=())


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
        self._tokens = model.encode(self._document.text) if self._config.answering.context != "none" else []
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
                prompt = _build_prompt(
                    self._model, self._document.title, 0, question, self._tokens, settings, history=kept
                )
                break
            except QuestionTooLongError:
                if not kept:
                    raise
                kept.pop(0)
        started = time.monotonic()
        with use_adapter(self._model, self._adapter.id if self._adapter else None):
            text, count = _generate(self._model, [prompt.tokens], settings, self._config.seed, on_text, None)[0]
        self._history = [*kept, (question, text)]
        return Answer(
            question=question,
            answer=text,
            method=method_name(self._adapter, settings.context),
            context=settings.context,
            prompt_tokens=len(prompt.tokens),
            context_tokens=prompt.context_tokens,
            answer_tokens=count,
            seconds=time.monotonic() - started,
        )


def method_name(adapter: Adapter | None, context: ContextPolicy) -> Method:
    """The row of an evaluation that this way of answering is."""
    if adapter is None:
        names: dict[ContextPolicy, Method] = {"none": "closed-book", "truncate": "icl", "retrieve": "rag"}
    else:
        names = {"none": "lift", "truncate": "lift+icl", "retrieve": "lift+rag"}
    return names[context]


def _document(adapter: Adapter | None, document: Document | None) -> Document:
    if document is None and adapter is None:
        raise ConfigError("A question needs a document or an adapter to be about.", "Pass document=… or adapter=….")
    return document if document is not None else adapter.document  # type: ignore[union-attr]


def _build_prompt(
    model: Model,
    title: str,
    index: int,
    question: str,
    tokens: Sequence[int],
    settings: AnsweringConfig,
    history: Sequence[tuple[str, str]],
) -> _Prompt:
    """The prompt with as much text as the policy and the window allow; the text stands before the first question."""
    tokenizer = model.tokenizer
    asked = [text for text, _ in history] + [question]

    def turns(context: Sequence[int]) -> list[Turn]:
        result = []
        for position, text in enumerate(asked):
            result.append(question_turn(tokenizer, title, text, context if position == 0 else ()))
            if position < len(history):
                result.append(answer_turn(tokenizer, history[position][1]))
        return result

    bare = render_prompt(tokenizer, turns(()))
    room = model.window - settings.max_new_tokens - len(bare)
    if room < 0:
        raise QuestionTooLongError(
            f"The question takes {len(bare)} tokens and its answer may take {settings.max_new_tokens}, more than the window of "
            f"{model.window}.",
            "Shorten the question, raise --window, or lower answering.max_new_tokens.",
        )
    # what the wording around the text costs, measured with one token of text
    frame = len(render_prompt(tokenizer, turns([tokens[0]]))) - 1 - len(bare) if tokens else 0
    # Rounded down, so that questions of about the same length get the very same text: it is then computed once for all of them,
    # and an answer does not depend on which other questions are asked with it.
    budget = (room - frame) // _CONTEXT_STEP * _CONTEXT_STEP if room - frame > 4 * _CONTEXT_STEP else room - frame
    context = select_context(settings.context, tokens, budget, model.encode("\n...\n")) if budget > 0 else []
    return _Prompt(index, render_prompt(tokenizer, turns(context)) if context else bare, len(context))


@dataclass(frozen=True)
class _Prefix:
    """The beginning that several prompts share, and what the network computed for it (keys and values, batch 1)."""

    tokens: int
    cache: Any


def _plan(
    model: Model, prompts: Sequence[_Prompt], batch_tokens: int
) -> Iterator[tuple[list[_Prompt], _Prefix | None]]:
    """Batches of prompts, those that begin with the same text together with that beginning already computed."""
    by_context = sorted(prompts, key=lambda prompt: prompt.context_tokens)
    for context_tokens, group in itertools.groupby(by_context, key=lambda prompt: prompt.context_tokens):
        alike = list(group)
        prefix = _share_prefix(model, alike) if context_tokens and len(alike) > 1 else None
        for batch in _batches(alike, batch_tokens):
            yield batch, prefix


@torch.inference_mode()
def _share_prefix(model: Model, prompts: Sequence[_Prompt]) -> _Prefix | None:
    """Nothing for networks with sliding windows, which count the padding that then stands between prefix and question."""
    if not _attends_fully(model):
        return None
    from transformers import DynamicCache

    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*(p.tokens for p in prompts), strict=False))
    length = min(sum(1 for _ in columns), min(len(p.tokens) for p in prompts) - 1)
    if length < _CONTEXT_STEP:
        return None
    cache = DynamicCache(config=model.network.config)
    ids = torch.tensor([prompts[0].tokens[:length]], device=model.device)
    model.network.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return _Prefix(length, cache)


def _attends_fully(model: Model) -> bool:
    config: Any = model.network.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return all(kind == "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is None


def _batches(prompts: Sequence[_Prompt], batch_tokens: int) -> Iterator[list[_Prompt]]:
    """Prompts of similar length together, at most `batch_tokens` padded tokens at once (one prompt always)."""
    batch: list[_Prompt] = []
    for prompt in sorted(prompts, key=lambda prompt: (-len(prompt.tokens), prompt.index)):
        if batch and len(batch[0].tokens) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands on the answer's text as soon as it is certain: no white space around it, nothing from a stop text on."""

    def __init__(self, tokenizer: Any, on_text: OnText, stops: Sequence[str]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._stops = on_text, stops
        self._text, self._told = "", 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._text += text
        certain = _before_stops(self._text, self._stops)
        if not stream_end and len(certain) == len(self._text):  # what may yet become a stop text has to wait
            held = max(
                (n for stop in self._stops for n in range(1, len(stop)) if certain.endswith(stop[:n])), default=0
            )
            certain = certain[: len(certain) - held]
        certain = certain.strip()
        if len(certain) > self._told:
            self._on_text(certain[self._told :])
            self._told = len(certain)


@torch.inference_mode()
def _generate(
    model: Model,
    prompts: list[list[int]],
    settings: AnsweringConfig,
    seed: int,
    on_text: OnText | None,
    prefix: _Prefix | None,
) -> list[tuple[str, int]]:
    """(text, tokens) for each prompt. Padding stands on the left, or right after a shared prefix, so that all continue at the
    same position; it is masked, and positions do not count it."""
    tokenizer, device = model.tokenizer, model.device
    longest = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    shared = prefix.tokens if prefix is not None else 0
    ids = torch.tensor([p[:shared] + [pad] * (longest - len(p)) + p[shared:] for p in prompts], device=device)
    mask = torch.tensor(
        [[1] * shared + [0] * (longest - len(p)) + [1] * (len(p) - shared) for p in prompts], device=device
    )
    stops = answer_stops(tokenizer)
    options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "pad_token_id": pad, "use_cache": True}
    if settings.temperature > 0:
        options |= {
            "do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k
        }  # fmt: skip
    else:
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if prefix is not None:
        options["past_key_values"] = copy.deepcopy(prefix.cache)
        options["past_key_values"].batch_repeat_interleave(len(prompts))
    if stops:
        options |= {"stop_strings": stops, "tokenizer": tokenizer}
    streamer = _Streamer(tokenizer, on_text, stops) if on_text is not None else None
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        output: Any = model.network.generate(input_ids=ids, attention_mask=mask, streamer=streamer, **options)  # type: ignore[operator]
    return [_finish(model, row[longest:].tolist(), stops) for row in output]


def _finish(model: Model, tokens: list[int], stops: Sequence[str]) -> tuple[str, int]:
    """The answer's text without padding, end tokens and stop texts."""
    ends = model.network.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = set(ends if isinstance(ends, list) else [ends]) | {model.tokenizer.eos_token_id}
    count = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return _before_stops(model.decode(tokens[:count]), stops).strip(), count


def _before_stops(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text
