"""The cut of an adapter that a job names: which heads and channels its copy kept, so that another copy keeps the same.

The adapter passes the adapters' one door first. Reading blocks; runs on the thread that trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from motley_adapters.errors import AdapterError
from motley_adapters.formats import CUT_FILE
from motley_adapters.kinds import loram
from motley_adapters.reader import inspect_adapter
from motley_bases.errors import BaseError
from motley_bases.kept_channels import kept_by_path
from motley_bases.prune_manifest import PruneManifest, read_prune_manifest
from motley_bases.stored_spec import read_spec

from motley_trainer.errors import SettingsError

FIELD = "loram.same_cut_as"


def read_same_cut(adapters: Sequence[Path], base: Path) -> PruneManifest:
    """Return the prune manifest that lies in the directory of the adapter that was named.

    Raises: SettingsError with reason NOT_LORAM, NO_CUT, or what the adapter or its manifest is refused for, such as
    BASE_MISMATCH.
    """
    (directory,) = adapters
    spec = read_spec(base)
    try:
        kind = inspect_adapter(directory, spec).spec.kind
        if kind != loram.KIND:
            message = f"{FIELD} is of kind {kind}: only adapters of kind {loram.KIND} were trained on a cut of a base"
            raise SettingsError(message, reason="NOT_LORAM", field=FIELD)
        if not (directory / CUT_FILE).is_file():
            message = f"{FIELD} has no {CUT_FILE}: single weights were pruned for it, or it was made elsewhere"
            raise SettingsError(message, reason="NO_CUT", field=FIELD)
        manifest = read_prune_manifest(directory)
        kept_by_path(manifest, spec)
    except (AdapterError, BaseError) as error:
        raise SettingsError(f"{FIELD}: {error.message}", reason=error.reason, field=FIELD) from error
    return manifest
