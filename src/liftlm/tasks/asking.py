"""One OpenAI-compatible server: asks it for the tasks of one sentence, again where that may help, and counts what it costs.

Options that a server rejects (structured output, temperature) are left out from then on. Failures come as `AskingError`, which
says whether the sentence or the server is the reason. Knows nothing of documents, files or other sentences.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import os
import random
import socket
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import tenacity

from liftlm.config import AnswerForm, LlmConfig
from liftlm.errors import ConfigError
from liftlm.tasks.replies import Pair, Request, make_messages, read_reply, reply_schema

if TYPE_CHECKING:
    import openai

_FIRST_PAUSE = 1.0  # seconds before the second attempt, doubled for each further one
_LONGEST_PAUSE = 60.0  # seconds
LONGEST_WAIT = 120.0  # seconds that a server may ask us to wait; a sentence that would have to wait longer fails
CONNECT_SECONDS = 10.0  # seconds
_READINGS = 2  # how often a sentence is asked about whose reply cannot be read
WORTH_REPEATING = (408, 409, 425, 429)  # statuses below 500 that may go away by themselves
REASON_LENGTH = 300  # characters of a server's own words that are shown

_START_IT = "Start the server, or correct tasks.llm.base_url."
_ADDRESS = "Check tasks.llm.base_url, which mostly ends with /v1."
_LATER = "Try again later: what was written is kept."


class AskingError(Exception):
    """A sentence that got no tasks. reason: goes on from "The server …". gone: the server is to blame, not the sentence.
    absent: it does not even take connections.
    """

    def __init__(self, reason: str, next_step: str, *, gone: bool, absent: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.next_step, self.gone, self.absent = reason, next_step, gone, absent


class _UnreadableError(Exception):
    """A reply in which there are no questions and answers. foreign: it does not even come from a server of this kind."""

    def __init__(self, reason: str, *, foreign: bool = False) -> None:
        super().__init__(reason)
        self.foreign = foreign


@dataclass(frozen=True)
class Reply:
    """What a server wrote about one sentence, and the tokens of that one exchange."""

    pairs: tuple[Pair, ...]
    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Server:
    """A server and model, by the settings; open it with `async with`. Raises ConfigError where they name none."""

    def __init__(self, config: LlmConfig) -> None:
        self.url, self.model = _checked(config)
        self.requests = self.retries = self.prompt_tokens = self.completion_tokens = 0  # so far, of all sentences
        self.options = {"response_format", "temperature"}  # not rejected so far
        self._config = config
        self._key = api_key(config)
        self._reached = False  # whether it has ever answered, if only with an error
        self._structured = False  # whether it has ever answered with response_format
        self._client: openai.AsyncOpenAI | None = None

    async def __aenter__(self) -> Server:
        import openai

        self._client = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self._key,
            max_retries=0,  # tenacity's part
            timeout=openai.Timeout(
                self._config.timeout_seconds, connect=min(CONNECT_SECONDS, self._config.timeout_seconds)
            ),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.close()

    async def ask(self, request: Request, count: int, answers: AnswerForm = "auto") -> Reply:
        """Up to `count` pairs about a sentence, with answers of that form, in up to `attempts` attempts. Raises AskingError."""
        import openai

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._config.attempts),
            retry=self._may_help,
            wait=pause,
            before_sleep=self._count_retry,
            reraise=True,
        )
        try:
            return await retrying(self._once, make_messages(request, count, answers), count)
        except _UnreadableError as error:
            step = _ADDRESS if error.foreign else "Use a model that follows instructions (tasks.llm.model)."
            raise AskingError(self._safe(error), step, gone=error.foreign) from error
        except (openai.OpenAIError, TimeoutError) as error:
            raise self._explain(error) from error

    # --- one exchange -------------------------------------------------------------------------------------------------

    async def _once(self, messages: Any, count: int) -> Reply:
        import openai

        assert self._client is not None, "not opened"
        used = set(self.options)
        self.requests += 1
        try:
            # the client's own limit starts anew with every byte
            async with asyncio.timeout(self._config.timeout_seconds):
                completion = await self._client.chat.completions.create(
                    model=self.model, messages=messages, **self._optional(used)
                )
        except openai.APIStatusError as error:
            self._reached = True
            rejected = self._rejected(error, used)
            if rejected is None:
                raise
            self.options.discard(rejected)
            return await self._once(messages, count)  # with fewer options each time
        except ValueError as error:
            raise _UnreadableError("sent a reply that is not JSON") from error
        self._reached = True
        self._structured = self._structured or "response_format" in used
        return self._read(completion, messages, count)

    def _optional(self, used: set[str]) -> dict[str, Any]:
        schema = {"name": "tasks", "strict": True, "schema": reply_schema()}
        values: dict[str, Any] = {
            "temperature": self._config.temperature,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }
        return {name: value for name, value in values.items() if name in used}

    def _rejected(self, error: openai.APIStatusError, used: set[str]) -> str | None:
        """The option that an error is about, as far as one can tell.

        Servers word it in many ways, so before the first structured reply every 400 counts as one about response_format.
        """
        if error.status_code not in (400, 422):
            return None
        said = str(error.body or error.message).lower()
        if "temperature" in used and "temperature" in said and "response_format" not in said:
            return "temperature"
        return "response_format" if "response_format" in used and not self._structured else None

    def _read(self, completion: Any, messages: list[dict[str, str]], count: int) -> Reply:
        choices = getattr(completion, "choices", None)
        if not choices:
            said = getattr(completion, "error", None)  # some gateways report errors with status 200
            raise _UnreadableError(f"sent no completion: {said or completion}", foreign=isinstance(completion, str))
        content = getattr(getattr(choices[0], "message", None), "content", None)
        content = content if isinstance(content, str) else ""  # a refusal, or thoughts alone
        usage = getattr(completion, "usage", None)
        prompt = getattr(usage, "prompt_tokens", None)
        answered = getattr(usage, "completion_tokens", None)
        if not isinstance(prompt, int) or not isinstance(answered, int):
            prompt, answered = sum(len(message["content"]) for message in messages) // 4, len(content) // 4
        self.prompt_tokens += prompt
        self.completion_tokens += answered
        pairs = read_reply(content, count)
        if pairs is None:
            start = " ".join(content.split())[:60]
            raise _UnreadableError(f"sent a reply without questions and answers (“{start}”)")
        return Reply(tuple(pairs), prompt, answered)

    # --- again or not -------------------------------------------------------------------------------------------------

    def _may_help(self, state: tenacity.RetryCallState) -> bool:
        """Whether to ask again after this error."""
        import openai

        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, _UnreadableError):
            return state.attempt_number < _READINGS
        if isinstance(error, openai.APIStatusError):
            again = error.status_code in WORTH_REPEATING or error.status_code >= 500
            return again and (retry_after(error) or 0) <= LONGEST_WAIT
        if isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError):
            return self._reached  # a server that was never there is not waited for
        return isinstance(error, openai.APITimeoutError | TimeoutError)

    def _count_retry(self, state: tenacity.RetryCallState) -> None:
        self.retries += 1

    def _explain(self, error: Exception) -> AskingError:
        """What happened, in words that go on from "The server …"."""
        import openai

        if isinstance(error, openai.APITimeoutError | TimeoutError):
            reason = f"did not answer within {self._config.timeout_seconds:g} seconds"
            return AskingError(reason, f"{_LATER} tasks.llm.timeout_seconds sets how long to wait.", gone=True)
        if isinstance(error, openai.APIConnectionError):
            absent = any(isinstance(cause, ConnectionRefusedError | socket.gaierror) for cause in causes(error))
            return AskingError(f"cannot be reached: {self._safe(root(error))}", _START_IT, gone=True, absent=absent)
        if not isinstance(error, openai.APIStatusError):
            return AskingError(f"sent what is no reply: {self._safe(error)}", _LATER, gone=True)
        body: Any = error.body
        said = body.get("message") or body.get("detail") if isinstance(body, dict) else body
        reason = f"answered with status {error.status_code}: {self._safe(said or error.message)}"
        if error.status_code in (401, 403):
            step = f"Put a valid key into the environment variable {self._config.api_key_variable}."
        elif error.status_code == 404:
            step = f"Check tasks.llm.model ({self.model}) and t{_ADDRESS.removeprefix('Check t')}"
        else:
            step = _LATER
        gone = error.status_code in (401, 403, 404, *WORTH_REPEATING) or error.status_code >= 500
        return AskingError(reason, step, gone=gone)

    def _safe(self, said: object) -> str:
        """A server's words, short, on one line, and without the key."""
        text = " ".join(str(said).split())
        text = text if self._key == NO_KEY else text.replace(self._key, "…")
        return (text if len(text) <= REASON_LENGTH else text[:REASON_LENGTH] + " …").rstrip(". ")


def pause(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt: what the server asks for, else growing ones; never the same for all."""
    error = state.outcome.exception() if state.outcome is not None else None
    if isinstance(error, _UnreadableError):
        return 0.0
    asked = retry_after(error)
    if asked is not None:
        return asked + random.uniform(0, _FIRST_PAUSE)
    pause = min(_FIRST_PAUSE * 2.0 ** (state.attempt_number - 1), _LONGEST_PAUSE)
    return pause * random.uniform(0.75, 1.5)


def retry_after(error: BaseException | None) -> float | None:
    """The Retry-After header in seconds: a number of them, or a date."""
    headers = getattr(getattr(error, "response", None), "headers", None)
    value = headers.get("retry-after") if headers is not None else None
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def root(error: BaseException) -> str:
    """The operating system's word for it, where there is one below the clients' wrappings."""
    words = str(error)
    for inner in causes(error):
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror if not inner.errno or inner.errno < 0 else os.strerror(inner.errno)
        words = str(inner) or words
    return words


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what lies below it."""
    inner: BaseException | None = error
    while inner is not None:
        yield inner
        inner = inner.__cause__ or inner.__context__


# --- settings ---------------------------------------------------------------------------------------------------------

NO_KEY = "none"  # local servers want some key, and any will do


def _checked(config: LlmConfig) -> tuple[str, str]:
    """Address and model. Raises ConfigError."""
    if not config.base_url:
        raise ConfigError(
            "The llm writer needs a server: tasks.llm.base_url is not set.",
            "For example: --set tasks.llm.base_url=http://localhost:8000/v1.",
        )
    if not config.model:
        raise ConfigError(
            "The llm writer needs a model: tasks.llm.model is not set.", "Give the name the server knows it by."
        )
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(config.base_url)
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0):
            return config.base_url.rstrip("/"), config.model
    raise ConfigError(
        f"tasks.llm.base_url is not an address: '{config.base_url}'.", "It looks like http://localhost:8000/v1."
    )


def api_key(config: LlmConfig) -> str:
    """From the environment; never stored, logged or shown. Raises ConfigError."""
    key = os.environ.get(config.api_key_variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"The key in the environment variable {config.api_key_variable} holds characters that no key has.",
            "Set it anew.",
        )
    return key or NO_KEY
