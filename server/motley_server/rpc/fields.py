"""Names of fields in errors, spelled as they are in the message that they came from.

Whoever refuses a value knows what it is called in the server; what part of which message it was, the code of an RPC
knows alone. Runs on the event loop's thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from motley_server.errors import MotleyError

_FIRST_WORD = re.compile(r"\w+(?=\[|$)")  # not of a file's name


@contextmanager
def naming(part: str, fields: Mapping[str, str]) -> Iterator[None]:
    """Put a part's name before the fields of errors, of those that it has; `fields` are its own names for them."""
    try:
        yield
    except MotleyError as error:
        word = _FIRST_WORD.match(error.field or "")
        if error.field and word and word[0] in fields:
            error.field = f"{part}.{fields[word[0]]}{error.field[word.end() :]}"
        raise
