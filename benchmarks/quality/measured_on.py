"""The words on where a result file was measured, as far as it says so; one that does not is of the CPU.

Pure; no torch.
"""

from __future__ import annotations

from readings import Reading
from subject import CPU


def measured_on(reading: Reading) -> str:
    """Write on what machine cells were measured, and by how many processes at once."""
    machine = reading["machine"]
    processes = f"{machine['processes']} processes"
    if reading["setting"].get("subject", {}).get("device", CPU) == CPU:
        return (
            f"on {machine['cores']} cores of an {machine['cpu']} ({processes} of one thread, torch {machine['torch']})"
        )
    return f"on an {machine['device']} ({processes}, torch {machine['torch']})"
