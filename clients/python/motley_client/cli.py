"""The `motley` command: asks a server from a shell, and hands over to the commands of other roots.

Owns names and flags (scripts rely on them), what is printed, and the exit codes: 0 done, 1 refused or failed, 2 wrong
usage, 3 no server answers; `cli_train_watch` has more, for the ends of a job. Loads gRPC only to make a call, after
telling it to keep its notes to itself. Runs on the main thread.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from motley_client import cli_adapters, cli_tenants, cli_train
from motley_client.cli_options import (
    CaFileOption,
    InsecureOption,
    JsonOption,
    Server,
    ServerOption,
    asks_server,
    naming_ca_file,
)
from motley_client.endpoint import UNREACHABLE
from motley_client.foreign import ForeignCommand, foreign_commands
from motley_client.settings import Settings, SettingsError, endpoint
from motley_client.types import ChatMessage, Generation, Sampling, Score, ServedBy, ServerInfo

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3


class MotleyGroup(TyperGroup):
    """List commands of other roots beside ours, and turn every typed error into one line and an exit code.

    Semantics: a typed error is an exception with `message`, `reason` and `field`, whichever root it comes from;
    anything else is a fault of ours and stays a traceback.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for command in foreign_commands():
            self.commands.setdefault(str(command.name), command)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            command = self.commands.get(ctx.invoked_subcommand or "")
            missing = command.missing_extra(error) if isinstance(command, ForeignCommand) else None
            if missing is None:
                raise
            raise typer.Exit(_report(missing)) from error
        except Exception as error:
            if not all(hasattr(error, name) for name in ("message", "reason", "field")):
                raise
            raise typer.Exit(_report(error)) from error


app = typer.Typer(
    cls=MotleyGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="One base model, many adapters, every request wearing its own.",
)
app.add_typer(cli_adapters.app, name="adapters")
app.add_typer(cli_tenants.app, name="tenants")
app.add_typer(cli_train.app, name="train")

PromptArgument = Annotated[str, typer.Argument(help="The text to continue.", show_default=False)]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME[=WEIGHT]", help="Answer under this adapter; may be repeated."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"motley {version('motley')}")
        except PackageNotFoundError:
            typer.echo("motley (not installed)")
        raise typer.Exit()


@app.callback()
def motley(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One base model, many adapters, every request wearing its own."""


@app.command()
@asks_server
def generate(
    server: Server,
    prompt: PromptArgument,
    adapter: AdapterOption = None,
    max_new_tokens: Annotated[int | None, typer.Option(metavar="N", help="Stop after this many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="0 takes the likeliest token.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed gives the same answer.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on behind the end of the text.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Send PROMPT as a user's message.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Continue PROMPT, printing the text as it comes."""
    adapters = _adapters(adapter)
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        ignore_eos=ignore_eos,
        logprobs=0 if json_output else None,
    )
    text = None if chat else prompt
    messages = [ChatMessage("user", prompt)] if chat else None
    with server.connect() as client:
        if json_output:
            answer = client.generate(text, messages=messages, adapters=adapters, **sampling)
            typer.echo(json.dumps(_generation_json(answer)))
            return
        has_written, served_by = False, None
        try:
            for part in client.stream(text, messages=messages, adapters=adapters, **sampling):
                served_by = part.served_by or served_by
                typer.echo(part.text, nl=False)
                has_written = True
        finally:
            if has_written:
                typer.echo()
    _note_overlaps(served_by)


@app.command()
@asks_server
def score(
    server: Server,
    prompt: PromptArgument,
    continuations: Annotated[list[str], typer.Argument(help="Texts that might follow.", show_default=False)],
    adapter: AdapterOption = None,
    json_output: JsonOption = False,
) -> None:
    """Print how likely each CONTINUATION is after PROMPT, as a log-probability."""
    adapters = _adapters(adapter)
    with server.connect() as client:
        scored = client.score(prompt, continuations, adapters=adapters)
    if json_output:
        typer.echo(json.dumps(_score_json(scored, continuations)))
        return
    for continuation, one in zip(continuations, scored.scores, strict=True):
        typer.echo(f"{one.logprob:.4f}\t{continuation}")
    _note_overlaps(scored.served_by)


@app.command()
@asks_server
def info(server: Server, json_output: JsonOption = False) -> None:
    """Print what the server is, and its limits; `motley adapters list` names its adapters."""
    with server.connect() as client:
        found = client.info()
    if json_output:
        typer.echo(json.dumps(asdict(found)))
        return
    for name, value in _info_rows(found):
        typer.echo(f"{name:<26}{value}")


@app.command()
def health(
    server: ServerOption = None,
    ca_file: CaFileOption = None,
    insecure: InsecureOption = None,
    timeout: Annotated[float, typer.Option(metavar="S", min=0.1, help="Seconds to wait for the answer.")] = 4.0,
) -> None:
    """Print whether the server serves, and exit with 1 if it does not; needs no key."""
    found = endpoint(Settings(server, None, ca_file, insecure), os.environ)
    from motley_client.health import is_serving

    with naming_ca_file():
        serves = is_serving(found, timeout)
    typer.echo("serving" if serves else "not serving")
    raise typer.Exit(0 if serves else EXIT_FAILED)


@app.command()
def demo(
    quantize: Annotated[str | None, typer.Option(metavar="nf4|int8", help="Hold the base's Linears so.")] = None,
    pruned: Annotated[bool, typer.Option("--pruned", help="Prune the base first, and cut adapters to fit.")] = False,
) -> None:
    """Start a server, ask it one wave of requests under several adapters, show what answered, and stop it."""
    from motley_client.demo import run_demo  # asyncio and rich's tables: nothing that --help should wait for

    raise typer.Exit(run_demo(quantize, is_pruned=pruned))


@app.command()
def demo_train() -> None:
    """Start a server and a worker, train adapters while requests go on, show them answer beside others, stop both."""
    from motley_client.demo_train import run_demo_train

    raise typer.Exit(run_demo_train())


def main() -> None:
    """Run the command that the process's arguments name, and exit with its code."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read once, when gRPC is imported; stderr is for our one line
    app(prog_name="motley")


def _report(error: Any) -> int:
    message = " ".join(str(error.message).split())
    where = f", field {error.field}" if error.field else ""
    typer.echo(f"error: {message} ({error.reason}{where})", err=True)
    if error.reason == UNREACHABLE:
        return EXIT_UNREACHABLE
    return EXIT_USAGE if isinstance(error, SettingsError) else EXIT_FAILED


def _adapters(choices: list[str] | None) -> list[tuple[str, float]]:
    pairs = []
    for choice in choices or ():
        name, separator, weight = choice.partition("=")
        try:
            pairs.append((name, float(weight) if separator else 1.0))
        except ValueError as error:
            raise typer.BadParameter(f"{weight!r} is not a weight", param_hint="--adapter") from error
    return pairs


def _note_overlaps(served_by: ServedBy | None) -> None:
    """Say on stderr which adapters changed the same channels: what they do together, neither was trained for."""
    for one in () if served_by is None else served_by.adapters:
        if one.overlapping_channels:
            text = f"{one.name}@{one.version} ({one.kind}) shares {one.overlapping_channels} channels with the others"
            typer.echo(f"note: {text}", err=True)


def _generation_json(answer: Generation) -> dict[str, Any]:
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "logprobs": answer.logprobs,
        "finish_reason": None if answer.finish_reason is None else answer.finish_reason.value,
        "usage": asdict(answer.usage),
        "served_by": asdict(answer.served_by),
    }


def _score_json(scored: Score, continuations: list[str]) -> dict[str, Any]:
    return {
        "scores": [
            {
                "continuation": continuation,
                "logprob": one.logprob,
                "is_greedy": one.is_greedy,
                "token_ids": [token.chosen.token_id for token in one.tokens],
                "logprobs": [token.chosen.logprob for token in one.tokens],
            }
            for continuation, one in zip(continuations, scored.scores, strict=True)
        ],
        "usage": asdict(scored.usage),
        "served_by": asdict(scored.served_by),
    }


def _info_rows(found: ServerInfo) -> list[tuple[str, object]]:
    facts = asdict(found)
    limits, kinds = facts.pop("limits"), facts.pop("adapter_kinds")
    return [*facts.items(), ("adapter_kinds", " ".join(kinds)), *limits.items()]
