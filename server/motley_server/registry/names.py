"""The grammar of adapter names: what a request may write, and what it means before anything is looked up.

NAME   NAME@alias   NAME@3   NAME@sha256:<64 hex digits>, each also as OWNER/..., where `public` is an owner too
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NAME_RULE = "1 to 128 of a-z, 0-9, dot, dash and underscore, beginning with a letter or a digit"
DEFAULT_ALIAS = "default"
LOCAL_TENANT = "local"  # whoever needs no key
PUBLIC_OWNER = "public"  # nobody; owns what everybody may use

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_DIGITS = re.compile(r"[0-9]+")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class AdapterReference:
    """A name as written: whose, which, and by exactly one of alias, version and digest."""

    owner: str | None  # None is the caller
    name: str
    alias: str | None = None
    version: int | None = None
    digest: str | None = None


def is_name(text: object) -> bool:
    """Tell whether a text can name an adapter or an owner."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def parse_reference(text: str) -> AdapterReference:
    """Read a name as a request writes it.

    Raises: ValueError, saying which part is wrong.
    """
    path, at, selector = text.partition("@")
    first, slash, second = path.partition("/")
    owner, name = (first, second) if slash else (None, first)
    for what, part in (("an owner", owner), ("a name", name)):
        if part is not None and not is_name(part):
            raise ValueError(f"{part[:140]!r} is not {what}: {NAME_RULE}")
    if not at:
        return AdapterReference(owner, name, alias=DEFAULT_ALIAS)
    if _DIGEST.fullmatch(selector):
        return AdapterReference(owner, name, digest=selector)
    if _VERSION.fullmatch(selector):
        return AdapterReference(owner, name, version=int(selector))
    if _DIGITS.fullmatch(selector) or not is_name(selector):
        message = (
            f"{selector[:140]!r} after the @ is neither an alias, nor a version from 1, nor sha256: and 64 hex digits"
        )
        raise ValueError(message)
    return AdapterReference(owner, name, alias=selector)
