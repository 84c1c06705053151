"""The filter of a list of adapters: `key=value` terms, all of which must hold.

    owner=acme name=legal kind=lora labels.team=search labels.note="two words"

The first three are as they are written everywhere else; a label's name follows `labels.`. It reads text and returns
conditions on the newest version of an adapter. Any thread may use it.
"""

from __future__ import annotations

import shlex

from sqlalchemy import ColumnElement

from motley_server.errors import InvalidArgumentError
from motley_server.registry.labels import is_label_key, is_label_value
from motley_server.registry.names import is_name
from motley_server.registry.schema import adapter_versions, adapters

MAX_CHARACTERS = 1000
MAX_TERMS = 20

_COLUMNS = {"owner": adapters.c.owner, "name": adapters.c.name, "kind": adapter_versions.c.kind}
_LABELS = "labels."


def conditions_of(text: str) -> list[ColumnElement[bool]]:
    """Read a filter; the empty one has no conditions.

    Raises: InvalidArgumentError (reason=BAD_FILTER).
    """
    if len(text) > MAX_CHARACTERS or not text.isprintable():
        raise _refusal(f"it is at most {MAX_CHARACTERS} printable characters")
    try:
        terms = shlex.split(text)
    except ValueError as error:
        raise _refusal(f"a quotation mark or a backslash is alone ({error})") from None
    if len(terms) > MAX_TERMS:
        raise _refusal(f"it has at most {MAX_TERMS} terms")
    return [_condition_of(term) for term in terms]


def _condition_of(term: str) -> ColumnElement[bool]:
    key, equals, value = term.partition("=")
    if not equals:
        raise _refusal(f"{term!r} is no term of the form key=value")
    if key.startswith(_LABELS):
        label = key.removeprefix(_LABELS)
        if not is_label_key(label) or not is_label_value(value):
            raise _refusal(f"{term!r} is about no label that there could be")
        has_label: ColumnElement[bool] = adapter_versions.c.labels[label].as_string() == value
        return has_label
    if key not in _COLUMNS:
        raise _refusal(f"{key!r} is none of {', '.join(_COLUMNS)} and labels.KEY")
    if not is_name(value):
        raise _refusal(f"{value!r} is no {key}")
    return _COLUMNS[key] == value


def _refusal(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"the filter cannot be read: {message}", reason="BAD_FILTER", field="filter")
