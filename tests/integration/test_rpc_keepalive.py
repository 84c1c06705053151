"""Pings on a silent connection: the options are ones that gRPC knows, and the server takes our client's pings."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from motley_client.channel import options_of
from motley_client.endpoint import Endpoint
from motley_server.rpc.server import server_options
from rpc_harness import MIB, eventually, serving, text_request

INTERVAL = "grpc.http2.min_ping_interval_without_data_ms"
Options = list[tuple[str, int]]
IMPATIENT: Options = [("grpc.keepalive_time_ms", 200), ("grpc.http2.max_pings_without_data", 0)]


@pytest.mark.parametrize(
    "key", sorted({key for key, _ in [*server_options(MIB), *options_of(Endpoint("localhost:1"))]})
)
def test_grpc_knows_the_option(key: str) -> None:
    assert key.encode() + b"\0" in Path(cygrpc.__file__).read_bytes()


def test_the_client_waits_longer_between_pings_than_the_server_asks_for() -> None:
    client, server = dict(options_of(Endpoint("localhost:1"))), dict(server_options(MIB))
    assert int(client["grpc.keepalive_time_ms"]) > server[INTERVAL]


def test_the_client_takes_whatever_size_a_server_is_set_to_send() -> None:
    assert dict(options_of(Endpoint("localhost:1")))["grpc.max_receive_message_length"] == -1


async def watch_in_silence(options: Options, seconds: float) -> grpc.StatusCode | None:
    """Return how a call ended on which nothing happened for so long; None if it lives."""
    server = grpc.aio.server(options=options)
    servicer = health_pb2_grpc.HealthServicer()

    async def watch(request: object, context: object) -> object:
        await asyncio.sleep(60)
        return health_pb2.HealthCheckResponse()

    servicer.Check = watch
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=IMPATIENT) as channel:
            call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            done, _ = await asyncio.wait([asyncio.ensure_future(call.code())], timeout=seconds)
            return done.pop().result() if done else None
    finally:
        await server.stop(0)


@pytest.mark.parametrize(
    ("interval_ms", "seconds", "outcome"),
    [(100, 6.0, None), (300_000, 30.0, grpc.StatusCode.UNAVAILABLE)],
    ids=["allowed", "not allowed"],
)
def test_the_servers_option_decides_whether_pings_end_a_silent_call(
    interval_ms: int, seconds: float, outcome: grpc.StatusCode | None
) -> None:
    options = [(key, interval_ms if key == INTERVAL else value) for key, value in server_options(MIB)]
    assert asyncio.run(watch_in_silence(options, seconds)) is outcome


@pytest.mark.soak
def test_a_silent_call_of_our_client_outlives_five_minutes() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            shell.engine.may_step.clear()
            options = options_of(Endpoint(f"127.0.0.1:{shell.port}"))
            async with grpc.aio.insecure_channel(f"127.0.0.1:{shell.port}", options=options) as channel:
                call = channel.unary_unary("/motley.v1.InferenceService/Generate")(text_request().SerializeToString())
                await eventually(lambda: len(shell.engine.submitted) == 1)
                await asyncio.sleep(330)
                shell.engine.may_step.set()
                assert await call

    asyncio.run(scenario())
