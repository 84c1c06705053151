"""`motley train watch`: a job's events on standard output, until it has ended.

Owns how they are drawn, a live line on a terminal and plain lines elsewhere, and which exit status an end has. Runs on
the main thread.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from motley_client.cli_options import Server
from motley_client.cli_train_words import event_json, event_words
from motley_client.types_training import JobEvent, JobState, TrainingProgress

if TYPE_CHECKING:
    from motley_client.client import Client

EXIT_OTHERWISE = 1
EXIT_BY_STATE = {JobState.SUCCEEDED: 0, JobState.REJECTED: 4, JobState.FAILED: 5, JobState.CANCELLED: 6}

EventLinesOption = Annotated[bool, typer.Option("--json", help="Print one JSON object an event.")]


def watch(
    server: Server,
    job: Annotated[str, typer.Argument(help="The job's id.", show_default=False)],
    json_output: EventLinesOption = False,
) -> None:
    """Print what happens to JOB until it has ended, over restarts of the server.

    Exit status: 0 if it succeeded, 4 if its gate rejected it, 5 if it failed, 6 if it was cancelled.
    """
    with server.connect() as client:
        watch_to_end(client, job, json_output=json_output)


def watch_to_end(client: Client, job_id: str, *, json_output: bool) -> None:
    """Print a job's events until it has ended.

    Raises: typer.Exit with the status that its end has; MotleyClientError.
    """
    with _drawing(json_output) as draw:
        for event in client.watch_training_job(job_id):
            draw(event)
    ended = client.get_training_job(job_id)
    raise typer.Exit(EXIT_OTHERWISE if ended.state is None else EXIT_BY_STATE.get(ended.state, EXIT_OTHERWISE))


@contextmanager
def _drawing(json_output: bool) -> Iterator[Callable[[JobEvent], None]]:
    if json_output:
        yield lambda event: typer.echo(json.dumps(event_json(event)))
    elif sys.stdout.isatty():
        with _drawing_live() as draw:
            yield draw
    else:
        yield lambda event: typer.echo(event_words(event))


@contextmanager
def _drawing_live() -> Iterator[Callable[[JobEvent], None]]:
    """Draw progress on one line that changes, and what else happens above it, with the progress until then."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False, markup=False, soft_wrap=True)
    last: JobEvent | None = None
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def draw(event: JobEvent) -> None:
            nonlocal last
            if isinstance(event.event, TrainingProgress):
                last = event
                live.update(Text(event_words(event), no_wrap=True, overflow="ellipsis"), refresh=True)
                return
            live.update("", refresh=True)
            if last is not None:
                console.print(event_words(last))
            console.print(event_words(event))
            last = None

        yield draw
