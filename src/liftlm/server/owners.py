"""Whose request it is, what of this machine it may be addressed to, and how often: asked before any route does anything."""

from __future__ import annotations

from urllib.parse import urlsplit

from fastapi import Request

from liftlm.errors import NotAllowedError
from liftlm.server.keys import owner_of
from liftlm.server.service import Service

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def service_of(request: Request) -> Service:
    """The service behind the app."""
    service: Service = request.app.state.service
    return service


def known_owner(request: Request) -> str:
    """The owner, for pages that are no work. Raises NotAuthorizedError, NotAllowedError."""
    check_origin(request)
    service = service_of(request)
    return owner_of(service.store, request.headers.get("authorization"), service.keys_required)


def asking_owner(request: Request) -> str:
    """The owner, whose requests are counted. Raises ServerBusyError over the limit, too."""
    owner = known_owner(request)
    service_of(request).questions.take(owner)
    return owner


def check_origin(request: Request) -> None:
    """A page of another site must not use a server of this machine through the user's browser, nor by a name of its own.

    Raises NotAllowedError.
    """
    host = request.headers.get("host", "")
    name = urlsplit(f"//{host}").hostname if _sane(host) else None
    allowed: set[str] = request.app.state.hosts
    if not service_of(request).keys_required and name not in _LOOPBACK | allowed:
        raise NotAllowedError(
            "Without keys this server answers only to its own names.", "Use http://127.0.0.1, or make a key."
        )
    origin = request.headers.get("origin")
    if origin is not None and (not _sane(origin) or urlsplit(origin).netloc != host):
        raise NotAllowedError("Requests from pages of other sites are not answered.", "Open this server's own page.")


def _sane(text: str) -> bool:
    try:
        return urlsplit(f"//{text.rpartition('//')[2]}").hostname is not None
    except ValueError:
        return False
