"""Every series that a worker exports, in a registry of its own, and the HTTP endpoint that shows them.

Set on the event loop's thread, read on the endpoint's. docs/metrics.md lists what is here, and a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from threading import Thread
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from motley_trainer.errors import SettingsError
from motley_trainer.worker.faults import FAULTS
from motley_trainer.worker.settings import METHODS

STATES = ("succeeded", "rejected", "failed", "cancelled", "queued", "lost")
_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")


class WorkerMetrics:
    """All series of one worker; the gauges are of the job that it has, and 0 or not there without one."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"motley_worker_{name}", text, registry=self.registry)

        self._jobs = Counter("motley_worker_jobs", "Leases that ended", ["method", "state"], registry=self.registry)
        for method in METHODS:
            for state in STATES:
                self._jobs.labels(method, state)
        self._restarts = Counter("motley_worker_restarts", "Jobs started again", registry=self.registry)
        self._faults = Counter(
            "motley_worker_faults", "Jobs given back for a fault", ["reason"], registry=self.registry
        )
        for reason in FAULTS:
            self._faults.labels(reason)
        self._held_back = gauge("fault_pause_seconds", "Pause after the last fault")
        self._progress = {
            "step": gauge("step", "Step of the job"),
            "loss": gauge("loss", "Loss of that step"),
            "tokens_per_second": gauge("tokens_per_second", "Tokens trained a second"),
        }
        self._expert_share = Gauge(
            "motley_worker_expert_share",
            "Share of the tokens that went through an expert",
            ["module", "expert"],
            registry=self.registry,
        )
        self._memory = gauge("child_memory_bytes", "Resident memory of the job's process")
        self._lease_left = gauge("lease_seconds_left", "Time until the lease ends without a report")

    def leased(self, seconds_left: Callable[[], float]) -> None:
        """Show a lease; the function is called on the endpoint's thread."""
        self._lease_left.set_function(seconds_left)

    def progressed(self, progress: Mapping[str, Any]) -> None:
        """Show what a job told of itself."""
        for name, gauge in self._progress.items():
            gauge.set(float(progress.get(name) or 0))

    def routed(self, report: Mapping[str, Any]) -> None:
        """Show where tokens went since the report before."""
        for module, of_module in report["modules"].items():
            for expert, share in enumerate(of_module["shares"]):
                self._expert_share.labels(module, str(expert)).set(share)

    def weighed(self, num_bytes: int) -> None:
        """Show the memory of the job's process."""
        self._memory.set(num_bytes)

    def restarted(self) -> None:
        """Count a job whose process died and was started again."""
        self._restarts.inc()

    def faulted(self, reason: str, pause_seconds: float) -> None:
        """Count a fault of the worker's, and show how long it holds back for it."""
        self._faults.labels(reason).inc()
        self._held_back.set(pause_seconds)

    def recovered(self) -> None:
        """Show that nothing is at fault any more."""
        self._held_back.set(0)

    def ended(self, method: str, state: str) -> None:
        """Count a lease that ended, and show no job."""
        self._jobs.labels(method, state).inc()
        self.progressed({})
        self._expert_share.clear()
        self.weighed(0)
        self._lease_left.set_function(lambda: 0.0)


class HttpEndpoint:
    """Show a registry at /metrics from a thread of its own."""

    def __init__(self, registry: CollectorRegistry, address: str) -> None:
        """Open the port; 0 takes any free one.

        Raises: SettingsError with reason ADDRESS for what is no address, or one that cannot be listened on.
        """
        match = _HOST_PORT.fullmatch(address)
        if match is None or int(match["port"]) > 65535:
            raise SettingsError(f"{address!r} is not HOST:PORT", reason="ADDRESS", field="metrics")
        try:
            self._server, self._thread = start_http_server(
                int(match["port"]), addr=match["host"].strip("[]"), registry=registry
            )
        except OSError as error:
            message = f"cannot show metrics on {address}: {error}"
            raise SettingsError(message, reason="ADDRESS", field="metrics") from error
        self.port: int = self._server.server_port

    def stop(self) -> None:
        """Close the port and end the thread."""
        self._server.shutdown()
        self._server.server_close()
        thread: Thread = self._thread
        thread.join()
