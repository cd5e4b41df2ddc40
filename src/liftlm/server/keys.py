"""Bearer keys: made here, shown once, kept as hashes.

A key has 256 random bits, so that a plain SHA-256 cannot be searched and needs neither salt nor delay.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from liftlm.errors import NotAuthorizedError
from liftlm.server.store import LOCAL, Store

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


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
