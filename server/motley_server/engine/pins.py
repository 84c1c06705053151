"""What the scheduler knows of adapters: who may run now, and who is waited for. No torch, however indirectly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from motley_server.engine.types import GenerateRequest

UnitSet = tuple[tuple[int, float], ...]  # (slot, weight) in the order of summation


class Pins(Protocol):
    """A promise that everything a sequence runs under stays on the device, until `release`."""

    @property
    def members(self) -> UnitSet:
        """Return the slots that the sequence's tokens go through, and their weights."""

    def release(self) -> None:
        """Give it back; a second time is an error."""


class AdapterPins(Protocol):
    """Where pins come from. No method waits; a request is one that the engine has in hand."""

    @property
    def num_binds(self) -> int:
        """Return a number that grows whenever a request that was not ready may have become so."""

    def look_ahead(self, waiting: Sequence[GenerateRequest]) -> None:
        """Say who waits, in order: the first is at place 0."""

    def is_ready(self, request: GenerateRequest) -> bool:
        """Tell whether all that a request runs under is there."""

    def pin(self, request: GenerateRequest) -> Pins:
        """Pin what a request runs under, which must be ready."""

    def prefetch(self, request: GenerateRequest, place: int) -> bool:
        """Set about loading what a request runs under; False if some of it finds no room."""
