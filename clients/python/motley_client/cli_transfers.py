"""`motley adapters push` and `pull`: an adapter's files from a directory to a server, and back.

Owns these commands' flags (scripts rely on them) and how progress is drawn: on standard error, and only for people.
Loads gRPC only to make a call. Runs on the main thread.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from motley_client.cli_adapter_words import version_json
from motley_client.cli_options import JsonOption, Server
from motley_client.types_adapters import AdapterKind, UploadPhase, UploadProgress


class FileTroubleError(Exception):
    """Say which of this machine's files could not be read or written, and why."""

    reason = "FILE_TROUBLE"
    field = None

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.message = f"{error.filename}: {error.strerror}" if error.filename else str(error)


def read_label(text: str) -> tuple[str, str]:
    """Return the key and the value of a label.

    Raises: typer.BadParameter for a text without both.
    """
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise typer.BadParameter(f"{text!r} is no label: write KEY=VALUE")
    return key, value


def push(
    server: Server,
    name: Annotated[str, typer.Argument(help="The adapter's name.", show_default=False)],
    directory: Annotated[Path, typer.Argument(help="Where its files are.", show_default=False)],
    alias: Annotated[
        list[str] | None,
        typer.Option("--alias", metavar="ALIAS", help="Point it at the new version, not `default`; may be repeated."),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Label it; may be repeated.")
    ] = None,
    kind: Annotated[
        AdapterKind | None, typer.Option("--kind", help="Refuse it unless the files say so too.", show_default=False)
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Upload the adapter in DIRECTORY as a new version of NAME; run it again, and it goes on where it broke off."""
    labels = dict(read_label(text) for text in label or ())
    with server.connect() as client, naming_files(), drawing_progress() as progress:
        made = client.upload_adapter(name, directory, aliases=alias or (), labels=labels, kind=kind, progress=progress)
    typer.echo(json.dumps(version_json(made)) if json_output else f"{name}@{made.version} {made.digest}")


def pull(
    server: Server,
    name: Annotated[
        str, typer.Argument(help="NAME, NAME@alias, NAME@3 or NAME@sha256:..., of your own.", show_default=False)
    ],
    directory: Annotated[Path, typer.Argument(help="Where its files go.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that lies there.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Download the files of NAME into DIRECTORY."""
    with server.connect() as client, naming_files():
        found = client.download_adapter(name, directory, overwrite=overwrite)
    words = f"{found.name}@{found.version} {found.digest} is in {directory}"
    typer.echo(json.dumps(version_json(found)) if json_output else words)


@contextmanager
def naming_files() -> Iterator[None]:
    """Turn what this machine's files refuse into a FileTroubleError."""
    try:
        yield
    except OSError as error:
        raise FileTroubleError(error) from error


@contextmanager
def drawing_progress() -> Iterator[Callable[[UploadProgress], None] | None]:
    """Draw a bar for each phase while the block runs, if anybody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        tasks = {phase: bars.add_task(phase.value, start=False, visible=False) for phase in UploadPhase}

        def draw(progress: UploadProgress) -> None:
            task = tasks[progress.phase]
            bars.start_task(task)
            bars.update(task, completed=progress.done_bytes, total=progress.total_bytes, visible=True)

        yield draw
