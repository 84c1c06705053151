"""The record beside a checkpoint made of another one: which it was made of, so that adapters of that one still match.

Reads and writes `motley_base.json`, JSON alone. Runs on whichever thread loads the base, or makes one.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from motley_bases.errors import UnreadableBaseError

RECORD_FILE = "motley_base.json"
SCHEMA_VERSION = 1
FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """What a quantized checkpoint says of itself.

    Semantics: `original_fingerprint` is that of the checkpoint it was made of, which its adapters name;
    `stored_fingerprint` is over its own tensors, so that the record cannot be laid beside other weights.
    """

    original_fingerprint: str
    stored_fingerprint: str
    quantization: str


def read_base_record(directory: Path) -> BaseRecord | None:
    """Read a checkpoint's record; None if it has none.

    Raises: UnreadableBaseError with the field at fault.
    """
    path = directory / RECORD_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(path, None, f"cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise _broken(path, None, "is not a JSON object")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise _broken(path, "schema_version", f"is {content.get('schema_version')!r}, not {SCHEMA_VERSION}")
    names = BaseRecord.__dataclass_fields__.keys()
    if unknown := sorted(content.keys() - names - {"schema_version"}):
        raise _broken(path, unknown[0], "is no field of such a record")
    for name in ("original_fingerprint", "stored_fingerprint"):
        if not isinstance(value := content.get(name), str) or FINGERPRINT.fullmatch(value) is None:
            raise _broken(path, name, f"is {value!r}, not a fingerprint")
    if content.get("quantization") not in ("nf4", "int8"):
        raise _broken(path, "quantization", f"is {content.get('quantization')!r}, neither nf4 nor int8")
    return BaseRecord(**{name: content[name] for name in names})


def write_base_record(directory: Path, record: BaseRecord) -> None:
    """Write a checkpoint's record."""
    content = {"schema_version": SCHEMA_VERSION, **asdict(record)}
    (directory / RECORD_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def resolve_fingerprint(directory: Path, stored_fingerprint: str, quantization: str) -> str:
    """Return the fingerprint that a checkpoint's adapters name: its own, or that of what it was made of.

    Raises: UnreadableBaseError if its record speaks of other weights than lie beside it.
    """
    record = read_base_record(directory)
    if record is None:
        return stored_fingerprint
    for name, found in (("stored_fingerprint", stored_fingerprint), ("quantization", quantization)):
        if (said := getattr(record, name)) != found:
            raise UnreadableBaseError(
                f"{directory / RECORD_FILE} is of other weights: its {name} is {said}, the checkpoint's is {found}",
                reason="RECORD_MISMATCH",
                field=name,
            )
    return record.original_fingerprint


def _broken(path: Path, name: str | None, what: str) -> UnreadableBaseError:
    subject = f"{name} of {path}" if name else f"{path}"
    return UnreadableBaseError(f"{subject} {what}", reason="BROKEN_RECORD", field=name)
