"""Labels: words of a publisher's own that a version carries, for people and filters.

It knows what a label may be, not what it means. Any thread may use it.
"""

from __future__ import annotations

from collections.abc import Mapping

from motley_server.errors import InvalidArgumentError
from motley_server.registry.names import NAME_RULE, is_name

MAX_LABELS = 32
MAX_VALUE_CHARACTERS = 200


def is_label_key(text: str) -> bool:
    """Tell whether a text can name a label."""
    return is_name(text)


def is_label_value(text: str) -> bool:
    """Tell whether a text can be a label's value."""
    return len(text) <= MAX_VALUE_CHARACTERS and text.isprintable()


def check_labels(labels: Mapping[str, str]) -> None:
    """Refuse what cannot be kept or found again.

    Raises: InvalidArgumentError (reason=INVALID_LABEL).
    """
    if len(labels) > MAX_LABELS:
        message = f"{len(labels)} labels are too many: at most {MAX_LABELS}"
        raise InvalidArgumentError(message, reason="INVALID_LABEL", field="labels")
    for key, value in labels.items():
        if not is_label_key(key):
            message = f"{key[:140]!r} is no label's name: {NAME_RULE}"
            raise InvalidArgumentError(message, reason="INVALID_LABEL", field="labels")
        if not is_label_value(value):
            message = f"a label's value is at most {MAX_VALUE_CHARACTERS} printable characters"
            raise InvalidArgumentError(message, reason="INVALID_LABEL", field=f"labels[{key}]")
