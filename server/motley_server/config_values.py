"""How one configuration value is read: its type, its range, and what is said when it is wrong.

Each function here makes a parser for one kind of value. Values from files have types already; values from the
environment and the command line are text.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

N = TypeVar("N", int, float)
BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from: what to call it, whether it is bare text, and where its relative paths start."""

    label: str
    is_text: bool
    directory: Path


Parser = Callable[[object, Origin], object]


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port to listen on; port 0 takes any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Tell whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def integer(minimum: int, maximum: int = 2**63 - 1) -> Parser:
    """Make the parser of an integer in a range."""

    def parse(value: object, origin: Origin) -> object:
        if origin.is_text and isinstance(value, str):
            try:
                value = int(value)
            except ValueError:
                raise ValueError(f"{value!r} is not an integer") from None
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{value!r} is not an integer")
        return _in_range(value, minimum, maximum)

    return parse


def number(minimum: float, maximum: float) -> Parser:
    """Make the parser of a finite number in a range."""

    def parse(value: object, origin: Origin) -> object:
        if origin.is_text and isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"{value!r} is not a number") from None
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{value!r} is not a finite number")
        return _in_range(float(value), minimum, maximum)

    return parse


def _in_range(value: N, minimum: N, maximum: N) -> N:
    if not minimum <= value <= maximum:
        raise ValueError(f"{value} is not within {minimum} and {maximum}")
    return value


def flag(value: object, origin: Origin) -> object:
    """Read true or false."""
    if origin.is_text and isinstance(value, str) and value.lower() in BOOLEANS:
        return BOOLEANS[value.lower()]
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def choice(*allowed: str) -> Parser:
    """Make the parser of one word out of several."""

    def parse(value: object, origin: Origin) -> object:
        if value not in allowed:
            raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
        return value

    return parse


def address(value: object, origin: Origin) -> object:
    """Read HOST:PORT, with an IPv6 host in brackets."""
    host, colon, port = _text(value).rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{value!r} is not HOST:PORT; an IPv6 host stands in brackets")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"{value!r} is not HOST:PORT")
    return Address(host, int(port))


def optional_address(value: object, origin: Origin) -> object:
    """Read HOST:PORT, or nothing for an empty text."""
    return None if value == "" else address(value, origin)


def directory(value: object, origin: Origin) -> object:
    """Read a path, relative to where the value came from; it need not exist."""
    text = _text(value)
    if not text:
        raise ValueError("an empty path")
    try:
        return (origin.directory / Path(text).expanduser()).absolute()
    except RuntimeError as error:  # no home directory
        raise ValueError(f"{text}: {error}") from error


def optional_path(value: object, origin: Origin) -> object:
    """Read a path as `directory` does, or nothing for an empty text."""
    return None if value == "" else directory(value, origin)


def database_url(value: object, origin: Origin) -> object:
    """Read where the registry lies: a URL of SQLite or PostgreSQL, or an empty text for the default."""
    text = _text(value)
    if text and not text.startswith(("sqlite:////", "postgresql://")):
        # The text is not repeated: a URL may hold a password.
        raise ValueError("neither sqlite:////ABSOLUTE/PATH nor postgresql://...")
    return text


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value
