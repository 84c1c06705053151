"""The gRPC server put together: services, the interceptor, transport bounds.

`app.py` starts and stops it without knowing gRPC. Runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import grpc
from grpc_reflection.v1alpha import reflection
from motley.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    tenant_pb2,
    tenant_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

from motley_server.admission import Admission
from motley_server.engine.api import EngineFront
from motley_server.errors import UnimplementedError
from motley_server.facts import ServerFacts
from motley_server.lifecycle import Lifecycle
from motley_server.rpc.adapters import AdapterLibrary, AdapterService
from motley_server.rpc.disabled import add_disabled
from motley_server.rpc.health import EngineHealth
from motley_server.rpc.identity import Identify
from motley_server.rpc.inference import InferenceService
from motley_server.rpc.interceptors import CallInterceptor, RpcObserver
from motley_server.rpc.server_info import AdapterBytes, ServerService
from motley_server.rpc.tenants import TenantRegistry, TenantService
from motley_server.rpc.training import TrainingService
from motley_server.rpc.workers import WorkerService
from motley_server.tls import TlsFiles
from motley_server.training.opening import Training

HEALTH_SERVICE = "grpc.health.v1.Health"
MAX_CONCURRENT_STREAMS = 1024  # of one connection


@dataclass(frozen=True, slots=True)
class Backend:
    """What the services stand on; without `training` its services are there, and refuse."""

    engine: EngineFront
    admission: Admission
    library: AdapterLibrary
    adapters: AdapterBytes
    facts: ServerFacts
    observer: RpcObserver
    registry: TenantRegistry
    identify: Identify
    training: Training | None = None


@dataclass(frozen=True, slots=True)
class RpcSettings:
    """How the wire is bounded and what is shown on it."""

    max_message_bytes: int
    health_stall_seconds: float
    drain_seconds: float
    reflection: bool
    tls: TlsFiles | None = None


class RpcServer:
    """Serve the backend over gRPC."""

    def __init__(self, backend: Backend, settings: RpcSettings) -> None:
        self.health = EngineHealth(backend.engine, settings.health_stall_seconds)
        self.lifecycle = Lifecycle(backend.engine, settings.drain_seconds, self._announce_drain)
        self._training = backend.training
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor(backend.identify, backend.observer, settings.max_message_bytes)],
            options=server_options(settings.max_message_bytes),
        )
        self._tls = settings.tls
        self._poll: asyncio.Task[None] | None = None
        self._add_services(backend)
        if settings.reflection:
            names = [HEALTH_SERVICE, reflection.SERVICE_NAME, *_service_names()]
            reflection.enable_server_reflection(names, self._server)

    def _add_services(self, backend: Backend) -> None:
        inference = InferenceService(backend.admission, backend.facts)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._server)
        service = ServerService(backend.facts, backend.engine, backend.adapters, self.lifecycle)
        server_pb2_grpc.add_ServerServiceServicer_to_server(service, self._server)
        tenants = TenantService(backend.registry, backend.admission.check_open)
        tenant_pb2_grpc.add_TenantServiceServicer_to_server(tenants, self._server)
        adapters = AdapterService(backend.library, backend.admission.count)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, self._server)
        self._add_training(backend)
        self.health.add_to(self._server)

    def _add_training(self, backend: Backend) -> None:
        training, adapters = backend.training, backend.library.registry.adapters
        if training is None:
            error = UnimplementedError("this server trains nothing: training.enabled is false", reason="NO_TRAINING")
            for service in training_pb2.DESCRIPTOR.services_by_name.values():
                add_disabled(self._server, service, error)
            return
        jobs = TrainingService(training, adapters, backend.facts, backend.admission.count)
        training_pb2_grpc.add_TrainingServiceServicer_to_server(jobs, self._server)
        workers = WorkerService(training, adapters, backend.facts, backend.admission.check_open)
        training_pb2_grpc.add_WorkerServiceServicer_to_server(workers, self._server)

    async def _announce_drain(self) -> None:
        await self.health.announce_drain()
        if self._training is not None:
            self._training.job_desk.close()

    async def start(self, address: str) -> int:
        """Listen, and return the port.

        Raises: OSError if the address cannot be listened on.
        """
        try:
            port = self._add_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error
        await self.health.refresh()
        await self._server.start()
        self._poll = asyncio.get_running_loop().create_task(self.health.poll())
        return port

    def _add_port(self, address: str) -> int:
        if self._tls is None:
            return self._server.add_insecure_port(address)
        pair = (self._tls.private_key, self._tls.certificate)
        return self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))

    async def stop(self, grace_seconds: float) -> None:
        """Refuse new calls, give those that run this long to end, then cut them off; who only waits, at once."""
        if self._training is not None:
            self._training.job_desk.close()
        if self._poll is not None:
            self._poll.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poll
        await self._server.stop(grace_seconds)


def _service_names() -> list[str]:
    services = (
        adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"],
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
        server_pb2.DESCRIPTOR.services_by_name["ServerService"],
        tenant_pb2.DESCRIPTOR.services_by_name["TenantService"],
        *training_pb2.DESCRIPTOR.services_by_name.values(),
    )
    return [service.full_name for service in services]


def server_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Return what gRPC is told; it ignores a key that it does not know."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
        # Two servers on one port would each get half of the calls; the second shall fail instead.
        ("grpc.so_reuseport", 0),
        # Clients behind balancers ping more often than gRPC's default of five minutes allows.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A peer that vanished without closing is noticed, and its requests cancelled, within these.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
