"""Where to compute, by name."""

from __future__ import annotations

import torch

from motley_trainer.errors import SettingsError


def parse_device(text: str) -> torch.device:
    """Read where to compute.

    Raises: SettingsError with reason NO_DEVICE if it is not a device of this machine.
    """
    if text == "cpu" or (text == "cuda" and torch.cuda.is_available()):
        return torch.device(text)
    raise SettingsError(f"{text!r} is no device of this machine", reason="NO_DEVICE", field="device")
