"""The parts of a stream that brings files: a header, chunks, and a finish, in this order.

Runs on the event loop's thread, in the RPC's own task.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, Protocol, TypeVar

from motley_server.errors import InvalidArgumentError
from motley_server.rpc.wire_checks import check_message

Header = TypeVar("Header", covariant=True)
Chunk = TypeVar("Chunk", covariant=True)


class Part(Protocol[Header, Chunk]):
    """A message of such a stream."""

    @property
    def header(self) -> Header:
        """Return what is brought."""

    @property
    def chunk(self) -> Chunk:
        """Return a piece of it."""

    def WhichOneof(self, group: Literal["payload"], /) -> str | None:  # noqa: N802 (protobuf's name)
        """Return which of its parts a message is."""


async def read_header(messages: AsyncIterator[Part[Header, Chunk]], what: str) -> Header:
    """Return the header that a stream begins with; `what` is what the caller's words call what it brings.

    Raises: InvalidArgumentError (reason=HEADER_EXPECTED).
    """
    first = await anext(messages, None)
    check_message(first)
    if first is None or first.WhichOneof("payload") != "header":
        raise InvalidArgumentError(f"{what} begins with its header", reason="HEADER_EXPECTED", field="header")
    return first.header


async def read_chunks(messages: AsyncIterator[Part[Header, Chunk]], what: str) -> AsyncIterator[Chunk]:
    """Yield the chunks after the header, up to the finish.

    Raises: InvalidArgumentError (reason=CHUNK_EXPECTED or UPLOAD_UNFINISHED).
    """
    async for message in messages:
        check_message(message)
        match message.WhichOneof("payload"):
            case "chunk":
                yield message.chunk
            case "finish":
                return
            case _:
                text = f"after its header {what} has chunks, and then its finish"
                raise InvalidArgumentError(text, reason="CHUNK_EXPECTED", field="chunk")
    raise InvalidArgumentError("the stream ended without its finish", reason="UPLOAD_UNFINISHED", field="finish")
