"""The manifest that lies beside the weights of a base that LoQT has made: what it is, and what it came from.

Who writes it puts more in it, for people. Reads one small JSON file; any thread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motley_bases.errors import UnreadableBaseError

MANIFEST_FILE = "loqt_manifest.json"
SCHEMA_VERSION = 1
MAX_BYTES = 1 << 24

_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class LoqtManifest:
    """What a base's manifest tells.

    Semantics: `original_fingerprint` is None for a base from scratch. `chain` are the fingerprints of all that it came
    from, the oldest first.
    """

    fingerprint: str
    original_fingerprint: str | None
    chain: tuple[str, ...]
    num_merges: int


def read_loqt_manifest(directory: Path) -> LoqtManifest | None:
    """Read and check the manifest of a directory, None where there is none.

    Raises: UnreadableBaseError with reason LOQT_MANIFEST, and the field, if it cannot be understood.
    """
    try:
        with (directory / MANIFEST_FILE).open("rb") as file:
            content = json.loads(file.read(MAX_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(None, f"cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise _broken(None, "is not a JSON object")
    version = content.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise _broken("schema_version", f"is not {SCHEMA_VERSION}, and no other is understood")
    for name, check, wanted in _FIELDS:
        if name not in content:
            raise _broken(name, "is missing")
        if not check(content[name]):
            raise _broken(name, f"is not {wanted}")
    original, chain = content["original_fingerprint"], content["chain"]
    if original != (chain[-1] if chain else None):
        raise _broken("chain", "does not end with original_fingerprint")
    return LoqtManifest(content["fingerprint"], original, tuple(chain), len(content["merges"]))


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


_FIELDS: Sequence[tuple[str, Callable[[Any], bool], str]] = (
    ("fingerprint", _is_digest, "sha256: and 64 hexadecimal digits"),
    ("original_fingerprint", lambda value: value is None or _is_digest(value), "null or a fingerprint"),
    ("chain", lambda value: isinstance(value, list) and all(map(_is_digest, value)), "a list of fingerprints"),
    ("merges", lambda value: isinstance(value, list), "a list"),
)


def _broken(name: str | None, problem: str) -> UnreadableBaseError:
    field = "loqt_manifest" if name is None else f"loqt_manifest.{name}"
    return UnreadableBaseError(f"{field} {problem}", reason="LOQT_MANIFEST", field=field)
