"""The whole server over the embedded base: how it starts, serves an adapter, notices a stuck engine, and stops."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from motley.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)
from motley_bases.checkpoint import resolve_base
from motley_server.app import App, StartError, build, run
from motley_server.config import resolve
from peft_adapters import make_adapter
from rpc_harness import eventually, text_request

SERVE = "import typer; from motley_server.commands import serve; typer.run(serve)"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(resolve_base("tiny"), tmp_path_factory.mktemp("adapter"), seed=1)


@asynccontextmanager
async def running(tmp_path: Path, **flags: Any) -> AsyncIterator[tuple[App, grpc.aio.Channel]]:
    """Serve the embedded base in this process."""
    flags = {"listen": "127.0.0.1:0", "metrics": "", "data_dir": str(tmp_path), "dtype": "float32"} | flags
    environ = {"MOTLEY_ENGINE_KV_CACHE_BYTES": str(2**24), "MOTLEY_LIMITS_HEALTH_STALL_SECONDS": "1"}
    app = await build(resolve(environ, flags))
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
            yield app, channel
    finally:
        await app.stop()


def test_an_adapter_changes_the_answer_and_is_said_to_have_served_it(tmp_path: Path, adapter: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, adapters=[f"mine={adapter}"]) as (_, channel):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = text_request("upper: cat = ", max_new_tokens=12)
            request.sampling.ignore_eos = True
            alone = await stub.Generate(request)
            request.adapters.add(name="mine")
            under = await stub.Generate(request)
            assert len(alone.candidates[0].token_ids) == len(under.candidates[0].token_ids) == 12
            assert alone.candidates[0].token_ids != under.candidates[0].token_ids
            info = await server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest())
            stored = await adapter_pb2_grpc.AdapterServiceStub(channel).GetAdapter(
                adapter_pb2.GetAdapterRequest(name="mine")
            )
            (served,) = under.served_by.adapters
            assert (served.name, served.version, served.digest) == ("mine", 1, stored.version.digest)
            assert [(alias.name, alias.version) for alias in stored.adapter.aliases] == [("default", 1)]
            assert under.served_by.base_fingerprint == alone.served_by.base_fingerprint == info.base_fingerprint
            assert list(alone.served_by.adapters) == []

    asyncio.run(scenario())


def test_a_cancelled_stream_gives_back_its_blocks_and_leases(tmp_path: Path, adapter: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, adapters=[f"mine={adapter}"]) as (app, channel):
            request = inference_pb2.GenerateStreamRequest.FromString(
                text_request("hello", max_new_tokens=400, ignore_eos=True).SerializeToString()
            )
            request.adapters.add(name="mine")
            call = inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(request)
            await call.read()
            assert app.engine.stats().num_used_blocks > 0
            assert app.library.cache.num_leases == 1
            call.cancel()
            await eventually(lambda: app.engine.stats().num_used_blocks == 0)
            await eventually(lambda: app.library.cache.num_leases == 0)
            cancelled = {"outcome": "cancelled"}
            assert app.metrics.registry.get_sample_value("motley_requests_total", cancelled) == 1
            report = await app.rpc.lifecycle.drain(0.0)
            assert (report.num_finished, report.num_cancelled) == (0, 0)

    asyncio.run(scenario())


def test_a_stuck_engine_is_not_serving_while_calls_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from motley_server.engine.core import EngineCore

    is_stuck = threading.Event()
    release = threading.Event()
    step = EngineCore.step

    def stick(core: EngineCore) -> Any:
        if is_stuck.is_set():
            release.wait(20)
        return step(core)

    async def scenario() -> None:
        async with running(tmp_path) as (_, channel):
            stub = health_pb2_grpc.HealthStub(channel)
            inference = inference_pb2_grpc.InferenceServiceStub(channel)
            serving, not_serving = (health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING)
            check = health_pb2.HealthCheckRequest(service="motley.v1.InferenceService")
            assert (await stub.Check(check)).status == serving
            is_stuck.set()
            blocked = asyncio.ensure_future(inference.Generate(text_request(max_new_tokens=2)))
            async with asyncio.timeout(10):
                while (await stub.Check(check, timeout=1)).status == serving:
                    await asyncio.sleep(0.05)
            until = asyncio.get_running_loop().time() + 2
            while asyncio.get_running_loop().time() < until:
                assert (await stub.Check(check, timeout=1)).status == not_serving
                await asyncio.sleep(0.1)
            assert not blocked.done()
            release.set()
            assert (await blocked).usage.completion_tokens <= 2
            assert (await stub.Check(check)).status == serving

    monkeypatch.setattr(EngineCore, "step", stick)
    try:
        asyncio.run(scenario())
    finally:
        release.set()


def test_a_server_takes_jobs_unless_it_is_told_not_to(tmp_path: Path) -> None:
    async def capabilities(channel: grpc.aio.Channel) -> training_pb2.GetTrainingCapabilitiesResponse:
        stub = training_pb2_grpc.TrainingServiceStub(channel)
        return await stub.GetTrainingCapabilities(training_pb2.GetTrainingCapabilitiesRequest())

    async def scenario() -> None:
        async with running(tmp_path, **{"training.max_dataset_bytes": "1000", "training.lease_seconds": "7"}) as (
            _,
            channel,
        ):
            assert (await capabilities(channel)).max_dataset_bytes == 1000
            info = await server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest())
            worker = training_pb2.RegisterWorkerRequest(
                name="w", methods=[training_pb2.TRAINING_METHOD_LORA], base_fingerprint=info.base_fingerprint
            )
            told = await training_pb2_grpc.WorkerServiceStub(channel).RegisterWorker(worker)
            assert (told.lease_duration.seconds, told.quantization) == (7, info.quantization)
        async with running(tmp_path, **{"training.enabled": "false"}) as (app, channel):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await capabilities(channel)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert app.rpc.lifecycle.has_begun is False

    asyncio.run(scenario())


def test_what_cannot_be_served_is_refused_by_name_and_leaves_nothing_running(tmp_path: Path) -> None:
    async def start(environ: dict[str, str], **flags: Any) -> None:
        flags = {"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", "data_dir": str(tmp_path)} | flags
        await build(resolve(environ, flags))

    with pytest.raises(StartError, match=r"base /nowhere: NO_SUCH_BASE"):
        asyncio.run(start({}, base="/nowhere"))
    with pytest.raises(StartError, match=rf"adapter bad in {re.escape(str(tmp_path))}: "):
        asyncio.run(start({}, adapters=[f"bad={tmp_path}"]))
    with pytest.raises(StartError, match=r"engine.kv_cache_bytes: 1 bytes hold not even 16 tokens"):
        asyncio.run(start({"MOTLEY_ENGINE_KV_CACHE_BYTES": "1"}))
    assert {thread.name for thread in threading.enumerate()}.isdisjoint({"engine", "tokenizer_0"})


@contextmanager
def served(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command in a process of its own."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MOTLEY_ENGINE_KV_CACHE_BYTES": str(2**24)}
    command = [sys.executable, "-c", SERVE, *arguments]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def ready_address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("ready on "), line
    return line.split()[-1]


def test_sigterm_lets_what_runs_finish_and_refuses_what_comes(tmp_path: Path) -> None:
    flags = ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--data-dir", str(tmp_path), "--base", "tiny"]
    with served(*flags) as process, grpc.insecure_channel(ready_address(process)) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateStreamRequest.FromString(
            text_request("hello", max_new_tokens=250, ignore_eos=True).SerializeToString()
        )
        stream = stub.GenerateStream(request)
        num_tokens = len(next(stream).candidates[0].token_ids)
        process.send_signal(signal.SIGTERM)
        refusals = 0
        for message in stream:
            num_tokens += sum(len(one.token_ids) for one in message.candidates)
            if not refusals and num_tokens > 40:
                with pytest.raises(grpc.RpcError) as caught:
                    stub.Generate(text_request())
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
                refusals += 1
        assert (num_tokens, refusals) == (250, 1)
        assert process.wait(timeout=20) == 0
        assert process.stderr is not None
        log = process.stderr.read()
        assert "tenant 'local' with every role" in log
        assert "fingerprint sha256:" in log
        assert "KV cache for" in log
        assert "drained: 1 requests finished, 0 were cancelled" in log


def test_a_server_shows_metrics_and_ends_after_a_drain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> int:
        flags = {"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", "data_dir": str(tmp_path)}
        server = asyncio.create_task(run(resolve({"MOTLEY_ENGINE_KV_CACHE_BYTES": str(2**24)}, flags)))
        out = ""
        while "ready on" not in out and not server.done():
            out += capsys.readouterr().out
            await asyncio.sleep(0.01)
        [url] = re.findall(r"http://127.0.0.1:\d+/metrics", caplog.text)
        scraped = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read())
        assert b"motley_requests_running 0.0" in scraped
        async with grpc.aio.insecure_channel(out.split()[-1]) as channel:
            stub = server_pb2_grpc.ServerServiceStub(channel)
            assert await stub.Drain(server_pb2.DrainRequest()) == server_pb2.DrainResponse()
        return await asyncio.wait_for(server, 20)

    with caplog.at_level("INFO"):
        assert asyncio.run(scenario()) == 0


def test_a_server_whose_engine_dies_ends_with_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from motley_server.engine.core import EngineCore

    def die(core: EngineCore) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(EngineCore, "expire", die)
    flags = {"listen": "127.0.0.1:0", "metrics": "", "data_dir": str(tmp_path)}

    async def scenario() -> int:
        async with asyncio.timeout(30):
            return await run(resolve({"MOTLEY_ENGINE_KV_CACHE_BYTES": str(2**24)}, flags))

    assert asyncio.run(scenario()) == 1
