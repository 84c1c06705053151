"""`motley_manifest.json`: what an adapter declares beyond its kind's own files.

A plain PEFT directory has none and declares nothing. A declaration is binding: one that does not hold is refused, never
corrected. Pure but for reading and writing the file; any thread but the event loop's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from motley_bases.spec import BaseSpec

from motley_adapters.errors import AdapterFormatError, AdapterMismatchError
from motley_adapters.formats import MANIFEST_FILE, has_file, read_json_file, show
from motley_adapters.manifest_object import ManifestObject
from motley_adapters.spec import UNDECLARED

SCHEMA_VERSION = 1

_ROOT = "motley_manifest"
_FIELDS = ("schema_version", "kind", "trained_on", "serves_on", "digest", "provenance")
_PLAIN_KIND = "lora"  # whose own files say everything
_PRUNED_KIND = "loram"  # trained on a pruned copy, served on the original
_RESTRICTED_KINDS = (_PLAIN_KIND, "s2ft")  # that may have been cut down from an original to a pruned copy


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an adapter declares.

    Semantics: `trained_on` and `serves_on` are base fingerprints or `undeclared`; `digest` is the adapter digest
    that its maker computed, if any; `details` is the object under the kind's own name, not yet understood.
    """

    kind: str
    trained_on: str = UNDECLARED
    serves_on: str = UNDECLARED
    digest: str | None = None
    details: ManifestObject | None = None


def read_manifest(directory: Path, kinds: Collection[str], default_kind: str) -> Manifest:
    """Read an adapter's manifest, or make the one of a directory that has none.

    Raises: AdapterFormatError as `read_json_file` does, or with reason UNSUPPORTED_SCHEMA, UNSUPPORTED_KIND,
    UNKNOWN_FIELD, MISSING_FIELD or INVALID_FIELD, the field as `motley_manifest.NAME`.
    """
    if not has_file(directory, MANIFEST_FILE):
        return Manifest(default_kind)
    fields = read_json_file(directory, MANIFEST_FILE)
    root = ManifestObject(fields, _ROOT)
    version = fields.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise root.error("UNSUPPORTED_SCHEMA", "schema_version", f"is {show(version)}, {SCHEMA_VERSION} is read")
    if fields.get("kind") is None:
        raise root.error("MISSING_FIELD", "kind", "is missing")
    kind = root.word("kind")
    if kind not in kinds:
        raise root.error("UNSUPPORTED_KIND", "kind", f"is {show(kind)}; served kinds are {', '.join(kinds)}")
    has_details = kind != _PLAIN_KIND
    root.allow(*_FIELDS, *([kind] if has_details else []))
    return Manifest(
        kind,
        _fingerprint(root, "trained_on"),
        _fingerprint(root, "serves_on"),
        root.digest("digest") if fields.get("digest") is not None else None,
        root.child(kind) if has_details and kind in root else None,
    )


def write_manifest(
    directory: Path, manifest: Manifest, details: Mapping[str, object], provenance: Mapping[str, object] | None
) -> None:
    """Write an adapter's manifest; `details` goes under the kind's name, and `provenance` is anything that is JSON."""
    fields: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "kind": manifest.kind,
        "trained_on": manifest.trained_on,
        "serves_on": manifest.serves_on,
        "digest": manifest.digest,
        "provenance": dict(provenance or {}),
    }
    if manifest.kind != _PLAIN_KIND:
        fields[manifest.kind] = dict(details)
    text = json.dumps(fields, indent=2, allow_nan=False)
    (directory / MANIFEST_FILE).write_text(f"{text}\n", encoding="utf-8")


def check_base(manifest: Manifest, base: BaseSpec) -> None:
    """Refuse an adapter that declares another base than the one served, or not enough to tell.

    Semantics: a LoRA may leave its base undeclared. S2FT and GOAT change or build on the base's very weights, so both
    fields must name the base. LoRAM must name the base it serves on, and is trained on another: a pruned copy. A LoRA
    or S2FT of an original that was cut down to this pruned copy names both.
    Raises: AdapterFormatError with reason MISSING_FIELD; AdapterMismatchError with reason BASE_MISMATCH, naming the
    fingerprints.
    """
    declared = {"trained_on": manifest.trained_on, "serves_on": manifest.serves_on}
    required = {_PLAIN_KIND: (), _PRUNED_KIND: ("serves_on",)}.get(manifest.kind, tuple(declared))
    equal = ("serves_on",) if manifest.kind == _PRUNED_KIND else tuple(declared)
    for name in required:
        if declared[name] == UNDECLARED:
            message = f"{_ROOT}.{name} is missing: the kind {manifest.kind} is bound to a base"
            raise AdapterFormatError(message, reason="MISSING_FIELD", field=f"{_ROOT}.{name}")
    is_restricted = (manifest.trained_on, manifest.serves_on) == (base.pruned_from, base.fingerprint)
    if is_restricted and manifest.kind in _RESTRICTED_KINDS:
        return
    for name in equal:
        if declared[name] not in (UNDECLARED, base.fingerprint):
            raise _mismatch(name, declared[name], base)
    if manifest.kind == _PRUNED_KIND and manifest.trained_on == base.fingerprint:
        message = (
            f"{_ROOT}.serves_on names the base that trained_on names, {base.name} ({base.fingerprint}): the kind "
            f"{_PRUNED_KIND} is trained on a pruned copy, and serves on the whole base that the copy was made of"
        )
        raise AdapterMismatchError(message, reason="BASE_MISMATCH", field=f"{_ROOT}.serves_on")


def check_digest(manifest: Manifest, digest: str) -> None:
    """Refuse an adapter whose content is not what its manifest says.

    Raises: AdapterFormatError with reason DIGEST_MISMATCH, naming both digests.
    """
    if manifest.digest not in (None, digest):
        message = f"{_ROOT}.digest is {manifest.digest}, but the content's is {digest}"
        raise AdapterFormatError(message, reason="DIGEST_MISMATCH", field=f"{_ROOT}.digest")


def _mismatch(name: str, declared: str, base: BaseSpec) -> AdapterMismatchError:
    message = f"{_ROOT}.{name} is {declared}, but {base.name} is {base.fingerprint}"
    return AdapterMismatchError(message, reason="BASE_MISMATCH", field=f"{_ROOT}.{name}")


def _fingerprint(root: ManifestObject, name: str) -> str:
    if name not in root or root.word(name) == UNDECLARED:
        return UNDECLARED
    return root.digest(name)
