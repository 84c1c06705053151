"""`motley train submit`: data from a file, a job from flags or a file, and the job's id.

Owns this command's flags (scripts rely on them), but for those of the spec, which are in `cli_train_flags`. Loads gRPC
only to make a call. Runs on the main thread.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motley_client.cli_options import JsonOption, Server
from motley_client.cli_train_flags import TrainingFlags
from motley_client.cli_train_settings import SCRATCH
from motley_client.cli_train_spec import spec_of
from motley_client.cli_train_watch import watch_to_end
from motley_client.cli_train_words import job_json
from motley_client.cli_transfers import drawing_progress, naming_files
from motley_client.types_training_methods import LoramAlignment, LoramSettings
from motley_client.types_training_spec import Gate, TrainingSpec

if TYPE_CHECKING:
    from motley_client.client import Client

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_WITH_A_SPEC = ("--eval", "--align-with")  # what a file of a spec cannot name before it is uploaded


def submit(
    server: Server,
    flags: TrainingFlags,
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA.jsonl", help="A file of samples, or sha256:... of one that is there.", show_default=False
        ),
    ] = None,
    spec: Annotated[
        Path | None,
        typer.Option("--spec", metavar="FILE", help="Take everything from the JSON of a TrainingSpec instead."),
    ] = None,
    request_id: Annotated[
        str | None, typer.Option("--request-id", metavar="ID", help="The same id again is the same job.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on as `watch` does, and exit as it does.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Upload DATA.jsonl, unless it is there, queue a job that trains an adapter on it, or a base, and print its id.

    A line is {"prompt": ..., "completion": ...}, {"messages": [...]} or {"text": ...}. --json prints the job, and with
    --watch then an object an event.
    """
    asked = spec_of(flags) if spec is None else _filed_spec(spec, flags)
    _check_data(asked, data, flags)
    with server.connect() as client:
        _check_start(client, flags.start)
        asked = _with_data(client, asked, data, flags)
        job = client.create_training_job(asked, request_id=request_id)
        typer.echo(json.dumps(job_json(job)) if json_output else job.id)
        if watch:
            watch_to_end(client, job.id, json_output=json_output)


def _filed_spec(path: Path, flags: TrainingFlags) -> TrainingSpec:
    from motley_client.convert_training_spec import spec_of_json

    strangers = [flag for flag in flags.said() if flag not in _WITH_A_SPEC]
    if strangers:
        raise typer.BadParameter(f"--spec says everything: write {', '.join(strangers)} into {path}")
    with naming_files():
        text = path.read_bytes()
    return spec_of_json(text)


def _check_data(spec: TrainingSpec, data: str | None, flags: TrainingFlags) -> None:
    """Refuse data that is missing, or given twice, and a spec that cannot be sent, before a long upload."""
    from motley_client.convert_training_spec import spec_message

    if data is None and not spec.dataset:
        raise typer.BadParameter("name the DATA.jsonl to train on")
    if data is not None and spec.dataset:
        raise typer.BadParameter(f"the spec names the dataset {spec.dataset} already: leave out {data}")
    if flags.eval is not None and spec.gate is not None and spec.gate.dataset:
        raise typer.BadParameter(f"the spec names the dataset {spec.gate.dataset} to measure on: leave out --eval")
    if flags.align_with is not None:
        if not isinstance(spec.settings, LoramSettings):
            raise typer.BadParameter("the spec is not of the method loram: leave out --align-with")
        if spec.settings.alignment is not None and spec.settings.alignment.dataset:
            there = spec.settings.alignment.dataset
            raise typer.BadParameter(f"the spec names the dataset {there} to align on: leave out --align-with")
    spec_message(spec)


def _check_start(client: Client, start: str | None) -> None:
    """Refuse to train on from any base but the one that is served, which the server could not tell from it."""
    if start not in (None, SCRATCH) and start != (served := client.info().base_model):
        raise typer.BadParameter(f"{start!r} is not served, but {served!r}: train on from that one, or from {SCRATCH}")


def _with_data(client: Client, spec: TrainingSpec, data: str | None, flags: TrainingFlags) -> TrainingSpec:
    if data is not None:
        spec = replace(spec, dataset=_digest(client, data))
    if flags.eval is not None:
        spec = replace(spec, gate=replace(spec.gate or Gate(), dataset=_digest(client, flags.eval)))
    if flags.align_with is not None and isinstance(spec.settings, LoramSettings):
        text = _digest(client, flags.align_with)
        alignment = replace(spec.settings.alignment or LoramAlignment(text), dataset=text)
        spec = replace(spec, settings=replace(spec.settings, alignment=alignment))
    return spec


def _digest(client: Client, data: str) -> str:
    """Return the digest that data is, or becomes by an upload."""
    if _DIGEST.fullmatch(data):
        return data
    with naming_files(), drawing_progress() as progress:
        return client.upload_dataset(data, progress=progress).digest
