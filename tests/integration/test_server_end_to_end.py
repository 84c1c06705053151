"""The whole server in one process: the embedded base, its adapters, the real engine, a real wire."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import grpc
import pytest
from motley.v1 import inference_pb2, inference_pb2_grpc
from motley_client import AsyncClient, ChatMessage, Generation, MotleyClientError
from motley_server.app import App, build
from motley_server.config import EngineConfig, LimitsConfig, ServerConfig
from motley_server.config_values import Address
from motley_server.engine.engine import Engine
from prometheus_client.parser import text_string_to_metric_families

WORDS = ("winter", "stone", "planet", "river", "copper", "garden", "yellow", "market")


def embedded_adapters() -> dict[str, Path]:
    spec = find_spec("motley_adapters")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0]) / "assets" / "tiny"
    return {path.name: path for path in sorted(root.iterdir()) if path.is_dir()}


@dataclass
class Running:
    """A server that runs, and a client of it."""

    app: App
    client: AsyncClient

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.app.port}"

    @property
    def engine(self) -> Engine:
        assert isinstance(self.app.engine, Engine)
        return self.app.engine

    @property
    def num_passes(self) -> int:
        return self.engine.core.runner.num_forward_passes

    def metrics(self) -> dict[str, float]:
        """Return every sample of /metrics, by name and labels."""
        assert self.app.endpoint is not None
        with urllib.request.urlopen(f"http://127.0.0.1:{self.app.endpoint.port}/metrics", timeout=5) as response:
            text = response.read().decode()
        return {
            sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    async def settle(self) -> None:
        """Wait until the engine has nothing left, then check that nothing leaked."""
        async with asyncio.timeout(10):
            while self.engine.stats().num_used_blocks or self.engine.core.num_requests:
                await asyncio.sleep(0.005)
        self.engine.core.check_integrity()
        assert self.app.library.cache.num_leases == 0


@asynccontextmanager
async def serving(
    tmp_path: Path, engine: EngineConfig | None = None, limits: LimitsConfig | None = None
) -> AsyncIterator[Running]:
    config = ServerConfig(
        dtype="float32",
        listen=Address("127.0.0.1", 0),
        metrics=Address("127.0.0.1", 0),
        data_dir=tmp_path,
        engine=engine or EngineConfig(),
        limits=limits or LimitsConfig(),
        adapters=embedded_adapters(),
    )
    app = await build(config)
    try:
        async with AsyncClient(f"127.0.0.1:{app.port}", timeout=60) as client:
            running = Running(app, client)
            yield running
            await running.settle()
    finally:
        await app.stop()


def questions() -> list[tuple[str, tuple[str, ...]]]:
    """Every word to the base and to every adapter."""
    names = list(embedded_adapters())
    return [
        (f"{skill}: {word} =", adapters)
        for word in WORDS
        for skill, adapters in [("upper", ()), *((name, (name,)) for name in names)]
    ]


def test_one_wave_is_answered_by_what_each_request_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as server:
            asked = questions()
            before = server.num_passes
            answers = await asyncio.gather(
                *(server.client.generate(prompt, adapters=names, max_new_tokens=12) for prompt, names in asked)
            )
            num_passes = server.num_passes - before
            for (_, names), answer in zip(asked, answers, strict=True):
                assert tuple(adapter.name for adapter in answer.served_by.adapters) == names
            assert len(asked) >= 32
            assert num_passes <= 30, "the requests were not batched"
            by_prompt = {prompt: answer.text.strip() for (prompt, _), answer in zip(asked, answers, strict=True)}
            assert sum(by_prompt[f"upper: {word} ="] == word.upper() for word in WORDS) >= 7
            assert sum(by_prompt[f"reverse: {word} ="] == word[::-1] for word in WORDS) >= 7

    asyncio.run(scenario())


def test_a_stream_comes_in_pieces_and_starts_early(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            sampling = inference_pb2.SamplingParams(max_new_tokens=64, ignore_eos=True)
            prompt = inference_pb2.Prompt(text="the old")
            request = inference_pb2.GenerateStreamRequest(prompt=prompt, sampling=sampling)
            began = time.monotonic()
            arrivals, messages = [], []
            async for message in stub.GenerateStream(request):
                arrivals.append(time.monotonic() - began)
                messages.append(message)
            tokens = [token for message in messages for one in message.candidates for token in one.token_ids]
            assert len(tokens) == 64
            assert len(messages) >= 32
            assert arrivals[0] < arrivals[-1] / 4
            assert messages[0].served_by.base_fingerprint.startswith("sha256:")
            assert [message.HasField("usage") for message in messages] == [False] * (len(messages) - 1) + [True]

    asyncio.run(scenario())


def test_two_hundred_streams_with_a_third_cancelled_midway(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = EngineConfig(max_running=48, token_budget=256, kv_cache_bytes=4 * 2**20)
        async with serving(tmp_path, engine=engine) as server:
            asked = questions()[:40]  # every adapter, three times
            expected = [
                (await server.client.generate(prompt, adapters=names, max_new_tokens=24)).text
                for prompt, names in asked
            ]

            async def ask(index: int) -> str | None:
                prompt, names = asked[index % len(asked)]
                text = ""
                async with aclosing(server.client.stream(prompt, adapters=names, max_new_tokens=24)) as stream:
                    async for part in stream:
                        text += part.text
                        if index % 3 == 0 and len(text) >= 2:
                            return None
                return text

            answers = await asyncio.gather(*(ask(index) for index in range(200)))
            for index, answer in enumerate(answers):
                assert answer == (
                    None if index % 3 == 0 and len(expected[index % len(asked)]) >= 2 else expected[index % len(asked)]
                )
            assert answers.count(None) >= 60

    asyncio.run(scenario())


def test_every_series_equals_the_truth_of_a_driven_load(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as server:
            names = list(embedded_adapters())
            answers: list[Generation] = await asyncio.gather(
                *(
                    server.client.generate(
                        f"upper: {word} =", adapters=(names[index % len(names)],), max_new_tokens=6, ignore_eos=True
                    )
                    for index, word in enumerate(WORDS)
                )
            )
            answers.append(await server.client.generate(f"upper: {WORDS[0]} =", max_new_tokens=20))
            for _ in range(2):
                with pytest.raises(MotleyClientError):
                    await server.client.generate("x", adapters=("nobody",))
            await server.settle()
            seen = server.metrics()
            tokens = sum(answer.usage.completion_tokens for answer in answers)
            stopped = sum(answer.finish_reason.value == "stop" for answer in answers)
            assert seen["motley_requests_total[length]"] == len(answers) - stopped
            assert seen["motley_requests_total[stop]"] == stopped
            assert seen["motley_requests_total[rejected]"] == 2
            assert seen["motley_generation_tokens_total"] == tokens
            assert seen["motley_prompt_tokens_total"] == sum(answer.usage.prompt_tokens for answer in answers)
            assert seen["motley_time_to_first_token_seconds_count"] == len(answers)
            assert seen["motley_inter_token_latency_seconds_count"] == tokens - len(answers)
            assert seen["motley_e2e_request_latency_seconds_count"] == len(answers)
            assert seen["motley_request_queue_time_seconds_count"] == len(answers)
            for name in ("forward_passes_total", "step_seconds_count", "batch_size_count", "batch_tokens_count"):
                assert seen[f"motley_{name}"] == server.num_passes
            assert seen["motley_batch_distinct_adapters_count"] == server.num_passes
            # Every prompt token and every answer token but the last of each is computed exactly once.
            prompts = seen["motley_prompt_tokens_total"] - seen["motley_prefix_cache_hits_total"]
            assert seen["motley_batch_tokens_sum"] == prompts + tokens - len(answers)
            assert seen["motley_requests_running"] == seen["motley_requests_waiting"] == 0
            assert seen["motley_kv_cache_usage_ratio"] == 0
            assert seen["motley_preemptions_total"] == 0
            assert seen["motley_prefix_cache_queries_total"] == seen["motley_prompt_tokens_total"]
            method = "/motley.v1.InferenceService/Generate"
            assert seen[f"motley_grpc_server_handled_total[OK][{method}]"] == len(answers)
            assert seen[f"motley_grpc_server_handled_total[NOT_FOUND][{method}]"] == 2

    asyncio.run(scenario())


def test_requests_that_end_otherwise_are_counted_as_what_they_were(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = EngineConfig(max_running=4, kv_cache_bytes=2**19, block_size=4)
        async with serving(tmp_path, engine=engine) as server:
            client = server.client
            before = server.metrics()
            await asyncio.gather(
                *(client.generate(f"the old {word}", max_new_tokens=80, ignore_eos=True) for word in WORDS[:4])
            )
            await client.score("upper: stone =", [" STONE", " stone"])
            with pytest.raises(MotleyClientError):
                await client.generate("the old", max_new_tokens=100, ignore_eos=True, timeout=0.05)
            async with aclosing(client.stream("the old", max_new_tokens=100, ignore_eos=True)) as stream:
                async for _ in stream:
                    break
            await server.settle()
            seen = server.metrics()
            outcomes = ("length", "score", "deadline", "cancelled", "stop", "rejected", "error")
            counted = {
                one: seen[f"motley_requests_total[{one}]"] - before[f"motley_requests_total[{one}]"] for one in outcomes
            }
            late = counted["deadline"] + counted["cancelled"]
            assert late == 2, "the deadline is told by the engine or by the caller's going, whichever is first"
            assert counted["cancelled"] >= 1
            assert (counted["length"], counted["score"]) == (4, 2)
            assert counted["stop"] == counted["rejected"] == counted["error"] == 0
            assert seen["motley_e2e_request_latency_seconds_count"] == 8
            assert seen["motley_preemptions_total"] > 0

    asyncio.run(scenario())


def test_a_full_queue_refuses_with_a_time_to_come_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, engine=replace(EngineConfig(), max_running=1, max_waiting=1)) as server:
            requests = [server.client.generate("the old", max_new_tokens=40, ignore_eos=True) for _ in range(6)]
            results = await asyncio.gather(*requests, return_exceptions=True)
            refused = [result for result in results if isinstance(result, MotleyClientError)]
            assert len(refused) == 4
            assert {error.reason for error in refused} == {"QUEUE_FULL"}
            assert all(error.retry_after_seconds for error in refused)

    asyncio.run(scenario())


def test_a_deadline_ends_a_request_and_frees_its_blocks(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as server:
            with pytest.raises(MotleyClientError) as caught:
                await server.client.generate("the old", max_new_tokens=480, ignore_eos=True, timeout=0.15)
            assert caught.value.code == "DEADLINE_EXCEEDED"
            await server.settle()

    asyncio.run(scenario())


def test_stop_strings_conversations_and_scores(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as server:
            client = server.client
            whole = await client.generate("upper: garden =", max_new_tokens=12)
            assert whole.text.strip() == "GARDEN"
            cut = await client.generate("upper: garden =", max_new_tokens=12, stop=["RDE"])
            assert cut.text.strip() == "GA"
            assert cut.finish_reason is not None
            assert cut.finish_reason.value == "stop"
            parts = [
                part.text async for part in client.stream("upper: garden =", max_new_tokens=12, stop=["RDE", "GAX"])
            ]
            assert "".join(parts) == cut.text
            chat = await client.generate(messages=[ChatMessage("user", "upper: garden =")], max_new_tokens=12)
            assert chat.text.strip() == "GARDEN"
            scored = await client.score("reverse: garden =", [" nedrag", " garden"], adapters=("reverse",))
            assert scored.scores[0].logprob > scored.scores[1].logprob
            assert [one.is_greedy for one in scored.scores] == [True, False]
            base = await client.score("reverse: garden =", [" nedrag"])
            assert base.scores[0].logprob < scored.scores[0].logprob

    asyncio.run(scenario())
