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
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_size(text: str, field: str = "memory") -> int:
    """Return the bytes that `24GiB`, `80 GB` or `1000000` says.

    Raises: SettingsError with reason SIZE.
    """
    found = _SIZE.fullmatch(text.strip())
    units = {name.lower(): scale for name, scale in UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise SettingsError(f"{text!r} is no size such as 24GiB, 80GB or 1000000", reason="SIZE", field=field)
    return int(Fraction(found[1]) * units[found[2].lower()])
