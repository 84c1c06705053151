"""The command `motley base extract`: what training has changed of a base, as a LoRA of the base before it.

Owns its flags and what it prints. Imports torch when it is used. Runs on the main thread.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motley_trainer.commands.prune import ProgressBar

if TYPE_CHECKING:
    from motley_trainer.bases.extract import Extracted


def extract(
    name: Annotated[str, typer.Argument(metavar="BASE", help="The base that was trained: a directory, or its name.")],
    original: Annotated[str, typer.Option("--from", metavar="BASE", help="The base that it was trained from.")],
    rank: Annotated[int, typer.Option(metavar="R", min=1, help="Keep so many directions of each Linear's difference.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Write the adapter here.")],
    min_energy: Annotated[
        float, typer.Option(metavar="X", min=0.0, max=1.0, help="Refuse to keep less than this share of the energy.")
    ] = 0.9,
    linears_only: Annotated[
        bool, typer.Option("--linears-only", help="Leave out what changed beside the Linears of the layers.")
    ] = False,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to compute.")] = "cpu",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write what differs between BASE and the one before it as a LoRA of that one, as near as a rank allows."""
    from motley_trainer.bases.extract import Extraction, extract_lora
    from motley_trainer.device import parse_device

    asked = Extraction(rank, min_energy, linears_only, parse_device(device))
    with ProgressBar() as bar:
        found = extract_lora(name, original, asked, out, bar)
    typer.echo(json.dumps(_json(found)) if json_output else "\n".join(_lines(found)))


def _lines(found: Extracted) -> list[str]:
    """Tell what was written, a fact a line, and then what each Linear kept."""
    base = found.base
    lines = [
        f"{found.directory}: {found.digest}, serves on {base.name} ({base.fingerprint})",
        f"energy of the difference that was kept: {found.energy:.2%}, of the Linears': {found.energy_of_linears:.2%}",
        *(f"  {path}: {energy:.2%}" for path, energy in found.energies.items()),
    ]
    if found.left_out:
        lines.append(f"left out, though changed: {', '.join(found.left_out)}")
    return lines


def _json(found: Extracted) -> dict[str, object]:
    return {
        "directory": str(found.directory),
        "digest": found.digest,
        "serves_on": found.base.fingerprint,
        "energy_kept": found.energy,
        "energy_kept_of_linears": found.energy_of_linears,
        "energy_kept_by_module": dict(found.energies),
        "left_out": list(found.left_out),
    }
