"""What libraries raise over a checkpoint's files, as refusals of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from motley_bases.errors import BaseError, UnreadableBaseError


@contextmanager
def refusing(what: str, reason: str) -> Iterator[None]:
    """Turn whatever a library raises over a checkpoint's files into a refusal that quotes it on one line.

    Raises: UnreadableBaseError with the reason; a refusal of ours passes as it is.
    """
    try:
        yield
    except BaseError:
        raise
    # What a wrong value makes foreign code trip over is of no fixed type: KeyError, ZeroDivisionError, AssertionError
    # and plain Exception all occur.
    except Exception as error:
        quoted = " ".join(str(error).split())
        raise UnreadableBaseError(f"{what}: {type(error).__name__}: {quoted}", reason=reason) from error
