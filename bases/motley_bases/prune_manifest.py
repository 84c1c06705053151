"""The keep manifest: which key-value heads and FFN channels of an original a pruned base still has, and why those.

It lies beside the pruned weights and is bound to them by their fingerprint. LoRAM reads it to scatter factors back.
Numbers and words alone: no tensors, no model. Reads and writes one small JSON file; any thread.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path

from motley_bases.checkpoint import has_weights
from motley_bases.errors import UnreadableBaseError
from motley_bases.fingerprint import fingerprint

MANIFEST_FILE = "prune_manifest.json"
SCHEMA_VERSION = 2
MAX_LAYERS = 4096
MAX_CHANNELS = 2**31 - 1

_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_WORD = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_FRACTION = re.compile(r"[1-9][0-9]{0,18}/[1-9][0-9]{0,18}")


@dataclass(frozen=True, slots=True)
class LayerKeep:
    """What one pruned layer keeps, ascending, in the numbers of the original layer."""

    ffn_channels: tuple[int, ...]
    kv_heads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PruneManifest:
    """What was kept of an original base, and how that was chosen.

    Semantics: a layer is None where it was left whole; `protected` counts the layers that were not to be touched at the
    beginning and at the end. `ratio` is the share that was asked for, exactly, in `steps` equal parts; `rule` tells by
    whose rules it was rounded to heads and channels, and `multiple` what FFN widths are multiples of. A criterion that
    reads no text has no calibration, 0 tokens and windows of 0. `recovery` is the digest of the adapter that was merged
    into the pruned weights, None where none was. `pruned_fingerprint` is that of the weights it lies beside; None where
    there are none.
    Raises: UnreadableBaseError with reason PRUNE_MANIFEST, and the field, for a value that cannot be.
    """

    schema_version: int
    original_fingerprint: str
    layers: tuple[LayerKeep | None, ...]
    ratio: Fraction
    steps: int
    multiple: int
    rule: str
    criterion: str
    aggregation: str
    selection: str
    protected: tuple[int, int]
    calibration_sha256: str | None
    calibration_tokens: int
    calibration_window: int
    seed: int
    num_parameters: int
    recovery: str | None = None
    pruned_fingerprint: str | None = None

    def __post_init__(self) -> None:
        _check_version(self.schema_version)
        _check_digest("original_fingerprint", self.original_fingerprint)
        for name in ("criterion", "aggregation", "selection", "rule"):
            value = getattr(self, name)
            if not isinstance(value, str) or not _WORD.fullmatch(value):
                raise broken(name, f"is {_show(value)}, not a word in small letters")
        for name in ("calibration_sha256", "recovery", "pruned_fingerprint"):
            if getattr(self, name) is not None:
                _check_digest(name, getattr(self, name))
        if not isinstance(self.ratio, Fraction) or not 0 < self.ratio < 1:
            raise broken("ratio", f"is {_show(self.ratio)}, not a fraction between 0 and 1")
        counts = {"steps": 1, "multiple": 1, "calibration_tokens": 0, "calibration_window": 0, "seed": 0}
        for name, low in (counts | {"num_parameters": 1}).items():
            _check_count(name, getattr(self, name), low)
        self._check_calibration()
        _check_layers(self.layers)
        self._check_protected()

    def _check_calibration(self) -> None:
        if (self.calibration_sha256 is None) != (self.calibration_tokens == 0):
            raise broken("calibration_tokens", "and calibration_sha256 do not say the same: a text has tokens")
        window, tokens = self.calibration_window, self.calibration_tokens
        if (tokens == 0) != (window == 0) or (window and tokens % window):
            raise broken("calibration_window", f"is {window}, and {tokens} tokens are not windows of as many")

    def _check_protected(self) -> None:
        if not isinstance(self.protected, tuple) or len(self.protected) != 2:
            raise broken("protected", f"is {_show(self.protected)}, not two numbers of layers")
        for count in self.protected:
            _check_count("protected", count, 0)
        first, last = self.protected
        for layer, kept in enumerate(self.layers):
            if kept is not None and not first <= layer < len(self.layers) - last:
                raise broken(f"layers[{layer}]", "is pruned, and protected as well")

    @property
    def content(self) -> bytes:
        """Return it in the one form whose bytes have the digest: JSON, keys in order, no spaces."""
        return json.dumps(_to_json(self), sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """Return what an adapter that was trained on this copy names: "sha256:..." over the content."""
        return f"sha256:{hashlib.sha256(self.content).hexdigest()}"


def read_prune_manifest(directory: Path) -> PruneManifest:
    """Read and check the manifest of a directory.

    Raises: UnreadableBaseError with reason NO_PRUNE_MANIFEST if there is none, PRUNE_MANIFEST with the field if it
    cannot be understood.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise UnreadableBaseError(
            f"{directory} has no {MANIFEST_FILE}: what it was pruned from is not known", reason="NO_PRUNE_MANIFEST"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise broken(None, f"is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise broken(None, "is not a JSON object")
    if "schema_version" in content:
        _check_version(content["schema_version"])  # first of all: what other fields there are depends on it
    known = [field.name for field in fields(PruneManifest)]
    for name in [*content, *known]:
        if name not in known:
            raise broken(name, "is not a field of this schema version")
        if name not in content:
            raise broken(name, "is missing")
    layers = content["layers"]
    if not isinstance(layers, list):
        raise broken("layers", f"is {_show(layers)}, not a list")
    content["layers"] = tuple(_parse_layer(layer, value) for layer, value in enumerate(layers))
    if isinstance(content["protected"], list):
        content["protected"] = tuple(content["protected"])
    content["ratio"] = _parse_ratio(content["ratio"])
    return PruneManifest(**content)


def write_prune_manifest(directory: Path, manifest: PruneManifest) -> PruneManifest:
    """Write the manifest into a directory, and return it as it was written.

    Semantics: where weights lie there, they must be the last that were written: the manifest takes their fingerprint.
    Effects: replaces the file in one rename.
    """
    bound = replace(manifest, pruned_fingerprint=fingerprint(directory) if has_weights(directory) else None)
    aside = directory / f".{MANIFEST_FILE}.new"
    aside.write_text(json.dumps(_to_json(bound)) + "\n", encoding="utf-8")
    aside.replace(directory / MANIFEST_FILE)
    return bound


def check_original(manifest: PruneManifest, original_fingerprint: str) -> None:
    """Refuse to use a manifest with a base that it was not made from.

    Raises: UnreadableBaseError with reason OTHER_ORIGINAL.
    """
    if manifest.original_fingerprint != original_fingerprint:
        raise UnreadableBaseError(
            f"the manifest keeps parts of {manifest.original_fingerprint}, and this base is {original_fingerprint}",
            reason="OTHER_ORIGINAL",
            field="prune_manifest.original_fingerprint",
        )


def broken(name: str | None, problem: str) -> UnreadableBaseError:
    """Make the refusal of a manifest, or of one field of it."""
    field = "prune_manifest" if name is None else f"prune_manifest.{name}"
    return UnreadableBaseError(f"{field} {problem}", reason="PRUNE_MANIFEST", field=field)


def _to_json(manifest: PruneManifest) -> dict[str, object]:
    content: dict[str, object] = {field.name: getattr(manifest, field.name) for field in fields(PruneManifest)}
    content["layers"] = [
        None if kept is None else {"ffn_channels": list(kept.ffn_channels), "kv_heads": list(kept.kv_heads)}
        for kept in manifest.layers
    ]
    content["protected"] = list(manifest.protected)
    content["ratio"] = str(manifest.ratio)
    return content


def _parse_ratio(value: object) -> Fraction:
    """Read "13/20"; what is not in lowest terms is refused, so that a manifest has one digest."""
    if isinstance(value, str) and _FRACTION.fullmatch(value):
        numerator, _, denominator = value.partition("/")
        if str(ratio := Fraction(int(numerator), int(denominator))) == value:
            return ratio
    raise broken("ratio", f"is {_show(value)}, not a fraction in lowest terms, such as 1/4")


def _parse_layer(layer: int, value: object) -> LayerKeep | None:
    if value is None:
        return None
    where = f"layers[{layer}]"
    if not isinstance(value, Mapping) or value.keys() != {"ffn_channels", "kv_heads"}:
        raise broken(where, "is neither null nor an object with ffn_channels and kv_heads alone")
    for name in value:
        if not isinstance(value[name], list):
            raise broken(f"{where}.{name}", f"is {_show(value[name])}, not a list")
    return LayerKeep(tuple(value["ffn_channels"]), tuple(value["kv_heads"]))


def _check_layers(layers: tuple[LayerKeep | None, ...]) -> None:
    if not 1 <= len(layers) <= MAX_LAYERS:
        raise broken("layers", f"has {len(layers)} entries, not 1 to {MAX_LAYERS}")
    for layer, kept in enumerate(layers):
        if kept is not None:
            _check_kept(f"layers[{layer}].ffn_channels", kept.ffn_channels)
            _check_kept(f"layers[{layer}].kv_heads", kept.kv_heads)


def _check_kept(name: str, kept: tuple[int, ...]) -> None:
    if not kept:
        raise broken(name, "is empty: a layer keeps one at least")
    previous = -1
    for index in kept:
        if type(index) is not int or not previous < index <= MAX_CHANNELS:
            raise broken(name, f"has {_show(index)} after {previous}: whole numbers from 0 on must ascend")
        previous = index


def _check_version(value: object) -> None:
    if type(value) is not int or value != SCHEMA_VERSION:
        known = f"only {SCHEMA_VERSION} is understood: prune the original again"
        raise broken("schema_version", f"is {_show(value)}, and {known}")


def _check_digest(name: str, value: object) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise broken(name, f"is {_show(value)}, not sha256: and 64 hexadecimal digits")


def _check_count(name: str, value: object, low: int) -> None:
    if type(value) is not int or not low <= value < 2**63:
        raise broken(name, f"is {_show(value)}, not a whole number from {low} on")


def _show(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
