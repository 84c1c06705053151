"""Quotas over a real wire: what a refusal says, that a change is felt at once, and that no tenant feels another's."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2
from motley.v1 import inference_pb2, tenant_pb2
from rpc_harness import Refusal, Shell, eventually, read_refusal, serving, text_request

PROMPT = inference_pb2.Prompt(text="hello")


async def refused(shell: Shell, request: inference_pb2.GenerateRequest) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await shell.inference.Generate(request)
    refusal = read_refusal(caught.value)
    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    quota = refusal.details["QuotaFailure"]
    assert isinstance(quota, error_details_pb2.QuotaFailure)
    assert [(one.subject, one.description) for one in quota.violations] == [(refusal.field, refusal.message)]
    return refusal


async def limit(shell: Shell, **quota: int) -> None:
    await shell.tenants.UpdateTenant(tenant_pb2.UpdateTenantRequest(id="local", quota=tenant_pb2.Quota(**quota)))


def test_a_refusal_names_its_quota_and_the_time_to_come_back() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await limit(shell, tokens_per_minute=1200)  # 20 a second
            await shell.inference.Generate(text_request(max_new_tokens=200))  # 206
            for _ in range(4):
                await shell.inference.Generate(text_request(max_new_tokens=200))
            refusal = await refused(shell, text_request(max_new_tokens=240))  # 246, and 170 are left
            assert (refusal.reason, refusal.field) == ("QUOTA_TOKENS_PER_MINUTE", "quota.tokens_per_minute")
            retry = refusal.details["RetryInfo"]
            assert isinstance(retry, error_details_pb2.RetryInfo)
            assert 2.0 < retry.retry_delay.ToMilliseconds() / 1000 <= 3.8
            assert shell.count("motley_quota_refusals_total", quota="tokens_per_minute") == 1
            assert shell.count("motley_requests_total", outcome="rejected") == 1

            await limit(shell, tokens_per_minute=100)
            refusal = await refused(shell, text_request(max_new_tokens=100))
            assert "never be admitted" in refusal.message
            assert "RetryInfo" not in refusal.details

    asyncio.run(scenario())


def test_a_caller_who_hangs_up_frees_the_place_and_another_tenant_never_misses_it() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await limit(shell, requests_in_flight=1)
            await shell.tenants.CreateTenant(tenant_pb2.CreateTenantRequest(id="other"))
            made = await shell.tenants.CreateKey(
                tenant_pb2.CreateKeyRequest(tenant_id="other", role=tenant_pb2.ROLE_USER)
            )
            shell.engine.may_step.clear()
            call = shell.inference.Generate(text_request())
            await eventually(lambda: len(shell.engine.submitted) == 1)
            refusal = await refused(shell, text_request())
            assert (refusal.reason, refusal.field) == ("QUOTA_REQUESTS_IN_FLIGHT", "quota.requests_in_flight")
            assert "RetryInfo" in refusal.details
            with pytest.raises(grpc.aio.AioRpcError, match="requests are in flight"):
                await shell.inference.Tokenize(inference_pb2.TokenizeRequest(prompt=PROMPT))
            bearer = (("authorization", f"Bearer {made.secret}"),)
            await shell.inference.Tokenize(inference_pb2.TokenizeRequest(prompt=PROMPT), metadata=bearer)

            call.cancel()
            await eventually(lambda: len(shell.engine.cancelled) == 1)
            shell.engine.may_step.set()
            await eventually(lambda: shell.engine.num_ends.total() == 1)
            await shell.inference.Generate(text_request())

    asyncio.run(scenario())


def test_every_call_of_inference_counts_as_a_request() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await limit(shell, requests_per_minute=5)
            await shell.inference.Generate(text_request())
            stream = shell.inference.GenerateStream(inference_pb2.GenerateStreamRequest(prompt=PROMPT))
            assert [message async for message in stream][-1].usage.prompt_tokens == 6
            await shell.inference.Score(inference_pb2.ScoreRequest(prompt=PROMPT, continuations=["a", "b", "c"]))
            await shell.inference.Tokenize(inference_pb2.TokenizeRequest(prompt=PROMPT))
            await shell.inference.Detokenize(inference_pb2.DetokenizeRequest(ids=[65]))
            assert (await refused(shell, text_request())).reason == "QUOTA_REQUESTS_PER_MINUTE"

    asyncio.run(scenario())
