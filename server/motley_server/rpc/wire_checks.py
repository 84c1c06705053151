"""What is wrong with a message whatever its meaning: no message at all, enums without a name, too many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from motley_server.errors import InvalidArgumentError, ResourceExhaustedError


class Undecodable:
    """Stand in for a request whose bytes are no message of its type."""


def lenient(deserialize: Callable[[bytes], object]) -> Callable[[bytes], object]:
    """Make a deserializer that returns Undecodable where it would raise, so that this refusal is typed too."""

    def run(data: bytes) -> object:
        try:
            return deserialize(data)
        except DecodeError:
            return Undecodable()

    return run


def check_message(request: object) -> None:
    """Refuse a request that could not be read, or that holds an unknown enum number.

    Raises: InvalidArgumentError (reason=MALFORMED_MESSAGE or UNKNOWN_ENUM_VALUE).
    """
    if isinstance(request, Undecodable):
        raise InvalidArgumentError("the bytes are no message of this method's type", reason="MALFORMED_MESSAGE")
    if isinstance(request, Message):
        for field, number in _unknown_enums(request, ""):
            message = f"{number} is no value of this field"
            raise InvalidArgumentError(message, reason="UNKNOWN_ENUM_VALUE", field=field)


def check_answer(answer: object, max_message_bytes: int) -> None:
    """Refuse to send an answer over the wire's bound, where gRPC would fail the call without details.

    Raises: ResourceExhaustedError (reason=ANSWER_TOO_LARGE).
    """
    if isinstance(answer, Message) and answer.ByteSize() > max_message_bytes:
        message = f"the answer has {answer.ByteSize()} bytes; {max_message_bytes} are allowed in a message"
        raise ResourceExhaustedError(message, reason="ANSWER_TOO_LARGE")


def _unknown_enums(message: Message, prefix: str) -> Iterator[tuple[str, int]]:
    if not _holds_enums(message.DESCRIPTOR):
        return
    for field, value in message.ListFields():
        path = prefix + field.name
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue  # this surface has no map of enums, or of messages that have them
        items = list(enumerate(value)) if field.is_repeated else [(None, value)]
        for index, item in items:
            where = path if index is None else f"{path}[{index}]"
            if field.message_type is not None:
                yield from _unknown_enums(item, f"{where}.")
            elif field.enum_type is not None and item not in field.enum_type.values_by_number:
                yield where, item


@cache
def _holds_enums(descriptor: Descriptor) -> bool:
    return any(_field_holds_enums(field, frozenset({descriptor})) for field in descriptor.fields)


def _field_holds_enums(field: FieldDescriptor, seen: frozenset[Descriptor]) -> bool:
    if field.enum_type is not None:
        return True
    inner = field.message_type
    if inner is None or inner in seen:
        return False
    return any(_field_holds_enums(one, seen | {inner}) for one in inner.fields)
