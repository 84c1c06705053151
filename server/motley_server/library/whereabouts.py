"""What is true of a version on one server at one moment, and of no other. Pure; any thread."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Whether a version is going, and the memories that hold it."""

    is_deleting: bool = False
    is_in_memory: bool = False
    is_on_device: bool = False
