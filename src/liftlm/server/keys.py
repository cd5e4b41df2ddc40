"""Bearer keys: made here, shown once, kept as hashes.

A key has 256 random bits, so that a plain SHA-256 cannot be searched and needs neither salt nor delay.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets

from liftlm.errors import EntryNotFoundError, LibraryBusyError, NotAuthorizedError
from liftlm.server.store import LOCAL, Store
from liftlm.shelf import Shelf

_PREFIX = "lift-"


def make_key(store: Store, name: str) -> tuple[str, str]:
    """(id, key). The key is not stored and cannot be shown again."""
    key_id, key = f"key-{secrets.token_hex(4)}", _PREFIX + secrets.token_urlsafe(32)
    store.add_key(key_id, name, _digest(key))
    return key_id, key


def owner_of(store: Store, authorization: str | None, required: bool) -> str:
    """Whose request it is, by its Authorization header: a key's id, or LOCAL where there are no keys and none is required.

    Raises NotAuthorizedError. All keys are compared, in constant time.
    """
    keys = store.all_keys()
    if not keys and not required:
        return LOCAL
    scheme, _, given = (authorization or "").partition(" ")
    digest = _digest(given.strip())
    owner = None
    for key_id, _, known, _ in keys:
        if hmac.compare_digest(known, digest):
            owner = key_id
    if owner is None or scheme.lower() != "bearer":
        raise NotAuthorizedError(
            "This server needs a key, and the one given is not known." if given else "This server needs a key.",
            "Send it as `Authorization: Bearer KEY`; `lift keys add NAME` makes one.",
        )
    return owner


def give_documents(store: Store, owner: str, other: str) -> int:
    """From a key, also one that was removed, or from LOCAL, to a key or LOCAL; how many. Raises EntryNotFoundError."""
    if other != LOCAL and other not in {key_id for key_id, *_ in store.all_keys()}:
        raise EntryNotFoundError(f"There is no key '{other}'.", "`lift keys list` shows all.")
    if owner == other or owner not in store.owners():
        raise EntryNotFoundError(f"'{owner}' has no documents to give away.", "`lift keys list` shows who has some.")
    return store.give(owner, other)


def delete_documents(store: Store, shelf: Shelf, owner: str) -> int:
    """All of an owner's, and what was learnt from those that nobody else has; how many.

    One that is being absorbed is left to the running server, which gives it up at its next step.
    """
    records = store.documents(owner)
    for record in records:
        if store.remove(owner, record.id):
            with contextlib.suppress(LibraryBusyError):
                with contextlib.suppress(EntryNotFoundError):
                    shelf.remove(record.id)
                store.forget([record.id])
    return len(records)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
