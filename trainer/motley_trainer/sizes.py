"""Amounts of memory as people write them.

Pure; needs no torch.
"""

from __future__ import annotations

import re
from fractions import Fraction

from motley_trainer.errors import SettingsError

UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": scale**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, scale in (("iB", 1024), ("B", 1000))
}
MAX_BYTES = 2**63 - 1
MAX_SHOWN = 40  # characters of what is quoted
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)")


def parse_size(text: str, field: str = "memory") -> int:
    """Return the bytes that `24GiB`, `80 GB` or `1000000` says.

    Raises: SettingsError with reason SIZE.
    """
    found = _SIZE.fullmatch(text.strip())
    units = {name.lower(): scale for name, scale in UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise _refused(text, "is no size such as 24GiB, 80GB or 1000000", field)
    num_bytes = int(Fraction(found[1]) * units[found[2].lower()])
    if num_bytes > MAX_BYTES:
        raise _refused(text, f"is more than {MAX_BYTES} bytes, which no machine has", field)
    return num_bytes


def _refused(text: str, problem: str, field: str) -> SettingsError:
    shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    return SettingsError(f"{shown!r} {problem}", reason="SIZE", field=field)
