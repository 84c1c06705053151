"""grpc.health.v1, told by the engine's own progress rather than by the fact that somebody answers.

The engine's loop comes round several times a second, even when idle; when it has not for a while, the server is up but
serves nobody. Check looks afresh each time; Watch is told by `poll`. Runs on the event loop's thread and never waits
for the engine.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio

from motley_server.engine.api import EngineFront

SERVICES = ("", "motley.v1.InferenceService")
POLL_SECONDS = 0.5

Context = grpc.aio.ServicerContext[Any, Any]


class EngineHealth:
    """Answer health checks for an engine that is warm."""

    def __init__(self, engine: EngineFront, stall_seconds: float) -> None:
        self._engine = engine
        self._stall_seconds = stall_seconds
        self._servicer = aio.HealthServicer()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the service."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Answer for one service."""
        await self.refresh()
        return await self._servicer.Check(request, context)

    async def Watch(self, request: Any, context: Context) -> None:  # noqa: N802
        """Send the state of one service now, and whenever it changes."""
        await self.refresh()
        await self._servicer.Watch(request, context)

    async def List(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Answer for all services."""
        await self.refresh()
        status = health_pb2.HealthCheckResponse(status=self._status())
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(SERVICES, status))

    async def refresh(self) -> None:
        """Look at the engine and note what it says."""
        status = self._status()
        for service in SERVICES:
            await self._servicer.set(service, status)

    async def poll(self) -> None:
        """Refresh until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(POLL_SECONDS)

    async def announce_drain(self) -> None:
        """Say NOT_SERVING from now on."""
        await self._servicer.enter_graceful_shutdown()

    def _status(self) -> Any:
        is_serving = not self._engine.is_draining and self._engine.heartbeat_age_seconds() < self._stall_seconds
        statuses = health_pb2.HealthCheckResponse
        return statuses.SERVING if is_serving else statuses.NOT_SERVING
