"""`motley tenants keys`: make keys and show their secrets once, list keys, revoke them.

Owns these commands' names and flags (scripts rely on them) and what they print: a secret goes to standard output alone,
and what is said about it to standard error. Loads gRPC only to make a call. Runs on the main thread.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from motley_client.cli_options import JsonOption, Server, asks_server
from motley_client.cli_table import moment, table
from motley_client.types import Key, Role

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke a tenant's keys.")

TenantArgument = Annotated[str, typer.Argument(help="The tenant's id.", show_default=False)]

_DURATION = re.compile(r"(?P<count>[1-9]\d{0,5})(?P<unit>[mhdw])", re.ASCII)
_UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def read_expiry(text: str) -> datetime:
    """Return the moment that lies a duration such as `30d` ahead.

    Raises: typer.BadParameter for a text that is no such duration.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a number of minutes, hours, days or weeks, such as 90m or 30d")
    try:
        return datetime.now(UTC) + int(match["count"]) * _UNITS[match["unit"]]
    except OverflowError as error:
        raise typer.BadParameter(f"{text!r} ends past the calendar") from error


@app.command()
@asks_server
def create(
    server: Server,
    tenant: TenantArgument,
    role: Annotated[Role, typer.Option("--role", help="What the new key may do.")] = Role.USER,
    expires: Annotated[
        datetime | None,
        typer.Option("--expires", metavar="30d", parser=read_expiry, help="How long it works: 90m, 12h, 30d, 8w."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Make a key of TENANT, and print its secret: this once."""
    with server.connect() as client:
        made = client.create_key(tenant, role, expire_time=expires)
    if json_output:
        typer.echo(json.dumps({"key": key_json(made.key), "secret": made.secret}))
        return
    until = f"until {moment(made.key.expire_time)}" if made.key.expire_time else "until it is revoked"
    typer.echo(f"key {made.key.id} of tenant {made.key.tenant_id}, role {_role(made.key)}, works {until}", err=True)
    typer.echo("keep its secret now: nobody can show it again", err=True)
    typer.echo(made.secret)


@app.command("list")
@asks_server
def list_(server: Server, tenant: TenantArgument, json_output: JsonOption = False) -> None:
    """List the keys of TENANT, without their secrets."""
    with server.connect() as client:
        found = list(client.list_keys(tenant))
    if json_output:
        typer.echo(json.dumps({"keys": [key_json(one) for one in found]}))
        return
    rows = [
        (one.id, _role(one), *(moment(time) for time in (one.create_time, one.expire_time, one.revoke_time)))
        for one in found
    ]
    typer.echo(table(("id", "role", "created", "expires", "revoked"), rows))


@app.command()
@asks_server
def revoke(
    server: Server,
    key_id: Annotated[str, typer.Argument(help="The key's id, as `list` shows it.", show_default=False)],
) -> None:
    """Revoke a key: it opens nothing from the next request on."""
    with server.connect() as client:
        revoked = client.revoke_key(key_id)
    typer.echo(f"revoked key {revoked.id} of tenant {revoked.tenant_id}")


def key_json(key: Key) -> dict[str, Any]:
    """Return what `--json` prints of a key; a time that is not set is null."""
    return {
        "id": key.id,
        "tenant_id": key.tenant_id,
        "role": None if key.role is None else key.role.value,
        "create_time": moment(key.create_time),
        "expire_time": moment(key.expire_time) or None,
        "revoke_time": moment(key.revoke_time) or None,
    }


def _role(key: Key) -> str:
    return "unknown" if key.role is None else key.role.value
