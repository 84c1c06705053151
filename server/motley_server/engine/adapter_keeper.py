"""The adapters that stay on the device because somebody said so: who waits for which, and what each is told.

Stands between the mailbox, which brings tickets and digests, and the residency, which keeps and loads. Runs on the
engine thread.
"""

from __future__ import annotations

import logging

from motley_adapters.errors import AdapterError, CapacityError
from motley_adapters.residency import Residency

from motley_server.engine.types import KeepOutcome
from motley_server.errors import (
    AbortedError,
    FailedPreconditionError,
    InternalError,
    MotleyError,
    ResourceExhaustedError,
)

log = logging.getLogger(__name__)


class AdapterKeeper:
    """Keep, let go and forget adapters; give every ticket exactly one outcome."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._waiting: dict[int, str] = {}  # digests by ticket
        self._outcomes: list[KeepOutcome] = []

    def keep(self, ticket: int, digest: str) -> None:
        """Bring an adapter onto the device to stay, by the steps that follow."""
        try:
            self._residency.keep(digest)
        except CapacityError as error:
            self._outcomes.append(KeepOutcome(ticket, _refusal(error)))
        except AdapterError:
            log.exception("adapter %s cannot be kept on the device", digest)
            fault = InternalError("the adapter could not be kept on the device", reason="ENGINE_FAULT")
            self._outcomes.append(KeepOutcome(ticket, fault))
        else:
            self._waiting[ticket] = digest

    def unkeep(self, digest: str) -> None:
        """Let an adapter go as any other; who waits for it hears so."""
        self._residency.kept.remove(digest)
        message = "the adapter was unpinned before all of it was on the device"
        self._end(digest, AbortedError(message, reason="ADAPTER_UNPINNED"))

    def forget(self, digest: str) -> None:
        """Let go of what is remembered of an adapter."""
        self._residency.forget(digest)

    def take_outcomes(self) -> list[KeepOutcome]:
        """Return how the keeping of adapters ended since the last call; called after every step."""
        for digest, error in self._residency.kept.take_refused().items():
            self._end(digest, _refusal(error))
        for digest in set(self._waiting.values()):
            demand = self._residency.kept.get(digest)
            if demand is not None and self._residency.is_ready(demand):
                self._end(digest, None)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _end(self, digest: str, error: MotleyError | None) -> None:
        tickets = [ticket for ticket, waited_for in self._waiting.items() if waited_for == digest]
        for ticket in tickets:
            del self._waiting[ticket]
            self._outcomes.append(KeepOutcome(ticket, error))


def _refusal(error: AdapterError) -> MotleyError:
    """Say it without the paths and file names that the log has."""
    if isinstance(error, CapacityError):
        return ResourceExhaustedError(error.message, reason=error.reason)
    if error.reason == "ADAPTER_CHANGED":
        message = "the files of the adapter hold another adapter now"
        return FailedPreconditionError(message, reason="ADAPTER_CHANGED")
    return FailedPreconditionError("the files of the adapter cannot be read again", reason="ADAPTER_UNREADABLE")
