"""What a server says of itself, its health, and how it is emptied, over a real wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from motley.v1 import inference_pb2, server_pb2
from rpc_harness import CONTEXT, MIB, Shell, eventually, read_refusal, serving, text_request

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def health(shell: Shell, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(shell.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=2)
    return int(answer.status)


def test_server_info_tells_what_is_served_and_the_limits() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            info = await shell.server.GetServerInfo(server_pb2.GetServerInfoRequest())
            assert (info.version, info.base_model, info.architecture) == ("1.2.3", "paper", "PaperForCausalLM")
            assert (info.dtype, info.kernel, list(info.adapter_kinds)) == ("float32", "grouped", ["lora"])
            assert info.limits == server_pb2.Limits(
                max_message_bytes=16 * MIB, max_prompt_bytes=MIB, context_length=CONTEXT, max_adapters_per_request=8,
                max_candidates=16, max_logprobs=20, max_running_requests=64, max_waiting_requests=256,
            )  # fmt: skip

    asyncio.run(scenario())


def test_capacity_is_the_engines_and_the_adapters_ledger() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            assert await shell.server.GetCapacity(server_pb2.GetCapacityRequest()) == server_pb2.GetCapacityResponse(
                kv_bytes_total=100_000, kv_bytes_used=25_000, kv_tokens_total=1600, kv_tokens_free=1200,
                adapter_bytes_total=8192, adapter_bytes_used=4096, running_requests=0, waiting_requests=3,
                weight_bytes=4000, kv_bytes_per_token=60, adapter_device_bytes_total=2048,
                adapter_fits=[fit(8, 512, 4), fit(16, 1024, 2), fit(64, 4096, 0)],
            )  # fmt: skip
            asked = await shell.server.GetCapacity(server_pb2.GetCapacityRequest(ranks=[5, 1]))
            assert list(asked.adapter_fits) == [fit(5, 320, 6), fit(1, 64, 32)]

    asyncio.run(scenario())


@pytest.mark.parametrize("ranks", [[0], [8, -1], [65537], [8] * 17])
def test_ranks_that_no_adapter_has_are_refused(ranks: list[int]) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await shell.server.GetCapacity(server_pb2.GetCapacityRequest(ranks=ranks))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "ranks" in str(caught.value.details())

    asyncio.run(scenario())


def fit(rank: int, num_bytes: int, count: int) -> server_pb2.AdapterFit:
    """Write what a server tells of LoRAs of one rank."""
    return server_pb2.AdapterFit(rank=rank, bytes=num_bytes, count=count)


@pytest.mark.parametrize("service", ["", "motley.v1.InferenceService"])
def test_health_follows_the_engines_heartbeat(service: str) -> None:
    async def scenario() -> None:
        async with serving(stall_seconds=3.0) as shell:
            assert await health(shell, service) == SERVING
            shell.engine.heartbeat_age = 3.5
            assert await health(shell, service) == NOT_SERVING
            shell.engine.heartbeat_age = 0.1
            assert await health(shell, service) == SERVING

    asyncio.run(scenario())


def test_health_of_an_unknown_service_is_not_found() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health(shell, "motley.v1.Nothing")
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            method = "/grpc.health.v1.Health/Check"
            await eventually(
                lambda: shell.count("motley_grpc_server_handled_total", method=method, code="NOT_FOUND") == 1
            )

    asyncio.run(scenario())


def test_health_list_names_both_services() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            answer = await health_pb2_grpc.HealthStub(shell.channel).List(health_pb2.HealthListRequest())
            assert {name: one.status for name, one in answer.statuses.items()} == {
                "": SERVING,
                "motley.v1.InferenceService": SERVING,
            }

    asyncio.run(scenario())


def test_health_watch_tells_of_a_stall_unasked() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            call = health_pb2_grpc.HealthStub(shell.channel).Watch(health_pb2.HealthCheckRequest())
            assert (await call.read()).status == SERVING
            shell.engine.heartbeat_age = 60.0
            async with asyncio.timeout(5):
                assert (await call.read()).status == NOT_SERVING
            call.cancel()

    asyncio.run(scenario())


def test_drain_finishes_what_runs_and_refuses_what_comes() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            shell.engine.may_step.clear()
            running = asyncio.ensure_future(shell.inference.Generate(text_request(max_new_tokens=3)))
            await eventually(lambda: len(shell.engine.submitted) == 1)
            drain = asyncio.ensure_future(shell.server.Drain(server_pb2.DrainRequest()))
            await eventually(lambda: shell.engine.is_draining)
            assert await health(shell) == NOT_SERVING
            for call in (
                shell.inference.Generate(text_request()),
                shell.inference.Score(
                    inference_pb2.ScoreRequest(prompt=inference_pb2.Prompt(text="a"), continuations=["b"])
                ),
                shell.inference.Tokenize(inference_pb2.TokenizeRequest(prompt=inference_pb2.Prompt(text="a"))),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                refusal = read_refusal(caught.value)
                assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
                assert "RetryInfo" in refusal.details
            assert not drain.done()
            shell.engine.may_step.set()
            assert (await running).candidates[0].text == "abc"
            report = await drain
            assert (report.finished_requests, report.cancelled_requests) == (1, 0)
            await asyncio.wait_for(shell.rpc.lifecycle.wait_drained(), 1)

    asyncio.run(scenario())


def test_drain_cancels_what_outlives_its_timeout() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            shell.engine.may_step.clear()
            running = asyncio.ensure_future(shell.inference.Generate(text_request()))
            await eventually(lambda: len(shell.engine.submitted) == 1)
            report = await shell.server.Drain(server_pb2.DrainRequest(timeout=Duration(nanos=50_000_000)))
            assert (report.finished_requests, report.cancelled_requests) == (0, 1)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await running
            assert caught.value.code() is grpc.StatusCode.CANCELLED

    asyncio.run(scenario())


def test_a_second_drain_waits_for_the_first() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            reports = await asyncio.gather(shell.rpc.lifecycle.drain(), shell.rpc.lifecycle.drain(0.0))
            assert reports[0] is reports[1]

    asyncio.run(scenario())


async def listed_services(shell: Shell) -> set[str]:
    async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    stub = reflection_pb2_grpc.ServerReflectionStub(shell.channel)
    async for answer in stub.ServerReflectionInfo(requests()):
        return {service.name for service in answer.list_services_response.service}
    return set()


def test_reflection_names_every_service() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            assert await listed_services(shell) == {
                "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", "motley.v1.InferenceService",
                "motley.v1.ServerService", "motley.v1.AdapterService", "motley.v1.TenantService",
                "motley.v1.TrainingService", "motley.v1.WorkerService",
            }  # fmt: skip

    asyncio.run(scenario())


def test_reflection_can_be_switched_off() -> None:
    async def scenario() -> None:
        async with serving(reflection=False) as shell:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await listed_services(shell)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(scenario())


def test_two_servers_cannot_share_a_port() -> None:
    async def scenario() -> None:
        async with serving() as first, serving() as second:
            with pytest.raises(OSError, match="cannot listen"):
                await second.rpc.start(f"127.0.0.1:{first.port}")

    asyncio.run(scenario())
