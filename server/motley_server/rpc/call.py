"""Who is calling, and about what, for the code of one RPC.

grpc.aio gives a servicer no place of its own for what interceptors found out; it does run interceptors and handler of
one RPC in one context, so a context variable carries it, seen by nobody else.
"""

from __future__ import annotations

from contextvars import ContextVar

from google.protobuf.message import Message

from motley_server.asked import Caller

_SUBJECT: ContextVar[Message | None] = ContextVar("motley_subject", default=None)
_NOTES: ContextVar[dict[str, str | int]] = ContextVar("motley_notes")
_CALLER: ContextVar[Caller] = ContextVar("motley_caller")


def set_caller(caller: Caller) -> None:
    """Note who makes the RPC that runs in this context."""
    _CALLER.set(caller)


def current_caller() -> Caller:
    """Return who makes this RPC."""
    return _CALLER.get()


def set_subject(message: Message) -> None:
    """Note the message that says what this RPC is about, where its request is a stream of them."""
    _SUBJECT.set(message)


def current_subject() -> Message | None:
    """Return what `set_subject` noted."""
    return _SUBJECT.get()


def begin_notes() -> dict[str, str | int]:
    """Open the notes that the code of this RPC adds to its line in the audit."""
    notes: dict[str, str | int] = {}
    _NOTES.set(notes)
    return notes


def note(**facts: str | int) -> None:
    """Note what the messages of this RPC do not tell of its object; nothing is noted of what is empty."""
    _NOTES.get().update({name: fact for name, fact in facts.items() if fact})
