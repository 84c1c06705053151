"""The trainer's part of the `motley` command: `base`, with one subcommand for each thing that can be made of a base.

Owns names and flags, and what is printed. Each subcommand imports what it needs when it is used. Typed errors pass
through to the `motley` command, which turns them into one line and an exit code.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from motley_trainer.commands.carry import recover, restrict
from motley_trainer.commands.extract import extract
from motley_trainer.commands.prune import prune

MIB = 2**20

base = typer.Typer(
    name="base",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Prepare base models.",
)


@base.callback()
def prepare() -> None:
    """Prepare base models."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not spin beside other processes
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is ever fetched, whatever a library would like


base.command()(prune)
base.command()(restrict)
base.command()(recover)
base.command()(extract)


@base.command()
def quantize(
    name: Annotated[str, typer.Argument(metavar="BASE", help="A checkpoint's directory, or an embedded base.")],
    method: Annotated[str, typer.Option(metavar="nf4|int8", help="Hold the Linears so.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Write the checkpoint here.")],
) -> None:
    """Write BASE with its Linears quantized: a checkpoint that needs no other, and takes BASE's adapters."""
    from motley_bases.checkpoint import resolve_base

    from motley_trainer.bases.quantize import quantize_base

    written = quantize_base(resolve_base(name), method, out, watcher=StageLines())
    shrunk = f"{written.original_bytes / MIB:.1f} MiB of weights became {written.stored_bytes / MIB:.1f}"
    typer.echo(f"{out}: {method}, {shrunk}; serves adapters of {written.original_fingerprint}")


@base.command()
def plan(
    name: Annotated[str, typer.Argument(metavar="BASE", help="A checkpoint's directory, or an embedded base.")],
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Hold everything in so much: 24GiB.")],
    quantize: Annotated[str, typer.Option(metavar="auto|none|nf4|int8", help="Hold the Linears so.")] = "auto",
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16|float16|auto", help="Compute in this type.")] = "auto",
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where it will be served.")] = "cpu",
    context: Annotated[int | None, typer.Option(metavar="N", help="Tokens of a context; the base's, if unset.")] = None,
    rank: Annotated[list[int] | None, typer.Option(metavar="R", help="Adapters of this rank; repeatable.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what fits into memory: BASE, keys and values, and adapters. Reads no weights.

    Ends with status 1 if the weights alone do not fit.
    """
    from motley_trainer.bases.plan import Question, make_plan, plan_lines
    from motley_trainer.sizes import parse_size

    question = Question(name, parse_size(memory), dtype, quantize, device, context)
    if rank:
        question = replace(question, ranks=tuple(rank))
    answer = make_plan(question)
    typer.echo(json.dumps(asdict(answer)) if json_output else "\n".join(plan_lines(question, answer)))
    if not answer.fits:
        raise typer.Exit(1)


class StageLines:
    """Tell each stage of work on a line of its own."""

    def begin(self, stage: str, num_steps: int) -> None:
        """Print the stage."""
        typer.echo(stage, err=True)

    def advance(self) -> None:
        """Print nothing: stages are what is told."""
