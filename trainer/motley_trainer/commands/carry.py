"""The commands `motley base restrict` and `motley base recover`: adapters between a base and its pruned copy.

Owns their flags and what they print. Imports torch when they are used. Runs on the main thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from motley_trainer.bases.carry import Carried

OriginalOption = Annotated[
    str, typer.Option(metavar="BASE", help="The base that was pruned: a directory, or its name.")
]
PrunedOption = Annotated[str, typer.Option(metavar="DIR", help="Its pruned copy, as `motley base prune` wrote it.")]
OutOption = Annotated[Path, typer.Option(metavar="DIR", help="Write the adapter here.")]


def restrict(
    adapter: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="The directory of a LoRA or S2FT of the original.")
    ],
    original: OriginalOption,
    pruned: PrunedOption,
    out: OutOption,
) -> None:
    """Cut ADAPTER, made for a base, down to what its pruned copy keeps."""
    from motley_trainer.bases.carry import restrict_directory

    typer.echo(_line(restrict_directory(adapter, original, pruned, out)))


def recover(
    adapter: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="The directory of a LoRA that was trained on it.")
    ],
    original: OriginalOption,
    pruned: PrunedOption,
    out: OutOption,
) -> None:
    """Bring ADAPTER, trained on a pruned copy, to the original's shapes: a LoRAM adapter."""
    from motley_trainer.bases.carry import recover_directory

    typer.echo(_line(recover_directory(adapter, original, pruned, out)))


def _line(carried: Carried) -> str:
    base = carried.base
    return f"{carried.directory}: {carried.digest}, serves on {base.name} ({base.fingerprint})"
