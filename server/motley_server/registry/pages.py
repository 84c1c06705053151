"""Pages of lists: how many items one has, and where the next begins.

A page token is a position, signed with the registry's own secret and bound to its list, so that one that was made up,
changed or taken from elsewhere is told from one that was given out. It knows no SQL. Any thread may use it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

from motley_server.errors import InvalidArgumentError

DEFAULT_SIZE = 100
MAX_SIZE = 1000
MAX_TOKEN_CHARACTERS = 1024
_SIGNATURE_BYTES = 16

Position = list[str | int]


def page_size(asked: int) -> int:
    """Return how many items a page has: 100 unless asked, at most 1000.

    Raises: InvalidArgumentError (reason=OUT_OF_RANGE).
    """
    if asked < 0:
        raise InvalidArgumentError(f"{asked} is less than nothing", reason="OUT_OF_RANGE", field="page_size")
    return min(asked or DEFAULT_SIZE, MAX_SIZE)


def encode_position(secret: bytes, listing: str, position: Position) -> str:
    """Return the token of the page after a position; `listing` names the list."""
    payload = json.dumps(position, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(_sign(secret, listing, payload) + payload).decode()


def decode_position(secret: bytes, listing: str, token: str) -> Position | None:
    """Return the position that a token was made from; None for the empty token, which is the beginning.

    Raises: InvalidArgumentError (reason=BAD_PAGE_TOKEN).
    """
    if not token:
        return None
    try:
        data = base64.b64decode(token[: MAX_TOKEN_CHARACTERS + 1], altchars=b"-_", validate=True)
    except ValueError:
        data = b""
    signature, payload = data[:_SIGNATURE_BYTES], data[_SIGNATURE_BYTES:]
    # The last character before the padding has bits that say nothing: only one spelling counts.
    is_canonical = base64.urlsafe_b64encode(data).decode() == token
    if not is_canonical or not hmac.compare_digest(signature, _sign(secret, listing, payload)):
        message = "this server gave out no such page token for this list; begin again without one"
        raise InvalidArgumentError(message, reason="BAD_PAGE_TOKEN", field="page_token")
    position: Position = json.loads(payload)
    return position


def _sign(secret: bytes, listing: str, payload: bytes) -> bytes:
    return hmac.digest(secret, listing.encode() + b"\0" + payload, hashlib.sha256)[:_SIGNATURE_BYTES]
