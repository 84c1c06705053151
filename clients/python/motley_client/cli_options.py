"""The flags that every command which asks a server shares, and the client that they choose.

Owns how those flags are called (scripts rely on it). Loads gRPC only to connect. Runs on the main thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from motley_client.settings import Settings, SettingsError, endpoint

if TYPE_CHECKING:
    from motley_client.client import Client

ServerOption = Annotated[
    str | None, typer.Option("--server", envvar="MOTLEY_SERVER", metavar="HOST:PORT", help="Default: 127.0.0.1:8470.")
]
KeyOption = Annotated[
    str | None, typer.Option("--key", envvar="MOTLEY_KEY", metavar="KEY", help="Bearer key; loopback may need none.")
]
CaFileOption = Annotated[
    str | None, typer.Option("--ca-file", metavar="FILE", help="Use TLS and trust this file alone.")
]
InsecureOption = Annotated[
    bool | None, typer.Option("--insecure", help="No TLS, though the server is another machine.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@contextmanager
def naming_ca_file() -> Iterator[None]:
    """Turn what is wrong with a CA file into a SettingsError."""
    try:
        yield
    except OSError as error:
        raise SettingsError(f"{error.filename}: {error.strerror}", field="ca_file") from error
    except ValueError as error:
        raise SettingsError(str(error), field="ca_file") from error


def connect(server: str | None, key: str | None, ca_file: str | None, insecure: bool | None) -> Client:
    """Make a client of what the flags, the environment and the config file say.

    Raises: SettingsError for whatever makes no endpoint, or a CA file that is none.
    """
    from motley_client.client import Client

    found = endpoint(Settings(server, key, ca_file, insecure), os.environ)
    with naming_ca_file():
        return Client(found.address, found.key, ca_file=found.ca_file, insecure=found.insecure)
