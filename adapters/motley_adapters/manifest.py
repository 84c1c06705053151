"""`motley_manifest.json`: what an adapter declares beyond its kind's own files.

A plain PEFT directory has none and declares nothing. A declaration is binding: one that does not hold is refused, never
corrected. Pure but for reading the file; any thread but the event loop's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from motley_bases.spec import BaseSpec

from motley_adapters.errors import AdapterFormatError, AdapterMismatchError
from motley_adapters.formats import MANIFEST_FILE, has_file, read_json_file, show
from motley_adapters.spec import UNDECLARED

SCHEMA_VERSION = 1

_FIELDS = frozenset({"schema_version", "kind", "trained_on", "serves_on", "digest", "provenance"})
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an adapter declares.

    Semantics: `trained_on` and `serves_on` are base fingerprints or `undeclared`; `digest` is the adapter digest
    that its maker computed, if any.
    """

    kind: str
    trained_on: str = UNDECLARED
    serves_on: str = UNDECLARED
    digest: str | None = None


def read_manifest(directory: Path, default_kind: str) -> Manifest:
    """Read an adapter's manifest, or make the one of a directory that has none.

    Raises: AdapterFormatError as `read_json_file` does, or with reason UNSUPPORTED_SCHEMA, UNKNOWN_FIELD,
    MISSING_FIELD or INVALID_FIELD, the field as `motley_manifest.NAME`.
    """
    if not has_file(directory, MANIFEST_FILE):
        return Manifest(default_kind)
    fields = read_json_file(directory, MANIFEST_FILE)
    version = fields.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise _error("UNSUPPORTED_SCHEMA", "schema_version", f"is {show(version)}, {SCHEMA_VERSION} is read")
    for name in fields:
        if name not in _FIELDS:
            raise _error("UNKNOWN_FIELD", name, "is not a field of this schema version")
    kind = fields.get("kind")
    if not isinstance(kind, str):
        raise _error("MISSING_FIELD", "kind", "is missing")
    digest = fields.get("digest")
    return Manifest(
        kind,
        _fingerprint(fields, "trained_on"),
        _fingerprint(fields, "serves_on"),
        None if digest is None else _digest("digest", digest),
    )


def check_base(manifest: Manifest, base: BaseSpec) -> None:
    """Refuse an adapter that declares another base than the one served.

    Raises: AdapterMismatchError with reason BASE_MISMATCH, naming both fingerprints.
    """
    for name, declared in (("trained_on", manifest.trained_on), ("serves_on", manifest.serves_on)):
        if declared not in (UNDECLARED, base.fingerprint):
            message = f"motley_manifest.{name} is {declared}, but {base.name} is {base.fingerprint}"
            raise AdapterMismatchError(message, reason="BASE_MISMATCH", field=f"motley_manifest.{name}")


def check_digest(manifest: Manifest, digest: str) -> None:
    """Refuse an adapter whose content is not what its manifest says.

    Raises: AdapterFormatError with reason DIGEST_MISMATCH, naming both digests.
    """
    if manifest.digest not in (None, digest):
        raise _error("DIGEST_MISMATCH", "digest", f"is {manifest.digest}, but the content's is {digest}")


def _fingerprint(fields: Mapping[str, object], name: str) -> str:
    value = fields.get(name, UNDECLARED)
    return UNDECLARED if value == UNDECLARED else _digest(name, value)


def _digest(name: str, value: object) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise _error("INVALID_FIELD", name, f"is {show(value)}, not sha256: and 64 hexadecimal digits")
    return value


def _error(reason: str, name: str, problem: str) -> AdapterFormatError:
    field = f"motley_manifest.{name}"
    return AdapterFormatError(f"{field} {problem}", reason=reason, field=field)
