"""The adapters of the requests in hand: what each needs on the device, and why some will not get it.

Stands between the scheduler, which knows requests, and the residency, which knows parts of adapters. Runs on the engine
thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from motley_adapters.cache import AdapterCache
from motley_adapters.demand import Demand, demand_of
from motley_adapters.errors import AdapterError, CapacityError
from motley_adapters.residency import Pins, Residency

from motley_server.engine.types import GenerateRequest
from motley_server.errors import FailedPreconditionError, MotleyError, ResourceExhaustedError


class RequestAdapters:
    """Pin and prefetch by request (see `AdapterPins`)."""

    def __init__(self, residency: Residency, cache: AdapterCache) -> None:
        self.residency = residency
        self._cache = cache
        self._demands: dict[str, Demand] = {}
        self._refusals: dict[str, MotleyError] = {}

    @property
    def num_binds(self) -> int:
        """Return a number that grows whenever a request that was not ready may have become so."""
        return self.residency.num_binds

    def add(self, request: GenerateRequest) -> None:
        """Take in a request.

        Raises: ResourceExhaustedError (reason=ADAPTER_TOO_LARGE) if its adapters can never be on the device together.
        """
        demand = demand_of([(self._cache.spec(adapter.digest), adapter.weight) for adapter in request.adapters])
        try:
            self.residency.check(demand)
        except CapacityError as error:
            raise _too_large(error) from error
        self._demands[request.request_id] = demand

    def drop(self, request_id: str) -> None:
        """Forget a request that ended; its pins are its sequences' to release."""
        self._demands.pop(request_id, None)
        self._refusals.pop(request_id, None)

    def poll(self) -> dict[str, MotleyError]:
        """Take in what was loaded, and return what to tell those who wait for an adapter that was not."""
        return {adapter: _not_loaded(error) for adapter, error in self.residency.poll().items()}

    def take_refusals(self) -> dict[str, MotleyError]:
        """Return, by request, what turned out to be too large since the last call."""
        refusals, self._refusals = self._refusals, {}
        return refusals

    def look_ahead(self, waiting: Sequence[GenerateRequest]) -> None:
        """Say who waits, in order."""
        self.residency.look_ahead(self._demands[request.request_id] for request in waiting)

    def is_ready(self, request: GenerateRequest) -> bool:
        """Tell whether all that a request runs under is there."""
        return self.residency.is_ready(self._demands[request.request_id])

    def pin(self, request: GenerateRequest) -> Pins:
        """Pin what a request runs under, which must be ready."""
        return self.residency.pin(self._demands[request.request_id])

    def prefetch(self, request: GenerateRequest, place: int) -> bool:
        """Set about loading what a request runs under; False if some of it finds no room."""
        try:
            return self.residency.prefetch(self._demands[request.request_id], place)
        except CapacityError as error:
            self._refusals[request.request_id] = _too_large(error)
            return True  # nothing stands in its way any more


def _too_large(error: CapacityError) -> ResourceExhaustedError:
    message = f"the adapters of this request do not fit on the device together: {error.message}"
    return ResourceExhaustedError(message, reason="ADAPTER_TOO_LARGE", field="adapters")


def _not_loaded(error: AdapterError) -> MotleyError:
    """Say it without the paths and file names that the log has."""
    if error.reason == "ADAPTER_CHANGED":
        message = "the files of an adapter of this request hold another adapter now; name one that was loaded since"
        return FailedPreconditionError(message, reason="ADAPTER_CHANGED", field="adapters")
    message = "an adapter of this request had left memory, and its files cannot be read again"
    return FailedPreconditionError(message, reason="ADAPTER_UNREADABLE", field="adapters")
