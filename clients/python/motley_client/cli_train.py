"""`motley train`: submit training jobs, watch, list, show and cancel them, and manage their datasets.

Owns these commands' names and flags (scripts rely on them), but for `submit` and `watch`, which have files of their
own; what they print is in `cli_train_words`. Loads gRPC only to make a call. Runs on the main thread.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from motley_client import cli_train_submit, cli_train_watch
from motley_client.cli_options import JsonOption, Server, asks_server, takes_flags
from motley_client.cli_train_flags import TrainingFlags
from motley_client.cli_train_words import (
    capabilities_json,
    capabilities_words,
    dataset_json,
    dataset_table,
    job_json,
    job_table,
    job_words,
)
from motley_client.types_training import JobState

app = typer.Typer(no_args_is_help=True, help="Train adapters and bases from your data; needs a publisher's key.")

JobArgument = Annotated[str, typer.Argument(help="The job's id.", show_default=False)]

app.command("submit")(asks_server(takes_flags(TrainingFlags)(cli_train_submit.submit)))
app.command("watch")(asks_server(cli_train_watch.watch))


@app.command("list")
@asks_server
def list_(
    server: Server,
    state: Annotated[JobState | None, typer.Option("--state", help="Only those.", show_default=False)] = None,
    json_output: JsonOption = False,
) -> None:
    """List your jobs, newest first."""
    with server.connect() as client:
        found = list(client.list_training_jobs(state))
    typer.echo(json.dumps({"jobs": [job_json(one) for one in found]}) if json_output else job_table(found))


@app.command()
@asks_server
def show(server: Server, job: JobArgument, json_output: JsonOption = False) -> None:
    """Show JOB as it stands; of its JSON, `spec` is what `submit --spec` takes."""
    with server.connect() as client:
        found = client.get_training_job(job)
    typer.echo(json.dumps(job_json(found)) if json_output else job_words(found))


@app.command()
@asks_server
def cancel(server: Server, job: JobArgument) -> None:
    """End JOB: at once while it waits, after the step that it is at while it runs."""
    with server.connect() as client:
        found = client.cancel_training_job(job)
    has_ended = found.state is not None and found.state.is_end
    typer.echo(f"cancelled {job}" if has_ended else f"{job} ends after the step that it is at")


@app.command()
@asks_server
def datasets(server: Server, json_output: JsonOption = False) -> None:
    """List your datasets, newest first."""
    with server.connect() as client:
        found = list(client.list_datasets())
    typer.echo(json.dumps({"datasets": [dataset_json(one) for one in found]}) if json_output else dataset_table(found))


@app.command()
@asks_server
def forget(
    server: Server,
    digest: Annotated[str, typer.Argument(help="The dataset's digest, sha256:...", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete the dataset DIGEST, which no job may still need; adapters that it made stay."""
    if not yes:
        typer.confirm(f"Delete dataset {digest}? The server's copy is gone then.", abort=True, err=True)
    with server.connect() as client:
        client.delete_dataset(digest)
    typer.echo(f"deleted {digest}")


@app.command()
@asks_server
def capabilities(server: Server, json_output: JsonOption = False) -> None:
    """Print what jobs can ask for here, and which workers are there to do them."""
    with server.connect() as client:
        found = client.training_capabilities()
    typer.echo(json.dumps(capabilities_json(found)) if json_output else capabilities_words(found))
