"""Failures as HTTP answers, in OpenAI's error shape. No traceback and no content leaves the process."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from liftlm.errors import (
    EntryNotFoundError,
    InvalidRequestError,
    LiftError,
    NotReadyError,
    QuestionTooLongError,
    ServerBusyError,
)
from liftlm.server.protocol import ErrorReply

log = logging.getLogger("liftlm.server")
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
_WORDS = {404: "There is no such page.", 405: "This address does not take that method."}
Statuses = dict[int | str, dict[str, Any]]


class GoneError(Exception):
    """The client went away; whatever is answered, nobody hears it."""


def errors_of(*statuses: int) -> Statuses:
    """For a route's `responses`: what it may answer besides its reply. All may be unready, busy or ask for a key."""
    return {status: {"model": ErrorReply} for status in sorted({*statuses, 400, 401, 403, 413, 429, 503})}


def error_reply(error: BaseException) -> JSONResponse:
    """A failure's status and sentence."""
    if isinstance(error, GoneError):
        return JSONResponse({}, 499)
    if not isinstance(error, LiftError):
        log.error("defect: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
        return _reply(500, "The server has a defect and could not do this; its log says where.", code="defect")
    status = error.http_status
    code, parameter = None, None
    headers = {}
    if isinstance(error, InvalidRequestError):
        code, parameter = error.code, error.parameter
    elif isinstance(error, QuestionTooLongError):
        code = "context_length_exceeded"
    elif isinstance(error, EntryNotFoundError):
        code = "model_not_found"
    elif isinstance(error, ServerBusyError | NotReadyError):
        code = "busy" if isinstance(error, ServerBusyError) else "not_ready"
        headers["Retry-After"] = str(error.retry_after if isinstance(error, ServerBusyError) else 2)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _reply(status, str(error), code=code, parameter=parameter, headers=headers)


def invalid(error: ValidationError | RequestValidationError) -> InvalidRequestError:
    """The first thing that is wrong with a request, as one sentence without the request's content."""
    first = error.errors()[0]
    place = ".".join(str(part)[:60] for part in first["loc"] if part not in ("body", "query", "path"))
    if first["type"] == "extra_forbidden":
        return InvalidRequestError(
            f"'{place}' is not implemented by this server.",
            "Leave it out.",
            parameter=place,
            code="unsupported_parameter",
        )
    message = "there is no such value" if first["type"] == "json_invalid" else str(first["msg"])
    where = f"'{place}': " if place else ""
    return InvalidRequestError(f"{where}{message[:300]}.", "See /docs.", parameter=place or None)


def handle_errors(app: FastAPI) -> None:
    """Puts the answers above in place of FastAPI's own."""

    @app.exception_handler(LiftError)
    async def _expected(request: Request, error: LiftError) -> JSONResponse:
        return error_reply(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_reply(invalid(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = _WORDS.get(error.status_code, "The request cannot be read.")
        return _reply(error.status_code, message, headers=dict(error.headers or {}))


def error_event(error: BaseException) -> bytes:
    """The same inside a stream."""
    return bytes(error_reply(error).body)


def _reply(
    status: int,
    message: str,
    *,
    code: str | None = None,
    parameter: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {"error": {"message": message, "type": kind, "param": parameter, "code": code}}
    return JSONResponse(body, status, headers=headers)
