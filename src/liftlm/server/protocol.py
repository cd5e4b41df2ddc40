"""The shapes of requests and replies: OpenAI's for models and completions, this program's own for documents.

Requests are strict: what stands here is done, and what does not is an error. Knows nothing of how anything is done.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Priority = Literal["high", "normal", "low"]
Context = Literal["none", "truncate", "retrieve", "recite"]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Alias = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
PRIORITIES: dict[Priority, int] = {"high": -1, "normal": 0, "low": 1}
_MOST_TOKENS = 2**20
_MOST_PROMPTS = 128
_Token = Annotated[int, Field(ge=0, lt=2**31)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _whole_characters(cls, data: Any) -> Any:
        """JSON can hold half of a character, which no tokenizer and no database takes."""
        left = [data]
        while left:
            value = left.pop()
            if isinstance(value, str) and not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError:
                    raise PydanticCustomError(
                        "text", "a text has half of a character in it (a lone surrogate)"
                    ) from None
            elif isinstance(value, dict):
                left += [*value, *value.values()]
            elif isinstance(value, list):
                left += value
        return data


class StreamOptions(_Request):
    include_usage: bool = False


class _Sampled(_Request):
    """What both kinds of completions take. Where OpenAI's default means "off", that value is accepted."""

    model: Name
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    priority: Priority = "normal"  # not OpenAI's

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> _Sampled:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options goes with stream=true")
        return self


class TextPart(_Request):
    type: Literal["text"]
    text: str


class Message(_Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(_Request):
    type: Literal["text"]


class ChatRequest(_Sampled):
    """An instruction if wanted, then questions and answers in turn, ending with a question."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: int | None = Field(default=None, ge=1, le=_MOST_TOKENS)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_MOST_TOKENS)
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None
    context: Context | None = None  # not OpenAI's: what of the document stands in the window

    @model_validator(mode="after")
    def _turns(self) -> ChatRequest:
        roles = [message.role for message in self.messages]
        spoken = roles[1:] if roles[0] in ("system", "developer") else roles
        if (
            not spoken
            or any(role != ("user", "assistant")[at % 2] for at, role in enumerate(spoken))
            or len(spoken) % 2 == 0
        ):
            raise PydanticCustomError(
                "messages",
                "messages must be one system message at most, then user and assistant in turn, and end with user",
            )
        if not self.messages[-1].text.strip():
            raise PydanticCustomError("messages", "the last message is empty")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("max_tokens", "max_tokens and max_completion_tokens contradict each other")
        return self


class CompletionRequest(_Sampled):
    """Raw prompts: texts or token ids, one or several."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=_MOST_PROMPTS)]
        | Annotated[list[_Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[_Token], Field(min_length=1)]], Field(min_length=1, max_length=_MOST_PROMPTS)]
    )
    max_tokens: int | None = Field(default=None, ge=0, le=_MOST_TOKENS)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=5)
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class NewDocument(_Request):
    """Text to be absorbed; as a form, `file` may stand instead of `text`, and `settings` is JSON."""

    text: Annotated[str, Field(min_length=1)]
    title: Name | None = None
    alias: Alias | None = None
    settings: dict[str, Any] = {}
    priority: Priority = "normal"


# one event of text/event-stream, as OpenAPI describes it
EVENT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}


# --- replies ----------------------------------------------------------------------------------------------------------


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    error: ErrorBody


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    title: str | None = None  # of a document
    alias: str | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ReplyMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int = 0
    message: ReplyMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: Logprobs | None = None


class TextReply(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class JobCard(BaseModel):
    id: str
    state: Literal["queued", "absorbing", "ready", "failed", "cancelled"]
    step: int
    steps: int
    progress: float  # 0 to 1
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    error: str | None
    queued_at: float  # seconds since 1970, as all times
    started_at: float | None
    finished_at: float | None


class DocumentCard(BaseModel):
    id: str
    object: Literal["document"] = "document"
    title: str
    alias: str | None
    file_name: str
    created_at: float
    tokens: int
    settings: dict[str, Any]
    state: Literal["queued", "absorbing", "ready", "failed", "cancelled"]
    job: JobCard


class DocumentList(BaseModel):
    object: Literal["list"] = "list"
    data: list[DocumentCard]


class DeletedDocument(BaseModel):
    id: str
    object: Literal["document"] = "document"
    deleted: Literal[True] = True


class LossRow(BaseModel):
    step: int
    loss: float | None


class LossList(BaseModel):
    object: Literal["list"] = "list"
    data: list[LossRow]


class TaskRow(BaseModel):
    question: str
    answer: str
    kind: str
    evidence: str


class TaskList(BaseModel):
    object: Literal["list"] = "list"
    total: int  # of all that match
    data: list[TaskRow]


class Health(BaseModel):
    status: str
