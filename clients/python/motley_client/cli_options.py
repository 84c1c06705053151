"""The flags that every command which asks a server shares, and the client that they choose.

Owns how those flags are called (scripts rely on it), and gives them to a command. Loads gRPC only to connect. Runs on
the main thread.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, TypeVar, get_type_hints

import typer

from motley_client.settings import Settings, SettingsError, endpoint

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

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

_SERVER_FLAGS = {"server": ServerOption, "key": KeyOption, "ca_file": CaFileOption, "insecure": InsecureOption}
_Arguments = ParamSpec("_Arguments")
_Flags = TypeVar("_Flags", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class Server:
    """The server that a command is for, as far as its flags say."""

    settings: Settings

    def connect(self) -> Client:
        """Make a client of what the flags, the environment and the config file say.

        Raises: SettingsError for whatever makes no endpoint, or a CA file that is none.
        """
        from motley_client.client import Client

        found = endpoint(self.settings, os.environ)
        with naming_ca_file():
            return Client(found.address, found.key, ca_file=found.ca_file, insecure=found.insecure)


def asks_server(command: Callable[Concatenate[Server, _Arguments], None]) -> Callable[..., None]:
    """Give a command the flags that choose a server, behind its arguments, and call it with that server first."""

    def run(server: str | None, key: str | None, ca_file: str | None, insecure: bool | None, **arguments: Any) -> None:
        command(Server(Settings(server, key, ca_file, insecure)), **arguments)  # type: ignore[call-arg]

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    flags = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)
        for name, annotation in _SERVER_FLAGS.items()
    ]
    arguments = [one for one in own if one.default is inspect.Parameter.empty]
    options = [one for one in own if one.default is not inspect.Parameter.empty]
    parameters = [*arguments, *flags, *options]
    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer makes flags of
    return run


def takes_flags(
    kind: type[_Flags],
) -> Callable[[Callable[Concatenate[Server, _Flags, _Arguments], None]], Callable[..., None]]:
    """Give a command a flag for each field of a dataclass, before its own options, and call it with an instance.

    Semantics: the fields are annotated as typer wants it, and all have a default.
    """

    def give(command: Callable[Concatenate[Server, _Flags, _Arguments], None]) -> Callable[..., None]:
        hints = get_type_hints(kind, include_extras=True)
        flags = [
            inspect.Parameter(
                one.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=one.default, annotation=hints[one.name]
            )
            for one in fields(kind)
        ]

        def run(server: Server, **arguments: Any) -> None:
            said = kind(**{one.name: arguments.pop(one.name) for one in flags})
            command(server, said, **arguments)  # type: ignore[call-arg]

        first, _, *own = inspect.signature(command, eval_str=True).parameters.values()
        arguments = [one for one in own if one.default is inspect.Parameter.empty]
        options = [one for one in own if one.default is not inspect.Parameter.empty]
        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        run.__signature__ = inspect.Signature([first, *arguments, *flags, *options])  # type: ignore[attr-defined]
        return run

    return give


@contextmanager
def naming_ca_file() -> Iterator[None]:
    """Turn what is wrong with a CA file into a SettingsError."""
    try:
        yield
    except OSError as error:
        raise SettingsError(f"{error.filename}: {error.strerror}", field="ca_file") from error
    except ValueError as error:
        raise SettingsError(str(error), field="ca_file") from error
