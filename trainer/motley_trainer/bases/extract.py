"""What training has changed of a base, written as a LoRA of the base before it, as near as a rank allows.

Of each Linear's difference the largest directions are kept, and the energy that they have of it is told: of what was
trained whole, such as embeddings, norms and lm_head, nothing can be kept. Nothing is lost without a word. Runs on the
calling thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from motley_adapters.kinds.lora import KIND
from motley_adapters.manifest import Manifest, write_manifest
from motley_adapters.peft_files import LoraPair, write_peft_lora
from motley_adapters.reader import read_adapter
from motley_bases.checkpoint import resolve_base
from motley_bases.fingerprint import fingerprint
from motley_bases.loader import load_plain_base, read_parsed_config
from motley_bases.pruned import register_pruned
from motley_bases.quantization import CONFIG_FIELD, NONE, stored_quantization
from motley_bases.spec import BaseSpec
from torch import Tensor

from motley_trainer.bases.stored_tensors import StoredTensors
from motley_trainer.errors import SettingsError, UnsuitableBaseError
from motley_trainer.files.loqt_manifest import read_loqt_manifest
from motley_trainer.files.outputs import new_directory
from motley_trainer.methods.targets import check_rank

SHOWN_NAMES = 5
CPU = torch.device("cpu")


class Watcher(Protocol):
    """Hears how far the work is."""

    def begin(self, stage: str, num_steps: int) -> None:
        """Hear of a stage that begins."""

    def advance(self) -> None:
        """Hear of a step that is done."""


@dataclass(frozen=True, slots=True)
class Extraction:
    """What to extract.

    Semantics: `min_energy` is the least share of the whole difference's energy that must be kept; with `linears_only`
    what cannot be kept at all is left out, and counts as lost, else it is refused.
    Raises: SettingsError with reason BAD_MIN_ENERGY.
    """

    rank: int
    min_energy: float = 0.9
    linears_only: bool = False
    device: torch.device = CPU

    def __post_init__(self) -> None:
        if not 0 <= self.min_energy <= 1:  # nor NaN
            message = f"{self.min_energy:g} is no share: it is a number from 0 to 1"
            raise SettingsError(message, reason="BAD_MIN_ENERGY", field="min_energy")


@dataclass(frozen=True, slots=True)
class Extracted:
    """What was written, and what of the difference it has.

    Semantics: energies are shares of the squared norm of a difference: of each Linear that changed by path, in
    `energy_of_linears` of those together, and in `energy` of all that changed. `left_out` names tensors that changed
    and are no Linear's: of theirs nothing is kept.
    """

    directory: Path
    digest: str
    base: BaseSpec
    energy: float
    energy_of_linears: float
    energies: Mapping[str, float]
    left_out: tuple[str, ...]


def extract_lora(trained: str, original: str, asked: Extraction, out: Path, watcher: Watcher) -> Extracted:
    """Write the difference between two bases as a LoRA of the second.

    Semantics: both are as `--base` says them.
    Effects: writes `out`, whole or not at all.
    Raises: BaseError for a base that cannot be used, or whose manifest cannot; UnsuitableBaseError with reason
    ALREADY_QUANTIZED, OTHER_SHAPES, OTHER_MANIFEST, OTHER_ORIGINAL, NOT_FINITE, OTHERS_CHANGED, NOTHING_CHANGED
    or ENERGY_TOO_LOW; SettingsError with reason RANK_TOO_LARGE; OutputError.
    """
    after, before = resolve_base(trained), resolve_base(original)
    with new_directory(out) as aside:
        watcher.begin("reading the bases", 1)
        for directory in (before, after):
            _check_stored(directory)
        spec = load_plain_base(before, dtype="auto", device=CPU).spec  # of it alone: weights are read one by one
        made = fingerprint(after)
        _check_origin(after, made, spec)
        new, old = (StoredTensors(directory, tied_embeddings=spec.tied_embeddings) for directory in (after, before))
        linears = {f"{path}.weight": path for path in spec.linears if path != spec.lm_head_path}
        _check_shapes(new, old)
        for path in linears.values():
            check_rank(asked.rank, path, spec, "rank")
        lost = _changed(new, old, [name for name in sorted(old) if name not in linears], asked.device)
        if lost and not asked.linears_only:
            raise _others_changed(tuple(lost))
        watcher.begin("taking differences apart", len(linears))
        pairs, shares = _decompose(new, old, linears, asked, watcher)
        kept, there = (sum(one) for one in zip(*shares.values(), strict=True))
        energy, of_linears = kept / (there + sum(lost.values())), kept / there
        _check_energy(energy, of_linears, asked)
        energies = {path: kept / there for path, (kept, there) in shares.items()}
        provenance = {
            "extracted_from": made,
            "rank": asked.rank,
            "energy_kept": energy,
            "energy_kept_of_linears": of_linears,
            "energy_kept_by_module": energies,
            "left_out": list(lost),
        }
        digest = _write(aside, pairs, spec, provenance)
    return Extracted(out, digest, spec, energy, of_linears, energies, tuple(lost))


def _check_energy(energy: float, of_linears: float, asked: Extraction) -> None:
    if energy < asked.min_energy:
        message = (
            f"rank {asked.rank} keeps {energy:.2%} of the difference's energy, and {of_linears:.2%} of the Linears', "
            f"less than {asked.min_energy:.2%}: raise the rank, or lower the least energy, knowing what is lost"
        )
        raise UnsuitableBaseError(message, reason="ENERGY_TOO_LOW", field="rank")


def _check_stored(directory: Path) -> None:
    register_pruned()
    stored = stored_quantization(getattr(read_parsed_config(directory), CONFIG_FIELD, None))
    if stored != NONE:
        message = f"{directory.name} is stored as {stored}, in which differences are lost"
        raise UnsuitableBaseError(message, reason="ALREADY_QUANTIZED", field=CONFIG_FIELD)


def _check_origin(after: Path, made: str, original: BaseSpec) -> None:
    """Refuse a manifest of other weights, and another original than the one that a base says it was trained from."""
    manifest = read_loqt_manifest(after)
    if manifest is None:  # not made by a job here: any original of these shapes may be its own
        return
    if manifest.fingerprint != made:
        message = f"loqt_manifest.json is that of {manifest.fingerprint}, and {after.name} is {made}"
        raise UnsuitableBaseError(message, reason="OTHER_MANIFEST", field="loqt_manifest.fingerprint")
    told = manifest.original_fingerprint
    if told != original.fingerprint:
        origin = "from scratch" if told is None else f"from {told}"
        message = f"{after.name} was trained {origin}, and not from {original.name}, which is {original.fingerprint}"
        raise UnsuitableBaseError(message, reason="OTHER_ORIGINAL", field="loqt_manifest.original_fingerprint")


def _check_shapes(new: StoredTensors, old: StoredTensors) -> None:
    names = sorted(set(new) ^ set(old))
    names += [name for name in sorted(set(new) & set(old)) if new.shape(name) != old.shape(name)]
    if names:
        message = f"the bases are not of the same shapes: they differ in {_shown(names)}"
        raise UnsuitableBaseError(message, reason="OTHER_SHAPES", field=names[0])


def _difference(new: StoredTensors, old: StoredTensors, name: str, device: torch.device) -> Tensor:
    """Return what was added to a tensor.

    Raises: UnsuitableBaseError with reason NOT_FINITE.
    """
    after, before = (tensors.read(name).to(device, torch.float32) for tensors in (new, old))
    delta = after - before
    if not bool(delta.isfinite().all()):
        message = f"{name} has values that are not finite, or too far apart: what was added is no number"
        raise UnsuitableBaseError(message, reason="NOT_FINITE", field=name)
    return delta


def _changed(new: StoredTensors, old: StoredTensors, names: Sequence[str], device: torch.device) -> dict[str, float]:
    """Return the energy of what was added, by tensor, of those that changed."""
    energies = {name: float(_difference(new, old, name, device).double().square().sum()) for name in names}
    return {name: energy for name, energy in energies.items() if energy}


def _decompose(
    new: StoredTensors, old: StoredTensors, linears: Mapping[str, str], asked: Extraction, watcher: Watcher
) -> tuple[dict[str, LoraPair], dict[str, tuple[float, float]]]:
    """Return the factors of each Linear that changed, and the energy that they keep with that of all there is."""
    pairs: dict[str, LoraPair] = {}
    shares: dict[str, tuple[float, float]] = {}
    for name, path in linears.items():
        delta = _difference(new, old, name, asked.device)
        if bool(delta.any()):
            pairs[path], shares[path] = _truncated(delta, asked.rank)
        watcher.advance()
    if not pairs:
        message = "no Linear of the layers differs between the two bases: there is nothing to extract"
        raise UnsuitableBaseError(message, reason="NOTHING_CHANGED", field="from")
    return pairs, shares


def _truncated(delta: Tensor, rank: int) -> tuple[LoraPair, tuple[float, float]]:
    """Return the best factors of a rank, and the energy that they have with that of all.

    Shapes: delta [O, I].
    """
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    squares = values.double().square()
    roots = values[:rank].sqrt()
    pair = LoraPair(roots[:, None] * right[:rank], left[:, :rank] * roots)
    return pair, (float(squares[:rank].sum()), float(squares.sum()))


def _write(directory: Path, pairs: Mapping[str, LoraPair], spec: BaseSpec, provenance: Mapping[str, object]) -> str:
    write_peft_lora(directory, pairs)
    digest = read_adapter(directory, spec).spec.digest
    write_manifest(directory, Manifest(KIND, spec.fingerprint, spec.fingerprint, digest), {}, provenance)
    return digest


def _others_changed(names: tuple[str, ...]) -> UnsuitableBaseError:
    message = (
        f"{len(names)} tensors changed that no LoRA of the layers' Linears can have: {_shown(list(names))}; say "
        "--linears-only to leave them as they were"
    )
    return UnsuitableBaseError(message, reason="OTHERS_CHANGED", field="linears_only")


def _shown(names: list[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
