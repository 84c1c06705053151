"""The fields that messages of several services share: their checks, request ids, times and durations.

Knows no message of ours and no channel. Pure functions but for the request id; a value that protobuf cannot hold is an
InvalidArgumentError naming the field, raised before anything is sent.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from motley_client.errors import InvalidArgumentError

_Made = TypeVar("_Made", bound=Message)

_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
}


def checked(field: str, make: Callable[..., _Made], **values: Any) -> _Made:
    """Make a message.

    Raises: InvalidArgumentError, naming the field, for a value that protobuf cannot hold.
    """
    try:
        return make(**values)
    except (ValueError, TypeError, OverflowError) as error:
        problem = _out_of_bounds(make, values) or str(error)
        raise InvalidArgumentError(f"{field}: {problem}", reason="INVALID_VALUE", field=field) from error


def _out_of_bounds(make: object, values: Mapping[str, Any]) -> str | None:
    """Return which value is more, or less, than its field can hold, and how much that is; None if none is."""
    if not (isinstance(make, type) and issubclass(make, Message)):
        return None
    fields = make.DESCRIPTOR.fields_by_name
    for name, value in values.items():
        if name in fields and isinstance(value, int) and fields[name].cpp_type in _BOUNDS:
            least, most = _BOUNDS[fields[name].cpp_type]
            if not least <= value <= most:
                return f"{value} is not within {least} and {most}"
    return None


def fill_request_id(request: Message, given: str | None) -> None:
    """Put a request id into a message: the given one, or a fresh one that makes every repeat the same change."""
    request.MergeFrom(checked("request_id", type(request), request_id=uuid.uuid4().hex if given is None else given))


def fill_page_size(request: Message, page_size: int | None) -> None:
    """Put a page size into a message; None leaves it to the server."""
    request.MergeFrom(checked("page_size", type(request), page_size=page_size))


def duration(seconds: float) -> Duration:
    """Make a duration."""
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def timestamp(time: datetime) -> Timestamp:
    """Make a timestamp.

    Raises: ValueError for a time without a zone, which would mean another instant on another machine.
    """
    if time.tzinfo is None:
        raise ValueError("a time needs a zone, such as datetime.UTC")
    message = Timestamp()
    message.FromDatetime(time)
    return message


def moment(message: Timestamp) -> datetime:
    """Read a timestamp, in UTC."""
    return message.ToDatetime(UTC)
