"""OpenAI's routes: models, chat completions and completions, streamed or not.

Handlers only queue and pass on: the engine's thread does the work and tells of it through `_Hearing`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse

from liftlm.answering import acting_strength
from liftlm.errors import EntryNotFoundError
from liftlm.sequences import Choice, Sampling
from liftlm.server.answers import Asked, Began, Ended, Failed, Piece, Told
from liftlm.server.owners import asking_owner, service_of
from liftlm.server.prompting import Conversation, chat_prompt, shown, text_prompt
from liftlm.server.protocol import (
    EVENT_SCHEMA,
    PRIORITIES,
    ChatReply,
    ChatRequest,
    CompletionRequest,
    ModelCard,
    ModelList,
    TextReply,
)
from liftlm.server.replies import GoneError, error_event, errors_of
from liftlm.server.service import Service
from liftlm.server.store import Record

router = APIRouter(tags=["OpenAI"])
log = logging.getLogger("liftlm.server")
Owner = Annotated[str, Depends(asking_owner)]
Served = Annotated[Service, Depends(service_of)]
_TEXT_TOKENS = 16  # OpenAI's default for completions
_LOOK_SECONDS = 0.25  # between two looks whether the client is still there
_LEAST_LOGPROB = -1e9  # JSON has no infinity
_SSE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_STREAMED: dict[str, Any] = {"content": {"text/event-stream": {"schema": EVENT_SCHEMA}}}


# --- models -----------------------------------------------------------------------------------------------------------


@router.get("/v1/models", responses=errors_of())
def list_models(owner: Owner, service: Served) -> ModelList:
    """The base model, then absorbed documents, newest first."""
    ready = [record for record in service.documents(owner) if record.state == "ready"]
    return ModelList(data=[_base(service), *map(_card, ready)])


@router.get("/v1/models/{model:path}", responses=errors_of(404))
def get_model(model: str, owner: Owner, service: Served) -> ModelCard:
    """One of them, by id or alias."""
    return _base(service) if model == service.base_name else _card(service.get(owner, model))


def _base(service: Service) -> ModelCard:
    return ModelCard(id=service.base_name, created=int(service.started), owned_by="liftlm")


def _card(record: Record) -> ModelCard:
    created = int(record.created)
    return ModelCard(id=record.id, created=created, owned_by="you", title=record.title, alias=record.alias)


def _entry(service: Service, owner: str, model: str) -> str | None:
    """The entry a request is about, None for the base model."""
    if model == service.base_name:
        return None
    try:
        return service.ready_entry(owner, model)
    except EntryNotFoundError:
        raise EntryNotFoundError(f"The model '{model}' does not exist.", "`GET /v1/models` lists all.") from None


# --- chat -------------------------------------------------------------------------------------------------------------


@router.post("/v1/chat/completions", response_model=ChatReply, responses={200: _STREAMED, **errors_of(404, 409, 422)})
async def chat(body: ChatRequest, request: Request, owner: Owner, service: Served) -> Any:
    """Answers the last question about a document (`model` is its id or alias), or talks with the base model."""
    entry = await run_in_threadpool(_entry, service, owner, body.model)
    settings = service.config.answering
    most = body.max_completion_tokens or body.max_tokens or settings.max_new_tokens
    settings = shown(settings, body.context, most)
    texts = [message.text for message in body.messages]
    system = texts.pop(0) if body.messages[0].role in ("system", "developer") else ""
    talk = Conversation(tuple(texts[::2]), tuple(texts[1::2]), system)
    hearing = _Hearing()
    asked = Asked(
        entry,
        1.0 if entry is None else acting_strength(settings),
        chat_prompt(talk, settings),
        _sampling(service, body, most),
        hearing.teller(0),
        PRIORITIES[body.priority],
    )
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
    hearing.begin(service, request, [asked])
    if request.app.state.log_content:
        hearing.at_end = lambda texts: log.info("asked %r, answered %r", talk.questions[-1], texts[0])
    if body.stream:
        return await _streamed(hearing, lambda: _chat_chunks(hearing, head, body.with_usage))
    texts, (end,) = await _all(hearing, 1)
    message = {"role": "assistant", "content": texts[0]}
    choice = {"index": 0, "message": message, "finish_reason": end.ending, "logprobs": None}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage([end])}


async def _chat_chunks(hearing: _Hearing, head: dict[str, Any], with_usage: bool) -> AsyncIterator[bytes]:
    head = {**head, "object": "chat.completion.chunk"} | ({"usage": None} if with_usage else {})

    def chunk(delta: dict[str, str], ending: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": ending, "logprobs": None}
        return _event({**head, "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    async for _, told in hearing.heard():
        if isinstance(told, Piece):
            yield chunk({"content": told.text})
        elif isinstance(told, Ended):
            yield chunk({}, told.ending)
            if with_usage:
                yield _event({**head, "choices": [], "usage": _usage([told])})


# --- completions ------------------------------------------------------------------------------------------------------


@router.post("/v1/completions", response_model=TextReply, responses={200: _STREAMED, **errors_of(404, 409, 422)})
async def complete(body: CompletionRequest, request: Request, owner: Owner, service: Served) -> Any:
    """Continues raw prompts, with all of a document's adapter acting, or the base model."""
    entry = await run_in_threadpool(_entry, service, owner, body.model)
    most = _TEXT_TOKENS if body.max_tokens is None else body.max_tokens
    hearing = _Hearing()
    asked = [
        Asked(
            entry,
            1.0,
            text_prompt(prompt, most),
            _sampling(service, body, most, index),
            hearing.teller(index),
            PRIORITIES[body.priority],
        )
        for index, prompt in enumerate(body.prompts)
    ]
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": body.model,
        "object": "text_completion",
    }
    hearing.begin(service, request, asked)
    if request.app.state.log_content:
        hearing.at_end = lambda texts: log.info("continued %r with %r", body.prompt, texts)
    if body.stream:
        return await _streamed(hearing, lambda: _text_chunks(service, hearing, body, head))
    texts, ends = await _all(hearing, len(asked))
    choices = []
    for index, prompt in enumerate(body.prompts):
        began = hearing.began[index]
        before = ""
        if body.echo:
            before = prompt if isinstance(prompt, str) else await run_in_threadpool(service.decode, list(began.prompt))
        logprobs = await run_in_threadpool(_logprobs, service, body, [*began.choices, *hearing.choices[index]])
        choices.append(
            {"index": index, "text": before + texts[index], "finish_reason": ends[index].ending, "logprobs": logprobs}
        )
    return {**head, "choices": choices, "usage": _usage(ends)}


async def _text_chunks(
    service: Service, hearing: _Hearing, body: CompletionRequest, head: dict[str, Any]
) -> AsyncIterator[bytes]:
    ends: list[Ended] = []
    head = head | ({"usage": None} if body.with_usage else {})

    async def chunk(index: int, text: str, choices: Sequence[Choice], ending: str | None = None) -> bytes:
        logprobs = await run_in_threadpool(_logprobs, service, body, choices)
        choice = {"index": index, "text": text, "finish_reason": ending, "logprobs": logprobs}
        return _event({**head, "choices": [choice]})

    async for index, told in hearing.heard():
        if isinstance(told, Began) and body.echo:
            prompt = body.prompts[index]
            text = prompt if isinstance(prompt, str) else await run_in_threadpool(service.decode, list(told.prompt))
            yield await chunk(index, text, told.choices)
        elif isinstance(told, Piece):
            yield await chunk(index, told.text, told.choices)
        elif isinstance(told, Ended):
            ends.append(told)
            yield await chunk(index, "", (), told.ending)
    if body.with_usage:
        yield _event({**head, "choices": [], "usage": _usage(ends)})


def _logprobs(service: Service, body: CompletionRequest, choices: Sequence[Choice]) -> dict[str, Any] | None:
    if body.logprobs is None:
        return None
    tokens = service.token_texts([choice.token for choice in choices])
    tops = []
    for choice in choices:
        names = service.token_texts([token for token, _ in choice.top])
        scores = [max(score, _LEAST_LOGPROB) for _, score in choice.top]
        tops.append(None if choice.logprob is None else dict(zip(reversed(names), reversed(scores), strict=True)))
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    known = [None if choice.logprob is None else max(choice.logprob, _LEAST_LOGPROB) for choice in choices]
    return {"tokens": tokens, "token_logprobs": known, "top_logprobs": tops, "text_offset": offsets[: len(tokens)]}


# --- hearing ----------------------------------------------------------------------------------------------------------


class _Hearing:
    """What the engine's thread tells of one request's texts, on the loop of the request; all end when the client goes."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[tuple[int, Told]] = asyncio.Queue()
        self._asked: list[Asked] = []
        self._open = 0
        self._looked = self._loop.time()
        self._first: tuple[int, Told] | None = None
        self._request: Request | None = None
        self.began: dict[int, Began] = {}
        self.choices: dict[int, list[Choice]] = {}
        self.texts: list[str] = []
        self.at_end: Callable[[list[str]], None] = lambda texts: None

    def teller(self, index: int) -> Any:
        def tell(told: Told) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._told.put_nowait, (index, told))

        return tell

    def begin(self, service: Service, request: Request, asked: list[Asked]) -> None:
        """Queues them. Raises ServerBusyError, NotReadyError."""
        service.engine.ask(asked)
        self._asked, self._open, self._request = asked, len(asked), request
        self.texts = [""] * len(asked)

    async def first(self) -> None:
        """Waits until something is heard. Raises a failure while it can still be an HTTP status."""
        self._first = await self._next()

    async def heard(self) -> AsyncIterator[tuple[int, Told]]:
        """Everything, until all have ended. Raises what failed, and GoneError."""
        try:
            while self._open:
                index, told = self._first or await self._next()
                self._first = None
                if isinstance(told, Began):
                    self.began[index] = told
                elif isinstance(told, Piece):
                    self.choices.setdefault(index, []).extend(told.choices)
                    self.texts[index] += told.text
                elif isinstance(told, Ended):
                    self._open -= 1
                yield index, told
        finally:
            self.at_end(self.texts)
            self.leave()

    def leave(self) -> None:
        """Frees the places of what has not ended."""
        for asked in self._asked:
            asked.cancelled = True

    async def _next(self) -> tuple[int, Told]:
        while True:
            await self._look()
            try:
                heard = await asyncio.wait_for(self._told.get(), _LOOK_SECONDS)
            except TimeoutError:
                continue
            except asyncio.CancelledError:
                self.leave()
                raise
            if isinstance(heard[1], Failed):
                self.leave()
                raise heard[1].error
            return heard

    async def _look(self) -> None:
        """Now and then, whether the client is still there."""
        assert self._request is not None
        if self._loop.time() - self._looked < _LOOK_SECONDS:
            return
        self._looked = self._loop.time()
        if await self._request.is_disconnected():
            self.leave()
            raise GoneError


async def _all(hearing: _Hearing, count: int) -> tuple[list[str], list[Ended]]:
    """Whole texts and their endings."""
    ends: dict[int, Ended] = {}
    async for index, told in hearing.heard():
        if isinstance(told, Ended):
            ends[index] = told
    hearing.choices = {index: hearing.choices.get(index, []) for index in range(count)}
    return hearing.texts, [ends[index] for index in range(count)]


async def _streamed(hearing: _Hearing, chunks: Any) -> Response:
    await hearing.first()

    async def stream() -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks():
                yield chunk
            yield b"data: [DONE]\n\n"
        except GoneError:
            return
        except Exception as error:
            yield b"data: " + error_event(error) + b"\n\n"
        finally:
            hearing.leave()

    return StreamingResponse(stream(), media_type="text/event-stream", headers=_SSE)


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _usage(ends: Sequence[Ended]) -> dict[str, Any]:
    prompt, written = sum(end.prompt_tokens for end in ends), sum(end.tokens for end in ends)
    details = {"cached_tokens": sum(end.cached_tokens for end in ends)}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": details,
    }


def _sampling(service: Service, body: ChatRequest | CompletionRequest, most: int, index: int = 0) -> Sampling:
    settings = service.config.answering
    is_text = isinstance(body, CompletionRequest)
    return Sampling(
        max_tokens=most,
        temperature=settings.temperature if body.temperature is None else body.temperature,
        top_p=settings.top_p if body.top_p is None else body.top_p,
        top_k=settings.top_k,
        seed=None if body.seed is None else body.seed + index,
        stop=body.stops if is_text else (*body.stops, *service.answer_stops),
        logprobs=body.logprobs if isinstance(body, CompletionRequest) else None,
        echo=bool(body.echo) if isinstance(body, CompletionRequest) else False,
        answer=not is_text,
    )
