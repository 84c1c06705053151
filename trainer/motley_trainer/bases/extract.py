"""What training has changed of a base, written as a LoRA of the base before it, as near as a rank allows.

Of each Linear's difference the largest directions are kept, and the energy that they have of it is told: of what was
trained whole, such as embeddings, norms and lm_head, nothing can be kept. Nothing is lost without a word. Runs on the
calling thread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
from motley_trainer.errors import UnsuitableBaseError
from motley_trainer.files.outputs import new_directory
from motley_trainer.methods.targets import check_rank

MANIFEST_FILE = "loqt_manifest.json"
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

    Semantics: `min_energy` is the least share of the difference's energy, over all Linears together, that must be kept;
    with `linears_only` what cannot be kept at all is left out, else it is refused.
    """

    rank: int
    min_energy: float = 0.9
    linears_only: bool = False
    device: torch.device = CPU


@dataclass(frozen=True, slots=True)
class Extracted:
    """What was written, and what of the difference it has.

    Semantics: energies are shares of the squared norm of a Linear's difference, by path, and in `energy` of all
    together; a Linear that did not change is not among them. `left_out` names tensors that changed and are no Linear's.
    """

    directory: Path
    digest: str
    base: BaseSpec
    energy: float
    energies: Mapping[str, float]
    left_out: tuple[str, ...]


def extract_lora(trained: str, original: str, asked: Extraction, out: Path, watcher: Watcher) -> Extracted:
    """Write the difference between two bases as a LoRA of the second.

    Semantics: both are as `--base` says them.
    Effects: writes `out`, whole or not at all.
    Raises: BaseError for a base that cannot be used; UnsuitableBaseError with reason ALREADY_QUANTIZED, OTHER_SHAPES,
    OTHER_ORIGINAL, OTHERS_CHANGED, NOTHING_CHANGED or ENERGY_TOO_LOW; SettingsError with reason RANK_TOO_LARGE;
    OutputError.
    """
    after, before = resolve_base(trained), resolve_base(original)
    with new_directory(out) as aside:
        watcher.begin("reading the bases", 1)
        for directory in (before, after):
            _check_stored(directory)
        spec = load_plain_base(before, dtype="auto", device=CPU).spec  # of it alone: weights are read one by one
        _check_origin(after, spec)
        new, old = (StoredTensors(directory, tied_embeddings=spec.tied_embeddings) for directory in (after, before))
        linears = {f"{path}.weight": path for path in spec.linears if path != spec.lm_head_path}
        _check_shapes(new, old)
        for path in linears.values():
            check_rank(asked.rank, path, spec, "rank")
        left_out = tuple(name for name in sorted(old) if name not in linears and not _is_same(new, old, name))
        if left_out and not asked.linears_only:
            raise _others_changed(left_out)
        watcher.begin("taking differences apart", len(linears))
        pairs, energies, energy = _decompose(new, old, linears, asked, watcher)
        if energy < asked.min_energy:
            message = (
                f"rank {asked.rank} keeps {energy:.2%} of the difference's energy, less than {asked.min_energy:.2%}: "
                "raise the rank, or lower the least energy, knowing what is lost"
            )
            raise UnsuitableBaseError(message, reason="ENERGY_TOO_LOW", field="rank")
        provenance = {
            "extracted_from": fingerprint(after),
            "rank": asked.rank,
            "energy_kept": energy,
            "energy_kept_by_module": energies,
            "left_out": list(left_out),
        }
        digest = _write(aside, pairs, spec, provenance)
    return Extracted(out, digest, spec, energy, energies, left_out)


def _check_stored(directory: Path) -> None:
    register_pruned()
    stored = stored_quantization(getattr(read_parsed_config(directory), CONFIG_FIELD, None))
    if stored != NONE:
        message = f"{directory.name} is stored as {stored}, in which differences are lost"
        raise UnsuitableBaseError(message, reason="ALREADY_QUANTIZED", field=CONFIG_FIELD)


def _check_origin(after: Path, original: BaseSpec) -> None:
    """Refuse another original than the one that a base says it was trained from."""
    try:
        manifest: dict[str, Any] = json.loads((after / MANIFEST_FILE).read_bytes())
    except FileNotFoundError:  # not made by a job here: any original of these shapes may be its own
        return
    told = manifest.get("original_fingerprint")
    if told != original.fingerprint:
        origin = "from scratch" if told is None else f"from {told}"
        message = f"{after.name} was trained {origin}, and not from {original.name}, which is {original.fingerprint}"
        field = f"{MANIFEST_FILE.removesuffix('.json')}.original_fingerprint"
        raise UnsuitableBaseError(message, reason="OTHER_ORIGINAL", field=field)


def _check_shapes(new: StoredTensors, old: StoredTensors) -> None:
    names = sorted(set(new) ^ set(old))
    names += [name for name in sorted(set(new) & set(old)) if new.shape(name) != old.shape(name)]
    if names:
        message = f"the bases are not of the same shapes: they differ in {_shown(names)}"
        raise UnsuitableBaseError(message, reason="OTHER_SHAPES", field=names[0])


def _is_same(new: StoredTensors, old: StoredTensors, name: str) -> bool:
    return torch.equal(new.read(name), old.read(name))


def _decompose(
    new: StoredTensors, old: StoredTensors, linears: Mapping[str, str], asked: Extraction, watcher: Watcher
) -> tuple[dict[str, LoraPair], dict[str, float], float]:
    """Return the factors of each Linear that changed, the share of energy that they keep, and that of all together."""
    pairs: dict[str, LoraPair] = {}
    energies: dict[str, float] = {}
    all_kept = all_there = 0.0
    for name, path in linears.items():
        delta = new.read(name).to(asked.device, torch.float32) - old.read(name).to(asked.device, torch.float32)
        if bool(delta.any()):
            pairs[path], kept, there = _truncated(delta, asked.rank)
            energies[path] = kept / there
            all_kept, all_there = all_kept + kept, all_there + there
        watcher.advance()
    if not pairs:
        message = "no Linear of the layers differs between the two bases: there is nothing to extract"
        raise UnsuitableBaseError(message, reason="NOTHING_CHANGED", field="from")
    return pairs, energies, all_kept / all_there


def _truncated(delta: Tensor, rank: int) -> tuple[LoraPair, float, float]:
    """Return the best factors of a rank, the energy that they have, and that of all.

    Shapes: delta [O, I].
    """
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    squares = values.double().square()
    roots = values[:rank].sqrt()
    pair = LoraPair(roots[:, None] * right[:rank], left[:, :rank] * roots)
    return pair, float(squares[:rank].sum()), float(squares.sum())


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
