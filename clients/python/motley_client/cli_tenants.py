"""`motley tenants`: make, show, change and delete tenants.

Owns these commands' names and flags (scripts rely on them) and what they print; their keys' commands are in `cli_keys`.
Loads gRPC only to make a call. Runs on the main thread.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Annotated, Any

import typer

from motley_client import cli_keys
from motley_client.cli_options import JsonOption, Server, asks_server
from motley_client.cli_table import moment, table
from motley_client.types import Quota, Tenant

app = typer.Typer(no_args_is_help=True, help="Administer tenants, their quotas and their keys; needs an admin's key.")
app.add_typer(cli_keys.app, name="keys")

TenantArgument = Annotated[str, typer.Argument(help="The tenant's id.", show_default=False)]
DisplayNameOption = Annotated[str | None, typer.Option("--display-name", help="What people call the tenant.")]
AdaptersOption = Annotated[int | None, typer.Option("--adapters", metavar="N", help="Adapters that it may own.")]
AdapterBytesOption = Annotated[
    int | None, typer.Option("--adapter-bytes", metavar="N", help="Bytes that its adapters may take.")
]
InFlightOption = Annotated[
    int | None, typer.Option("--requests-in-flight", metavar="N", help="Requests that may run or wait at once.")
]
RequestsOption = Annotated[
    int | None, typer.Option("--requests-per-minute", metavar="N", help="Requests that may begin in a minute.")
]
TokensOption = Annotated[
    int | None, typer.Option("--tokens-per-minute", metavar="N", help="Tokens, of prompts and answers, in a minute.")
]
TrainingJobsOption = Annotated[
    int | None, typer.Option("--training-jobs", metavar="N", help="Training jobs that may run or wait at once.")
]
WeightOption = Annotated[
    float | None, typer.Option("--weight", metavar="W", help="Share of the device beside others' (1 unless set).")
]


def read_quota_name(text: str) -> str:
    """Return the field of Quota that a flag's name such as `tokens-per-minute` means.

    Raises: typer.BadParameter for a text that names none.
    """
    known = [field.name for field in fields(Quota)]
    if (name := text.replace("-", "_")) not in known:
        raise typer.BadParameter(f"{text!r} is no quota; these are: {', '.join(known).replace('_', '-')}")
    return name


LiftOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lift", metavar="QUOTA", parser=read_quota_name, help="Limit no more: tokens-per-minute; may be repeated."
    ),
]


@app.command()
@asks_server
def create(
    server: Server,
    tenant: TenantArgument,
    display_name: DisplayNameOption = None,
    adapters: AdaptersOption = None,
    adapter_bytes: AdapterBytesOption = None,
    requests_in_flight: InFlightOption = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    training_jobs: TrainingJobsOption = None,
    weight: WeightOption = None,
) -> None:
    """Make TENANT, without limits but those that are named, and without keys."""
    quota = Quota(
        adapters, adapter_bytes, requests_in_flight, requests_per_minute, tokens_per_minute, training_jobs, weight
    )
    with server.connect() as client:
        _show(client.create_tenant(tenant, display_name or "", quota))


@app.command("list")
@asks_server
def list_(server: Server, json_output: JsonOption = False) -> None:
    """List every tenant."""
    with server.connect() as client:
        found = list(client.list_tenants())
    if json_output:
        typer.echo(json.dumps({"tenants": [tenant_json(one) for one in found]}))
        return
    rows = [(one.id, one.display_name, moment(one.create_time), _quota_words(one.quota)) for one in found]
    typer.echo(table(("id", "display name", "created", "quota"), rows))


@app.command()
@asks_server
def show(server: Server, tenant: TenantArgument, json_output: JsonOption = False) -> None:
    """Show TENANT and its quotas."""
    with server.connect() as client:
        found = client.get_tenant(tenant)
    if json_output:
        typer.echo(json.dumps(tenant_json(found)))
        return
    _show(found)


@app.command()
@asks_server
def update(
    server: Server,
    tenant: TenantArgument,
    display_name: DisplayNameOption = None,
    adapters: AdaptersOption = None,
    adapter_bytes: AdapterBytesOption = None,
    requests_in_flight: InFlightOption = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    training_jobs: TrainingJobsOption = None,
    weight: WeightOption = None,
    lift: LiftOption = None,
    etag: Annotated[
        str | None, typer.Option("--etag", help="Change it only if this is still its etag, as `show` tells it.")
    ] = None,
) -> None:
    """Change what is named of TENANT, and leave the rest."""
    quota = Quota(
        adapters, adapter_bytes, requests_in_flight, requests_per_minute, tokens_per_minute, training_jobs, weight
    )
    if display_name is None and quota == Quota() and not lift:
        raise typer.BadParameter("name at least one thing to change, such as --requests-per-minute 60")
    with server.connect() as client:
        _show(client.update_tenant(tenant, display_name=display_name, quota=quota, lift=lift or (), etag=etag))


@app.command()
@asks_server
def delete(
    server: Server,
    tenant: TenantArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete TENANT, which must own no adapters, and its keys."""
    if not yes:
        typer.confirm(f"Delete tenant {tenant}? Its keys stop working at once.", abort=True, err=True)
    with server.connect() as client:
        client.delete_tenant(tenant)
    typer.echo(f"deleted tenant {tenant}")


def tenant_json(tenant: Tenant) -> dict[str, Any]:
    """Return what `--json` prints of a tenant; a limit that is not set is null."""
    return {
        "id": tenant.id,
        "display_name": tenant.display_name,
        "quota": {field.name: getattr(tenant.quota, field.name) for field in fields(Quota)},
        "create_time": moment(tenant.create_time),
        "etag": tenant.etag,
    }


def _show(tenant: Tenant) -> None:
    facts = tenant_json(tenant)
    quota = facts.pop("quota")
    for name, value in (facts | quota).items():
        typer.echo(f"{name:<22}{'no limit' if value is None else value}".rstrip())


def _quota_words(quota: Quota) -> str:
    values = ((field.name, getattr(quota, field.name)) for field in fields(Quota))
    return " ".join(f"{name}={value}" for name, value in values if value is not None)
