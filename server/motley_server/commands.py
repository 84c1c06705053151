"""The server's part of the `motley` command: `serve`.

Loaded by the command line's entry points when it is used. Turns flags into configuration, and start-up errors into one
line and exit status 2.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from motley_server.config import ConfigError, ServerConfig, render, resolve


def serve(
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Read this TOML file.")] = None,
    base: Annotated[str | None, typer.Option(metavar="DIR|tiny", help="Serve this base.")] = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Answer gRPC here.")] = None,
    metrics: Annotated[str | None, typer.Option(metavar="HOST:PORT", help='Show /metrics here; "" is nowhere.')] = None,
    data_dir: Annotated[str | None, typer.Option(metavar="DIR", help="Keep what the server remembers here.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="auto|float32|bfloat16|float16", help="Compute in this type.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(metavar="auto|none|nf4|int8", help="Hold the Linears so.")] = None,
    auth: Annotated[bool | None, typer.Option("--auth/--no-auth", help="Demand a key of every caller.")] = None,
    tls_cert: Annotated[str | None, typer.Option(metavar="FILE", help="Show this certificate (PEM).")] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="Its private key (PEM).")] = None,
    require_declared_base: Annotated[
        bool | None, typer.Option("--require-declared-base", help="Refuse adapters that do not say what for.")
    ] = None,
    adapter: Annotated[list[str] | None, typer.Option(metavar="NAME=DIR", help="Serve this too; repeatable.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show the resolved settings and exit.")] = False,
) -> None:
    """Serve one base model, every request under the adapters that it names."""
    given: dict[str, object] = {
        "base": base, "listen": listen, "metrics": metrics, "data_dir": data_dir, "dtype": dtype, "quantize": quantize,
        "adapters": adapter,
        "auth": auth, "tls.cert": tls_cert, "tls.key": tls_key,
        "require_declared_base": require_declared_base,
    }  # fmt: skip
    flags = {key: value for key, value in given.items() if value is not None}
    try:
        resolved = resolve(os.environ, flags, config)
    except ConfigError as error:
        raise _refuse(error) from error
    if print_config:
        typer.echo(render(resolved), nl=False)
        return
    raise typer.Exit(_run(resolved))


def _run(config: ServerConfig) -> int:
    from motley_server.app import StartError, prepare_process, run

    prepare_process(os.environ, config.log_level)
    try:
        status = asyncio.run(run(config))
    except (StartError, OSError) as error:
        raise _refuse(error) from error
    for number in (signal.SIGTERM, signal.SIGINT):  # all is done: an impatient signal must not make it a failure
        signal.signal(number, signal.SIG_IGN)
    return status


def _refuse(error: Exception) -> typer.Exit:
    typer.echo(f"motley serve: {error}", err=True)
    return typer.Exit(2)
