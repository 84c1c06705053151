"""`motley adapters`: list and show adapters, move their aliases, share, pin and delete them.

Owns these commands' names and flags (scripts rely on them); what they print is in `cli_adapter_words`, and the commands
that carry files in `cli_transfers`. Loads gRPC only to make a call. Runs on the main thread.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from motley_client import cli_transfers
from motley_client.cli_adapter_words import adapter_json, adapter_table, adapter_words, alias_words, version_json
from motley_client.cli_options import JsonOption, Server, asks_server
from motley_client.types_adapters import Visibility

app = typer.Typer(
    no_args_is_help=True, help="Publish, name, share and delete adapters; changes need a publisher's key."
)

NameArgument = Annotated[str, typer.Argument(help="The adapter's name.", show_default=False)]
ReferenceArgument = Annotated[
    str, typer.Argument(help="NAME, NAME@alias, NAME@3, NAME@sha256:... or OWNER/...", show_default=False)
]
EtagOption = Annotated[
    str | None, typer.Option("--etag", help="Only if this is still its etag, as `show` tells it; '' if it is new.")
]

app.command("push")(asks_server(cli_transfers.push))


@app.command("list")
@asks_server
def list_(
    server: Server,
    filter_: Annotated[
        str, typer.Option("--filter", metavar="TERMS", help="Such as 'owner=acme kind=lora labels.team=search'.")
    ] = "",
    json_output: JsonOption = False,
) -> None:
    """List the adapters that you can use."""
    with server.connect() as client:
        found = list(client.list_adapters(filter_))
    typer.echo(json.dumps({"adapters": [adapter_json(one) for one in found]}) if json_output else adapter_table(found))


@app.command()
@asks_server
def show(server: Server, name: ReferenceArgument, json_output: JsonOption = False) -> None:
    """Show what NAME means: the version, and the adapter's aliases and all its versions."""
    with server.connect() as client:
        found = client.get_adapter(name)
        versions = list(client.list_adapter_versions(name.partition("@")[0]))
    if not json_output:
        typer.echo(adapter_words(found, versions))
        return
    facts = {"adapter": adapter_json(found.adapter), "version": version_json(found.version)}
    typer.echo(json.dumps(facts | {"versions": [version_json(one) for one in versions]}))


@app.command()
@asks_server
def alias(
    server: Server,
    name: NameArgument,
    alias: Annotated[str, typer.Argument(help="The alias, such as prod.", show_default=False)],
    version: Annotated[int | None, typer.Argument(min=1, help="The version's number.", show_default=False)] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias.")] = False,
    etag: EtagOption = None,
) -> None:
    """Point ALIAS of NAME at VERSION, from the next request on."""
    if (version is None) is not remove:
        raise typer.BadParameter("name either the version to point at, or --remove")
    with server.connect() as client:
        if version is None:
            client.remove_alias(name, alias, etag=etag)
            typer.echo(f"removed {name}@{alias}")
            return
        typer.echo(alias_words(name, client.set_alias(name, alias, version, etag=etag)))


@app.command()
@asks_server
def rollback(
    server: Server,
    name: NameArgument,
    alias: Annotated[str, typer.Option("--alias", metavar="ALIAS", help="Which alias goes back.")] = "default",
    etag: EtagOption = None,
) -> None:
    """Point an alias of NAME at what it pointed at before."""
    with server.connect() as client:
        typer.echo(alias_words(name, client.rollback_alias(name, alias, etag=etag)))


@app.command()
@asks_server
def share(
    server: Server,
    name: NameArgument,
    private: Annotated[bool, typer.Option("--private", help="With nobody.")] = False,
    public: Annotated[bool, typer.Option("--public", help="With every tenant.")] = False,
    tenants: Annotated[
        list[str] | None, typer.Option("--with", metavar="TENANT", help="With this tenant; may be repeated.")
    ] = None,
) -> None:
    """Say who besides you may use NAME: exactly those that are named, and nobody else."""
    if private + public + bool(tenants) != 1:
        raise typer.BadParameter("choose one of --private, --public and --with TENANT")
    visibility = Visibility.PRIVATE if private else Visibility.PUBLIC if public else Visibility.TENANTS
    with server.connect() as client:
        shared = client.share_adapter(name, visibility, tenants or ())
    who = {Visibility.PRIVATE: "nobody", Visibility.PUBLIC: "everybody"}.get(visibility, " ".join(shared.shared_with))
    typer.echo(f"{name} is shared with {who}")


@app.command()
@asks_server
def pin(server: Server, name: ReferenceArgument) -> None:
    """Load the version that NAME means now onto the device, and keep it there."""
    with server.connect() as client:
        pinned = client.pin_adapter(name)
    typer.echo(f"pinned {pinned.name}@{pinned.version}")


@app.command()
@asks_server
def unpin(server: Server, name: ReferenceArgument) -> None:
    """Let the version that NAME means now leave the device again."""
    with server.connect() as client:
        unpinned = client.unpin_adapter(name)
    typer.echo(f"unpinned {unpinned.name}@{unpinned.version}")


app.command("pull")(asks_server(cli_transfers.pull))


@app.command()
@asks_server
def rm(
    server: Server,
    name: NameArgument,
    version: Annotated[int, typer.Argument(min=1, help="The version's number.", show_default=False)],
    wait: Annotated[
        float | None, typer.Option("--wait", metavar="S", min=0, help="Seconds to wait for requests that use it.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Cancel the requests that still use it then.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete VERSION of NAME, which no alias may point at."""
    if not yes:
        typer.confirm(f"Delete {name}@{version}? Its files are gone then.", abort=True, err=True)
    with server.connect() as client:
        freed = client.delete_adapter_version(name, version, wait_seconds=wait, force=force)
    typer.echo(f"deleted {name}@{version} and freed {freed} bytes")
