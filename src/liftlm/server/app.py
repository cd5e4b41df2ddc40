"""The HTTP application: routes, limits, errors, health, metrics and the page, put together around a `Service`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Response

from liftlm import __version__
from liftlm.server import completion_routes, document_routes, page
from liftlm.server.limits import BodyLimit
from liftlm.server.owners import check_origin, known_owner
from liftlm.server.protocol import Health, NewDocument
from liftlm.server.replies import error_reply, errors_of, handle_errors
from liftlm.server.service import Service

log = logging.getLogger("liftlm.server")
_READING_AT_ONCE = 2  # files; others wait without a thread and with their content on the disk
_FORM_ROOM = 2**16  # bytes of a form around its file
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
}


def make_app(service: Service, *, hosts: Iterable[str] = (), log_content: bool = False) -> FastAPI:
    """The app; starts and stops the service with itself. hosts: names besides loopback's that it is addressed by."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.reading = asyncio.Semaphore(_READING_AT_ONCE)
        service.start(app.state.on_failure)
        yield
        service.stop()

    app = FastAPI(
        title="liftlm",
        version=__version__,
        description="Absorbed documents, in OpenAI's protocol. Keys go into `Authorization: Bearer KEY`.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would be to whatever host the request names
        strict_content_type=False,
    )
    app.state.service, app.state.hosts, app.state.log_content = service, set(hosts), log_content
    app.state.on_failure = lambda error: None
    app.state.stopping = lambda: False  # who runs the app may know better
    handle_errors(app)
    app.include_router(completion_routes.router)
    app.include_router(document_routes.router)
    _add_health(app, service)
    page.add_page(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    limits = service.config.server

    def limit(path: str) -> int:
        return (
            limits.upload_megabytes * 2**20 + _FORM_ROOM if path == "/v1/documents" else limits.request_kilobytes * 1024
        )

    app.add_middleware(BodyLimit, limit=limit, fail=error_reply)
    app.add_middleware(_Record, service=service)
    return app


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["health"], responses=errors_of(), dependencies=[Depends(check_origin)])
    def healthz() -> Health:
        """The process answers; its engine is alive or still loading."""
        broken = service.engine.loaded.is_set() and not service.engine.alive
        return Health(status="the engine has stopped" if broken else "ok")

    @app.get(
        "/readyz",
        tags=["health"],
        responses={**errors_of(), 503: {"model": Health}},
        dependencies=[Depends(check_origin)],
    )
    def readyz(response: Response) -> Health:
        """Questions are answered."""
        if not service.ready:
            response.status_code = 503
            return Health(status="loading")
        return Health(status="ready")

    @app.get(
        "/metrics",
        tags=["health"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **errors_of()},
    )
    def metrics(owner: Annotated[str, Depends(known_owner)]) -> Response:
        """For Prometheus."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's, without the 422 that it takes for granted, with the form's JSON twin and the keys."""
    if app.openapi_schema is None:
        from fastapi.openapi.utils import get_openapi

        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = schema["components"]["schemas"]
        new = NewDocument.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(new.pop("$defs", {}))
        schemas["NewDocument"] = new
        for methods in schema["paths"].values():
            for operation in methods.values():
                reply = operation["responses"].get("422", {})
                if "HTTPValidationError" in str(reply):
                    del operation["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}, {}]
        app.openapi_schema = schema
    return app.openapi_schema


class _Record:
    """ASGI middleware: one line and one count a request, by its route: no query, no content. Adds the safety headers."""

    def __init__(self, app: Any, *, service: Service) -> None:
        self._app, self._metrics = app, service.metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    *((k.lower().encode(), v.encode()) for k, v in _HEADERS.items()),
                ]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:  # nothing of it reaches uvicorn's log, which would tell what it is about
            if status:
                log.error("broken off: %s", type(error).__name__)
            else:
                await error_reply(error)(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            if status >= 400 and status != 499:
                self._metrics.errors.labels(f"status {status}").inc()
            log.info("%s %s %d %.0f ms", scope["method"], route, status, 1000 * (time.monotonic() - began))
