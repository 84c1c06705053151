"""What a control action was done to, read from its messages for the audit trail.

Takes the fields that are named here and no others, so that no secret and no content can slip in. Runs on the event
loop's thread.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.message import Message

# By the name of the line's entry, of the request and then of the answer, which knows what was made.
FIELDS: Final = (
    *("id", "tenant_id", "key_id", "role"),
    *("upload_id", "adapter_name", "name", "version", "alias", "visibility", "digest"),
)
ANSWER_PATHS: Final = {"key_id": ("key", "id"), "digest": ("version", "digest"), "version": ("version", "version")}
MAX_TEXT: Final = 200  # characters


def target_of(request: object, answer: object) -> dict[str, str | int]:
    """Return what names the object of an action; either message may be missing."""
    found: dict[str, str | int] = {}
    if isinstance(request, Message):
        found |= {name: value for name in FIELDS if (value := _scalar(request, name)) is not None}
    if isinstance(answer, Message):
        for name, (holder, inner) in ANSWER_PATHS.items():
            message = getattr(answer, holder, None)
            value = _scalar(message, inner) if isinstance(message, Message) else None
            if value is not None:
                found[name] = value
    return found


def _scalar(message: Message, name: str) -> str | int | None:
    field = message.DESCRIPTOR.fields_by_name.get(name)
    if field is None or field.is_repeated or field.message_type is not None:
        return None
    value = getattr(message, name)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else int(value)
    if isinstance(value, str):
        return value[:MAX_TEXT] or None
    return value if isinstance(value, int) and value else None
