"""The routes about documents: upload, list, follow, cancel, delete, and what was written about one."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from liftlm.documents import UNTITLED, Document
from liftlm.errors import EmptyDocumentError, InvalidRequestError, LiftError
from liftlm.server.owners import asking_owner, service_of
from liftlm.server.protocol import (
    EVENT_SCHEMA,
    PRIORITIES,
    DeletedDocument,
    DocumentCard,
    DocumentList,
    JobCard,
    LossList,
    LossRow,
    NewDocument,
    TaskList,
    TaskRow,
)
from liftlm.server.replies import errors_of, invalid
from liftlm.server.service import Service, Upload
from liftlm.server.store import Record
from liftlm.server.uploads import clean_title, read_upload

router = APIRouter(tags=["documents"])
Owner = Annotated[str, Depends(asking_owner)]
Served = Annotated[Service, Depends(service_of)]
_LOOK_SECONDS = 1.0  # between two looks whether the server is to stop
_KEEP_ALIVE = 15  # so many of them without a change, and a sign of life is sent
_FIELDS = ("text", "title", "alias", "settings", "priority")
_FORM = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "PDF, EPUB, DOCX, HTML, Markdown or text"},
        "text": {"type": "string", "description": "instead of a file"},
        "title": {"type": "string", "minLength": 1, "maxLength": 200},
        "alias": {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,63}$"},
        "settings": {"type": "string", "description": 'JSON, e.g. {"training": {"epochs": 2}}'},
        "priority": {"type": "string", "enum": ["high", "normal", "low"]},
    },
    "additionalProperties": False,
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _FORM},
            "application/json": {"schema": {"$ref": "#/components/schemas/NewDocument"}},
        },
    }
}


@router.post(
    "/v1/documents",
    status_code=202,
    openapi_extra=_BODY,
    responses=errors_of(409, 415, 422, 507),
    response_model=DocumentCard,
)
async def upload(request: Request, owner: Owner, service: Served) -> Any:
    """Takes a file or text to be absorbed. The same content again is the document that is there already."""
    service.uploads.take(owner)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        most = service.config.server.upload_megabytes * 2**20
        async with request.form(max_files=1, max_fields=len(_FIELDS), max_part_size=most) as form:
            given = await _read_form(request, service, form)
    elif kind == "application/json":
        given = _read_json(await request.body())
    else:
        raise InvalidRequestError(
            "A document comes as multipart/form-data or application/json.", "", code="content_type"
        )
    return _card(await run_in_threadpool(service.upload, owner, given))


@router.get("/v1/documents", responses=errors_of())
def list_documents(owner: Owner, service: Served, search: Annotated[str, Query(max_length=200)] = "") -> DocumentList:
    """Newest first; with `search`, those whose title, file name or alias holds the words."""
    words = search.lower().split()
    found = []
    for record in service.documents(owner):
        text = f"{record.title} {record.source} {record.alias or ''}".lower()
        if all(word in text for word in words):
            found.append(_card(record))
    return DocumentList(data=found)


@router.get("/v1/documents/{document}", responses=errors_of(404))
def get_document(document: str, owner: Owner, service: Served) -> DocumentCard:
    """State, progress, loss, seconds left; by id or alias."""
    return _card(service.get(owner, document))


@router.get(
    "/v1/documents/{document}/events",
    responses={200: {"content": {"text/event-stream": {"schema": EVENT_SCHEMA}}}, **errors_of(404)},
    response_class=StreamingResponse,
)
async def follow(document: str, request: Request, owner: Owner, service: Served) -> StreamingResponse:
    """Server-sent events: the document (`event: document`) now and whenever it changes, until it is ready or given up."""
    record = await run_in_threadpool(service.get, owner, document)

    async def stream() -> AsyncIterator[bytes]:
        with service.jobs.listen(record.id) as changes:
            while True:
                try:
                    now = await run_in_threadpool(service.get, owner, record.id)
                except LiftError:
                    yield b"event: deleted\ndata: {}\n\n"
                    return
                yield f"event: document\ndata: {json.dumps(_card(now).model_dump())}\n\n".encode()
                if now.state in ("ready", "failed", "cancelled"):
                    return
                for waited in itertools.count(1):
                    try:
                        await asyncio.wait_for(changes.get(), _LOOK_SECONDS)
                        break
                    except TimeoutError:
                        if request.app.state.stopping():
                            return
                        if waited % _KEEP_ALIVE == 0:
                            yield b": still here\n\n"
                while not changes.empty():
                    changes.get_nowait()

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


@router.post("/v1/documents/{document}/cancel", responses=errors_of(404, 409))
def cancel(document: str, owner: Owner, service: Served) -> DocumentCard:
    """Ends its absorbing."""
    return _card(service.cancel(owner, document))


@router.delete("/v1/documents/{document}", responses=errors_of(404))
def delete(document: str, owner: Owner, service: Served) -> DeletedDocument:
    """Deletes document and adapter."""
    return DeletedDocument(id=service.delete(owner, document))


@router.get("/v1/documents/{document}/losses", responses=errors_of(404))
def losses(document: str, owner: Owner, service: Served) -> LossList:
    """The loss of every training step so far (nats a token)."""
    rows = service.losses(service.get(owner, document))
    return LossList(data=[LossRow(step=row["step"], loss=row["loss"]) for row in rows])


@router.get("/v1/documents/{document}/tasks", responses=errors_of(404))
def tasks(
    document: str,
    owner: Owner,
    service: Served,
    search: Annotated[str, Query(max_length=200)] = "",
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> TaskList:
    """The questions and answers that were written from it and trained on."""
    rows, text = service.tasks(service.get(owner, document))
    words = search.lower().split()
    found = [row for row in rows if all(word in f"{row['question']} {row['answer']}".lower() for word in words)]
    shown = [
        TaskRow(
            question=row["question"],
            answer=row["answer"],
            kind=row["kind"],
            evidence=text[row["start"] : row["end"]][:1000],
        )
        for row in found[offset : offset + limit]
    ]
    return TaskList(total=len(found), data=shown)


# --- inside -----------------------------------------------------------------------------------------------------------


def _read_json(body: bytes) -> Upload:
    try:
        new = NewDocument.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None
    return _upload(new, Document(clean_title(new.title or "") or _first_words(new.text), _lines(new.text), "text"))


async def _read_form(request: Request, service: Service, form: FormData) -> Upload:
    unknown = [name for name in form if name not in (*_FIELDS, "file")]
    if unknown:
        raise InvalidRequestError(
            f"There is no field '{unknown[0][:60]}'.", "", parameter=unknown[0][:60], code="unsupported_parameter"
        )
    file = form.get("file")
    values: dict[str, Any] = {name: form[name] for name in _FIELDS if name in form}
    if any(not isinstance(value, str) for value in values.values()) or (file is not None) == ("text" in values):
        raise InvalidRequestError("Give either a file or text.", "", parameter="file")
    try:
        if "settings" in values:
            values["settings"] = json.loads(values["settings"])
        new = NewDocument.model_validate({"text": "-"} | values if file is not None else values)
    except ValidationError as error:
        raise invalid(error) from None
    except (ValueError, RecursionError):
        raise InvalidRequestError("The settings are not JSON.", "", parameter="settings") from None
    if file is None:
        return _upload(new, Document(clean_title(new.title or "") or _first_words(new.text), _lines(new.text), "text"))
    if not isinstance(file, UploadFile):
        raise InvalidRequestError("The file is not a file.", "", parameter="file")
    async with request.app.state.reading:
        data, name = await file.read(), file.filename or ""
        document = await run_in_threadpool(read_upload, data, name, new.title, service.config.server)
    return _upload(new, document)


def _upload(new: NewDocument, document: Document) -> Upload:
    if not document.text.strip():
        raise EmptyDocumentError("The document has no text in it.", "Give one with some text.")
    return Upload(document, new.alias, new.settings, PRIORITIES[new.priority])


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _first_words(text: str) -> str:
    """A title for text that has none."""
    line = clean_title(next((line for line in text.splitlines() if line.strip()), "")).lstrip("# ")
    return (line if len(line) <= 60 else line[:59].rstrip() + "…") or UNTITLED


def _card(record: Record) -> DocumentCard:
    done = 1.0 if record.state == "ready" else record.step / record.steps if record.steps else 0.0
    job = JobCard(
        id=record.job,
        state=record.state,
        step=record.step,
        steps=record.steps,
        progress=min(done, 1.0),
        loss=record.loss,
        tokens_per_second=record.speed,
        seconds_left=record.seconds_left,
        error=record.error,
        queued_at=record.queued,
        started_at=record.started,
        finished_at=record.finished,
    )
    return DocumentCard(
        id=record.id,
        title=record.title,
        alias=record.alias,
        file_name=record.source,
        created_at=record.created,
        tokens=record.tokens,
        settings=record.settings,
        state=record.state,
        job=job,
    )
